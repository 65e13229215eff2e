"""Single == native vector == SB3 adapter, step by step; autoreset modes, masks, wrappers, mistakes."""

import copy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecVideoRecorder

import ral_gym  # noqa: F401
from ral_gym.agents.vec_env import make_sb3_env, real_codes, unwrap_code_env
from ral_gym.envs.resets import RESET_MODES
from ral_gym.envs.vector import GenerationVectorEnv
from ral_gym.envs.worlds import toy_images
from ral_gym.errors import ConfigError
from tests.tiny import make_tiny_run

TOY = "ral_gym/Toy-v0"
E, T, K = 5, 16, 8
STEPS = 60


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_run(tmp_path_factory.mktemp("runs") / "tiny", critic_layers=4)


@pytest.fixture(params=["toy", "classes", "run"])
def made(request: pytest.FixtureRequest, tiny_run: Path) -> tuple[str, dict[str, Any]]:
    """An id and the arguments it needs."""
    toys = {"toy": TOY, "classes": "ral_gym/ToyClasses-v0"}
    return (toys[request.param], {}) if request.param in toys else ("ral_gym/LatentCode-v0", {"run": str(tiny_run)})


def native(id: str = TOY, num_envs: int = E, **kwargs: Any) -> GenerationVectorEnv:
    env = gym.make_vec(id, num_envs=num_envs, **kwargs)
    assert isinstance(env, GenerationVectorEnv)
    return env


def synchronous(id: str, mode: str, **kwargs: Any) -> SyncVectorEnv:
    return SyncVectorEnv([lambda: gym.make(id, **kwargs) for _ in range(E)], autoreset_mode=mode)


def random_actions(n: int = STEPS, size: int = K) -> np.ndarray:
    return np.random.default_rng(1).integers(size, size=(n, E))


def assert_same(one: Any, other: Any) -> None:
    """Equal up to the rounding of batched convolutions, types and dtypes included."""
    assert data_equivalence(one, other), f"{one}\n{other}"


@pytest.mark.parametrize("reset_mode", RESET_MODES)
@pytest.mark.parametrize("reward", ["single", "intermediate", "none"])
@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
def test_vector_steps_as_single_environments(
    made: tuple[str, dict[str, Any]], mode: str, reward: str, reset_mode: str
) -> None:
    id, arguments = made
    arguments = {**arguments, "reward": reward, "reset_mode": reset_mode}
    vector, single = native(id, autoreset_mode=mode, **arguments), synchronous(id, mode, **arguments)
    assert vector.single_observation_space == single.single_observation_space
    assert vector.observation_space == single.observation_space and vector.action_space == single.action_space
    assert_same(vector.reset(seed=3), single.reset(seed=3))
    ends = 0
    for actions in random_actions():
        given = vector.step(actions)
        assert_same(given, single.step(actions))
        ends += int(given[2].sum())
    assert ends >= 3 * E
    for ours, theirs in zip(vector.np_random, single.np_random, strict=True):
        assert ours.bit_generator.state == theirs.bit_generator.state


@pytest.mark.parametrize("reset_mode", RESET_MODES)
@pytest.mark.parametrize("reward", ["single", "intermediate", "none"])
def test_the_sb3_adapter_steps_as_single_environments(
    made: tuple[str, dict[str, Any]], reward: str, reset_mode: str
) -> None:
    id, arguments = made
    arguments = {**arguments, "reward": reward, "reset_mode": reset_mode}
    adapter = make_sb3_env(id, E, lockstep=False, seed=3, **arguments)
    dummy = DummyVecEnv([lambda: Monitor(gym.make(id, **arguments)) for _ in range(E)])
    dummy.seed(3)
    assert adapter.observation_space == dummy.observation_space and adapter.action_space == dummy.action_space
    assert_same(adapter.reset(), dummy.reset())
    for actions in random_actions():
        assert adapter.reset_infos == dummy.reset_infos
        observations, rewards, dones, infos = adapter.step(actions)
        expected = dummy.step(actions)
        assert_same((observations, rewards, dones), expected[:3])
        for done, info, theirs in zip(dones, infos, expected[3], strict=True):
            assert done or info == {}
            if done:
                episode, expected_episode = info.pop("episode"), theirs.pop("episode")
                assert_same(info, theirs)
                assert episode["l"] == expected_episode["l"]
                assert episode["r"] == pytest.approx(expected_episode["r"], abs=1e-4)


def test_disabled_leaves_the_resets_to_the_user() -> None:
    vector, single = (make("Disabled") for make in (lambda m: native(autoreset_mode=m), lambda m: synchronous(TOY, m)))
    vector.reset(seed=0), single.reset(seed=0)
    options = {"stop_rows": 1, "reset_mask": np.array([True, False, False, True, False])}
    assert_same(vector.reset(options=options), single.reset(options=copy.copy(options)))
    for actions in random_actions(4):
        given = vector.step(actions)
        assert_same(given, single.step(actions))
    assert given[2].tolist() == [True, False, False, True, False]
    with pytest.raises(ResetNeeded, match=r"environments \[0, 3\] have no running episode: call reset"):
        vector.step(np.zeros(E, int))
    assert_same(vector.reset(options={"reset_mask": given[2]}), single.reset(options={"reset_mask": given[2]}))
    assert_same(vector.step(np.zeros(E, int)), single.step(np.zeros(E, int)))


@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
def test_masks_seeds_and_options_reach_their_rows(mode: str) -> None:
    vector, single = native(autoreset_mode=mode), synchronous(TOY, mode)
    mask = np.array([False, True, True, False, True])
    seeds: list[int | None] = [1, 2, None, 4, 5]
    arguments: list[dict[str, Any]] = [
        {"seed": seeds},
        {"options": {"mode": "continue"}, "seed": 9},
        {"options": {"reset_mask": mask, "mode": "scratch"}, "seed": seeds},
        {"options": {"reset_mask": mask, "prefix_rows": 2, "image_index": 1}},
        {"options": {"reset_mask": mask}},
    ]
    single.reset(seed=3), vector.reset(seed=3)
    for again in arguments:
        for actions in random_actions(21):
            assert_same(vector.step(actions), single.step(actions))
        kept = copy.deepcopy(again)
        assert_same(vector.reset(**again), single.reset(**copy.deepcopy(again)))
        assert data_equivalence(again, kept), "the caller's options are not touched"


def test_masked_rows_do_not_wait_for_their_autoreset() -> None:
    vector = native(autoreset_mode="NextStep")
    vector.reset(options={"stop_rows": 1})
    for _ in range(4):
        _, _, terminations, _, _ = vector.step(np.zeros(E, int))
    assert terminations.all()
    vector.reset(options={"reset_mask": np.arange(E) < 2})
    observations, _, terminations, _, infos = vector.step(np.full(E, 3))
    assert observations[:, 0].tolist() == [3, 3, K, K, K] and not terminations.any() and infos == {}


@pytest.mark.parametrize("mode", ["SameStep", "NextStep", "Disabled"])
def test_episode_statistics(mode: str) -> None:
    env = RecordEpisodeStatistics(native(autoreset_mode=mode, reset_mode="mixed", reward="intermediate"))
    env.reset(seed=0)
    lengths, ended = np.zeros(E, int), np.zeros(E, bool)
    for actions in random_actions():
        if mode == "Disabled" and ended.any():
            env.reset(options={"reset_mask": ended})
        elif mode == "NextStep":
            lengths[ended] = -1  # the step of the autoreset belongs to no episode
        lengths += 1
        _, rewards, ended, _, infos = env.step(actions)
        assert ("episode" in infos) == ended.any()
        if ended.any():
            assert infos["episode"]["l"][ended].tolist() == lengths[ended].tolist()
            assert infos["episode"]["r"][ended].tolist() == rewards[ended].tolist()
            lengths[ended] = 0


def test_lockstep_and_pairs_are_options_of_the_vector() -> None:
    env = native(reset_mode="mixed", lockstep=True, paired=True)
    env.reset(seed=0)
    for actions in random_actions(20 * T):
        _, _, terminations, _, _ = env.step(actions)
        assert len(set(terminations)) == len(set(env.core.position)) == 1
    assert terminations.all(), "20 pairs end with the 320th code"


def test_the_same_rounds_in_vector_and_adapter() -> None:
    vector = native(reset_mode="mixed", lockstep=True, paired=True)
    adapter = make_sb3_env(TOY, E, reset_mode="mixed", seed=4)
    assert (vector.reset(seed=4)[0] == adapter.reset()).all()
    for actions in random_actions(10 * T):
        observations, rewards, terminations, _, infos = vector.step(actions)
        theirs = adapter.step(actions)
        assert_same((observations, rewards.astype(np.float32), terminations), theirs[:3])
        for row in np.flatnonzero(terminations):
            assert (infos["final_obs"][row] == theirs[3][row]["terminal_observation"]).all()
            assert infos["final_info"]["step_rewards"][row].sum() == pytest.approx(theirs[3][row]["episode"]["r"])


@pytest.mark.parametrize("render_mode", ["rgb_array", "ansi", None])
def test_every_row_is_rendered(made: tuple[str, dict[str, Any]], render_mode: str | None) -> None:
    id, arguments = made
    vector = native(id, render_mode=render_mode, reset_mode="mixed", **arguments)
    single = synchronous(id, "SameStep", render_mode=render_mode, reset_mode="mixed", **arguments)
    vector.reset(seed=0), single.reset(seed=0)
    frames = vector.render()
    assert frames is None if render_mode is None else data_equivalence(frames, single.render())


def test_the_specification_says_how_it_resets() -> None:
    for mode in AutoresetMode:
        assert native(autoreset_mode=mode).metadata["autoreset_mode"] is mode
    assert native().metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert native().spec is not None and str(native()) == "ToyVectorEnv(ral_gym/Toy-v0, num_envs=5)"
    with pytest.raises(ValueError, match="autoreset_mode 'never' is unknown: choose one of 'NextStep', 'Same"):
        native(autoreset_mode="never")


BAD_RESETS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"options": {"prefix_rows": 4}}, ValueError, r"prefix_rows=4 is out of range: choose 0\.\.3"),
    ({"options": {"rows": 4}}, ValueError, "'rows' is unknown: choose from mode, prefix_rows"),
    ({"options": {"reset_mask": [True] * E}}, TypeError, "reset_mask is a list: give a numpy array of dtype bool"),
    ({"options": {"reset_mask": np.ones(E)}}, TypeError, "reset_mask is dtype float64: give a numpy array"),
    ({"options": {"reset_mask": np.ones(4, bool)}}, ValueError, r"shape \(4,\) and 4 True: give shape \(5,\)"),
    ({"options": {"reset_mask": np.zeros(E, bool)}}, ValueError, "and 0 True: .* with at least one"),
    ({"seed": [1, 2]}, ValueError, "seed has 2 entries: give one for each of the 5 environments"),
    ({"seed": 2, "options": {"mode": "half"}}, ValueError, "mode='half' is unknown"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_RESETS)
def test_wrong_resets_change_nothing(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    env = native(autoreset_mode="NextStep")
    env.reset(seed=0)
    env.step(np.zeros(E, int))
    before = repr(env.core.state_dict())
    with pytest.raises(error, match=message):
        env.reset(**arguments)
    assert repr(env.core.state_dict()) == before


BAD_ACTIONS: list[tuple[Any, str]] = [
    (np.array([0, 1, 2, 3, 8]), r"action 8 of environment 4 is not a code: give an integer in 0\.\.7"),
    (np.array([0, -3, 2, 3, 1]), r"action -3 of environment 1 is not a code: give an integer in 0\.\.7"),
    (np.zeros(E, np.float32), r"dtype float32: give 5 integers in 0\.\.7"),
    (np.zeros(E + 1, int), r"shape \(6,\) .* give 5 integers in 0\.\.7"),
    (3, r"shape \(\) .* give 5 integers in 0\.\.7"),
]


@pytest.mark.parametrize(("actions", "message"), BAD_ACTIONS)
@pytest.mark.parametrize("cover", ["vector", "adapter"])
def test_wrong_actions_change_nothing(cover: str, actions: Any, message: str) -> None:
    env: Any = native() if cover == "vector" else make_sb3_env(TOY, E)
    with pytest.raises(ResetNeeded, match="call reset"):
        env.step(np.zeros(E, int))
    env.reset()
    env.step(np.zeros(E, int))
    before = repr(env.core.state_dict())
    with pytest.raises(ValueError, match=message):
        env.step(actions)
    assert repr(env.core.state_dict()) == before
    env.step(np.zeros(E, int))


def test_a_round_at_once_in_the_adapter() -> None:
    stepped, at_once = (make_sb3_env(TOY, E, reset_mode="mixed", seed=1, reward="intermediate") for _ in range(2))
    stepped.reset(), at_once.reset()
    for round_ in range(6):
        codes = np.random.default_rng(round_).integers(K, size=(E, T))
        while True:
            given = stepped.step(codes[np.arange(E), stepped.core.position])
            if given[2].any():
                break
        round_given = at_once.step_round(codes)
        for info in [*given[3], *round_given[3]]:
            info["episode"].pop("t")
        assert_same(given, round_given)


def test_adapter_options_hold_once_and_may_differ_by_row() -> None:
    env = make_sb3_env(TOY, 3)
    env.set_options({"image_index": 2, "prefix_rows": 1})
    assert (env.reset()[:, :4] == toy_images()[2, :4]).all()
    assert (env.reset() == K).all()
    env.set_options([{"stop_rows": 1}, {}, {"codes": [1, 2]}])
    assert [(row < K).sum() for row in env.reset()] == [0, 0, 2] and env.core.stop.tolist() == [4, 16, 16]
    for _ in range(10):
        env.set_options({"mode": "mixed"})
        env.reset()
        assert len(set(env.core.stop - env.core.start)) == 1, "in lockstep"
    with pytest.raises(ValueError, match=r"stop_rows=5 is out of range: choose 1\.\.4"):
        env.set_options({"stop_rows": 5})
    with pytest.raises(ValueError, match="options for 2 environments: give one mapping, or a list of 3"):
        env.set_options([{}, {}])
    assert (env.reset() == K).all(), "refused options are forgotten"


def test_adapter_seeds_hold_once() -> None:
    env = make_sb3_env(TOY, E, reset_mode="continue", seed=2)
    first = env.reset()
    later = [env.reset() for _ in range(3)]
    assert any((first != observations).any() for observations in later)
    env.seed(2)
    assert (env.reset() == first).all()
    assert all((env.reset() == observations).all() for observations in later)


def test_adapter_arrays_are_fresh() -> None:
    env = make_sb3_env(TOY, E)
    arrays = [env.reset()]
    for _ in range(T):
        observations, rewards, dones, infos = env.step(np.zeros(E, int))
        arrays += [observations, rewards, dones]
    arrays += [value for info in infos for value in info.values() if isinstance(value, np.ndarray)]
    assert len(arrays) == 1 + 3 * T + 4 * E
    assert not any(np.shares_memory(a, b) for i, a in enumerate(arrays) for b in arrays[:i])


def test_adapter_attributes_and_methods() -> None:
    env = make_sb3_env(TOY, 3, render_mode="rgb_array", reset_mode="continue")
    env.reset()
    assert env.get_attr("render_mode", [0, 2]) == ["rgb_array"] * 2
    env.set_attr("colour", "blue")
    assert env.get_attr("colour") == ["blue"] * 3 and env.has_attr("colour") and not env.has_attr("taste")
    masks = env.env_method("action_masks", indices=[1])
    assert len(masks) == 1 and masks[0].shape == (K,) and masks[0].all()
    assert env.env_is_wrapped(Monitor) == [True] * 3 and env.env_is_wrapped(gym.Wrapper, 1) == [False]
    assert len(env.get_images()) == 3 and env.render().shape == (512, 512, 3)  # type: ignore[union-attr]
    assert native(num_envs=3).action_masks().shape == (3, K)


def test_videos_of_the_adapter_are_recorded(tmp_path: Path) -> None:
    pytest.importorskip("moviepy")
    env = VecVideoRecorder(make_sb3_env(TOY, 2, render_mode="rgb_array"), str(tmp_path), lambda step: step == 0, 5)
    env.reset()
    for _ in range(7):
        env.step(np.zeros(2, int))
    env.close()
    assert max(path.stat().st_size for path in tmp_path.glob("*.mp4")) > 1000


def test_a_monitor_around_the_adapter_warns_and_works() -> None:
    with pytest.warns(UserWarning, match="already wrapped with a `Monitor`"):
        env = VecMonitor(make_sb3_env(TOY, E, reset_mode="mixed"))
    assert unwrap_code_env(env) is env.venv and (real_codes(env) == toy_images()).all()
    env.reset()
    lengths = np.zeros(E, int)
    for actions in random_actions():
        _, rewards, dones, infos = env.step(actions)
        lengths += 1
        for row in np.flatnonzero(dones):
            assert infos[row]["episode"]["r"] == rewards[row] and infos[row]["episode"]["l"] == lengths[row]
            lengths[row] = 0


def test_sb3_trains_and_evaluates() -> None:
    env = make_sb3_env(TOY, 4, seed=0)
    model = PPO("MlpPolicy", env, n_steps=16, batch_size=32, n_epochs=1, device="cpu").learn(128)
    assert len(model.ep_info_buffer) == 8
    rewards, lengths = evaluate_policy(model, make_sb3_env(TOY, 3), n_eval_episodes=6, return_episode_rewards=True)
    assert lengths == [T] * 6 and all(0 < reward <= 1 for reward in rewards)
    model.predict(gym.make(TOY).reset()[0])


def test_an_id_brings_its_own_arguments() -> None:
    gym.register("ral_gym_test/Continued-v0", "ral_gym.envs.toy:ToyEnv", kwargs={"reset_mode": "continue"})
    try:
        assert make_sb3_env("ral_gym_test/Continued-v0").core.distribution.mode == "continue"
        assert make_sb3_env("ral_gym_test/Continued-v0", reset_mode="full").core.distribution.mode == "full"
    finally:
        del gym.registry["ral_gym_test/Continued-v0"]
    with pytest.raises(ConfigError, match="CartPole-v1 is not a ral_gym environment"):
        make_sb3_env("CartPole-v1")
