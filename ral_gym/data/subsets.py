"""A seeded random part of a set, measured or shown where the whole set would take too long.

Sets are sorted by path, so that the first images of a folder per class are all of one class.
"""

from __future__ import annotations

import numpy as np


def subset(total: int, limit: int | None, seed: int) -> np.ndarray:
    """Rows of a seeded random subset, in ascending order.

    Args:
        total: size of the set.
        limit: how many rows to take at most; None: all.
        seed: the same one gives the same rows.

    Returns:
        (min(total, limit),) int64 without repetition: all rows, in order, if the set is not larger than `limit`.
    """
    if limit is None or total <= limit:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).choice(total, limit, replace=False, shuffle=False))
