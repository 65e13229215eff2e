"""Run many commands, some side by side: ``examples/make_results.py`` makes every table of the documents with it.

Each job is a Python command in a process of its own, with a log and its wall-clock and CPU seconds, which add up over
sittings in ``times.json``. A job waits for those it needs; one that fails is reported with its log's last lines, and
jobs that do not need it continue. Ctrl-C reaches every running job as if it ran alone, and all are waited for.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from ral_gym.runs.storage import load_json, save_json

State = Literal["kept", "done", "failed", "left out"]
POLL_SECONDS = 0.1
GRACE_SECONDS = 60.0
"""How long jobs may take to save and end after Ctrl-C, before they are ended by force."""
LOG_LINES = 8
"""Of a failed job's log, shown at once."""


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        name: of its log and its entry in ``times.json``.
        command: what follows ``python``.
        needs: names of jobs that must have ended well; those that are not in the schedule do not count.
        alone: nothing else runs beside it, and it has all threads (benchmarks).
        makes: a job that has ended well before, with the same command, is kept while this file is there. None: the job
            runs each time, for commands that find by themselves what is done.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    alone: bool = False
    makes: Path | None = None

    def __str__(self) -> str:
        """The command as one would type it."""
        return shlex.join(("python", *self.command))


@dataclass
class _Running:
    """A job at work."""

    job: Job
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    began: float = field(default_factory=time.monotonic)


class Schedule:
    """Jobs, and what has become of them. ``times.json`` also has the seconds of all sittings as a whole, `elapsed`.

    Args:
        jobs: in the order in which they are preferred.
        folder: where ``times.json`` and ``logs/`` are.
        console: where progress is shown.
        slots: how many jobs run side by side, with a thread each.

    Attributes:
        states: name -> what has become of it, in the order of ending.
        times: name -> `wall`, `cpu` (seconds), `sittings`, `done` and `command`; of earlier sittings too.
    """

    def __init__(self, jobs: Sequence[Job], folder: Path, console: Console, slots: int = 2) -> None:
        self.folder, self.console, self.slots = folder, console, slots
        kept: dict[str, Any] = {"jobs": {}, "elapsed": 0.0}
        if self._times_file.exists():
            kept = load_json(self._times_file)
        self.times: dict[str, Any] = kept["jobs"]
        self._elapsed_before = float(kept["elapsed"])
        self.states: dict[str, State] = {}
        self._names = {job.name for job in jobs}
        self._waiting = list(jobs)
        self._running: dict[int, _Running] = {}
        self._began = time.monotonic()
        self._keep_finished()

    @property
    def unfinished(self) -> list[Job]:
        """Jobs still to run whose result is not there."""
        return [job for job in self._waiting if job.makes is not None]

    @property
    def _times_file(self) -> Path:
        return self.folder / "times.json"

    def log(self, name: str) -> Path:
        """The log of a job."""
        return self.folder / "logs" / f"{name}.log"

    def run(self) -> dict[str, State]:
        """Everything that can be done.

        Returns:
            `states`.

        Raises:
            KeyboardInterrupt: on Ctrl-C or a request to terminate, after every running job has ended.
        """
        self.log("").parent.mkdir(parents=True, exist_ok=True)
        if self.states:
            self._say(f"{len(self.states)} finished before: {', '.join(self.states)}")
        with _interruptible(), Live(console=self.console, auto_refresh=False, transient=True) as live:
            try:
                while self._waiting or self._running:
                    self._leave_out()
                    self._start_ready()
                    live.update(self._progress(), refresh=True)
                    self._collect()
                    time.sleep(POLL_SECONDS if self._running else 0)
            except BaseException:
                self._stop()
                raise
        return self.states

    def _keep_finished(self) -> None:
        """Take the jobs off the list that an earlier sitting has done."""
        for job in list(self._waiting):
            before = self.times.get(job.name, {})
            same = before.get("done") and tuple(before["command"]) == job.command
            if same and job.makes is not None and job.makes.exists():
                self.states[job.name] = "kept"
                self._waiting.remove(job)

    def _leave_out(self) -> None:
        """Give up jobs that need one that failed."""
        for job in list(self._waiting):
            lost = [name for name in job.needs if self.states.get(name) in ("failed", "left out")]
            if lost:
                self.states[job.name] = "left out"
                self._waiting.remove(job)
                self._say(f"left out: {job.name}, which needs {lost[0]}", style="yellow")

    def _start_ready(self) -> None:
        """Fill the free slots; a job that must be alone waits for the others, and they for it."""
        while len(self._running) < self.slots and not any(running.job.alone for running in self._running.values()):
            job = next((job for job in self._waiting if self._is_ready(job)), None)
            if job is None or (job.alone and self._running):
                return
            self._waiting.remove(job)
            self._start(job)

    def _is_ready(self, job: Job) -> bool:
        return all(self.states.get(name) in ("done", "kept") for name in job.needs if name in self._names)

    def _start(self, job: Job) -> None:
        environment = dict(os.environ, COLUMNS="80", NO_COLOR="1", PYTHONUNBUFFERED="1")
        if not job.alone:
            environment["OMP_NUM_THREADS"] = "1"
        log = self.log(job.name).open("wb")
        # A process group of its own: Ctrl-C in the terminal comes once, from here, and to its workers too.
        process = subprocess.Popen(
            [sys.executable, *job.command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            process_group=0,
        )
        self._running[process.pid] = _Running(job, process, log)

    def _collect(self, stopped: bool = False) -> None:
        """Book the jobs that have ended, and say how; those that were stopped have only used time."""
        for pid, running in list(self._running.items()):
            ended, status, usage = os.wait4(pid, os.WNOHANG)
            if not ended:
                continue
            del self._running[pid]
            running.log.close()
            code = running.process.returncode = os.waitstatus_to_exitcode(status)
            wall, cpu = time.monotonic() - running.began, usage.ru_utime + usage.ru_stime
            self._book(running.job, wall, cpu, done=code == 0)
            if not stopped:
                self._report(running.job, wall, cpu, code)

    def _book(self, job: Job, wall: float, cpu: float, done: bool) -> None:
        """Add a sitting to ``times.json``."""
        entry = self.times.get(job.name, {"wall": 0.0, "cpu": 0.0, "sittings": 0})
        self.times[job.name] = {
            "wall": round(entry["wall"] + wall, 1),
            "cpu": round(entry["cpu"] + cpu, 1),
            "sittings": entry["sittings"] + 1,
            "done": done,
            "command": list(job.command),
        }
        elapsed = self._elapsed_before + time.monotonic() - self._began
        save_json(self._times_file, {"elapsed": round(elapsed, 1), "jobs": self.times})

    def _report(self, job: Job, wall: float, cpu: float, code: int) -> None:
        """Say how a job ended; of one that failed also why, and how to see for oneself."""
        self.states[job.name] = "failed" if code else "done"
        if not code:
            self._say(f"{self._count()} done: {job.name}, {wall:,.0f} s ({cpu:,.0f} CPU s)")
            return
        reason = f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"
        self._say(f"{self._count()} failed: {job.name}, {reason} after {wall:,.0f} s", style="red")
        self._say(f"  {self.log(job.name)} ends with:")
        lines = self.log(job.name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        for line in lines[-LOG_LINES:]:
            self._say(f"    {line}")
        self._say(f"  by itself: {job}")

    def _stop(self) -> None:
        """Interrupt what runs and wait for it: politely, and after a second Ctrl-C or the grace by force."""
        if self._running:
            names = ", ".join(running.job.name for running in self._running.values())
            self._say(f"stopping {names}; what they have saved is kept")
        for number, grace in ((signal.SIGINT, GRACE_SECONDS), (signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
            for pid in self._running:
                with suppress(ProcessLookupError):
                    os.killpg(pid, number)
            until = time.monotonic() + grace
            with suppress(KeyboardInterrupt):
                while self._running and time.monotonic() < until:
                    time.sleep(POLL_SECONDS)
                    self._collect(stopped=True)

    def _progress(self) -> Group:
        """What is shown while it runs: counts, then a line per running job."""
        failed = sum(state == "failed" for state in self.states.values())
        elapsed = time.monotonic() - self._began
        head = f"{self._count()} finished, {failed} failed, {len(self._waiting)} to come; {_clock(elapsed)}"
        lines = [f"  {r.job.name:28} {_clock(time.monotonic() - r.began)}" for r in self._running.values()]
        return Group(*(Text(line, no_wrap=True, overflow="ellipsis") for line in (head, *lines)))

    def _count(self) -> str:
        return f"{len(self.states)}/{len(self._names)}"

    def _say(self, line: str, style: str | None = None) -> None:
        self.console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM raise KeyboardInterrupt, whatever they were set to, here and (SIGINT) in the jobs."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    # A shell lets background commands ignore SIGINT. Handlers, unlike that, do not pass on to new processes.
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _clock(seconds: float) -> str:
    """Seconds as 0:12:34."""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"
