"""The figures of the lesson on exposure bias (`examples/exposure_bias.py`), and its numbers as text."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from ral_gym.figures import MARKERS, OTHER_COLOURS
from ral_gym.metrics import Curve
from ral_gym.storage import write_atomic


class Panel(NamedTuple):
    """One plot: curves by label over x, and a dotted line where there is no effect."""

    title: str
    xlabel: str
    ylabel: str
    x: Sequence[int]
    curves: Mapping[str, Curve]
    none: float | None


def save_plots(folder: Path, results: Mapping[str, Any], width: int) -> None:
    """The four figures of the lesson.

    Args:
        folder: where they go.
        results: what `examples/exposure_bias.py` measured, by model; the first entry is `light`.
        width: codes per row.
    """
    positions = list(range(1, len(results["light"].exposure.excess.mean) + 1))
    code, kl_label = "position of the code", "KL(oracle || model), nats per code"
    save_figure(
        folder / "exposure_kl.png",
        [
            Panel(
                name,
                code,
                kl_label,
                positions,
                {"own prefixes": one.exposure.on_model["kl"], "oracle's prefixes": one.exposure.on_oracle["kl"]},
                None,
            )
            for name, one in results.items()
        ],
        "How wrong the next code's distribution is, along the model's own samples and along the oracle's. Exposure "
        "bias: the first lies above the second.",
    )
    excess = {name: one.exposure.excess for name, one in results.items()}
    ratio = {name: by_row(one.exposure.ratio["kl"], width) for name, one in results.items()}
    rows = list(range(1, len(positions) // width + 1))
    save_figure(
        folder / "exposure_ratio.png",
        [
            Panel("EB-C, averaged over each row", "row", "EB-C (1: none)", rows, ratio, 1),
            Panel("Excess of the accumulated error", code, "excess over linear growth, %", positions, excess, 0),
        ],
        "Left: error on own prefixes over error on the oracle's. Right: the same, of sums up to a position; a line "
        "that keeps rising would mean that errors compound.",
    )
    save_figure(
        folder / "exposure_prefix.png",
        [
            Panel(
                name,
                "rows given by the oracle",
                "harm, nats per code",
                one.prefix.rows,
                {"harm of the model's own context": one.prefix.harm},
                0,
            )
            for name, one in results.items()
        ],
        "The model finishes images that the oracle began. Harm: KL(model || oracle) of the completion minus the same "
        "in the oracle's context, at the same positions. Exposure bias: above 0, and most on the left.",
    )
    save_figure(
        folder / "exposure_corruption.png",
        [
            Panel(
                name,
                "codes behind the spoilt row",
                f"increase of {kl_label}",
                list(range(len(one.corruption["own"].bump.mean))),
                {"oracle's codes follow": one.corruption["given"].bump, "its own follow": one.corruption["own"].bump},
                0,
            )
            for name, one in results.items()
        ],
        "Some codes of the last given row are replaced by random ones. The first "
        f"{width} codes behind lie right below them. Back at 0: the model has recovered.",
    )


def by_row(curve: Curve, width: int) -> Curve:
    """Means over the rows of a grid, with the largest error that these can have: as if a row's codes erred together."""
    return Curve(curve.mean.view(-1, width).mean(1), curve.error.view(-1, width).mean(1))  # (H,) each


def save_figure(path: Path, panels: Sequence[Panel], caption: str) -> None:
    """Plots side by side with 95 % bands, and a caption below."""
    figure = Figure(figsize=(max(7.5, 5.2 * len(panels)), 5), dpi=130, facecolor="white", layout="constrained")
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1, xlabel=panel.xlabel, ylabel=panel.ylabel)
        if panel.none is not None:
            axes.axhline(panel.none, color="black", linestyle=":", linewidth=1)
        for index, (label, curve) in enumerate(panel.curves.items()):
            colour, mean, half = OTHER_COLOURS[1:][index % 6], curve.mean.numpy(), 1.96 * curve.error.numpy()
            mark: dict[str, Any] = {"marker": MARKERS[index % len(MARKERS)], "markevery": max(1, len(mean) // 8)}
            axes.plot(panel.x, mean, color=colour, label=label, linewidth=1.6, markersize=5, **mark)
            axes.fill_between(panel.x, mean - half, mean + half, color=colour, alpha=0.18, linewidth=0)
        axes.set_title(panel.title, fontsize=11, weight="bold", loc="left")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    lines = textwrap.wrap(f"{caption} Bands: 95 %.", 100 if len(panels) == 1 else 78 * len(panels))
    figure.supxlabel("\n".join(lines), fontsize=9, x=0.01, ha="left")
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", metadata={"Software": None}))


def mean_text(curve: Curve) -> str:
    """The mean of a curve."""
    return f"{float(curve.mean.mean()):.3f}"


def interval_text(value: float, low: float, high: float) -> str:
    """A figure and its interval."""
    return f"{value:+.3f} ({low:+.3f} to {high:+.3f})"


def entry_text(curve: Curve, entry: int) -> str:
    """One value of a curve and half its 95 % interval."""
    return f"{float(curve.mean[entry]):+.3f} ± {1.96 * float(curve.error[entry]):.3f}"
