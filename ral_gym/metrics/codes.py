"""Metrics about codes: negative log-likelihood, entropy, unigram, usage; all in nats per code.

The generator is given as a function `logits(codes (B, T)) -> (B, T, K)` whose logits at t see codes before t only: one
teacher-forced pass gives all T conditional distributions. Falling entropy with rising held-out NLL is sharpening, not
learning, so a table always shows both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Codes = Tensor | np.ndarray
"""Codes (N, T) of any integer type, 0..K-1."""
Logits = Callable[[Tensor], Tensor]
"""Maps int64 codes (B, T) to logits (B, T, K)."""


@torch.no_grad()
def nll(
    logits: Logits,
    codes: Codes,
    temperature: float = 1.0,
    batch_size: int = 256,
    device: str | torch.device | None = None,
) -> float:
    """Mean negative log-likelihood of codes under a generator, teacher-forced.

    Args:
        logits: the generator.
        codes: (N, T).
        temperature: the logits are divided by it.
        batch_size: rows per pass.
        device: where the generator is; None: where the codes are.

    Returns:
        Nats per code, the mean over all N * T of them.
    """
    return float(image_nll(logits, codes, temperature, batch_size, device).mean())


@torch.no_grad()
def image_nll(
    logits: Logits,
    codes: Codes,
    temperature: float = 1.0,
    batch_size: int = 256,
    device: str | torch.device | None = None,
) -> Tensor:
    """`nll` of each image: (N,) float64 on the CPU, in nats per code.

    Codes may be sequences (N, T + 1) that end with a label, if the generator reads it.
    """
    means = []
    for batch in _batches(codes, batch_size, device):
        log_probs = (logits(batch) / temperature).log_softmax(-1)  # (B, T, K)
        drawn = batch[:, : log_probs.shape[1], None]  # a label at the end is given, not drawn
        means.append(-log_probs.gather(-1, drawn).double().mean((1, 2)).cpu())
    return torch.cat(means)


@torch.no_grad()
def entropy(
    logits: Logits,
    sampled_codes: Codes,
    temperature: float = 1.0,
    batch_size: int = 256,
    device: str | torch.device | None = None,
) -> float:
    """Entropy of a generator per code, estimated on its own samples.

    Rao-Blackwellised: the exact entropy of p(x_t | x_<t), averaged over sampled prefixes and positions, instead of -log
    p of the code that happened to be drawn: the same mean (chain rule) with a much smaller variance.

    Args:
        logits: the generator.
        sampled_codes: (N, T), drawn from it at this same temperature.
        temperature: the logits are divided by it.
        batch_size: rows per pass.
        device: where the generator is; None: where the codes are.

    Returns:
        Nats per code, in [0, log K].
    """
    return float(image_entropy(logits, sampled_codes, temperature, batch_size, device).mean())


@torch.no_grad()
def image_entropy(
    logits: Logits,
    sampled_codes: Codes,
    temperature: float = 1.0,
    batch_size: int = 256,
    device: str | torch.device | None = None,
) -> Tensor:
    """What each sample adds to `entropy`: (N,) float64 on the CPU, in nats per code."""
    means = []
    for batch in _batches(sampled_codes, batch_size, device):
        log_probs = (logits(batch) / temperature).log_softmax(-1)  # (B, T, K)
        # entr is -p log p with 0 at p = 0, where logits of -inf would give NaN.
        means.append(torch.special.entr(log_probs.exp()).sum(-1).double().mean(1).cpu())
    return torch.cat(means)


def unigram_nll(train_codes: Codes, test_codes: Codes, codebook_size: int) -> float:
    """NLL of held-out codes under the frequencies of the training codes, with one added to each count.

    A prior that is no better on held-out codes than this has memorised or learnt nothing.

    Args:
        train_codes: (N, T).
        test_codes: (M, T).
        codebook_size: K.

    Returns:
        Nats per code.
    """
    counts = code_counts(train_codes, codebook_size).double() + 1  # (K,)
    test = code_counts(test_codes, codebook_size).double()  # (K,)
    return float(-(test * (counts / counts.sum()).log()).sum() / test.sum())


def perplexity(codes: Codes, codebook_size: int) -> float:
    """Exponential of the entropy of the codes' frequencies: in [1, K], K when all are used equally often."""
    counts = code_counts(codes, codebook_size).double()  # (K,)
    return float(torch.special.entr(counts / counts.sum()).sum().exp())


def usage(codes: Codes, codebook_size: int) -> int:
    """How many of the K codes occur at all."""
    return int((code_counts(codes, codebook_size) > 0).sum())


def code_counts(codes: Codes, codebook_size: int) -> Tensor:
    """How often each code occurs: (K,) int64 on the CPU.

    Raises:
        ValueError: there are no codes, or one is not in 0..K-1.
    """
    flat = _tensor(codes).flatten().long().cpu()  # (N * T,)
    if len(flat) == 0 or int(flat.min()) < 0 or int(flat.max()) >= codebook_size:
        found = f"{int(flat.min())}..{int(flat.max())}" if len(flat) else "none"
        raise ValueError(f"codes must be in 0..{codebook_size - 1}, found {found}")
    return torch.bincount(flat, minlength=codebook_size)


class TemperatureMatch(NamedTuple):
    """A temperature and the entropy, in nats per code, that was measured at it."""

    temperature: float
    entropy: float


def match_temperature(
    sample: Callable[[float], Codes],
    entropy_of: Callable[[Codes, float], float],
    target: float,
    low: float = 0.5,
    high: float = 1.2,
    iterations: int = 12,
    tolerance: float = 1e-3,
) -> TemperatureMatch:
    """Find the temperature at which a generator's entropy is `target`, by bisection (row `mle_temperature`).

    Entropy rises with temperature. `sample` should start from the same seed at every call, so that the sampling noise
    does not hide it. If no temperature in [low, high] reaches the target, the result is next to that end; compare the
    returned entropy with the target.

    Args:
        sample: temperature -> codes (N, T) drawn at it.
        entropy_of: codes, temperature -> nats per code.
        target: the entropy wanted.
        low: lowest temperature.
        high: highest temperature.
        iterations: halvings of [low, high].
        tolerance: stop early when this close to the target, in nats.

    Returns:
        Of the temperatures tried, the one whose entropy is closest to the target, and that entropy.
    """
    best = TemperatureMatch(float("nan"), float("inf"))
    for _ in range(iterations):
        middle = (low + high) / 2
        measured = TemperatureMatch(middle, entropy_of(sample(middle), middle))
        best = min(best, measured, key=lambda match: abs(match.entropy - target))
        if abs(measured.entropy - target) <= tolerance:
            break
        low, high = (middle, high) if measured.entropy < target else (low, middle)
    return best


def _batches(codes: Codes, batch_size: int, device: str | torch.device | None) -> Iterator[Tensor]:
    """Rows of codes as int64 (B, T) on the device.

    Raises:
        ValueError: the codes are not (N, T) with at least one row.
    """
    if codes.ndim != 2 or len(codes) == 0:
        raise ValueError(f"codes must be (N, T) with N >= 1, not {tuple(codes.shape)}")
    for start in range(0, len(codes), batch_size):
        yield _tensor(codes[start : start + batch_size]).to(device=device, dtype=torch.int64)


def _tensor(codes: Codes) -> Tensor:
    """Codes as a tensor; an array is copied, because a memory-mapped one is read-only."""
    return codes if isinstance(codes, Tensor) else torch.from_numpy(np.array(codes))
