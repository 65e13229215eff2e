"""The episode buffer: whole images, each generated code once, prefixes never."""

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer

from ral_gym.agents import EpisodeRolloutBuffer, PixelCNNPolicy, make_sb3_env
from ral_gym.errors import ConfigError
from ral_gym.priors.pixelcnn import PixelCNN

T, K = 16, 8


def tiny_prior() -> PixelCNN:
    return PixelCNN(K, 4, 4, hidden_units=12, residual_units=12, layers=2, conv_filter_size=3, output_stack_layers=1)


def collect(n_steps: int, n_envs: int = 5, reset_mode: str = "mixed", lockstep: bool = False, rollouts: int = 1) -> PPO:
    """A PPO model whose buffer holds the last of some rollouts."""
    env = make_sb3_env("ral_gym/Toy-v0", n_envs, reset_mode=reset_mode, lockstep=lockstep, paired=False, seed=0)
    model = PPO(
        PixelCNNPolicy,
        env,
        n_steps=n_steps,
        batch_size=n_steps * n_envs,
        seed=0,
        gamma=0.9,
        gae_lambda=0.8,
        policy_kwargs={"prior": tiny_prior()},
        rollout_buffer_class=EpisodeRolloutBuffer,
        device="cpu",
    )
    _, callback = model._setup_learn(1, None)
    for _ in range(rollouts):
        model.collect_rollouts(model.env, callback, model.rollout_buffer, n_steps)
    return model


@pytest.mark.parametrize("n_steps", [16, 21, 40])
@pytest.mark.parametrize("batch_size", [None, 1, 30])
def test_every_drawn_code_is_visited_once_and_prefixes_never(n_steps: int, batch_size: int | None) -> None:
    buffer = collect(n_steps, rollouts=3).rollout_buffer
    seen = np.zeros(buffer.codes.shape, int)
    index = {
        (tuple(codes), int(start)): i for i, (codes, start) in enumerate(zip(buffer.codes, buffer.start, strict=True))
    }
    for batch in buffer.get(batch_size):
        episodes = batch.observations
        for row, pos in zip(episodes.row.tolist(), episodes.pos.tolist(), strict=True):
            first = int(episodes.pos[episodes.row == row].min())
            seen[index[tuple(episodes.codes[row].tolist()), first], pos] += 1
    assert np.array_equal(seen, buffer.mask.astype(int))
    positions = np.arange(T)
    assert np.array_equal(buffer.mask, (positions >= buffer.start[:, None]) & (positions < buffer.stop[:, None]))


def test_episodes_that_straddle_rollouts_are_held_back_and_come_whole() -> None:
    model = collect(21, n_envs=3, reset_mode="full")
    first = len(model.rollout_buffer.codes)
    assert first == 3 and model.rollout_buffer.mask.all()
    _, callback = model._setup_learn(1, None, reset_num_timesteps=False)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 21)
    # 42 steps hold two whole episodes per environment; the second ones began in the first rollout.
    assert len(model.rollout_buffer.codes) == 3 and model.rollout_buffer.mask.all()
    assert (model.rollout_buffer.codes < K).all()


def test_stored_log_probs_are_those_of_the_stored_grids() -> None:
    model = collect(21, rollouts=2)
    buffer = model.rollout_buffer
    with torch.no_grad():
        logits = model.policy.prior(buffer.to_torch(buffer.codes.astype(np.int64)))
    chosen = logits.log_softmax(-1).gather(
        -1, buffer.to_torch(buffer.codes.clip(max=K - 1).astype(np.int64))[..., None]
    )
    expected = chosen.squeeze(-1).numpy()[buffer.mask]
    np.testing.assert_allclose(buffer.log_probs, expected, atol=1e-5)


def test_returns_and_advantages_match_the_stock_buffer() -> None:
    model = collect(T, n_envs=4, reset_mode="full")
    buffer = model.rollout_buffer
    stock = RolloutBuffer(T, model.observation_space, model.action_space, "cpu", 0.8, 0.9, 4)
    for t in range(T):
        index = np.arange(4) * T + t
        stock.add(
            np.zeros((4, T), np.int16),
            buffer.codes[:, t],
            buffer.rewards[index],
            np.full(4, t == 0),
            torch.tensor(buffer.values[index]),
            torch.tensor(buffer.log_probs[index]),
        )
    stock.compute_returns_and_advantage(torch.zeros(4), np.ones(4))
    np.testing.assert_allclose(buffer.advantages.reshape(4, T).T, stock.advantages, atol=1e-6)
    np.testing.assert_allclose(buffer.returns.reshape(4, T).T, stock.returns, atol=1e-6)


def test_gae_by_hand() -> None:
    model = collect(T, n_envs=1, reset_mode="full")
    buffer = model.rollout_buffer
    buffer._values[:] = 0.5
    rewards = np.zeros((1, T), np.float32)
    rewards[0, -1] = 1.0
    buffer.write_rewards(rewards)
    buffer.compute_returns_and_advantage()
    last = 1.0 - 0.5
    before = (0.9 * 0.5 - 0.5) + 0.9 * 0.8 * last
    np.testing.assert_allclose(buffer.advantages[-2:], [before, last], rtol=1e-6)
    np.testing.assert_allclose(buffer.returns[-1], 1.0, rtol=1e-6)


def test_an_abandoned_episode_is_dropped() -> None:
    model = collect(T + 5, n_envs=2, reset_mode="full")
    buffer = model.rollout_buffer
    buffer.reset()
    model.env.reset()
    model._last_obs, model._last_episode_starts = model.env.reset(), np.ones(2, bool)
    _, callback = model._setup_learn(1, None, reset_num_timesteps=False)
    held = buffer._fill.copy()
    assert (held == 5).all()
    model.collect_rollouts(model.env, callback, buffer, T + 5)
    assert len(buffer.codes) == 2 and buffer.mask.all()


def test_refuses_a_buffer_that_cannot_hold_an_episode() -> None:
    with pytest.raises(ConfigError, match="n_steps=15 cannot hold an episode of 16 codes"):
        collect(15)


def test_memory_of_a_long_rollout() -> None:
    from gymnasium import spaces

    box, actions = spaces.Box(0, 513, (1280,), np.int16), spaces.Discrete(512)
    buffer = EpisodeRolloutBuffer(1280, box, actions, "cpu", n_envs=64)
    buffer._begin(np.arange(64), np.full((64, 1280), 512, np.int16))
    arrays = [value for value in vars(buffer).values() if isinstance(value, np.ndarray)]
    arrays += [array for value in vars(buffer).values() if isinstance(value, list) for array in value]
    assert sum(array.nbytes for array in arrays) <= 8 * 2**20
