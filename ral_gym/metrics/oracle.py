"""Distances between two generators with known likelihoods: a model, and the oracle that plays the role of the data.

NLL_oracle alone, the metric of Section 5.2 and Table 1, falls when a model merely sharpens: at a lower temperature it
draws the oracle's likeliest codes more often and covers fewer of the others. `oracle_metrics` therefore always reports
it with NLL_test, the entropy, KL both ways and JSD. They obey

    KL(model || oracle) = NLL_oracle - H(model),        KL(oracle || model) = NLL_test - H(oracle).

All are exact over the K codes of a position, and Monte Carlo over prefixes only: the expectation of log p instead of
log p of the code that happened to be drawn. The mean is the same (chain rule), the variance much smaller.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ral_gym.metrics.codes import Codes, Logits, _batches
from ral_gym.metrics.divergences import conditional_log_probs, cross_entropy, jsd, kl
from ral_gym.metrics.intervals import Estimate, mean_estimate


@torch.no_grad()
def sequence_kl(p: Logits, q: Logits, codes_of_p: Tensor, batch_size: int = 256) -> float:
    """KL(p || q) of whole grids: sum over t of E_{c ~ p} KL(p(. | c_<t) || q(. | c_<t)), divided by T.

    Exact over the K codes of a position, Monte Carlo over the prefixes only: a much smaller variance than the mean of
    log p - log q. For KL(q || p) give samples of q and swap the generators.

    Args:
        p: logits (B, T) -> (B, T, K) of the generator that drew the samples.
        q: the other one's.
        codes_of_p: (N, T) int64, samples of p at temperature 1.
        batch_size: rows per pass.

    Returns:
        Nats per code, 0 or more; infinite where q rules out a code that p does not.
    """
    total = 0.0
    for codes in codes_of_p.long().split(batch_size):
        total += float(kl(conditional_log_probs(p, codes), conditional_log_probs(q, codes)).sum())
    return total / codes_of_p.numel()


@torch.no_grad()
def oracle_metrics(
    model: Logits,
    oracle: Logits,
    model_codes: Codes,
    oracle_codes: Codes,
    *,
    batch_size: int = 256,
    device: str | torch.device | None = None,
) -> dict[str, Estimate]:
    """All metrics of a model's distance from its oracle, each with its standard error.

    Args:
        model: logits (B, T) -> (B, T, K) of the model; at another temperature, those divided by it.
        oracle: the oracle's.
        model_codes: (N, T), samples of the model, at the same temperature.
        oracle_codes: (M, T), samples of the oracle, that the model was not trained on.
        batch_size: rows per pass.
        device: where the generators are; None: where the codes are.

    Returns:
        Nats per code, unless said otherwise:

        * `nll_oracle`: of the model's samples under the oracle; `nll_test`: of the oracle's samples under the model;
        * `entropy`: of the model; `entropy_oracle`: of the oracle;
        * `kl_model_oracle`, `kl_oracle_model`: KL(model || oracle) and KL(oracle || model);
        * `jsd`: Jensen-Shannon divergence of whole grids, in nats per *grid*, at most ln 2. It is next to ln 2 as soon
          as single grids tell the two apart, which long ones soon do;
        * `jsd_per_code`: that of one position's conditional distributions, averaged over positions and over prefixes of
          both; at most ln 2, and far from it where `jsd` has saturated.
    """
    of_model = _along(model, oracle, model_codes, batch_size, device)
    of_oracle = _along(oracle, model, oracle_codes, batch_size, device)
    result = {
        "nll_oracle": _mean(of_model["cross_entropy"]),
        "nll_test": _mean(of_oracle["cross_entropy"]),
        "entropy": _mean(of_model["entropy"]),
        "entropy_oracle": _mean(of_oracle["entropy"]),
        "kl_model_oracle": _mean(of_model["kl"]),
        "kl_oracle_model": _mean(of_oracle["kl"]),
    }
    for name in ("jsd", "jsd_per_code"):
        result[name] = _half_of_each(of_model[name], of_oracle[name], (-math.inf if name == "jsd" else 0, math.log(2)))
    return result


def _along(
    p: Logits, q: Logits, codes_of_p: Codes, batch_size: int, device: str | torch.device | None
) -> dict[str, Tensor]:
    """Metrics of each grid that p drew, (N,) float64 each on the CPU."""
    parts: dict[str, list[Tensor]] = {}
    for codes in _batches(codes_of_p, batch_size, device):
        log_p, log_q = conditional_log_probs(p, codes), conditional_log_probs(q, codes)  # (B, T, K)
        ratio = (log_q - log_p).gather(-1, codes[..., None]).squeeze(-1).sum(1)  # (B,) log q - log p of the whole grid
        metrics = {
            "cross_entropy": cross_entropy(log_p, log_q).mean(1),
            "entropy": cross_entropy(log_p, log_p).mean(1),
            "kl": kl(log_p, log_q).mean(1),
            # log 2p / (p + q) in log-space: whole grids have probabilities that no float holds.
            "jsd": math.log(2) - torch.nn.functional.softplus(ratio),
            "jsd_per_code": jsd(log_p, log_q).mean(1),
        }
        for name, metric in metrics.items():
            parts.setdefault(name, []).append(metric.cpu())
    return {name: torch.cat(metrics) for name, metrics in parts.items()}


def _mean(metrics: Tensor) -> Estimate:
    return mean_estimate(metrics, method="mean over independent grids", bounds=(0.0, math.inf))


def _half_of_each(of_model: Tensor, of_oracle: Tensor, bounds: tuple[float, float]) -> Estimate:
    """Mean of the means over the model's grids and over the oracle's."""
    values = of_model.mean() + of_oracle.mean()
    variance = of_model.var() / len(of_model) + of_oracle.var() / len(of_oracle)
    n = min(len(of_model), len(of_oracle))
    return Estimate.around(
        float(values) / 2,
        float(variance.sqrt()) / 2,
        n,
        "mean over independent grids of both",
        degrees=n - 1,
        bounds=bounds,
    )
