"""REINFORCE on whole images (Eq. 2-4), as a Stable-Baselines3 algorithm.

One update: every environment draws one episode, the rewards-to-go Q (Eq. 3) minus a baseline weight the
log-probabilities of the drawn codes, and one optimizer step follows. The paper mentions no baseline; without one, all
codes of a batch are pushed in the same direction. The loss is the mean over drawn codes where Eq. 2 sums over an
episode: with Adam only its ratio to other loss terms differs.
"""

from __future__ import annotations

from typing import Literal, Unpack

import numpy as np
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from torch import Tensor
from torch.nn import functional as F

from ral_gym.agents.algorithms.base import EpisodeAlgorithm, EpisodeArguments
from ral_gym.agents.policy import PriorPolicy
from ral_gym.errors import ConfigError

Baseline = Literal["none", "mean", "leave_one_out", "value"]
BASELINES = ("none", "mean", "leave_one_out", "value")


def batch_baseline(returns: np.ndarray, mask: np.ndarray, group: np.ndarray, leave_one_out: bool) -> np.ndarray:
    """The mean return at the same position over episodes of the same group.

    Args:
        returns: (n, T) rewards-to-go.
        mask: (n, T) bool, the drawn positions.
        group: (n,) integer labels, equal for episodes of one mode and length.
        leave_one_out: leave the episode itself out (RLOO), so that the baseline does not depend on its own codes and
            the estimate stays unbiased. An episode alone in its group gets its own return, so its advantage is 0.

    Returns:
        (n, T) float32.
    """
    n_groups = int(group.max(initial=-1)) + 1
    sums = np.zeros((n_groups, returns.shape[1]))
    np.add.at(sums, group, np.where(mask, returns, 0.0))
    counts = np.bincount(group, minlength=n_groups)[group][:, None]  # (n, 1)
    total = sums[group]
    if not leave_one_out:
        return (total / counts).astype(np.float32)
    alone = counts == 1
    return np.where(alone, returns, (total - returns) / np.maximum(counts - 1, 1)).astype(np.float32)


class Reinforce(EpisodeAlgorithm):
    """Policy gradient with one round of episodes per update.

    Args:
        policy: as in `EpisodeAlgorithm`.
        env: as in `EpisodeAlgorithm`.
        learning_rate: as in `EpisodeAlgorithm`.
        n_steps: as in `EpisodeAlgorithm`.
        baseline: `none` (as the paper), `mean` or `leave_one_out` over the batch's episodes of the same start and
            stop, or `value` (the value head, trained alongside).
        normalize_advantage: divide the advantages by their standard deviation over the batch.
        vf_coef: weight of the value loss (baseline `value` only).
        **shared: `EpisodeArguments`, see `EpisodeAlgorithm`.

    Raises:
        ConfigError: an unknown baseline, or `mle_coef` without real codes.
    """

    def __init__(
        self,
        policy: str | type[PriorPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-4,
        n_steps: int | None = None,
        *,
        baseline: Baseline = "leave_one_out",
        normalize_advantage: bool = True,
        vf_coef: float = 0.5,
        **shared: Unpack[EpisodeArguments],
    ) -> None:
        if baseline not in BASELINES:
            raise ConfigError(f"baseline {baseline!r} is unknown: choose one of {', '.join(BASELINES)}")
        self.baseline, self.normalize_advantage = baseline, normalize_advantage
        super().__init__(policy, env, learning_rate, n_steps, vf_coef=vf_coef, **shared)

    @property
    def needs_values(self) -> bool:  # type: ignore[override]
        """Whether rollouts must store value estimates."""
        return self.baseline == "value"

    def advantages(self) -> np.ndarray:
        """(N,) advantages of the buffer's transitions."""
        buffer = self.rollout_buffer
        mask = buffer.mask
        returns = np.zeros(mask.shape, np.float32)
        returns[mask] = buffer.returns
        if self.baseline == "value":
            advantages = buffer.advantages
        elif self.baseline == "none":
            advantages = returns[mask]
        else:
            _, group = np.unique(np.stack([buffer.start, buffer.stop]), axis=1, return_inverse=True)
            baseline = batch_baseline(returns, mask, group.reshape(-1), self.baseline == "leave_one_out")
            advantages = (returns - baseline)[mask]
        if self.normalize_advantage:
            advantages = advantages / (advantages.std() + 1e-8)
        return advantages

    def _value_loss(self, features: Tensor, position: Tensor, stop: Tensor, returns: Tensor) -> Tensor | None:
        if self.baseline != "value":
            return None
        return F.mse_loss(self.policy._values(features, position, stop).flatten(), returns, reduction="none")
