"""The table, the figure and the sentences of `examples/frontier.py`, computed from every seed's measured rows.

A *curve* is one generator at several temperatures: FD over entropy. A recipe that only sharpens lies on the curve of
MLE; how far it lies beyond is its FD minus that of the curve at the same entropy, interpolated between temperatures.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from ral_gym.metrics.seeds import ON_EVERY_SEED, SeedDifference
from ral_gym.pictures import COLOURS
from ral_gym.report.tables import markdown_table, mean_and_interval, plain_table
from ral_gym.runs.storage import write_atomic

CURVES = {
    "mle": "MLE",
    "mle_continued": "MLE continued, equal updates",
    "no_reward": "LOO-FD without its reward",
    "mle_continued_equal_time": "MLE continued, equal time",
}
"""The controls: as many updates as the critic's RAL; `loo_fd`'s share of maximum likelihood; the critic's time."""
SHORT = {
    "mle_continued": "beyond\nupdates",
    "no_reward": "\nshare",
    "mle_continued_equal_time": "\ntime",
}
LOOKS = {
    "mle": (COLOURS["mle"], "o"),
    "mle_continued": (COLOURS["mle_continued"], "s"),
    "no_reward": ("#F0E442", "h"),
    "mle_continued_equal_time": ("#000000", "d"),
    "critic": (COLOURS["ral"], "^"),
    "loo_fd": ("#CC79A7", "v"),
    "loo_fd_grpo": ("#E69F00", "P"),
    "kid": ("#56B4E9", "X"),
    "critic_loo_fd": ("#7f7f7f", "*"),
    "encoder_loo_fd": ("#884400", "p"),
}
"""Colour (Okabe and Ito's) and marker of every generator."""
PANELS = {
    "fd": "FD (lower is better)",
    "kid": "KID (lower is better)",
    "recall": "recall (higher is better)",
}
Row = Mapping[str, Any]
Seed = Mapping[str, Any]
"""`curves` {name: rows by temperature, `seconds`}, `recipes` {name: `label`, `rows`, `checkpoints`, `seconds`, ..}."""


def on_curve(rows: Sequence[Row], entropy: float, metric: str = "fd") -> float | None:
    """A curve's metric at an entropy, interpolated between its temperatures; None beyond its ends."""
    points = sorted((row["entropy"], row[metric]) for row in rows)
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return float(np.interp(entropy, xs, ys)) if xs[0] <= entropy <= xs[-1] else None


def best(rows: Sequence[Row]) -> Row:
    """The row of least FD."""
    return min(rows, key=lambda row: row["fd"])


def beyond(rows: Sequence[Row], curve: Sequence[Row], metric: str = "fd") -> float | None:
    """A recipe's metric at its best point minus the curve's at the same entropy; of FD, below 0 is better."""
    point = best(rows)
    there = on_curve(curve, point["entropy"], metric)
    return None if there is None else point[metric] - there


def summary(seeds: Mapping[str, Seed]) -> dict[str, dict[str, list[float | None]]]:
    """Generator -> metric -> one value per seed, for the generators that every seed has."""
    found: dict[str, dict[str, list[float | None]]] = {}
    first, *others = seeds.values()
    names = [(kind, name) for kind in ("curves", "recipes") for name in first[kind]]
    for kind, name in names:
        if all(name in seed[kind] for seed in others):
            per_seed = [_metrics(seed, seed[kind][name], name) for seed in seeds.values()]
            found[name] = {metric: [one[metric] for one in per_seed] for metric in per_seed[0]}
    return found


def _metrics(seed: Seed, entry: Mapping[str, Any], name: str) -> dict[str, float | None]:
    """What one seed says about a generator: at T = 1, at its best temperature, and against the curves there."""
    rows = entry["rows"]
    start, top = next(row for row in rows if row["temperature"] == 1), best(rows)
    metrics: dict[str, float | None] = {
        "fd": start["fd"],
        "recall_at_1": start.get("recall"),
        "best_fd": top["fd"],
        "temperature": top["temperature"],
        **{key: top.get(key) for key in ("kid", "precision", "recall", "entropy", "nll_test", "memorisation")},
        "seconds": entry.get("seconds"),
    }
    for curve in CURVES:
        if curve in seed["curves"] and curve != name:
            control = seed["curves"][curve]["rows"]
            metrics[f"beyond_{curve}"] = beyond(rows, control)
            metrics[f"recall_beyond_{curve}"] = beyond(rows, control, "recall")
            metrics[f"best_minus_best_{curve}"] = top["fd"] - best(control)["fd"]
    return metrics


def label_of(name: str, seeds: Mapping[str, Seed]) -> str:
    """A generator's name in words."""
    return CURVES.get(name) or next(seed["recipes"][name]["label"] for seed in seeds.values())


def each(values: Sequence[float | None]) -> str:
    """One signed value per seed; "out" where the curve does not reach that entropy."""
    return " / ".join("out" if value is None else f"{value:+.1f}" for value in values)


def over_seeds(values: Sequence[float | None] | None) -> SeedDifference | None:
    """The difference from a curve over all seeds; None where a curve does not reach some seed's entropy."""
    known = [value for value in values or () if value is not None]
    whole = bool(known) and len(known) == len(values or ())
    return SeedDifference.from_values(dict(enumerate(known))) if whole else None


def terminal_table(table: Mapping[str, Mapping[str, list[float | None]]], seeds: Mapping[str, Seed]) -> Table:
    """The table in 80 columns: means over the seeds."""
    short = {curve: label for curve, label in SHORT.items() if curve in table}
    headings = ["generator", "FD\nT=1", "FD\nbest", "T", "re-\ncall", "en-\ntropy", *short.values(), "s"]
    rows = []
    for name, metrics in table.items():
        cells = [_mean(metrics[key], digits) for key, digits in (("fd", 1), ("best_fd", 1), ("temperature", 2))]
        cells += [_mean(metrics[key], 2) for key in ("recall", "entropy")]
        cells += [_mean(metrics.get(f"beyond_{curve}"), 1, "+") for curve in short]
        rows.append(
            [label_of(name, seeds).replace("MLE continued, ", "MLE cont., "), *cells, _mean(metrics["seconds"], 0)]
        )
    caption = (
        "means over seeds; beyond: FD at the best T minus that of MLE continued at the same entropy (equal updates; "
        "LOO-FD's share of it; equal time), below 0 is better; s: of training after stage 2"
    )
    return plain_table(headings, rows, title=f"Beyond sharpening? Seeds {', '.join(seeds)}", caption=caption)


def _mean(values: Sequence[float | None] | None, digits: int, sign: str = "") -> str:
    known = [value for value in values or () if value is not None]
    return f"{sum(known) / len(known):{sign}.{digits}f}" if known and len(known) == len(values or ()) else "-"


def markdown(results: Mapping[str, Any]) -> str:
    """The whole table as Markdown, with its caption and what it says in words."""
    table, seeds = results["table"], results["seeds"]
    headings = ["generator", "FD, T = 1", "best FD", "at T", "KID", "recall", "entropy", "NLL test", "memorisation"]
    shown = {curve: label for curve, label in CURVES.items() if curve in table}
    headings += [*(f"minus the curve of {label}" for label in shown.values()), "seconds"]
    digits = {"fd": 1, "best_fd": 1, "temperature": 2, "kid": 1, "recall": 3, "entropy": 3, "nll_test": 3}
    digits |= {"memorisation": 3}
    rows = []
    for name, metrics in table.items():
        cells = [mean_and_interval(metrics[key], places) for key, places in digits.items()]
        against = [metrics.get(f"beyond_{curve}") for curve in shown]
        for values in against:
            found, text = over_seeds(values), "-" if values is None else each(values)
            cells.append(text if found is None else found.markdown(text))
        rows.append([label_of(name, seeds), *cells, _mean(metrics["seconds"], 0)])
    interval = "mean ± half the 95 % interval by Student's t over the seeds" if len(seeds) > 1 else "one seed"
    caption = (
        f"Seeds {', '.join(seeds)} ({interval}); {results['extractor']} features, n = {results['n_samples']:,} per "
        "row, to the decoded training codes. KID to memorisation: at the temperature of the least FD, seed by seed. "
        "Minus the curve: FD there minus the FD of that control's temperature curve at the same entropy, per seed; "
        "below 0 is better than the control, bold: the interval over seeds excludes 0. Seconds: of training after "
        "stage 2, one thread. "
        + " ".join(f"{label_of(n, seeds)}: {r['about']}." for n, r in next(iter(seeds.values()))["recipes"].items())
    )
    return markdown_table(headings, rows, caption) + "\n" + "".join(f"* {line}\n" for line in sentences(results))


def sentences(results: Mapping[str, Any]) -> list[str]:
    """The verdict, computed: which recipes lie beyond which control's curve, and at what price in recall."""
    table, seeds = results["table"], results["seeds"]
    recipes = [name for name in table if name not in CURVES]
    lines = [_verdict(label_of(name, seeds), table[name]) for name in recipes]
    lines.append(_at_one(table, recipes, seeds))
    for curve, control in reversed(CURVES.items()):
        if curve not in table:
            continue
        against = {label_of(name, seeds): over_seeds(table[name].get(f"beyond_{curve}")) for name in recipes}
        lines.append(_ahead(against, control))
    if len(seeds) == 1:
        lines.append("One seed: another training run may turn these signs round.")
    return lines


def _ahead(differences: Mapping[str, SeedDifference | None], control: str) -> str:
    """Which recipes lie below a control's curve by more than the interval, and which on every seed only."""
    below = {label: found for label, found in differences.items() if found is not None and found.value < 0}
    beyond = "; ".join(label for label, found in below.items() if found.beyond) or "no recipe tried"
    same = "; ".join(label for label, found in below.items() if found.on_every_seed and not found.beyond)
    text = f"Beyond the temperature curve of {control}, by an interval that excludes 0: {beyond}."
    return text + (f" Below it {ON_EVERY_SEED}: {same}." if same else "")


def _verdict(label: str, metrics: Mapping[str, list[float | None]]) -> str:
    """One recipe in a sentence."""
    parts = []
    for curve, control in CURVES.items():
        values = metrics.get(f"beyond_{curve}")
        if values is None:
            continue
        parts.append(f"{_place(over_seeds(values), control)} ({each(values)}{_interval(values)})")
    recall = metrics.get("recall_beyond_mle_continued")
    price = ""
    if recall and None not in recall:
        price = "; recall against MLE continued there: " + " / ".join(
            f"{value:+.3f}" for value in recall if value is not None
        )
    return f"{label}: {', '.join(parts)}{price}."


def _place(found: SeedDifference | None, control: str) -> str:
    """Where a recipe lies; beyond and behind only where the interval over seeds excludes 0."""
    if found is None:
        return f"sharper or flatter than any temperature measured of {control}"
    if found.beyond:
        return f"{'beyond' if found.value < 0 else 'behind'} {control}"
    side = "below" if found.value < 0 else "above"
    if found.on_every_seed:
        return f"{side} {control} {ON_EVERY_SEED}"
    return f"not clearly off {control}" if found.n > 1 else f"{side} {control} on the one seed"


def _interval(values: Sequence[float | None]) -> str:
    """The mean with its interval, where there is one."""
    found = over_seeds(values)
    return "" if found is None or found.n == 1 else f"; mean {found.text()}"


def _at_one(table: Mapping[str, Any], recipes: Sequence[str], seeds: Mapping[str, Seed]) -> str:
    """FD and recall without any sharpening, against MLE."""
    parts = []
    for name in recipes:
        fd, recall = (
            [mine - mle for mine, mle in zip(table[name][key], table["mle"][key], strict=True)]
            for key in ("fd", "recall_at_1")
        )
        recalls = " / ".join(f"{value:+.3f}" for value in recall)
        parts.append(f"{label_of(name, seeds)}: FD {each(fd)}, recall {recalls}")
    return f"At T = 1, minus MLE's: {'; '.join(parts)}."


def save_panels(path: Path, results: Mapping[str, Any]) -> None:
    """FD, KID and recall over entropy, a column of panels per seed; curves for the controls, markers for the recipes.

    Raises:
        RunError: the file cannot be written.
    """
    seeds = results["seeds"]
    size = (4.4 * len(seeds) + 0.6, 10.6)
    figure = Figure(figsize=(max(size[0], 7.5), size[1]), dpi=150, facecolor="white", layout="constrained")
    grid = figure.subplots(len(PANELS), len(seeds), squeeze=False, sharex="col")
    for column, (seed, entry) in enumerate(seeds.items()):
        for row, (figure_name, label) in enumerate(PANELS.items()):
            axes = grid[row][column]
            _panel(axes, entry, figure_name)
            axes.set_ylabel(label if column == 0 else "")
            if row == 0:
                axes.set_title(f"seed {seed}", fontsize=12, weight="bold", loc="left")
        grid[-1][column].set_xlabel("entropy (nats per code)")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=3 if len(seeds) > 1 else 2, frameon=False, fontsize=10
    )
    caption = (
        "Lines: controls by temperature, from T = 1 at the right (large marker) to lower T at the left. Markers on "
        "thin dashed lines: recipes of RL, the same way. Small dots joined by a dotted line: the critic's RAL on its "
        "way, at T = 1. Below a curve at the same entropy (above it for recall): better than sharpening explains. "
        f"{results['extractor']} features, n = {results['n_samples']:,} per point."
    )
    width = int(13 * figure.get_size_inches()[0])
    figure.supxlabel("\n".join(textwrap.wrap(caption, width)), fontsize=9, x=0.01, ha="left")
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", metadata={"Software": None}))


def _panel(axes: Axes, seed: Seed, metric: str) -> None:
    """One seed's metric over entropy."""
    for kind, style in (("curves", "-"), ("recipes", "--")):
        for name, entry in seed[kind].items():
            colour, marker = LOOKS.get(name, ("#000000", "x"))
            points = sorted((row["temperature"], row["entropy"], row[metric]) for row in entry["rows"])
            xs, ys = [x for _, x, _ in points], [y for _, _, y in points]
            width = 1.8 if kind == "curves" else 0.8
            size = 4 if kind == "curves" else 7
            look: dict[str, Any] = {
                "color": colour,
                "marker": marker,
                "markeredgecolor": "white",
                "markeredgewidth": 0.5,
            }
            label = CURVES.get(name) or entry["label"]
            axes.plot(xs, ys, style, linewidth=width, markersize=size, label=label, **look)
            axes.plot(xs[-1:], ys[-1:], "none", markersize=size + 4, **look)
            _on_the_way(axes, entry.get("checkpoints", ()), metric, colour)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _on_the_way(axes: Axes, checkpoints: Sequence[Row], metric: str, colour: str) -> None:
    """Checkpoints of a training as small joined points, each with its number of updates."""
    points = [(row["entropy"], row[metric]) for row in checkpoints if math.isfinite(row[metric])]
    axes.plot([x for x, _ in points], [y for _, y in points], ":", color=colour, marker=".", markersize=5, linewidth=1)
