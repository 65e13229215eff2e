"""How every command ends: a user error is one line and an exit code, never a traceback."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.text import Text
from tqdm import tqdm

from ral_gym.errors import LONGEST_LINE, Listed, RalGymError, printable

SPIN_COUNT = {"free": "2000", "busy": "0"}
"""GOMP_SPINCOUNT: idle OpenMP threads look for work for some microseconds before they sleep, or not at all."""
LOOKS = 5
"""How often it is looked whether others are running: one look would see everything that wakes up for a moment."""
INTERRUPT_SECONDS = 1.0
"""Another Ctrl-C within this time (in seconds) counts as the same one."""
_NO_MEMORY = re.compile(r"out of memory|not enough memory|can't allocate memory|cannot allocate memory", re.IGNORECASE)


class _Lines(logging.Handler):
    """Log records as lines "warning: ..." on the error stream, above any progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        tqdm.write(f"{record.levelname.lower()}: {printable(record.getMessage())}", file=sys.stderr)


class _Output(Console):
    """Where commands print: control characters in text from files, also in table cells, do not reach the terminal.

    A closed pipe raises an error instead of ending Python.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Rich passes all text through here before it is measured and laid out."""
        lines = (printable(line, max(LONGEST_LINE, len(line))) for line in text.split("\n"))
        return super().render_str("\n".join(lines), **options)

    def on_broken_pipe(self) -> None:
        """Called by rich, inside the handling of the error."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def output(quiet: bool = False) -> Console:
    """Where commands print."""
    return _Output(quiet=quiet, markup=False)  # a name from a file may look like markup


def _quiet_about_files(arguments: threading.ExceptHookArgs) -> None:
    """No traceback from TensorBoard's writing thread: the main thread raises the same error at its next write."""
    if not issubclass(arguments.exc_type, OSError):
        threading.__excepthook__(arguments)


def _wait_gently() -> None:
    """Let OpenMP's idle threads soon give up their core, unless the user has said how they are to wait.

    By default they spin. Beside other work on the machine that takes the core from the thread they wait for. On two
    cores, one of them busy, two threads draw images at 0.5 times the speed of one thread by default, and at 0.8 times
    if they never spin; on free cores at 1.3 to 1.5 times if they spin for some microseconds, and at 0.8 times if they
    never do (`benchmarks/throughput.py`). It must be said before torch is imported.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys() and "torch" not in sys.modules:
        os.environ["GOMP_SPINCOUNT"] = spin_count()


def spin_count() -> str:
    """The setting that fits what else is running now; where that cannot be known, the one for free cores."""
    try:
        looks = []
        for _ in range(LOOKS):
            looks.append(int(Path("/proc/loadavg").read_text().split()[3].split("/")[0]) - 1)  # without this one
            time.sleep(0.002)
    except (OSError, ValueError, IndexError):
        return SPIN_COUNT["free"]
    others = sorted(looks)[LOOKS // 2]
    return SPIN_COUNT["busy" if others >= max(1, (os.cpu_count() or 1) // 4) else "free"]


def run_command(
    command: Callable[[Sequence[str], Console], Any], argv: Sequence[str], *, ends_process: bool = False
) -> int:
    """Run a command; a user error is one line on the error stream.

    Of several processes (torchrun, accelerate launch) only the first prints; the others only report their errors.

    Args:
        command: takes the arguments and where to print.
        argv: its arguments.
        ends_process: Python exits after this, so further Ctrl-C is ignored once one has stopped the command.

    Returns:
        the exit code: 0, 2 after an error that a user can fix, 130 after Ctrl-C, 141 if the output pipe is closed.
    """
    if ends_process:
        _wait_gently()
    rank, more = int(os.environ.get("RANK", "0")), list[str]()
    logger, handler = logging.getLogger("ral_gym"), logging.NullHandler() if rank else _Lines()
    logger.addHandler(handler)
    thread_hook, threading.excepthook = threading.excepthook, _quiet_about_files
    try:
        with _one_interrupt(), warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")  # libraries' warnings are for programmers
            try:
                command(argv, output(quiet=rank > 0))
            finally:
                sys.stdout.flush()  # detects a closed pipe here, not when Python exits
        return 0
    except RalGymError as error:
        message, code = f"error: {error}", 2
        more = error.lines if isinstance(error, Listed) else []
    except BrokenPipeError:
        _end_output()
        return 141
    except OSError as error:
        thing, reason = error.filename or "a log file", error.strerror or str(error)
        remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "fix that"
        message, code = f"error: {thing}: {reason}; {remedy} and run the same command again", 2
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        message, code = (
            (
                "error: there is not enough memory; saved files are kept; lower batch or layer sizes (--dry-run tells "
                "what a run needs)"
            ),
            2,
        )
    except KeyboardInterrupt:
        message, code = "stopped: saved files are kept; run the same command again to continue", 130
    finally:
        logger.removeHandler(handler)
        threading.excepthook = thread_hook
    for bar in list(getattr(tqdm, "_instances", ())):  # an unfinished bar would share its line with the message
        bar.close()
    message = printable(message)
    print(f"process {rank}: {message}" if rank else message, file=sys.stderr)
    for line in more:
        print(f"  {printable(line)}", file=sys.stderr)
    if code == 130 and not ends_process and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return code


@contextmanager
def _one_interrupt() -> Iterator[None]:
    """Treat Ctrl-C pressed twice in quick succession as one: the second would interrupt the clean-up of the first.

    A later Ctrl-C, if the clean-up takes long, counts again.
    """
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or usual is not signal.default_int_handler:
        yield
        return
    last = -math.inf

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > INTERRUPT_SECONDS:
            last = now
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        # After the first one, what remains is short.
        signal.signal(signal.SIGINT, usual if last == -math.inf else signal.SIG_IGN)


def _end_output() -> None:
    """Let Python exit without writing to the closed pipe."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, the processor's or a graphics card's allocator has no more memory."""
    return isinstance(error, MemoryError) or bool(_NO_MEMORY.search(str(error)))
