"""Differences between two rows over several seeds, and the one rule of what may be said of them.

Runs are paired by seed: what both runs of a seed share (images, splits, the prior that they began from) cancels. The
interval is Student's t over the differences (`ral_gym.metrics.intervals`). **Beyond** means that this interval excludes
0, and nothing else: a difference that has the same sign on every seed may still have an interval that includes 0, and
with three seeds it often has. One seed has no interval, so that nothing is beyond it. Only what is beyond is set in
bold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ral_gym.errors import ConfigError
from ral_gym.metrics.intervals import Estimate, paired_estimate

ON_EVERY_SEED = "on every seed, but the interval includes 0"


@dataclass(frozen=True)
class SeedDifference:
    """How far one row's metric lies above another's, seed by seed.

    Attributes:
        by_seed: seed -> difference; at least one.
        interval: mean of the differences with its 95 % interval by Student's t over the seeds; None of a single seed.

    Examples:
        >>> found = SeedDifference.of({0: 24.0, 1: 22.0, 2: 26.0}, {0: 21.0, 1: 18.0, 2: 23.0})
        >>> found.text(), found.beyond, found.each()
        ('-3.3 ± 1.4', True, '-3.0 / -4.0 / -3.0')
        >>> SeedDifference.of({0: 24.0, 1: 22.0}, {0: 21.0, 1: 18.0}).verdict()
        'on every seed, but the interval includes 0'
    """

    by_seed: Mapping[Any, float]
    interval: Estimate | None

    @classmethod
    def of(cls, before: Mapping[Any, float], after: Mapping[Any, float]) -> SeedDifference:
        """After minus before, of the seeds that both have.

        Args:
            before: seed -> value.
            after: seed -> value.

        Raises:
            ConfigError: no seed is in both.
        """
        shared = [seed for seed in after if seed in before]
        if not shared:
            seeds = " and ".join(", ".join(map(str, values)) or "none" for values in (before, after))
            raise ConfigError(f"no seed is in both (seeds {seeds}): measure the same seeds on both sides")
        several = len(shared) > 1
        return cls(
            {seed: after[seed] - before[seed] for seed in shared},
            paired_estimate(before, after) if several else None,
        )

    @classmethod
    def from_values(cls, by_seed: Mapping[Any, float]) -> SeedDifference:
        """Of differences that are known already, seed -> difference.

        Raises:
            ConfigError: there are none.
        """
        return cls.of(dict.fromkeys(by_seed, 0.0), by_seed)

    @property
    def n(self) -> int:
        """How many seeds."""
        return len(self.by_seed)

    @property
    def value(self) -> float:
        """The mean difference."""
        return math.fsum(self.by_seed.values()) / self.n

    @property
    def half(self) -> float | None:
        """Half the width of the interval; None of a single seed."""
        return None if self.interval is None else (self.interval.high - self.interval.low) / 2

    @property
    def beyond(self) -> bool:
        """Whether the interval over seeds excludes 0; never of a single seed."""
        return self.interval is not None and (self.interval.low > 0 or self.interval.high < 0)

    @property
    def on_every_seed(self) -> bool:
        """Whether every seed's difference has the same sign, which is less than `beyond`; never of a single seed."""
        values = self.by_seed.values()
        return self.n > 1 and (all(value < 0 for value in values) or all(value > 0 for value in values))

    def verdict(self) -> str:
        """What may be said of it."""
        if self.interval is None:
            return "one seed, no interval"
        if self.beyond:
            return "beyond the interval"
        return ON_EVERY_SEED if self.on_every_seed else "the interval includes 0"

    def text(self, digits: int = 1) -> str:
        """Mean and half the interval, the mean with its sign; the mean alone of a single seed."""
        half = "" if self.half is None else f" ± {self.half:.{digits}f}"
        return f"{self.value:+.{digits}f}{half}"

    def ends(self, digits: int = 1) -> str:
        """Mean and both ends of the interval; the mean alone of a single seed."""
        shown = "" if self.interval is None else f" [{self.interval.low:+.{digits}f}, {self.interval.high:+.{digits}f}]"
        return f"{self.value:+.{digits}f}{shown}"

    def each(self, digits: int = 1) -> str:
        """Every seed's difference."""
        return " / ".join(f"{value:+.{digits}f}" for value in self.by_seed.values())

    def markdown(self, text: str | None = None) -> str:
        """`text` (None: that of `text`) for a Markdown table: in bold if, and only if, the difference is `beyond`."""
        shown = self.text() if text is None else text
        return f"**{shown}**" if self.beyond else shown
