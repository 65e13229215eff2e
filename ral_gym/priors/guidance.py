"""Classifier-free guidance and cut-off tails: how a sampler changes the distribution that it draws from.

"Classifier-Free Diffusion Guidance" (Ho and Salimans, 2022), as LlamaGen (Sun et al., 2024) applies it to codes: of the
logits c of an image's class and u of "no class", the codes are drawn from u + s (c - u), before temperature, top-k and
top-p. That is p_c^s p_u^(1-s), normalised. A batch of B images is 2B rows of one cache; the second half has no class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ral_gym.errors import ConfigError
from ral_gym.priors.base import Cache, Packed, logits_of
from ral_gym.priors.transfer import on_device


@dataclass(frozen=True)
class Sampling:
    """What a sampler does beside the temperature; the default changes nothing.

    Attributes:
        guidance: s; 1: none, 0: as if without class.
        cutoff: codes at this position and later are drawn without guidance, of each level of codes; None: none are.
        top_k: draw among the k likeliest codes only; 0: all.
        top_p: draw among the fewest likeliest codes whose probabilities reach this share; 1: all.
    """

    guidance: float = 1.0
    cutoff: int | None = None
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.guidance < math.inf:
            raise ConfigError(f"guidance is {self.guidance}: give a scale of 0 or more; 1 is no guidance")
        if self.cutoff is not None and self.cutoff < 0:
            raise ConfigError(f"guidance cutoff is {self.cutoff}: give the number of codes drawn with guidance")
        if self.cutoff is not None and self.guidance == 1:
            raise ConfigError(f"guidance cutoff is {self.cutoff}, but guidance is 1 (none): give a scale too")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}: give the number of likeliest codes to draw among, or 0 for all")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}: give a share above 0 and at most 1, which is all")

    @property
    def guided(self) -> bool:
        """Whether there is guidance at all."""
        return self.guidance != 1

    def describe(self) -> str:
        """What differs from the default, such as ``guidance 2, top-k 100``, or ""."""
        said = [f"guidance {self.guidance:g}"] if self.guided else []
        said += [] if self.cutoff is None else [f"for {self.cutoff} codes"]
        said += [f"top-k {self.top_k}"] if self.top_k else []
        said += [f"top-p {self.top_p:g}"] if self.top_p < 1 else []
        return ", ".join(said)


PLAIN = Sampling()
"""No guidance, all codes."""


def guidable(prior: Any) -> bool:
    """Whether a prior has classes, and knows "no class"."""
    return prior.grid.classes > 0 and getattr(prior, "null_class", True)


def check_guidance(prior: Any, scale: float) -> None:
    """Refuse guidance of a prior that cannot be guided.

    Raises:
        ConfigError: it has no classes, or nothing that stands for "no class".
    """
    if scale == 1 or guidable(prior):
        return
    name = type(prior).__name__
    if not prior.grid.classes:
        raise ConfigError(f"guidance {scale:g} needs a prior with classes, this {name} has none: leave guidance out")
    raise ConfigError(
        f'guidance {scale:g} needs a prior that knows "no class", this {name} has {prior.grid.classes} classes and no '
        "null class: leave guidance out"
    )


def mix(of_class: Tensor, of_none: Tensor, scale: float) -> Tensor:
    """The guided logits u + s (c - u), of c and u of one shape."""
    return of_none + scale * (of_class - of_none)


def no_class(prior: Any, condition: Tensor | None) -> Tensor:
    """The condition (n, ...) of the same images without their class.

    A prior whose condition is more than a label (n, 1) has a method ``no_class(condition)``.

    Raises:
        ConfigError: there is no condition.
    """
    if condition is None:
        raise ConfigError("guidance needs labels: pass sequences whose last entry is a label")
    own = getattr(prior, "no_class", None)
    return torch.full_like(condition, prior.grid.classes) if own is None else own(condition)


def guided_logits(prior: Any, codes: Tensor, condition: Tensor | None, sampling: Sampling) -> Tensor:
    """Logits (B, T', K) of codes (B, T') by two full passes; by one without guidance."""
    logits = logits_of(prior, codes, condition)
    if not sampling.guided:
        return logits
    mixed = mix(logits, logits_of(prior, codes, no_class(prior, condition)), sampling.guidance)
    plain = torch.arange(codes.shape[1], device=codes.device) >= _last(sampling)
    return torch.where(plain[:, None], logits, mixed)


def _last(sampling: Sampling) -> int:
    return 2**31 if sampling.cutoff is None else sampling.cutoff


class GuidedWeights:
    """A prior's packed weights whose caches draw with guidance.

    Args:
        prior: the network.
        weights: its packed weights.
        sampling: guidance and cut-off.

    Raises:
        ConfigError: see `check_guidance`.
    """

    def __init__(self, prior: Any, weights: Packed, sampling: Sampling) -> None:
        check_guidance(prior, sampling.guidance)
        self.prior, self.weights, self.sampling = prior, weights, sampling

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.weights.device

    @property
    def dtype(self) -> torch.dtype:
        """Their type."""
        return self.weights.dtype

    def refresh(self) -> None:
        """Take over the prior's current weights."""
        self.weights.refresh()

    def make_cache(self, batch: int) -> GuidedCache:
        """A cache for B batch rows, made of one for 2B."""
        return GuidedCache(self.prior, self.weights.make_cache(2 * batch), self.sampling)


class GuidedCache:
    """A cache of 2B rows as one of B: every image with its class, then every image without one.

    Args:
        prior: the network.
        cache: its cache for 2B rows.
        sampling: guidance and cut-off.

    Attributes:
        batch: B.
        features: (B, C) of the images with their class.
        logits: (B, K), mixed.
    """

    def __init__(self, prior: Any, cache: Cache, sampling: Sampling) -> None:
        self.prior, self.batch = prior, cache.batch // 2
        self._cache, self._scale, self._last = cache, sampling.guidance, _last(sampling)
        self.features = self.logits = torch.empty(0)

    @property
    def use_cuda_graphs(self) -> bool:
        """That of the inner cache."""
        return self._cache.use_cuda_graphs

    @use_cuda_graphs.setter
    def use_cuda_graphs(self, use: bool) -> None:
        self._cache.use_cuda_graphs = use

    def fill(self, rows: Tensor | slice, codes: Tensor, positions: np.ndarray, condition: Tensor | None = None) -> None:
        """See `ral_gym.priors.base.Cache`; raises ConfigError without a condition."""
        none = no_class(self.prior, condition)
        assert condition is not None
        rows = torch.cat([rows, rows + self.batch]) if isinstance(rows, Tensor) else rows
        self._cache.fill(rows, codes.repeat(2, 1), np.tile(positions, 2), torch.cat([condition, none]))

    def step(self, row: int, column: int) -> None:
        """Features and logits of all batch rows at one position."""
        self._cache.step(row, column)
        self._read(np.full((1, 1), row * self.prior.width + column >= self._last))

    def step_at(self, grid_rows: np.ndarray, columns: np.ndarray) -> None:
        """Features and logits of the batch rows, each at a position of its own (B,)."""
        self._cache.step_at(np.tile(grid_rows, 2), np.tile(columns, 2))
        self._read((grid_rows * self.prior.width + columns >= self._last)[:, None])

    def _read(self, plain: np.ndarray) -> None:
        """Mix the inner cache's logits where (B, 1) or (1, 1) is False."""
        self.features = self._cache.features[: self.batch]
        of_class, of_none = self._cache.logits.split(self.batch)
        self.logits = torch.where(on_device(plain, of_class.device), of_class, mix(of_class, of_none, self._scale))

    def put(self, codes: Tensor, row: int, column: int) -> None:
        """Enter the codes (B,) of all batch rows at one position."""
        self._cache.put(codes.repeat(2), row, column)

    def put_at(self, rows: np.ndarray, codes: Tensor, grid_rows: np.ndarray, columns: np.ndarray) -> None:
        """Enter the codes (n,) of some batch rows (n,), each at a position of its own."""
        both = np.concatenate([rows, rows + self.batch])
        self._cache.put_at(both, codes.repeat(2), np.tile(grid_rows, 2), np.tile(columns, 2))

    def next_row(self, row: int) -> None:
        """All batch rows begin this grid row."""
        self._cache.next_row(row)

    def next_row_of(self, rows: np.ndarray, grid_rows: np.ndarray) -> None:
        """Some batch rows (n,) begin grid rows (n,) of their own."""
        self._cache.next_row_of(np.concatenate([rows, rows + self.batch]), np.tile(grid_rows, 2))
