"""Sampling from a prior that has no cache of its own: a full pass over the grid for every code.

It has the interface of a real cache, so `ral_gym.priors.sampler.CachedSampler` works with both. It stores nothing but
the codes; drawing an image of T codes costs T passes.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

from ral_gym.priors.base import Prior
from ral_gym.priors.transfer import indices_on, on_device

logger = logging.getLogger("ral_gym")
_told: set[type] = set()


class FullPass:
    """The live weights of a prior without `pack`; warns once per class that it is slow.

    Args:
        prior: the network.
    """

    def __init__(self, prior: Prior) -> None:
        self.prior = prior
        self.refresh()
        if type(prior) not in _told:
            _told.add(type(prior))
            logger.warning(
                "%s has no pack(), so drawing takes a full pass per code, %d per image: give it a sampling cache "
                "(ral_gym.priors.base.Packed) for speed",
                type(prior).__name__,
                prior.height * prior.width,
            )

    def refresh(self) -> None:
        """The weights are the live ones."""
        like = next(self.prior.parameters())
        self.device, self.dtype = like.device, like.dtype

    def make_cache(self, batch: int) -> FullPassCache:
        """The codes of `batch` images."""
        return FullPassCache(self, batch)


class FullPassCache:
    """The codes (B, T) so far; `step` runs the prior over all of them.

    Args:
        weights: of the prior.
        batch: B.

    Attributes:
        use_cuda_graphs: ignored.
        features: (B, C), written by `step` and `step_at`.
        logits: (B, K), written by `step` and `step_at`.
    """

    def __init__(self, weights: FullPass, batch: int) -> None:
        prior = weights.prior
        self.prior, self.batch, self.use_cuda_graphs = prior, batch, False
        self._rows = torch.arange(batch, device=weights.device)
        self._codes = torch.zeros(batch, prior.height * prior.width, dtype=torch.int64, device=weights.device)
        self._condition: Tensor | None = None
        self.features = torch.empty(0)
        self.logits = torch.empty(0)

    def fill(self, rows: Tensor | slice, codes: Tensor, positions: np.ndarray, condition: Tensor | None = None) -> None:
        """Enter the codes (n, T') before positions (n,); the others are 0 until they are drawn."""
        length = codes.shape[1]
        given = torch.arange(length, device=codes.device) < on_device(positions, codes.device)[:, None]
        filled = codes.clamp(max=self.prior.codebook_size - 1).masked_fill(~given, 0)  # (n, T')
        self._codes[rows] = torch.nn.functional.pad(filled, (0, self._codes.shape[1] - length))
        if condition is not None:
            if self._condition is None or self._condition.shape[1:] != condition.shape[1:]:
                self._condition = condition.new_zeros(self.batch, *condition.shape[1:])
            self._condition[rows] = condition

    def step(self, row: int, column: int) -> None:
        """Features and logits of all batch rows at one position."""
        self._look(torch.full_like(self._rows, row * self.prior.width + column), row + 1)

    def step_at(self, grid_rows: np.ndarray, columns: np.ndarray) -> None:
        """Features and logits of the batch rows, each at a position of its own (B,)."""
        position = on_device(grid_rows * self.prior.width + columns, self._rows.device)
        self._look(position, int(grid_rows.max()) + 1)

    def _look(self, position: Tensor, rows: int) -> None:
        """One pass over the first grid rows, with dropout off."""
        sequence = self._codes[:, : rows * self.prior.width]  # (B, rows W)
        arguments = (sequence,) if self._condition is None else (sequence, self._condition)
        training = self.prior.training
        if training:
            self.prior.eval()
        self.features = self.prior.features(*arguments)[self._rows, position]  # (B, C)
        self.logits = self.prior.logits(self.features, position)  # (B, K)
        if training:
            self.prior.train()

    def put(self, codes: Tensor, row: int, column: int) -> None:
        """Enter the codes (B,) of all batch rows at one position."""
        self._codes[:, row * self.prior.width + column] = codes

    def put_at(self, rows: np.ndarray, codes: Tensor, grid_rows: np.ndarray, columns: np.ndarray) -> None:
        """Enter the codes (n,) of some batch rows (n,), each at a position of its own."""
        at, position = indices_on(codes.device, rows, grid_rows * self.prior.width + columns)
        self._codes[at, position] = codes

    def next_row(self, row: int) -> None:
        """Nothing is kept per grid row."""

    def next_row_of(self, rows: np.ndarray, grid_rows: np.ndarray) -> None:
        """Nothing is kept per grid row."""
