"""A rollout as whole images: the buffer that makes Stable-Baselines3 train a sequence model at sequence speed.

SB3's algorithms hand ``samples.observations`` to the policy untouched, so it may be any object. Here it is `Episodes`:
code grids, and which position of which grid each transition is. One teacher-forced pass over B grids then gives the
log-probabilities of all their transitions, where the stock buffer would need one pass per transition.

Only each episode's first grid and its actions are stored; the grids in between follow from them.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer, RolloutBuffer
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from torch import Tensor

from ral_gym.errors import ConfigError


def _rank(mask: np.ndarray) -> np.ndarray:
    """How many codes an episode has drawn before each position: (n, T) bool -> (n, T) int."""
    return mask.cumsum(1) - mask


class Episodes:
    """Transitions that share code grids.

    Attributes:
        codes: (B, T) int64 sequences as known at their episode's end, with the tokens K and K + 1.
        row: (N,) int64, which grid a transition belongs to.
        pos: (N,) int64, which position of it the transition drew.
        length: how many codes the largest of the images has, given ones included.
    """

    def __init__(self, codes: Tensor, row: Tensor, pos: Tensor, length: int) -> None:
        self.codes, self.row, self.pos, self.length = codes, row, pos, length

    def __len__(self) -> int:
        """N, the number of transitions."""
        return len(self.row)

    def __getitem__(self, index: slice) -> Episodes:
        """Some of the transitions of the same grids (TRPO's sub-sampling)."""
        return Episodes(self.codes, self.row[index], self.pos[index], self.length)


class EpisodeRolloutBuffer(RolloutBuffer):
    """Drop-in ``rollout_buffer_class`` for PPO, A2C, TRPO and `Reinforce` on the generation MDP.

    An episode whose reward has not come yet when the rollout ends is held back until the rollout in which it ends, so
    that only finished episodes are ever learnt from. `values`, `returns`, `advantages` and `rewards` are 1-D arrays
    over the transitions of the finished episodes, episode by episode, in the order of drawing. Codes given as a
    prefix are no transitions.

    With two levels (top codes, then bottom codes) the discount counts per level by default: each level is discounted
    as an episode of its own, and a terminal reward, the whole image's, ends both. Over the 1,280 codes of 16 x 16 and
    32 x 32 maps a gamma of 0.99 would otherwise show the top codes 2.6e-6 of it.

    Args:
        buffer_size: steps per environment and rollout (`n_steps`); must hold a whole episode, T.
        observation_space: ``Box(0, K + 1, (T,), int16)``.
        action_space: ``Discrete(K)``.
        device: where samples go.
        gae_lambda: lambda of generalised advantage estimation; 1: Monte Carlo returns minus values.
        gamma: discount.
        n_envs: E.
        levels: how many codes each level has; None: all are one level.
        per_level_discount: with two levels, discount each as an episode of its own; False: one discount throughout.

    Raises:
        ConfigError: `buffer_size` < T, or spaces of another kind.
    """

    _columns: tuple[str, ...] = ("_actions", "_rewards", "_values", "_log_probs")  # what an unfinished episode keeps

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
    ) -> None:
        if not isinstance(action_space, spaces.Discrete) or not isinstance(observation_space, spaces.Box):
            raise ConfigError(
                f"EpisodeRolloutBuffer needs a ral_gym environment (Box codes, Discrete actions), not "
                f"{observation_space} and {action_space}"
            )
        n_codes = int(observation_space.shape[0])
        if buffer_size < n_codes:
            raise ConfigError(
                f"n_steps={buffer_size} cannot hold an episode of {n_codes} codes: choose n_steps >= {n_codes}"
            )
        levels = (n_codes,) if levels is None else tuple(levels)
        if sum(levels) != n_codes:
            raise ConfigError(f"levels of {' + '.join(map(str, levels))} codes do not fit observations of {n_codes}")
        self.n_codes, self.per_level_discount = n_codes, per_level_discount and len(levels) > 1
        self._level = np.repeat(np.arange(len(levels)), levels)  # (T,)
        self.not_drawn = int(action_space.n)
        self._capacity = buffer_size + n_codes
        self._fill = np.zeros(n_envs, np.int64)
        self._start_envs: list[np.ndarray] = []
        self._start_slots: list[np.ndarray] = []
        self._start_grids: list[np.ndarray] = []
        super().__init__(buffer_size, observation_space, action_space, device, gae_lambda, gamma, n_envs)

    def reset(self) -> None:
        """Begin a rollout: forget the finished episodes, keep the unfinished ones."""
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
        self._shared: np.ndarray | None = None

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
        """One step of all environments, as SB3's `RolloutBuffer.add`."""
        begins = np.flatnonzero(episode_start)
        if len(begins):
            self._begin(begins, np.asarray(obs)[begins])
        at = (self._fill, np.arange(self.n_envs))
        self._actions[at] = np.asarray(action).reshape(-1)
        self._rewards[at] = reward
        both = torch.stack([value.detach().flatten(), log_prob.detach().flatten()])  # one transfer from the device
        self._values[at], self._log_probs[at] = both.cpu().numpy()
        self._fill += 1
        self.pos += 1
        self.full = self.pos == self.buffer_size

    def add_round(
        self, obs: np.ndarray, codes: np.ndarray, rewards: np.ndarray, values: np.ndarray, log_probs: np.ndarray
    ) -> None:
        """One whole episode of every environment, all with the same start and stop: the same as stepping through it.

        Args:
            obs: (E, T) the grids the episodes begin with.
            codes: (E, T) the finished grids.
            rewards: (E,) the terminal rewards, or (E, T) those of every position.
            values: (E, T) value estimates at every position.
            log_probs: (E, T) log-probabilities of the codes.
        """
        drawn = np.flatnonzero(obs[0] == self.not_drawn)  # (L,)
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

    def _begin(self, envs: np.ndarray, grids: np.ndarray) -> None:
        self._start_envs.append(envs)
        self._start_slots.append(self._fill[envs])
        self._start_grids.append(grids.astype(np.int32))
        self._table = None

    def _all_episodes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Environment, first slot, first grid and whether it has ended, for every episode, by environment and time."""
        if not self._start_envs:
            empty = np.zeros(0, np.int64)
            return empty, empty, np.zeros((0, self.n_codes), np.int32), np.zeros(0, bool)
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
        """``(envs, slots, mask, codes, start, stop)`` of the finished episodes; mask (n, T) marks what was drawn."""
        if self._table is None:
            envs, slots, grids, ended = self._all_episodes()
            envs, slots, codes = envs[ended], slots[ended], grids[ended].copy()
            mask = codes == self.not_drawn
            start = mask.argmax(1)
            stop = self.n_codes - mask[:, ::-1].argmax(1)
            row, pos = np.nonzero(mask)
            codes[row, pos] = self._actions[slots[row] + _rank(mask)[row, pos], envs[row]]
            self._table = (envs, slots, mask, codes, start, stop)
        return self._table

    def _slots(self) -> tuple[np.ndarray, np.ndarray]:
        """Slot and environment of every finished transition, (N,) each."""
        envs, slots, mask, *_ = self._finished()
        row, pos = np.nonzero(mask)
        return slots[row] + _rank(mask)[row, pos], envs[row]

    @property
    def episode_envs(self) -> np.ndarray:
        """(n,) which environment each finished episode belongs to."""
        return self._finished()[0]

    @property
    def mask(self) -> np.ndarray:
        """(n, T) bool: the positions that the finished episodes drew."""
        return self._finished()[2]

    @property
    def codes(self) -> np.ndarray:
        """(n, T) int32 grids of the finished episodes, K + 1 where an episode never drew."""
        return self._finished()[3]

    @property
    def start(self) -> np.ndarray:
        """(n,) first position drawn."""
        return self._finished()[4]

    @property
    def stop(self) -> np.ndarray:
        """(n,) one past the last position drawn."""
        return self._finished()[5]

    @property
    def lengths(self) -> np.ndarray:
        """(n,) how many codes each finished episode drew."""
        return self.mask.sum(1)

    @property
    def values(self) -> np.ndarray:  # type: ignore[override]
        """(N,) value estimates."""
        return self._values[self._slots()]

    @property
    def rewards(self) -> np.ndarray:  # type: ignore[override]
        """(N,) rewards."""
        return self._rewards[self._slots()]

    @property
    def log_probs(self) -> np.ndarray:  # type: ignore[override]
        """(N,) log-probabilities at the time of drawing."""
        return self._log_probs[self._slots()]

    @property
    def returns(self) -> np.ndarray:  # type: ignore[override]
        """(N,) returns: advantages + values."""
        return self._returns[self._slots()]

    @property
    def advantages(self) -> np.ndarray:  # type: ignore[override]
        """(N,) advantages."""
        return self._advantages[self._slots()]

    def write_rewards(self, rewards: np.ndarray) -> None:
        """Replace the rewards of the finished episodes; call `compute_returns_and_advantage` afterwards.

        Args:
            rewards: (n, T) one per position; only drawn positions are taken.
        """
        self._shared = self._image_rewards(rewards)
        self._rewards[self._slots()] = rewards[self.mask]

    def add_rewards(self, rewards: np.ndarray) -> None:
        """Add something to the reward of every code, such as a penalty; else as `write_rewards`."""
        mask = self.mask
        if self._shared is None:
            before = np.zeros(mask.shape, np.float32)
            before[mask] = self.rewards
            self._shared = self._image_rewards(before)
        self._rewards[self._slots()] += rewards[mask]

    def compute_returns_and_advantage(self, last_values: Tensor | None = None, dones: np.ndarray | None = None) -> None:
        """Generalised advantage estimation inside every finished episode.

        Both arguments are SB3's and unused: a finished episode needs no bootstrap.
        """
        mask = self.mask
        rewards, values = np.zeros(mask.shape, np.float32), np.zeros(mask.shape, np.float32)
        rewards[mask], values[mask] = self.rewards, self.values
        advantages = np.zeros(mask.shape, np.float32)
        later, next_value = np.zeros(len(mask), np.float32), np.zeros(len(mask), np.float32)  # of the next code drawn
        following = np.full(len(mask), -1)  # its level
        shared = self._image_rewards(rewards) if self._shared is None else self._shared
        for t in reversed(range(self.n_codes)):
            drawn = mask[:, t]
            if self.per_level_discount:  # a level's last code ends an episode, and earns what the image earned
                ends = drawn & (following > self._level[t])
                rewards[:, t] += np.where(ends, shared, 0)
                later, next_value = np.where(ends, 0, later), np.where(ends, 0, next_value)
            delta = rewards[:, t] + self.gamma * next_value - values[:, t]
            advantages[:, t] = np.where(drawn, delta + self.gamma * self.gae_lambda * later, 0)
            later = np.where(drawn, advantages[:, t], later)
            next_value = np.where(drawn, values[:, t], next_value)
            following = np.where(drawn, self._level[t], following)
        self._advantages[self._slots()] = advantages[mask]
        self._returns[self._slots()] = (advantages + values)[mask]

    def _image_rewards(self, rewards: np.ndarray) -> np.ndarray:
        """(n,) rewards of whole images: an episode's last one where it has no other, else 0 (codes have their own)."""
        last = rewards[np.arange(len(rewards)), self.stop - 1]
        alone = (np.where(self.mask, rewards, 0) != 0).sum(1) <= 1
        return np.where(alone, last, 0)

    def episodes(self, rows: np.ndarray | None = None) -> Episodes:
        """The finished episodes (or some of them) as the policy's input, in order."""
        rows = np.arange(len(self.codes)) if rows is None else rows
        row, pos = np.nonzero(self.mask[rows])
        return Episodes(
            self.to_torch(self.codes[rows].astype(np.int64)),
            self.to_torch(row),
            self.to_torch(pos),
            int((self.codes[rows] <= self.not_drawn).sum(1).max(initial=0)),
        )

    def get(self, batch_size: int | None = None) -> Generator[RolloutBufferSamples, None, None]:
        """Minibatches of whole episodes in random order, each of at least `batch_size` transitions; the last: the rest.

        Args:
            batch_size: transitions; None: everything at once.
        """
        lengths = self.lengths  # (n,)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        order = np.random.permutation(len(lengths))
        done = np.cumsum(lengths[order])
        first = 0
        while first < len(order):
            before = done[first - 1] if first else 0
            wanted = done[-1] if batch_size is None else before + batch_size
            last = min(int(np.searchsorted(done, wanted)) + 1, len(order))
            rows = order[first:last]
            flat = np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in rows])
            yield self._samples(rows, flat)
            first = last

    def _samples(self, rows: np.ndarray, flat: np.ndarray) -> RolloutBufferSamples:
        slots, envs = self._slots()
        at = (slots[flat], envs[flat])
        return RolloutBufferSamples(
            observations=self.episodes(rows),  # type: ignore[arg-type]
            actions=self.to_torch(self._actions[at].astype(np.float32)[:, None]),
            old_values=self.to_torch(self._values[at]),
            old_log_prob=self.to_torch(self._log_probs[at]),
            advantages=self.to_torch(self._advantages[at]),
            returns=self.to_torch(self._returns[at]),
        )

    def state_dict(self) -> dict[str, Any]:
        """The unfinished episodes at the beginning of a rollout, for a checkpoint."""
        longest = int(self._fill.max(initial=0))
        arrays = {name: getattr(self, name)[:longest] for name in self._columns}
        envs, slots, grids = self._open_episodes()
        return {"fill": self._fill, "arrays": arrays, "envs": envs, "slots": slots, "grids": grids}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; the next `reset` keeps it."""
        self._fill = np.array(state["fill"])
        for name, values in state["arrays"].items():
            getattr(self, name)[: len(values)] = values
        self._start_envs, self._start_slots = [np.array(state["envs"])], [np.array(state["slots"])]
        self._start_grids = [np.array(state["grids"])]
        self._table = None
