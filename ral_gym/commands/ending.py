"""How every command ends: a user's mistake is one line and an exit code, never a traceback."""

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
from types import FrameType
from typing import Any

from rich.console import Console
from rich.text import Text
from tqdm import tqdm

from ral_gym.errors import LONGEST_LINE, RalGymError, printable

INTERRUPT_SECONDS = 1.0
"""Ctrl-C again within this time is the same one."""
_NO_MEMORY = re.compile(r"out of memory|not enough memory|can't allocate memory|cannot allocate memory", re.IGNORECASE)


class _Lines(logging.Handler):
    """Log records as lines "warning: ..." on the error stream, above any progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        tqdm.write(f"{record.levelname.lower()}: {printable(record.getMessage())}", file=sys.stderr)


class _Output(Console):
    """Where commands print: text from files, also in the cells of a table, cannot steer the terminal.

    A reader that has gone away is an error like any other, and not the end of Python.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Everything that rich is given as text comes through here before it is measured and set."""
        lines = (printable(line, max(LONGEST_LINE, len(line))) for line in text.split("\n"))
        return super().render_str("\n".join(lines), **options)

    def on_broken_pipe(self) -> None:
        """Called by rich, inside the handling of the error."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def _quiet_about_files(arguments: threading.ExceptHookArgs) -> None:
    """No traceback from TensorBoard's writing thread: the main thread raises the same error at its next write."""
    if not issubclass(arguments.exc_type, OSError):
        threading.__excepthook__(arguments)


def run_command(
    command: Callable[[Sequence[str], Console], Any], argv: Sequence[str], *, ends_process: bool = False
) -> int:
    """Run a command; a user's mistake is one line on the error stream.

    Of several processes (torchrun, accelerate launch) the first one alone prints; the others only say what ended them.

    Args:
        command: takes the arguments and where to print.
        argv: its arguments.
        ends_process: Python ends after this, and Ctrl-C counts no more once it has stopped the command.

    Returns:
        the exit code: 0, 2 after an error a user can mend, 130 after Ctrl-C, 141 where nobody reads the output.
    """
    rank = int(os.environ.get("RANK", "0"))
    logger, handler = logging.getLogger("ral_gym"), logging.NullHandler() if rank else _Lines()
    logger.addHandler(handler)
    thread_hook, threading.excepthook = threading.excepthook, _quiet_about_files
    try:
        with _one_interrupt(), warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")  # libraries' remarks to programmers
            try:
                command(argv, _Output(quiet=rank > 0, markup=False))  # a name from a file may look like markup
            finally:
                sys.stdout.flush()  # where nobody reads any more, that is found out here and not when Python ends
        return 0
    except RalGymError as error:
        message, code = f"error: {error}", 2
    except BrokenPipeError:
        _end_output()
        return 141
    except OSError as error:
        thing, reason = error.filename or "a log file", error.strerror or str(error)
        remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "put that right"
        message, code = f"error: {thing}: {reason}; {remedy} and run the same command again", 2
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        message, code = (
            (
                "error: there is not enough memory; what was saved is kept; lower batch or layer sizes (--dry-run says "
                "what a run needs)"
            ),
            2,
        )
    except KeyboardInterrupt:
        message, code = "stopped: what was saved is kept; run the same command again to continue", 130
    finally:
        logger.removeHandler(handler)
        threading.excepthook = thread_hook
    for bar in list(getattr(tqdm, "_instances", ())):  # an unfinished bar would share its line with the message
        bar.close()
    message = printable(message)
    print(f"process {rank}: {message}" if rank else message, file=sys.stderr)
    if code == 130 and not ends_process and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return code


@contextmanager
def _one_interrupt() -> Iterator[None]:
    """Take Ctrl-C pressed twice in a hurry for one: the second would break off the clean end of the first.

    A later Ctrl-C, where the end takes long, counts again.
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
        # After one, what is left to do is short.
        signal.signal(signal.SIGINT, usual if last == -math.inf else signal.SIG_IGN)


def _end_output() -> None:
    """Let Python end without trying to write what nobody reads."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, the processor's or a graphics card's allocator has no more memory."""
    return isinstance(error, MemoryError) or bool(_NO_MEMORY.search(str(error)))
