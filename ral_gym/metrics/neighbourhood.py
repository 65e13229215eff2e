"""Precision, recall, density and coverage: is each sample like the data, and is all of the data there?

One distance such as FD cannot tell blurred images from a few perfect ones; these can. Around every point of a set lies
the ball that reaches its k-th nearest neighbour in the same set; together the balls approximate the set's support.

* precision: the share of samples inside any ball of the reference; recall: the share of the reference inside any ball
  of the samples (Kynkaanniemi et al., 2019, Eq. 1 and 2);
* density: how many of the reference's balls a sample lies in, over k; coverage: the share of the reference's balls with
  a sample inside (Naeem et al., 2020, Eq. 4 and 5). A lone outlier of the reference, whose ball is huge, raises
  precision but hardly density; density can exceed 1.

torchmetrics has none of the four, and the authors' `prdc` holds three full distance matrices; this one goes chunk by
chunk, and agrees with it. All four depend on both set sizes and on the extractor: compare equal ones only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypedDict

import torch
from torch import Tensor

from ral_gym.errors import ConfigError, DivergedError
from ral_gym.metrics.intervals import REPETITIONS, Estimate, subsampled

SCORES = ("precision", "recall", "density", "coverage")


class NeighbourhoodScores(TypedDict):
    """The four metrics with the facts needed to interpret them."""

    precision: float
    recall: float
    density: float
    coverage: float
    n: int
    n_reference: int
    k: int
    extractor: str


class Neighbourhood:
    """Precision, recall, density and coverage of sets of features, against one reference set.

    Args:
        reference: features (M, F) of real images, M > k.
        extractor: its name, which goes into every result.
        k: which neighbour a ball reaches; 3 in Kynkaanniemi et al., 5 in Naeem et al.
        chunk: rows of the distance matrix held at a time.

    Raises:
        ConfigError: too few images for k, or k < 1.
        DivergedError: a feature is NaN or infinite.
    """

    def __init__(self, reference: Tensor, *, extractor: str, k: int = 5, chunk: int = 1024) -> None:
        self.extractor, self.k, self.chunk = extractor, k, chunk
        self.reference = self._checked(reference)  # (M, F)
        self._radii = self._squared_radii(self.reference)  # (M,)

    def measure(self, features: Tensor) -> NeighbourhoodScores:
        """The four metrics of features (N, F), N > k.

        Raises:
            ConfigError: too few images for k.
            DivergedError: a feature is NaN or infinite.
        """
        features = self._checked(features)  # (N, F)
        precision, recall, density, coverage = self._scores(features).tolist()
        return NeighbourhoodScores(
            precision=precision,
            recall=recall,
            density=density,
            coverage=coverage,
            n=len(features),
            n_reference=len(self.reference),
            k=self.k,
            extractor=self.extractor,
        )

    def estimates(self, features: Tensor, *, repetitions: int = REPETITIONS, seed: int = 0) -> dict[str, Estimate]:
        """The four metrics of features (N, F), N > 2 k + 1, with intervals; the reference is treated as fixed.

        The intervals are those of `subsampled`. A half of the samples takes about half the time of all, so this
        costs some 20 times as much as `measure`.

        Args:
            features: of the samples.
            repetitions: halves to draw.
            seed: seeds them.

        Raises:
            ConfigError: too few images for k.
            DivergedError: a feature is NaN or infinite.
        """
        features = self._checked(features)  # (N, F)
        n = len(features)
        self._checked(features[: n // 2])
        values = self._scores(features).tolist()
        errors = subsampled(lambda rows: self._scores(features[rows]), n, repetitions=repetitions, seed=seed).tolist()
        common: dict[str, Any] = {
            "n": n,
            "method": f"{repetitions} halves without replacement, k = {self.k}",
            "degrees": repetitions - 1,
            "extractor": self.extractor,
        }
        return {
            name: Estimate.around(value, error, bounds=(0.0, float("inf") if name == "density" else 1.0), **common)
            for name, value, error in zip(SCORES, values, errors, strict=True)
        }

    def _scores(self, features: Tensor) -> Tensor:
        """Features (N, F) -> (4,) in the order of `SCORES`."""
        radii = self._squared_radii(features)  # (N,)
        balls = torch.zeros(len(features), dtype=torch.int64)  # (N,) balls of the reference that a sample lies in
        recalled = covered = 0
        for rows, squared in self._squared_distances(self.reference, features):
            inside = squared <= self._radii[rows, None]  # (chunk, N)
            balls += inside.sum(0)
            covered += int(inside.any(1).sum())
            recalled += int((squared <= radii).any(1).sum())
        counts = torch.tensor([recalled, covered]).double() / len(self.reference)
        precision, density = (balls > 0).double().mean(), balls.double().mean() / self.k
        return torch.stack([precision, counts[0], density, counts[1]])

    def _squared_radii(self, points: Tensor) -> Tensor:
        """Squared distance of each point (N, F) from its k-th nearest neighbour, itself not counted: (N,)."""
        radii = []
        for rows, squared in self._squared_distances(points, points):
            own = torch.arange(rows.start, rows.start + len(squared))
            squared[torch.arange(len(squared)), own] = float("inf")
            radii.append(squared.topk(self.k, largest=False).values[:, -1])
        return torch.cat(radii)

    def _squared_distances(self, a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows of a, and their squared distances (chunk, N) from all of b."""
        # Shifting both changes no distance, but the products lose fewer digits near zero.
        centre = a.mean(0)  # (F,)
        a, b = a - centre, b - centre
        lengths = b.square().sum(1)  # (N,)
        for start in range(0, len(a), self.chunk):
            rows = a[start : start + self.chunk]  # (chunk, F)
            squared = rows.square().sum(1, keepdim=True) + lengths - 2 * rows @ b.T
            yield slice(start, start + self.chunk), squared

    def _checked(self, features: Tensor) -> Tensor:
        """Features as float64 on the CPU; raises if the metrics would be meaningless."""
        if self.k < 1 or len(features) <= self.k:
            raise ConfigError(
                f"{len(features)} images are too few for k = {self.k}: give k >= 1 and more than k images"
            )
        if not features.isfinite().all():
            raise DivergedError(
                f"the features of extractor {self.extractor} are NaN or infinite: its weights are damaged"
            )
        return features.detach().double().cpu()
