"""REINFORCE: fast path equals stepping, baselines by hand, the gradient, it learns."""

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

from ral_gym.agents import GRPO, EpisodeRolloutBuffer, PixelCNNPolicy, Reinforce, algorithm_defaults, make_sb3_env
from ral_gym.agents.algorithms.reinforce import batch_baseline
from ral_gym.errors import ConfigError
from ral_gym.priors.pixelcnn import PixelCNN

T, K = 16, 8


def make(reset_mode: str = "mixed", lockstep: bool = True, n_envs: int = 8, **kwargs: object) -> Reinforce:
    torch.manual_seed(1)
    prior = PixelCNN(K, 4, 4, hidden_units=16, residual_units=16, layers=2, conv_filter_size=3, output_stack_layers=1)
    env = make_sb3_env("ral_gym/Toy-v0", n_envs, reset_mode=reset_mode, lockstep=lockstep, paired=False, seed=0)
    return Reinforce(PixelCNNPolicy, env, seed=0, device="cpu", policy_kwargs={"prior": prior}, **kwargs)


@pytest.mark.parametrize("baseline", ["none", "value"])
def test_the_fast_path_equals_stepping(baseline: str) -> None:
    models = [make(baseline=baseline, fast_path=fast, mle_coef=0.1) for fast in (True, False)]
    for _ in range(4):
        for model in models:
            torch.manual_seed(3)
            np.random.seed(3)
            callback = model._setup_learn(1, None, reset_num_timesteps=False)[1]
            model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
        fast, stepped = (model.rollout_buffer for model in models)
        np.testing.assert_array_equal(fast.codes, stepped.codes)
        np.testing.assert_array_equal(fast.rewards, stepped.rewards)
        np.testing.assert_allclose(fast.log_probs, stepped.log_probs, atol=1e-5)
        if baseline == "value":
            np.testing.assert_allclose(fast.values, stepped.values, atol=1e-5)
        assert models[0].num_timesteps == models[1].num_timesteps
        assert [e["r"] for e in models[0].ep_info_buffer] == [e["r"] for e in models[1].ep_info_buffer]
        for model in models:
            torch.manual_seed(4)
            np.random.seed(4)
            model.train()
        weights = [torch.nn.utils.parameters_to_vector(model.policy.parameters()) for model in models]
        # Adam turns rounding in tiny gradients into steps of the learning rate, so the updates agree only loosely.
        torch.testing.assert_close(*weights, atol=3e-4, rtol=0)
        models[1].policy.load_state_dict(models[0].policy.state_dict())
        models[1].policy.optimizer.load_state_dict(models[0].policy.optimizer.state_dict())


def test_rows_at_different_places_finish_at_least_one_episode_each() -> None:
    model = make(lockstep=False)
    for _ in range(3):
        callback = model._setup_learn(1, None, reset_num_timesteps=False)[1]
        model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
        assert set(model.rollout_buffer.episode_envs) == set(range(8))


def test_baselines_by_hand() -> None:
    returns = np.array([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0], [9.0, 9.0]], np.float32)
    mask = np.ones((4, 2), bool)
    group = np.array([0, 0, 0, 1])
    mean = batch_baseline(returns, mask, group, leave_one_out=False)
    np.testing.assert_allclose(mean, [[3, 3], [3, 3], [3, 3], [9, 9]])
    others = batch_baseline(returns, mask, group, leave_one_out=True)
    np.testing.assert_allclose(others, [[4, 3.5], [3, 1.5], [2, 4], [9, 9]])


def test_baselines_compare_only_episodes_of_one_start_and_stop() -> None:
    model = make("mixed", lockstep=False, baseline="mean", normalize_advantage=False, n_envs=16)
    callback = model._setup_learn(1, None)[1]
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    buffer = model.rollout_buffer
    advantages = np.zeros(buffer.mask.shape)
    advantages[buffer.mask] = model.advantages()
    for start, stop in {*zip(buffer.start, buffer.stop, strict=True)}:
        same = (buffer.start == start) & (buffer.stop == stop)
        np.testing.assert_allclose(advantages[same].sum(0), 0, atol=1e-5)


def test_the_gradient_is_reinforce() -> None:
    """One plain-SGD step moves the weights by the hand-written gradient of the mean of advantage * log-probability."""
    model = make("full", baseline="none", normalize_advantage=False, gamma=0.9, max_grad_norm=1e9)
    model.policy.optimizer = torch.optim.SGD(model.policy.parameters(), lr=1.0)
    model.lr_schedule = lambda _: 1.0
    callback = model._setup_learn(1, None)[1]
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    codes = torch.as_tensor(model.rollout_buffer.codes.astype(np.int64))
    rewards = torch.as_tensor(model.rollout_buffer.rewards.reshape(8, T))[:, -1]
    q = rewards[:, None] * 0.9 ** torch.arange(T - 1, -1, -1)  # Eq. 3 with a terminal reward
    log_probs = model.policy.prior(codes).log_softmax(-1).gather(-1, codes[..., None]).squeeze(-1)
    expected = torch.autograd.grad(-(q * log_probs).mean(), list(model.policy.prior.parameters()))
    before = [p.detach().clone() for p in model.policy.prior.parameters()]
    model.train()
    for old, new, gradient in zip(before, model.policy.prior.parameters(), expected, strict=True):
        torch.testing.assert_close(old - new, gradient, atol=1e-6, rtol=1e-4)


def test_chunks_give_the_same_update() -> None:
    weights = []
    for batch_size in (None, 20):
        model = make("full", batch_size=batch_size, baseline="value", ent_coef=0.01, kl_coef=0.1)
        callback = model._setup_learn(1, None)[1]
        model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
        model.policy.optimizer = torch.optim.SGD(model.policy.parameters(), lr=1.0)
        model.train()
        weights.append(torch.nn.utils.parameters_to_vector(model.policy.parameters()))
    torch.testing.assert_close(*weights, atol=1e-6, rtol=1e-5)


def test_kl_to_the_start_grows_from_zero_and_holds_the_policy_back() -> None:
    drift = []
    for kl_coef in (1e-6, 10.0):
        model = make("full", kl_coef=kl_coef, learning_rate=1e-2)
        model.learn(T * 8 * 5)
        drift.append(model.logger.name_to_value["train/kl_to_prior"])
    assert 0 <= drift[1] < drift[0]


@pytest.mark.parametrize("algo", ["reinforce", "ppo"])
def test_learns_the_toy(algo: str) -> None:
    """The mean reward of a random policy is 0.18; the spec's threshold is reached in seconds."""
    prior = PixelCNN(K, 4, 4, hidden_units=32, residual_units=32, layers=2, conv_filter_size=3, output_stack_layers=1)
    env = make_sb3_env("ral_gym/Toy-v0", 64, reward="intermediate", seed=0)
    arguments = algorithm_defaults(algo, env, prior=prior) | {"seed": 0, "device": "cpu", "ent_coef": 0.05}
    if algo == "ppo":
        arguments |= {"n_epochs": 4, "clip_range": 0.2, "target_kl": None, "ent_coef": 0.02}
    arguments["learning_rate"] = 3e-3 if algo == "ppo" else 2e-3
    model = (Reinforce if algo == "reinforce" else PPO)(PixelCNNPolicy, env, **arguments)
    from stable_baselines3.common.callbacks import BaseCallback

    class StepRewards(BaseCallback):
        """The environment's per-code rewards, known at the end, written into the buffer."""

        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            from ral_gym.envs.worlds import toy_score_map

            buffer = self.model.rollout_buffer
            buffer.write_rewards(toy_score_map(torch.as_tensor(buffer.codes.astype(np.int64))).flatten(1).numpy())
            buffer.gamma = 0.0
            buffer.compute_returns_and_advantage()

    model.learn(64 * T * (60 if algo == "ppo" else 100), callback=StepRewards())
    codes = model.policy.cache.sampler().sample(256)[0]
    from ral_gym.envs.worlds import toy_score_map

    assert toy_score_map(codes).mean() > 0.9


def test_save_and_load_keep_the_reference(tmp_path) -> None:
    model = make("full", kl_coef=0.5)
    model.learn(T * 8 * 2)
    model.save(tmp_path / "model")
    loaded = Reinforce.load(tmp_path / "model", env=make_sb3_env("ral_gym/Toy-v0", 8), device="cpu")
    for old, new in zip(model._reference.parameters(), loaded._reference.parameters(), strict=True):
        torch.testing.assert_close(old, new)
    loaded.learn(T * 8)


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ConfigError, match="baseline 'median' is unknown: choose one of none, mean"):
        make(baseline="median")
    with pytest.raises(ConfigError, match="algorithm 'dreamer' is unknown: choose one of reinforce, ppo"):
        algorithm_defaults("dreamer", make_sb3_env("ral_gym/Toy-v0", 1))


def test_the_buffer_class_is_the_default() -> None:
    assert isinstance(make().rollout_buffer, EpisodeRolloutBuffer)


@pytest.mark.parametrize("algo", [Reinforce, GRPO])
def test_the_maximum_likelihood_share_makes_real_images_likelier(algo: type) -> None:
    """Without rewards nothing else moves the policy; a wrong sign would push it away from the data."""
    env = make_sb3_env("ral_gym/Toy-v0", 8, reward="none", seed=0)
    prior = PixelCNN(8, 4, 4, hidden_units=12, residual_units=12, layers=1, conv_filter_size=3)
    arguments = {"mle_coef": 1.0, "learning_rate": 1e-2, "seed": 0, "device": "cpu", "policy_kwargs": {"prior": prior}}
    model = algo(PixelCNNPolicy, env, **arguments)
    real = torch.as_tensor(env.world.real_codes.astype(np.int64))

    def loss() -> float:
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(model.policy.prior(real).flatten(0, 1), real.flatten()))

    before = loss()
    model.learn(16 * 8 * 10)
    assert loss() < before - 0.05
