"""Small parts of a row of the results table: interval ends, and means over images."""

from __future__ import annotations

from torch import Tensor

from ral_gym.metrics import Estimate, mean_estimate


def interval_ends(estimates: dict[str, Estimate | None] | dict[str, Estimate]) -> dict[str, list[float]]:
    """The interval ends of the estimates that have one."""
    return {
        name: [estimate.low, estimate.high]
        for name, estimate in estimates.items()
        if estimate is not None and estimate.low < estimate.high
    }


def image_mean(values: Tensor) -> Estimate:
    """Mean of a metric over images (N,); a single one has no interval."""
    if len(values) < 2:
        value = float(values.mean())
        return Estimate(value, value, value, len(values), "one image", 0.0)
    return mean_estimate(values, method="mean over images", bounds=(0.0, float("inf")))
