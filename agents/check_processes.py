"""A callback for training on several processes: it notices one that is missing, or that is not where the others are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from ral_gym.agents.vec_env import unwrap_code_env
from ral_gym.runs.alike import check_alike, check_in, check_same_kind
from ral_gym.runs.run import random_state
from ral_gym.runs.sharing import Processes


class CheckProcesses(BaseCallback):
    """Before every rollout wait for all processes; at the start, the end and now and then compare their numbers.

    It belongs into the list of callbacks of a script that gives its policy `Processes.join()`; stage 3 has one. With
    one process it does nothing.

    Args:
        every: updates between two comparisons.
        facts: what else must be equal, such as settings: name -> text or number.
        state: returns what is compared, part by part; None: policy, optimizer, buffer and environment. Random states
            are always compared.

    Raises:
        RunError: in training; names the process and what differs, or that it did not answer within the patience of
            `Processes.join`.
    """

    def __init__(
        self,
        every: int = 10,
        facts: dict[str, Any] | None = None,
        state: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.every, self.facts, self._state = every, facts or {}, state
        self._rollouts = 0

    @property
    def processes(self) -> Processes:
        """Those of the policy."""
        return Processes.of(self.model.policy)

    def _compared(self) -> dict[str, Any]:
        if self._state is not None:
            return {**self._state(), "random numbers": random_state()}
        model: Any = self.model
        env = unwrap_code_env(self.training_env)
        return {
            "policy": model.policy.state_dict(),
            "optimizer": model.policy.optimizer.state_dict(),
            "buffer": model.rollout_buffer.state_dict(),
            "environment": {} if env is None else env.core.state_dict(),
            "random numbers": random_state(),
        }

    def _check(self, when: str) -> None:
        if self.processes.size > 1:
            check_alike(self.processes, self._compared(), when)

    def _on_training_start(self) -> None:
        check_same_kind(self.processes, self.facts)
        self._check("at the start")

    def _on_rollout_start(self) -> None:
        if self.processes.size == 1:
            return
        check_in(self.processes, f"after {self._rollouts} updates")
        if self._rollouts and self._rollouts % self.every == 0:
            self._check(f"after {self._rollouts} updates")
        self._rollouts += 1

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self._check("at the end")
