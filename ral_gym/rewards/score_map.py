"""Score map -> rewards (Sections 4.2 and 4.4).

*single* (Eq. 6): the mean of the score map, at the last code of the episode, 0 before. *intermediate*: the score map
upsampled to the code grid; the reward of a code is the score at its position. Codes given as a prefix were not drawn
and get no reward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ral_gym.errors import RunError

RewardKind = Literal["single", "intermediate"]
Normalization = Literal["max_abs", "standard", "none"]


def step_rewards(score_map: Tensor, rows: int, width: int, reward: RewardKind, levels: int = 1) -> Tensor:
    """The reward of every code of images of `rows` code rows.

    The paper does not say how the map is upsampled: each code gets exactly the score of the patch it lies in, and where
    the map is finer than the grid, the mean of the patches inside it.

    Args:
        score_map: (B, h, w) float, higher is more real.
        rows: code rows r of these images.
        width: codes per row W.
        reward: `single` or `intermediate`.
        levels: with 2, the rewards of the 2r x 2W bottom codes of these rows follow.

    Returns:
        (B, r * W) float, or (B, 5 * r * W) for two levels; the whole sum is the mean score (single) or the sum over
        codes (intermediate).
    """
    shapes = [(rows * 2**level, width * 2**level) for level in range(levels)]
    if reward == "intermediate":
        maps = [F.interpolate(score_map.unsqueeze(1), size=shape, mode="area").flatten(1) for shape in shapes]
        return torch.cat(maps, 1)  # (B, T')
    rewards = score_map.new_zeros(len(score_map), sum(height * columns for height, columns in shapes))  # (B, T')
    rewards[:, -1] = score_map.flatten(1).mean(1)
    return rewards


class ScoreNormalizer:
    """Brings scores onto a fixed scale from one set of real and fake score maps (Section 4.4).

    A WGAN critic's scores have neither a fixed scale nor a fixed offset. "Normalised to (-1, 1) with respect to the
    highest value from a set of fake and real images" can be read in several ways; `max_abs` divides by
    max |score| over both sets, which keeps the sign and lies in [-1, 1]. Dividing by the maximum itself would flip
    the sign whenever all scores are negative.

    Args:
        method: `max_abs`; `standard`: (score - mean of real) / standard deviation over both; `none`.
    """

    def __init__(self, method: Normalization = "max_abs") -> None:
        self.method = method
        self.shift = 0.0
        self.scale = 1.0

    @classmethod
    def from_file(cls, path: Path, metadata: Mapping[str, Any]) -> ScoreNormalizer:
        """The normalisation that a critic was saved with.

        Args:
            path: the critic's file, for the message.
            metadata: its metadata: `normalization`, `shift` and `scale`.

        Raises:
            RunError: it has none, or an impossible one.
        """
        try:
            method, shift, scale = (metadata[name] for name in ("normalization", "shift", "scale"))
        except KeyError as error:
            raise RunError(f"{path} lacks {error}, the scale of its scores; train it again") from error
        fits = all(isinstance(value, float | int) and math.isfinite(value) for value in (shift, scale))
        if method not in get_args(Normalization) or not fits or scale <= 0:
            raise RunError(
                f"{path}: its scores have the scale {str(method)[:20]!r}, {shift!r:.20}, {scale!r:.20}; train it again"
            )
        normalizer = cls(method)
        normalizer.shift, normalizer.scale = float(shift), float(scale)
        return normalizer

    def fit(self, real: Tensor, fake: Tensor) -> ScoreNormalizer:
        """Take shift and scale from score maps (B, h, w) of real and fake images (the same method for all of them)."""
        both = torch.cat([real.flatten(), fake.flatten()])
        if self.method == "max_abs":
            self.scale = both.abs().max().clamp_min(1e-8).item()
        elif self.method == "standard":
            self.shift = real.mean().item()
            self.scale = both.std().clamp_min(1e-8).item()
        return self

    def __call__(self, score_map: Tensor) -> Tensor:
        """Normalised scores, same shape."""
        return (score_map - self.shift) / self.scale
