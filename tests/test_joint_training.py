"""Stage 3 on several processes: what one process computes, what happens when one fails, and who writes."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stable_baselines3 import PPO

from ral_gym.agents import PriorPolicy, algorithm_defaults, make_sb3_env
from ral_gym.errors import ConfigError
from ral_gym.runs.alike import digest
from ral_gym.runs.sharing import Processes
from ral_gym.runs.storage import load_tensors, unpack_state
from tests.joint_cases import CASES
from tests.joint_faults import UPDATE
from tests.test_policy import tiny_prior
from tests.test_processes import free_port

pytestmark = pytest.mark.processes

TESTS = Path(__file__).parent
TORCHRUN = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent), "MASTER_PORT": ""}


def torchrun(
    count: int, *command: str, options: tuple[str, ...] = (), check: bool = True
) -> subprocess.CompletedProcess:
    line = [*TORCHRUN, str(count), *options, *command]
    done = subprocess.run(line, capture_output=True, text=True, timeout=400, env=ENVIRONMENT)
    assert done.returncode == 0 or not check, done.stderr
    return done


# The same numbers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, torch.Tensor]]]:
    """What each of 1, 2 and 3 processes has at the end of all cases."""
    found = {}
    for count in (1, 2, 3):
        folder = tmp_path_factory.mktemp(f"joint{count}")
        torchrun(count, str(TESTS / "joint_cases.py"), str(folder))
        found[count] = [load_file(folder / f"{rank}.safetensors") for rank in range(count)]
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_compute_what_one_does(joint, count: int, case: str) -> None:
    alone = {name: tensor for name, tensor in joint[1][0].items() if name.startswith(f"{case}/")}
    assert alone
    for mine in joint[count]:
        for name, tensor in alone.items():
            assert torch.equal(mine[name], joint[count][0][name]), f"{name} differs between processes"
            kind = name.split("/")[1].split(".")[0]
            if kind in ("policy", "critic"):
                # Adam divides by the square root of small second moments, which magnifies rounding in the critic.
                torch.testing.assert_close(mine[name], tensor, rtol=0, atol=1e-12 if kind == "policy" else 1e-9)
            elif kind not in ("digest", "moved"):
                assert torch.equal(mine[name], tensor), name


def test_the_cases_train(joint) -> None:
    found = joint[1][0]
    for case in CASES:
        assert found[f"{case}/moved"] > 1e-5, case
    # `target_kl` ends updates early: GRPO's 4 epochs of one step, PPO's 10 epochs of a step per episode, 7 or more.
    for case, most in (("grpo", 4), ("ppo", 10 * 7)):
        assert found[f"{case}/steps"] < most * found[f"{case}/rollouts"], case


# Through the command line --------------------------------------------------------------------------------------------

OPTIONS = ["--preset", "smoke", "--device", "cpu", "--data.workers", "1", "--quiet", "--ral.n-updates", "9"]
OPTIONS += ["--ral.checkpoint-every", "2", "--stages", "vqvae", "prior", "ral"]


@functools.cache
def sound(folder: Path, count: int = 2) -> Path:
    """An uninterrupted run."""
    torchrun(count, str(TESTS / "joint_faults.py"), "sound", "-", "train", *OPTIONS, "--runs", str(folder))
    return folder / "smoke"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def stage_state(run: Path) -> int:
    """A number for everything that stage 3 ends with, but for the times."""
    tensors, metadata = load_tensors(run / "checkpoints" / "ral.safetensors")
    state = unpack_state(tensors, metadata["state"])
    return digest({name: part for name, part in state.items() if name not in ("time", "logged")})


def faulty(fault: str, tmp_path: Path, *more: str, check: bool = False, **options) -> subprocess.CompletedProcess:
    command = [fault, str(tmp_path / "flag"), "train", *OPTIONS, "--runs", str(tmp_path), *more]
    return torchrun(2, str(TESTS / "joint_faults.py"), *command, check=check, **options)


def test_one_process_writes(runs: Path) -> None:
    run = sound(runs)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["stage"] == "ral"] == list(range(9))
    assert len(list((run / "tensorboard").iterdir())) == 3 and not list(run.rglob(".*.tmp"))
    assert (run / "policy.safetensors").is_file() and (run / "prior_continued.safetensors").is_file()
    assert set(json.loads((run / "seconds.json").read_text())) >= {"vqvae", "prior", "ral", "prior_continued"}


def test_a_killed_process_stops_all_and_the_same_command_continues_bit_for_bit(runs: Path, tmp_path) -> None:
    killed = faulty("die", tmp_path)
    assert killed.returncode != 0 and (tmp_path / "flag").exists()
    assert not (tmp_path / "smoke" / "policy.safetensors").exists() and not list(tmp_path.rglob(".*.tmp"))
    faulty("die", tmp_path, check=True)
    assert stage_state(tmp_path / "smoke") == stage_state(sound(runs))


def test_torchrun_restarts_after_a_kill(runs: Path, tmp_path) -> None:
    faulty("die", tmp_path, options=("--max-restarts", "1"), check=True)
    assert stage_state(tmp_path / "smoke") == stage_state(sound(runs))


def test_another_number_of_processes_continues(tmp_path) -> None:
    assert faulty("die", tmp_path).returncode
    torchrun(3, str(TESTS / "joint_faults.py"), "sound", "-", "train", *OPTIONS, "--runs", str(tmp_path))
    assert (tmp_path / "smoke" / "policy.safetensors").is_file()


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("hang", f"process 1 of 2 did not answer (after {UPDATE} updates)"),
        ("drift", "process 1 is not where process 0 is (policy, at the end)"),
        ("threads", "process 1 is of another kind than process 0: threads is 2, not 1"),
    ],
)
def test_a_process_that_is_not_with_the_others_is_named(tmp_path, fault: str, says: str) -> None:
    done = faulty(fault, tmp_path)
    assert done.returncode and f"error: {says}" in done.stderr, done.stderr
    assert not (tmp_path / "smoke" / "policy.safetensors").exists()


def test_a_killed_process_is_told_in_one_line_within_seconds(tmp_path) -> None:
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    command = [sys.executable, str(TESTS / "joint_faults.py"), "die", str(tmp_path / "flag"), "train", *OPTIONS]
    both = [
        subprocess.Popen(
            [*command, "--runs", str(tmp_path)],
            env={**ENVIRONMENT, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if rank else subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        assert both[1].wait(300) == -signal.SIGKILL
        died = time.monotonic()
        _, errors = both[0].communicate(timeout=60)
        assert time.monotonic() - died < 30  # the connection breaks at once; a hanging one takes the patience
    finally:
        for process in both:
            process.kill()
            process.wait()
    lines = [line for line in errors.splitlines() if line.strip()]
    assert both[0].returncode == 2 and "Traceback" not in errors, errors
    assert lines[-1].startswith(("error: process 0 of 2 lost another one", "error: process 1 of 2 did not answer"))


def test_fewer_environments_than_processes_are_refused(tmp_path) -> None:
    done = faulty("sound", tmp_path, "--ral.n-envs", "1")
    assert "error: ral.n_envs is 1, but 2 processes share the images of an update" in done.stderr


# In a script of one's own --------------------------------------------------------------------------------------------


def test_a_saved_model_belongs_to_one_process(tmp_path) -> None:
    env = make_sb3_env("ral_gym/Toy-v0", 4, seed=0)
    joined = Processes(1, 3)
    assert joined.share(7) == slice(2, 4) and joined.sizes(2) == [0, 1, 1] and Processes(0, 3).rows(2) == slice(0, 1)
    keywords = algorithm_defaults("ppo", env, prior=tiny_prior())
    keywords["policy_kwargs"]["processes"] = Processes()
    model = PPO(PriorPolicy, env, **keywords)
    model.policy_kwargs["processes"] = joined
    model.save(tmp_path / "model")
    assert PPO.load(tmp_path / "model", device="cpu").policy.processes.size == 1


def test_the_example_runs_on_two_processes(tmp_path) -> None:
    example = str(TESTS.parent / "examples" / "several_gpus.py")
    done = torchrun(2, example, "--updates", "2", "--n-envs", "4", "--save", str(tmp_path / "model.zip"))
    assert done.stdout.count("2 processes, 4 images per update") == 1 and (tmp_path / "model.zip").is_file()


def test_more_processes_than_gpus_are_refused(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="process 1 of this machine has no GPU: 1 are visible"):
        Processes.join("cuda")
