"""`make test-faults`: kills, full disks, signals, two processes (docs/reliability.md); every run ends bit for bit."""

import functools
import json
import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ral_gym.commands.cli import train_main
from ral_gym.commands.stage_files import FINISHED
from ral_gym.runs.event_log import events_of
from ral_gym.runs.storage import load_json, load_tensors
from tests import forks

pytestmark = pytest.mark.faults

CASES = [
    *(("reinforce", "mixed"), ("reinforce", "full"), ("grpo", "full"), ("ppo", "scratch"), ("a2c", "continue")),
    *(("trpo", "full"), ("maskable_ppo", "mixed")),
]
KILLS = 6
"""In each of `CASES`, at random moments of all stages."""
WRITES = 24


def options(algo: str, reset_mode: str) -> list[str]:
    stage_3 = ["--algo", algo, "--ral.reset-mode", reset_mode, "--ral.checkpoint-every", "1", "--name", "run"]
    return [*("--preset", "smoke", "--data.workers", "1", "--quiet", "--evaluation.n-samples", "24"), *stage_3]


def train(runs: Path, case: tuple[str, str], *prepare: Callable[[], object], pictures: bool = False) -> int:
    """The exit code of a training command, after `prepare` in its process."""

    def work() -> int:
        forks.often_saved(pictures)
        for one in prepare:
            one()
        return train_main([*options(*case), "--evaluation.temperatures", "0.3", "--runs", str(runs)])

    runs.mkdir(exist_ok=True)
    return forks.ended(forks.forked(work, runs / "log"))


@functools.cache
def reference(runs: Path, case: tuple[str, str]) -> tuple[Path, int, list[str]]:
    """An uninterrupted run: its folder, its module calls, and the names of its writes."""
    folder = runs / "-".join(case)
    calls = runs / f"{folder.name}.calls"
    assert train(folder, case, lambda: forks.counted(calls)) == 0, (folder / "log").read_text()
    number, *names = calls.read_text().splitlines()
    return folder / "run", int(number), [str(Path(name).relative_to(folder / "run")) for name in names]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


def logged(run: Path) -> list[tuple[str, int, list[str]]]:
    """What metrics.jsonl has, without the numbers: one of them is a time."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(record["stage"], record["step"], sorted(record)) for record in records]


def assert_same(found: Path, expected: Path) -> None:
    """Bit for bit: weights, results, what was logged; and nothing is left over."""
    assert load_json(found / "results.json")["rows"] == load_json(expected / "results.json")["rows"]
    for name in FINISHED[1:]:
        if (expected / name).exists():
            one, other = load_tensors(found / name)[0], load_tensors(expected / name)[0]
            assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in other), name
    one, other = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (found, expected)
    )
    assert [(r["stage"], r["step"], sorted(r)) for r in one] == [(r["stage"], r["step"], sorted(r)) for r in other]
    assert Counter(events_of(found)) == Counter(events_of(expected))
    assert {path.name for path in found.rglob(".*")} <= {".lock"}


def finish(runs: Path, case: tuple[str, str], expected: Path) -> None:
    assert train(runs, case) == 0, (runs / "log").read_text()
    assert_same(runs / "run", expected)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_run_that_is_killed_again_and_again_is_the_uninterrupted_one(runs, tmp_path, case) -> None:
    expected, calls, _ = reference(runs, case)
    rng, killed, folder = random.Random(str(case)), 0, tmp_path / "a"
    while killed < KILLS:
        moment = rng.randrange(1, max(calls // 3, 2))
        status = train(folder, case, lambda moment=moment: forks.at_call(moment, forks.die))  # type: ignore[misc]
        assert status in (0, -signal.SIGKILL), (folder / "log").read_text()
        killed += status != 0
        if status == 0:
            assert_same(folder / "run", expected)
            folder = tmp_path / str(killed)
    finish(folder, case, expected)


def test_a_run_that_is_killed_inside_its_writes_is_the_uninterrupted_one(runs, tmp_path) -> None:
    case = CASES[0]
    expected, _, names = reference(runs, case)
    rng, killed, folder = random.Random(1), 0, tmp_path / "a"
    while killed < WRITES:
        moment, how = rng.randrange(1, max(len(names) // 3, 2)), rng.choice(["half", "before", "after", "log"])

        def act(moment: int = moment, how: str = how) -> None:
            forks.at_log(1 + moment % 5) if how == "log" else forks.at_write(moment, how)

        status = train(folder, case, act)
        assert status in (0, -signal.SIGKILL), (folder / "log").read_text()
        killed += status != 0
        if status == 0:
            assert_same(folder / "run", expected)
            folder = tmp_path / str(killed)
    finish(folder, case, expected)


def test_a_full_disk_at_every_file_loses_nothing(runs, tmp_path) -> None:
    case = CASES[0]
    expected, _, names = reference(runs, case)
    refused = 0
    for name in dict.fromkeys(name for name in names if name not in ("seconds.json", "metrics.jsonl")):
        target = tmp_path / "a" / "run" / name
        status = train(tmp_path / "a", case, lambda target=target: forks.full_at(target))  # type: ignore[misc]
        said = (tmp_path / "a" / "log").read_text()
        if status == 0:  # made before, in another sitting
            continue
        assert status == 2 and "No space left on device; free some space" in said and "Traceback" not in said, said
        refused += 1
    assert refused >= 12
    finish(tmp_path / "a", case, expected)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_signals_lose_nothing(runs, tmp_path, number) -> None:
    case = CASES[0]
    expected, calls, _ = reference(runs, case)
    moment = random.Random(number).randrange(1, calls // 2)
    status = train(tmp_path / "a", case, lambda: forks.at_call(moment, lambda: os.kill(os.getpid(), number)))
    assert status == (130 if number == signal.SIGINT else -number)
    finish(tmp_path / "a", case, expected)


def test_a_second_process_is_refused_and_the_first_is_not_disturbed(runs, tmp_path) -> None:
    case = CASES[0]
    expected, calls, _ = reference(runs, case)
    folder = tmp_path / "a"
    folder.mkdir()

    def work() -> int:
        forks.often_saved()
        forks.at_call(calls // 3, lambda: os.kill(os.getpid(), signal.SIGSTOP))
        return train_main([*options(*case), "--evaluation.temperatures", "0.3", "--runs", str(folder)])

    first = forks.forked(work, folder / "first")
    os.waitpid(first, os.WUNTRACED)
    for _ in range(3):
        assert train(folder, case) == 2
        assert "another process is at work in" in (folder / "log").read_text()
    os.kill(first, signal.SIGCONT)
    assert forks.ended(first) == 0
    assert_same(folder / "run", expected)
