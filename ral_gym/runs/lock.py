"""Locking: one process at a time trains in a run folder; files that a killed one left half written are removed."""

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
"""Pattern of the names that `write_atomic` gives unfinished files."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run folder against other processes; the system releases a killed process's lock.

    On entry, files that a killed process left half written are removed.

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
    """Remove the temporary files of processes that no longer exist, in a run folder and one level below.

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
    """Whether another process with this id exists; on Windows a file in use cannot be removed anyway."""
    if os.name == "nt" or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
