"""Given and corrupted prefixes: how a model completes an oracle's beginning, and how it recovers from a mistake.

The second half of `ral_gym.metrics.exposure`, which compares a model on its own prefixes and on the oracle's. Here

* `prefix_curve`: how well does the model finish an image whose first r rows are the oracle's?
* `corruption_response`: a fraction of the prefix is replaced by random codes; how long does the model suffer?

Random codes are not what a model would draw by mistake, and the oracle that judges has never seen them either: compare
models with each other, rather than trust one model's value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ral_gym.errors import ConfigError
from ral_gym.grid import CodeGrid
from ral_gym.metrics.codes import Codes, Logits, _batches, _tensor
from ral_gym.metrics.divergences import conditional_log_probs, cross_entropy, kl
from ral_gym.metrics.exposure import Curve
from ral_gym.metrics.intervals import Estimate, mean_estimate


class Sampler(Protocol):
    """What `CachedSampler` and `TwoLevelSampler` have in common."""

    def sample(
        self, *, codes: Tensor, prefix_rows: int, uniforms: Tensor | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Keep the codes (B, T) of the first rows, draw the others: codes (B, T), log-probabilities (B, T)."""
        ...


@dataclass(frozen=True)
class PrefixCurve:
    """Completions of images whose first r rows are the oracle's; curves over `rows`, in nats per drawn code.

    Attributes:
        rows: the r of each entry; 0: free running.
        nll: NLL_oracle of the codes that the model drew.
        oracle_nll: the same where the oracle drew them: its entropy.
        excess: their difference, paired by prefix. Sharpening lowers it, so read it together with `kl`.
        kl: KL(model || oracle) of the completions, which only a better model lowers.
        kl_given: the same at the same positions, with the oracle's codes as context throughout.
        harm: kl - kl_given, paired by prefix: the cost of the model's own codes as context. Compare this across r
            rather than `kl`, since a model may simply be worse at the lower rows.
        n: prefixes.
    """

    rows: list[int]
    nll: Curve
    oracle_nll: Curve
    excess: Curve
    kl: Curve
    kl_given: Curve
    harm: Curve
    n: int


@torch.no_grad()
def prefix_curve(
    model: Logits,
    oracle: Logits,
    sampler: Sampler,
    oracle_codes: Tensor,
    grid: CodeGrid,
    *,
    rows: list[int] | None = None,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> PrefixCurve:
    """Let the model complete the oracle's images, from every number of given rows.

    Without exposure bias, `harm` is 0 for every r; with it, it is largest at r = 0. The episodes are those of RAL's
    partial generation (Section 4.3) and of the image completion of Section 5.5.

    Args:
        model: the model's logits.
        oracle: the oracle's.
        sampler: draws from the model.
        oracle_codes: (N, T) int64, samples of the oracle, on the generators' device.
        grid: of the codes; rows are those of the top level and include the bottom rows under them.
        rows: which r, 0..H-1; None: all.
        batch_size: images drawn at a time.
        generator: of the sampler; None: the global one.

    Raises:
        ConfigError: a row outside 0..H-1, or fewer than two images.
    """
    rows = list(range(grid.height)) if rows is None else rows
    if any(not 0 <= row < grid.height for row in rows):
        raise ConfigError(f"rows {rows}: a prefix has 0 to {grid.height - 1} of the {grid.height} rows")
    parts: dict[str, list[Tensor]] = {"nll": [], "oracle_nll": [], "kl": [], "kl_given": []}
    for given in _batches(oracle_codes, batch_size, None):
        log_p, log_o = conditional_log_probs(model, given), conditional_log_probs(oracle, given)  # (B, T, K)
        entropy, kl_given = cross_entropy(log_o, log_o), kl(log_p, log_o)  # (B, T)
        metrics = []
        for row in rows:
            drawn = torch.from_numpy(grid.mask(row, grid.height)).to(given.device)  # (T,)
            codes, _ = sampler.sample(codes=given, prefix_rows=row, uniforms=None, generator=generator)
            log_p, log_o = conditional_log_probs(model, codes), conditional_log_probs(oracle, codes)  # (B, T, K)
            along = torch.stack([cross_entropy(log_p, log_o), entropy, kl(log_p, log_o), kl_given])  # (4, B, T)
            metrics.append(along[:, :, drawn].mean(2))
        for name, values in zip(parts, torch.stack(metrics, 2).cpu(), strict=True):  # (B, R) each
            parts[name].append(values)
    values = {name: torch.cat(part) for name, part in parts.items()}  # (N, R) each
    return PrefixCurve(
        rows=rows,
        **{name: Curve.of(value) for name, value in values.items()},
        excess=Curve.of(values["nll"] - values["oracle_nll"]),
        harm=Curve.of(values["kl"] - values["kl_given"]),
        n=len(oracle_codes),
    )


@dataclass(frozen=True)
class CorruptionResponse:
    """KL(o || p) after a prefix, original and corrupted; curves over the distance d = 0, 1, .. from the prefix's end.

    Attributes:
        clean: after the original prefix.
        corrupted: after the corrupted prefix.
        bump: corrupted - clean, paired by image.
        area: the bump's sum over all distances, in nats.
        half_life: see `half_life`; NaN where the area is within two standard errors of 0 or below.
        replaced: codes replaced per image.
    """

    clean: Curve
    corrupted: Curve
    bump: Curve
    area: Estimate
    half_life: float
    replaced: int


@torch.no_grad()
def corruption_response(
    model: Logits,
    oracle: Logits,
    oracle_codes: Tensor,
    grid: CodeGrid,
    *,
    fraction: float,
    prefix_rows: int,
    window: int | None = None,
    sampler: Sampler | None = None,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> CorruptionResponse:
    """Replace a fraction of the prefix by random codes and see how far the model's error reaches.

    Args:
        model: the model's logits.
        oracle: the oracle's.
        oracle_codes: (N, T) int64, samples of the oracle, on the generators' device.
        grid: of the codes, of one level.
        fraction: q in (0, 1], of the codes that can be replaced.
        prefix_rows: rows of the prefix, 1..H-1.
        window: only this many codes, at the end of the prefix, can be replaced; None: all.
        sampler: draws the codes that follow from the model (self-recovery), with the same uniforms after the clean and
            the corrupted prefix. None: the oracle's codes follow (how long does a single mistake matter?).
        batch_size: rows per pass.
        generator: draws the replacements and the uniforms, on the CPU; None: the global one.

    Raises:
        ConfigError: two levels, or a fraction, prefix or window out of range.
    """
    if grid.levels != 1:
        raise ConfigError("corruption_response: the distance from the prefix is that of one level; use `prefix_curve`")
    if not 1 <= prefix_rows < grid.height:
        raise ConfigError(f"prefix_rows {prefix_rows}: give 1 to {grid.height - 1}")
    stop = prefix_rows * grid.width
    begin = 0 if window is None else stop - window
    behind: list[Tensor] = []
    for given in _batches(oracle_codes, batch_size, None):
        broken = corrupt(given, fraction, grid.codebook_size, start=begin, stop=stop, generator=generator)
        uniforms = torch.rand(given.shape, generator=generator).to(given.device)
        pair = []
        for codes in (given, broken):
            if sampler is not None:
                codes, _ = sampler.sample(codes=codes, prefix_rows=prefix_rows, uniforms=uniforms, generator=None)
            log_p, log_o = conditional_log_probs(model, codes), conditional_log_probs(oracle, codes)  # (B, T, K)
            pair.append(kl(log_o, log_p)[:, stop:].cpu())  # (B, L)
        behind.append(torch.stack(pair))
    clean, corrupted = torch.cat(behind, 1)  # (N, L) each
    bump = corrupted - clean
    area = mean_estimate(bump.sum(1), method="mean over images, paired")
    seen = area.value > 2 * area.standard_error
    return CorruptionResponse(
        clean=Curve.of(clean),
        corrupted=Curve.of(corrupted),
        bump=Curve.of(bump),
        area=area,
        half_life=half_life(bump.mean(0)) if seen else math.nan,
        replaced=_count(fraction, stop - begin),
    )


def corrupt(
    codes: Codes,
    fraction: float,
    codebook_size: int,
    *,
    start: int = 0,
    stop: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Replace a fraction of the codes, each by one drawn uniformly from the K - 1 other codes.

    Args:
        codes: (B, T) int64.
        fraction: in (0, 1], of the positions start..stop-1; rounded to a whole number of codes, at least one, the same
            for every row, at other positions in each.
        codebook_size: K >= 2.
        start: first position that can change.
        stop: first that cannot; None: T.
        generator: on the CPU; None: the global one.

    Returns:
        (B, T) int64, a copy.

    Raises:
        ConfigError: the fraction or the positions are out of range.
    """
    given = _tensor(codes).long()
    batch, length = given.shape
    stop = length if stop is None else stop
    if not (0 < fraction <= 1 and 0 <= start < stop <= length):
        raise ConfigError(
            f"corrupt: a fraction {fraction} of positions {start}..{stop - 1} of {length}: give a fraction in (0, 1] "
            "and at least one position"
        )
    # The ranks of random numbers are a random order of the positions.
    order = torch.rand(batch, stop - start, generator=generator).argsort(1).argsort(1)  # (B, L)
    chosen = (order < _count(fraction, stop - start)).to(given.device)  # (B, L)
    shift = torch.randint(1, codebook_size, (batch, stop - start), generator=generator).to(given.device)  # (B, L)
    result = given.clone()
    result[:, start:stop] += shift * chosen
    return result % codebook_size


def half_life(bump: Tensor) -> float:
    """Distance within which half of a bump's area lies: if it falls as exp(-d / s), its half-life s ln 2.

    In raster order a code is seen again a row further down, so that the bump falls and rises again; the first crossing
    of half its height would say nothing, the area does. It counts only what lies before the image's end.

    Args:
        bump: (L,) over the distances d = 0, 1, ..; the area of entry d lies between d and d + 1.

    Returns:
        In [0, L]; NaN where the area is not positive.
    """
    area = bump.double().cumsum(0)  # (L,)
    if not bool(area[-1] > 0):
        return math.nan
    at = int((area >= area[-1] / 2).nonzero()[0])
    before = float(area[at - 1]) if at else 0.0
    return at + (float(area[-1]) / 2 - before) / (float(area[at]) - before)


def _count(fraction: float, positions: int) -> int:
    return max(1, round(fraction * positions))
