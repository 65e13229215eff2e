"""How different are a generator's samples from each other?

A generator that has collapsed draws few codes, or grids that differ in few places. `usage` and `perplexity` of
`ral_gym.metrics.codes` say how much of the codebook a set uses as a whole; this says how varied its members are.
"""

from __future__ import annotations

import torch

from ral_gym.errors import ConfigError
from ral_gym.metrics.codes import Codes, _tensor, code_counts
from ral_gym.metrics.intervals import Estimate


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
    # Codes are numbered differently at every position, so that one count serves all positions.
    size = int(grids.max()) + 1
    numbered = grids + size * torch.arange(length)  # (N, T)
    counts = code_counts(numbered, size * length)  # (T * K,)
    others = counts[numbered] - 1  # (N, T) other grids with the same code there
    means = 1 - others.double().mean(1) / (n - 1)  # (N,) from all others
    # Each pair is in two of the means, so that they spread half as much as what a grid adds (Hoeffding, 1948).
    error = 2 * float(means.std()) / n**0.5
    return Estimate.around(float(means.mean()), error, n, "all pairs", degrees=n - 1, bounds=(0.0, 1.0))
