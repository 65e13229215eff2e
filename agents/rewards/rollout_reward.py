"""The base of callbacks that write rewards into an on-policy rollout, at its end.

Order at the end of a rollout: the rewards are computed and written into the buffer, and the returns are recomputed;
then the algorithm updates the policy.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from ral_gym.agents.episodes import EpisodeRolloutBuffer
from ral_gym.agents.vec_env import CodeVecEnv, unwrap_code_env
from ral_gym.envs.worlds import World
from ral_gym.errors import ConfigError
from ral_gym.runs.sharing import Processes


class RolloutReward(BaseCallback):
    """Base of the callbacks that replace a rollout's rewards.

    `rollout/ep_rew_mean` shows the rewards that were written.

    Args:
        verbose: as in SB3.

    Raises:
        ConfigError: at the start of training, if the model's buffer or environment is of another kind.
    """

    def __init__(self, verbose: int = 0) -> None:
        super().__init__(verbose)
        self._episodes: list[list[dict[str, Any]]] = []

    def _init_callback(self) -> None:
        buffer, name = getattr(self.model, "rollout_buffer", None), type(self).__name__
        if not isinstance(buffer, EpisodeRolloutBuffer):
            raise ConfigError(
                f"{name} writes rewards into an EpisodeRolloutBuffer, not {type(buffer).__name__}: pass "
                "rollout_buffer_class=EpisodeRolloutBuffer to the algorithm"
            )
        if unwrap_code_env(self.training_env) is None:
            raise ConfigError(f"{name} needs an environment from make_sb3_env")
        self._episodes = [[] for _ in range(self.training_env.num_envs)]

    def offer(self, action_rewards: Callable[[Tensor], Tensor]) -> None:
        """Give the rewards of all codes to an algorithm that sums over them, see `Reinforce.action_rewards`."""
        if getattr(self.model, "all_actions", False):
            self.model.action_rewards = action_rewards  # type: ignore[attr-defined]

    def say_paid(self, rewards: np.ndarray) -> None:
        """Tell such an algorithm what of the written rewards (n, L) those of its sum were, see `Reinforce.paid`."""
        if getattr(self.model, "all_actions", False):
            self.model.paid = rewards  # type: ignore[attr-defined]

    @property
    def code_env(self) -> CodeVecEnv:
        """The environment under any wrappers."""
        env = unwrap_code_env(self.training_env)
        assert env is not None
        return env

    @property
    def processes(self) -> Processes:
        """Those that share the work with this one."""
        return Processes.of(self.model.policy)

    @property
    def world(self) -> World:
        """The environment's world."""
        return self.code_env.world

    def _on_step(self) -> bool:
        # SB3 averages these dicts after the rollout: they are kept so that the written rewards can replace theirs.
        for env in np.flatnonzero(self.locals["dones"]):
            self._episodes[env].append(self.locals["infos"][env].get("episode", {}))
        return True

    def _on_rollout_end(self) -> None:
        buffer: EpisodeRolloutBuffer = self.model.rollout_buffer  # type: ignore[attr-defined]
        if not len(buffer.codes):  # a rollout after a stop, in which no episode ended
            return
        totals = self.write(buffer, torch.from_numpy(buffer.codes.astype(np.int64)))
        buffer.compute_returns_and_advantage()
        # From the end: after a stop the buffer leaves out the episodes that ended first.
        for env, total in zip(buffer.episode_envs[::-1], totals[::-1], strict=True):
            if self._episodes[env]:
                self._episodes[env].pop()["r"] = float(total)
        for left_out in self._episodes:
            left_out.clear()

    @abstractmethod
    def write(self, buffer: EpisodeRolloutBuffer, codes: Tensor) -> np.ndarray:
        """Write the rewards of the finished episodes into the buffer.

        Args:
            buffer: the rollout's.
            codes: (n, L) int64, its finished grids, K + 1 where nothing was drawn; with classes the last entry is the
                label, and L is T + 1, else T.

        Returns:
            (n,) each episode's total reward.
        """

    def check_alone(self) -> None:
        """Refuse rewards that an image has not by itself and as a whole, as `score` must give them.

        Raises:
            ConfigError: here always; rewards that can be given to any image override both methods.
        """
        raise ConfigError(f"{type(self).__name__} has no reward for images outside of the rollout: leave roll-outs out")

    def score(self, codes: Tensor) -> np.ndarray:
        """The rewards that other images would have had in the last rollout, on the same scale; nothing is trained.

        Args:
            codes: (m, L) int64, as `write` takes them.

        Returns:
            (m,) float64.
        """
        raise NotImplementedError

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, at the start of a rollout."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
