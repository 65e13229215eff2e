"""Sampling cache for policies: one step at a time, rows at any position, without notice of resets.

The policy stays a pure function of the observation; this only makes it fast. The cache remembers the observation that
should come next (the last one with the drawn code written in). Rows that show it advance by one position; any other row
(an automatic reset, another prefix, another batch) is rebuilt from its codes. The weights' version counters reveal when
they have changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ral_gym.priors.base import Prior
from ral_gym.priors.guidance import PLAIN, Sampling
from ral_gym.priors.sampler import Sampler, make_sampler


def first_not_drawn(codes: Tensor, not_drawn: int) -> Tensor:
    """The next position to draw: codes (B, T) with token K where not drawn -> (B,) int64; 0 if nothing is left."""
    return (codes == not_drawn).int().argmax(1)


class StepCache:
    """A sampler that follows a stream of observations and verifies itself against each of them.

    Attributes:
        hits: rows that advanced by one position.
        misses: rows that had to be rebuilt.

    Args:
        prior: the network.
        sampling: guidance.
    """

    def __init__(self, prior: Prior, sampling: Sampling = PLAIN) -> None:
        self.prior, self.sampling = prior, sampling
        self.hits = self.misses = 0
        self._sampler: Sampler | None = None
        self._version: tuple[int, torch.device] | None = None
        self._expected: Tensor | None = None
        self._fresh = False

    def forget(self) -> None:
        """Rebuild everything at the next observation."""
        self._expected = None
        self._fresh = False

    def sampler(self) -> Sampler:
        """The sampler, with the prior's current weights packed; changed weights clear its cache."""
        version = (sum(p._version for p in self.prior.parameters()), next(self.prior.parameters()).device)
        if self._sampler is None or (self._version is not None and self._version[1] != version[1]):
            self._sampler = make_sampler(self.prior, self.sampling)
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
        stale = torch.ones_like(position)  # (B,)
        if self._expected is not None and self._expected.shape == codes.shape:
            stale = (codes != self._expected).any(1).long()
        seen, at = torch.stack([stale, position]).cpu()  # the one transfer from the device
        misses = int(seen.sum())
        if misses == len(codes):
            sampler.begin(codes, at)
        elif misses:
            rows = seen.nonzero().squeeze(1)  # on the host
            there = rows.to(codes.device, non_blocking=True)
            sampler.rebuild(rows, codes[there], at[rows])
        self.misses += misses
        self.hits += len(codes) - misses
        self._expected = codes.clone()
        self._position = position
        return sampler.features(), sampler.logits()

    def draw(self, codes: Tensor) -> None:
        """Enter the codes (B,) int64 that were drawn at the positions of the last `look`."""
        assert self._expected is not None and self._sampler is not None, "look() comes first"
        self._expected.scatter_(1, self._position[:, None], codes[:, None])
        self._sampler.advance(codes)
