"""Stage 3's bookkeeping: the policy's weight average, the run's log and checkpoints, sample grids, when to stop.

The average is updated and checkpoints are written at the start of a rollout (from the second on) and at the end of
training: SB3's `on_rollout_end` fires before the update that they must include.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, TensorBoardOutputFormat
from torch.utils.tensorboard import SummaryWriter

from ral_gym.agents.rewards.rollout_reward import RolloutReward
from ral_gym.agents.vec_env import unwrap_code_env
from ral_gym.rewards.distribution import DISTRIBUTION_TERMS
from ral_gym.runs.checked_state import array_of, integer_of
from ral_gym.runs.event_log import open_event_log
from ral_gym.runs.progress import progress_bar
from ral_gym.runs.run import Run
from ral_gym.runs.sharing import Processes
from ral_gym.stages.common import Clock, WeightAverage, check_weights, restore_optimizer

STAGE = "ral"


def numbers_in(logged: dict[str, Any]) -> dict[str, float]:
    """The numbers among what was logged; pictures and texts are left out."""
    return {name: float(value) for name, value in logged.items() if isinstance(value, int | float | np.number)}


class RunWriter(KVWriter):
    """An SB3 log output that appends to the run's ``metrics.jsonl``.

    Args:
        run: the run folder.
        step: returns the number of policy updates.
    """

    def __init__(self, run: Run, step: Callable[[], int]) -> None:
        self.run, self.step = run, step

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """One line of the numbers; pictures and other things are left out."""
        self.run.log(STAGE, self.step(), numbers_in(key_values))

    def close(self) -> None:
        """Nothing is kept open."""


class RunEventLog(KVWriter):
    """An SB3 log output that adds to the run's TensorBoard log, opened at the first write.

    Args:
        run: the run folder.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._output: _EventOutput | None = None

    def _opened(self, step: int) -> _EventOutput:
        """The output; opening it drops events that a stopped session wrote from `step` on."""
        if self._output is None:
            self._output = _EventOutput(open_event_log(self.run.path, STAGE, step - 1))
        return self._output

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Numbers and pictures, as SB3's own TensorBoard output writes them."""
        self._opened(step).write(key_values, key_excluded, step)

    def add_picture(self, tag: str, picture: np.ndarray, step: int) -> None:
        """Add a picture (C, H, W) uint8 at once, not with the next numbers: a checkpoint may come before those."""
        self._opened(step).writer.add_image(tag, picture, step)

    def flush(self) -> None:
        """Flush to the system, so that a checkpoint is never ahead of the log."""
        if self._output is not None:
            self._output.writer.flush()

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._output is not None:
            self._output.close()


class _EventOutput(TensorBoardOutputFormat):
    """SB3's output, on an existing writer."""

    def __init__(self, writer: SummaryWriter) -> None:
        self.writer, self._is_closed = writer, False


class RunCallback(BaseCallback):
    """Average the weights, write checkpoints, show progress, and stop after the run's number of updates.

    Args:
        run: the run folder.
        reward: the reward callback, which must come before this one.
        n_updates: total number of policy updates.
        draw_samples: called with the number of updates at intervals, for a sample grid.
        keep_average: called with the number of updates four times, at equal intervals, to save the average.
        progress: show a progress bar.
        checkpoint_every: updates between checkpoints.
        regularizers: callbacks between the two; those with a `state_dict` are saved in checkpoints.
        processes: those that share the training; only the main one writes. None: this one alone.
    """

    def __init__(
        self,
        run: Run,
        reward: RolloutReward,
        n_updates: int,
        *,
        draw_samples: Callable[[int], None] | None = None,
        keep_average: Callable[[int], None] | None = None,
        progress: bool = True,
        checkpoint_every: int = 10,
        regularizers: Sequence[BaseCallback] = (),
        processes: Processes | None = None,
    ) -> None:
        super().__init__()
        self.processes = processes or Processes()
        self._regularizers: dict[str, Any] = {
            type(regularizer).__name__: regularizer
            for regularizer in regularizers
            if hasattr(regularizer, "state_dict")
        }
        self.run, self.reward, self.total_updates = run, reward, n_updates
        self.draw_samples, self.keep_average, self.progress = draw_samples, keep_average, progress
        self.checkpoint_every = checkpoint_every
        self.updates = 0
        self.average: WeightAverage | None = None
        self._first = True
        self._latest: dict[str, Any] = {}

    @property
    def _stations(self) -> list[int]:
        """The numbers of updates after which the average is saved."""
        return [self.total_updates * fifth // 5 for fifth in range(1, 5)]

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint: everything but the policy's own weights and the environment."""
        self.updates = integer_of(state["updates"], "updates", high=self.total_updates)
        assert self.average is not None
        self.average.load_state_dict(state["average"], self.model.policy)
        self.reward.load_state_dict(state["critic"])
        for name, regularizer in self._regularizers.items():
            regularizer.load_state_dict(state["regularizers"][name])
        hidden = state.get("hidden", {})
        for name, value in state.get("logged", {}).items():
            self.logger.record(str(name), float(value), exclude=tuple(map(str, hidden.get(name, ()))))

    def _init_callback(self) -> None:
        if self.average is None:
            self.average = WeightAverage(self.model.policy, self.run.config.ral.ema_decay)

    def _on_training_start(self) -> None:
        self._clock = Clock(self.run, STAGE)
        self._bar = progress_bar(
            total=self.total_updates,
            initial=self.updates,
            desc=f"3 RAL ({self.run.config.ral.algo})",
            unit="update",
            disable=not self.progress,
        )

    def _on_rollout_start(self) -> None:
        if not self._first:
            self._after_update()
        self._first = False

    def _after_update(self) -> None:
        self.updates += 1
        check_weights(self.model.policy, STAGE, self.updates, "lower ral.learning_rate")
        assert self.average is not None
        self.average.update(self.model.policy)
        self._bar.set_postfix(self._shown(), refresh=False)
        self._bar.update(1)
        if not self.processes.main:
            return
        if self.keep_average is not None and self.updates in self._stations:
            self.keep_average(self.updates)
        if self.updates % self.checkpoint_every == 0 and self.updates < self.total_updates:
            if self.draw_samples is not None:
                self.draw_samples(self.updates)
            self.save()

    def _shown(self) -> dict[str, str]:
        """Values on the progress bar: the critic's reward and AUC, and distances of distribution terms."""
        metrics = {"reward": "rollout/critic_reward_mean", "auc": "critic/heldout_auc"}
        metrics |= {term: f"reward/{term}_distance" for term in DISTRIBUTION_TERMS}
        return {label: f"{self._latest[name]:.3g}" for label, name in metrics.items() if name in self._latest}

    def _on_step(self) -> bool:
        return self.updates < self.total_updates

    def _on_rollout_end(self) -> None:
        self._latest = dict(self.logger.name_to_value)

    def _on_training_end(self) -> None:
        if self.updates < self.total_updates:
            self._after_update()
        self._bar.close()
        if self.processes.main:
            self._clock.book()

    def save(self) -> None:
        """Write the checkpoint that a continued run starts from."""
        for output in self.logger.output_formats:
            if isinstance(output, RunEventLog):
                output.flush()
        self.run.save_checkpoint(STAGE, self.state_dict())
        self._clock.book()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the remaining training depends on."""
        model: Any = self.model
        env = unwrap_code_env(self.training_env)
        assert env is not None and self.average is not None
        return {
            "updates": self.updates,
            "policy": model.policy.state_dict(),
            "optimizer": model.policy.optimizer.state_dict(),
            "average": self.average.state_dict(),
            "critic": self.reward.state_dict(),
            "regularizers": {name: regularizer.state_dict() for name, regularizer in self._regularizers.items()},
            "algorithm": model.extra_state() if hasattr(model, "extra_state") else {},
            "buffer": model.rollout_buffer.state_dict(),
            "env": env.core.state_dict(),
            "last_obs": model._last_obs,
            "last_episode_starts": model._last_episode_starts,
            "num_timesteps": model.num_timesteps,
            "n_updates": model._n_updates,
            # Values logged by the update are written with the next rollout's.
            "logged": numbers_in(self.logger.name_to_value),
            "hidden": {name: [*outputs] for name, outputs in self.logger.name_to_excluded.items() if any(outputs)},
            "time": time.time(),
        }

    def compared(self) -> dict[str, Any]:
        """Of `state_dict`, what must be the same in all processes."""
        return {name: part for name, part in self.state_dict().items() if name not in ("time", "logged", "hidden")}


def restore_model(model: Any, state: dict[str, Any]) -> None:
    """Restore an algorithm, its policy, its buffer and its environment from a checkpoint."""
    model.policy.load_state_dict(state["policy"])
    restore_optimizer(model.policy.optimizer, state["optimizer"])
    model.rollout_buffer.load_state_dict(state["buffer"])
    env = unwrap_code_env(model.env)
    assert env is not None
    env.core.load_state_dict(state["env"])
    starts = array_of(state["last_episode_starts"], "last_episode_starts", (env.num_envs,), bool)
    # None after a stop inside a round: the next `learn` resets the environments.
    last_obs, codes = state["last_obs"], env.core.codes
    if last_obs is not None:
        last_obs = array_of(last_obs, "last_obs", codes.shape, codes.dtype, 0, env.core.grid.largest_entry)
        if (env.core.position >= env.core.stop).any():
            raise ValueError("episodes that have ended already")
    model._last_obs, model._last_episode_starts = last_obs, starts
    model.num_timesteps = integer_of(state["num_timesteps"], "num_timesteps")
    model._n_updates = integer_of(state["n_updates"], "n_updates")
    if state.get("algorithm"):
        model.load_extra_state(state["algorithm"])
