"""How different are a generator's samples from each other?

A generator that has collapsed draws few codes, few grids, or grids that differ in few places. `usage` and `perplexity`
of `ral_gym.metrics.codes` say how much of the codebook a set uses as a whole; these say how varied its members are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ral_gym.errors import ConfigError
from ral_gym.metrics.codes import Codes, _tensor, code_counts
from ral_gym.metrics.intervals import Estimate, mean_estimate
from ral_gym.metrics.neighbours import Points, _rows


def distinct_grids(codes: Codes) -> int:
    """How many of the grids (N, T) are different from each other: N where none occurs twice."""
    return len(torch.unique(_tensor(codes), dim=0))


def distinct_codes(codes: Codes) -> Estimate:
    """How many different codes a grid is made of, on average: in [1, T].

    Args:
        codes: (N, T), N >= 2.
    """
    ordered = _tensor(codes).long().sort(1).values  # (N, T)
    return mean_estimate((ordered.diff(dim=1) != 0).sum(1) + 1, method="mean over independent grids")


def hamming_distance(codes: Codes) -> Estimate:
    """Share of positions at which two different grids of the set have different codes, averaged over all pairs.

    Counted per position, O(N T) instead of O(N^2 T): a grid agrees at t with all others that have the same code there.

    Args:
        codes: (N, T) of any integer type, N >= 2.

    Returns:
        In [0, 1]; 1 - 1/K for uniform codes.

    Raises:
        ConfigError: fewer than two grids.
    """
    grids = _tensor(codes).long().cpu()  # (N, T)
    n, length = grids.shape
    if n < 2:
        raise ConfigError(f"{n} grids have no distance: give at least two")
    # Position t's codes get numbers of their own, so that one count serves all positions.
    size = int(grids.max()) + 1
    numbered = grids + size * torch.arange(length)  # (N, T)
    counts = code_counts(numbered, size * length)  # (T * K,)
    others = counts[numbered] - 1  # (N, T) other grids with the same code there
    return _pairwise(1 - others.double().mean(1) / (n - 1), bounds=(0.0, 1.0))


def pairwise_distance(points: Points, *, chunk: int = 1024, extractor: str = "") -> Estimate:
    """Mean Euclidean distance between two different points of a set, over all pairs.

    Args:
        points: images (N, C, S, S) or features (N, F), N >= 2.
        chunk: points compared with all others at a time.
        extractor: of the features.

    Raises:
        ConfigError: fewer than two points.
    """
    rows = _rows(points)  # (N, D)
    n = len(rows)
    if n < 2:
        raise ConfigError(f"{n} points have no distance: give at least two")
    # Exact differences: the distance of a point from itself must be 0.
    sums = [
        torch.cdist(part, rows, compute_mode="donot_use_mm_for_euclid_dist").double().sum(1)
        for part in rows.split(chunk)
    ]
    return _pairwise(torch.cat(sums) / (n - 1), bounds=(0.0, float("inf")), extractor=extractor)


def _pairwise(means: Tensor, bounds: tuple[float, float], extractor: str = "") -> Estimate:
    """Mean over all pairs from each member's mean (N,) over the others.

    Each pair is in two of the means, so that they spread half as much as what a member adds (Hoeffding, 1948).
    """
    n = len(means)
    error = 2 * float(means.std()) / n**0.5
    return Estimate.around(
        float(means.mean()), error, n, "all pairs", degrees=n - 1, bounds=bounds, extractor=extractor
    )
