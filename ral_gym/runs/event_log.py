"""TensorBoard's event files of a run: one log for all stages, with each step once, also after a stage is resumed.

TensorBoard's own option for resumed runs, ``purge_step``, makes readers drop **every** curve from that step on, so that
stage 2, which starts at step 0, would hide stage 1. Here each stage writes its own files (their names end in the
stage's), and events that a stopped stage wrote after its checkpoint are removed before it continues.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from ral_gym.errors import RunError
from ral_gym.runs.foreign import check_regular
from ral_gym.runs.storage import write_atomic

FOLDER = "tensorboard"
MOST_EVENTS = 2**30
"""Most bytes of an event file."""


def open_event_log(run_folder: Path, stage: str, start: int) -> SummaryWriter:
    """A writer for one stage of a run.

    Args:
        run_folder: the run folder.
        stage: its name.
        start: the step from which the stage continues, on its own time axis; existing later events are dropped.

    Raises:
        RunError: an event file cannot be read or written.
    """
    folder = run_folder / FOLDER
    files = sorted(folder.glob(f"*tfevents*.{stage}"))
    for file in files:
        _drop_after(file, start)
    # Readers sort files by name, which begins with the second of their creation.
    for _ in range(30):
        if not any(f".tfevents.{int(time.time())}." in file.name for file in files):
            break
        time.sleep(0.05)
    return SummaryWriter(str(folder), filename_suffix=f".{stage}")


def _drop_after(path: Path, step: int) -> None:
    """Keep only the events up to a step; a file without later events is not rewritten."""
    try:
        check_regular(path, MOST_EVENTS)
        events, whole = _read(path)
        kept = [data for data, event in events if not event.HasField("summary") or event.step <= step]
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); remove it") from error
    if whole and len(kept) == len(events):
        return
    write_atomic(path, lambda temporary: _write(temporary, kept))


def _read(path: Path) -> tuple[list[tuple[bytes, Any]], bool]:
    """The events of a file as bytes and parsed, and whether it is complete: a killed writer leaves its last one cut."""
    from google.protobuf.message import DecodeError
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    events: list[tuple[bytes, Any]] = []
    tensorboard = logging.getLogger("tensorboard")
    level = tensorboard.level
    tensorboard.setLevel(logging.ERROR)
    try:
        events.extend((data, Event.FromString(data)) for data in RawEventFileLoader(str(path)).Load())
    except DecodeError:
        return events, False
    finally:
        tensorboard.setLevel(level)
    size = sum(len(data) + 16 for data, _ in events)  # length, two checksums
    return events, size == path.stat().st_size


def _write(path: Path, events: list[bytes]) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    with path.open("wb") as file:
        writer = RecordWriter(file)
        for data in events:
            writer.write(data)
        writer.flush()


def events_of(run_folder: Path) -> Iterator[tuple[str, int]]:
    """Tag and step of everything that a run has logged, in the order of the files; for tests and examples."""
    for path in sorted((run_folder / FOLDER).glob("*tfevents*")):
        for _, event in _read(path)[0]:
            for value in event.summary.value:
                yield value.tag, event.step
