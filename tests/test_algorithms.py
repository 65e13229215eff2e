"""Unmodified SB3 and sb3-contrib algorithms train a PixelCNN on whole images; every algorithm solves the toy."""

import time

import gymnasium as gym
import numpy as np
import pytest
import torch
from sb3_contrib import TRPO, MaskablePPO
from stable_baselines3 import A2C
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import RolloutBufferSamples

from ral_gym.agents import (
    ALGORITHMS,
    CodeVecEnv,
    MaskableEpisodeRolloutBuffer,
    MaskablePixelCNNPolicy,
    PixelCNNPolicy,
    algorithm_defaults,
    make_sb3_env,
    policy_for,
)
from ral_gym.agents.algorithm import check_algorithm, trainable_algorithms
from ral_gym.envs.worlds import toy_score_map, toy_world
from ral_gym.errors import ConfigError
from ral_gym.priors.pixelcnn import PixelCNN

T, K = 16, 8
UNMODIFIED = ("ppo", "a2c", "trpo", "maskable_ppo")


def tiny_prior(units: int = 12, layers: int = 2) -> PixelCNN:
    arguments = {"conv_filter_size": 3, "output_stack_layers": 1, "layers": layers}
    return PixelCNN(K, 4, 4, hidden_units=units, residual_units=units, **arguments)


def make(algo: str, n_envs: int = 6, reset_mode: str = "mixed", env: CodeVecEnv | None = None, **kwargs: object):
    torch.manual_seed(1)
    env = env or make_sb3_env("ral_gym/Toy-v0", n_envs, reset_mode=reset_mode, lockstep=False, seed=0)
    arguments = algorithm_defaults(algo, env) | {"seed": 0, "device": "cpu", "policy_kwargs": {"prior": tiny_prior()}}
    return ALGORITHMS[algo](policy_for(algo), env, **(arguments | kwargs))


def rollout(model: BaseAlgorithm) -> None:
    _, callback = model._setup_learn(1, None, reset_num_timesteps=False)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)


@pytest.mark.parametrize("algo", UNMODIFIED)
@pytest.mark.parametrize("n_steps", [T, 21])
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")  # 21 steps are no whole minibatches
def test_ratio_is_one_on_the_first_pass_also_where_episodes_straddle_rollouts(algo: str, n_steps: int) -> None:
    model = make(algo, n_steps=n_steps)
    for _ in range(2):
        rollout(model)
    model.policy.set_training_mode(True)
    seen = 0
    for batch in model.rollout_buffer.get(48):
        _, log_prob, _ = model.policy.evaluate_actions(batch.observations, batch.actions)
        assert (log_prob - batch.old_log_prob).abs().max() <= 1e-5
        distribution = model.policy.get_distribution(batch.observations)
        torch.testing.assert_close(distribution.log_prob(batch.actions.long().flatten()), log_prob)
        seen += len(batch.actions)
    assert seen == model.rollout_buffer.mask.sum() > 0


@pytest.mark.parametrize(("algo", "n_steps"), [("ppo", T), ("a2c", T), ("a2c", 21), ("maskable_ppo", T), ("trpo", 21)])
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")  # 21 steps are no whole minibatches
def test_training_changes_every_layer_and_the_value_head(algo: str, n_steps: int) -> None:
    """TRPO skips every parameter with "value" in its name: none of the PixelCNN's may have it."""
    model = make(algo, 16, n_steps=n_steps, learning_rate=1e-3)
    before = {name: weights.clone() for name, weights in model.policy.named_parameters()}
    model.learn(n_steps * 16 * 2)
    if algo == "trpo":
        assert model.logger.name_to_value["train/is_line_search_success"] == 1.0
        assert model.logger.name_to_value["train/kl_divergence_loss"] > 0
    same = [name for name, weights in model.policy.named_parameters() if torch.equal(weights, before[name])]
    assert same == []
    assert [name for name in before if "value" in name] == [n for n in before if n.startswith("value_net.")]


def test_trpo_learns_from_a_share_of_the_transitions() -> None:
    """`sub_sampling_factor` slices the episodes: the transitions get fewer, the grids stay."""
    model = make("trpo", sub_sampling_factor=3)
    rollout(model)
    batch = next(model.rollout_buffer.get(None))
    part = RolloutBufferSamples(batch.observations[::3], *(x[::3] for x in batch[1:]))
    _, every, _ = model.policy.evaluate_actions(batch.observations, batch.actions)
    _, some, _ = model.policy.evaluate_actions(part.observations, part.actions)
    assert len(part.observations) == len(some) == -(-len(every) // 3)
    torch.testing.assert_close(some, every[::3])
    before = torch.nn.utils.parameters_to_vector(model.policy.prior.parameters())
    model.train()
    assert not torch.equal(before, torch.nn.utils.parameters_to_vector(model.policy.prior.parameters()))


def test_trpo_keeps_to_its_trust_region() -> None:
    model = make("trpo", 16, reset_mode="full", target_kl=0.003)
    rollout(model)
    episodes = model.rollout_buffer.episodes()
    with torch.no_grad():
        old = model.policy.get_distribution(episodes).distribution
    model.train()
    with torch.no_grad():
        new = model.policy.get_distribution(episodes).distribution
    assert 0 < torch.distributions.kl_divergence(new, old).mean() < 0.003


@pytest.mark.parametrize("algo", [*UNMODIFIED, "grpo"])
def test_save_and_load_act_alike_and_go_on(algo: str, tmp_path) -> None:
    model = make(algo, reset_mode="full")
    model.learn(T * 6)
    model.save(tmp_path / "model")
    env = make_sb3_env("ral_gym/Toy-v0", 6, seed=3)
    loaded = ALGORITHMS[algo].load(tmp_path / "model", env=env, device="cpu")
    obs = np.full((3, T), K, np.int16)
    obs[1, :5], obs[2, 8:] = [1, 2, 3, 4, 5], K + 1
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
    loaded.learn(T * 6, reset_num_timesteps=False)
    assert loaded.num_timesteps == 2 * T * 6


class MaskedEnv(CodeVecEnv):
    """Even codes at even positions, odd ones at odd ones."""

    legal = np.arange(K) % 2 == np.arange(T)[:, None] % 2  # (T, K)

    def env_method(self, method_name: str, *args, indices=None, **kwargs):
        assert method_name == "action_masks"
        return list(self.legal[self.core.position])


def masked_env(reset_mode: str = "full") -> MaskedEnv:
    env = MaskedEnv(toy_world(), 6, reset_mode=reset_mode, lockstep=False)
    env.seed(0)
    return env


@pytest.mark.parametrize("reset_mode", ["full", "mixed"])
def test_forbidden_codes_are_never_drawn_and_their_probability_is_shared_out(reset_mode: str) -> None:
    model = make("maskable_ppo", env=masked_env(reset_mode), n_steps=21)
    for _ in range(3):
        rollout(model)
    buffer = model.rollout_buffer
    episode, pos = np.nonzero(buffer.mask)
    assert (buffer.codes[episode, pos] % 2 == pos % 2).all()
    with torch.no_grad():
        logits = model.policy.prior(torch.as_tensor(buffer.codes.astype(np.int64)))[episode, pos]  # (N, K)
    logits[~torch.as_tensor(MaskedEnv.legal[pos])] = -torch.inf
    expected = logits.log_softmax(1).gather(1, torch.as_tensor(buffer.codes[episode, pos]).long()[:, None])[:, 0]
    np.testing.assert_allclose(buffer.log_probs, expected, atol=1e-5)
    for batch in buffer.get(40):
        assert batch.action_masks.dtype == torch.bool and batch.action_masks.shape == (len(batch.actions), K)
        arguments = (batch.observations, batch.actions, batch.action_masks)
        _, log_prob, entropy = model.policy.evaluate_actions(*arguments)
        assert (log_prob - batch.old_log_prob).abs().max() <= 1e-5
        assert entropy.max() <= np.log(K / 2) + 1e-5
    model.train()


def test_predict_obeys_masks_through_the_cache() -> None:
    model = make("maskable_ppo", env=masked_env())
    obs = np.full((2, T), K, np.int16)
    for position in range(T):
        codes, _ = model.predict(obs, action_masks=np.tile(MaskedEnv.legal[position], (2, 1)))
        assert (codes % 2 == position % 2).all()
        obs[:, position] = codes
    assert model.policy._caches["predict"].misses == 2
    with pytest.raises(ValueError, match="forbid every code"):
        model.predict(obs[:, :], action_masks=np.zeros((2, K), bool))


def test_masks_are_stored_once_each_and_not_at_all_while_everything_is_legal() -> None:
    free = make("maskable_ppo")
    rollout(free)
    assert len(free.rollout_buffer._mask_rows) == 1
    assert next(free.rollout_buffer.get(None)).action_masks is None
    bound = make("maskable_ppo", env=masked_env(), n_steps=21)
    for _ in range(3):
        rollout(bound)
        assert len(bound.rollout_buffer._mask_rows) == 3  # everything, even, odd
    saved = bound.rollout_buffer.state_dict()
    other = make("maskable_ppo", env=masked_env(), n_steps=21).rollout_buffer
    other.load_state_dict(saved)
    other.reset()
    bound.rollout_buffer.reset()
    np.testing.assert_array_equal(other._mask_ids, bound.rollout_buffer._mask_ids)
    np.testing.assert_array_equal(other._mask_rows, bound.rollout_buffer._mask_rows)


def test_maskable_ppo_takes_the_pair() -> None:
    model = make("maskable_ppo")
    assert isinstance(model, MaskablePPO) and isinstance(model.policy, MaskablePixelCNNPolicy)
    assert isinstance(model.rollout_buffer, MaskableEpisodeRolloutBuffer)
    with pytest.raises(ValueError, match="Policy must subclass MaskableActorCriticPolicy"):
        MaskablePPO(PixelCNNPolicy, model.env, policy_kwargs={"prior": tiny_prior()}, device="cpu")


@pytest.mark.parametrize("algo", ["sac", "td3", "ddpg", "tqc", "crossq"])
def test_continuous_algorithms_are_refused_with_the_reason(algo: str) -> None:
    env = make_sb3_env("ral_gym/Toy-v0", 1)
    with pytest.raises(ConfigError, match=f"'{algo}' acts in continuous spaces only.* discrete codes: choose one of"):
        algorithm_defaults(algo, env)


def test_stage_three_refuses_algorithms_without_a_pixelcnn() -> None:
    for algo in trainable_algorithms():
        check_algorithm(algo)
    with pytest.raises(ConfigError, match="'dqn' learns a value per code and trains no prior"):
        check_algorithm("dqn")


def test_defaults_suit_terminal_rewards() -> None:
    env = make_sb3_env("ral_gym/Toy-v0", 8)
    for algo in ALGORITHMS:
        arguments = algorithm_defaults(algo, env)
        assert arguments["gamma"] == 1.0
        assert arguments["n_steps"] == T or algo in ("dqn", "qrdqn")
    assert not isinstance(make("a2c").policy.optimizer, torch.optim.RMSprop)
    assert issubclass(ALGORITHMS["a2c"], A2C) and issubclass(ALGORITHMS["trpo"], TRPO)


SETTINGS: dict[str, dict] = {
    "reinforce": {"learning_rate": 5e-3, "ent_coef": 0.05},  # without a bonus it can end on one image
    "grpo": {"learning_rate": 5e-3},
    "a2c": {"learning_rate": 5e-3},
    # From scratch there is no pretrained start to stay near: the cautious defaults only slow these down.
    "ppo": {"learning_rate": 5e-3, "clip_range": 0.2, "target_kl": None, "n_epochs": 4},
    "maskable_ppo": {"learning_rate": 5e-3, "clip_range": 0.2, "target_kl": None, "n_epochs": 4},
    "trpo": {"learning_rate": 3e-3, "target_kl": 0.05, "cg_max_steps": 5, "n_critic_updates": 1},
}
SECONDS = 15


class UntilSolved(BaseCallback):
    """Stops once the episodes of the last rounds beat the threshold with a margin, or when time is up."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold + 0.02

    def _on_training_start(self) -> None:
        self.began = time.process_time()

    def _on_step(self) -> bool:
        shown = [episode["r"] for episode in self.model.ep_info_buffer]
        solved = len(shown) == 100 and np.mean(shown) > self.threshold
        return not solved and time.process_time() - self.began < SECONDS


@pytest.mark.parametrize("algo", trainable_algorithms())
def test_solves_the_toy_from_its_terminal_reward(algo: str) -> None:
    """From a random start (mean reward 0.18) to the spec's threshold, with one reward per image, inside 15 s."""
    threshold = gym.spec("ral_gym/Toy-v0").reward_threshold
    env = make_sb3_env("ral_gym/Toy-v0", 64, seed=0)
    model = make(algo, env=env, **SETTINGS[algo], policy_kwargs={"prior": tiny_prior(24, 1)})
    callback = UntilSolved(threshold)
    model.learn(10**7, callback=callback)
    assert time.process_time() - callback.began < SECONDS
    drawn, _ = model.policy.cache.sampler().sample(256)
    assert toy_score_map(drawn).mean() > threshold
