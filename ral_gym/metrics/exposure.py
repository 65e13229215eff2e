"""Exposure bias: what a model's own mistakes in the prefix cost it, measured against an oracle.

A model is trained on prefixes of the data, and draws on prefixes of its own. With an oracle o whose likelihoods are
known, both can be measured: for a model p and a distance f over the codes of one position,

    CGD(H, l) = E f(p(. | c_<l), o(. | c_<l)) over prefixes c_<l of H;    M: the model's own, D: the oracle's.

* `exposure_bias`: EB-C(l) = CGD(M, l) / CGD(D, l) (He et al., 2021), 1 where there is no exposure bias; accumulated
  errors (Arora et al., 2022): AccErr(l) = l K_M(l) / K_D(l), where K(l) sums CGD over the first l positions with
  f = KL(o || p), and their excess over linear growth, 100 (K_M(l) / K_D(l) - 1), in percent.
* `prefix_curve`: how well does the model finish an image whose first r rows are the oracle's?
* `corruption_response`: a fraction of the prefix is replaced by random codes; how long does the model suffer?

The first two papers disagree on how large the effect is, so a tool must be able to show none: with the oracle for a
model, EB-C is 1 and the excess 0. A caveat on all of them: the oracle's own conditional distributions on prefixes that
it would hardly ever draw are whatever its network extrapolates to.

Generators enter as functions `logits(codes (B, T)) -> (B, T, K)`; every figure is exact over the K codes of a position.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ral_gym.codes import CodeGrid
from ral_gym.errors import ConfigError
from ral_gym.metrics.codes import Codes, Logits, _batches, _tensor
from ral_gym.metrics.divergences import conditional_log_probs, cross_entropy, jsd, kl, total_variation
from ral_gym.metrics.intervals import Estimate, mean_estimate

MEASURES = {"kl": lambda p, o: kl(o, p), "jsd": jsd, "tv": total_variation}
"""The f of CGD: KL(o || p), Jensen-Shannon divergence, total variation."""


class Sampler(Protocol):
    """What `CachedSampler` and `TwoLevelSampler` have in common."""

    def sample(
        self, *, codes: Tensor, prefix_rows: int, uniforms: Tensor | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Keep the codes (B, T) of the first rows, draw the others: codes (B, T), log-probabilities (B, T)."""
        ...


@dataclass(frozen=True)
class Curve:
    """Figures along a sequence: `mean` (L,) and its standard error `error` (L,), float64."""

    mean: Tensor
    error: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Curve:
        """Mean over the rows of values (N, L), N >= 2."""
        if len(values) < 2:
            raise ConfigError(f"{len(values)} grids have no standard error: give at least two")
        return cls(values.mean(0), values.std(0) / len(values) ** 0.5)


@dataclass(frozen=True)
class ExposureBias:
    """Curves over the T positions of a sequence.

    Attributes:
        on_model: CGD(M, l) per measure: `kl`, `jsd`, `tv`.
        on_oracle: CGD(D, l).
        ratio: EB-C(l), their ratio; 1 where both are 0, and at the first position, which has no prefix.
        accumulated: AccErr(l) for the first l = 1..T codes; l where nothing compounds.
        excess: of it, in percent.
        gap: CGD(M) - CGD(D) for KL(o || p), averaged over positions: nats per code.
        n_model: prefixes of the model.
        n_oracle: prefixes of the oracle.
    """

    on_model: dict[str, Curve]
    on_oracle: dict[str, Curve]
    ratio: dict[str, Curve]
    accumulated: Curve
    excess: Curve
    gap: Estimate
    n_model: int
    n_oracle: int


@torch.no_grad()
def divergences(
    model: Logits,
    oracle: Logits,
    codes: Codes,
    *,
    batch_size: int = 256,
    device: str | torch.device | None = None,
) -> dict[str, Tensor]:
    """How far the model is from the oracle at every position, along given prefixes.

    Args:
        model: the model's logits.
        oracle: the oracle's.
        codes: (N, T), the prefixes: position t is conditioned on those before it.
        batch_size: rows per pass.
        device: where the generators are; None: where the codes are.

    Returns:
        (N, T) float64 on the CPU for each of `MEASURES`.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in MEASURES}
    for batch in _batches(codes, batch_size, device):
        log_p, log_o = conditional_log_probs(model, batch), conditional_log_probs(oracle, batch)  # (B, T, K)
        for name, measure in MEASURES.items():
            parts[name].append(measure(log_p, log_o).cpu())
    return {name: torch.cat(values) for name, values in parts.items()}


def exposure_bias(
    model: Logits,
    oracle: Logits,
    model_codes: Codes,
    oracle_codes: Codes,
    *,
    batch_size: int = 256,
    device: str | torch.device | None = None,
) -> ExposureBias:
    """Compare a model along its own prefixes with the same model along the oracle's.

    Standard errors of ratios are those of the delta method, for two independent sets.

    Args:
        model: the model's logits.
        oracle: the oracle's.
        model_codes: (N, T), samples of the model.
        oracle_codes: (M, T), samples of the oracle.
        batch_size: rows per pass.
        device: where the generators are; None: where the codes are.
    """
    along_model = divergences(model, oracle, model_codes, batch_size=batch_size, device=device)  # (N, T) each
    along_oracle = divergences(model, oracle, oracle_codes, batch_size=batch_size, device=device)  # (M, T) each
    on_model = {name: Curve.of(values) for name, values in along_model.items()}
    on_oracle = {name: Curve.of(values) for name, values in along_oracle.items()}
    growth = _ratio(Curve.of(along_model["kl"].cumsum(1)), Curve.of(along_oracle["kl"].cumsum(1)))  # (T,)
    length = torch.arange(1, len(growth.mean) + 1)  # (T,)
    own, given = along_model["kl"].mean(1), along_oracle["kl"].mean(1)  # (N,), (M,)
    error = (own.var() / len(own) + given.var() / len(given)).sqrt()
    n = min(len(own), len(given))
    return ExposureBias(
        on_model=on_model,
        on_oracle=on_oracle,
        ratio={name: _ratio(on_model[name], on_oracle[name]) for name in MEASURES},
        accumulated=Curve(length * growth.mean, length * growth.error),
        excess=Curve(100 * (growth.mean - 1), 100 * growth.error),
        gap=Estimate.around(
            float(own.mean() - given.mean()), float(error), n, "difference of two independent sets", degrees=n - 1
        ),
        n_model=len(own),
        n_oracle=len(given),
    )


@dataclass(frozen=True)
class PrefixCurve:
    """Completions of images whose first r rows are the oracle's; curves over `rows`, in nats per drawn code.

    Attributes:
        rows: the r of each entry; 0: free running.
        nll: NLL_oracle of the codes that the model drew.
        oracle_nll: the same where the oracle drew them: its entropy.
        excess: their difference, paired by prefix. Sharpening lowers it, so read it together with `kl`.
        kl: KL(model || oracle) of the completions, which only a better model lowers.
        n: prefixes.
    """

    rows: list[int]
    nll: Curve
    oracle_nll: Curve
    excess: Curve
    kl: Curve
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
    """Let the model finish what the oracle began, after every number of rows.

    A fall with r is the harm of context of the model's own making; a flat curve is a model that is as wrong on given
    prefixes as on its own. It is RAL's partial generation (Section 4.3), and the image completion of Section 5.5.

    Args:
        model: the model's logits.
        oracle: the oracle's.
        sampler: draws from the model.
        oracle_codes: (N, T) int64, samples of the oracle, on the generators' device.
        grid: of the codes; rows are those of the top level, and take the bottom rows under them along.
        rows: which r, 0..H-1; None: all.
        batch_size: images drawn at a time.
        generator: of the sampler; None: the global one.

    Raises:
        ConfigError: a row outside 0..H-1, or fewer than two images.
    """
    rows = list(range(grid.height)) if rows is None else rows
    if any(not 0 <= row < grid.height for row in rows):
        raise ConfigError(f"rows {rows}: a prefix has 0 to {grid.height - 1} of the {grid.height} rows")
    parts: dict[str, list[Tensor]] = {"nll": [], "oracle_nll": [], "kl": []}
    for given in _batches(oracle_codes, batch_size, None):
        log_o = conditional_log_probs(oracle, given)  # (B, T, K)
        entropy = cross_entropy(log_o, log_o)  # (B, T)
        figures = []
        for row in rows:
            drawn = torch.from_numpy(grid.mask(row, grid.height)).to(given.device)  # (T,)
            codes, _ = sampler.sample(codes=given, prefix_rows=row, uniforms=None, generator=generator)
            log_p, log_q = conditional_log_probs(model, codes), conditional_log_probs(oracle, codes)  # (B, T, K)
            along = torch.stack([cross_entropy(log_p, log_q), entropy, kl(log_p, log_q)])  # (3, B, T)
            figures.append(along[:, :, drawn].mean(2))
        for name, values in zip(parts, torch.stack(figures, 2).cpu(), strict=True):  # (B, R) each
            parts[name].append(values)
    nll, oracle_nll, divergence = (torch.cat(values) for values in parts.values())  # (N, R)
    excess = Curve.of(nll - oracle_nll)
    return PrefixCurve(rows, Curve.of(nll), Curve.of(oracle_nll), excess, Curve.of(divergence), len(nll))


@dataclass(frozen=True)
class CorruptionResponse:
    """KL(o || p) behind a prefix, as it was and corrupted; curves over the distance d = 0, 1, .. from the prefix's end.

    Attributes:
        clean: behind the prefix as it was.
        corrupted: behind the corrupted prefix.
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
        window: only the last so many codes of the prefix can be replaced; None: all.
        sampler: draws what follows from the model (self-recovery), with the same uniforms behind the clean and the
            corrupted prefix. None: the oracle's codes stay (how long does a mistake that nobody makes again matter?).
        batch_size: rows per pass.
        generator: of what is replaced, and of the uniforms; None: the global one. On the CPU.

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
    """Replace a fraction of codes by others, drawn uniformly from the K - 1 that they are not.

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
    """Distance by which half of a bump's area has passed: where it falls as exp(-d / s), its half-life s ln 2.

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


def as_lists(result: Any) -> Any:
    """A result of this module as dictionaries, lists and numbers, for a JSON file."""
    if is_dataclass(result) and not isinstance(result, type):
        return {field.name: as_lists(getattr(result, field.name)) for field in fields(result)}
    if isinstance(result, dict):
        return {name: as_lists(value) for name, value in result.items()}
    return result.tolist() if isinstance(result, Tensor) else result


def _count(fraction: float, positions: int) -> int:
    return max(1, round(fraction * positions))


def _ratio(a: Curve, b: Curve) -> Curve:
    """a / b of independent curves; 1 where both are 0."""
    equal = (a.mean.abs() < 1e-12) & (b.mean.abs() < 1e-12)
    ratio = torch.where(equal, 1, a.mean / b.mean)
    error = ((a.error / b.mean) ** 2 + (ratio * b.error / b.mean) ** 2).sqrt()
    return Curve(ratio, torch.where(equal, 0, error))
