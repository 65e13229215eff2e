"""Precision, recall, density and coverage: against the definitions, point by point, and what they are for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ral_gym.errors import ConfigError, DivergedError
from ral_gym.metrics import Neighbourhood
from tests.feature_sets import gaussian

FIGURES = ("precision", "recall", "density", "coverage")


def brute_force(real: Tensor, fake: Tensor, k: int) -> dict[str, float]:
    """Kynkaanniemi et al., Eq. 1 and 2; Naeem et al., Eq. 4 and 5."""
    distance = lambda a, b: float((a - b).norm())  # noqa: E731

    def radius(i: int, points: Tensor) -> float:
        return sorted(distance(points[i], other) for j, other in enumerate(points) if j != i)[k - 1]

    of_real, of_fake = ([radius(i, points) for i in range(len(points))] for points in (real, fake))
    in_real = [[distance(x, y) <= r for y, r in zip(real, of_real, strict=True)] for x in fake]
    in_fake = [[distance(y, x) <= r for x, r in zip(fake, of_fake, strict=True)] for y in real]
    return {
        "precision": np.mean([any(row) for row in in_real]),
        "recall": np.mean([any(row) for row in in_fake]),
        "density": np.mean([sum(row) / k for row in in_real]),
        "coverage": np.mean(np.array(in_real).any(0)),
    }


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("chunk", [7, 1024])
def test_all_four_equal_brute_force(k, chunk):
    real, fake = gaussian(45).double(), gaussian(38, shift=1.2, scale=0.8, seed=1).double()
    measured = Neighbourhood(real, extractor="test", k=k, chunk=chunk).measure(fake)
    expected = brute_force(real, fake, k)
    assert len({round(value, 6) for value in expected.values()}) == 4  # else a mix-up would not be seen
    for name in FIGURES:
        assert measured[name] == pytest.approx(expected[name], rel=1e-12), name
    assert (measured["n"], measured["n_reference"], measured["k"], measured["extractor"]) == (38, 45, k, "test")


def test_a_set_far_from_the_origin():
    """Features of 100,000 that differ by thousandths."""
    real, fake = gaussian(60).double() * 1e-3, gaussian(50, shift=0.5, seed=1).double() * 1e-3
    near, far = (Neighbourhood(real + shift, extractor="t").measure(fake + shift) for shift in (0, 1e5))
    assert near == far


def test_equal_sets_score_one():
    points = gaussian(80)
    measured = Neighbourhood(points, extractor="test").measure(points)
    assert measured["precision"] == measured["recall"] == measured["coverage"] == 1
    assert measured["density"] > 1


def test_disjoint_sets_score_zero():
    measured = Neighbourhood(gaussian(50), extractor="test").measure(gaussian(50, shift=99, seed=1))
    assert [measured[name] for name in FIGURES] == [0, 0, 0, 0]


def test_collapse_costs_recall_and_noise_costs_precision():
    real = gaussian(300)
    neighbourhood = Neighbourhood(real, extractor="test")
    good = neighbourhood.measure(gaussian(300, seed=1))
    collapsed = neighbourhood.measure(gaussian(300, scale=0.3, seed=1))
    noisy = neighbourhood.measure(gaussian(300, scale=2, seed=1))
    assert collapsed["recall"] < 0.5 * good["recall"]
    assert collapsed["coverage"] < 0.7 * good["coverage"]
    assert collapsed["precision"] > good["precision"]
    assert noisy["precision"] < 0.8 * good["precision"]


def test_an_outlier_of_the_reference_raises_precision_but_hardly_density():
    """The point of density (Naeem et al., Section 3.2)."""
    real, fake, outlier = torch.randn(200, 5), 0.3 * torch.randn(200, 5) + 6, torch.full((1, 5), 9.0)
    before = Neighbourhood(real, extractor="test").measure(fake)
    after = Neighbourhood(torch.cat([real, outlier]), extractor="test").measure(fake)
    assert (before["precision"], after["precision"]) == (0, 1)
    assert after["density"] == pytest.approx(1 / 5)


def test_standard_errors_are_those_of_independent_sets():
    neighbourhood = Neighbourhood(gaussian(200), extractor="test")
    draw = lambda seed: gaussian(200, shift=0.5, scale=0.9, seed=seed)  # noqa: E731
    independent = [neighbourhood.measure(draw(seed)) for seed in range(100, 160)]
    estimates = [neighbourhood.estimates(draw(seed)) for seed in range(5)]
    for name in FIGURES:
        spread = np.std([result[name] for result in independent], ddof=1)
        error = np.mean([estimate[name].standard_error for estimate in estimates])
        assert 0.6 * spread < error < (2.5 if name == "coverage" else 1.6) * spread, name
    one = estimates[0]["recall"]
    assert one.value == neighbourhood.measure(draw(0))["recall"]
    assert one.low < one.value <= one.high <= 1
    assert (one.n, one.extractor) == (200, "test")


def test_unusable_sets_are_refused():
    with pytest.raises(ConfigError, match="5 images are too few for k = 5"):
        Neighbourhood(gaussian(5), extractor="test")
    with pytest.raises(ConfigError, match="k = 0"):
        Neighbourhood(gaussian(9), extractor="test", k=0)
    with pytest.raises(ConfigError, match="too few"):
        Neighbourhood(gaussian(9), extractor="test").estimates(gaussian(11))
    with pytest.raises(DivergedError, match="NaN"):
        Neighbourhood(gaussian(9), extractor="test").measure(gaussian(9) * float("nan"))
