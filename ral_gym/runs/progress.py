"""How every loop shows how far it is: a bar in a terminal or a notebook, a line a minute in a log file.

All loops of the package call `progress_bar`, and this file alone decides what they get.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sized
from typing import Any

from tqdm import tqdm

EVERY = 60.0
"""Seconds between two lines of a log file."""


def progress_bar(
    iterable: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    desc: str,
    unit: str,
    initial: int = 0,
    disable: bool = False,
    leave: bool = True,
    delay: float = 0.0,
) -> Any:
    """A progress bar with tqdm's methods `update`, `set_postfix`, `close`, and its attributes `n` and `total`.

    Args:
        iterable: what to go through; None: `update` is called by hand.
        total: how many steps there are; None: the length of `iterable`.
        desc: the stage.
        unit: what is counted, in the singular.
        initial: steps done by an earlier session.
        disable: show nothing.
        leave: keep the last state on the screen.
        delay: seconds before anything is shown.

    Returns:
        a bar of tqdm's where the error stream is a terminal; its notebook's bar inside Jupyter; else `LogLines`.
    """
    given: dict[str, Any] = {"total": total, "desc": desc, "unit": unit, "initial": initial, "leave": leave}
    if disable or sys.stderr.isatty():
        return tqdm(iterable, disable=disable, delay=delay, **given)
    if _in_notebook():
        return _notebook_bar()(iterable, delay=delay, **given)
    return LogLines(iterable, delay=delay, **given)


def note(text: str, disable: bool = False) -> None:
    """A line above the bars, on the error stream."""
    if not disable:
        tqdm.write(text, file=sys.stderr)


class LogLines:
    """Progress as whole lines on the error stream: one every minute, with the time left, and one at the end.

    A loop that ends within the first minute says only that it has ended; one that need not stay on a screen says
    nothing then. A loop that is left by an error says nothing either.

    Args:
        iterable, total, desc, unit, initial, leave, delay: as `progress_bar`.
    """

    def __init__(
        self,
        iterable: Iterable[Any] | None,
        total: int | None,
        desc: str,
        unit: str,
        initial: int,
        leave: bool,
        delay: float = 0.0,
    ) -> None:
        self._iterable, self.desc, self.unit, self.initial, self.leave = iterable, desc, unit, initial, leave
        self._delay = delay
        if total is None and isinstance(iterable, Sized):
            total = initial + len(iterable)
        self.total, self.n = total, initial
        self._begun = self._said = time.monotonic()
        self._figures: dict[str, Any] = {}
        self._closed = False

    def __iter__(self) -> Iterator[Any]:
        """Go through the iterable; a loop that is left early calls `close` itself."""
        assert self._iterable is not None
        for item in self._iterable:
            yield item
            self.update(1)
        self.close()

    def __enter__(self) -> LogLines:
        """Itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """End; after an error without a line."""
        self._closed = self._closed or kind is not None
        self.close()

    def update(self, n: int = 1) -> None:
        """Count `n` more steps, and print a line if the last one is a minute old."""
        self.n += n
        now = time.monotonic()
        if now - self._said >= EVERY and not self._closed:
            self._said = now
            self._print(self._state(now))

    def set_postfix(self, figures: dict[str, Any] | None = None, refresh: bool = True, **more: Any) -> None:
        """The figures at the end of the next line."""
        self._figures = {**(figures or {}), **more}

    def close(self) -> None:
        """Print the last line, once."""
        if self._closed:
            return
        self._closed = True
        elapsed = time.monotonic() - self._begun
        if self.leave and elapsed >= self._delay:
            self._print(f"{self._count()} in {_clock(elapsed)}")

    def _state(self, now: float) -> str:
        elapsed, done = now - self._begun, self.n - self.initial
        left = ""
        if self.total is not None and done > 0:
            left = f", about {_clock(elapsed / done * max(self.total - self.n, 0))} left"
        return f"{self._count()} after {_clock(elapsed)}{left}"

    def _count(self) -> str:
        plural = "" if self.n == 1 and self.total in (None, 1) else "s"
        of = "" if self.total is None else f" of {self.total:,}"
        return f"{self.n:,}{of} {self.unit}{plural}"

    def _print(self, text: str) -> None:
        figures = "".join(f", {name} {value}" for name, value in self._figures.items())
        print(f"{self.desc}: {text}{figures}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    """4 -> 0:04, 3700 -> 1:01:40."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _in_notebook() -> bool:
    """Whether the code runs in a Jupyter kernel; IPython is not imported for the question."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    return shell is not None and "IPKernelApp" in getattr(shell, "config", {})


def _notebook_bar() -> Any:
    """``tqdm.auto``'s bar: a widget, or text where ipywidgets is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm as bar
    return bar
