"""Reading untrusted files: regular files only, of bounded size, JSON of bounded depth, finite tensors.

Nothing in a file is executed or unpickled. A violation raises a `RunError` that names the file.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ral_gym.errors import RunError

MOST_JSON = 32 * 2**20
"""Most bytes of a JSON file, or of the JSON in a safetensors header."""
MOST_LOG = 512 * 2**20
"""Most bytes of ``metrics.jsonl``."""
MOST_TENSORS = 32 * 2**30
"""Most bytes of a safetensors file."""
DEEPEST = 100
"""Deepest nesting of lists and dicts."""


def check_regular(path: Path, most: int, remedy: str = "remove it") -> None:
    """Refuse files that would block, never end or be too large to read.

    Raises:
        RunError: a folder, a pipe, a device or a socket (also through a link), or more than `most` bytes.
        OSError: it does not exist or cannot be accessed.
    """
    try:
        found = path.stat()
    except ValueError as error:  # a null byte
        raise RunError(f"{path} is not a file name ({error})") from error
    if not stat.S_ISREG(found.st_mode):
        raise RunError(f"{path} is not a regular file; {remedy}")
    if found.st_size > most:
        raise RunError(f"{path} has {found.st_size:,} bytes: at most {most:,} are read; {remedy}")


def read_bytes(path: Path, most: int = MOST_JSON, remedy: str = "remove it") -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
        RunError: see `check_regular`.
        OSError: it cannot be opened or read.
    """
    check_regular(path, most, remedy)
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as file:
        return file.read(most)


def parse_json(text: str | bytes) -> Any:
    """JSON as Python values; NaN and infinite numbers are allowed, since measured values may be NaN or infinite.

    Raises:
        ValueError: not JSON, a name twice in one dict, more than `DEEPEST` levels, or an integer of more than 64 bits.
    """
    try:
        values = json.loads(text, object_pairs_hook=_without_duplicates, parse_int=_integer)
    except RecursionError as error:
        raise ValueError(f"more than {DEEPEST} levels of lists and dicts") from error
    level: list[Any] = [values]
    for _ in range(DEEPEST):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return values
    raise ValueError(f"more than {DEEPEST} levels of lists and dicts")


def _inside(value: Any) -> list[Any]:
    """The lists and dicts directly inside a value."""
    held = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [inner for inner in held if isinstance(inner, dict | list)]


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice[:60]!r} occurs twice")
    return values


def _integer(digits: str) -> int:
    """Parse an integer; a random generator's state has 128 bits, nothing here has more."""
    if len(digits) > 40:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def check_finite_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Refuse NaN and infinite weights, which would silently spread.

    Raises:
        RunError: names the file and the first such tensor.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise RunError(f"{path}: tensor {name} has NaN or infinite numbers; remove the file to make it again")


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that a float can hold; booleans are not numbers."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool))
