"""The table, the figure and the sentences of `examples/ablation.py`, computed from the variants' figures."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from ral_gym.metrics.seeds import ON_EVERY_SEED, SeedDifference
from ral_gym.pictures import MARKERS, OTHER_COLOURS
from ral_gym.report.tables import markdown_table, plain_table
from ral_gym.runs.storage import write_atomic

GROUPS = ("controls", "reference", "generation", "maps", "baseline", "gamma", "levels")
"""Order of the rows."""
PAPER = (
    "Paper: FID of Table 3 (in brackets: to reconstructed images), CelebA at 128x128 with two levels of codes, "
    "Inception features: another data set and another distance, so that only the order of its rows can be compared; "
    "its full generation of equal time has 51.91 (20.25)."
)
PAPER_BEST = {"single": "4x4", "intermediate": "8x8"}
"""The best score map of each reward in Table 3."""
Variant = Mapping[str, Any]


def summary(entries: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], sharpened: float) -> dict[str, Any]:
    """What `results.json` holds.

    Args:
        entries: the finished variants of all seeds: `name`, `group`, `label`, `levels`, `seed`, `rows` by temperature,
            and what the training took. A variant counts for the seeds whose reference is finished too.
        settings: of the grid.
        sharpened: the second temperature.

    Returns:
        the settings, and per variant the figures of every seed and its difference of FD to the reference.
    """
    by_name: dict[tuple[int, str], dict[str, Any]] = {}
    for entry in sorted(entries, key=lambda one: (one["levels"], GROUPS.index(one["group"]), one["name"], one["seed"])):
        about = {name: entry[name] for name in ("name", "group", "label", "levels", "paper", "changes", "also")}
        variant = by_name.setdefault((entry["levels"], entry["name"]), {**about, "seeds": {}})
        figures = {name: value for name, value in entry.items() if name not in (*about, "seed", "rows")}
        variant["seeds"][str(entry["seed"])] = {
            **_both_rows(entry["rows"]["1"], entry["rows"][f"{sharpened:g}"]),
            **figures,
        }
    variants = list(by_name.values())
    for variant in variants:
        reference = by_name.get((variant["levels"], "reference"))
        if reference is not None and variant is not reference:
            variant["difference"] = difference(variant, reference)
            variant["difference_sharpened"] = difference(variant, reference, "fd_sharpened")
    return {
        "settings": dict(settings),
        "sharpened": sharpened,
        "extractor": entries[0]["extractor"] if entries else "-",
        "seeds": sorted({seed for variant in variants for seed in variant["seeds"]}, key=int),
        "variants": variants,
    }


def _both_rows(row: Mapping[str, Any], sharpened: Mapping[str, Any]) -> dict[str, Any]:
    """The row at temperature 1, with the main figures of the other one beside its own."""
    others = ("fd", "kid", "recall", "entropy")
    intervals = dict(row.get("intervals") or {})
    ends = sharpened.get("intervals") or {}
    intervals |= {f"{name}_sharpened": ends[name] for name in others if name in ends}
    return {**row, **{f"{name}_sharpened": sharpened.get(name) for name in others}, "intervals": intervals}


def difference(variant: Variant, reference: Variant, figure: str = "fd") -> dict[str, Any] | None:
    """How far a variant's metric lies above the reference's, seed by seed; None without a common seed.

    `half` is half the 95 % interval: with several seeds Student's, of the mean difference; with one that of the two
    rows' samples (their intervals in quadrature, although the rows share their random numbers), which says nothing
    about another training run. `beyond`: that interval excludes 0; `bold`: it does, and it is one over seeds.
    """
    common = [seed for seed in variant["seeds"] if seed in reference["seeds"]]
    if not common:
        return None
    before, after = ({seed: one["seeds"][seed][figure] for seed in common} for one in (reference, variant))
    found = SeedDifference.of(before, after)
    half, beyond = found.half, found.beyond
    if found.n == 1:
        halves = [sampling_half(one["seeds"][common[0]], figure) for one in (variant, reference)]
        half = None if None in halves else math.hypot(*(value or 0.0 for value in halves))
        beyond = half is not None and abs(found.value) > half
    return {
        "mean": found.value,
        "half": half,
        "beyond": beyond,
        "bold": found.beyond,
        "on_every_seed": found.on_every_seed,
        "seeds": dict(found.by_seed),
    }


def sampling_half(row: Mapping[str, Any], figure: str) -> float | None:
    """Half of one row's own 95 % interval; None where it has none."""
    interval = (row.get("intervals") or {}).get(figure)
    return None if interval is None else (interval[1] - interval[0]) / 2


def mean_of(variant: Variant, figure: str) -> float | None:
    """Mean over the seeds; None if a seed lacks the metric."""
    values = [row.get(figure) for row in variant["seeds"].values()]
    return None if None in values or not values else sum(map(float, values)) / len(values)


def number(value: float | None, spec: str) -> str:
    """A metric as text; "-" if there is none."""
    return "-" if value is None else format(value, spec)


def plus_minus(value: float, half: float | None, sign: str = "") -> str:
    """A figure with half its interval."""
    return f"{value:{sign}.1f}" + ("" if half is None else f" ± {half:.1f}")


def fd_text(variant: Variant) -> str:
    """FD: of one seed with the interval of its samples; of several the mean and every seed's."""
    rows = list(variant["seeds"].values())
    if len(rows) == 1:
        return plus_minus(rows[0]["fd"], sampling_half(rows[0], "fd"))
    each = " / ".join(f"{row['fd']:.1f}" for row in rows)
    return f"{mean_of(variant, 'fd'):.1f} ({each})"


def difference_text(variant: Variant, each_seed: bool = False) -> str:
    """The difference to the reference; bold where the interval over seeds excludes 0, of one seed starred."""
    found = variant.get("difference")
    if not found:
        return "-"
    text = plus_minus(found["mean"], found["half"], "+")
    text = f"**{text}**" if found["bold"] else text + ("*" if found["beyond"] else "")
    seeds = found["seeds"].values()
    return f"{text} ({' / '.join(f'{value:+.1f}' for value in seeds)})" if each_seed and len(seeds) > 1 else text


def titled(variant: Variant) -> str:
    """The row's name: its group, where the label does not say it, and its label."""
    group = f"{variant['group']}: " if variant["group"] in ("maps", "baseline") else ""
    return group + str(variant["label"])


def terminal_table(results: Mapping[str, Any]) -> Table:
    """The table in 80 columns: means over the seeds."""
    specs = {"fd_sharpened": ".1f", "recall": ".2f", "entropy": ".2f", "nll_test": ".2f", "heldout_auc": ".2f"}
    specs |= {"cpu_seconds": ",.0f"}
    headings = ["variant", "FD", "- reference", f"FD\n{results['sharpened']:g}", "re-\ncall"]
    headings += ["en-\ntropy", "NLL", "AUC", "s"]
    rows = []
    for variant in results["variants"]:
        cells = [number(mean_of(variant, figure), spec) for figure, spec in specs.items()]
        found = variant.get("difference") or {}
        apart = "-" if not found else plus_minus(found["mean"], found["half"], "+").replace(" ", "")
        apart += "*" if found.get("beyond") else ""
        rows.append([titled(variant).removeprefix("maps: "), number(mean_of(variant, "fd"), ".1f"), apart, *cells])
    title = f"Ablations, seeds {', '.join(results['seeds'])}"
    return plain_table(headings, rows, title=title, caption=short_caption(results))


def short_caption(results: Mapping[str, Any], bold: bool = False) -> str:
    """What the difference and its interval are; `bold`: the table can set what is beyond in bold."""
    several = any(len(variant["seeds"]) > 1 for variant in results["variants"])
    interval = "by Student's t over the seeds" if several else "of the samples of one seed, not of another training"
    mark = "bold" if several and bold else "*"
    return f"- reference: FD minus the reference's; ±: 95 % {interval}; {mark}: larger than that."


def markdown(results: Mapping[str, Any]) -> str:
    """The whole table as Markdown, with its caption and what it says in words."""
    headings = ["variant", "FD", "FD - reference", f"FD at T = {results['sharpened']:g}", "KID", "recall", "entropy"]
    headings += ["NLL test", "critic's AUC", "updates", "images", "codes", "CPU s", "paper"]
    specs = {"fd_sharpened": ".1f", "kid": ".4g", "recall": ".3f", "entropy": ".3f", "nll_test": ".3f"}
    specs |= {"heldout_auc": ".2f", "updates": ",.0f", "images": ",.0f", "codes": ",.0f", "cpu_seconds": ",.0f"}
    rows = []
    for variant in results["variants"]:
        cells = [number(mean_of(variant, figure), spec) for figure, spec in specs.items()]
        start = [titled(variant), fd_text(variant), difference_text(variant, each_seed=True)]
        rows.append([*start, *cells, variant["paper"]])
    samples, seeds = results["settings"]["samples"], ", ".join(results["seeds"])
    caption = (
        f"FD and KID on {results['extractor']} features to the decoded training codes, {samples[0]:,} samples "
        f"a row (two levels: {samples[1]:,}), seeds {seeds}. {short_caption(results, bold=True)} "
        "Entropy and NLL (held-out images) in nats per code. AUC: held-out real images against drawn ones, at the last "
        "update. Images and codes: drawn for the policy; the critic's warm-up draws more. CPU s: of the training, one "
        f"core. Reference: {results['settings']['reference']}. {PAPER}"
    )
    return markdown_table(headings, rows, caption) + "\n" + "".join(f"* {line}\n" for line in sentences(results))


def sentences(results: Mapping[str, Any]) -> list[str]:
    """What the numbers say, and how much of it is beyond the noise."""
    lines = []
    for levels, where in ((1, ""), (2, "Two levels: ")):
        variants = {v["name"]: v for v in results["variants"] if v["levels"] == levels}
        if "reference" not in variants:
            continue
        found = (
            _against_controls(variants, results["sharpened"])
            + _beyond(variants)
            + _generation(variants)
            + _maps(variants)
        )
        found += _levels(variants) if levels == 2 else []
        lines += [where + line if where else line[0].upper() + line[1:] for line in found]
    return [*lines, *_noise(results)]


def _against_controls(variants: Mapping[str, Variant], sharpened: float) -> list[str]:
    """The reference beside MLE and MLE continued, at both temperatures."""
    lines = []
    for key, where in (("difference", ""), ("difference_sharpened", f"at T = {sharpened:g} ")):
        for name, label in (("mle", "MLE"), ("mle_continued", "MLE continued for as many updates")):
            found = variants[name].get(key) if name in variants else None
            if found:
                word = "beyond the noise" if found["beyond"] else "within the noise"
                word += f", {ON_EVERY_SEED}" if found["on_every_seed"] and not found["beyond"] else ""
                lower = "below" if found["mean"] > 0 else "above"
                half = "" if found["half"] is None else f" ± {found['half']:.1f}"
                lines.append(f"{where}RAL's FD is {abs(found['mean']):.1f}{half} {lower} that of {label}: {word}.")
    return lines


def _beyond(variants: Mapping[str, Variant]) -> list[str]:
    """Which variants differ from the reference by more than the noise."""
    trained = [v for v in variants.values() if v.get("difference") and v["group"] != "controls"]
    several, lines = any(len(v["difference"]["seeds"]) > 1 for v in trained), []
    for better, word in ((True, "better"), (False, "worse")):
        found = [v for v in trained if v["difference"]["beyond"] and (v["difference"]["mean"] < 0) == better]
        if found:
            lines.append(f"{word} than the reference, beyond the noise: {_listed(found, several)}.")
    within = [v for v in trained if not v["difference"]["beyond"]]
    return lines + ([f"not told apart from the reference: {_listed(within, several)}."] if within else [])


def _listed(variants: Sequence[Variant], several: bool) -> str:
    """The variants with their differences; one of a single seed among several says so: its noise is the samples'."""
    notes = [", one seed only" if several and len(v["difference"]["seeds"]) == 1 else "" for v in variants]
    pairs = zip(variants, notes, strict=True)
    return "; ".join(f"{titled(v)} ({v['difference']['mean']:+.1f}{note})" for v, note in pairs)


def _generation(variants: Mapping[str, Variant]) -> list[str]:
    """What partial generation saved, and what it gained in the same time."""
    full, same, timed = (variants.get(n) for n in ("reference", "partial_equal_updates", "partial_equal_time"))
    if not full or not same or not timed:
        return []
    seconds = [mean_of(one, "cpu_seconds") or math.nan for one in (full, same, timed)]
    codes = [mean_of(one, "codes") or math.nan for one in (full, same)]
    area, partial_area = (mean_of(one, "heldout_auc") or math.nan for one in (full, timed))
    return [
        f"Partial generation drew {codes[1] / codes[0]:.2f} of the codes of full generation in as many updates and "
        f"took {seconds[1] / seconds[0]:.2f} of its time; at equal time ({seconds[2] / seconds[0]:.2f}) it made "
        f"{(mean_of(timed, 'updates') or 0) / (mean_of(full, 'updates') or 1):.2f} times as many updates. Its "
        f"critic's AUC at the end is {partial_area:.2f}, full generation's {area:.2f} (0.5 is chance)."
    ]


def _maps(variants: Mapping[str, Variant]) -> list[str]:
    """The best score map of each reward, here and in the paper."""
    lines = []
    for reward, best in PAPER_BEST.items():
        named = {name: v for key, v in variants.items() for name in (key, *v["also"]) if name.startswith(f"{reward}_")}
        fds = {
            name.removeprefix(f"{reward}_"): mean_of(v, "fd") or 0.0 for name, v in named.items() if name[-1].isdigit()
        }
        if len(fds) == 3:
            text = ", ".join(f"{cells} {fd:.1f}" for cells, fd in sorted(fds.items()))
            lines.append(
                f"{reward} reward by score map: {text}; lowest {min(fds, key=lambda c: fds[c])} (paper: {best})."
            )
    return lines


def _levels(variants: Mapping[str, Variant]) -> list[str]:
    """Whether tuning both levels was best, as in the paper."""
    fds = {name: mean_of(variants[name], "fd") or 0.0 for name in ("reference", "top", "bottom") if name in variants}
    if len(fds) < 3:
        return []
    best = {"reference": "both", "top": "the top", "bottom": "the bottom"}[min(fds, key=lambda name: fds[name])]
    text = ", ".join(f"{'both' if name == 'reference' else name} {fd:.1f}" for name, fd in fds.items())
    return [f"FD by the codes that RAL tunes: {text}; lowest with {best} (paper: both)."]


def _noise(results: Mapping[str, Any]) -> list[str]:
    """What the word noise leaves out."""
    seeds = len(results["seeds"])
    lines = []
    if seeds == 1:
        lines.append("One seed: the noise above is that of the samples only; another training run may move more.")
    elif seeds == 2:
        lines.append("Two seeds: with one degree of freedom Student's t is 12.7, so that hardly anything stands out.")
    mean = next((v for v in results["variants"] if v["name"] == "baseline_mean" and v.get("difference")), None)
    if mean and results["settings"]["normalised"]:
        lines.append(
            f"The mean baseline moved FD by {mean['difference']['mean']:+.1f}: with normalised advantages it is, up to "
            "rounding, the same estimator as leave-one-out, so this is how far rounding alone leads a run."
        )
    return lines


def save_figure(path: Path, results: Mapping[str, Any]) -> None:
    """FD of every variant, a point per seed, with the controls as lines; one panel per number of levels.

    Raises:
        RunError: the file cannot be written.
    """
    panels = [[v for v in results["variants"] if v["levels"] == levels] for levels in (1, 2)]
    panels = [panel for panel in panels if panel]
    heights = [1.5 + sum(v["group"] != "controls" for v in panel) for panel in panels]
    figure = Figure(figsize=(9, 1.6 + 0.36 * sum(heights)), dpi=160, facecolor="white", layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for axes, panel in zip(grid[:, 0], panels, strict=True):
        _panel(axes, panel, results)
    cold = f"T = {results['sharpened']:g}"
    caption = (
        f"Filled: T = 1; hollow: {cold}. One colour and marker per seed; bars: 95 % interval of a row's samples. "
        f"Lines: means of the controls, pale at {cold}. FD on {results['extractor']} features to the decoded "
        "training codes."
    )
    figure.supxlabel("\n".join(textwrap.wrap(caption, 110)), fontsize=9, x=0.01, ha="left")
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", metadata={"Software": None}))


def _panel(axes: Axes, panel: Sequence[Variant], results: Mapping[str, Any]) -> None:
    """The variants of one number of levels, from top to bottom."""
    shown = [variant for variant in panel if variant["group"] != "controls"]
    for control, style in (("mle", "-"), ("mle_continued", "--")):
        for variant in panel:
            if variant["name"] == control:
                axes.axvline(mean_of(variant, "fd") or 0.0, color="#555555", linestyle=style, label=variant["label"])
                axes.axvline(mean_of(variant, "fd_sharpened") or 0.0, color="#bbbbbb", linestyle=style, zorder=0)
    seeds = results["seeds"]
    for height, variant in enumerate(shown):
        for seed, row in variant["seeds"].items():
            order = seeds.index(seed)
            y = height + 0.22 * (order - (len(seeds) - 1) / 2)
            look: dict[str, Any] = {"color": OTHER_COLOURS[(order + 1) % len(OTHER_COLOURS)], "fmt": MARKERS[order % 8]}
            half = sampling_half(row, "fd")
            label = f"seed {seed}" if height == 0 else None
            axes.errorbar(row["fd"], y, xerr=half, markersize=6, capsize=2, label=label, **look)
            axes.errorbar(row["fd_sharpened"], y, markersize=5, markerfacecolor="none", alpha=0.8, **look)
    for height in range(1, len(shown)):
        if shown[height]["group"] != shown[height - 1]["group"]:
            axes.axhline(height - 0.5, color="#bbbbbb", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [titled(variant) for variant in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel("FD (lower is better)")
    title = "One change of the reference at a time" if panel[0]["levels"] == 1 else "Two levels: which codes RAL tunes"
    axes.set_title(title, fontsize=11, weight="bold", loc="left")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
