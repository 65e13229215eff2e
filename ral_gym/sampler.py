"""Drawing code grids from the PixelCNN one code at a time, without computing anything twice.

A full pass per code costs T passes per image. Here the vertical stack runs once per grid row and the horizontal stack
and the output stack once per code, so that an image costs about as many multiply-adds as one full pass. "Fast
Generation for Convolutional Autoregressive Models" (Ramachandran et al., 2017) does this for PixelCNN++; new here are
the start from any prefix and batches whose images stand at different positions.

`CachedSampler.sample` draws whole grids; `begin`, `logits` and `advance` do the same one code at a time, for a policy
that acts in an environment. `sample_naive` is the simple version, the reference of tests and benchmark.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ral_gym.errors import ConfigError
from ral_gym.pixelcnn import PixelCNN
from ral_gym.sampling_cache import PackedWeights, SamplingCache


def draw(logits: Tensor, uniforms: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Draw one code per image by inverting the cumulative distribution, and never one of probability zero.

    Args:
        logits: (B, K).
        uniforms: (B,) in [0, 1].
        temperature: divides the logits.

    Returns:
        codes (B,) int64 and their log-probabilities (B,) under softmax(logits / temperature).
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    probs = torch.softmax(logits, dim=1)  # (B, K)
    cumulative = probs.cumsum(dim=1)  # (B, K)
    # Rounding leaves the total near 1; the last code of positive probability is just below, whatever the uniform.
    uniforms = uniforms.to(logits.dtype) * (1 - torch.finfo(logits.dtype).eps)
    codes = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)  # (B, 1)
    codes.clamp_(max=logits.shape[1] - 1)  # only NaN logits need it: they give NaN log-probabilities and no crash
    return codes[:, 0], probs.gather(1, codes)[:, 0].log()


class _Request:
    """The checked arguments of `sample`, and the grid as it is being drawn."""

    def __init__(
        self,
        prior: PixelCNN,
        batch_size: int | None,
        codes: Tensor | None,
        start: int | Tensor,
        stop: int | None,
        temperature: float,
        generator: torch.Generator | None,
        uniforms: Tensor | None,
    ):
        like = prior.input.embedding.weight
        full, width = prior.height * prior.width, prior.width
        if codes is None:
            if batch_size is None or batch_size < 1:
                raise ConfigError(f"sample: batch_size={batch_size}; pass codes, or a batch size of at least 1")
            codes = torch.full((batch_size, full), prior.codebook_size, device=like.device)
        batch, length = codes.shape
        if batch_size is not None and batch_size != batch:
            raise ConfigError(f"sample: batch_size={batch_size} but codes are {batch} grids; leave batch_size out")
        _check_length(prior, length)
        stop = length if stop is None else stop
        if stop % width or not 0 < stop <= length:
            raise ConfigError(f"sample: stop={stop} must be a multiple of {width} from {width} to {length}")
        if not temperature > 0:
            raise ConfigError(f"sample: temperature={temperature} must be above 0")
        starts = _host_positions(start, batch, length)
        self.batch_size = batch
        self.begin, self.stop = int(starts.min()), stop
        self.temperature = temperature
        self.generator = generator
        self.uniforms = uniforms
        # Batch rows that start later are drawn in step with the others, and keep what they were given until then.
        self.starts = None if (starts == starts[0]).all() else torch.as_tensor(starts, device=like.device)
        self.codes = codes[:, :stop].clamp(max=prior.codebook_size - 1)  # (B, stop)
        self.drawn: list[Tensor] = []  # (B,) per position
        self.log_probs: list[Tensor] = []
        self.dtype = torch.float64 if like.dtype == torch.float64 else torch.float32

    def draw(self, logits: Tensor, position: int) -> Tensor:
        """Draw every batch row's code at the next position from logits (B, K); returns (B,) int64."""
        if self.uniforms is not None:
            uniforms = self.uniforms[:, position]
        else:
            device = logits.device if self.generator is None else self.generator.device
            uniforms = torch.rand(self.batch_size, generator=self.generator, device=device, dtype=torch.float32)
            uniforms = uniforms.to(logits.device)
        codes, log_probs = draw(logits, uniforms, self.temperature)
        if self.starts is not None:
            given = self.starts > position  # (B,)
            codes = torch.where(given, self.codes[:, position], codes)
            log_probs = log_probs.masked_fill(given, 0.0)
        self.drawn.append(codes)
        self.log_probs.append(log_probs)
        return codes

    def result(self) -> tuple[Tensor, Tensor]:
        """The grids (B, stop) and the log-probabilities (B, stop) of what was drawn."""
        log_probs = self.codes.new_zeros(self.codes.shape, dtype=self.dtype)
        if self.drawn:
            self.codes[:, self.begin :] = torch.stack(self.drawn, dim=1)
            log_probs[:, self.begin :] = torch.stack(self.log_probs, dim=1)
        return self.codes, log_probs


def _check_length(prior: PixelCNN, length: int) -> None:
    full, width = prior.height * prior.width, prior.width
    if length % width or not 0 < length <= full:
        raise ConfigError(f"grids of {length} codes; pass whole rows, a multiple of {width} from {width} to {full}")


def _host_positions(position: int | Tensor, batch: int, length: int) -> np.ndarray:
    """Positions as (B,) int64 on the host, checked to lie in 0..length."""
    positions = np.empty(batch, dtype=np.int64)
    positions[:] = position.cpu().numpy() if isinstance(position, Tensor) else position
    if positions.min() < 0 or positions.max() > length:
        raise ConfigError(
            f"positions from {positions.min()} to {positions.max()} do not fit grids of {length} codes; "
            f"they must be from 0 to {length}"
        )
    return positions


class CachedSampler:
    """Draws codes from a PixelCNN and keeps everything it has computed for the codes to come.

    The weights are packed when the sampler is made: call `refresh` whenever those of the prior have changed. Dropout is
    never applied, and nothing has a gradient.

    What is kept, per block: the inputs of the vertical stack in the last grid rows, its term of the horizontal
    pre-activations in the current grid row, and the inputs of the horizontal stack in that row.

    Args:
        prior: the network to draw from; the sampler keeps a reference to it.

    Attributes:
        use_cuda_graphs: replay the work of a grid row and of a code as CUDA graphs; set on CUDA, ignored elsewhere.
    """

    def __init__(self, prior: PixelCNN):
        self.prior = prior
        self.weights = PackedWeights(prior)
        self.use_cuda_graphs = self.weights.to_logits.is_cuda
        self._cache: SamplingCache | None = None
        self._position: np.ndarray | None = None  # (B,) while drawing code by code
        self._length = 0
        self._stepped = False  # the cache holds features and logits of the current positions

    def refresh(self) -> None:
        """Pack the prior's weights again, to the same addresses. What `begin` computed is stale then: begin again."""
        like, packed = self.prior.input.embedding.weight, self.weights.to_logits
        if like.dtype != packed.dtype or like.device != packed.device:
            self.weights = PackedWeights(self.prior)
            self.use_cuda_graphs = like.is_cuda
            self._cache = None
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
    ) -> tuple[Tensor, Tensor]:
        """Draw the codes of whole grid rows, or continue given ones. Whatever `begin` started ends.

        Args:
            batch_size: B; only needed without `codes`.
            codes: (B, T) int64, whose entries before `start` are given and kept; T is a whole number of grid rows.
            start: first position to draw, one for all or (B,) int64; any position from 0 to T.
            stop: first position not to draw, a multiple of W; None: T.
            temperature: divides the logits.
            generator: source of the uniforms. One `torch.rand(B)` in float32 is drawn per position, in raster order
                from the least `start` on, so that drawing code by code with the same generator gives the same codes.
            uniforms: (B, T) in [0, 1], used instead.

        Returns:
            codes (B, stop) int64, and (B, stop) the log-probabilities of those drawn, at `temperature`; 0 where given.

        Raises:
            ConfigError: an argument is out of range, or neither batch_size nor codes is given.
        """
        request = _Request(self.prior, batch_size, codes, start, stop, temperature, generator, uniforms)
        cache = self._cache_for(request.batch_size)
        self._position = None
        if request.begin < request.stop:
            cache.fill(slice(None), request.codes, np.full(request.batch_size, request.begin))
        for position in range(request.begin, request.stop):
            row, column = divmod(position, self.prior.width)
            if column == 0 and position > request.begin:
                cache.next_row(row)
            cache.step(column)
            cache.put(request.draw(cache.logits, position), row, column)
        return request.result()

    @torch.no_grad()
    def begin(self, codes: Tensor, position: int | Tensor) -> None:
        """Start drawing code by code.

        Args:
            codes: (B, T) int64, given before `position`; T is a whole number of grid rows.
            position: next position to draw, one for all or (B,) int64, from 0 to T (finished).

        Raises:
            ConfigError: T is not a whole number of grid rows, or a position is out of range.
        """
        batch, length = codes.shape
        _check_length(self.prior, length)
        self._position = _host_positions(position, batch, length)
        self._length = length
        self._stepped = False
        self._cache_for(batch).fill(slice(None), codes, self._position)

    @torch.no_grad()
    def rebuild(self, rows: Tensor, codes: Tensor, position: int | Tensor) -> None:
        """Let some rows of the batch start anew, from other prefixes.

        Args:
            rows: (n,) int64, which; none twice.
            codes: (n, T) int64, their grids, given before `position`; T as in `begin`.
            position: next position to draw, one for all or (n,) int64.

        Raises:
            ConfigError: T differs from `begin`'s, or a position is out of range.
        """
        cache, positions = self._begun()
        if codes.shape[1] != self._length:
            raise ConfigError(f"rebuild: grids of {codes.shape[1]} codes; `begin` was given {self._length}")
        if len(rows) == 0:
            return
        new = _host_positions(position, len(rows), self._length)
        positions[rows.cpu().numpy()] = new
        self._stepped = False
        cache.fill(rows, codes, new)

    def features(self) -> Tensor:
        """The PixelCNN's features (B, C) at each batch row's position; finished rows: meaningless but finite."""
        return self._step().features.clone()

    def logits(self) -> Tensor:
        """The logits (B, K) of the code at each batch row's position; finished rows: meaningless but finite."""
        return self._step().logits.clone()

    @torch.no_grad()
    def advance(self, codes: Tensor) -> None:
        """Take codes (B,) int64, 0..K-1, for drawn and move on by one position; finished rows ignore theirs."""
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
        at = torch.as_tensor(active, device=codes.device)
        cache.put_at(active, codes[at], row, column)
        crossing = (column + 1 == width) & (positions[active] < self._length)
        if crossing.any():
            cache.next_row_of(active[crossing], row[crossing] + 1)

    @property
    def position(self) -> Tensor:
        """(B,) int64, the next position of each batch row; T when it is finished."""
        return torch.as_tensor(self._begun()[1].copy(), device=self.weights.to_logits.device)

    def _cache_for(self, batch: int) -> SamplingCache:
        if self._cache is None or self._cache.batch != batch:
            self._cache = SamplingCache(self.weights, batch)
        self._cache.use_cuda_graphs = self.use_cuda_graphs
        return self._cache

    def _begun(self) -> tuple[SamplingCache, np.ndarray]:
        if self._cache is None or self._position is None:
            raise RuntimeError(
                "the sampler holds no episode: call begin() first, and again after sample() or refresh()"
            )
        return self._cache, self._position

    @torch.no_grad()
    def _step(self) -> SamplingCache:
        """The cache, with features and logits of the current positions in it."""
        cache, positions = self._begun()
        if not self._stepped:
            # A finished row goes through its last position once more, which changes nothing.
            columns = np.minimum(positions, self._length - 1) % self.prior.width
            if (positions == positions[0]).all():
                cache.step(int(columns[0]))
            else:
                cache.step_at(columns)
            self._stepped = True
        return cache


@torch.no_grad()
def sample_naive(
    prior: PixelCNN,
    batch_size: int | None = None,
    *,
    codes: Tensor | None = None,
    start: int | Tensor = 0,
    stop: int | None = None,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    uniforms: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw like `CachedSampler.sample`, by a full pass per code: simple, slow, and what the cache is tested against."""
    request = _Request(prior, batch_size, codes, start, stop, temperature, generator, uniforms)
    training = prior.training
    prior.eval()
    for position in range(request.begin, request.stop):
        request.codes[:, position] = request.draw(prior(request.codes)[:, position], position)
    prior.train(training)
    return request.result()
