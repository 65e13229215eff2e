"""The nearest training image of each sample: a picture of how much the generator has memorised."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Points = Tensor | np.ndarray
"""Images (N, C, S, S) or features (N, F), of any number type."""


@torch.no_grad()
def nearest(samples: Points, train: Points, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Find the nearest training point of each sample by Euclidean distance, in pixels or in features.

    Args:
        samples: (N, ...), images or features.
        train: (M, ...) of the same trailing shape; may be a memory-mapped array, it is read once, in chunks.
        chunk: training points compared at a time.

    Returns:
        Indices into `train` (N,) int64 and distances (N,) float32, on the CPU.

    Raises:
        ValueError: there are no training points, or the shapes differ.
    """
    if len(train) == 0 or samples.shape[1:] != train.shape[1:]:
        raise ValueError(f"cannot compare samples {tuple(samples.shape)} with training points {tuple(train.shape)}")
    queries = _rows(samples)  # (N, D)
    # Distances do not change when both sets are shifted, but the products below lose fewer digits near zero.
    centre = _rows(train[:chunk]).mean(0)  # (D,)
    shifted = queries - centre  # (N, D)
    best = torch.full((len(queries),), float("inf"))
    indices = torch.zeros(len(queries), dtype=torch.int64)
    for start in range(0, len(train), chunk):
        points = _rows(train[start : start + chunk]) - centre  # (M', D)
        # |a - b|^2 = |a|^2 - 2 ab + |b|^2; |a|^2 does not matter for the minimum over b.
        score, index = (points.square().sum(1) - 2 * shifted @ points.T).min(1)  # (N,)
        closer = score < best
        best = torch.where(closer, score, best)
        indices = torch.where(closer, index + start, indices)
    # Gathering one by one reads a memory-mapped set only where it has to.
    distances = [
        torch.dist(query, _rows(train[i : i + 1])[0]) for query, i in zip(queries, indices.tolist(), strict=True)
    ]
    return indices, torch.stack(distances) if distances else torch.empty(0)


def _rows(points: Points) -> Tensor:
    """Points as float32 rows (N, D) on the CPU; copied, because a memory-mapped array is read-only."""
    tensor = points if isinstance(points, Tensor) else torch.from_numpy(np.array(points))
    return tensor.float().cpu().flatten(1)
