"""Validation of ``results.json`` and ``checkpoints/evaluation.json``, which are untrusted files.

Code that prints, draws or compares a table can then rely on it: names are text, metrics are numbers that a float can
hold, and rows have what tables and pictures need.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ral_gym.errors import RunError
from ral_gym.runs.foreign import is_number
from ral_gym.runs.storage import load_json

LARGEST = 2**53
"""Largest absolute value of an integer."""
LONGEST = 4096
"""Most characters of a name."""
MOST_ROWS = 10_000


def load_results(path: Path) -> dict[str, Any]:
    """The results of a run.

    Raises:
        RunError: the file is missing, damaged or invalid; says where.
    """
    results = load_json(path)
    try:
        _check_tree(results, "the file")
        _check_results(results)
    except _Wrong as error:
        raise RunError(f"{path} is not a results file ({error}); remove it to evaluate again") from error
    return results


def check_rows(rows: Any, path: Path) -> dict[str, dict[str, Any]]:
    """Check the rows that a file of an interrupted evaluation holds.

    Raises:
        RunError: they are not rows of a table.
    """
    try:
        _check_tree(rows, "the file")
        for name, row in _dict(rows, "the file").items():
            _check_row(row, name)
    except _Wrong as error:
        raise RunError(f"{path} holds no table rows ({error}); remove it to evaluate again") from error
    return rows


class _Wrong(Exception):
    """What is invalid."""


def _check_results(results: Any) -> None:
    rows, sweeps, checkpoints = (_get(results, name, "the file") for name in ("rows", "sweeps", "checkpoints"))
    for name, row in _dict(rows, "rows").items():
        _check_row(row, name)
    for name, sweep in _dict(sweeps, "sweeps").items():
        for row in _list(sweep, f"sweeps.{name}"):
            _check_row(row, f"sweeps.{name}", "temperature")
    for row in _list(checkpoints, "checkpoints"):
        _check_row(row, "checkpoints", "updates")
        if not isinstance(row["updates"], int):
            raise _Wrong("updates of checkpoints is not an integer")
    for name in ("extractor", "reference", "preset"):
        if not isinstance(results.get(name, ""), str):
            raise _Wrong(f"{name} is not text")
    for name in ("n_samples", "seed"):
        if not isinstance(_get(results, name, "the file"), int):
            raise _Wrong(f"{name} is not an integer")
    for name, seconds in _dict(results.get("seconds", {}), "seconds").items():
        if not is_number(seconds):
            raise _Wrong(f"seconds.{name} is not a number")
    for name in ("measurement", "sampling_seeds"):
        if not isinstance(results.get(name, 1), int):
            raise _Wrong(f"{name} is not an integer")
    for name, n in _dict(results.get("held_out", {}), "held_out").items():
        if not isinstance(n, int):
            raise _Wrong(f"held_out.{name} is not an integer")
    for name, meaning in _dict(results.get("metrics", {}), "metrics").items():
        if not isinstance(meaning, str):
            raise _Wrong(f"metrics.{name} is not text")
    if results.get("given_rows"):
        _check_given_rows(_dict(results["given_rows"], "given_rows"))


def _check_given_rows(measured: dict[str, Any]) -> None:
    """The prefix curve: metrics of images whose first rows are real."""
    given = _list(_get(measured, "given", "given_rows"), "given_rows.given")
    if not all(map(is_number, [*given, _get(measured, "height", "given_rows"), _get(measured, "n", "given_rows")])):
        raise _Wrong("given_rows has no numbers")
    for name, points in _dict(_get(measured, "curves", "given_rows"), "given_rows.curves").items():
        if len(_list(points, f"given_rows.{name}")) != len(given):
            raise _Wrong(f"given_rows.{name} must have one point for each number of rows")
        for point in points:
            _check_row(point, f"given_rows.{name}", "kid")


def _check_row(row: Any, where: str, *needed: str) -> None:
    """One row of a table: metrics by name, and intervals by the same names."""
    for name, value in _dict(row, where).items():
        if name == "intervals":
            for figure, ends in _dict(value, f"{where}.intervals").items():
                if ends is not None and not (isinstance(ends, list) and len(ends) == 2 and all(map(is_number, ends))):
                    raise _Wrong(f"{where}: the interval of {figure} is not two numbers")
        elif value is not None and not is_number(value):
            raise _Wrong(f"{where}: {name} is not a number")
    for name in ("fd", *needed):
        if not is_number(row.get(name)):
            raise _Wrong(f"{where}: {name} is {'not a number' if name in row else 'missing'}")


def _check_tree(values: Any, where: str) -> None:
    """Check all nested values: integers that a float can hold, names and lists of bounded length."""
    if isinstance(values, int) and abs(values) > LARGEST:
        raise _Wrong(f"{where} is an integer of {values.bit_length()} bits")
    if isinstance(values, str) and len(values) > LONGEST:
        raise _Wrong(f"{where} is a text of {len(values):,} characters")
    if isinstance(values, list | dict) and len(values) > MOST_ROWS:
        raise _Wrong(f"{where} has {len(values):,} entries")
    if isinstance(values, dict):
        for name, value in values.items():
            _check_tree(name, f"a name in {where}")
            _check_tree(value, name[:60])
    if isinstance(values, list):
        for value in values:
            _check_tree(value, where)


def _get(values: Any, name: str, where: str) -> Any:
    if name not in _dict(values, where):
        raise _Wrong(f"{where} has no {name}")
    return values[name]


def _dict(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Wrong(f"{where} is not names and values")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise _Wrong(f"{where} is not a list")
    return value
