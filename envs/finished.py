"""What the core knows of episodes that have just ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Finished:
    """Episodes that have just ended.

    Attributes:
        rows: (n,) which environments.
        codes: (n, L) int16, the last observations, with K + 1 where an episode never drew.
        score_map: (n, h, w) float32, 0 below the last drawn row; None without a scorer.
        step_rewards: (n, T) float32, 0 at given and never drawn positions.
        rewards: (n,) float32, the reward of the episode's last step: all of it, or the last code's part with an oracle.
        returns: (n,) float32, the sum of `step_rewards`: the episode's return.
        start: (n,) first drawn position.
        stop: (n,) one past the last.
        lengths: (n,) how many codes the episode drew.
        labels: (n,) int64 classes of the images; None without classes.
    """

    rows: np.ndarray
    codes: np.ndarray
    score_map: np.ndarray | None
    step_rewards: np.ndarray
    rewards: np.ndarray
    returns: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray | None = None

    def infos(self) -> dict[str, np.ndarray]:
        """The info of the episodes' last step, by name: `codes` (n, L), and what there is of the rest.

        With classes `label` (n,); with a scorer `score_map` (n, h, w) and `step_rewards` (n, T).
        """
        infos = {"codes": self.codes}
        if self.labels is not None:
            infos["label"] = self.labels
        if self.score_map is not None:
            infos |= {"score_map": self.score_map, "step_rewards": self.step_rewards}
        return infos

    def info(self, number: int) -> dict[str, Any]:
        """The info of one of them, as the single environment gives it."""
        return {name: _own(values[number]) for name, values in self.infos().items()}


def _own(value: Any) -> Any:
    """A copy of an array, a number as a Python number."""
    return value.copy() if value.ndim else value.item()
