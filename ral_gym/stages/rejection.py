"""Rejection sampling, the baseline of VQ-VAE-2: draw more samples than wanted and keep those that a judge scores best.

VQ-VAE-2 keeps the samples of which a classifier is most confident; here the critic of a run can judge as well. It needs
no training, but every kept image costs 1 / share drawn ones, and the kept images are less diverse. Cost and diversity
are measured with the samples (they are arguments of the paper's Section 2 and its supplement's section 4).
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
from ral_gym.grid import CodeGrid
from ral_gym.rewards.scorer import CriticScorer
from ral_gym.tokenizers.base import Tokenizer, device_of
from ral_gym.tokenizers.code_set import decode_codes

Judge = Callable[[Tensor], Tensor]
"""Codes (B, T) int64 -> (B,) float, higher is better."""


@dataclass(frozen=True)
class Diversity:
    """Diversity of a set of code grids."""

    distinct: float
    """Share of the images that differ from all others in some code: distinct ones / all."""
    codes_used: int
    """How many of the K codes occur."""
    distance: float
    """Share of the codes in which two of the images differ, on average over all pairs."""


@dataclass(frozen=True)
class Rejection:
    """The samples that were kept, and their cost."""

    codes: Tensor
    """(n, T) int64, best first."""
    scores: Tensor
    """(n,) scores of the kept samples."""
    threshold: float
    """The lowest score kept."""
    samples_per_kept: float
    """Drawn images per kept one: the cost, 1 without rejection."""
    diversity: Diversity
    """Diversity of the kept samples."""
    unfiltered: Diversity
    """Diversity of equally many drawn samples without selection."""

    def metrics(self) -> dict[str, Any]:
        """Cost and diversity as a flat dict, for a row of a table."""
        kept = asdict(self.diversity)
        return {
            "samples_per_kept": self.samples_per_kept,
            "threshold": self.threshold,
            **kept,
            **{f"{name}_unfiltered": value for name, value in asdict(self.unfiltered).items()},
        }


def diversity(codes: Tensor) -> Diversity:
    """Diversity of codes (N, T); N >= 2 for a distance above 0.

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


def critic_judge(scorer: CriticScorer, grid: CodeGrid | None = None) -> Judge:
    """Judge by the mean score of a run's critic; `grid` is that of sequences with labels, None: they are codes."""
    device, grid = device_of(scorer.vqvae), grid or scorer.vqvae.grid

    def judge(sequences: Tensor) -> Tensor:
        sequences = sequences.to(device)
        return scorer.image_scores(scorer.score(grid.without_labels(sequences), grid.labels_of(sequences)))

    return judge


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
        judge: scores the samples.
        share: share to keep, above 0 and at most 1; at least one is kept.
        batch_size: samples judged at once.

    Raises:
        ConfigError: the share is out of range, there are no samples, or a score is NaN or infinite.
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
        judge: scores the samples.
        n: number of samples to keep.
        share: share of the drawn samples to keep, above 0 and at most 1.

    Raises:
        ConfigError: the share or n is out of range.
    """
    if n < 1 or not 0 < share <= 1:
        raise ConfigError(f"{n} samples, the best {share} of those drawn: give 1 or more, and a share in (0, 1]")
    drawn = math.ceil(n / share - 1e-9)
    return reject(draw(drawn), judge, n / drawn)
