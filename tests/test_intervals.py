"""Intervals: Student's t, repeated sampling, subsampling, and why not the bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ral_gym.errors import ConfigError
from ral_gym.metrics import FeatureDistance, distance_estimates, mean_estimate, repeated, subsampled
from ral_gym.metrics.intervals import _Frechet, _kernel_halves, student_t
from tests.feature_sets import gaussian


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.706205), (2, 4.302653), (4, 2.776445), (19, 2.093024), (10**6, 1.959964)]
)
def test_student_t_equals_the_tables(degrees, quantile):
    assert student_t(degrees) == pytest.approx(quantile, rel=1e-5)


def test_student_t_is_smooth_where_the_normal_takes_over():
    assert student_t(2000) == pytest.approx(student_t(2001), rel=1e-3)
    with pytest.raises(ConfigError, match="at least two"):
        student_t(0)


def test_mean_of_three_seeds_by_hand():
    estimate = mean_estimate([1.0, 2.0, 6.0], n=500, extractor="lite0")
    error = np.std([1, 2, 6], ddof=1) / np.sqrt(3)
    assert (estimate.value, estimate.n, estimate.extractor) == (3, 500, "lite0")
    assert estimate.standard_error == pytest.approx(error)
    assert (estimate.low, estimate.high) == pytest.approx((3 - 4.302653 * error, 3 + 4.302653 * error))
    assert mean_estimate([1.0, 2.0, 6.0], bounds=(0, 5)).low == 0
    with pytest.raises(ConfigError, match="at least two"):
        mean_estimate([1.0])


def test_mean_intervals_hold_the_mean_in_95_of_100():
    inside = [abs((e := mean_estimate(torch.randn(4) + 7)).value - 7) < e.high - e.value for _ in range(1000)]
    assert 0.93 < np.mean(inside) < 0.97


def test_subsampling_a_mean_gives_its_standard_error():
    """For a mean the answer is known: the standard deviation over sqrt(n), for odd n too."""
    for n in (400, 401, 31):
        values = torch.randn(n, 2) * torch.tensor([1.0, 5.0])
        errors = subsampled(lambda rows, of=values: of[rows].mean(0), n, repetitions=2000)
        torch.testing.assert_close(errors, (values.std(0) / n**0.5).double(), rtol=0.06, atol=0)


def test_subsets_hold_no_sample_twice():
    seen = []
    subsampled(lambda rows: seen.append(rows) or torch.randn(1), 21, repetitions=5)
    assert {len(rows) for rows in seen} == {10}
    assert all(len(rows.unique()) == 10 for rows in seen)
    assert len({tuple(rows.tolist()) for rows in seen}) == 5


def test_frechet_of_subsets_is_torchmetrics():
    reference, features = gaussian(90), gaussian(60, shift=0.4, seed=1)
    distance = FeatureDistance(reference, extractor="test")
    assert float(_Frechet(distance.reference)(features.double())) == pytest.approx(
        distance.measure(features)["fd"], rel=1e-9
    )


@pytest.mark.parametrize("chunk", [7, 1000])
def test_kernel_halves_equal_the_statistic_on_each_half(chunk):
    reference, features = gaussian(40).double(), gaussian(25, shift=0.4, seed=1).double()

    def statistic(rows: torch.Tensor) -> torch.Tensor:
        x = features[rows]
        own, across = (x @ x.T / 5 + 1) ** 3, (x @ reference.T / 5 + 1) ** 3
        return ((own.sum() - own.trace()) / (len(x) * (len(x) - 1)) - 2 * across.mean())[None]

    expected = float(subsampled(statistic, 25, repetitions=9, seed=4))
    assert _kernel_halves(features, reference, 9, 4, chunk) == pytest.approx(expected, rel=1e-9)


def test_errors_of_fd_and_kid_are_those_of_independent_sets():
    """Subsampling sees one set only, and says how much the figures of others would differ."""
    distance = FeatureDistance(gaussian(400), extractor="test")
    draw = lambda seed: gaussian(300, shift=2, scale=0.8, seed=seed)  # noqa: E731
    independent = [distance.measure(draw(seed)) for seed in range(100, 150)]
    estimates = [distance_estimates(distance, draw(seed)) for seed in range(4)]
    for key in ("fd", "kid"):
        spread = np.std([result[key] for result in independent], ddof=1)
        error = np.mean([estimate[key].standard_error for estimate in estimates])
        assert 0.7 * spread < error < 1.4 * spread, key
    one = estimates[0]["fd"]
    assert one.value == distance.measure(draw(0))["fd"]
    assert (one.n, one.extractor) == (300, "test")
    assert "without replacement" in one.method
    assert one.low < one.value < one.high


def test_a_bootstrap_of_fd_would_lie_above_the_figure():
    """Why there is none: duplicates add the bias of sampling once more."""
    reference = torch.randn(1000, 24).double()
    frechet, features = _Frechet(reference), torch.randn(150, 24).double()
    figure = float(frechet(features))
    resampled = [float(frechet(features[torch.randint(150, (150,))])) for _ in range(30)]
    assert min(resampled) > figure


def test_repeated_measures_independent_sets():
    distance = FeatureDistance(gaussian(80), extractor="test")
    measure = lambda repetition: distance.measure(gaussian(50, seed=repetition + 1))  # noqa: E731
    estimates = repeated(measure, 5)
    values = [measure(i)["fd"] for i in range(5)]
    assert estimates["fd"].value == pytest.approx(np.mean(values))
    assert estimates["fd"].standard_error == pytest.approx(np.std(values, ddof=1) / np.sqrt(5))
    assert (estimates["kid"].n, estimates["kid"].extractor) == (50, "test")
    with pytest.raises(ConfigError, match="depends on n"):
        repeated(lambda i: distance.measure(gaussian(20 + i)), 2)


def test_too_few_images_are_refused():
    with pytest.raises(ConfigError, match="at least 12"):
        distance_estimates(FeatureDistance(gaussian(40), extractor="test"), gaussian(11))
