"""Can the critic tell real from fake images? Its AUC and gap on held-out real and newly drawn fake images.

The critic is the reward; one that has learnt nothing gives noise. So it is measured on images it was not trained on: an
AUC of 0.5 means that it cannot tell real from fake. The gap is its estimate of the Wasserstein distance (Eq. 5).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Scores = Tensor | np.ndarray
"""Scores of any shape and float type, on any device."""


def auc(real_scores: Scores, fake_scores: Scores) -> float:
    """Area under the ROC curve: P(real > fake) + P(real = fake) / 2, over all pairs (the Mann-Whitney statistic).

    Args:
        real_scores: scores of real images.
        fake_scores: scores of generated images.

    Returns:
        In [0, 1]; NaN where a score is NaN.

    Raises:
        ValueError: one of the two is empty.
    """
    real, fake = _flat(real_scores, "real"), _flat(fake_scores, "fake").sort().values  # (R,), (F,)
    if bool(real.isnan().any() or fake.isnan().any()):
        return float("nan")
    below = torch.searchsorted(fake, real, side="left")  # (R,) fakes strictly below
    below_or_equal = torch.searchsorted(fake, real, side="right")  # (R,)
    return float((below + below_or_equal).double().mean()) / (2 * len(fake))


def gap(real_scores: Scores, fake_scores: Scores) -> float:
    """Mean score of real minus mean score of generated images."""
    return float(_flat(real_scores, "real").mean() - _flat(fake_scores, "fake").mean())


def _flat(scores: Scores, name: str) -> Tensor:
    """Scores as one float64 vector on the CPU."""
    flat = torch.as_tensor(scores).detach().flatten().double().cpu()
    if len(flat) == 0:
        raise ValueError(f"there are no {name} scores")
    return flat
