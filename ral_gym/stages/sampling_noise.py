"""Evaluation noise: how far a row's FD moves when only the random numbers of its samples change.

A row's interval is over halves of one set of samples, and all rows draw from the same uniforms; neither shows what
other uniforms would have given. With `evaluation.sampling_seeds` above 1, every generated row's FD is measured again on
samples from other seeds: each draws, decodes and extracts features as often as the first, and leaves the row's other
metrics alone. That says nothing about another training run: only other seeds of the run do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

STEP = 1_000_000_000
"""Between sampling seeds: more than the seeds of any two runs differ by (`seed` is at most 4,000,000)."""
AGAIN = "fd_sampling_"
"""Begins the names of the FDs of the other seeds: `fd_sampling_2`, `fd_sampling_3`, .."""
SPREAD = "fd_spread"


def sampling_noise(fd: float, seed: int, count: int, measure: Callable[[int], float]) -> dict[str, float]:
    """FD of samples from other seeds, and how far all of them lie apart.

    Args:
        fd: of the samples from `seed`.
        seed: the row's own.
        count: how many seeds there are, with the row's own.
        measure: seed -> FD of equally many samples from it.

    Returns:
        `fd_sampling_2` to `fd_sampling_COUNT`, and `fd_spread`, the largest FD minus the smallest; empty for one seed.
    """
    again = {f"{AGAIN}{number}": measure(seed + (number - 1) * STEP) for number in range(2, count + 1)}
    every = [fd, *again.values()]
    return again | {SPREAD: max(every) - min(every)} if again else {}


def has_sampling_seeds(row: Mapping[str, Any], count: int) -> bool:
    """Whether a generated row was measured on samples from this many seeds."""
    return sum(name.startswith(AGAIN) for name in row) == count - 1


def noise_of(metric: str) -> bool:
    """Whether a metric is one of `sampling_noise`, whose interval is that of the row's FD."""
    return metric == SPREAD or metric.startswith(AGAIN)
