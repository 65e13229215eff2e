"""Drawing code grids from a prior one code at a time, without computing anything twice.

A full pass per code costs T passes per image. `CachedSampler` tracks every image's position (restarted, somewhere in
the grid, or finished) for whatever `Cache` the prior's ``pack`` makes. The PixelCNN's runs the vertical stack once per
grid row and the horizontal stack and the output stack once per code, so that an image costs about as many multiply-adds
as one full pass. "Fast Generation for Convolutional Autoregressive Models" (Ramachandran et al., 2017) does this for
PixelCNN++; new here are the start from any prefix and batches whose images stand at different positions.

`CachedSampler.sample` draws whole grids; `begin`, `logits` and `advance` do the same one code at a time, for a policy
that acts in an environment. `sample_naive` is the simple version, the reference in tests and benchmarks. Two-level
models have a sampler of their own in `ral_gym.priors.two_level`, made of two of these.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ral_gym.errors import ConfigError
from ral_gym.priors.base import Cache, Packed, Prior, given_codes
from ral_gym.priors.drawing import Request, check_length, draw, host_positions, sample_naive
from ral_gym.priors.full_pass import FullPass
from ral_gym.priors.guidance import PLAIN, GuidedWeights, Sampling
from ral_gym.priors.transfer import on_device

__all__ = ["CachedSampler", "Sampler", "draw", "make_sampler", "sample_naive"]


CACHES_KEPT = 2
"""On CUDA a sampler keeps the caches of its last batch sizes: their graphs take long to record."""


def pack(prior: Any) -> Packed:
    """A prior's own packed weights; full passes for one that has none.

    The cache of a base class does not know what a subclass computes: a subclass that overrides ``features``, ``logits``
    or ``forward`` must override ``pack``, too.
    """
    for cls in type(prior).__mro__:
        if "pack" in vars(cls):
            return prior.pack()
        if vars(cls).keys() & {"features", "logits", "forward"}:
            break
    return FullPass(prior)


class CachedSampler:
    """Draws codes from a prior of one level, reusing what its cache has computed for earlier codes.

    The weights are packed when the sampler is made: call `refresh` whenever those of the prior have changed. Dropout is
    never applied, and nothing has a gradient. Codes (B, T) may be sequences that hold more, see the prior's `split`.

    A PixelCNN's cache holds, per block: the inputs of the vertical stack in the last grid rows, its term of the
    horizontal pre-activations in the current grid row, and the inputs of the horizontal stack in that row; per
    attention layer, a key and a value for every position; and the condition's features.

    Args:
        prior: the network to draw from; the sampler keeps a reference to it.
        sampling: guidance, which `logits` has too, and the codes that `sample` draws among.

    Attributes:
        weights: the prior's packed weights.
        use_cuda_graphs: replay the work of a grid row and of a code as CUDA graphs; set on CUDA, ignored elsewhere.
    """

    def __init__(self, prior: Prior, sampling: Sampling = PLAIN):
        self.prior, self.sampling = prior, sampling
        self.weights = self._pack()
        self.use_cuda_graphs = self.weights.device.type == "cuda"
        self._cache: Cache | None = None
        self._caches: dict[int, Cache] = {}  # of the last batch sizes
        self._position: np.ndarray | None = None  # (B,) while drawing code by code
        self._length = 0
        self._stepped = False  # the cache holds features and logits of the current positions

    def _pack(self) -> Packed:
        weights = pack(self.prior)
        return GuidedWeights(self.prior, weights, self.sampling) if self.sampling.guided else weights

    def refresh(self) -> None:
        """Pack the prior's weights again, at the same addresses. What `begin` started becomes invalid: begin again."""
        like = next(self.prior.parameters())
        if like.dtype != self.weights.dtype or like.device != self.weights.device:
            self.weights = self._pack()
            self.use_cuda_graphs = like.is_cuda
            self._cache, self._caches = None, {}
        else:
            self.weights.refresh()
        self._position = None

    @torch.no_grad()
    def sample(
        self,
        batch_size: int | None = None,
        *,
        codes: Tensor | None = None,
        start: int | Tensor = 0,
        stop: int | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        uniforms: Tensor | None = None,
        condition: Tensor | None = None,
        prefix_rows: int | Tensor | None = None,
        stop_rows: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw the codes of whole grid rows, or continue given ones. Ends any drawing that `begin` started.

        Args:
            batch_size: B; only needed without `codes`.
            codes: (B, T) int64, whose entries before `start` are given and kept; T is a whole number of grid rows.
            start: first position to draw, one for all or (B,) int64; any position from 0 to T.
            stop: first position not to draw, a multiple of W; None: T.
            temperature: divides the logits.
            generator: source of the uniforms. One `torch.rand(B)` in float32 is drawn per position, in raster order
                from the least `start` on, so that drawing code by code with the same generator gives the same codes.
            uniforms: (B, T) in [0, 1], used instead.
            condition: (B, T') int64, what the prior's `features` takes, for a network that has one.
            prefix_rows: sets `start`, in grid rows.
            stop_rows: sets `stop`, in grid rows.

        Returns:
            codes (B, stop) int64, and (B, stop) the log-probabilities of those drawn, at `temperature`; 0 where given.

        Raises:
            ConfigError: an argument is out of range, or neither batch_size nor codes is given.
        """
        start = start if prefix_rows is None else prefix_rows * self.prior.width
        stop = stop if stop_rows is None else stop_rows * self.prior.width
        request = Request(
            self.prior, batch_size, codes, start, stop, temperature, generator, uniforms, condition, self.sampling
        )
        cache = self._cache_for(request.batch_size)
        self._position = None
        if request.begin < request.stop:
            cache.fill(slice(None), request.codes, np.full(request.batch_size, request.begin), request.condition)
        for position in range(request.begin, request.stop):
            row, column = divmod(position, self.prior.width)
            if column == 0 and position > request.begin:
                cache.next_row(row)
            cache.step(row, column)
            cache.put(request.draw(cache.logits, position), row, column)
        return request.result()

    @torch.no_grad()
    def begin(self, codes: Tensor, position: int | Tensor, condition: Tensor | None = None) -> None:
        """Start drawing code by code.

        Args:
            codes: (B, T) int64, given before `position`; T is a whole number of grid rows.
            position: next position to draw, one for all or (B,) int64, from 0 to T (finished).
            condition: (B, T') int64, what the prior's `features` takes, for a network that has one.

        Raises:
            ConfigError: T is not a whole number of grid rows, a position is out of range, or the condition is missing.
        """
        codes, condition = given_codes(self.prior, codes, condition)
        batch, length = codes.shape
        check_length(self.prior, length)
        positions = host_positions(position, batch, length)
        self.begin_finished(batch, length)
        self._start(slice(None), codes, positions, condition)

    def begin_finished(self, batch: int, length: int) -> None:
        """Like `begin`, but with the whole batch finished; `rebuild` starts rows. Computes nothing.

        Args:
            batch: B.
            length: T, a whole number of grid rows.
        """
        self._cache_for(batch)
        self._position = np.full(batch, length)
        self._length = length

    @torch.no_grad()
    def rebuild(self, rows: Tensor, codes: Tensor, position: int | Tensor, condition: Tensor | None = None) -> None:
        """Restart some rows of the batch from other prefixes.

        Args:
            rows: (n,) int64, their indices, without repeats, best on the host.
            codes: (n, T) int64, their grids, given before `position`; T as in `begin`.
            position: next position to draw, one for all or (n,) int64.
            condition: (n, T') int64, their condition, for a conditional network.

        Raises:
            ConfigError: T differs from `begin`'s, a position is out of range, or the condition is missing.
        """
        self._begun()
        codes, condition = given_codes(self.prior, codes, condition)
        if codes.shape[1] != self._length:
            raise ConfigError(f"rebuild: grids of {codes.shape[1]} codes; `begin` was given {self._length}")
        self._start(rows, codes, host_positions(position, len(rows), self._length), condition)

    def _start(self, rows: Tensor | slice, codes: Tensor, starts: np.ndarray, condition: Tensor | None) -> None:
        """Put rows at positions (n,), and fill the cache for those that have something left to draw."""
        cache, positions = self._begun()
        positions[rows.cpu().numpy() if isinstance(rows, Tensor) else rows] = starts
        rows = rows.to(codes.device, non_blocking=True) if isinstance(rows, Tensor) else rows
        self._stepped = False
        active = np.flatnonzero(starts < self._length)
        if len(active) == 0:
            return
        if len(active) < len(starts):
            at = on_device(active, codes.device)
            rows = rows[at] if isinstance(rows, Tensor) else at
            codes, condition = codes[at], None if condition is None else condition[at]
        cache.fill(rows, codes, starts[active], condition)

    def finish(self, rows: np.ndarray) -> None:
        """Mark rows (n,) of the batch, on the host, as finished, whatever their position."""
        self._begun()[1][rows] = self._length

    def features(self) -> Tensor:
        """The prior's features (B, C) at each batch row's position; finished rows: meaningless but finite."""
        return self._step().features.clone()

    def logits(self) -> Tensor:
        """The logits (B, K) of the code at each batch row's position; finished rows: meaningless but finite."""
        return self._step().logits.clone()

    @torch.no_grad()
    def advance(self, codes: Tensor) -> None:
        """Enter the codes (B,) int64, 0..K-1, that were drawn and move on one position; finished rows ignore theirs."""
        cache, (_, positions), width = self._step(), self._begun(), self.prior.width
        active = np.flatnonzero(positions < self._length)
        if len(active) == 0:
            return
        row, column = np.divmod(positions[active], width)
        self._stepped = False
        positions[active] += 1
        if len(active) == len(positions) and (positions == positions[0]).all():
            cache.put(codes, int(row[0]), int(column[0]))
            if column[0] + 1 == width and positions[0] < self._length:
                cache.next_row(int(row[0]) + 1)
            return
        at = on_device(active, codes.device)
        cache.put_at(active, codes[at], row, column)
        crossing = (column + 1 == width) & (positions[active] < self._length)
        if crossing.any():
            cache.next_row_of(active[crossing], row[crossing] + 1)

    @property
    def position(self) -> Tensor:
        """(B,) int64, the next position of each batch row; T when it is finished."""
        return on_device(self._begun()[1].copy(), self.weights.device)

    def _cache_for(self, batch: int) -> Cache:
        if self._cache is None or self._cache.batch != batch:
            kept = self._caches.pop(batch, None)
            while len(self._caches) >= CACHES_KEPT:
                del self._caches[next(iter(self._caches))]
            self._cache = self.weights.make_cache(batch) if kept is None else kept
            if self.use_cuda_graphs:
                self._caches[batch] = self._cache
        self._cache.use_cuda_graphs = self.use_cuda_graphs and self.weights.device.type == "cuda"
        return self._cache

    def _begun(self) -> tuple[Cache, np.ndarray]:
        if self._cache is None or self._position is None:
            raise RuntimeError(
                "the sampler holds no episode: call begin() first, and again after sample() or refresh()"
            )
        return self._cache, self._position

    @torch.no_grad()
    def _step(self) -> Cache:
        """The cache, with features and logits of the current positions in it."""
        cache, positions = self._begun()
        if not self._stepped:
            # A finished row is computed at the first position: that overwrites only what `rebuild` recomputes.
            row, column = np.divmod(np.where(positions < self._length, positions, 0), self.prior.width)
            if (positions == positions[0]).all():
                cache.step(int(row[0]), int(column[0]))
            else:
                cache.step_at(row, column)
            self._stepped = True
        return cache


class Sampler(Protocol):
    """The interface of all samplers; see `CachedSampler` for the arguments."""

    prior: Any
    use_cuda_graphs: bool

    def refresh(self) -> None:
        """Pack the prior's weights again."""

    def sample(
        self,
        batch_size: int | None = None,
        *,
        codes: Tensor | None = None,
        prefix_rows: int | Tensor = 0,
        stop_rows: int | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        uniforms: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw whole images, or continue given rows."""

    def begin(self, codes: Tensor, position: int | Tensor) -> None:
        """Start drawing code by code."""

    def rebuild(self, rows: Tensor, codes: Tensor, position: int | Tensor) -> None:
        """Restart some rows of the batch."""

    def features(self) -> Tensor:
        """The prior's features (B, C) at each batch row's position."""

    def logits(self) -> Tensor:
        """The logits (B, K) of the code at each batch row's position."""

    def advance(self, codes: Tensor) -> None:
        """Enter the codes (B,) that were drawn and move on."""

    @property
    def position(self) -> Tensor:
        """(B,) int64, the next position of each batch row; T when it is finished."""


def make_sampler(prior: Any, sampling: Sampling = PLAIN) -> Sampler:
    """The sampler of a prior: that of its method ``make_sampler()`` if it has one, else a `CachedSampler`.

    Args:
        prior: the network.
        sampling: guidance, top-k and top-p; a ``make_sampler`` of the prior's own is given it if not the default.

    Raises:
        ConfigError: guidance of a prior that cannot be guided, or a sampler that knows no such settings.
    """
    own = getattr(prior, "make_sampler", None)
    if own is None:
        return CachedSampler(prior, sampling)
    if sampling == PLAIN:
        return own()
    if not inspect.signature(own).parameters:
        raise ConfigError(
            f"{type(prior).__name__}.make_sampler() takes no settings, so it cannot draw with {sampling.describe()}: "
            "leave that out, or give the method an argument (ral_gym.priors.guidance.Sampling)"
        )
    return own(sampling)
