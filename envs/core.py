"""The generation MDP, E episodes at once.

State: the codes so far. Action: the next code in raster order. An episode ends with its last code; only then is there
an image, a score map and a reward. The single environment, the vector environment and the Stable-Baselines3 adapter are
thin wrappers around this one class, so they cannot drift apart.

Actions and observations are NumPy arrays, so the bookkeeping is in NumPy: a step moves nothing between devices. Torch
is used when episodes end: their codes go to the world's device in one transfer, are decoded and scored there in one
batch, and the scores come back in one transfer.

With two levels an episode draws the top codes, then the bottom codes. Rows are rows of the top grid and include the
bottom rows under them, so an episode may draw two separate parts of the sequence: the positions that hold the token K.

With classes an observation ends with the class of its image, given from the first step on: its label. It is part of
the state, since rewards and the policy depend on it, and never drawn.

Shapes: E environments, T codes, H rows, W columns, K codes, L entries of an observation: T, or T + 1 with a label.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.error import ResetNeeded
from torch import Tensor

from ral_gym.envs.core_state import checked_arrays
from ral_gym.envs.finished import Finished
from ral_gym.envs.follower import Followers
from ral_gym.envs.labels import LabelDistribution
from ral_gym.envs.resets import Options, StartDistribution, StartRequest, parse_requests
from ral_gym.envs.worlds import World


class GenerationCore:
    """E generation episodes.

    Args:
        world: what to draw in.
        num_envs: E.
        reset_mode: `full`, `continue`, `scratch` or `mixed`.
        lockstep: one mode and row count per round for all rows (the paper's "during each roll-out"), so that all rows
            stay at the same position; False: each row draws its own.
        paired: see `StartDistribution`.
        label_draw: see `LabelDistribution`.

    Attributes:
        codes: (E, L) int16, the observations.
        start: (E,) int64, first position that the row's episode draws.
        position: (E,) int64, the next position to draw.
        stop: (E,) int64, one past the last position to draw; 0: not reset yet.
        image_rows: (E,) int64, rows that the row's image will have.
        to_draw: (E, L) bool, the positions that the row's episode draws, from its start on.
        rewards: (E,) float32, each row's reward of the last `step` or `draw_round`.
        asked: per row the start that `reset(options=...)` requested, as a comparable key; None: nothing.

    Raises:
        ValueError: `num_envs` is below 1, or see `StartDistribution` and `LabelDistribution`.
    """

    def __init__(
        self,
        world: World,
        num_envs: int,
        *,
        reset_mode: str = "full",
        lockstep: bool = False,
        paired: bool = False,
        label_draw: str = "uniform",
    ) -> None:
        if not isinstance(num_envs, int | np.integer) or num_envs < 1:
            raise ValueError(f"num_envs={num_envs!r}: give the number of environments, 1 or more")
        self.world, self.grid, self.num_envs, self.lockstep = world, world.grid, num_envs, lockstep
        n_images = 0 if world.real_codes is None else len(world.real_codes)
        self.labels = LabelDistribution(world.grid, world.real_codes, world.class_names, label_draw)
        self.distribution = StartDistribution(
            world.grid,
            reset_mode,
            n_images=n_images,
            row_multiple=world.row_multiple,
            paired=paired,
            labels=self.labels,
        )
        self.rngs = [np.random.default_rng() for _ in range(num_envs)]
        self.codes = np.full((num_envs, world.grid.length), world.grid.not_drawn, np.int16)
        self.start = np.zeros(num_envs, np.int64)
        self.position = np.zeros(num_envs, np.int64)
        self.stop = np.zeros(num_envs, np.int64)
        self.image_rows = np.zeros(num_envs, np.int64)
        self.to_draw = np.zeros(self.codes.shape, bool)
        self.rewards = np.zeros(num_envs, np.float32)
        self._paid = np.zeros((num_envs, world.grid.n_codes), np.float32)  # with an oracle: each code's reward so far
        self._followers = Followers(world, num_envs)
        self._pending = np.zeros(num_envs, np.int64)
        self.asked: list[Hashable] = [None] * num_envs
        self._rows = np.arange(num_envs)
        self._masks = {rows: world.grid.mask(0, rows) for rows in range(world.grid.height + 1)}  # (L,) each

    @property
    def device(self) -> torch.device:
        """Where images are decoded and scored."""
        return self.world.device

    def check_options(self, options: Options | None, n: int | None = None) -> list[StartRequest]:
        """The start requests, one per row, that `reset` with these options would make; changes nothing.

        Args:
            options: for all rows, or one per row.
            n: how many rows; None: E.

        Raises:
            ValueError: wrong options; says what is allowed.
        """
        return parse_requests(options, self.num_envs if n is None else n, self.distribution)

    def reset(
        self, rows: np.ndarray, options: Options | None = None, seeds: Sequence[int | None] | None = None
    ) -> None:
        """Start new episodes.

        A row gets the second half of a complementary pair only if it has finished the first half; seeds, options and a
        reset in the middle of an episode begin a new pair.

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
        first: tuple[int, int] | None = None
        for number, row in enumerate(rows):
            alike = first if self.lockstep and requests[number] is requests[0] else None
            drawn = self._start_episode(row, requests[number], alike, self._pending[rows[0]])
            self.asked[row] = requests[number].key if options else None
            first = drawn if number == 0 else first
        self.to_draw[rows] = to_draw = self.codes[rows] == self.grid.not_drawn  # (n, L)
        self.position[rows] = self.start[rows] = to_draw.argmax(1)
        self.stop[rows] = to_draw.shape[1] - to_draw[:, ::-1].argmax(1)
        self._paid[rows] = 0
        self._followers.restart(rows)

    def _start_episode(
        self, row: int, request: StartRequest, alike: tuple[int, int] | None, pending: int
    ) -> tuple[int, int] | None:
        """Write one row's first grid.

        Args:
            row: index of the row.
            request: the requested start.
            alike: in lockstep, the prefix and stop rows of this reset's first row; None: draw them.
            pending: that of the first row, if `alike` is given.

        Returns:
            the row's prefix and stop rows; None if the request gave the codes.
        """
        rng, label = self.rngs[row], request.label
        if request.codes is not None and request.stop_rows is not None:
            self.codes[row], self.image_rows[row] = request.codes, request.stop_rows
            self._write_label(row, label)
            return None
        if alike is not None:
            (prefix, stop), self._pending[row] = alike, pending
        else:
            prefix, stop, self._pending[row] = self.distribution.draw_requested(request, rng, int(self._pending[row]))
        self.image_rows[row] = stop
        self.codes[row] = np.where(self._masks[stop], self.grid.not_drawn, self.grid.never_drawn)
        if prefix and self.world.real_codes is not None:
            image = self.distribution.draw_image(rng, label) if request.image_index is None else request.image_index
            given = self._masks[prefix]
            self.codes[row, given] = self.world.real_codes[image, given]
            label = self.labels.of_image(image) if label is None else label
        self._write_label(row, label)
        return prefix, stop

    def _write_label(self, row: int, label: int | None) -> None:
        """Write the class of a row's image, drawn if it is None; without classes nothing happens."""
        if self.grid.classes:
            label = self.labels.draw(self.rngs[row]) if label is None else label
            self.codes[row, -1] = self.grid.first_label + label

    def labels_of(self, rows: np.ndarray) -> np.ndarray | None:
        """The classes (n,) int64 of the images of rows (n,); None without classes."""
        return self.grid.labels_of(self.codes[rows].astype(np.int64))

    @property
    def starts_differ(self) -> bool:
        """Whether the rows' episodes may have begun from different observations, drawn or requested per row."""
        drawn = self.distribution.mode in ("continue", "mixed") or self.grid.classes > 0
        return drawn or any(key is not None for key in self.asked)

    def share_starts(self, leaders: np.ndarray) -> None:
        """Let every row begin like its leader; no code may have been drawn yet.

        Args:
            leaders: (E,) int64, the row whose start each row copies; a row that leads itself keeps its start.
        """
        names = ("codes", "start", "position", "stop", "image_rows", "to_draw", "_pending", "_paid")
        for name in names:
            setattr(self, name, getattr(self, name)[leaders])
        self.asked = [self.asked[leader] for leader in leaders]
        self._followers.restart(self._rows)

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
        self.rewards = self._pay(codes, rows)
        self._followers.advance(codes)
        self.codes[rows, position] = codes[rows]
        position += 1
        if self.grid.levels > 1:  # skip the given rows of the next level
            gap = np.flatnonzero(
                (position < stop) & (self.codes[rows, position - (position == stop)] != self.grid.not_drawn)
            )
            position[gap] = (self.codes[rows[gap]] == self.grid.not_drawn).argmax(1)
        self.position[rows] = position
        ended = rows[position == stop]
        if not len(ended):
            return None
        finished = self.finish(ended)
        self.rewards[ended] = finished.rewards
        return finished

    def _pay(self, codes: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The rewards (E,) of the codes that these rows draw next: their log-probabilities, or 0 without an oracle."""
        rewards = np.zeros(self.num_envs, np.float32)
        if self.world.oracle is not None:
            rewards[rows] = self._followers.log_probs(self.codes, self.position, codes)[rows]
            self._paid[rows, self.position[rows]] = rewards[rows]
        return rewards

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
            codes: (E, L) integer; only positions that the running episodes still have to draw are used.

        Raises:
            ValueError: another shape or dtype, or no code at a position to draw; nothing has changed then.
            gymnasium.error.ResetNeeded: a row has no running episode; nothing has changed then.
        """
        array = codes.cpu().numpy() if isinstance(codes, Tensor) else np.asarray(codes)
        if array.shape != self.codes.shape or array.dtype.kind not in "iu":
            raise ValueError(f"codes of shape {array.shape} and dtype {array.dtype}: give integers {self.codes.shape}")
        if (self.position >= self.stop).any():
            raise _reset_needed(self._rows[self.position >= self.stop])
        to_draw = self.codes == self.grid.not_drawn  # (E, L)
        drawn = array[to_draw]
        if drawn.min() < 0 or drawn.max() >= self.grid.codebook_size:
            raise ValueError(f"codes lie in {drawn.min()}..{drawn.max()}: choose 0..{self.grid.codebook_size - 1}")
        self.codes[to_draw] = drawn
        if self.world.oracle is not None:
            paid = self._score_all(self._rows)[1]  # (E, T)
            self._paid = np.where(self.grid.without_labels(to_draw), paid, self._paid)
        self.position[:] = self.stop
        finished = self.finish(self._rows)
        self.rewards = finished.rewards.copy()
        return finished

    def finish(self, rows: np.ndarray) -> Finished:
        """Score finished episodes: one call of the scorer per distinct image height.

        Args:
            rows: (n,) environments whose episode has ended.
        """
        start, stop = self.start[rows], self.stop[rows]  # (n,), (n,)
        if self.world.oracle is None:
            score_map, step_rewards = self._score_all(rows)
            step_rewards *= self.grid.without_labels(self.to_draw[rows])
            returns = last = step_rewards.sum(1)
        else:
            step_rewards = self._paid[rows]
            score_map = step_rewards.reshape(len(rows), self.grid.height, self.grid.width)
            returns, last = step_rewards.sum(1), step_rewards[np.arange(len(rows)), stop - 1]
        lengths = self.to_draw[rows].sum(1)
        codes, labels = self.codes[rows], self.labels_of(rows)
        return Finished(rows.copy(), codes, score_map, step_rewards, last, returns, start, stop, lengths, labels)

    def _score_all(self, rows: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
        """Score maps (n, h, w), None without a scorer, and the rewards (n, T) of all codes of finished rows (n,)."""
        codes, heights = self.codes[rows], self.image_rows[rows]  # (n, L), (n,)
        rewards = np.zeros((len(rows), self.grid.n_codes), np.float32)  # (n, T)
        score_map: np.ndarray | None = None
        if self.world.scorer is None:
            return None, rewards
        for height in np.unique(heights):
            same = np.flatnonzero(heights == height)
            scores, earned = self._score(self.grid.crop(codes[same], int(height)))  # (m, r, w), (m, codes of the rows)
            rewards[same[:, None], np.flatnonzero(self._masks[height])] = earned
            if score_map is None:
                # One cell is a score for the whole image, whatever its height.
                map_rows = 1 if scores.shape[1:] == (1, 1) else scores.shape[1] * self.grid.height // height
                score_map = np.zeros((len(rows), map_rows, scores.shape[2]), np.float32)
            score_map[same, : scores.shape[1]] = scores
        return score_map, rewards

    def _score(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sequences of n codes (m, n) or (m, n + 1) -> score map (m, r, w), step rewards (m, n), in one transfer."""
        assert self.world.scorer is not None
        given = torch.from_numpy(sequences).to(self.device, non_blocking=True).long()
        codes, labels = self.grid.without_labels(given), self.grid.labels_of(given)
        score_map, step_rewards = self.world.scorer(codes) if labels is None else self.world.scorer(codes, labels)
        flat = torch.cat([score_map.flatten(1), step_rewards], 1).float().cpu().numpy()  # (m, r * w + n)
        cells = flat.shape[1] - codes.shape[1]
        return flat[:, :cells].reshape(score_map.shape), flat[:, cells:]

    def observations(self) -> np.ndarray:
        """The codes of all rows, (E, L) int16, a fresh array."""
        return self.codes.copy()

    def action_masks(self) -> np.ndarray:
        """(E, K) bool: the codes that each row may draw next (see `Masks`); read-only if all rows are alike."""
        return self._followers.masks(self.codes, self.position)

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything a continued run needs, random generators included."""
        return {
            "codes": self.codes.copy(),
            "start": self.start.copy(),
            "position": self.position.copy(),
            "stop": self.stop.copy(),
            "image_rows": self.image_rows.copy(),
            "to_draw": self.to_draw.copy(),
            "pending": self._pending.copy(),
            "paid": self._paid.copy(),
            "rngs": [rng.bit_generator.state for rng in self.rngs],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`.

        Raises:
            ValueError: it comes from another number of environments or another grid, or does not fit together; nothing
                but random generators has changed then.
        """
        arrays = checked_arrays(state, self.grid, self.num_envs)
        for rng, bits in zip(self.rngs, state["rngs"], strict=True):
            rng.bit_generator.state = bits
        self._pending, self._paid = arrays.pop("pending"), arrays.pop("paid")
        for name, array in arrays.items():
            setattr(self, name, array)
        self._followers.restart(self._rows)


def _reset_needed(rows: np.ndarray) -> ResetNeeded:
    return ResetNeeded(
        f"environments {rows[:8].tolist()}{' and more' if len(rows) > 8 else ''} have no running episode: call reset() "
        "before drawing in them"
    )
