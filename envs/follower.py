"""Priors that follow a batch of episodes, one code at a time, and give the logits of each row's next code.

In `ral_gym/Oracle-v0` the reward of a code is its log-probability, and `top_k` forbids codes that a prior finds
unlikely. Both need a network at every step; the sampling cache makes that cost one position instead of a whole pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ral_gym.envs.worlds import World
from ral_gym.grid import CodeGrid
from ral_gym.priors.base import Prior
from ral_gym.priors.sampler import make_sampler


class PriorFollower:
    """Keeps a sampling cache at the positions of E episodes.

    Args:
        prior: the network, frozen.
        num_envs: E.
        grid: the grid of the observations; their labels are for networks with classes only.
    """

    def __init__(self, prior: Prior, num_envs: int, grid: CodeGrid) -> None:
        self._grid, self._takes_labels = grid, prior.grid.classes > 0
        self.device = next(prior.parameters()).device
        self._sampler = make_sampler(prior)
        self._stale = np.ones(num_envs, bool)

    def restart(self, rows: np.ndarray) -> None:
        """Restart episodes (n,) that were reset, or whose codes were changed other than by `advance`."""
        self._stale[rows] = True

    def logits(self, codes: np.ndarray, position: np.ndarray) -> Tensor:
        """Logits (E, K) of every row's next code.

        Args:
            codes: (E, L) observations.
            position: (E,) next position to draw.
        """
        codes = codes if self._takes_labels else self._grid.without_labels(codes)
        if self._stale.any():
            rows = np.flatnonzero(self._stale)
            grids = torch.from_numpy(codes[rows].astype(np.int64)).to(self.device)
            places = torch.from_numpy(position[rows])
            if len(rows) == len(codes):
                self._sampler.begin(grids, places)
            else:
                self._sampler.rebuild(torch.from_numpy(rows).to(self.device), grids, places)
            self._stale[:] = False
        return self._sampler.logits()

    def advance(self, drawn: np.ndarray) -> None:
        """Enter the code (E,) that each row drew at its position; any code for rows without a running episode."""
        self._sampler.advance(torch.from_numpy(drawn.astype(np.int64)).to(self.device))


class Followers:
    """The networks that follow E episodes: the oracle that gives rewards, and the prior that gives masks.

    Pickled without their activations, which can be recomputed from the codes.

    Args:
        world: has the oracle and the masks' prior, if any.
        num_envs: E.
    """

    def __init__(self, world: World, num_envs: int) -> None:
        self.world, self.num_envs = world, num_envs
        self._legal = np.ones(world.grid.codebook_size, bool)
        self._legal[list(world.masks.forbidden_codes)] = False
        oracle, chooser = world.oracle, world.masks.prior
        self._oracle = None if oracle is None else PriorFollower(oracle, num_envs, world.grid)
        self._chooser = None if chooser is None else PriorFollower(chooser, num_envs, world.grid)

    def __reduce__(self) -> tuple[Any, ...]:
        return Followers, (self.world, self.num_envs)

    def restart(self, rows: np.ndarray) -> None:
        """See `PriorFollower.restart`."""
        for follower in filter(None, (self._oracle, self._chooser)):
            follower.restart(rows)

    def advance(self, drawn: np.ndarray) -> None:
        """See `PriorFollower.advance`."""
        for follower in filter(None, (self._oracle, self._chooser)):
            follower.advance(drawn)

    def log_probs(self, codes: np.ndarray, position: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """Log-probabilities (E,) under the oracle of the codes (E,) that the rows draw at their positions (E,)."""
        assert self._oracle is not None
        log_probs = self._oracle.logits(codes, position).float().log_softmax(1)  # (E, K)
        at = torch.from_numpy(drawn.astype(np.int64)).to(log_probs.device)[:, None]  # (E, 1)
        return log_probs.gather(1, at).squeeze(1).cpu().numpy()

    def masks(self, codes: np.ndarray, position: np.ndarray) -> np.ndarray:
        """(E, K) bool, the codes that each row may draw next; read-only if all rows are alike."""
        legal = np.broadcast_to(self._legal, (self.num_envs, len(self._legal)))
        if self._chooser is None or self.world.masks.top_k is None:
            return legal
        logits = self._chooser.logits(codes, position).float().cpu()  # (E, K)
        logits = logits.masked_fill(torch.from_numpy(~self._legal), -torch.inf)
        likely = logits.topk(min(self.world.masks.top_k, int(self._legal.sum())), 1).indices  # (E, k)
        return torch.zeros(legal.shape, dtype=torch.bool).scatter_(1, likely, True).numpy()
