"""Are samples copies of training images? Their distance to the nearest one, against that of held-out images.

A generator that has memorised a small set has good FD, precision and recall: the reference *is* what it copies. What
gives it away is that its samples lie nearer to the training images than new images of the same kind do. So the distance
of every sample to its nearest training point is compared with that of held-out images (the three-sample test of Meehan,
Chaudhuri and Dasgupta, "A Non-Parametric Test to Detect Data-Copying in Generative Models", AISTATS 2020):

* `score`: how often a sample is nearer than a held-out image, over all pairs; 0.5 where they are alike, 1 where every
  sample is a copy, below 0.5 where samples are further off than new images. It is the Mann-Whitney statistic of that
  test; their C_T is made of its z-score, which grows with the number of samples: tables could not be compared by it.
* `near`: the share of samples as near as the nearest 5 % of held-out images are; 0.05 where they are alike. It detects
  a few copies among many poor samples, which the score misses (Bhattacharjee et al., ICML 2023).

Unlike the paper, space is not cut into cells: with tens of held-out images a cell would hold none. The score compares
distances of whole sets, and a generator may hide copies of some images behind poor samples of others; `near` shows
that. Both only compare images that have been through the same decoder: see `ral_gym.stages.generator_metrics`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ral_gym.errors import ConfigError, DivergedError
from ral_gym.metrics.auc import auc
from ral_gym.metrics.intervals import Estimate
from ral_gym.metrics.neighbours import nearest

NEAREST_SHARE = 0.05
"""`near` compares with this share of the held-out images, those nearest to a training image."""
REPETITIONS = 100


class Memorisation:
    """How near samples are to a training set, compared with held-out images.

    Args:
        train: features (M, F) of training images; where there are too many, of a random part of them: held-out images
            and samples are then measured against the same part.
        held_out: features (V, P, F) of V >= 1 held-out images, P versions of each (augmented as the training images
            are). Versions of one image are not independent measurements: only V counts for the intervals.
        extractor: its name, which goes into every result.
        seed: seeds the halves of the intervals.

    Raises:
        ConfigError: no training or no held-out images.
        DivergedError: a feature is NaN or infinite.
    """

    def __init__(self, train: Tensor, held_out: Tensor, *, extractor: str, seed: int = 0) -> None:
        if not len(train) or not held_out.shape[0] * held_out.shape[1]:
            raise ConfigError(
                f"{len(train)} training and {held_out.shape[0]} held-out images: memorising is measured with one or "
                "more of each"
            )
        self.train, self.extractor, self.seed = train, extractor, seed
        self._check(train)
        self.held_out = self.distances(held_out.flatten(0, 1)).view(held_out.shape[:2])  # (V, P)

    def distances(self, features: Tensor) -> Tensor:
        """Distance (N,) of each sample's features (N, F) to its nearest training image's.

        Raises:
            DivergedError: a feature is NaN or infinite.
        """
        self._check(features)
        return nearest(features, self.train)[1].double()

    def measure(self, features: Tensor) -> dict[str, float]:
        """`score` and `near` of samples' features (N, F), N >= 1.

        Raises:
            DivergedError: a feature is NaN or infinite.
        """
        return dict(zip(("score", "near"), _scores(self.distances(features), self.held_out).tolist(), strict=True))

    def estimates(self, features: Tensor) -> dict[str, Estimate]:
        """The same with intervals, of samples' features (N, F), N >= 4, and V >= 4 held-out images.

        From random halves of the samples and of the held-out images, both drawn without replacement: the training
        images are treated as fixed, the held-out images as a sample.

        Raises:
            ConfigError: too few samples or held-out images.
            DivergedError: a feature is NaN or infinite.
        """
        if not self.has_intervals(len(features)):
            raise ConfigError(
                f"{len(features)} samples and {len(self.held_out)} held-out images are too few for an interval: "
                "at least 4 of each are needed"
            )
        samples, generator = self.distances(features), torch.Generator().manual_seed(self.seed)

        def half(values: Tensor) -> Tensor:
            return values[torch.randperm(len(values), generator=generator)[: len(values) // 2]]

        values = torch.stack([_scores(half(samples), half(self.held_out)) for _ in range(REPETITIONS)])  # (R, 2)
        errors = values.std(0).tolist()
        method = f"{REPETITIONS} halves of samples and of {len(self.held_out)} held-out images, without replacement"
        return {
            name: Estimate.around(
                value,
                error,
                len(features),
                method,
                degrees=len(self.held_out) - 1,
                bounds=(0.0, 1.0),
                extractor=self.extractor,
            )
            for name, value, error in zip(
                ("score", "near"), _scores(samples, self.held_out).tolist(), errors, strict=True
            )
        }

    def has_intervals(self, n: int) -> bool:
        """Whether n samples, and the held-out images, are enough for intervals."""
        return min(n, len(self.held_out)) >= 4

    def _check(self, features: Tensor) -> None:
        if not features.isfinite().all():
            raise DivergedError(
                f"the features of extractor {self.extractor} are NaN or infinite: its weights are damaged"
            )


def _scores(samples: Tensor, held_out: Tensor) -> Tensor:
    """Distances of samples (N,) and of held-out images (V, P) -> (2,): score and near."""
    near = torch.quantile(held_out.flatten(), NEAREST_SHARE)
    # auc(a, b) is the share of pairs with a > b.
    return torch.tensor([auc(held_out, samples), float((samples <= near).double().mean())], dtype=torch.float64)
