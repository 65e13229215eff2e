"""A value with its interval: what every metric returns that is estimated from samples.

Three ways to a standard error, best first:

* `repeated`: draw the whole set again, independently, as often as the time allows. Always right.
* `mean_estimate`: if the value is a mean of independent values (seeds, images), from their spread.
* `subsampled`: when there is only one set of n. The metric is computed again on random halves of it, drawn *without*
  replacement, and the spread of those is scaled to n (the delete-d jackknife of Shao and Wu, 1989), as in
  `distance_estimates` for FD and KID.

Never a bootstrap: a resample of n holds only 63 % distinct images, and FD reads the duplicates as a lack of variety.
The sampling bias enters a second time, so that the interval may lie wholly above the value it is meant for; for
precision and recall, the nearest neighbour of a duplicate is its copy. Halves have a larger bias too, but only their
spread is used, and they all share that bias.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ral_gym.errors import ConfigError
from ral_gym.metrics.distances import KID_SUBSETS, FeatureDistance

CONFIDENCE = 0.95
REPETITIONS = 40


@dataclass(frozen=True)
class Estimate:
    """The value of a metric that was estimated from samples.

    Attributes:
        value: of the metric.
        low: lower end of its 95 % interval.
        high: upper end of it.
        n: how many samples the value was computed from.
        method: where the interval comes from, in words.
        standard_error: of the value.
        extractor: of the features, where there are any.
    """

    value: float
    low: float
    high: float
    n: int
    method: str
    standard_error: float
    extractor: str = ""

    @classmethod
    def around(
        cls,
        value: float,
        standard_error: float,
        n: int,
        method: str,
        *,
        degrees: int,
        bounds: tuple[float, float] = (-float("inf"), float("inf")),
        extractor: str = "",
    ) -> Estimate:
        """The value plus and minus Student's t times its standard error, clipped to `bounds`.

        Args:
            value: of the metric.
            standard_error: of it.
            n: sample count.
            method: in words.
            degrees: of freedom, of the standard error.
            bounds: the least and the greatest value that the metric can have.
            extractor: of the features.
        """
        half = student_t(degrees) * standard_error if standard_error else 0.0
        low, high = max(value - half, bounds[0]), min(value + half, bounds[1])
        return cls(value, low, high, n, method, standard_error, extractor)

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}] (n = {self.n:,})"


@cache
def student_t(degrees: int, confidence: float = CONFIDENCE) -> float:
    """Two-sided quantile of Student's t: |T| is below it with probability `confidence`; 4.30 for two degrees.

    T = sqrt(degrees) tan(a), where a has the density cos(a)^(degrees - 1) on (-pi/2, pi/2) up to a factor.

    Raises:
        ConfigError: degrees < 1.
    """
    if degrees < 1:
        raise ConfigError(f"an interval with {degrees} degrees of freedom: at least two values are needed")
    if degrees > 2000:
        return statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    middles = (np.arange(200_000) + 0.5) * (np.pi / 2 / 200_000)
    below = np.cos(middles) ** (degrees - 1)
    share = np.concatenate([[0.0], below.cumsum() / below.sum()])
    angle = np.interp(confidence, share, np.linspace(0, np.pi / 2, 200_001))
    return float(np.sqrt(degrees) * np.tan(angle))


def mean_estimate(
    values: Tensor | np.ndarray | Sequence[float],
    *,
    n: int | None = None,
    method: str = "mean of independent values",
    bounds: tuple[float, float] = (-float("inf"), float("inf")),
    extractor: str = "",
) -> Estimate:
    """Mean of independent values, such as one per seed, per repetition or per image, with Student's t interval.

    Args:
        values: (R,), R >= 2.
        n: sample count to report; None: R.
        method: in words.
        bounds: the least and the greatest value that the mean can have.
        extractor: of the features.

    Raises:
        ConfigError: fewer than two values.
    """
    given = torch.as_tensor(values).detach().double().cpu()  # (R,)
    count = len(given)
    if count < 2:
        raise ConfigError(f"{count} values have no interval: give at least two")
    error = float(given.std()) / count**0.5
    return Estimate.around(
        float(given.mean()),
        error,
        count if n is None else n,
        method,
        degrees=count - 1,
        bounds=bounds,
        extractor=extractor,
    )


def paired_estimate(before: Mapping[int, float], after: Mapping[int, float]) -> Estimate:
    """Mean of the differences after - before of the same seeds, with Student's t interval over seeds.

    What two runs of a seed share (images, splits, the prior that both began from) cancels in their difference, so that
    its interval is narrower than that of two independent means.

    Args:
        before: seed -> value.
        after: seed -> value; seeds that only one of both has are left out.

    Raises:
        ConfigError: fewer than two seeds are in both.
    """
    shared = sorted(before.keys() & after.keys())
    differences = np.array([after[seed] - before[seed] for seed in shared], dtype=np.float64)  # (R,)
    return mean_estimate(differences, method="paired by seed")


def repeated(
    measure: Callable[[int], Mapping[str, Any]], repetitions: int, keys: Sequence[str] = ("fd", "kid")
) -> dict[str, Estimate]:
    """Measure independent sets of the same size, and average: the best way for FD where sampling is cheap.

    The interval is that of the expected metric *at this n*: repetitions do not remove FD's bias, which depends on n.

    Args:
        measure: repetition 0, 1, .. -> metrics of a set that was drawn for it alone, as `FeatureDistance.measure` or
            `Neighbourhood.measure` give them.
        repetitions: R >= 2.
        keys: which of the metrics.

    Returns:
        One estimate per key, with the sets' `n` and `extractor`.

    Raises:
        ConfigError: fewer than two repetitions, or sets of several sizes.
    """
    results = [measure(repetition) for repetition in range(repetitions)]
    sizes = {result["n"] for result in results}
    if len(sizes) > 1:
        raise ConfigError(f"sets of {sorted(sizes)} images: FD depends on n, so draw the same number each time")
    method = f"mean of {repetitions} independent sets"
    return {
        key: mean_estimate(
            [result[key] for result in results],
            n=results[0]["n"],
            method=method,
            extractor=results[0].get("extractor", ""),
        )
        for key in keys
    }


def subsampled(
    statistic: Callable[[Tensor], Tensor], n: int, *, repetitions: int = REPETITIONS, seed: int = 0
) -> Tensor:
    """Standard errors of metrics of one set, from random halves of it drawn without replacement.

    With m of n samples the spread of the metric over subsets is sqrt((n - m) / m) times its standard error at n, which
    is 1 for halves. That holds for metrics that are smooth in the sample. Near the sampling floor the result is too
    large: against independent sets of 200 to 600 points it was 1.0 to 1.4 times the truth for FD, 0.9 to 1.3 for
    precision, recall and density, and up to 1.9 times for coverage, next to 1; larger subsets did no better.

    Args:
        statistic: indices (n // 2,) int64 of a subset -> metrics (M,).
        n: size of the set.
        repetitions: R, how many subsets.
        seed: seeds the subsets.

    Returns:
        Standard errors (M,) float64, with R - 1 degrees of freedom.
    """
    generator = torch.Generator().manual_seed(seed)
    half = n // 2
    values = torch.stack(
        [statistic(torch.randperm(n, generator=generator)[:half]).double() for _ in range(repetitions)]
    )  # (R, M)
    return values.std(0) * (half / (n - half)) ** 0.5


def distance_estimates(
    distance: FeatureDistance, features: Tensor, *, repetitions: int = REPETITIONS, seed: int = 0
) -> dict[str, Estimate]:
    """FD and KID of features from a reference, with intervals by subsampling; the reference is treated as fixed.

        The values are those of `FeatureDistance.measure`. KID's interval also holds the noise of its 100 random
        subsets.

    Args:
        distance: of the reference.
        features: (N, F), N >= 12.
        repetitions: halves to draw.
        seed: seeds them.

    Returns:
        Estimates `fd` and `kid`.

    Raises:
        ConfigError: too few images.
        DivergedError: a feature is NaN or infinite.
    """
    measured = distance.measure(features)
    n, points = len(features), features.detach().double().cpu()  # (N, F)
    if n < 12:
        raise ConfigError(f"{n} images are too few for an interval of FD: at least 12 are needed")
    frechet = _Frechet(distance.reference)
    halves = _kernel_halves(points, distance.reference, repetitions, seed)
    fd_error = float(subsampled(lambda rows: frechet(points[rows]), n, repetitions=repetitions, seed=seed))
    kid_error = (halves**2 + measured["kid_std"] ** 2 / KID_SUBSETS) ** 0.5
    common: dict[str, Any] = {
        "n": n,
        "method": f"{repetitions} halves without replacement",
        "degrees": repetitions - 1,
        "extractor": distance.extractor,
    }
    return {
        "fd": Estimate.around(measured["fd"], fd_error, bounds=(0.0, float("inf")), **common),
        "kid": Estimate.around(measured["kid"], kid_error, **common),
    }


class _Frechet:
    """Frechet distance from a reference whose root is computed once: |m - m_r|^2 + tr(S + S_r - 2 (A S A)^1/2)."""

    def __init__(self, reference: Tensor) -> None:
        self.mean = reference.mean(0)  # (F,)
        covariance = reference.T.cov().reshape(len(self.mean), -1)  # (F, F), of one feature too
        values, vectors = torch.linalg.eigh(covariance)
        self.root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # (F, F), A
        self.trace = covariance.trace()

    def __call__(self, features: Tensor) -> Tensor:
        """Features (N, F) float64 -> (1,)."""
        covariance = features.T.cov().reshape(len(self.mean), -1)  # (F, F)
        cross = torch.linalg.eigvalsh(self.root @ covariance @ self.root).clamp(min=0).sqrt().sum()
        shift = (features.mean(0) - self.mean).square().sum()
        return (shift + self.trace + covariance.trace() - 2 * cross)[None]


def _kernel_halves(features: Tensor, reference: Tensor, repetitions: int, seed: int, chunk: int = 1024) -> float:
    """Standard error of KID by `subsampled`, from one pass over the kernel matrix.

    On a half with indicator s, the mean over its pairs is (s' K s - sum of its diagonal) / (m (m - 1)).
    """
    n, width = features.shape
    generator = torch.Generator().manual_seed(seed)
    half = n // 2
    chosen = torch.zeros(n, repetitions, dtype=torch.float64)  # (N, R)
    for repetition in range(repetitions):
        chosen[torch.randperm(n, generator=generator)[:half], repetition] = 1
    own, across = torch.zeros(repetitions, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for start in range(0, n, chunk):
        rows = slice(start, start + chunk)
        same = (features[rows] @ features.T / width + 1) ** 3  # (chunk, N)
        own += (chosen[rows] * (same @ chosen)).sum(0)
        across[rows] = ((features[rows] @ reference.T / width + 1) ** 3).mean(1)
    diagonal = (features.square().sum(1) / width + 1) ** 3  # (N,)
    values = (own - chosen.T @ diagonal) / (half * (half - 1)) - 2 * chosen.T @ across / half  # (R,)
    return float(values.std()) * (half / (n - half)) ** 0.5
