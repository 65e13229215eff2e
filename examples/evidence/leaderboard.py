"""The leaderboard: what a file of it holds, how it is checked, and the page that is made of all files.

A file is one recipe on one data set, every seed with its control: distances are to a run's own decoded images, so that
an FD by itself compares with no other tokenizer's, but its difference from a control of the same run does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ral_gym.errors import RunError
from ral_gym.metrics.seeds import SeedDifference
from ral_gym.runs.foreign import is_number
from ral_gym.runs.storage import load_json, save_json

TEXTS = {
    "recipe": "the preset, or what the settings are called",
    "algorithm": "algorithm and rewards",
    "data": "the data set",
    "control": "the row that the differences are from",
    "extractor": "the features of FD",
    "command": "what repeats it",
    "hardware": "what it ran on",
    "version": "of ral_gym",
    "who": "who measured it",
    "note": "what else a reader should know; may be empty",
}
"""Fields of a file that are text."""
FIGURES = ("fd", "control_fd", "best_fd", "control_best_fd", "best_temperature", "recall", "nll_test", "seconds")
"""Figures of a seed; all but the first two may be null."""
OPTIONAL = ("fd_spread",)
"""Figures that a seed may lack: the spread over sampling seeds (`evaluation.sampling_seeds`)."""
KEPT_AS_MEANS = ("recall", "nll_test", "seconds")
LONGEST, LONGEST_COMMAND, MOST_SEEDS = 300, 2000, 100
_UNSAFE = re.compile(r"[\x00-\x1f\x7f|<>`\[\]\\]")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,60}")


@dataclass(frozen=True)
class Entry:
    """A file of the leaderboard.

    Attributes:
        recipe, algorithm, data, control, extractor, command, hardware, version, who, note: see `TEXTS`.
        n_samples: samples per row.
        seeds: a dict per seed: `seed`, `FIGURES` and, where measured, `OPTIONAL`.
        means: of `KEPT_AS_MEANS` over the seeds, where the seeds' own figures were not kept.
    """

    recipe: str
    algorithm: str
    data: str
    control: str
    extractor: str
    command: str
    hardware: str
    version: str
    who: str
    note: str
    n_samples: int
    seeds: Sequence[Mapping[str, Any]]
    means: Mapping[str, float]

    def difference(self, metric: str) -> SeedDifference | None:
        """A metric (`fd`, `best_fd`) minus the control's; None where a seed lacks it."""
        pairs = {one["seed"]: (one[f"control_{metric}"], one[metric]) for one in self.seeds}
        if any(value is None for pair in pairs.values() for value in pair):
            return None
        before, after = ({seed: pair[side] for seed, pair in pairs.items()} for side in (0, 1))
        return SeedDifference.of(before, after)


def load_entry(path: Path) -> Entry:
    """A file of the leaderboard.

    Raises:
        RunError: it cannot be read, or what is wrong with which field.
    """
    if not _NAME.fullmatch(path.stem) or path.suffix != ".json":
        raise RunError(
            f"{path.name} cannot be a leaderboard file: call it by small letters, digits, - and _, and .json"
        )
    try:
        return _entry(load_json(path))
    except _Wrong as error:
        raise RunError(f"{path}: {error}; see CONTRIBUTING.md, Adding your results") from error


def load_entries(folder: Path) -> dict[str, Entry]:
    """Every file of the folder, by name without its ending.

    Raises:
        RunError: as `load_entry`; or the folder has none.
    """
    found = {path.stem: load_entry(path) for path in sorted(folder.glob("*.json"))}
    if not found:
        raise RunError(f"{folder} has no leaderboard files: give the folder docs/leaderboard")
    return found


def save_entry(path: Path, entry: Entry) -> None:
    """Write a file, once it is as `load_entry` wants it.

    Raises:
        RunError: a field is wrong, or the file cannot be written.
    """
    values = asdict(entry) | {"seeds": [dict(one) for one in entry.seeds], "means": dict(entry.means)}
    try:
        _entry(values)
    except _Wrong as error:
        raise RunError(f"{path.name} would be refused: {error}") from error
    save_json(path, values)


class _Wrong(Exception):
    """What is wrong with a file."""


def _entry(values: Any) -> Entry:
    """The entry, checked."""
    names = {*TEXTS, "n_samples", "seeds", "means"}
    if not isinstance(values, dict):
        raise _Wrong("it holds no names and values")
    for wrong, what in ((names - values.keys(), "is missing"), (values.keys() - names, "is unknown")):
        if wrong:
            raise _Wrong(f"{min(wrong)} {what}")
    for name in TEXTS:
        _check_text(name, values[name])
    if not isinstance(values["n_samples"], int) or isinstance(values["n_samples"], bool) or values["n_samples"] < 12:
        raise _Wrong(f"n_samples is {values['n_samples']!r}: give an integer of 12 or more")
    seeds = values["seeds"]
    if not isinstance(seeds, list) or not 1 <= len(seeds) <= MOST_SEEDS:
        raise _Wrong(f"seeds must be a list of 1 to {MOST_SEEDS}")
    for number, one in enumerate(seeds):
        _check_seed(f"seeds[{number}]", one)
    if len({one["seed"] for one in seeds}) < len(seeds):
        raise _Wrong("a seed appears twice")
    _check_means(values["means"], seeds)
    return Entry(**values)


def _check_text(name: str, value: Any) -> None:
    most = LONGEST_COMMAND if name == "command" else LONGEST
    if not isinstance(value, str) or len(value) > most or (not value.strip() and name != "note"):
        raise _Wrong(f"{name} must be text of 1 to {most} characters ({TEXTS[name]})")
    if found := _UNSAFE.search(value):
        raise _Wrong(f"{name} contains {found[0]!r}, which a table cannot show: leave it out")


def _check_seed(where: str, one: Any) -> None:
    if not isinstance(one, dict):
        raise _Wrong(f"{where} holds no names and values")
    needed, known = {"seed", *FIGURES}, {"seed", *FIGURES, *OPTIONAL}
    if missing := needed - one.keys():
        raise _Wrong(f"{where}.{min(missing)} is missing: give null if it was not measured")
    if unknown := one.keys() - known:
        raise _Wrong(f"{where}.{min(unknown)} is unknown")
    if not isinstance(one["seed"], int) or isinstance(one["seed"], bool) or one["seed"] < 0:
        raise _Wrong(f"{where}.seed is {one['seed']!r}: give an integer of 0 or more")
    for name in (*FIGURES, *OPTIONAL):
        if one.get(name) is not None or name in FIGURES[:2]:
            _check_number(f"{where}.{name}", one.get(name))
    if one["recall"] is not None and one["recall"] > 1:
        raise _Wrong(f"{where}.recall is {one['recall']}: give 0 to 1")
    for name in ("", "control_"):
        best = one[f"{name}best_fd"]
        if best is not None and best > one[f"{name}fd"]:
            raise _Wrong(f"{where}.{name}best_fd is {best}, above {name}fd: 1 is among the temperatures of the best")


def _check_number(where: str, value: Any) -> None:
    if not is_number(value) or not math.isfinite(value) or value < 0:
        raise _Wrong(f"{where} is {value!r}: give a number of 0 or more")


def _check_means(means: Any, seeds: Sequence[Mapping[str, Any]]) -> None:
    if not isinstance(means, dict):
        raise _Wrong("means holds no names and values: give {} if there are none")
    for name, value in means.items():
        if name not in KEPT_AS_MEANS:
            raise _Wrong(f"means.{name} is unknown: give some of {', '.join(KEPT_AS_MEANS)}")
        _check_number(f"means.{name}", value)
        if any(one[name] is not None for one in seeds):
            raise _Wrong(f"means.{name} is given, but seeds have their own: leave it out")


# The page -----------------------------------------------------------------------------------------------------------

HEAD = """# Leaderboard

<!-- Made by `python examples/make_leaderboard.py` from the files in docs/leaderboard: change those. -->

Finished runs, from the files in `docs/leaderboard`;
[add yours by a pull request](../CONTRIBUTING.md#adding-your-results).

* An FD alone compares with no other tokenizer's: it is to the run's own decoded training codes. So every line has its
  control, more likelihood training of the same prior, and recipes are ordered by the mean of FD minus the control's at
  T = 1, paired by seed.
* Bold: the interval over seeds (95 %, Student's t) excludes 0. One seed has no interval.
* Best: the least FD of a temperature sweep. Recall and NLL (held-out images, nats per code) are at T = 1. *mean*: over
  the seeds, whose own figures were not kept. Seconds: of stage 3.
* Samples from other random numbers move an FD of 2,000 by up to 2. *spread*: by how much here
  (`--evaluation.sampling-seeds 2`).
"""
HEADINGS = (
    *("recipe", "seed", "FD, T = 1", "control's", "best FD", "at T", "control's best"),
    *("recall", "NLL", "seconds", "hardware"),
)


def page(entries: Mapping[str, Entry]) -> str:
    """The whole page as Markdown."""
    groups: dict[tuple[str, str, int], list[Entry]] = {}
    for entry in entries.values():
        groups.setdefault((entry.data, entry.extractor, entry.n_samples), []).append(entry)
    parts = [HEAD]
    for (data, extractor, n), found in sorted(groups.items(), key=lambda group: (-_seeds(group[1]), group[0])):
        ordered = sorted(found, key=_order)
        rows = [row for entry in ordered for row in _rows(entry)]
        lines = ["| " + " | ".join(cells) + " |" for cells in (HEADINGS, *rows)]
        lines.insert(1, "|---|" + "---:|" * (len(HEADINGS) - 2) + "---|")
        parts.append(f"## {data}; {extractor} features, {n:,} samples\n\n" + "\n".join(lines) + "\n")
        parts.append("".join(f"* {_words(entry)}\n" for entry in ordered))
    return "\n".join(parts)


def _seeds(entries: Sequence[Entry]) -> int:
    """The most seeds of an entry: what has more of them comes first."""
    return max(len(entry.seeds) for entry in entries)


def _order(entry: Entry) -> tuple[float, str]:
    found = entry.difference("fd")
    return (math.inf if found is None else found.value, entry.recipe)


def _rows(entry: Entry) -> list[list[str]]:
    """A line per seed, and one of means where figures were kept as means only."""
    rows = []
    for one in entry.seeds:
        spread = one.get("fd_spread")
        fd = _number(one["fd"], 1) + ("" if spread is None else f" (spread {spread:.1f})")
        cells = [_number(one["control_fd"], 1), _number(one["best_fd"], 1), _number(one["best_temperature"], 2)]
        cells += [_number(one["control_best_fd"], 1), _number(one["recall"], 3), _number(one["nll_test"], 3)]
        rows.append([entry.recipe, str(one["seed"]), fd, *cells, _number(one["seconds"], 0), entry.hardware])
    if entry.means:
        digits = {"recall": 3, "nll_test": 3, "seconds": 0}
        last = [_number(entry.means.get(name), places) for name, places in digits.items()]
        rows.append([entry.recipe, "mean", *["-"] * 5, *last, entry.hardware])
    return rows


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _words(entry: Entry) -> str:
    """What the entry is, and what its seeds say."""
    said = []
    for metric, when in (("fd", "at T = 1"), ("best_fd", "each at its best temperature")):
        found = entry.difference(metric)
        if found is not None:
            mean = f"mean {found.markdown(found.ends())}, {found.verdict()}" if found.n > 1 else "one seed"
            said.append(f"{when} {found.each()} ({mean})")
    against = f"FD minus that of `{entry.control}`: {', '.join(said)}."
    note = f" {entry.note.rstrip('.')}." if entry.note else ""
    whose = f"version {entry.version}, by {entry.who}"
    return f"{entry.recipe} ({entry.algorithm}). {against}{note} `{entry.command}`, {whose}."
