"""Classes of images: their names, how many images each has, and a split that has all of them on both sides."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ral_gym.errors import ConfigError, DataError, printable
from ral_gym.runs.foreign import read_bytes

MOST_BYTES = 2**20
"""Largest file with class names."""
SHOWN = 12
"""Most classes that are listed with their counts."""


def held_out_rows(labels: np.ndarray, n_test: int, seed: int) -> np.ndarray:
    """Which images of a set with classes are held out: from each class its share, at random.

    Args:
        labels: (N,) int64, from 0.
        n_test: how many images are held out in all.
        seed: seeds the choice.

    Returns:
        (N,) bool with `n_test` true entries or, where small classes leave no choice, a few more or less: a class of
        two images or more has at least one on both sides.
    """
    order = nested_order(labels, seed)  # (N,)
    held_out = np.zeros(len(labels), bool)
    held_out[order[:n_test]] = True
    counts = np.bincount(labels)
    inside = np.bincount(labels[held_out], minlength=len(counts))
    for number in np.flatnonzero((counts > 1) & ((inside == 0) | (inside == counts))):
        of_class = order[labels[order] == number]
        held_out[of_class] = False
        held_out[of_class[: max(1, min(inside[number], counts[number] - 1))]] = True
    return held_out


def nested_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """A seeded order of images (N,) of which any beginning has each class's share, as nearly as whole images allow."""
    shuffled = np.random.default_rng([seed, 1]).permutation(len(labels))
    counts = np.bincount(labels)
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)  # within the class
    share = np.empty(len(labels))
    share[by_class] = (rank + 0.5) / np.repeat(counts, counts)
    return shuffled[np.argsort(share[shuffled], kind="stable")]


def matched(labels: np.ndarray, names: Sequence[str], wanted: Sequence[str], where: str) -> np.ndarray:
    """The labels of held-out images in the numbers of the training images' classes.

    Args:
        labels: (M,) int64, classes of the held-out images.
        names: their names; empty: only numbers are known.
        wanted: the names of the training images' classes.
        where: the held-out source, for messages.

    Raises:
        DataError: a class that the training images do not have.
    """
    if not names or not wanted:
        return labels
    numbers = {name: number for number, name in enumerate(wanted)}
    if unknown := [name for name in names if name not in numbers]:
        raise DataError(
            f"data.test {where} has a class {printable(unknown[0])!r} that the training images do not have: its "
            f"classes must be {listed(wanted)}"
        )
    return np.array([numbers[name] for name in names])[labels]


def check_classes(train: np.ndarray, test: np.ndarray, names: Sequence[str]) -> tuple[str, ...]:
    """The names of all classes, by their numbers where there are none.

    Raises:
        DataError: a class without an image on one side of the split.
    """
    count = max(len(names), 1 + max(int(part.max(initial=0)) for part in (train, test)))
    names = tuple(names) or tuple(map(str, range(count)))
    for part, what in ((train, "training"), (test, "held-out")):
        if len(part):
            missing = np.flatnonzero(np.bincount(part, minlength=count)[:count] == 0)
            if len(missing):
                raise DataError(
                    f"class {printable(names[missing[0]])!r} has no {what} image: give each class two images or more "
                    "(a larger data.limit, or data.test), or turn labels off with --data.labels none"
                )
    return names


def listed(names: Sequence[str]) -> str:
    """The first names of classes, and how many there are."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(map(printable, names[:SHOWN])) + more


def described(labels: np.ndarray, names: Sequence[str]) -> str:
    """The classes and how many of the images (N,) each has: "10 classes: cat (4,000), dog (3,990), ..."."""
    counts = np.bincount(labels, minlength=len(names))
    said = [f"{printable(name)} ({count:,})" for name, count in zip(names[:SHOWN], counts, strict=False)]
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return f"{len(names):,} classes: {', '.join(said)}{more}"


def read_class_names(file: str | Path, count: int) -> tuple[str, ...]:
    """The names of classes 0, 1, .. from a file: of an alias list such as "tench, Tinca tinca" the first.

    Args:
        file: one name a line; or JSON, a list of names or an object number -> name; or such a dict as a Python literal,
            as lists of ImageNet's classes are published. It is never run.
        count: how many classes there are.

    Raises:
        ConfigError: the file cannot be read, is too large, or names another number of classes.
    """
    path = Path(file)
    try:
        names = _names_in(read_bytes(path, MOST_BYTES, "give a list of names").decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} cannot be read ({reason}): give a file with the names of the classes") from error
    if names is None:
        raise ConfigError(f"{path} is no list of class names: give one name a line, or a JSON list, or number: name")
    if len(names) != count:
        raise ConfigError(f"{path} names {len(names):,} classes, but there are {count:,}: give one name for each")
    return tuple(names)


def _names_in(text: str) -> list[str] | None:
    """The names in a file's text, or None."""
    found: Any = None
    if text.lstrip()[:1] in ("{", "["):
        for read in (json.loads, ast.literal_eval):
            try:
                found = read(text)
                break
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
        if isinstance(found, dict):
            try:
                by_number = {int(number): name for number, name in found.items()}
            except (TypeError, ValueError):
                return None
            found = [by_number.get(number) for number in range(len(by_number))]
    else:
        found = [line for line in text.splitlines() if line.strip()]
    if not isinstance(found, list) or not all(isinstance(name, str) and name.strip() for name in found):
        return None
    return [printable(name.partition(",")[0].strip()) for name in found]
