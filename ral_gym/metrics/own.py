"""Columns of your own in the results table (`evaluation.metrics`).

A metric is a function ``f(generated, reference)`` that is registered in `ral_gym.registry.METRICS` or named as
``module:function``. It gives a number, or a number with the ends of its 95 % interval: ``(number, low, high)`` or an
`Estimate`. An attribute `sees` declares what it sees of both sets:

* ``"images"`` (the default): uint8 (N, C, S, S) and (M, C, S, S), decoded;
* ``"codes"``: int64 (N, T) and (M, T);
* ``"features"``: float32 (N, F) and (M, F), the extractor's.

The reference is the table's: decoded training images, or their codes. The first line of the docstring becomes part of
the table's caption.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ral_gym.errors import ConfigError
from ral_gym.metrics.intervals import Estimate
from ral_gym.metrics.table import COLUMNS
from ral_gym.registry import METRICS

SEES = ("images", "codes", "features")
TAKEN = {*COLUMNS, "fd_real", "kid_real", "kid_subset_size", "n_reference", "intervals", "updates"}
"""Keys that rows hold already."""


@dataclass(frozen=True)
class OwnMetric:
    """A column of the table.

    Attributes:
        key: its name in a row: the registered name, or the part after the colon of ``module:function``.
        sees: one of `SEES`.
        meaning: one line of text, or "".
        function: see the module's docstring.
    """

    key: str
    sees: str
    meaning: str
    function: Callable[[Tensor, Tensor], Any]

    def measure(self, generated: Tensor, reference: Tensor, seed: int) -> tuple[float, list[float] | None]:
        """The number, and the ends of its interval if it has one.

        Args:
            generated: of the samples.
            reference: of the training images.
            seed: the global generator starts from it, and is left as it was.

        Raises:
            ConfigError: the function gives no finite number, or an interval that does not contain it.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            found = self.function(generated, reference)
        if isinstance(found, Estimate):
            found = found.value, found.low, found.high
        try:
            numbers = [float(number) for number in (found if isinstance(found, tuple | list) else (found,))]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) not in (1, 3) or not all(map(math.isfinite, numbers)):
            raise ConfigError(f"metric {self.key} gives {found!r}: give a finite number, or (number, low, high)")
        value, *ends = numbers
        if ends and not ends[0] <= value <= ends[1]:
            raise ConfigError(f"metric {self.key} gives {value:g} outside its interval {ends[0]:g} to {ends[1]:g}")
        return value, ends or None


def own_metrics(names: Iterable[str]) -> list[OwnMetric]:
    """The metrics of these names.

    Args:
        names: registered ones, or ``module:function``; a class is called without arguments and gives the function.

    Raises:
        ConfigError: an unknown name, something that is not a function, a column that exists already, or an unknown
            `sees`.
    """
    metrics: list[OwnMetric] = []
    for name in names:
        part = METRICS.get(name)
        function = part() if isinstance(part, type) else part
        key, sees = name.rpartition(":")[2].rpartition(".")[2], getattr(function, "sees", "images")
        if not callable(function):
            raise ConfigError(f"metric {name} is not a function: give f(generated, reference)")
        if key in TAKEN or any(metric.key == key for metric in metrics):
            raise ConfigError(f"metric {name}: the table has a column {key} already; choose another name")
        if sees not in SEES:
            raise ConfigError(f"metric {name} wants to see {sees!r}: give one of {', '.join(SEES)}")
        words = (inspect.getdoc(part) or "").strip().splitlines()
        metrics.append(OwnMetric(key, sees, words[0].rstrip(".") if words else "", function))
    return metrics


def measure_own(
    metrics: Iterable[OwnMetric], generated: Mapping[str, Tensor], reference: Mapping[str, Tensor], seed: int
) -> dict[str, Any]:
    """A part of a row: the numbers by key, and `intervals`; `generated` and `reference` have every one of `SEES`."""
    row: dict[str, Any] = {"intervals": {}}
    for metric in metrics:
        row[metric.key], ends = metric.measure(generated[metric.sees], reference[metric.sees], seed)
        if ends is not None:
            row["intervals"][metric.key] = ends
    return row
