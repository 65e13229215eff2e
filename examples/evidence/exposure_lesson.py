"""What the lesson on exposure bias measures and says (`examples/exposure_bias.py`); the pictures are next door.

Everything is kept as plain numbers, lists and dictionaries, as JSON has them: what was measured once is read again, and
neither texts nor pictures can tell the difference. Every verdict is made of the numbers and their intervals alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from ral_gym.metrics import Estimate, as_lists, corruption_response, exposure_bias, oracle_metrics, prefix_curve
from ral_gym.metrics.divergences import conditional_log_probs, cross_entropy
from ral_gym.metrics.intervals import mean_estimate
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.sampler import CachedSampler

SMALL = 5.0  # Percent: an excess of the accumulated error below this is called small.
BATCH = 256
COMPARED = {
    "nll_test": "held-out NLL",
    "kl_own": "KL(o, p), own prefixes",
    "kl_given": "KL(o, p), the oracle's",
    "gap": "their gap",
    "excess": "excess of accumulated error, %",
    "kl_model_oracle": "KL(p, o)",
    "entropy": "entropy",
}
"""The columns of the comparison; nats per code, but for the excess."""
Numbers = dict[str, Any]


@dataclass(frozen=True)
class Protocol:
    """How much is measured, and what counts as wrong; `examples/exposure_bias.py` describes the fields."""

    n: int
    n_prefixes: int
    corrupted: float
    corrupted_rows: int
    wrong: float


def draw(model: PixelCNN, n: int, seed: int) -> Tensor:
    """Codes (n, T) int64 drawn from a model."""
    sampler, generator = CachedSampler(model), torch.Generator().manual_seed(seed)
    return torch.cat([sampler.sample(min(BATCH, n - i), generator=generator)[0] for i in range(0, n, BATCH)])


def rarity(log_o: Tensor, codes: Tensor) -> Tensor:
    """Probability that the oracle draws a code at most as likely as the one given: (.., K), (..) -> (..)."""
    own = log_o.gather(-1, codes[..., None])  # (.., 1)
    return torch.where(log_o <= own, log_o.exp(), 0).sum(-1)


@torch.no_grad()
def measure(model: PixelCNN, oracle: PixelCNN, fresh: Tensor, protocol: Protocol, seed: int) -> Numbers:
    """A model on its own prefixes and on the oracle's: `fresh` (N, T) are samples that no model has seen."""
    given, own = fresh[: protocol.n], draw(model, protocol.n, seed + 2)  # (n, T) each
    exposure = exposure_bias(model, oracle, own, given)
    metrics = oracle_metrics(model, oracle, own, given)
    excess = Estimate.around(
        float(exposure.excess.mean[-1]), float(exposure.excess.error[-1]), protocol.n, "delta", degrees=protocol.n - 1
    )
    log_o, log_o_given = (
        conditional_log_probs(oracle, codes[: protocol.n_prefixes]) for codes in (own, given)
    )  # (B, T, K)
    rare = rarity(log_o, own[: protocol.n_prefixes]) < protocol.wrong  # (B, T)
    compared = {name: as_lists(metrics[name]) for name in ("nll_test", "entropy", "kl_model_oracle")}
    compared |= {"gap": as_lists(exposure.gap), "excess": as_lists(excess)}
    compared |= {"kl_given": as_lists(metrics["kl_oracle_model"])}
    compared |= {"kl_own": {"value": float(exposure.on_model["kl"].mean.mean())}}
    return {
        "compared": compared,
        "exposure": as_lists(exposure),
        "excess": as_lists(excess),
        "wrong": float(rare.double().mean()),
        "oracle_entropy": [float(cross_entropy(log, log).mean()) for log in (log_o, log_o_given)],
        "verdict": verdict(excess),
    }


@torch.no_grad()
def measure_recovery(model: PixelCNN, oracle: PixelCNN, fresh: Tensor, protocol: Protocol, seed: int) -> Numbers:
    """Completions of the oracle's beginnings, and of spoilt ones."""
    beginnings, sampler = fresh[: protocol.n_prefixes], CachedSampler(model)
    generator = torch.Generator().manual_seed(seed + 3)
    curve = prefix_curve(model, oracle, sampler, beginnings, oracle.grid, generator=generator)
    spoilt = {
        who: corruption_response(
            model,
            oracle,
            beginnings,
            oracle.grid,
            fraction=protocol.corrupted,
            prefix_rows=protocol.corrupted_rows,
            window=oracle.width,
            generator=generator,
            sampler=sampler if who == "own" else None,
        )
        for who in ("given", "own")
    }
    return {"prefix": as_lists(curve), "corruption": as_lists(spoilt)}


def verdict(excess: Estimate) -> str:
    """What the excess of the accumulated error over the whole image says, in words, from its interval alone."""
    shown = f"({excess.value:+.1f} % [{excess.low:+.1f}, {excess.high:+.1f}])"
    if excess.low > 0:
        size = "small" if excess.value < SMALL else "large"
        return f"{size} exposure bias: errors are larger on the model's own prefixes {shown}"
    if excess.high < 0:
        return f"reversed: errors are smaller on the model's own prefixes than on the oracle's {shown}"
    if max(-excess.low, excess.high) < SMALL:
        return f"no measurable exposure bias, and one of {SMALL:g} % or more is ruled out {shown}"
    return f"undecided: neither none nor {SMALL:g} % is ruled out; draw more images {shown}"


def lines_of(result: Numbers, threshold: float) -> list[str]:
    """The lesson of one model, in numbers and words."""
    bias, compared = result["exposure"], result["compared"]
    ratio = bias["ratio"]["kl"]["mean"]
    half = len(ratio) // 2
    lines = [
        f"KL(oracle || model): {compared['kl_own']['value']:.3f} on its own prefixes, "
        f"{compared['kl_given']['value']:.3f} on the oracle's; gap {_interval(compared['gap'])} nats per code",
        f"KL(model || oracle): {compared['kl_model_oracle']['value']:.3f}; entropy of the model "
        f"{compared['entropy']['value']:.2f}",
        f"EB-C: {_mean(ratio[:half]):.3f} in the first half of the image, {_mean(ratio[half:]):.3f} in the second "
        "(1: no exposure bias)",
        f"accumulated error over {len(ratio)} codes: {bias['accumulated']['mean'][-1]:.1f}",
        f"wrong codes: {100 * result['wrong']:.2f} % of its own; by definition fewer than {100 * threshold:g} % of the "
        "oracle's",
        f"entropy of the oracle: {result['oracle_entropy'][0]:.2f} nats per code on the model's prefixes, "
        f"{result['oracle_entropy'][1]:.2f} on its own (higher: less certain there)",
    ]
    if "prefix" in result:
        curve = result["prefix"]
        lines.append(
            f"prefix curve: harm of its own context {_entry(curve['harm'], 0)} nats per code after "
            f"{curve['rows'][0]} given rows, {_entry(curve['harm'], -1)} after {curve['rows'][-1]}"
        )
    if "critic_auc" in result:
        lines.append(
            f"in the end its critic tells the oracle's held-out images from its own with an AUC of "
            f"{result['critic_auc']:.2f} (0.5: not at all)"
        )
    for who, text in (("given", "the oracle's codes follow"), ("own", "its own codes follow")):
        if "corruption" in result:
            spoilt = result["corruption"][who]
            life = spoilt["half_life"]
            found = "no measurable bump" if life is None or life < 0 else f"half of it within {life:.1f} codes"
            lines.append(f"{spoilt['replaced']} spoilt codes, {text}: {_interval(spoilt['area'])} nats in all; {found}")
    return lines


def compare(seeds: Mapping[int, Mapping[str, Numbers]]) -> dict[str, dict[str, Numbers]]:
    """Every model's columns: with one seed and its interval over images, with several their mean and interval."""
    models = list(dict.fromkeys(name for results in seeds.values() for name in results))
    return {
        name: {column: _over([one[name] for one in seeds.values() if name in one], column) for column in COMPARED}
        for name in models
    }


def _over(results: Sequence[Numbers], column: str) -> Numbers:
    """One column of one model over its seeds."""
    found = [result["compared"][column] for result in results]
    if len(found) == 1:
        return {**found[0], "seeds": [found[0]["value"]]}
    values = [one["value"] for one in found]
    return {**as_lists(mean_estimate(values, method="mean over seeds")), "seeds": values}


def markdown(comparison: Mapping[str, Mapping[str, Numbers]], seeds: Sequence[int], caption: str) -> str:
    """The comparison as a table; below it, where there are several seeds, every seed's gap and excess."""
    lines = [f"| model | {' | '.join(COMPARED.values())} |", "|---|" + "---:|" * len(COMPARED)]
    for name, row in comparison.items():
        lines.append(f"| {name} | {' | '.join(cell(row[column], column) for column in COMPARED)} |")
    lines += ["", caption]
    several = {name: row for name, row in comparison.items() if len(row["gap"]["seeds"]) > 1}
    if several:
        lines += ["", f"Gap and excess of each seed, {', '.join(map(str, seeds))}:", ""]
        lines += ["| model | gap | excess, % |", "|---|---:|---:|"]
        for name, row in several.items():
            gaps = ", ".join(f"{value:+.3f}" for value in row["gap"]["seeds"])
            lines.append(f"| {name} | {gaps} | {', '.join(f'{value:+.1f}' for value in row['excess']['seeds'])} |")
    return "\n".join(lines) + "\n"


def table_of(comparison: Mapping[str, Mapping[str, Numbers]], seeds: Sequence[int]) -> Table:
    """The comparison for the screen."""
    headings = ("NLL\ntest", "KL(o,p)\nown", "KL(o,p)\noracle's", "gap", "excess\n%", "KL(p,o)", "H(p)")
    table = Table("", *headings, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, row in comparison.items():
        metrics = [cell(row[column], column, column == "excess") for column in COMPARED]
        table.add_row(name.replace("_", " "), *metrics)
    table.caption = f"Means over seeds {', '.join(map(str, seeds))}; nats per code"
    return table


def cell(metric: Numbers, column: str, interval: bool = True) -> str:
    """A metric, and half its interval if it is wanted and known."""
    digits = ".1f" if column == "excess" else ".3f"
    sign = "+" if column in ("gap", "excess") else ""
    half = f" ± {(metric['high'] - metric['low']) / 2:{digits}}" if interval and "high" in metric else ""
    return f"{metric['value']:{sign}{digits}}{half}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _interval(metric: Numbers) -> str:
    """A metric and its interval."""
    return f"{metric['value']:+.3f} ({metric['low']:+.3f} to {metric['high']:+.3f})"


def _entry(curve: Numbers, entry: int) -> str:
    """One value of a curve and half its 95 % interval."""
    return f"{curve['mean'][entry]:+.3f} ± {1.96 * curve['error'][entry]:.3f}"
