"""What the oracle experiment found: table, learning curves, and a verdict in words that the intervals give.

The parts of ``examples/oracle_experiment.py`` that only read its results: ``{"settings": ..., "seeds": {seed: {"rows",
"curves", "critic"}}}``. Generators of one seed share oracle and samples, so that differences are taken seed by seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich import box
from rich.console import Console
from rich.table import Table

from ral_gym.metrics.intervals import Estimate, mean_estimate
from ral_gym.pictures import DPI, MARKERS, _write, colour
from ral_gym.runs.storage import write_text

Seeds = Mapping[str, dict[str, Any]]
PAPER = {"mle": 7.55, "ral_single": 7.07, "ral_intermediate": 7.05}
"""NLL of Table 1; neither nats per code nor per image, so that only relative changes compare."""
PAPER_FALL = 0.066
RAL = ("ral_single", "ral_intermediate")
COLUMNS = {
    "nll_oracle": ("NLL_oracle", 3),
    "nll_oracle_per_image": ("per image", 1),
    "change": ("change, %", 1),
    "nll_test": ("NLL_test", 3),
    "entropy": ("entropy", 3),
    "kl_model_oracle": ("KL(p‖o)", 3),
    "kl_oracle_model": ("KL(o‖p)", 3),
    "jsd_per_code": ("JSD per code", 4),
    "jsd": ("JSD of grids", 4),
    "fd_oracle": ("FD oracle", 1),
    "fd_real": ("FD real", 1),
    "temperature": ("T", 2),
}
SHOWN = ("nll_oracle", "change", "nll_test", "entropy", "kl_model_oracle", "jsd_per_code", "fd_oracle")
NO_WORSE = ("jsd_per_code", "nll_test")
"""What must not rise while NLL_oracle falls."""


def values(seeds: Seeds, row: str, figure: str) -> list[float]:
    """One figure of one row, seed by seed; `change` is that of NLL_oracle against MLE, in percent."""
    if figure == "change":
        return [100 * (s["rows"][row]["nll_oracle"] / s["rows"]["mle"]["nll_oracle"] - 1) for s in seeds.values()]
    return [seed["rows"][row][figure] for seed in seeds.values()]


def difference(seeds: Seeds, row: str, other: str, figure: str) -> Estimate:
    """Mean over the seeds of a figure of `row` minus that of `other`, with its 95 % interval."""
    pairs = zip(values(seeds, row, figure), values(seeds, other, figure), strict=True)
    return mean_estimate([one - two for one, two in pairs], method="paired by seed")


def rows_of(seeds: Seeds) -> list[str]:
    """Rows that every seed has: MLE and its controls first, then RAL, then the bounds."""
    found = [row for row in next(iter(seeds.values()))["rows"] if all(row in seed["rows"] for seed in seeds.values())]
    controls = [row for row in found if row not in (*RAL, "oracle_reward", "oracle")]
    return controls + [row for row in (*RAL, "oracle_reward", "oracle") if row in found]


def controls_of(seeds: Seeds, variant: str) -> list[str]:
    """What a RAL run is compared with: MLE, MLE continued, and both at its entropy."""
    short = variant.removeprefix("ral_")
    return ["mle", "mle_continued", f"mle @ {short}", f"mle_continued @ {short}"]


def verdict(seeds: Seeds) -> list[str]:
    """What the intervals say of each RAL run, in words."""
    known = "; ".join(_known(seeds, variant) for variant in RAL)
    reasons = [f"What the critic's reward knows: {known}.", _bound(seeds)]
    if len(seeds) < 2:
        return ["One seed has no interval: give --seeds 0 1 2 for a verdict.", *reasons]
    return [*(_verdict(seeds, variant) for variant in RAL), *reasons]


def _verdict(seeds: Seeds, variant: str) -> str:
    change = mean_estimate(values(seeds, variant, "change"))
    limit = -100 * PAPER_FALL
    if change.high < limit:
        how_far = "beyond the paper's 6.6 %"
    elif change.value < limit:
        how_far = "beyond the paper's 6.6 % in the mean, but not by its interval"
    elif change.high < 0:
        how_far = "less than the paper's 6.6 %"
    else:
        how_far = "which may be chance"
    words = [f"{variant}: NLL_oracle changes by {_interval(change, 1)} %, {how_far}."]
    for control in controls_of(seeds, variant)[2:]:
        gained = difference(seeds, variant, control, "nll_oracle")
        word = "lower than" if gained.high < 0 else "higher than" if gained.low > 0 else "no different from"
        words.append(f"It is {word} that of {control}, which has the same entropy ({_interval(gained, 3)}).")
    for figure in NO_WORSE:
        worse = [c for c in controls_of(seeds, variant) if difference(seeds, variant, c, figure).low > 0]
        better = [c for c in controls_of(seeds, variant) if difference(seeds, variant, c, figure).high < 0]
        name = COLUMNS[figure][0]
        words.append(f"{name}: worse than {_list(worse)}, better than {_list(better)}.")
    words.append(f"Wanted, and {'found' if found(seeds, variant) else 'not found'}.")
    return " ".join(words)


def found(seeds: Seeds, variant: str) -> bool:
    """The goal: NLL_oracle falls by more than 6.6 % and more than at a lower temperature, JSD and NLL_test no worse."""
    controls = controls_of(seeds, variant)
    falls = mean_estimate(values(seeds, variant, "change")).high < -100 * PAPER_FALL
    not_sharpening = all(difference(seeds, variant, c, "nll_oracle").high < 0 for c in controls[2:])
    no_worse = all(difference(seeds, variant, c, figure).low <= 0 for c in controls for figure in NO_WORSE)
    return falls and not_sharpening and no_worse


def _known(seeds: Seeds, variant: str) -> str:
    """How much of the divergence the critic sees.

    Scores of two normal distributions, d standard deviations apart, have AUC Phi(d / sqrt(2)) and a KL of d**2 / 2.
    """
    area = float(np.mean([seed["critic"][variant]["heldout_auc"] for seed in seeds.values()]))
    known = [seed["critic"][variant]["reward_correlation"] for seed in seeds.values()]
    correlation = "unknown" if None in known else f"{np.mean(known):.2f}"
    seen = NormalDist().inv_cdf(min(max(area, 1e-6), 1 - 1e-6)) ** 2
    mle = [seed["rows"]["mle"] for seed in seeds.values()]
    there = np.mean([row["kl_model_oracle"] * row["nll_oracle_per_image"] / row["nll_oracle"] for row in mle])
    return (
        f"{variant}, held-out AUC {area:.2f}, as of scores {seen:.1f} nats apart, where MLE's images are {there:.1f} "
        f"nats from the oracle's, and correlation with log o - log p of an image {correlation}"
    )


def _bound(seeds: Seeds) -> str:
    """How much of what the true reward removes RAL removes."""
    start, best = (np.mean(values(seeds, row, "kl_model_oracle")) for row in ("mle", "oracle_reward"))
    parts = [f"{variant} {start - np.mean(values(seeds, variant, 'kl_model_oracle')):+.3f}" for variant in RAL]
    continued = start - np.mean(values(seeds, "mle_continued", "kl_model_oracle"))
    return (
        f"Of KL(p‖o) = {start:.3f} nats per code, as many images with the true reward remove {start - best:+.3f}, "
        f"{', '.join(parts)}, MLE continued {continued:+.3f}."
    )


def show(results: dict[str, Any], console: Console) -> None:
    """The table and the verdict, 80 columns wide."""
    seeds: Seeds = results["seeds"]
    style: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "show_edge": False, "pad_edge": False}
    table = Table(title="Distance from the oracle", caption="means over seeds; intervals in table.md", **style)
    table.add_column("row", no_wrap=True)
    headings = ("NLL\noracle", "\n%", "NLL\ntest", "H", "KL\np‖o", "JSD\ncode", "FD\noracle")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows_of(seeds):
        cells = [f"{np.mean(values(seeds, row, figure)):.{COLUMNS[figure][1]}f}" for figure in SHOWN]
        table.add_row(row, *cells)
    console.print(table)
    for line in results["verdict"]:
        console.print(line, highlight=False, markup=False)


def save_table(path: Path, results: dict[str, Any]) -> None:
    """Write the Markdown tables: means with intervals, the paper's beside them, and single seeds."""
    seeds: Seeds = results["seeds"]
    n = next(iter(seeds.values()))["rows"]["mle"]["n"]
    header = ["row", *(name for name, _ in COLUMNS.values()), "paper's NLL (not the same unit)"]
    lines = [_line(header), _line(["---", *["---:"] * (len(header) - 1)])]
    for row in rows_of(seeds):
        cells = [_cell(values(seeds, row, figure), digits) for figure, (_, digits) in COLUMNS.items()]
        lines.append(_line([f"`{row}`", *cells, _paper(row)]))
    lines += ["", _caption(results, n), "", "Seed by seed:", ""]
    single = [*SHOWN, "fd_real"]
    lines += [_line(["seed", "row", *(COLUMNS[figure][0] for figure in single)])]
    lines += [_line(["---:", "---", *["---:"] * len(single)])]
    for seed in seeds:
        one = {seed: seeds[seed]}
        for row in rows_of(seeds):
            cells = [f"{values(one, row, figure)[0]:.{COLUMNS[figure][1]}f}" for figure in single]
            lines.append(_line([seed, f"`{row}`", *cells]))
    write_text(path, "\n".join([*lines, "", *(f"- {line}" for line in results["verdict"]), ""]))


def _caption(results: dict[str, Any], n: int) -> str:
    seeds: Seeds = results["seeds"]
    between = (
        "mean and Student's t 95 % interval over seeds"
        if len(seeds) > 1
        else "one seed, no interval over seeds; several seeds give it"
    )
    return (
        f"Oracle experiment, preset `{results['settings']['preset']}`, seeds {', '.join(seeds)}; {between}; n = {n:,} "
        f"samples per row, exact over codes; nats per code unless said otherwise; FD with `{results['extractor']}` "
        "features, to decoded samples of the oracle and to decoded codes of real images; `A @ B` is A at the "
        "temperature that gives B's entropy; `oracle_reward` is REINFORCE on the true reward log o - log p."
    )


def _paper(row: str) -> str:
    if row not in PAPER:
        return ""
    change = 100 * (PAPER[row] / PAPER["mle"] - 1)
    return f"{PAPER[row]}" + (f" ({change:+.1f} %)" if row != "mle" else "")


def save_nll_curve(path: Path, results: dict[str, Any]) -> None:
    """Figure 4's counterpart: NLL_oracle, NLL_test and entropy while training, a thin line per seed and their mean."""
    seeds: Seeds = results["seeds"]
    figure = Figure(figsize=(8, 9), dpi=2 * DPI, facecolor="white", layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    labels = list(next(iter(seeds.values()))["curves"])
    names = ("nll_oracle", "nll_test", "entropy")
    for axes, name in zip(panels, names, strict=True):
        for number, label in enumerate(labels):
            curves = [seed["curves"][label] for seed in seeds.values()]
            style: dict[str, Any] = {"color": colour(label, labels)}
            for curve in curves:
                axes.plot([p["step"] for p in curve], [p[name] for p in curve], linewidth=0.7, alpha=0.5, **style)
            steps = [p["step"] for p in curves[0]]
            mean = np.mean([[p[name] for p in curve] for curve in curves], 0)
            axes.plot(steps, mean, marker=MARKERS[number], markersize=4, linewidth=2, **style)
        axes.set_ylabel(f"{COLUMNS[name][0]} (nats per code)")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [
        Line2D([], [], color=colour(label, labels), marker=MARKERS[number], label=label)
        for number, label in enumerate(labels)
    ]
    panels[0].legend(handles=handles, frameon=False, fontsize=9)
    n = results["settings"]["n_curve"]
    panels[0].set_title(
        f"The averaged policy while it learns, seeds {', '.join(seeds)} (thin) and their mean",
        loc="left",
        weight="bold",
    )
    panels[-1].set_xlabel(f"policy updates\n{n} samples per point, exact over codes; lower NLL is better", fontsize=11)
    _write(figure, path)


def _cell(numbers: Sequence[float], digits: int) -> str:
    """Mean and half the width of its interval."""
    if len(numbers) < 2:
        return f"{numbers[0]:.{digits}f}"
    estimate = mean_estimate(numbers)
    return f"{estimate.value:.{digits}f} ± {estimate.high - estimate.value:.{digits}f}"


def _interval(estimate: Estimate, digits: int) -> str:
    return f"{estimate.value:+.{digits}f} [{estimate.low:+.{digits}f}, {estimate.high:+.{digits}f}]"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
