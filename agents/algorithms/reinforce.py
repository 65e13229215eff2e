"""REINFORCE on whole images (Eq. 2-4), as a Stable-Baselines3 algorithm.

One update: every environment draws one episode, the rewards-to-go Q (Eq. 3) minus a baseline weigh the
log-probabilities of the drawn codes, one optimizer step follows. The paper mentions no baseline; without one, every
code of a batch is pushed the same way. The loss is the mean over drawn codes where Eq. 2 sums over an episode: with
Adam only its ratio to other loss terms differs.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import numpy as np
import torch
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from torch import Tensor
from torch.nn import functional as F

from ral_gym.agents.algorithms.base import EpisodeAlgorithm
from ral_gym.agents.episodes import EpisodeRolloutBuffer
from ral_gym.agents.policy import PriorPolicy
from ral_gym.errors import ConfigError

Baseline = Literal["none", "mean", "leave_one_out", "value"]
BASELINES = ("none", "mean", "leave_one_out", "value")
SelfReinforce = TypeVar("SelfReinforce", bound="Reinforce")


def batch_baseline(returns: np.ndarray, mask: np.ndarray, group: np.ndarray, leave_one_out: bool) -> np.ndarray:
    """The mean return at the same position over episodes of the same group.

    Args:
        returns: (n, T) rewards-to-go.
        mask: (n, T) bool, the drawn positions.
        group: (n,) integer labels: episodes of one mode and length.
        leave_one_out: leave the episode itself out (RLOO): then the baseline does not depend on its own codes and the
            estimate stays unbiased. An episode alone in its group gets its own return: it teaches nothing.

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
        policy: `PriorPolicy` (the class or its name).
        env: a `ral_gym` environment, best from `make_sb3_env`.
        learning_rate: Adam's.
        n_steps: capacity of the buffer per environment; None: T. A round is one finished episode per environment.
        gamma: discount; 1 lets the first code see a terminal reward as well as the last.
        baseline: `none` (as the paper), `mean` or `leave_one_out` over the batch's episodes of the same start and
            stop, or `value` (the value head, trained alongside).
        normalize_advantage: divide the advantages by their standard deviation over the batch.
        mle_coef: weight of a maximum-likelihood loss on real codes, a batch as large as the round, in every update.
        kl_coef: weight of KL(policy || the policy's starting weights), exact over K, mean over drawn codes.
        ent_coef: weight of the entropy bonus.
        vf_coef: weight of the value loss (baseline `value` only).
        max_grad_norm: gradient clipping.
        batch_size: transitions per forward and backward pass; gradients are summed over passes. None: all at once.
        fast_path: draw whole images at once where all environments stand alike; False: step by step. Both give the
            same codes, rewards and update from the same seed.
        rollout_buffer_class: `EpisodeRolloutBuffer`.
        rollout_buffer_kwargs: its arguments.
        stats_window_size: episodes in the rollout averages.
        tensorboard_log: folder.
        policy_kwargs: `PriorPolicy`'s arguments, such as ``{"prior": "runs/demo"}``.
        verbose: SB3's.
        seed: seeds everything.
        device: SB3's.
        _init_setup_model: SB3's.

    Raises:
        ConfigError: an unknown baseline, or a maximum-likelihood share without real codes.
    """

    def __init__(
        self,
        policy: str | type[PriorPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-4,
        n_steps: int | None = None,
        gamma: float = 1.0,
        baseline: Baseline = "leave_one_out",
        normalize_advantage: bool = True,
        mle_coef: float = 0.0,
        kl_coef: float = 0.0,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 1.0,
        batch_size: int | None = None,
        fast_path: bool = True,
        rollout_buffer_class: type[EpisodeRolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        if baseline not in BASELINES:
            raise ConfigError(f"baseline {baseline!r} is unknown: choose one of {', '.join(BASELINES)}")
        self.baseline, self.normalize_advantage = baseline, normalize_advantage
        super().__init__(
            policy,
            env,
            learning_rate,
            n_steps,
            gamma=gamma,
            mle_coef=mle_coef,
            kl_coef=kl_coef,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            batch_size=batch_size,
            fast_path=fast_path,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=_init_setup_model,
        )

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

    def learn(
        self: SelfReinforce,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "Reinforce",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfReinforce:
        """Train for at least `total_timesteps` drawn codes; SB3's arguments."""
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
