"""Rejection sampling, the baseline of VQ-VAE-2: draw more than wanted, keep what a judge likes best.

VQ-VAE-2 keeps the samples of which a classifier is most confident; here the critic of a run can judge as well. It
needs no training, but every kept image costs 1 / share drawn ones, and what the judge prefers is less diverse. Both
are measured beside the samples (Section 2 of the paper, and section 4 of its supplement, argue with them).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ral_gym.data.images import to_float
from ral_gym.errors import ConfigError
from ral_gym.rewards.scorer import CriticScorer
from ral_gym.tokenizers.base import Tokenizer, device_of
from ral_gym.tokenizers.code_set import decode_codes

Judge = Callable[[Tensor], Tensor]
"""Codes (B, T) int64 -> (B,) float, higher is better."""


@dataclass(frozen=True)
class Diversity:
    """How much a set of codes varies."""

    distinct: float
    """Share of the images that differ from all others in some code: distinct ones / all."""
    codes_used: int
    """How many of the K codes occur."""
    distance: float
    """Share of the codes in which two of the images differ, on average over all pairs."""


@dataclass(frozen=True)
class Rejection:
    """The samples that were kept, and what that took."""

    codes: Tensor
    """(n, T) int64, best first."""
    scores: Tensor
    """(n,) their scores."""
    threshold: float
    """The lowest score kept."""
    samples_per_kept: float
    """Drawn images per kept one: the cost, 1 without rejection."""
    diversity: Diversity
    """Of the kept ones."""
    unfiltered: Diversity
    """Of equally many drawn ones, not chosen."""

    def figures(self) -> dict[str, Any]:
        """Cost and diversity as a flat dict, for a row of a table."""
        kept = asdict(self.diversity)
        return {
            "samples_per_kept": self.samples_per_kept,
            "threshold": self.threshold,
            **kept,
            **{f"{name}_unfiltered": value for name, value in asdict(self.unfiltered).items()},
        }


def diversity(codes: Tensor) -> Diversity:
    """How much codes (N, T) vary; N >= 2 for a distance above 0.

    Examples:
        >>> found = diversity(torch.tensor([[0, 1], [0, 1], [0, 2], [0, 2]]))
        >>> round(found.distance, 3)  # 4 of 6 pairs differ, in 1 code of 2
        0.333
    """
    n = len(codes)
    values, counts = zip(*(column.unique(return_counts=True) for column in codes.T), strict=True)
    equal_pairs = sum(int((count * (count - 1)).sum()) for count in counts)
    pairs = n * (n - 1) * len(counts)
    return Diversity(
        distinct=len(codes.unique(dim=0)) / n,
        codes_used=torch.cat(values).unique().numel(),
        distance=1 - equal_pairs / pairs if pairs else 0.0,
    )


def critic_judge(scorer: CriticScorer) -> Judge:
    """Judge by the mean score of a run's critic."""
    device = device_of(scorer.vqvae)
    return lambda codes: scorer.image_scores(scorer.score(codes.to(device)))


def classifier_judge(vqvae: Tokenizer, classifier: Callable[[Tensor], Tensor]) -> Judge:
    """Judge by a classifier's confidence, its highest class probability, as VQ-VAE-2 does.

    Args:
        vqvae: decodes the codes.
        classifier: images (B, C, S, S) in [-1, 1] -> logits (B, classes).
    """
    device = device_of(vqvae)

    @torch.no_grad()
    def confidence(codes: Tensor) -> Tensor:
        images = to_float(decode_codes(vqvae, codes)).to(device)  # (B, C, S, S)
        return classifier(images).softmax(1).amax(1)

    return confidence


def reject(codes: np.ndarray | Tensor, judge: Judge, share: float, batch_size: int = 256) -> Rejection:
    """Keep the best share of given samples.

    Args:
        codes: (N, T), N drawn samples.
        judge: what is good.
        share: how many to keep, above 0 and at most 1; at least one is kept.
        batch_size: samples judged at once.

    Raises:
        ConfigError: the share is out of range, there are no samples, or a score is no number.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"share of samples to keep is {share}: give a number above 0 and at most 1")
    codes = torch.as_tensor(codes).long().cpu()
    if codes.ndim != 2 or not len(codes):
        raise ConfigError(f"samples of shape {tuple(codes.shape)}: give codes (N, T) of at least one image")
    scores = torch.cat([judge(batch).detach().float().cpu() for batch in codes.split(batch_size)])  # (N,)
    if not torch.isfinite(scores).all():
        raise ConfigError("the judge's scores are not all finite: it cannot rank the samples")
    n = max(1, math.floor(share * len(codes) + 0.5))
    best = scores.argsort(descending=True, stable=True)[:n]
    return Rejection(
        codes=codes[best],
        scores=scores[best],
        threshold=scores[best[-1]].item(),
        samples_per_kept=len(codes) / n,
        diversity=diversity(codes[best]),
        unfiltered=diversity(codes[:n]),
    )


def rejection_sample(draw: Callable[[int], Tensor], judge: Judge, n: int, share: float) -> Rejection:
    """Draw as many samples as it takes to keep `n`.

    Args:
        draw: count -> codes (count, T), independent samples of a generator.
        judge: what is good.
        n: how many to keep.
        share: the best share of the drawn ones, above 0 and at most 1.

    Raises:
        ConfigError: the share or n is out of range.
    """
    if n < 1 or not 0 < share <= 1:
        raise ConfigError(f"{n} samples, the best {share} of those drawn: give 1 or more, and a share in (0, 1]")
    drawn = math.ceil(n / share - 1e-9)
    return reject(draw(drawn), judge, n / drawn)
