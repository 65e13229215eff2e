"""Small parts of a row of the results table: interval ends, means over images, sequences with labels."""

from __future__ import annotations

import torch
from torch import Tensor

from ral_gym.metrics import Estimate, mean_estimate
from ral_gym.metrics.codes import Codes
from ral_gym.priors.base import Prior


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


def labelled(prior: Prior, codes: Codes, labels: Tensor | None) -> Tensor:
    """What the prior reads: codes (N, T), with their labels (N,) at the end if there are any."""
    codes = torch.as_tensor(codes)
    return codes if labels is None else prior.grid.with_labels(codes, labels)
