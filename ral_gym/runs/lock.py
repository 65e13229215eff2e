"""One process trains in a run folder at a time, and what a killed one left half written is removed."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ral_gym.errors import RunError
from ral_gym.runs.storage import cannot_write

LOCK = ".lock"
_TEMPORARY = re.compile(r"\..+\.(?P<pid>[0-9]{1,10})\.tmp")
"""What `write_atomic` calls a file until it is complete."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other process that asks for the lock out of a run folder; the system ends a killed process's lock.

    Inside, files that a killed process has left half written are gone.

    Raises:
        RunError: another process has the lock, or the folder cannot be written.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunError(
            f"another process is at work in {folder}: wait for it, stop it, or choose another --name"
        ) from error
    except OSError as error:
        raise cannot_write(folder / LOCK, error) from error
    try:
        sweep(folder)
        yield
    finally:
        lock.release()


def sweep(folder: Path) -> list[Path]:
    """Remove the temporary files of processes that are gone, directly inside a run folder and one level below.

    Returns:
        the files that were removed.
    """
    removed = []
    for file in [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")]:
        found = _TEMPORARY.fullmatch(file.name)
        if found is None or file.is_symlink() or not file.is_file() or _is_alive(int(found["pid"])):
            continue
        with contextlib.suppress(OSError):
            file.unlink()
            removed.append(file)
    return removed


def _is_alive(pid: int) -> bool:
    """Whether another process has this number; on Windows a file in use cannot be removed anyway."""
    if os.name == "nt" or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
