"""Storage of a rollout's transitions, and their division into whole episodes.

Only each episode's first grid and its actions are stored; the grids in between follow from them. L is the number of
entries of an observation: T, or with classes T + 1, whose last entry is the label.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer, RolloutBuffer
from torch import Tensor

from ral_gym.agents.spaces import SequenceShape, sequence_shape
from ral_gym.errors import ConfigError
from ral_gym.runs.checked_state import array_of


def _rank(mask: np.ndarray) -> np.ndarray:
    """How many codes an episode has drawn before each position: (n, L) bool -> (n, L) int."""
    return mask.cumsum(1) - mask


def _checked_shape(observation_space: spaces.Space, action_space: spaces.Space) -> SequenceShape:
    """See `sequence_shape`.

    Raises:
        ConfigError: spaces of another kind, such as those of a wrapper.
    """
    found = sequence_shape(observation_space, action_space)
    if found is None:
        raise ConfigError(
            "EpisodeRolloutBuffer needs the codes as a ral_gym environment shows them, Box(0, K + 1, (T,)) and "
            f"Discrete(K), not {observation_space} and {action_space}: remove wrappers that change observations, and "
            "make VecNormalize with norm_obs=False"
        )
    return found


class EpisodeStorage(RolloutBuffer):
    """The storage of `EpisodeRolloutBuffer`, which documents it."""

    _columns: tuple[str, ...] = ("_actions", "_rewards", "_values", "_log_probs")  # kept for unfinished episodes

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: torch.device | str = "auto",
        gae_lambda: float = 1.0,
        gamma: float = 0.99,
        n_envs: int = 1,
        levels: Sequence[int] | None = None,
        per_level_discount: bool = True,
        image_gamma: float | None = None,
    ) -> None:
        self._shape = _checked_shape(observation_space, action_space)
        n_codes, length = self._shape.n_codes, self._shape.length
        if buffer_size < n_codes:
            raise ConfigError(
                f"n_steps={buffer_size} cannot hold an episode of {n_codes} codes: choose n_steps >= {n_codes}"
            )
        levels = (n_codes,) if levels is None else tuple(levels)
        if sum(levels) != n_codes:
            raise ConfigError(
                f"levels of {' + '.join(map(str, levels))} codes do not fit observations of {n_codes}: remove a "
                "wrapper that changes observations, such as VecFrameStack"
            )
        self.image_gamma = image_gamma
        self.n_codes, self.per_level_discount = n_codes, per_level_discount and len(levels) > 1
        # The label, which is never drawn, counts as part of the last level.
        self._level = np.repeat(np.arange(len(levels)), (*levels[:-1], levels[-1] + length - n_codes))  # (L,)
        self.not_drawn = self._shape.codebook_size
        self._capacity = buffer_size + n_codes
        self._fill = np.zeros(n_envs, np.int64)
        self._expected = np.full((n_envs, length), -1, np.int16)  # what each row shows next if its episode continues
        self._open = np.zeros(n_envs, bool)
        self._complete, self._after_stop = True, False  # whether the last rollout came to its end
        self._start_envs: list[np.ndarray] = []
        self._start_slots: list[np.ndarray] = []
        self._start_grids: list[np.ndarray] = []
        self._late: list[tuple[np.ndarray, Tensor]] = []  # of every step: slots (E,), values and log-probs (2, E)
        super().__init__(buffer_size, observation_space, action_space, device, gae_lambda, gamma, n_envs)

    def reset(self) -> None:
        """Begin a rollout: forget the finished episodes, keep the unfinished ones."""
        self._after_stop, self._complete = not self._complete, False
        self._receive()
        kept = self._open_episodes()
        envs, slots, grids = kept
        BaseBuffer.reset(self)
        held = self._fill[envs] - slots  # (n,)
        longest = int(held.max(initial=0))
        index = slots[:, None] + np.arange(longest)  # (n, longest)
        columns = np.broadcast_to(envs[:, None], index.shape)
        valid = np.arange(longest) < held[:, None]
        old = {name: getattr(self, name)[index[valid], columns[valid]] for name in self._columns} if len(envs) else {}
        self._allocate()
        places = np.broadcast_to(np.arange(longest), index.shape)[valid]
        for name, values in old.items():
            getattr(self, name)[places, columns[valid]] = values
        self._fill = np.zeros(self.n_envs, np.int64)
        self._fill[envs] = held
        self._start_envs, self._start_slots, self._start_grids = [envs], [np.zeros_like(slots)], [grids]
        self._table: tuple[np.ndarray, ...] | None = None
        self._flat: tuple[np.ndarray, np.ndarray] | None = None
        self._shared: np.ndarray | None = None

    def forget_stop(self) -> None:
        """After a stop, where the environments are reset before the next rollout: all of its steps count."""
        self._complete = True

    def _allocate(self) -> None:
        """Empty storage."""
        shape = (self._capacity, self.n_envs)
        self._actions = np.zeros(shape, np.int32)
        self._rewards, self._values, self._log_probs = (np.zeros(shape, np.float32) for _ in range(3))
        self._returns, self._advantages = np.zeros(shape, np.float32), np.zeros(shape, np.float32)

    def add(
        self,
        obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        episode_start: np.ndarray,
        value: Tensor,
        log_prob: Tensor,
    ) -> None:
        """Add one step of all environments, like SB3's `RolloutBuffer.add`.

        Raises:
            ConfigError: see the class.
        """
        obs, starts, rows = np.asarray(obs), np.asarray(episode_start, bool), np.arange(self.n_envs)
        begins = np.flatnonzero(starts | (obs != self._expected).any(1))
        if len(begins):
            self._resynchronise(obs, starts, begins)
            self._begin(begins, obs[begins])
        codes = np.asarray(action).reshape(-1)
        to_draw = self._expected == self.not_drawn  # (E, L)
        self._expected[rows, to_draw.argmax(1)] = codes
        self._open = to_draw.sum(1) > 1
        at = (self._fill, rows)
        self._actions[at] = codes
        self._rewards[at] = reward
        both = torch.stack([value.detach().flatten(), log_prob.detach().flatten()])  # (2, E)
        self._late.append((self._fill.copy(), both))
        self._fill += 1
        self._table = self._flat = None
        self.pos += 1
        self.full = self.pos == self.buffer_size

    def _receive(self) -> None:
        """Write the values and log-probabilities of all steps since the last call, in one transfer from the device."""
        if self._late:
            late = torch.stack([both for _, both in self._late]).cpu().numpy()  # (S, 2, E)
            for (slots, _), (values, log_probs) in zip(self._late, late, strict=True):
                at = (slots, np.arange(self.n_envs))
                self._values[at], self._log_probs[at] = values, log_probs
            self._late = []

    def _resynchronise(self, obs: np.ndarray, starts: np.ndarray, begins: np.ndarray) -> None:
        """Handle rows that restart before their episode has ended: allowed only at the beginning of a rollout.

        The first observation after a stop is the one before the last step (see the class). The next observation shows
        that its transition is wrong, and it is removed: that observation does not continue it, or the step ended an
        episode of one code, which may differ from the one that was shown.

        Raises:
            ConfigError: it happens later, so the environment causes it.
        """
        lost = begins[~starts[begins] | self._open[begins]]
        if self.pos == 1 and self._after_stop:
            self._fill[begins[~starts[begins] | ~self._open[begins]]] -= 1
        elif self.pos > 0 and len(lost):
            row = int(lost[0])
            if starts[row]:
                left = int((self._expected[row] == self.not_drawn).sum())
                raise ConfigError(
                    f"an episode of environment {row} ended with {left} codes still to draw: remove the time limit "
                    "(TimeLimit, max_episode_steps) or whatever else ends it"
                )
            raise ConfigError(
                f"environment {row} does not show its last observation with the drawn code written in: remove "
                "wrappers that change actions or observations, such as StickyAction"
            )

    def add_round(
        self, obs: np.ndarray, codes: np.ndarray, rewards: np.ndarray, values: np.ndarray, log_probs: np.ndarray
    ) -> None:
        """One whole episode of every environment, all with the same start and stop: the same as stepping through it.

        Args:
            obs: (E, L) the observations that the episodes begin with.
            codes: (E, L) the finished ones.
            rewards: (E,) the terminal rewards, or (E, T) those of every position.
            values: (E, L) value estimates at every position.
            log_probs: (E, L) log-probabilities of the codes.
        """
        drawn = np.flatnonzero(obs[0] == self.not_drawn)  # (L,)
        self._fill[:], self._late = 0, []  # no episode is unfinished
        self._start_envs, self._start_slots, self._start_grids = [], [], []
        self._begin(np.arange(self.n_envs), obs)
        slots = np.arange(len(drawn))
        self._actions[slots] = codes[:, drawn].T
        self._values[slots] = values[:, drawn].T
        self._log_probs[slots] = log_probs[:, drawn].T
        if rewards.ndim == 2:
            self._rewards[slots] = rewards[:, drawn].T
        else:
            self._rewards[len(drawn) - 1] = rewards
        self._fill += len(drawn)
        self.pos += len(drawn)
        self._expected[:], self._open[:] = -1, False

    def _begin(self, envs: np.ndarray, grids: np.ndarray) -> None:
        self._start_envs.append(envs)
        self._start_slots.append(self._fill[envs])
        if not (grids == self.not_drawn).any(1).all():
            raise ConfigError(
                f"an episode begins with nothing to draw (no token {self.not_drawn} in its observation): remove "
                "wrappers that change observations, and make VecNormalize with norm_obs=False"
            )
        self._start_grids.append(grids.astype(np.int32))
        self._expected[envs] = grids
        self._table = self._flat = None

    def _all_episodes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Environment, first slot, first grid and whether it has ended, for every episode, by environment and time."""
        if not self._start_envs:
            empty = np.zeros(0, np.int64)
            return empty, empty, np.zeros((0, self._shape.length), np.int32), np.zeros(0, bool)
        envs, slots = np.concatenate(self._start_envs), np.concatenate(self._start_slots)
        grids = np.concatenate(self._start_grids)
        order = np.lexsort((slots, envs))
        envs, slots, grids = envs[order], slots[order], grids[order]
        limit = self._fill[envs]  # one past the last slot an episode can reach
        limit[:-1] = np.where(envs[1:] == envs[:-1], slots[1:], limit[:-1])
        length = (grids == self.not_drawn).sum(1)
        return envs, slots, grids, slots + length <= limit

    def _open_episodes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The unfinished last episode of every environment that has one."""
        envs, slots, grids, ended = self._all_episodes()
        last = np.ones(len(envs), bool)
        last[:-1] = envs[1:] != envs[:-1]
        keep = last & ~ended
        return envs[keep], slots[keep], grids[keep]

    def _finished(self) -> tuple[np.ndarray, ...]:
        """``(envs, slots, mask, codes, start, stop)`` of the finished episodes; mask (n, L) marks what was drawn."""
        if self._table is None:
            envs, slots, grids, ended = self._all_episodes()
            envs, slots, codes = envs[ended], slots[ended], grids[ended].copy()
            mask = codes == self.not_drawn
            start = mask.argmax(1)
            stop = mask.shape[1] - mask[:, ::-1].argmax(1)
            row, pos = np.nonzero(mask)
            codes[row, pos] = self._actions[slots[row] + _rank(mask)[row, pos], envs[row]]
            self._table = (envs, slots, mask, codes, start, stop)
        return self._table

    def _slots(self) -> tuple[np.ndarray, np.ndarray]:
        """Slot and environment of every finished transition, (N,) each; if there are none, of the unfinished ones."""
        self._receive()
        if self._flat is None:
            envs, slots, mask, *_ = self._finished()
            if not len(envs):
                envs, slots, mask = self._unfinished()[:3]
            row, pos = np.nonzero(mask)
            self._flat = slots[row] + _rank(mask)[row, pos], envs[row]
        return self._flat

    def _unfinished(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """``(envs, slots, mask, codes)`` of the unfinished episodes as far as they were drawn."""
        envs, slots, grids = self._open_episodes()
        left = grids == self.not_drawn  # (n, L)
        mask = left & (_rank(left) < (self._fill[envs] - slots)[:, None])
        row, pos = np.nonzero(mask)
        codes = grids.copy()
        codes[row, pos] = self._actions[slots[row] + _rank(mask)[row, pos], envs[row]]
        return envs, slots, mask, codes

    def state_dict(self) -> dict[str, Any]:
        """The unfinished episodes at the beginning of a rollout, for a checkpoint."""
        self._receive()
        longest = int(self._fill.max(initial=0))
        arrays = {name: getattr(self, name)[:longest] for name in self._columns}
        envs, slots, grids = self._open_episodes()
        return {"fill": self._fill, "arrays": arrays, "envs": envs, "slots": slots, "grids": grids}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`; the next `reset` keeps it.

        Raises:
            ValueError: another buffer's, or it does not fit together.
        """
        fill = array_of(state["fill"], "fill", (self.n_envs,), np.int64, 0, self._capacity)
        longest, n, length = int(fill.max(initial=0)), len(state["envs"]), self._shape.length
        envs = array_of(state["envs"], "envs", (n,), np.int64, 0, self.n_envs - 1)
        slots = array_of(state["slots"], "slots", (n,), np.int64, 0, longest)
        grids = array_of(state["grids"], "grids", (n, length), np.int32, 0, self._shape.largest_entry)
        drawn = fill[envs] - slots
        if len(set(envs.tolist())) < n or not ((drawn >= 0) & (drawn < (grids == self.not_drawn).sum(1))).all():
            raise ValueError("the episodes in the buffer do not fit together")
        shape = (longest, self.n_envs)
        arrays = {
            name: array_of(state["arrays"][name], name, shape, getattr(self, name).dtype, 0, self.not_drawn - 1)
            for name in self._columns
        }
        self._late = []
        for name, values in arrays.items():
            getattr(self, name)[:longest] = values
        self._fill, self._start_envs, self._start_slots, self._start_grids = fill, [envs], [slots], [grids]
        self._table = self._flat = None
        envs, _, _, codes = self._unfinished()
        self._expected[:], self._open[:] = -1, False
        self._expected[envs], self._open[envs] = codes, True
