"""REINFORCE on whole images (Eq. 2-4), as a Stable-Baselines3 algorithm.

One update: every environment draws one episode, the rewards-to-go Q (Eq. 3) minus a baseline weight the
log-probabilities of the drawn codes, and one optimizer step follows. The paper mentions no baseline; without one, all
codes of a batch are pushed in the same direction. The loss is the mean over drawn codes where Eq. 2 sums over an
episode: with Adam only its ratio to other loss terms differs.

With `all_actions` a critic's reward f_t(c_t) of a code leaves the sampled return Q_t of its own position, and the loss
gets minus its expectation over all codes that could have been drawn, sum_k pi(k) f_t(k): the same gradient on average,
since E[f_t(c) grad log pi(c)] = sum_k grad pi(k) f_t(k), without the noise of which code it was ("Mean Actor Critic",
Allen et al., 2017). What later codes are paid stays sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Unpack

import numpy as np
import torch
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from torch import Tensor
from torch.nn import functional as F

from ral_gym.agents.algorithms.base import EpisodeAlgorithm, EpisodeArguments
from ral_gym.agents.episodes import Episodes
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
        all_actions: sum the critic's reward of a code over all codes that could have been drawn; see above. Needs a
            reward callback whose critic scores every code, such as `CausalCritic`.
        **shared: `EpisodeArguments`, see `EpisodeAlgorithm`.

    Attributes:
        action_rewards: with `all_actions`, set by the reward callback: sequences (n, L) int64, as in the rollout buffer
            -> rewards (n, L, K) of every code in place of each, in the scale of the last rollout, but for a constant.
        paid: likewise, after every rollout: (n, L), what its critic paid for the drawn codes, 0 elsewhere.

    Raises:
        ConfigError: an unknown baseline, or `mle_coef` without real codes; in an update `all_actions` without such a
            critic.
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
        all_actions: bool = False,
        **shared: Unpack[EpisodeArguments],
    ) -> None:
        if baseline not in BASELINES:
            raise ConfigError(f"baseline {baseline!r} is unknown: choose one of {', '.join(BASELINES)}")
        self.baseline, self.normalize_advantage, self.all_actions = baseline, normalize_advantage, all_actions
        self.action_rewards: Callable[[Tensor], Tensor] | None = None
        self.paid: np.ndarray | None = None
        self._scale: float | np.floating = 1.0  # of the round's advantages
        super().__init__(policy, env, learning_rate, n_steps, vf_coef=vf_coef, **shared)

    @property
    def needs_values(self) -> bool:  # type: ignore[override]
        """Whether rollouts must store value estimates."""
        return self.baseline == "value"

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "action_rewards", "paid"]  # the callback sets them again

    def advantages(self) -> np.ndarray:
        """(N,) advantages of the buffer's transitions."""
        buffer = self.rollout_buffer
        returns = np.zeros(buffer.mask.shape, np.float32)
        returns[buffer.mask] = buffer.returns
        advantages = self._over_baseline(returns, buffer.advantages)
        self._scale = advantages.std() + 1e-8 if self.normalize_advantage else 1.0
        if self.all_actions:
            if self.paid is None:
                raise ConfigError(
                    "all_actions needs a critic that scores every code that could be drawn (all_codes), such as that "
                    "of critic.kind causal: give its callback to learn, or leave all_actions out"
                )
            advantages = self._over_baseline(returns - self.paid, buffer.advantages - self.paid[buffer.mask])
        return advantages / self._scale if self.normalize_advantage else advantages

    def _over_baseline(self, returns: np.ndarray, over_values: np.ndarray) -> np.ndarray:
        """Returns (n, L) minus the baseline, of the transitions (N,); `over_values` (N,) with the value head's."""
        buffer = self.rollout_buffer
        mask = buffer.mask
        if self.baseline == "value":
            return over_values
        if self.baseline == "none":
            return returns[mask]
        _, group = np.unique(np.stack([buffer.start, buffer.stop]), axis=1, return_inverse=True)
        baseline = batch_baseline(returns, mask, group.reshape(-1), self.baseline == "leave_one_out")
        found: np.ndarray = (returns - baseline)[mask]
        return found

    def _expected_loss(self, rows: np.ndarray, episodes: Episodes, log_probs: Tensor) -> Tensor | None:
        if self.action_rewards is None:
            return None
        sequences = torch.from_numpy(self.rollout_buffer.codes[rows].astype(np.int64))  # (m, L)
        rewards = self.action_rewards(sequences)[episodes.row, episodes.pos].to(log_probs.dtype)  # (N, K)
        return -(log_probs.exp() * rewards).sum(1) / float(self._scale)

    def _value_loss(self, features: Tensor, position: Tensor, stop: Tensor, returns: Tensor) -> Tensor | None:
        if self.baseline != "value":
            return None
        return F.mse_loss(self.policy._values(features, position, stop).flatten(), returns, reduction="none")
