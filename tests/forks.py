"""Commands in forked processes that are killed, signalled, paused or out of disk space at a chosen moment.

A moment is a number of calls of network modules, or of writes: the same work every time, however loaded the machine is.
"""

import errno
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ral_gym.runs import run as run_module
from ral_gym.stages import common, evaluate

CALLS = "calls"
"""The child's file for how many module calls and which writes it has made."""


def forked(work: Callable[[], int], log: Path, memory: int | None = None) -> int:
    """Start `work` in a child whose output goes to `log`; its process number. An exception is exit code 99."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
        if memory is not None:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        code = work()
    except SystemExit as error:
        code = int(error.code or 0) if not isinstance(error.code, str) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def ended(pid: int, seconds: float = 300) -> int:
    """The exit code, or minus the signal that ended the child; one that takes too long is killed (-100)."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -100


def at_call(number: int, act: Callable[[], object]) -> None:
    """In a child: `act` at the `number`-th call of a network module."""
    usual, count = torch.nn.Module.__call__, 0

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            act()
        return usual(self, *args, **kwargs)

    torch.nn.Module.__call__ = call  # type: ignore[method-assign]


def at_write(number: int, how: str) -> None:
    """In a child: die inside a write: at `half` of the bytes, `before` or `after` the file takes its name."""
    usual, write, count = os.replace, Path.write_bytes, 0

    def replace(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        if count == number and how == "before":
            die()
        usual(source, target)
        if count == number and how == "after":
            die()

    def half(self: Path, data: bytes) -> int:
        if count + 1 == number and how == "half":
            write(self, data[: len(data) // 2])
            die()
        return write(self, data)

    os.replace = replace  # type: ignore[assignment]
    Path.write_bytes = half  # type: ignore[method-assign, assignment]


def at_log(number: int) -> None:
    """In a child: die when half of the `number`-th line of metrics.jsonl is written."""
    usual, count = run_module.append_record, 0

    def append(path: Path, record: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        if count == number:
            with path.open("a") as file:
                file.write('{"stage": "vqv')
            die()
        usual(path, record)

    run_module.append_record = append


def full_at(target: Path) -> None:
    """In a child: the disk is full when `target` would take its name."""
    usual = os.replace

    def replace(source: Any, to: Any) -> None:
        if Path(to) == target:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        usual(source, to)

    os.replace = replace  # type: ignore[assignment]


def counted(path: Path) -> None:
    """In a child: keep the number of module calls, and the names of the files written, in `path`."""
    call, usual, calls, names = torch.nn.Module.__call__, os.replace, 0, []

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return call(self, *args, **kwargs)

    def replace(source: Any, target: Any) -> None:
        usual(source, target)
        names.append(str(target))
        path.write_text("\n".join([str(calls), *names]))

    torch.nn.Module.__call__ = count  # type: ignore[method-assign]
    os.replace = replace  # type: ignore[assignment]


def die() -> None:
    """As a power cut would: nothing is tidied up."""
    os.kill(os.getpid(), signal.SIGKILL)


def often_saved(pictures: bool = False) -> None:
    """In a child: a checkpoint after every step, and no pictures at the end."""
    common.CHECKPOINT_SECONDS = 0.0
    if not pictures:
        evaluate.draw_pictures = lambda *args: None  # type: ignore[assignment]
