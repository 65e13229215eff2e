"""What metrics.jsonl has, also for an experiment tracker: wandb, mlflow or trackio, through accelerate's trackers.

`tracked` listens at the one place where all stages log, `ral_gym.runs.run.Run.log`, in the process that writes files.
A run that goes on, goes on in the same run of the tracker: trackers.json in the run folder has its id, and what was
sent; a step that was sent is not sent again, and a new tracker first gets what the run has logged before. A tracker
that fails later is left out after one warning. Nothing here changes a random state.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import random
import re
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ral_gym.config import settings
from ral_gym.errors import ConfigError, RunError
from ral_gym.runs.records import read_records
from ral_gym.runs.run import Run
from ral_gym.runs.shared_files import Portable
from ral_gym.runs.storage import load_json, save_json

FILE = "trackers.json"
INSTALL = {"wandb": '"ral-gym[track]"', "trackio": '"ral-gym[track]"', "mlflow": "mlflow"}
"""Tracker -> what pip installs for it."""
PROJECT = "ral_gym"
logger = logging.getLogger("ral_gym")


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not installed.

    Raises:
        ConfigError: names the first and the command that installs it.
    """
    for name in names:
        found = None if sys.modules.get(name, "") is None else importlib.util.find_spec(name)
        if found is None or found.origin is None:  # no origin: a folder of that name, where a tracker keeps its files
            raise ConfigError(f"--track {name} needs {name}, not installed: pip install {INSTALL[name]}")


@contextlib.contextmanager
def tracked(run: Run, names: Sequence[str]) -> Iterator[None]:
    """Context in which everything that the run logs reaches the trackers, too.

    Args:
        run: the run, locked.
        names: keys of `INSTALL`.

    Raises:
        RunError: a tracker does not start, or trackers.json is damaged.
    """
    known = _read(run)
    open_ones: list[_Open] = []
    try:
        for name in dict.fromkeys(names):
            open_ones.append(_start(run, name, known.get(name)))
            known[name] = open_ones[-1].note(is_open=True)
            save_json(run.file(FILE), known)
        for one in open_ones:
            one.catch_up(run)
            run.listeners.append(one.log)
        yield
    finally:
        for one in open_ones:
            with contextlib.suppress(ValueError):
                run.listeners.remove(one.log)
            one.finish()
            known[one.name] = one.note(is_open=False)
        if open_ones:
            save_json(run.file(FILE), known)


class _Open:
    """A tracker that has started.

    Args:
        name: a key of `INSTALL`.
        tracker: accelerate's.
        run_id: of the tracker's run.
        sent: stage -> last step that was sent.
    """

    def __init__(self, name: str, tracker: Any, run_id: str, sent: dict[str, int]) -> None:
        self.name, self.run_id, self.sent = name, run_id, sent
        self._tracker: Any = tracker
        self._stages: set[str] = set()

    def note(self, is_open: bool) -> dict[str, Any]:
        """What trackers.json has."""
        return {"id": self.run_id, "open": is_open, "sent": dict(self.sent)}

    def catch_up(self, run: Run) -> None:
        """Send what the run logged without this tracker."""
        for record in read_records(run.file("metrics.jsonl")):
            self.log(record["stage"], record["step"], {k: v for k, v in record.items() if k not in ("stage", "step")})

    def log(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Send one line, unless its step was sent."""
        new = self._tracker is not None and step > self.sent.get(stage, -1)
        if new and self._do(lambda: self._send(stage, step, metrics)):
            self.sent[stage] = step

    def _send(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        values = {f"{stage}/{name}": value for name, value in metrics.items()}
        if self.name == "mlflow":
            values = {re.sub(r"[^\w\-./ ]", "_", name): value for name, value in values.items()}  # else it refuses
        if self.name != "wandb":
            self._tracker.log(values, step=step)
            return
        # wandb has one count of steps for a whole run; every stage has its own here.
        if stage not in self._stages:
            self._stages.add(stage)
            self._tracker.tracker.define_metric(f"{stage}/step")
            self._tracker.tracker.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._tracker.log(values | {f"{stage}/step": step})

    def finish(self) -> None:
        """End the tracker's run, for now."""
        if self._tracker is not None:
            self._do(self._tracker.finish)

    def _do(self, what: Callable[[], object]) -> bool:
        """Something of the tracker's; if it fails there is one warning, and the tracker is left out from now on."""
        try:
            with _aside():
                what()
            return True
        except Exception as error:  # a tracker must not end the training
            self._tracker = None
            logger.warning("%s failed (%s): this session goes on without it", self.name, _first_line(error))
            return False


def _start(run: Run, name: str, known: dict[str, Any] | None) -> _Open:
    """Start a tracker's run, or go on with the known one.

    Raises:
        RunError: it does not start.
    """
    sent = dict(known["sent"]) if known else {}
    if known and known["open"]:  # the session was killed: what it logged was sent
        for record in read_records(run.file("metrics.jsonl")):
            sent[record["stage"]] = max(record["step"], sent.get(record["stage"], 0))
    try:
        with _aside():
            portable = Portable(run.config)  # paths of this computer are nobody's business there
            values = portable.values({key: _plain(value) for key, value in settings(run.config).items()})
            tracker = _make(run, name, known["id"] if known else None)
            if name == "trackio":  # the settings of its last session are those that it keeps
                tracker.init_kwargs["config"] = values
            tracker.start()
            run_id = known["id"] if known else _id_of(name, tracker)
            if name != "trackio" and not known:
                tracker.store_init_configuration(values)
    except Exception as error:  # third-party code may raise anything
        raise RunError(
            f"--track {name}: it does not start ({_first_line(error)}); log in or set it to offline, or leave it out"
        ) from error
    return _Open(name, tracker, run_id, sent)


def _make(run: Run, name: str, run_id: str | None) -> Any:
    """One of accelerate's trackers, not started; projects are named by the trackers' own variables, or ral_gym."""
    from accelerate import tracking

    title, fresh = run.path.resolve().name, uuid.uuid4().hex[:8]
    if name == "wandb":
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        console = {"settings": {"console": "off"}}  # it would copy everything that is printed
        made: Any = tracking.WandBTracker(project, id=run_id or fresh, name=title, resume="allow", **console)
    elif name == "trackio":
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        made = tracking.TrackioTracker(project, name=run_id or f"{title}-{fresh}", resume="allow")
    else:
        made = tracking.MLflowTracker(PROJECT, run_id=run_id, run_name=title)
    made.main_process_only = False  # only that one is here; else accelerate's state would be made for it
    return made


def _id_of(name: str, tracker: Any) -> str:
    """By what the tracker finds its run again."""
    if name == "mlflow":
        return str(tracker.tracker.info.run_id)
    return str(tracker.init_kwargs["id" if name == "wandb" else "name"])


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """Context for a tracker's code: random states stay, and what it prints goes to the error stream.

    accelerate's logger makes the state of its processes, on which the stages decide: a plain one stands in.
    """
    from accelerate import tracking

    states, own = (random.getstate(), np.random.get_state(legacy=False)), tracking.logger
    tracking.logger = _Plain(logging.getLogger("accelerate.tracking"), {})
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        tracking.logger = own
        random.setstate(states[0])
        np.random.set_state(states[1])


class _Plain(logging.LoggerAdapter):
    """A logger with the method that accelerate's has besides."""

    def warning_once(self, *arguments: Any) -> None:
        """As `warning`."""
        self.warning(*arguments)


def _plain(value: Any) -> Any:
    """A setting as a tracker takes it: a number, a text or None."""
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _read(run: Run) -> dict[str, Any]:
    """trackers.json, checked; {} if there is none.

    Raises:
        RunError: it is damaged.
    """
    path = run.file(FILE)
    known = load_json(path) if path.exists() else {}
    if not isinstance(known, dict) or not all(map(_is_note, known.values())):
        raise RunError(f"{path} is not a list of trackers' runs; remove it, and new ones are begun")
    return known


def _is_note(value: Any) -> bool:
    good = isinstance(value, dict) and isinstance(value.get("open"), bool) and isinstance(value.get("sent"), dict)
    return (
        good
        and isinstance(value.get("id"), str)
        and re.fullmatch(r"[\w][\w. -]{0,199}", value["id"]) is not None
        and all(type(step) is int for step in value["sent"].values())
    )


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
