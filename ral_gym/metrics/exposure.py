"""Exposure bias: what a model's own mistakes in the prefix cost it, measured against an oracle.

A model is trained on prefixes from the data, but samples given prefixes that it drew itself. With an oracle o whose
likelihoods are known, both can be measured: for a model p and a distance f over the codes of one position,

    CGD(H, l) = E f(p(. | c_<l), o(. | c_<l)) over prefixes c_<l of H;    M: the model's own, D: the oracle's.

* `exposure_bias`: EB-C(l) = CGD(M, l) / CGD(D, l) (He et al., 2021), 1 where there is no exposure bias; accumulated
  errors (Arora et al., 2022): AccErr(l) = l K_M(l) / K_D(l), where K(l) sums CGD over the first l positions with
  f = KL(o || p), and their excess over linear growth, 100 (K_M(l) / K_D(l) - 1), in percent.

`ral_gym.metrics.recovery` has two more protocols, in which the prefix is given or corrupted on purpose.

The two papers disagree on how large the effect is, so a tool must be able to show none: with the oracle as the model,
EB-C is 1 and the excess 0. A caveat: after prefixes that the oracle would hardly ever draw itself, its probabilities
are mere extrapolations of its network.

Generators are given as functions `logits(codes (B, T)) -> (B, T, K)`; every metric is exact over the K codes of a
position.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from ral_gym.errors import ConfigError
from ral_gym.metrics.codes import Codes, Logits, _batches
from ral_gym.metrics.divergences import conditional_log_probs, jsd, kl, total_variation
from ral_gym.metrics.intervals import Estimate

MEASURES = {"kl": lambda p, o: kl(o, p), "jsd": jsd, "tv": total_variation}
"""The f of CGD: KL(o || p), Jensen-Shannon divergence, total variation."""


@dataclass(frozen=True)
class Curve:
    """Metrics along a sequence: `mean` (L,) and its standard error `error` (L,), float64."""

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
        excess: excess of AccErr over linear growth, in percent.
        gap: CGD(M) - CGD(D) for KL(o || p), averaged over positions: nats per code.
        n_model: number of the model's prefixes.
        n_oracle: number of the oracle's prefixes.
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


def as_lists(result: Any) -> Any:
    """A result of this module as dictionaries, lists and numbers for JSON; None for NaN and infinity."""
    if is_dataclass(result) and not isinstance(result, type):
        return {field.name: as_lists(getattr(result, field.name)) for field in fields(result)}
    if isinstance(result, dict):
        return {name: as_lists(value) for name, value in result.items()}
    if isinstance(result, Tensor | list):
        return [as_lists(value) for value in (result.tolist() if isinstance(result, Tensor) else result)]
    return None if isinstance(result, float) and not math.isfinite(result) else result


def _ratio(a: Curve, b: Curve) -> Curve:
    """Ratio a / b of independent curves; 1 where both are 0."""
    equal = (a.mean.abs() < 1e-12) & (b.mean.abs() < 1e-12)
    ratio = torch.where(equal, 1, a.mean / b.mean)
    error = ((a.error / b.mean) ** 2 + (ratio * b.error / b.mean) ** 2).sqrt()
    return Curve(ratio, torch.where(equal, 0, error))
