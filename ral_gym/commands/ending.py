"""How every command ends: a user's mistake is one line and an exit code, never a traceback."""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from tqdm import tqdm

from ral_gym.errors import RalGymError


class _Lines(logging.Handler):
    """Log records as lines "warning: ..." on the error stream, above any progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        tqdm.write(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


def _quiet_about_files(arguments: threading.ExceptHookArgs) -> None:
    """No traceback from TensorBoard's writing thread: the main thread raises the same error at its next write."""
    if not issubclass(arguments.exc_type, OSError):
        threading.__excepthook__(arguments)


def run_command(command: Callable[[Sequence[str], Console], Any], argv: Sequence[str]) -> int:
    """Run a command; a user's mistake is one line on the error stream.

    Of several processes (torchrun, accelerate launch) the first one alone prints; the others only say what ended them.

    Returns:
        the exit code: 0, 2 after an error a user can mend, 130 after Ctrl-C.
    """
    rank = int(os.environ.get("RANK", "0"))
    logger, handler = logging.getLogger("ral_gym"), logging.NullHandler() if rank else _Lines()
    logger.addHandler(handler)
    thread_hook, threading.excepthook = threading.excepthook, _quiet_about_files
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")  # libraries' remarks to programmers
            command(argv, Console(quiet=rank > 0))
        return 0
    except RalGymError as error:
        message, code = f"error: {error}", 2
    except OSError as error:
        thing, reason = error.filename or "a log file", error.strerror or str(error)
        remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
        message, code = f"error: {thing}: {reason}; {remedy} and run the same command again", 2
    except KeyboardInterrupt:
        message, code = "stopped: what was saved is kept; run the same command again to continue", 130
    finally:
        logger.removeHandler(handler)
        threading.excepthook = thread_hook
    for bar in list(getattr(tqdm, "_instances", ())):  # an unfinished bar would share its line with the message
        bar.close()
    print(f"process {rank}: {message}" if rank else message, file=sys.stderr)
    return code
