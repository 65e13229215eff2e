"""The generation MDP, E episodes at once: torch tensors on one device, no Gymnasium.

State: the codes so far. Action: the next code in raster order. An episode ends with its last code; only then is there
an image, a score map and a reward. The single environment, the vector environment and the Stable-Baselines3 adapter
are thin covers over this one class, so they cannot drift apart.

Shapes: E environments, T codes, H rows, W columns, K codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ral_gym.codes import CodeGrid
from ral_gym.envs.resets import Start, StartDistribution, start_from_options

Scorer = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Drawn codes (B, r * W) int64 -> score map (B, h, w), step rewards (B, r * W)."""


@dataclass(frozen=True)
class Finished:
    """Episodes that have just ended.

    Attributes:
        rows: (n,) which environments.
        codes: (n, T) int64, with K + 1 where an episode never drew.
        score_map: list of n arrays (h, w); empty without a scorer.
        step_rewards: (n, T) float32, 0 at given and never drawn positions.
        rewards: (n,) float32, the sum over an episode's drawn positions.
        start: (n,) first drawn position.
        stop: (n,) one past the last.
    """

    rows: np.ndarray
    codes: np.ndarray
    score_map: list[np.ndarray]
    step_rewards: np.ndarray
    rewards: np.ndarray
    start: np.ndarray
    stop: np.ndarray


class GenerationCore:
    """E generation episodes in lockstep steps.

    Args:
        grid: the code grid.
        num_envs: E.
        scorer: scores finished images; None: rewards are 0, for a callback that writes them.
        real_codes: (N, T) integer codes of real images, the prefixes of partial generation.
        reset_mode: `full`, `continue`, `scratch` or `mixed`.
        row_multiple: see `StartDistribution`.
        lockstep: one mode and row count per round for all rows alike (the paper's "during each roll-out"), so that all
            rows stay at one position; False: each row draws its own.
        paired: see `StartDistribution`.
        device: where the codes live.

    Raises:
        ValueError: see `StartDistribution`.
    """

    def __init__(
        self,
        grid: CodeGrid,
        num_envs: int,
        *,
        scorer: Scorer | None = None,
        real_codes: np.ndarray | None = None,
        reset_mode: str = "full",
        row_multiple: int = 1,
        lockstep: bool = False,
        paired: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        n_images = 0 if real_codes is None else len(real_codes)
        self.grid, self.num_envs, self.scorer = grid, num_envs, scorer
        self.distribution = StartDistribution(
            grid, reset_mode, n_images=n_images, row_multiple=row_multiple, paired=paired
        )
        self.lockstep = lockstep
        self.device = torch.device(device)
        self.real_codes = None if real_codes is None else torch.as_tensor(np.ascontiguousarray(real_codes)).long()
        self.rngs = [np.random.default_rng() for _ in range(num_envs)]
        self._pending = np.zeros(num_envs, np.int64)
        self.codes = torch.full((num_envs, grid.n_codes), grid.not_drawn, dtype=torch.int64, device=self.device)
        self.start = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self.position = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self.stop = torch.zeros(num_envs, dtype=torch.int64, device=self.device)  # 0: not reset yet
        self._rows = torch.arange(num_envs, device=self.device)

    def seed(self, seeds: list[int | None]) -> None:
        """Give row i its own generator from ``seeds[i]``; None leaves the row's as it is."""
        for row, seed in enumerate(seeds):
            if seed is not None:
                self.rngs[row] = np.random.default_rng(seed)
                self._pending[row] = 0

    def reset(self, rows: np.ndarray, options: Mapping[str, Any] | None = None) -> None:
        """Start new episodes.

        Args:
            rows: (n,) which environments.
            options: the options of ``reset``, the same for all of them.

        Raises:
            ValueError: wrong options; nothing has changed then.
        """
        starts = self._draw_starts(rows, options)
        positions = torch.tensor([start.position for start in starts])  # (n,)
        stops = torch.tensor([start.stop for start in starts])  # (n,)
        fresh = torch.full((len(rows), self.grid.n_codes), self.grid.not_drawn)  # (n, T)
        images = torch.tensor([start.image_index for start in starts])  # (n,)
        columns = torch.arange(self.grid.n_codes)  # (T,)
        if self.real_codes is not None and bool((images >= 0).any()):
            given = (columns < positions[:, None]) & (images >= 0)[:, None]  # (n, T)
            fresh = torch.where(given, self.real_codes[images], fresh)
        for row, start in enumerate(starts):
            if start.codes is not None:
                fresh[row, : start.position] = torch.from_numpy(start.codes)
        fresh[columns >= stops[:, None]] = self.grid.never_drawn
        index = torch.from_numpy(np.ascontiguousarray(rows)).to(self.device)
        self.codes[index] = fresh.to(self.device)
        self.start[index] = self.position[index] = positions.to(self.device)
        self.stop[index] = stops.to(self.device)

    def _draw_starts(self, rows: np.ndarray, options: Mapping[str, Any] | None) -> list[Start]:
        """One start per row; in lockstep mode the first row's generator decides mode and rows for all of them."""
        width = self.grid.width
        starts: list[Start] = []
        pending = self._pending.copy()
        if options:
            for row in rows:
                start, pending[row] = start_from_options(
                    options, self.distribution, self.rngs[row], int(pending[row])
                )
                starts.append(start)
        else:
            prefix = stop = left = 0
            for number, row in enumerate(rows):
                if number == 0 or not self.lockstep:
                    prefix, stop, left = self.distribution.draw(self.rngs[row], int(pending[row]))
                pending[row] = left
                image = self.distribution.draw_image(self.rngs[row]) if prefix else -1
                starts.append(Start(prefix * width, stop * width, image))
        self._pending = pending
        return starts

    def step(self, actions: Tensor) -> Finished | None:
        """Write one code into every running episode.

        Args:
            actions: (E,) int64 codes in 0..K-1 on the core's device; ignored for rows whose episode has ended.

        Returns:
            the episodes that ended with this code, scored, or None.
        """
        running = self.position < self.stop  # (E,)
        at = self.position.clamp(max=self.grid.n_codes - 1)
        self.codes[self._rows, at] = torch.where(running, actions, self.codes[self._rows, at])
        self.position += running
        ended = running & (self.position == self.stop)
        return self.finish(ended.nonzero().squeeze(1)) if bool(ended.any()) else None

    def draw_round(self, codes: Tensor) -> Finished:
        """Write whole images at once: the same bookkeeping as stepping through every code.

        Args:
            codes: (E, T) int64; only the positions that the running episodes still have to draw are taken.
        """
        columns = torch.arange(self.grid.n_codes, device=self.device)
        to_draw = (columns >= self.position[:, None]) & (columns < self.stop[:, None])  # (E, T)
        self.codes = torch.where(to_draw, codes, self.codes)
        self.position = self.stop.clone()
        return self.finish(self._rows)

    def finish(self, rows: Tensor) -> Finished:
        """Score finished episodes: one call of the scorer per distinct image height.

        Args:
            rows: (n,) int64 environments whose episode has ended.
        """
        codes, start, stop = self.codes[rows], self.start[rows], self.stop[rows]  # (n, T), (n,), (n,)
        rewards = torch.zeros(codes.shape, device=self.device)  # (n, T)
        maps: list[np.ndarray] = [np.empty(0)] * len(rows)
        if self.scorer is not None:
            for length in stop.unique().tolist():
                index = (stop == length).nonzero().squeeze(1)
                score_map, step_rewards = self.scorer(codes[index, :length])  # (m, h, w), (m, length)
                rewards[index, :length] = step_rewards.float()
                scores = score_map.float().cpu().numpy()
                for place, row in enumerate(index.tolist()):
                    maps[row] = scores[place]
            rewards *= torch.arange(self.grid.n_codes, device=self.device) >= start[:, None]
        return Finished(
            rows=rows.cpu().numpy(),
            codes=codes.cpu().numpy(),
            score_map=maps if self.scorer is not None else [],
            step_rewards=rewards.cpu().numpy(),
            rewards=rewards.sum(1).cpu().numpy(),
            start=start.cpu().numpy(),
            stop=stop.cpu().numpy(),
        )

    def observations(self) -> np.ndarray:
        """The codes of all rows, (E, T) int16, a fresh array."""
        return self.codes.to(torch.int16).cpu().numpy().copy()

    def state_dict(self) -> dict[str, Any]:
        """Everything a continued run needs, random generators included."""
        return {
            "codes": self.codes,
            "start": self.start,
            "position": self.position,
            "stop": self.stop,
            "pending": self._pending,
            "rngs": [rng.bit_generator.state for rng in self.rngs],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for name in ("codes", "start", "position", "stop"):
            setattr(self, name, state[name].to(self.device))
        self._pending = np.array(state["pending"])
        for rng, bits in zip(self.rngs, state["rngs"], strict=True):
            rng.bit_generator.state = bits
