"""Every registered environment against what its ecosystem does to it."""

import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.wrappers import HumanRendering, RecordEpisodeStatistics, RecordVideo
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import ral_gym  # noqa: F401
from ral_gym.envs import latent_code
from ral_gym.envs.from_run import run_world
from ral_gym.envs.generation import GenerationEnv
from ral_gym.envs.resets import RESET_MODES
from ral_gym.envs.toy import ToyEnv
from ral_gym.errors import DeviceError, RunError
from ral_gym.rewards.critic import PatchCritic
from ral_gym.runs.storage import save_module
from tests.tiny import N_IMAGES, make_tiny_run

IDS = sorted(id for id in gym.registry if id.startswith("ral_gym/"))


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(params=IDS)
def spec(request: pytest.FixtureRequest, tiny_run: Path) -> EnvSpec:
    """A registered specification with the arguments it needs."""
    spec = copy.deepcopy(gym.spec(request.param))
    if "LatentCode" in request.param:
        spec.kwargs["run"] = str(tiny_run)
    return spec


def make(spec: EnvSpec, **kwargs: Any) -> GenerationEnv:
    return gym.make(spec, **kwargs).unwrapped  # type: ignore[return-value]


Transition = tuple[Any, ...]


def play(env: gym.Env, n_steps: int, seed: int | None = None, start: bool = True) -> Iterator[Transition]:
    """Random codes, the same for the same seed; resets between episodes are part of it."""
    rng = np.random.default_rng(seed)
    if start:
        yield env.reset(seed=seed)
    for _ in range(n_steps):
        transition = env.step(rng.integers(env.action_space.n))
        yield transition
        if transition[2]:
            yield env.reset()


def test_ids_are_registered() -> None:
    assert {"ral_gym/Toy-v0", "ral_gym/LatentCode-v0"} <= set(IDS)
    assert gym.spec("ral_gym/Toy-v0").reward_threshold == 0.9
    for id in IDS:
        assert gym.spec(id).max_episode_steps is None
        assert gym.spec(id).vector_entry_point is not None


def test_importing_the_package_imports_no_network_and_registers_once() -> None:
    code = """
        import sys, importlib, gymnasium
        before = set(sys.modules)
        import ral_gym
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        assert new == {"ral_gym"}, new
        importlib.reload(ral_gym)
        assert "torch" not in sys.modules
        gymnasium.spec("ral_gym/Toy-v0")
    """
    lines = "\n".join(line.strip() for line in code.splitlines())
    subprocess.run([sys.executable, "-W", "error", "-c", lines], check=True, timeout=60)


def test_gymnasiums_checker_is_silent(spec: EnvSpec) -> None:
    check_env(make(spec))


def test_sb3s_checker_is_silent(spec: EnvSpec) -> None:
    sb3_check_env(make(spec))
    sb3_check_env(gym.make(spec))


@pytest.mark.parametrize("reset_mode", RESET_MODES)
@pytest.mark.parametrize("reward", ["single", "intermediate", "none"])
def test_checkers_are_silent_for_every_argument(reset_mode: str, reward: str) -> None:
    env = gym.make("ral_gym/Toy-v0", reset_mode=reset_mode, reward=reward).unwrapped
    check_env(env)
    sb3_check_env(ToyEnv(reset_mode=reset_mode, reward=reward))


@pytest.mark.parametrize("reset_mode", RESET_MODES)
def test_two_instances_with_one_seed_agree(spec: EnvSpec, reset_mode: str) -> None:
    one, other = (play(gym.make(spec, reset_mode=reset_mode), 50, seed=7) for _ in range(2))
    for a, b in zip(one, other, strict=True):
        assert data_equivalence(a, b, exact=True)


def test_another_seed_draws_other_starts(spec: EnvSpec) -> None:
    env = make(spec, reset_mode="continue")
    assert len({env.reset(seed=seed)[0].tobytes() for seed in range(20)}) > 5


def labels(env: gym.Env, observation: np.ndarray) -> dict[str, Any]:
    """The label in an info, as the observation shows it; empty without classes."""
    grid = env.unwrapped.world.grid  # type: ignore[attr-defined]
    return {"label": int(observation[-1]) - grid.first_label} if grid.classes else {}


def test_a_step_returns_what_the_page_says(spec: EnvSpec) -> None:
    env = gym.make(spec)
    at_once = env.unwrapped.world.oracle is not None  # every code is paid when it is drawn
    observations, infos, paid = [], [], 0.0
    for observation, *rest in play(env, 2 * env.observation_space.shape[0], seed=0):
        observations.append(observation)
        infos.append(rest[-1])
        assert observation in env.observation_space
        if len(rest) == 1:
            assert rest[0] == labels(env, observation)
            continue
        reward, terminated, truncated, info = rest
        assert type(reward) is float and type(terminated) is bool and truncated is False
        assert terminated or (info == {} and (reward == 0.0 or at_once))
        paid += reward
        if terminated:
            assert set(info) == {"codes", "score_map", "step_rewards", *labels(env, observation)}
            assert info.items() >= labels(env, observation).items()
            assert (info["codes"] == observation).all() and info["codes"].dtype == np.int16
            assert info["score_map"].ndim == 2 and info["score_map"].dtype == np.float32
            assert info["step_rewards"].shape == (env.unwrapped.world.grid.n_codes,)
            assert paid == pytest.approx(float(info["step_rewards"].sum()), abs=1e-4)
            paid = 0.0
    arrays = [*observations, *(value for info in infos for value in info.values() if isinstance(value, np.ndarray))]
    assert not any(np.shares_memory(a, b) for i, a in enumerate(arrays) for b in arrays[:i])


def test_the_specification_survives_json(spec: EnvSpec) -> None:
    made = gym.make(spec, reset_mode="continue", reward="intermediate").spec
    assert made is not None
    json.loads(made.to_json())
    again = gym.make(EnvSpec.from_json(made.to_json()))
    for a, b in zip(play(gym.make(made), 40, seed=1), play(again, 40, seed=1), strict=True):
        assert data_equivalence(a, b, exact=True)
    vector = gym.make_vec(spec, num_envs=2, autoreset_mode="NextStep", lockstep=True).spec
    assert vector is not None
    again_vector = gym.make_vec(EnvSpec.from_json(vector.to_json()))
    assert again_vector.num_envs == 2 and again_vector.unwrapped.core.lockstep


@pytest.mark.parametrize("library", [pickle, cloudpickle, copy])
def test_a_copy_goes_on_where_the_original_was(spec: EnvSpec, library: Any) -> None:
    env = gym.make(spec, reset_mode="mixed")
    list(play(env, 21, seed=3))
    other = library.deepcopy(env) if library is copy else library.loads(library.dumps(env))
    pickled = pickle.dumps(env)
    assert len(pickled) < 20_000, "the models are not part of it"
    for a, b in zip(play(env, 40, 1, start=False), play(other, 40, 1, start=False), strict=True):
        if "Oracle" in spec.id:  # its cache is built anew in the copy: the same rewards to within rounding
            assert data_equivalence(a[0], b[0], exact=True)
            np.testing.assert_allclose(*([step[1] if len(step) > 2 else 0.0 for step in (a, b)]), rtol=1e-5)
        else:
            assert data_equivalence(a, b, exact=True)


def test_models_are_loaded_once(tiny_run: Path) -> None:
    one, other = run_world(str(tiny_run)), run_world(str(tiny_run), "intermediate")
    assert one.real_codes is other.real_codes
    assert one.scorer.critic is other.scorer.critic  # type: ignore[union-attr]
    assert one.real_codes is not None and len(one.real_codes) == N_IMAGES, "augmented passes are no real images"


@pytest.mark.parametrize("render_mode", ["rgb_array", "ansi"])
def test_every_render_mode(spec: EnvSpec, render_mode: str) -> None:
    env = make(spec, render_mode=render_mode)
    env.reset(seed=0)
    frames = [env.render()]
    for _ in range(2):
        env.step(0)
        frames.append(env.render())
    if render_mode == "ansi":
        assert all(isinstance(frame, str) for frame in frames)
        assert [frame.split().count("0") for frame in frames] == [0, 1, 2]  # type: ignore[union-attr]
        return
    height, width = env.world.grid.height, env.world.grid.width
    for drawn, frame in enumerate(frames):
        assert isinstance(frame, np.ndarray) and frame.dtype == np.uint8
        side = len(frame)
        assert frame.shape == (side, side, 3) and side >= 256
        cells = frame.reshape(height, side // height, width, side // width, 3).transpose(0, 2, 1, 3, 4)
        grey = (cells.reshape(height * width, -1) == 128).all(1)
        assert grey.tolist() == [False] * drawn + [True] * (height * width - drawn)


def test_render_without_a_mode_warns() -> None:
    env = ToyEnv()
    env.reset()
    with pytest.warns(UserWarning, match="pass render_mode"):
        assert env.render() is None
    with pytest.raises(ValueError, match="render_mode 'human' is unknown: choose from rgb_array, ansi"):
        ToyEnv(render_mode="human")


def test_toy_tiles_have_their_colours() -> None:
    env = ToyEnv(render_mode="rgb_array")
    env.reset(options={"codes": [0, 5]})
    frame = env.render()
    assert isinstance(frame, np.ndarray)
    colours = frame[::64, ::64].tolist()
    assert colours[0][0] == [0, 114, 178] and colours[0][1] == [213, 94, 0] and colours[1][0] == [128, 128, 128]


def test_episode_statistics(spec: EnvSpec) -> None:
    env = RecordEpisodeStatistics(gym.make(spec, reset_mode="mixed"))
    length, paid = 0, 0.0
    for observation, *rest in play(env, 60, seed=2):
        length, paid = (0, 0.0) if len(rest) == 1 else (length + 1, paid + rest[0])
        if len(rest) > 1 and rest[1]:
            assert rest[-1]["episode"]["l"] == length
            assert rest[-1]["episode"]["r"] == pytest.approx(paid)
        del observation


def test_videos_are_recorded(spec: EnvSpec, tmp_path: Path) -> None:
    pytest.importorskip("moviepy")
    folder = tmp_path / "videos"
    env = RecordVideo(gym.make(spec, render_mode="rgb_array"), str(folder), episode_trigger=lambda _: True)
    list(play(env, env.observation_space.shape[0], seed=0))
    env.close()
    assert max(path.stat().st_size for path in folder.glob("*.mp4")) > 1000


def test_a_window_shows_it(spec: EnvSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    env = HumanRendering(gym.make(spec, render_mode="rgb_array"))
    env.reset(seed=0)
    env.step(0)
    env.close()


def test_the_pages_example_runs(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", latent_code.LatentCodeEnv.__doc__ or "", re.DOTALL)
    shutil.copytree(tiny_run, tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec("\n".join(line.removeprefix("    ") for line in example.splitlines()), names)
    assert names["terminated"] and names["picture"].shape == (256, 256, 3)


PAGE_SECTIONS = [
    "Description",
    "Action Space",
    "Observation Space",
    "Rewards",
    "Starting State",
    "Episode End",
    "Information",
    "Arguments",
    "Version History",
]


def test_every_environment_has_its_page(spec: EnvSpec) -> None:
    page = type(make(spec)).__doc__ or ""
    assert re.findall(r"^ *## (.*)$", page, re.MULTILINE) == PAGE_SECTIONS


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"reward": "loss"}, ValueError, "reward 'loss' is unknown: choose one of .*single, intermediate, none"),
        ({"reset_mode": "half"}, ValueError, "reset_mode='half' is unknown: choose one of full"),
        ({"device": "gpu"}, DeviceError, "unknown device 'gpu': choose cpu, cuda or cuda:N"),
        ({"device": "cuda:99"}, DeviceError, "device 'cuda:99' asked for, but . CUDA devices are visible"),
    ],
)
def test_wrong_arguments(spec: EnvSpec, arguments: dict[str, str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gym.make(spec, **arguments)
    with pytest.raises(error, match=message):
        gym.make_vec(spec, **arguments)


@pytest.mark.parametrize("name", ["config.json", "vqvae.safetensors", "codes.safetensors", "critic.safetensors"])
def test_a_run_without_a_stage(tmp_path: Path, name: str) -> None:
    run = make_tiny_run(tmp_path)
    (run / name).unlink()
    with pytest.raises(RunError, match=f"{name} is missing"):
        run_world(str(run))
    if name == "critic.safetensors":
        assert run_world(str(run), "none").scorer is None


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    run = make_tiny_run(tmp_path)
    save_module(run / "critic.safetensors", PatchCritic(64, 3), normalization="none", shift=0.0, scale=1.0)
    with pytest.raises(RunError, match=r"'image_size': 64, 'channels': 3.* decodes .*'image_size': 32, 'channels': 1"):
        run_world(str(run))
    save_module(run / "critic.safetensors", PatchCritic(32, 1))
    with pytest.raises(RunError, match=r"critic.safetensors lacks 'normalization'"):
        run_world(str(run))


def test_a_file_written_again_is_read_again(tmp_path: Path) -> None:
    run = make_tiny_run(tmp_path, seed=0)
    before = run_world(str(run)).real_codes
    make_tiny_run(tmp_path, seed=1)
    os.utime(run / "codes.safetensors", ns=(1, 1))  # however coarse the file system's clock
    after = run_world(str(run)).real_codes
    assert before is not None and after is not None and (before != after).any()


def test_public_names_stay_what_they_are_when_all_modules_are_imported() -> None:
    """A module of the same name as a lazily imported function would take its place once it is imported."""
    import importlib
    import pkgutil
    import types

    import ral_gym.envs
    import ral_gym.metrics

    for package in (ral_gym.envs, ral_gym.metrics):
        for found in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{found.name}")
        for name in package.__all__:
            assert not isinstance(getattr(package, name), types.ModuleType), (package.__name__, name)
