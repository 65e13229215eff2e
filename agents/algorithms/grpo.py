"""GRPO on whole images: group-relative advantages, a clipped ratio, KL to the frozen prior.

Group Relative Policy Optimization (Shao et al., 2024, "DeepSeekMath") needs no value head: an episode is compared
with others that started from the same grid. The sequence-level ratio is that of "Group Sequence Policy Optimization"
(Zheng et al., 2025) in its token form, as used for autoregressive image models by Baran et al. (2026).

Differences from those papers, and why:

* Advantages are centred per group, but divided by the standard deviation of the whole batch or by nothing: dividing by
  each group's own deviation weights starts by how similar their images are, and the result is not the gradient of
    any objective.
* The surrogate is the pessimistic min(ratio A, clip(ratio) A). The code of Baran et al. takes the maximum, which
  leaves steps in a wrong direction unlimited.
"""

from __future__ import annotations

from typing import Any, Literal, Unpack

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from ral_gym.agents.algorithms.base import EpisodeAlgorithm, EpisodeArguments
from ral_gym.agents.algorithms.passes import Figures
from ral_gym.agents.algorithms.reinforce import batch_baseline
from ral_gym.agents.episodes import EpisodeRolloutBuffer
from ral_gym.agents.policy import PriorPolicy
from ral_gym.agents.regularizers import AdaptiveEntropy
from ral_gym.agents.vec_env import CodeVecEnv, unwrap_code_env
from ral_gym.envs.core import GenerationCore
from ral_gym.errors import ConfigError


def start_groups(buffer: EpisodeRolloutBuffer) -> np.ndarray:
    """Numbers (n,) of the finished episodes' groups: equal if start, stop and all given entries are equal."""
    given = np.where(buffer.mask, -1, buffer.codes)  # (n, L)
    return np.unique(given, axis=0, return_inverse=True)[1].reshape(-1)


def clipped_surrogate(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float, row: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The pessimistic clipped surrogate of every code.

    Args:
        log_prob: (N,) under the policy now.
        old_log_prob: (N,) when drawn.
        advantages: (N,).
        clip_range: ratios are clipped to 1 - clip_range .. 1 + clip_range.
        row: (N,) int64 below N, which episode a code is of: the ratio is the geometric mean over the episode's codes,
            the gradient stays each code's own (GSPO-token). None: the code's own ratio.

    Returns:
        the loss (N,), and the ratios (N,).
    """
    log_ratio = log_prob - old_log_prob
    if row is not None:
        sums, counts = log_ratio.new_zeros(len(row)), row.new_zeros(len(row))  # room for any number of episodes
        sums.index_add_(0, row, log_ratio.detach())
        mean = sums / counts.index_add_(0, row, torch.ones_like(row)).clamp_min(1)  # by episode
        log_ratio = mean[row] + log_prob - log_prob.detach()
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.min(ratio * advantages, clipped * advantages), ratio.detach()


class GRPO(EpisodeAlgorithm):
    """Group-relative policy optimisation with one round of episodes per update.

    With `kl_coef`, KL(policy || start) is the k3 estimator exp(d) - d - 1 with d = log prior - log policy of the drawn
    codes (Schulman, 2020): never negative.

    Args:
        policy: as in `EpisodeAlgorithm`.
        env: as in `EpisodeAlgorithm`.
        learning_rate: as in `EpisodeAlgorithm`.
        n_steps: as in `EpisodeAlgorithm`.
        group_size: environments per group, which continue the same real image from the same row; a divisor of their
            number. From an empty grid all episodes have the same start, so the group is the batch; with classes the
            rows of a group share a label. If rows of a group were reset with different options, rows of the whole batch
            with equal starts are compared.
        scale_advantage: `batch`: divide by the standard deviation over the batch; `none`: do not.
        n_epochs: optimizer steps per round.
        ratio: `sequence` or `token`, see `clipped_surrogate`.
        clip_range: see `clipped_surrogate`.
        target_kl: skip the remaining epochs once the mean KL per code from the round's policy exceeds 1.5 times this.
        entropy_target: adapt the bonus around `ent_coef` (`AdaptiveEntropy`): a fraction of ln K or `start`; None:
            fixed.
        entropy_schedule: `schedule` of `AdaptiveEntropy`.
        **shared: `EpisodeArguments`, see `EpisodeAlgorithm`.

    Raises:
        ConfigError: unknown `ratio` or `scale_advantage`, groups that do not fit the environments, `mle_coef` without
            real codes; in training, if no two episodes of a round have the same start.
    """

    def __init__(
        self,
        policy: str | type[PriorPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-4,
        n_steps: int | None = None,
        *,
        group_size: int = 8,
        scale_advantage: Literal["batch", "none"] = "batch",
        n_epochs: int = 2,
        ratio: Literal["sequence", "token"] = "sequence",
        clip_range: float | Schedule = 0.2,
        target_kl: float | None = None,
        entropy_target: float | Literal["start"] | None = None,
        entropy_schedule: bool = False,
        **shared: Unpack[EpisodeArguments],
    ) -> None:
        if ratio not in ("sequence", "token"):
            raise ConfigError(f"ratio {ratio!r} is unknown: choose sequence or token")
        if scale_advantage not in ("batch", "none"):
            raise ConfigError(f"scale_advantage {scale_advantage!r} is unknown: choose batch or none")
        self.group_size, self.scale_advantage, self.ratio = group_size, scale_advantage, ratio
        self.n_epochs, self.clip_range, self.target_kl = n_epochs, clip_range, target_kl
        self.entropy_target, self.entropy_schedule = entropy_target, entropy_schedule
        self.entropy_rule: AdaptiveEntropy | None = None
        super().__init__(policy, env, learning_rate, n_steps, **shared)

    def _setup_model(self) -> None:
        super()._setup_model()
        self.clip_range = FloatSchedule(self.clip_range)
        if self.entropy_target is not None and self.entropy_rule is None:
            size = self.policy.prior.codebook_size
            self.entropy_rule = AdaptiveEntropy(
                size, self.ent_coef, self.entropy_target, schedule=self.entropy_schedule
            )
        if self.env is not None:
            self._check_groups(self.env)

    def _check_groups(self, env: VecEnv) -> CodeVecEnv | None:
        """The environment whose rows must be grouped, or None if all rows start alike anyway.

        Raises:
            ConfigError: they cannot be grouped.
        """
        found = unwrap_code_env(env)
        if found is None or not found.core.starts_differ:
            return None
        alike = "continue the same image" if found.core.distribution.mode in ("continue", "mixed") else "start alike"
        if self.group_size < 2 or env.num_envs % self.group_size:
            raise ConfigError(
                f"group_size={self.group_size} does not divide {env.num_envs} environments into groups of at least 2 "
                f"that {alike}: choose a divisor"
            )
        if found.core.distribution.mode in ("continue", "mixed") and not found.core.lockstep:
            raise ConfigError("GRPO groups environments that start alike: make them with lockstep=True")
        return found

    def _share_starts(self, core: GenerationCore) -> None:
        """Rows with the same reset options, or with none, copy the start of their group's first row.

        If the options of a group's rows differ, all rows keep their own starts.

        Raises:
            ConfigError: a row then shares its start with no other row.
        """
        leaders = np.arange(core.num_envs) // self.group_size * self.group_size
        if all(core.asked[leader] == key for leader, key in zip(leaders, core.asked, strict=True)):
            core.share_starts(leaders)
            return
        _, label, count = np.unique(core.codes, axis=0, return_inverse=True, return_counts=True)
        alone = np.flatnonzero(count[label.reshape(-1)] == 1)
        if len(alone):
            raise ConfigError(
                f"environment {alone[0]} starts from a grid that no other one has, so GRPO cannot compare it: give all "
                f"rows of a group ({self.group_size} in a row) the same options"
            )

    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, rollout_buffer: Any, n_rollout_steps: int) -> bool:
        """One round: until every environment has finished the episode it is in; each group starts from one grid.

        Raises:
            ConfigError: environments that cannot be grouped.
        """
        found = self._check_groups(env)
        if found is not None:
            if (found.core.position > found.core.start).any():  # rows of different lengths end at different times
                env.reset()
            self._share_starts(found.core)
            self._last_obs, self._last_episode_starts = found.core.observations(), np.ones(env.num_envs, bool)
        return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)

    def advantages(self) -> np.ndarray:
        """(N,) returns of the buffer's transitions minus their group's mean at the same position."""
        buffer = self.rollout_buffer
        group = start_groups(buffer)
        if len(group) > 1 and np.bincount(group).max() == 1:
            raise ConfigError(
                f"the {len(group)} episodes of a round all started from different grids, so there is nothing to "
                "compare: use make_sb3_env, or reset_mode='full'"
            )
        mask = buffer.mask
        returns = np.zeros(mask.shape, np.float32)
        returns[mask] = buffer.returns
        advantages = (returns - batch_baseline(returns, mask, group, leave_one_out=False))[mask]
        if self.scale_advantage == "batch":
            advantages = advantages / (advantages.std() + 1e-8)
        return advantages

    def policy_loss(
        self, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, row: Tensor
    ) -> tuple[Tensor, Figures]:
        """The clipped surrogate of every transition (N,), and how many ratios were clipped."""
        clip_range = self._clip_range
        losses, ratio = clipped_surrogate(
            log_prob, old_log_prob, advantages, clip_range, row if self.ratio == "sequence" else None
        )
        return losses, {"clip_fraction": ((ratio - 1).abs() > clip_range).float().sum()}

    def _prior_kl(self, log_probs: Tensor, log_prob: Tensor, reference: Tensor, actions: Tensor) -> Tensor:
        difference = reference.gather(1, actions[:, None]).squeeze(1) - log_prob  # (N,)
        return difference.exp() - difference - 1

    def _stop_early(self, figures: Figures) -> bool:
        return self.target_kl is not None and float(figures["approx_kl"]) > 1.5 * self.target_kl

    def train(self) -> None:
        """An update from the finished episodes of the round: one optimizer step per epoch."""
        self._clip_range = self.clip_range(self._current_progress_remaining)  # type: ignore[operator]
        if self.entropy_rule is not None:
            entropy = self.policy.mean_entropy(self.rollout_buffer)
            self.ent_coef = self.entropy_rule(entropy, 1 - self._current_progress_remaining)
            self.logger.record("train/ent_coef", self.ent_coef)
        super().train()
        self.logger.record("train/clip_range", self._clip_range)
