"""The log ``metrics.jsonl``: one line of JSON per logged step of all stages, appended at once."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ral_gym.errors import RunError
from ral_gym.runs.foreign import MOST_LOG, check_regular, is_number, parse_json
from ral_gym.runs.storage import cannot_write

LONGEST_LINE = 2**20
"""Most bytes of a record; a longer line is ignored."""


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Write one line.

    Raises:
        RunError: the file cannot be written, or is a link or not a regular file.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags, 0o666)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise RunError(f"{path} is not a regular file; remove it")
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise cannot_write(path, error) from error


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """All records (`stage`, `step`, and numbers by name), skipping lines that are cut short or not records.

    Raises:
        RunError: the file is not a regular one, is too large, or cannot be read.
    """
    try:
        if not path.is_file():
            return
        check_regular(path, MOST_LOG)
        with path.open("rb") as file:
            while line := file.readline(LONGEST_LINE):
                if (record := _parse(line)) is not None:
                    yield record
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}); remove it") from error


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = parse_json(line.decode("utf-8", errors="replace"))
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("stage"), str):
        return None
    step = record.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        return None
    return {name: value for name, value in record.items() if name == "stage" or is_number(value)}
