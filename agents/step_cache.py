"""A prior one step at a time, for rows that may be anywhere, without being told about resets.

The policy stays a pure function of the observation; this only makes it fast. It remembers which observation must come
next (the last one with the drawn code written in). Rows that show it are one position further on; any other row
(an automatic reset, another prefix, another batch) is built anew from its codes. The weights' version counters tell
when they have changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ral_gym.priors.base import Prior
from ral_gym.priors.sampler import Sampler, make_sampler


def first_not_drawn(codes: Tensor, not_drawn: int) -> Tensor:
    """The next position to draw: codes (B, T) with token K at what is left -> (B,) int64; 0 where nothing is."""
    return (codes == not_drawn).int().argmax(1)


class StepCache:
    """A sampler that follows a stream of observations and verifies itself against each of them.

    Attributes:
        hits: rows that were one position further on.
        misses: rows that had to be built anew.

    Args:
        prior: the network.
    """

    def __init__(self, prior: Prior) -> None:
        self.prior = prior
        self.hits = self.misses = 0
        self._sampler: Sampler | None = None
        self._version: tuple[int, torch.device] | None = None
        self._expected: Tensor | None = None
        self._fresh = False

    def forget(self) -> None:
        """Build everything anew at the next observation."""
        self._expected = None
        self._fresh = False

    def sampler(self) -> Sampler:
        """The sampler with the prior's present weights packed; what it had cached is gone if they changed."""
        version = (sum(p._version for p in self.prior.parameters()), next(self.prior.parameters()).device)
        if self._sampler is None or (self._version is not None and self._version[1] != version[1]):
            self._sampler = make_sampler(self.prior)
        elif version != self._version or not self._fresh:
            self._sampler.refresh()
        else:
            return self._sampler
        self._version, self._fresh, self._expected = version, True, None
        return self._sampler

    def look(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, C) and logits (B, K) at each row's next position.

        Args:
            codes: (B, T) int64 observations.
        """
        sampler = self.sampler()
        position = first_not_drawn(codes, self.prior.codebook_size)  # (B,)
        stale = torch.ones(len(codes), dtype=torch.bool)  # (B,)
        if self._expected is not None and self._expected.shape == codes.shape:
            stale = (codes != self._expected).any(1)
        misses = int(stale.sum())  # the one transfer from the device
        if misses == len(codes):
            sampler.begin(codes, position)
        elif misses:
            rows = stale.nonzero().squeeze(1)
            sampler.rebuild(rows, codes[rows], position[rows])
        self.misses += misses
        self.hits += len(codes) - misses
        self._expected = codes.clone()
        self._position = position
        return sampler.features(), sampler.logits()

    def draw(self, codes: Tensor) -> None:
        """Tell which codes (B,) int64 are written at the positions just looked at."""
        assert self._expected is not None and self._sampler is not None, "look() comes first"
        self._expected.scatter_(1, self._position[:, None], codes[:, None])
        self._sampler.advance(codes)
