"""Two levels through environment, buffer, policy and algorithms: top codes first, then the bottom codes under them."""

import dataclasses
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from sb3_contrib import TRPO
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from torch import Tensor

from ral_gym.agents import EpisodeRolloutBuffer, Episodes, PixelCNNPolicy, Reinforce, algorithm_defaults, make_sb3_env
from ral_gym.agents.policy import PriorWeights
from ral_gym.agents.vec_env import CodeVecEnv
from ral_gym.envs.core import GenerationCore
from ral_gym.envs.generation import GenerationEnv, action_space, observation_space
from ral_gym.envs.resets import RESET_MODES
from ral_gym.envs.vector import GenerationVectorEnv
from ral_gym.envs.worlds import World
from ral_gym.errors import ConfigError
from ral_gym.grid import CodeGrid
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.two_level import TwoLevelPrior
from ral_gym.rewards.score_map import step_rewards
from tests.tiny import make_tiny_run

GRID = CodeGrid(4, 2, 5, levels=2)
T, K, TOP = GRID.n_codes, 5, 8
REAL = np.random.default_rng(0).integers(K, size=(6, T)).astype(np.int16)


def score(codes: Tensor) -> tuple[Tensor, Tensor]:
    """1 where a bottom code equals the top code above it; per top cell the mean of its four."""
    top, bottom = GRID.split(codes)
    rows = GRID.rows_of(codes.shape[1])
    above = top.view(-1, rows, 2).repeat_interleave(2, 1).repeat_interleave(2, 2)
    right = (bottom.view(-1, 2 * rows, 4) == above).float()
    score_map = torch.nn.functional.avg_pool2d(right[:, None], 2)[:, 0]  # (B, r, 2)
    return score_map, step_rewards(score_map, rows, 2, "intermediate", 2)


def decode(codes: Tensor) -> Tensor:
    bottom = GRID.split(codes)[1]
    return (bottom.view(len(codes), 1, -1, 4) * 50).to(torch.uint8)


WORLD = World(GRID, decode, score, REAL, 1, torch.device("cpu"))
SINGLE = dataclasses.replace(WORLD, scorer=lambda codes: (score(codes)[0], one_reward(codes)))


def one_reward(codes: Tensor) -> Tensor:
    return step_rewards(score(codes)[0], GRID.rows_of(codes.shape[1]), 2, "single", 2)


def make_prior(seed: int = 0) -> TwoLevelPrior:
    torch.manual_seed(seed)
    small = {"hidden_units": 8, "residual_units": 8, "layers": 2, "conv_filter_size": 3, "output_stack_layers": 1}
    top = PixelCNN(K, 4, 2, **small, attention_layers=1, attention_heads=2)
    bottom = PixelCNN(K, 8, 4, **small, condition=(4, 2, K), conditioning_stack_layers=1)
    return TwoLevelPrior(top, bottom)


def plain_episode(prefix_rows: int, stop_rows: int) -> list[int]:
    """The positions that an episode draws, in order, in plain Python."""
    top = [row * 2 + column for row in range(prefix_rows, stop_rows) for column in range(2)]
    bottom = [TOP + row * 4 + column for row in range(2 * prefix_rows, 2 * stop_rows) for column in range(4)]
    return top + bottom


@pytest.mark.parametrize(("prefix_rows", "stop_rows"), [(0, 4), (0, 1), (2, 4), (1, 3), (3, 4)])
def test_an_episode_draws_top_codes_then_the_bottom_codes_of_its_rows(prefix_rows: int, stop_rows: int) -> None:
    core = GenerationCore(WORLD, 2)
    core.reset(
        np.arange(2),
        {"prefix_rows": prefix_rows, "stop_rows": stop_rows, **({"image_index": 3} if prefix_rows else {})},
    )
    drawn, rng = [], np.random.default_rng(0)
    given = np.setdiff1d(np.flatnonzero(GRID.mask(0, stop_rows)), plain_episode(prefix_rows, stop_rows))
    assert (core.codes[:, given] == REAL[3, given]).all()
    for number in range(len(plain_episode(prefix_rows, stop_rows))):
        assert (core.codes[0, plain_episode(prefix_rows, stop_rows)[number:]] == GRID.not_drawn).all()
        drawn.append(int(core.position[0]))
        finished = core.step(rng.integers(K, size=2))
    assert drawn == plain_episode(prefix_rows, stop_rows)
    assert finished is not None and finished.lengths.tolist() == [len(drawn)] * 2
    outside = ~GRID.mask(0, stop_rows)
    assert (finished.codes[:, outside] == GRID.never_drawn).all()
    image = torch.from_numpy(GRID.crop(finished.codes, stop_rows).astype(np.int64))
    np.testing.assert_allclose(finished.score_map[:, :stop_rows], score(image)[0])
    expected = np.zeros((2, T), np.float32)
    expected[:, ~outside] = score(image)[1]
    expected[:, given] = 0
    np.testing.assert_allclose(finished.step_rewards, expected)
    np.testing.assert_allclose(finished.rewards, expected.sum(1))


@pytest.mark.parametrize("reset_mode", RESET_MODES)
def test_single_vector_and_adapter_agree(reset_mode: str) -> None:
    single = [GenerationEnv(WORLD, reset_mode=reset_mode) for _ in range(3)]
    vector = GenerationVectorEnv(WORLD, 3, reset_mode=reset_mode)
    adapter = CodeVecEnv(WORLD, 3, reset_mode=reset_mode, lockstep=False)
    adapter.seed(5)
    first = np.stack([env.reset(seed=5 + row)[0] for row, env in enumerate(single)])
    assert np.array_equal(first, vector.reset(seed=5)[0]) and np.array_equal(first, adapter.reset())
    rng = np.random.default_rng(0)
    for _ in range(100):
        actions = rng.integers(K, size=3)
        steps = [env.step(action) for env, action in zip(single, actions, strict=True)]
        observations = np.stack(
            [env.reset()[0] if step[2] else step[0] for env, step in zip(single, steps, strict=True)]
        )
        many, other = vector.step(actions), adapter.step(actions)
        for found in (many, other):
            np.testing.assert_array_equal(found[0], observations)
            np.testing.assert_allclose(found[1], [step[1] for step in steps], atol=1e-6)
            assert found[2].tolist() == [step[2] for step in steps]


@pytest.mark.parametrize("reset_mode", RESET_MODES)
def test_a_round_at_once_equals_stepping(reset_mode: str) -> None:
    whole, stepped = (GenerationCore(WORLD, 4, reset_mode=reset_mode) for _ in range(2))
    for core in (whole, stepped):
        core.reset(np.arange(4), seeds=[1, 2, 3, 4])
    codes = np.random.default_rng(0).integers(K, size=(4, T))
    found = {}
    while (rows := np.flatnonzero(stepped.position < stepped.stop)).size:
        finished = stepped.step(codes[np.arange(4), np.minimum(stepped.position, T - 1)], rows)
        if finished is not None:
            found.update({row: finished.step_rewards[i] for i, row in enumerate(finished.rows)})
    at_once = whole.draw_round(codes)
    np.testing.assert_array_equal(stepped.codes, whole.codes)
    np.testing.assert_allclose(at_once.step_rewards, [found[row] for row in range(4)])


def test_given_codes_are_a_prefix_of_the_sequence() -> None:
    core = GenerationCore(WORLD, 1)
    core.reset(np.arange(1), {"codes": REAL[0, :11]})
    assert int(core.position[0]) == 11 and (core.codes[0, :11] == REAL[0, :11]).all()
    core.reset(np.arange(1), {"codes": REAL[0], "prefix_rows": 2})
    assert np.flatnonzero(core.codes[0] == K).tolist() == plain_episode(2, 4)
    for wrong in (REAL[0].reshape(-1, 2), np.zeros(T + 1, int)):
        with pytest.raises(ValueError, match=rf"give up to {T} codes in drawing order, the top codes first"):
            core.reset(np.arange(1), {"codes": wrong})


def make_buffer(per_level_discount: bool, gamma: float = 0.5, n_envs: int = 2) -> EpisodeRolloutBuffer:
    return EpisodeRolloutBuffer(
        T, observation_space(GRID), action_space(GRID), "cpu", 1.0, gamma, n_envs, GRID.level_sizes, per_level_discount
    )


def fill(buffer: EpisodeRolloutBuffer, prefix_rows: int, stop_rows: int, rewards: np.ndarray) -> None:
    start = np.where(GRID.mask(0, stop_rows), K, K + 1)
    start[GRID.mask(0, prefix_rows)] = 0
    positions, obs = plain_episode(prefix_rows, stop_rows), np.repeat(start[None], 2, 0)
    for number, position in enumerate(positions):
        first = np.array([number == 0] * 2)
        nothing = torch.zeros(2)
        buffer.add(obs, np.full(2, 1), rewards[:, position], first, nothing, nothing)
        obs = obs.copy()
        obs[:, position] = 1


@pytest.mark.parametrize(("prefix_rows", "stop_rows"), [(0, 4), (2, 4), (0, 2)])
def test_each_level_is_discounted_as_an_episode_of_its_own(prefix_rows: int, stop_rows: int) -> None:
    rewards, gamma = np.zeros((2, T), np.float32), 0.5
    positions = plain_episode(prefix_rows, stop_rows)
    rewards[:, positions[-1]] = [3.0, -1.0]
    top = [p for p in positions if p < TOP]
    for per_level in (True, False):
        buffer = make_buffer(per_level, gamma)
        buffer.reset()
        fill(buffer, prefix_rows, stop_rows, rewards)
        buffer.compute_returns_and_advantage()
        returns = buffer.returns.reshape(2, -1)
        steps = np.arange(len(positions))[::-1].astype(float)
        if per_level:
            steps[: len(top)] = np.arange(len(top))[::-1]
        np.testing.assert_allclose(returns, gamma**steps * np.array([[3.0], [-1.0]]), rtol=1e-5)


def test_codes_that_have_rewards_of_their_own_share_nothing() -> None:
    rewards = np.random.default_rng(0).random((2, T)).astype(np.float32)
    buffer = make_buffer(True, 1.0)
    buffer.reset()
    fill(buffer, 0, 4, np.zeros((2, T)))
    buffer.write_rewards(rewards)
    buffer.compute_returns_and_advantage()
    expected = np.concatenate(
        [np.cumsum(part[:, ::-1], 1)[:, ::-1] for part in (rewards[:, :TOP], rewards[:, TOP:])], 1
    )
    np.testing.assert_allclose(buffer.returns.reshape(2, T), expected, rtol=1e-4)


def test_a_penalty_per_code_leaves_the_images_reward_to_both_levels() -> None:
    final = np.zeros((2, T), np.float32)
    final[:, -1] = 2.0
    buffer = make_buffer(True, 1.0)
    buffer.reset()
    fill(buffer, 0, 4, final)
    buffer.add_rewards(np.full((2, T), -0.1, np.float32))
    buffer.compute_returns_and_advantage()
    returns = buffer.returns.reshape(2, T)
    np.testing.assert_allclose(returns[:, 0], 2 - 0.1 * TOP, rtol=1e-4)
    np.testing.assert_allclose(returns[:, TOP], 2 - 0.1 * (T - TOP), rtol=1e-4)


def make(cls: type = Reinforce, world: World = SINGLE, n_envs: int = 4, **kwargs: object):
    env = CodeVecEnv(
        world, n_envs, reset_mode=str(kwargs.pop("reset_mode", "mixed")), lockstep=bool(kwargs.pop("lockstep", True))
    )
    env.seed(0)
    name = {Reinforce: "reinforce", PPO: "ppo", TRPO: "trpo"}[cls]
    arguments = algorithm_defaults(name, env) | {"seed": 0, "device": "cpu"}
    arguments["policy_kwargs"] = {"prior": make_prior(), **arguments["policy_kwargs"], **kwargs.pop("policy", {})}
    return cls(PixelCNNPolicy, env, **(arguments | kwargs))


def rollout(model) -> EpisodeRolloutBuffer:
    callback = model._setup_learn(1, None, reset_num_timesteps=False)[1]
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model.rollout_buffer


def test_defaults_read_the_levels() -> None:
    arguments = algorithm_defaults("ppo", CodeVecEnv(WORLD, 2))
    assert arguments["policy_kwargs"]["levels"] == arguments["rollout_buffer_kwargs"]["levels"] == (8, 32)


@pytest.mark.parametrize("lockstep", [True, False])
def test_the_ratio_of_an_unchanged_policy_is_one(lockstep: bool) -> None:
    """The cached step-by-step log-probabilities equal one teacher-forced pass, whatever rows an image has."""
    model = make(PPO, lockstep=lockstep, n_steps=2 * T)
    for _ in range(2):
        buffer = rollout(model)
        for batch in buffer.get(2 * T):
            _, log_prob, _ = model.policy.evaluate_actions(batch.observations, batch.actions)
            torch.testing.assert_close(log_prob, batch.old_log_prob, atol=1e-5, rtol=0)


def test_the_fast_path_equals_stepping() -> None:
    models = [make(fast_path=fast, baseline="value") for fast in (True, False)]
    for _ in range(4):
        buffers = []
        for model in models:
            torch.manual_seed(3)
            np.random.seed(3)
            buffers.append(rollout(model))
        fast, stepped = buffers
        np.testing.assert_array_equal(fast.codes, stepped.codes)
        np.testing.assert_allclose(fast.rewards, stepped.rewards, atol=1e-6)
        np.testing.assert_allclose(fast.log_probs, stepped.log_probs, atol=1e-5)
        np.testing.assert_allclose(fast.values, stepped.values, atol=1e-5)


@pytest.mark.parametrize("levels", ["both", "top", "bottom"])
@pytest.mark.parametrize("cls", [Reinforce, PPO, TRPO])
def test_only_the_levels_asked_for_learn(cls: type, levels: str) -> None:
    model = make(cls, policy={"train_levels": levels}, learning_rate=1e-2)
    before = {name: weight.clone() for name, weight in model.policy.prior.state_dict().items()}
    model.learn(4 * T * 3)
    changed = {
        name.partition(".")[0]
        for name, weight in model.policy.prior.state_dict().items()
        if not torch.equal(weight, before[name])
    }
    assert changed == ({"top", "bottom"} if levels == "both" else {levels})


def test_save_and_load_keep_both_levels(tmp_path: Path) -> None:
    model = make(PPO, policy={"train_levels": "top"})
    model.learn(4 * T)
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", env=CodeVecEnv(SINGLE, 4), device="cpu")
    obs = model.env.reset()
    for name, weight in model.policy.state_dict().items():
        torch.testing.assert_close(weight, loaded.policy.state_dict()[name])
    assert np.array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
    assert loaded.policy.train_levels == "top"


def test_what_does_not_fit_is_refused() -> None:
    prior = make_prior()
    with pytest.raises(ConfigError, match=r"4x2 \+ 8x4 codes, but the environment's levels have 40"):
        PixelCNNPolicy(observation_space(GRID), action_space(GRID), lambda _: 1e-3, prior=prior, levels=(40,))
    with pytest.raises(ConfigError, match="choose both, top or bottom"):
        make(policy={"train_levels": "middle"})
    one = PixelCNN(K, 4, 10, hidden_units=8, residual_units=8, layers=1, conv_filter_size=3)
    with pytest.raises(ConfigError, match="needs a prior of two levels, this one has one"):
        make(policy={"prior": one, "levels": None, "train_levels": "top"})
    with pytest.raises(ConfigError, match=r"levels of 8 \+ 8 codes do not fit observations of 40"):
        EpisodeRolloutBuffer(T, observation_space(GRID), action_space(GRID), levels=(8, 8))
    assert isinstance(PriorWeights.of(prior).build(), TwoLevelPrior) and len(Episodes(*[torch.zeros(2)] * 3, 0)) == 2


def test_a_run_of_two_levels_is_an_environment(tmp_path: Path) -> None:
    run = make_tiny_run(tmp_path, levels=2)
    for reward in ("single", "intermediate", "none"):
        env = gym.make("ral_gym/LatentCode-v0", run=str(run), reward=reward, reset_mode="mixed").unwrapped
        check_env(env)
        sb3_check_env(env)
    env = gym.make("ral_gym/LatentCode-v0", run=str(run), render_mode="rgb_array", top_k=3)
    env.reset(seed=0)
    for _ in range(30):
        env.step(int(np.flatnonzero(env.unwrapped.action_masks())[0]))
    assert env.render().shape == (256, 256, 3) and env.unwrapped.levels == (16, 64)
    model = Reinforce(
        PixelCNNPolicy,
        make_sb3_env("ral_gym/LatentCode-v0", 2, run=str(run)),
        device="cpu",
        policy_kwargs={"prior": run},
    )
    model.learn(160)
