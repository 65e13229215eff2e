"""A prior that follows a batch of episodes, one code at a time: what it expects of the code each row draws next.

`ral_gym/Oracle-v0` pays a code its log-probability, and `top_k` forbids the codes that a prior finds unlikely. Both
need a network at every step; the sampling cache makes that cost one position instead of a whole pass.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ral_gym.two_level import Prior, make_sampler


class PriorFollower:
    """Keeps a sampling cache at the positions of E episodes.

    Args:
        prior: the network, frozen.
        num_envs: E.
    """

    def __init__(self, prior: Prior, num_envs: int) -> None:
        self.device = next(prior.parameters()).device
        self._sampler = make_sampler(prior)
        self._stale = np.ones(num_envs, bool)

    def restart(self, rows: np.ndarray) -> None:
        """Episodes (n,) that begin anew, or whose codes were changed by something else than `advance`."""
        self._stale[rows] = True

    def logits(self, codes: np.ndarray, position: np.ndarray) -> Tensor:
        """Logits (E, K) of every row's next code.

        Args:
            codes: (E, T) observations.
            position: (E,) next position to draw.
        """
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
        """Every row has drawn a code (E,) at its position; rows without a running episode give any code."""
        self._sampler.advance(torch.from_numpy(drawn.astype(np.int64)).to(self.device))
