"""Drawing codes from logits, the arguments that all samplers share, and the simple sampler: a full pass per code.

``sample_naive`` is the reference against which tests and benchmarks hold ``ral_gym.priors.sampler``, which does the
same without repeating work.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ral_gym.errors import ConfigError
from ral_gym.priors.base import Prior, check_condition, given_codes
from ral_gym.priors.guidance import PLAIN, Sampling, check_guidance, guided_logits
from ral_gym.priors.transfer import on_device


def likeliest(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits (B, K) with minus infinity for codes that top-k, or then top-p, leaves out.

    Args:
        logits: (B, K).
        top_k: keep the k likeliest codes, and codes as likely as the last of them; 0: all.
        top_p: keep the fewest likeliest codes whose probabilities reach this share; 1: all.
    """
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=1).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=1, descending=True, stable=True)
        probs = ordered.softmax(1)
        before = running_sum(probs) - probs  # (B, K), of the codes that are likelier
        before[:, 0] = 0  # rounding must not drop the likeliest
        logits = logits.masked_fill(
            torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= top_p), -torch.inf
        )
    return logits


def running_sum(x: Tensor) -> Tensor:
    """`cumsum` over the columns of (B, K); by repeatable additions where `torch.use_deterministic_algorithms` asks so.

    CUDA's `cumsum` refuses to run then.
    """
    if not (x.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return x.cumsum(1)
    shift = 1
    while shift < x.shape[1]:
        x = torch.cat([x[:, :shift], x[:, shift:] + x[:, :-shift]], 1)
        shift *= 2
    return x


def draw(
    logits: Tensor, uniforms: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Draw one code per image by inverting the cumulative distribution, and never one of probability zero.

    Args:
        logits: (B, K).
        uniforms: (B,) in [0, 1].
        temperature: divides the logits.
        top_k: see `likeliest`.
        top_p: see `likeliest`.

    Returns:
        codes (B,) int64 and their log-probabilities (B,) under the distribution that they are drawn from.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    if top_k or top_p < 1:
        logits = likeliest(logits, top_k, top_p)
    probs = torch.softmax(logits, dim=1)  # (B, K)
    # CUDA may sum in another order from code to code: the sum must not step where there is no probability.
    cumulative = running_sum(probs).masked_fill(probs == 0, 0).cummax(1).values  # (B, K)
    # Rounding leaves the total near 1; the last code of positive probability is just below, whatever the uniform.
    uniforms = uniforms.to(logits.dtype) * (1 - torch.finfo(logits.dtype).eps)
    codes = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)  # (B, 1)
    codes.clamp_(max=logits.shape[1] - 1)  # only NaN logits need it: they give NaN log-probabilities and no crash
    return codes[:, 0], probs.gather(1, codes)[:, 0].log()


class Request:
    """The checked arguments of `sample`, and the grid as it is being drawn."""

    def __init__(
        self,
        prior: Prior,
        batch_size: int | None,
        codes: Tensor | None,
        start: int | Tensor,
        stop: int | None,
        temperature: float,
        generator: torch.Generator | None,
        uniforms: Tensor | None,
        condition: Tensor | None,
        sampling: Sampling = PLAIN,
    ):
        like = next(prior.parameters())
        full, width = prior.height * prior.width, prior.width
        if codes is None:
            if batch_size is None or batch_size < 1:
                raise ConfigError(f"sample: batch_size={batch_size}; pass codes, or a batch size of at least 1")
            codes = torch.full((batch_size, full), prior.codebook_size, device=like.device)
            check_condition(prior, condition, batch_size)
        else:
            codes, condition = given_codes(prior, codes, condition)
        batch, length = codes.shape
        if batch_size is not None and batch_size != batch:
            raise ConfigError(f"sample: batch_size={batch_size} but codes are {batch} grids; leave batch_size out")
        check_length(prior, length)
        stop = length if stop is None else stop
        if stop % width or not 0 < stop <= length:
            raise ConfigError(f"sample: stop={stop} must be a multiple of {width} from {width} to {length}")
        if not temperature > 0:
            raise ConfigError(f"sample: temperature={temperature} must be above 0")
        starts = host_positions(start, batch, length)
        self.batch_size = batch
        self.begin, self.stop = int(starts.min()), stop
        self.temperature, self.sampling = temperature, sampling
        self.generator = generator
        self.condition = condition
        self.uniforms = uniforms
        if uniforms is None and generator is not None and generator.device != like.device:
            self.uniforms = self._all_uniforms(like.device)
        # Batch rows that start later are drawn along with the others, but keep their given codes up to their start.
        self.starts = None if (starts == starts[0]).all() else on_device(starts, like.device)
        _check_given(codes, starts)
        self.codes = codes[:, :stop].clamp(0, prior.codebook_size - 1)  # (B, stop)
        self.drawn: list[Tensor] = []  # (B,) per position
        self.log_probs: list[Tensor] = []
        self.dtype = torch.float64 if like.dtype == torch.float64 else torch.float32

    def _all_uniforms(self, device: torch.device) -> Tensor:
        """The uniforms (B, stop) that drawing position by position takes from another device's generator."""
        generator, rows = self.generator, max(self.stop - self.begin, 0)
        assert generator is not None
        drawn = torch.rand(rows, self.batch_size, generator=generator, device=generator.device, dtype=torch.float32)
        uniforms = torch.zeros(self.batch_size, self.stop, dtype=torch.float32, device=device)
        uniforms[:, self.begin :] = drawn.T.to(device, non_blocking=True)
        return uniforms

    def draw(self, logits: Tensor, position: int) -> Tensor:
        """Draw every batch row's code at the next position from logits (B, K); returns (B,) int64."""
        if self.uniforms is not None:
            uniforms = self.uniforms[:, position]
        else:
            uniforms = torch.rand(self.batch_size, generator=self.generator, device=logits.device, dtype=torch.float32)
        codes, log_probs = draw(logits, uniforms, self.temperature, self.sampling.top_k, self.sampling.top_p)
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


def _check_given(codes: Tensor, starts: np.ndarray) -> None:
    """Refuse negative codes (B, T) before each row's start (B,): as an index one may end the use of a GPU.

    Behind the start any filling is fine: it is drawn over.

    Raises:
        ConfigError: the lowest one.
    """
    if not starts.any():
        return
    given = torch.arange(codes.shape[1], device=codes.device) < on_device(starts, codes.device)[:, None]  # (B, T)
    lowest = int(codes.masked_fill(~given, 0).min())
    if lowest < 0:
        raise ConfigError(f"sample: a given code is {lowest}; codes are 0 or more, and start is the first not given")


def check_length(prior: Prior, length: int) -> None:
    """Raise ConfigError if `length` codes are not 1..H whole rows of the network's grid."""
    full, width = prior.height * prior.width, prior.width
    if length % width or not 0 < length <= full:
        raise ConfigError(f"grids of {length} codes; pass whole rows, a multiple of {width} from {width} to {full}")


def host_positions(position: int | Tensor, batch: int, length: int) -> np.ndarray:
    """Positions as (B,) int64 on the host, checked to lie in 0..length."""
    positions = np.empty(batch, dtype=np.int64)
    positions[:] = position.cpu().numpy() if isinstance(position, Tensor) else position
    if positions.min() < 0 or positions.max() > length:
        raise ConfigError(
            f"positions from {positions.min()} to {positions.max()} do not fit grids of {length} codes; "
            f"they must be from 0 to {length}"
        )
    return positions


@torch.no_grad()
def sample_naive(
    prior: Prior,
    batch_size: int | None = None,
    *,
    codes: Tensor | None = None,
    start: int | Tensor = 0,
    stop: int | None = None,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    uniforms: Tensor | None = None,
    condition: Tensor | None = None,
    sampling: Sampling = PLAIN,
) -> tuple[Tensor, Tensor]:
    """Draw like `CachedSampler.sample`, by a full pass per code: simple, slow, and what the cache is tested against."""
    check_guidance(prior, sampling.guidance)
    request = Request(prior, batch_size, codes, start, stop, temperature, generator, uniforms, condition, sampling)
    training = prior.training
    prior.eval()
    for position in range(request.begin, request.stop):
        logits = guided_logits(prior, request.codes, request.condition, sampling)  # (B, T, K)
        request.codes[:, position] = request.draw(logits[:, position], position)
    prior.train(training)
    return request.result()
