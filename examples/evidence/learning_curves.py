"""Learning curves of several algorithms over the images they have drawn."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ral_gym.pictures import MARKERS, OTHER_COLOURS
from ral_gym.runs.storage import write_atomic


def save_learning_curves(
    path: Path,
    curves: Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]],
    *,
    ylabel: str,
    title: str,
    caption: str,
    dashed: Collection[str] = (),
) -> None:
    """A line per algorithm, the mean over seeds, and a band from the least to the greatest seed.

    Args:
        path: PNG file to write.
        curves: label -> (images drawn (P,), values (seeds, P)).
        ylabel: what the values are, with their unit.
        title: above.
        caption: below.
        dashed: labels of lines that are of another kind.

    Raises:
        RunError: the file cannot be written.
    """
    figure = Figure(figsize=(9, 6), dpi=120, facecolor="white", layout="constrained")
    axes = figure.add_subplot(xlabel="images drawn", ylabel=ylabel)
    for number, (label, (images, by_seed)) in enumerate(curves.items()):
        values = np.array(by_seed)  # (seeds, P)
        colour, style = OTHER_COLOURS[number % len(OTHER_COLOURS)], "--" if label in dashed else "-"
        mark: dict[str, Any] = {"marker": MARKERS[number % len(MARKERS)], "markersize": 5, "markevery": (number % 5, 5)}
        axes.plot(images, values.mean(0), style, color=colour, label=label, linewidth=1.8, **mark)
        axes.fill_between(images, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
    axes.set_title(title, fontsize=12, weight="bold", loc="left")
    axes.legend(frameon=False, fontsize=10)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(caption, fontsize=9, x=0.01, ha="left")
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", metadata={"Software": None}))
