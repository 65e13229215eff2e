"""The critic's reward step by step and by a wrapper; regularizers around unmodified algorithms."""

import math
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from sb3_contrib import TRPO
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from ral_gym.agents import (
    CodeFeatures,
    CodeVecEnv,
    CoTrainedCritic,
    CriticCallback,
    CriticRewardWrapper,
    EntropyTarget,
    EpisodeRolloutBuffer,
    MLEShare,
    PixelCNNPolicy,
    PriorKLReward,
    Reinforce,
    StepCriticCallback,
    make_sb3_env,
)
from ral_gym.config import CriticConfig
from ral_gym.envs.worlds import World
from ral_gym.errors import ConfigError
from ral_gym.grid import CodeGrid
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.rewards.critic import PatchCritic
from ral_gym.tokenizers.vqvae import VQVAE

GRID, T, K = CodeGrid(4, 4, 8), 16, 8
CONFIG = CriticConfig(hidden_units=4, layers=2, learning_rate=1e-3, batch_size=4, warmup_steps=12, n_critic=3)


@pytest.fixture
def vqvae() -> VQVAE:
    model = VQVAE(16, 1, codebook_size=K, codebook_dim=4, hidden_units=8, residual_units=4, layers=2)
    return model.eval()


def real_codes() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3, (40, T)).astype(np.int16)


def make_critic(vqvae: VQVAE, reward: str = "single", **changes: object) -> CoTrainedCritic:
    critic = PatchCritic(16, 1, hidden_units=4, layers=2)
    real = real_codes()
    return CoTrainedCritic(vqvae, critic, real[:30], real[30:], replace(CONFIG, **changes), reward=reward)


def make_env(vqvae: VQVAE, n_envs: int = 6, reset_mode: str = "full") -> CodeVecEnv:
    world = World(GRID, vqvae.decode, None, real_codes(), 1, torch.device("cpu"))
    env = CodeVecEnv(world, n_envs, reset_mode=reset_mode, lockstep=False)
    env.seed(0)
    return env


def make_model(algo: str, env, **kwargs: object):
    arguments = {"seed": 0, "device": "cpu"} | kwargs
    if algo == "dqn":
        features = {"features_extractor_class": CodeFeatures, "net_arch": [16]}
        return DQN("MlpPolicy", env, policy_kwargs=features, learning_starts=32, buffer_size=1000, **arguments)
    prior = PixelCNN(K, 4, 4, hidden_units=8, residual_units=8, layers=1, conv_filter_size=3, output_stack_layers=1)
    arguments["policy_kwargs"] = {"prior": prior}
    if algo == "reinforce":
        return Reinforce(PixelCNNPolicy, env, **arguments)
    arguments = {"n_steps": T, "batch_size": T * env.num_envs} | arguments
    arguments |= {"rollout_buffer_class": EpisodeRolloutBuffer}
    if algo == "ppo":
        arguments = {"n_epochs": 2} | arguments
    cls = {"ppo": PPO, "trpo": TRPO}[algo]
    return cls(PixelCNNPolicy, env, gamma=1.0, gae_lambda=1.0, **arguments)


class Scores(BaseCallback):
    """Notes every score given, and the rewards of the steps that end episodes as the algorithm will store them."""

    def __init__(self) -> None:
        super().__init__()
        self.stored: list[float] = []

    def _on_step(self) -> bool:
        self.stored += self.locals["rewards"][self.locals["dones"]].tolist()
        assert (self.locals["rewards"][~self.locals["dones"]] == 0).all()
        return True


def spy(feed) -> list[float]:
    given: list[float] = []
    score = feed.score

    def noted(codes: np.ndarray) -> np.ndarray:
        given.extend(score(codes).tolist())
        return np.array(given[-len(codes) :], np.float32)

    feed.score = noted
    return given


class SpyingCallback(StepCriticCallback):
    def _init_callback(self) -> None:
        super()._init_callback()
        self.given = spy(self.feed)


@pytest.mark.parametrize("algo", ["dqn", "ppo", "reinforce"])
@pytest.mark.parametrize("route", ["step", "wrapper"])
def test_the_true_reward_is_stored_and_shown(vqvae: VQVAE, algo: str, route: str) -> None:
    critic = make_critic(vqvae)
    env = make_env(vqvae, reset_mode="mixed")
    scores = Scores()
    if route == "step":
        callback = SpyingCallback(critic)
        model = make_model(algo, env)
        model.learn(T * 6 * 3, callback=CallbackList([callback, scores]))
        given = callback.given
    else:
        wrapped = CriticRewardWrapper(env, critic)
        given = spy(wrapped.feed)
        model = make_model(algo, wrapped)
        model.learn(T * 6 * 3, callback=scores)
    assert len(given) >= 18 and np.abs(given).max() > 1e-3
    assert scores.stored == pytest.approx(given)
    shown = [episode["r"] for episode in model.ep_info_buffer]
    assert shown == pytest.approx(given[-len(shown) :])
    if algo == "dqn":
        buffer = model.replay_buffer
        done = buffer.dones[: buffer.pos].astype(bool)
        assert buffer.rewards[: buffer.pos][done].tolist() == pytest.approx(given)
    else:
        rewards = model.rollout_buffer.rewards
        assert set(np.round(rewards[rewards != 0], 6)) <= set(np.round(np.float32(given), 6))
    assert critic.n_updates > CONFIG.warmup_steps


@pytest.mark.parametrize("route", ["step", "wrapper"])
def test_no_image_is_scored_by_a_critic_that_has_learnt_from_it(vqvae: VQVAE, route: str) -> None:
    critic = make_critic(vqvae)
    events: list[tuple[str, set]] = []
    train = critic.train
    critic.train = lambda pool, n: (events.append(("learn", {*map(tuple, pool.codes.tolist())})), train(pool, n))[1]
    env = make_env(vqvae)
    callback = None
    if route == "step":
        callback = SpyingCallback(critic, episodes_per_update=9)
    else:
        env = CriticRewardWrapper(env, critic, episodes_per_update=9)
    model = make_model("dqn", env)
    warm_up = len(events)
    feed_score = None

    def noted(codes: np.ndarray) -> np.ndarray:
        events.append(("score", {*map(tuple, codes.tolist())}))
        return feed_score(codes)

    if route == "wrapper":
        feed_score, env.feed.score = env.feed.score, noted
    else:
        original = callback._init_callback

        def init() -> None:
            nonlocal feed_score
            original()
            feed_score, callback.feed.score = callback.feed.score, noted

        callback._init_callback = init
    model.learn(T * 6 * 6, callback=callback)
    kinds = [kind for kind, _ in events[warm_up if route == "wrapper" else 2 :]]
    assert kinds == ["score", "score", "learn"] * 3  # two times six episodes, then a round of twelve
    learnt: set = set()
    for kind, grids in events:
        if kind == "learn":
            learnt |= grids
        else:
            assert not learnt & grids


def test_an_evaluation_wrapper_scores_and_does_not_teach(vqvae: VQVAE) -> None:
    critic = make_critic(vqvae)
    CriticRewardWrapper(make_env(vqvae), critic)
    updates = critic.n_updates
    assert updates == CONFIG.warmup_steps
    env = CriticRewardWrapper(make_env(vqvae), critic, train_critic=False)
    env.reset()
    for _ in range(T * 5):
        _, rewards, dones, infos = env.step(np.zeros(6, np.int64))
    assert dones.all() and (rewards != 0).all() and infos[0]["original_env_reward"] == 0
    assert critic.n_updates == updates and env.feed._codes == []


def test_intermediate_rewards_and_strange_environments_are_refused(vqvae: VQVAE) -> None:
    critic = make_critic(vqvae, reward="intermediate")
    reason = "known only with the finished image.*use reward 'single', or CriticCallback"
    with pytest.raises(ConfigError, match=reason):
        CriticRewardWrapper(make_env(vqvae), critic)
    with pytest.raises(ConfigError, match=reason):
        make_model("dqn", make_env(vqvae)).learn(T, callback=StepCriticCallback(critic))
    with pytest.raises(ConfigError, match="make_sb3_env"):
        CriticRewardWrapper(DummyVecEnv([lambda: gym.make("ral_gym/Toy-v0")]), make_critic(vqvae))
    normalised = VecNormalize(make_env(vqvae), norm_obs=False)
    with pytest.raises(ConfigError, match="VecNormalize stores its own copy"):
        make_model("dqn", normalised).learn(T, callback=StepCriticCallback(make_critic(vqvae)))


def test_kl_reward_by_hand_and_after_the_critic(vqvae: VQVAE) -> None:
    start = PixelCNN(K, 4, 4, hidden_units=8, residual_units=8, layers=1, conv_filter_size=3, output_stack_layers=1)
    penalty = PriorKLReward(0.3, prior=start)
    found: dict[str, np.ndarray] = {}

    class Before(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            found["before"] = self.model.rollout_buffer.rewards.copy()

    model = make_model("ppo", make_env(vqvae, reset_mode="mixed"))
    model.learn(T * 6, callback=CallbackList([CriticCallback(make_critic(vqvae)), Before(), penalty]))
    buffer = model.rollout_buffer
    episode, pos = np.nonzero(buffer.mask)
    codes = torch.as_tensor(buffer.codes.astype(np.int64))
    with torch.no_grad():
        prior = start.eval()(codes).log_softmax(-1)[episode, pos, codes[episode, pos]].numpy()
    assert np.abs(buffer.log_probs - prior).max() > 0.01
    np.testing.assert_allclose(buffer.rewards, found["before"] - 0.3 * (buffer.log_probs - prior), atol=1e-5)
    later = np.zeros(buffer.mask.shape)
    later[buffer.mask] = buffer.rewards
    np.testing.assert_allclose(buffer.returns, later[:, ::-1].cumsum(1)[:, ::-1][buffer.mask], atol=1e-4)
    shown = np.mean([e["r"] for e in model.ep_info_buffer])
    totals = np.bincount(episode, found["before"])
    np.testing.assert_allclose(shown, totals.mean(), rtol=1e-4)


def test_kl_reward_holds_the_policy_back() -> None:
    drift = []
    for coef in (0.0, 10.0):
        torch.manual_seed(0)
        model = make_model("ppo", make_sb3_env("ral_gym/Toy-v0", 16, seed=0), learning_rate=1e-2, n_epochs=4)
        model.learn(T * 16 * 5, callback=PriorKLReward(coef))
        drift.append(kl_to_start(model))
    assert drift[1] < 0.5 * drift[0]


def kl_to_start(model) -> float:
    """KL of the policy to its start, uniform within a few percent, per code."""
    with torch.no_grad():
        codes = model.policy.cache.sampler().sample(64)[0]
        log_probs = model.policy.prior(codes).log_softmax(-1)
    return float(math.log(K) + (log_probs.exp() * log_probs).sum(-1).mean())


def test_entropy_target_sets_the_coefficient_from_the_rollout() -> None:
    model = make_model("ppo", make_sb3_env("ral_gym/Toy-v0", 8, seed=0))
    callback = EntropyTarget(1e-3, target=0.5)
    model.learn(T * 8, callback=callback)
    share = -model.rollout_buffer.log_probs.mean() / math.log(K)
    assert model.ent_coef == pytest.approx(1e-3 * math.exp(3 * (0.5 - share)), rel=1e-5)
    assert model.logger.name_to_value["train/entropy_loss"] < 0


def test_entropy_target_is_refused_where_there_is_no_bonus() -> None:
    with pytest.raises(ConfigError, match="TRPO has no entropy bonus"):
        make_model("trpo", make_sb3_env("ral_gym/Toy-v0", 2)).learn(T, callback=EntropyTarget())
    with pytest.raises(ConfigError, match="DQN has no entropy bonus"):
        make_model("dqn", make_sb3_env("ral_gym/Toy-v0", 2)).learn(T, callback=EntropyTarget())
    with pytest.raises(ConfigError, match="PriorKLReward needs log-probabilities of a PriorPolicy"):
        make_model("dqn", make_sb3_env("ral_gym/Toy-v0", 2)).learn(T, callback=PriorKLReward(0.1))
    with pytest.raises(ConfigError, match=r"choose 0\.\.1"):
        EntropyTarget(target=3.0)


@pytest.mark.parametrize("algo", ["ppo", "trpo"])
def test_mle_share_steps_between_rollouts_by_its_share(algo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With steps ten times as large as the algorithm's own, real images become likelier."""
    logged: list[float] = []
    record = Logger.record

    def spy(self: Logger, key: str, value: float, *arguments: Any, **keywords: Any) -> None:
        logged.extend([value] if key == "train/mle_loss" else [])
        record(self, key, value, *arguments, **keywords)

    monkeypatch.setattr(Logger, "record", spy)
    env = make_sb3_env("ral_gym/Toy-v0", 8, reward="none", seed=0)
    model = make_model(algo, env, learning_rate=1e-3)
    real = torch.as_tensor(env.world.real_codes.astype(np.int64))

    def loss() -> float:
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(model.policy.prior(real).flatten(0, 1), real.flatten()))

    callback = MLEShare(10, n_images=8)
    before = loss()
    model.learn(T * 8, callback=callback)
    assert not callback.optimizer.state  # no step before the first rollout
    first = loss()
    model.learn(T * 8 * 10, callback=callback, reset_num_timesteps=False)
    assert loss() < min(before, first) - 0.05
    assert callback.optimizer.param_groups[0]["lr"] == pytest.approx(10 * 1e-3)
    assert len(logged) == 10 and 0 < logged[-1] < logged[0] < 2 * math.log(K)


def test_mle_share_needs_real_codes(vqvae: VQVAE) -> None:
    world = World(GRID, vqvae.decode, None, None, 1, torch.device("cpu"))
    with pytest.raises(ConfigError, match="needs real codes"):
        make_model("ppo", CodeVecEnv(world, 2)).learn(T, callback=MLEShare())
