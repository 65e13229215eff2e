"""The generation MDP, E episodes at once.

State: the codes so far. Action: the next code in raster order. An episode ends with its last code; only then is there
an image, a score map and a reward. The single environment, the vector environment and the Stable-Baselines3 adapter
are thin covers over this one class, so they cannot drift apart.

Actions come and observations go as NumPy arrays, so the bookkeeping is NumPy: a step moves nothing between devices.
Torch comes in when episodes end: their codes go to the world's device in one transfer, are decoded and scored there in
one batch, and the scores come back in one.

Shapes: E environments, T codes, H rows, W columns, K codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium.error import ResetNeeded
from torch import Tensor

from ral_gym.envs.resets import StartDistribution, StartRequest, parse_options
from ral_gym.envs.worlds import World

Options = Mapping[str, Any] | Sequence[Mapping[str, Any] | None]
"""The options of ``reset``: one mapping for all rows, or one per row."""


@dataclass(frozen=True)
class Finished:
    """Episodes that have just ended.

    Attributes:
        rows: (n,) which environments.
        codes: (n, T) int16, with K + 1 where an episode never drew.
        score_map: (n, h, w) float32, 0 below the last drawn row; None without a scorer.
        step_rewards: (n, T) float32, 0 at given and never drawn positions.
        rewards: (n,) float32, the sum over an episode's drawn positions.
        start: (n,) first drawn position.
        stop: (n,) one past the last.
    """

    rows: np.ndarray
    codes: np.ndarray
    score_map: np.ndarray | None
    step_rewards: np.ndarray
    rewards: np.ndarray
    start: np.ndarray
    stop: np.ndarray


class GenerationCore:
    """E generation episodes.

    Args:
        world: what to draw in.
        num_envs: E.
        reset_mode: `full`, `continue`, `scratch` or `mixed`.
        lockstep: one mode and row count per round for all rows alike (the paper's "during each roll-out"), so that all
            rows stay at one position; False: each row draws its own.
        paired: see `StartDistribution`.

    Attributes:
        codes: (E, T) int16, the observations.
        start: (E,) int64, first position that the row's episode draws.
        position: (E,) int64, the next position to draw.
        stop: (E,) int64, one past the last position to draw; 0: not reset yet.

    Raises:
        ValueError: no environment, or see `StartDistribution`.
    """

    def __init__(
        self,
        world: World,
        num_envs: int,
        *,
        reset_mode: str = "full",
        lockstep: bool = False,
        paired: bool = False,
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs={num_envs}: at least 1 environment is needed")
        self.world, self.grid, self.num_envs, self.lockstep = world, world.grid, num_envs, lockstep
        n_images = 0 if world.real_codes is None else len(world.real_codes)
        self.distribution = StartDistribution(
            world.grid, reset_mode, n_images=n_images, row_multiple=world.row_multiple, paired=paired
        )
        self.rngs = [np.random.default_rng() for _ in range(num_envs)]
        self.codes = np.full((num_envs, world.grid.n_codes), world.grid.not_drawn, np.int16)
        self.start = np.zeros(num_envs, np.int64)
        self.position = np.zeros(num_envs, np.int64)
        self.stop = np.zeros(num_envs, np.int64)
        self._pending = np.zeros(num_envs, np.int64)
        self._rows = np.arange(num_envs)
        self._columns = np.arange(world.grid.n_codes)

    @property
    def device(self) -> torch.device:
        """Where images are decoded and scored."""
        return self.world.device

    def check_options(self, options: Options | None, n: int | None = None) -> list[StartRequest]:
        """What `reset` with these options would ask for, one request per row; changes nothing.

        Args:
            options: for all rows, or one per row.
            n: how many rows; None: E.

        Raises:
            ValueError: wrong options; says what is allowed.
        """
        n = self.num_envs if n is None else n
        if options is None or isinstance(options, Mapping):
            return [parse_options(options or {}, self.distribution)] * n
        if len(options) != n:
            raise ValueError(f"options for {len(options)} environments: give one mapping, or a list of {n}")
        return [parse_options(one or {}, self.distribution) for one in options]

    def reset(
        self, rows: np.ndarray, options: Options | None = None, seeds: Sequence[int | None] | None = None
    ) -> None:
        """Start new episodes.

        The second half of a complementary pair comes only to a row that has finished the first half; seeds, options
        and a reset in the middle of an episode begin a new pair.

        Args:
            rows: (n,) which environments.
            options: the options of ``reset``, for all of them or one mapping per row.
            seeds: n new seeds, None for a row that keeps its generator.

        Raises:
            ValueError: wrong options or seeds; nothing has changed then.
        """
        requests = self.check_options(options, len(rows))
        seeds = [None] * len(rows) if seeds is None else seeds
        if len(seeds) != len(rows):
            raise ValueError(f"{len(seeds)} seeds for {len(rows)} environments: give one each")
        for row, rng in [(row, np.random.default_rng(s)) for row, s in zip(rows, seeds, strict=True) if s is not None]:
            self.rngs[row] = rng
        goes_on = (self.stop[rows] > 0) & (self.position[rows] == self.stop[rows]) & (not options)
        self._pending[rows] *= goes_on & np.array([seed is None for seed in seeds])
        self.codes[rows] = self.grid.not_drawn
        for number, row in enumerate(rows):
            self._start_episode(row, rows[0], requests[number], requests[number] is requests[0])
        self.position[rows] = self.start[rows]
        self.codes[rows] = np.where(self._columns < self.stop[rows, None], self.codes[rows], self.grid.never_drawn)

    def _start_episode(self, row: int, first: int, request: StartRequest, alike: bool) -> None:
        """Draw one row's start; in lockstep, rows `alike` follow the first row of this reset."""
        width = self.grid.width
        if request.codes is not None and request.stop_rows is not None:
            self.start[row], self.stop[row] = len(request.codes), request.stop_rows * width
            self.codes[row, : len(request.codes)] = request.codes
            return
        rng = self.rngs[row]
        if row != first and self.lockstep and alike:
            prefix, stop = int(self.start[first]) // width, int(self.stop[first]) // width
            self._pending[row] = self._pending[first]
        else:
            prefix, stop, self._pending[row] = self.distribution.draw_requested(request, rng, int(self._pending[row]))
        self.start[row], self.stop[row] = prefix * width, stop * width
        if prefix and self.world.real_codes is not None:
            image = self.distribution.draw_image(rng) if request.image_index is None else request.image_index
            self.codes[row, : prefix * width] = self.world.real_codes[image, : prefix * width]

    def step(self, actions: np.ndarray | Tensor, rows: np.ndarray | None = None) -> Finished | None:
        """Write one code into every running episode.

        Args:
            actions: (E,) integer codes in 0..K-1.
            rows: (n,) which environments step; the actions of the others are ignored. None: all.

        Returns:
            the episodes that ended with this code, scored, or None.

        Raises:
            ValueError: wrong actions; nothing has changed then.
            gymnasium.error.ResetNeeded: a row has no running episode; nothing has changed then.
        """
        codes = self._checked_actions(actions)
        if rows is None:
            rows = self._rows
        position = self.position[rows]
        stop = self.stop[rows]
        if (position >= stop).any():
            raise _reset_needed(rows[position >= stop])
        self.codes[rows, position] = codes[rows]
        position += 1
        self.position[rows] = position
        ended = rows[position == stop]
        return self.finish(ended) if len(ended) else None

    def _checked_actions(self, actions: np.ndarray | Tensor) -> np.ndarray:
        """The actions as an (E,) integer array."""
        array = actions.cpu().numpy() if isinstance(actions, Tensor) else np.asarray(actions)
        highest = self.grid.codebook_size - 1
        if array.shape != (self.num_envs,) or array.dtype.kind not in "iu":
            raise ValueError(
                f"actions of shape {array.shape} and dtype {array.dtype}: give {self.num_envs} integers in "
                f"0..{highest}, one per environment"
            )
        if array.min() < 0 or array.max() > highest:
            row = int(np.argmax((array < 0) | (array > highest)))
            raise ValueError(f"action {array[row]} of environment {row} is not a code: give an integer in 0..{highest}")
        return array

    def draw_round(self, codes: np.ndarray | Tensor) -> Finished:
        """Finish every episode with the codes of whole images: the same as stepping through every code.

        Args:
            codes: (E, T) integer; only the positions that the running episodes still have to draw are taken.

        Raises:
            ValueError: another shape or dtype, or no code at a position to draw; nothing has changed then.
            gymnasium.error.ResetNeeded: a row has no running episode; nothing has changed then.
        """
        array = codes.cpu().numpy() if isinstance(codes, Tensor) else np.asarray(codes)
        if array.shape != self.codes.shape or array.dtype.kind not in "iu":
            raise ValueError(f"codes of shape {array.shape} and dtype {array.dtype}: give integers {self.codes.shape}")
        if (self.position >= self.stop).any():
            raise _reset_needed(self._rows[self.position >= self.stop])
        to_draw = (self._columns >= self.position[:, None]) & (self._columns < self.stop[:, None])  # (E, T)
        drawn = array[to_draw]
        if drawn.min() < 0 or drawn.max() >= self.grid.codebook_size:
            raise ValueError(f"codes lie in {drawn.min()}..{drawn.max()}: choose 0..{self.grid.codebook_size - 1}")
        self.codes[to_draw] = drawn
        self.position[:] = self.stop
        return self.finish(self._rows)

    def finish(self, rows: np.ndarray) -> Finished:
        """Score finished episodes: one call of the scorer per distinct image height.

        Args:
            rows: (n,) environments whose episode has ended.
        """
        codes, start, stop = self.codes[rows], self.start[rows], self.stop[rows]  # (n, T), (n,), (n,)
        rewards = np.zeros(codes.shape, np.float32)  # (n, T)
        score_map: np.ndarray | None = None
        if self.world.scorer is not None:
            for length in np.unique(stop):
                same = np.flatnonzero(stop == length)
                scores, rewards[same, :length] = self._score(codes[same, :length])  # (m, r, w)
                if score_map is None:
                    map_rows = scores.shape[1] * self.grid.n_codes // length
                    score_map = np.zeros((len(rows), map_rows, scores.shape[2]), np.float32)
                score_map[same, : scores.shape[1]] = scores
            rewards *= self._columns >= start[:, None]
        return Finished(rows.copy(), codes, score_map, rewards, rewards.sum(1), start, stop)

    def _score(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes (m, length) -> score map (m, r, w), step rewards (m, length): one transfer each way."""
        assert self.world.scorer is not None
        score_map, step_rewards = self.world.scorer(torch.from_numpy(codes).to(self.device).long())
        flat = torch.cat([score_map.flatten(1), step_rewards], 1).float().cpu().numpy()  # (m, r * w + length)
        cells = flat.shape[1] - codes.shape[1]
        return flat[:, :cells].reshape(score_map.shape), flat[:, cells:]

    def observations(self) -> np.ndarray:
        """The codes of all rows, (E, T) int16, a fresh array."""
        return self.codes.copy()

    def action_masks(self) -> np.ndarray:
        """(K,) bool, the same for every row: every code may follow every other."""
        return np.ones(self.grid.codebook_size, bool)

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything a continued run needs, random generators included."""
        return {
            "codes": self.codes.copy(),
            "start": self.start.copy(),
            "position": self.position.copy(),
            "stop": self.stop.copy(),
            "pending": self._pending.copy(),
            "rngs": [rng.bit_generator.state for rng in self.rngs],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: it comes from another number of environments or another grid; nothing has changed then.
        """
        shape = np.shape(state["codes"])
        if shape != self.codes.shape or len(state["rngs"]) != self.num_envs:
            raise ValueError(f"the state has {shape} codes (environments, T), these environments {self.codes.shape}")
        for name in ("start", "position", "stop"):
            setattr(self, name, np.array(state[name], np.int64))
        self.codes = np.array(state["codes"], np.int16)
        self._pending = np.array(state["pending"], np.int64)
        for rng, bits in zip(self.rngs, state["rngs"], strict=True):
            rng.bit_generator.state = bits


def _reset_needed(rows: np.ndarray) -> ResetNeeded:
    return ResetNeeded(
        f"environments {rows[:8].tolist()}{' and more' if len(rows) > 8 else ''} have no running episode: call reset() "
        "before drawing in them"
    )
