"""The figures of the lesson on exposure bias (`examples/exposure_bias.py`), and its animation."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from ral_gym.pictures import MARKERS, OTHER_COLOURS
from ral_gym.runs.storage import write_atomic

COLUMNS = 3
PALETTE = (*OTHER_COLOURS[1:], OTHER_COLOURS[0])
LEAST_SIDE = 256  # Pixels of an image in the animation: smaller ones are enlarged by a whole number.
RED = 255  # Index in the palette of the animation.
BAR = 76  # Pixels of text under each of them.
Curve = Mapping[str, Sequence[float]]  # `mean` and `error`, a standard error each


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
        results: what `evidence.exposure_lesson` measured, by model.
        width: codes per row.
    """
    positions = list(range(1, len(next(iter(results.values()))["exposure"]["excess"]["mean"]) + 1))
    code, kl_label = "position of the code", "KL(oracle || model), nats per code"
    panels = []
    for name, one in results.items():
        bias = one["exposure"]
        curves = {"own prefixes": bias["on_model"]["kl"], "oracle's prefixes": bias["on_oracle"]["kl"]}
        panels.append(Panel(name, code, kl_label, positions, curves, None))
    save_figure(
        folder / "exposure_kl.png",
        panels,
        "How wrong the next code's distribution is, along the model's own samples and along the oracle's. Exposure "
        "bias: the first lies above the second. The scales differ.",
    )
    excess = {name: one["exposure"]["excess"] for name, one in results.items()}
    ratio = {name: by_row(one["exposure"]["ratio"]["kl"], width) for name, one in results.items()}
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
    _save_recovery(folder, {name: one for name, one in results.items() if "prefix" in one}, width, kl_label)


def _save_recovery(folder: Path, results: Mapping[str, Any], width: int, kl_label: str) -> None:
    """Given and spoilt beginnings."""
    harm = "harm of the model's own context"
    save_figure(
        folder / "exposure_prefix.png",
        [
            Panel(
                name,
                "rows given by the oracle",
                "harm, nats per code",
                one["prefix"]["rows"],
                {harm: one["prefix"]["harm"]},
                0,
            )
            for name, one in results.items()
        ],
        "The model finishes images that the oracle began. Harm: KL(model || oracle) of the completion minus the same "
        "in the oracle's context, at the same positions. Exposure bias: above 0, and most on the left. The scales "
        "differ.",
    )
    bumps = {
        name: {
            "oracle's codes follow": one["corruption"]["given"]["bump"],
            "its own follow": one["corruption"]["own"]["bump"],
        }
        for name, one in results.items()
    }
    save_figure(
        folder / "exposure_corruption.png",
        [
            Panel(
                name,
                "codes behind the spoilt row",
                "increase of KL, nats per code",
                list(range(len(curves["its own follow"]["mean"]))),
                curves,
                0,
            )
            for name, curves in bumps.items()
        ],
        f"Some codes of the last given row are replaced by random ones; shown is the increase of {kl_label}. The first "
        f"{width} codes behind lie right below them. Back at 0: the model has recovered. The scales differ.",
    )


def save_comparison(path: Path, comparison: Mapping[str, Any]) -> None:
    """Error on own prefixes against error on the oracle's, a point per model and seed.

    Args:
        path: of the PNG.
        comparison: what `evidence.exposure_lesson.compare` returned, without models far from the others.
    """
    figure = Figure(figsize=(7.5, 6.6), dpi=100, facecolor="white", layout="constrained")
    own, given = "KL(oracle || model) on the model's own prefixes", "KL(oracle || model) on the oracle's prefixes"
    axes = figure.add_subplot(1, 1, 1, xlabel=f"{given}, nats per code", ylabel=f"{own}, nats per code", aspect="equal")
    for index, (name, row) in enumerate(comparison.items()):
        style: dict[str, Any] = {"color": PALETTE[index % len(PALETTE)], "marker": MARKERS[index % len(MARKERS)]}
        axes.scatter(row["kl_given"]["seeds"], row["kl_own"]["seeds"], s=36, alpha=0.8, label=name, **style)
    ends = [min(axes.get_xlim()[0], axes.get_ylim()[0]), max(axes.get_xlim()[1], axes.get_ylim()[1])]
    axes.plot(ends, ends, color="black", linestyle=":", linewidth=1, zorder=0)
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    caption = (
        "A point per model and seed. On the dotted line: as wrong on its own prefixes as on the oracle's, no exposure "
        "bias. Above it: exposure bias. Further to the right: a worse model, whatever its prefixes."
    )
    figure.supxlabel("\n".join(textwrap.wrap(caption, 100)), fontsize=9, x=0.01, ha="left")
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", metadata={"Software": None}))


def by_row(curve: Curve, width: int) -> Curve:
    """Means over the rows of a grid, with the largest error that these can have: as if a row's codes erred together."""
    return {name: np.reshape(curve[name], (-1, width)).mean(1).tolist() for name in ("mean", "error")}  # (H,) each


def save_figure(path: Path, panels: Sequence[Panel], caption: str) -> None:
    """Plots in rows of three with 95 % bands, and a caption below."""
    columns = min(len(panels), COLUMNS)
    rows = math.ceil(len(panels) / columns)
    size = (max(7.5, 5.2 * columns), 0.8 + 4.2 * rows)
    figure = Figure(figsize=size, dpi=100, facecolor="white", layout="constrained")
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, number + 1, xlabel=panel.xlabel, ylabel=panel.ylabel)
        if panel.none is not None:
            axes.axhline(panel.none, color="black", linestyle=":", linewidth=1)
        for index, (label, curve) in enumerate(panel.curves.items()):
            colour = PALETTE[index % len(PALETTE)]
            mean, half = np.array(curve["mean"]), 1.96 * np.array(curve["error"])
            mark: dict[str, Any] = {"marker": MARKERS[index % len(MARKERS)], "markevery": max(1, len(mean) // 8)}
            axes.plot(panel.x, mean, color=colour, label=label, linewidth=1.6, markersize=5, **mark)
            axes.fill_between(panel.x, mean - half, mean + half, color=colour, alpha=0.18, linewidth=0)
        axes.set_title(panel.title, fontsize=11, weight="bold", loc="left")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    lines = textwrap.wrap(f"{caption} Bands: 95\N{NO-BREAK SPACE}%.", 100 if columns == 1 else 78 * columns)
    figure.supxlabel("\n".join(lines), fontsize=9, x=0.01, ha="left")
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", metadata={"Software": None}))


# ---- two episodes ------------------------------------------------------------------------------------------------


@dataclass
class Episode:
    """One image, code by code: T entries each, and T + 1 pictures."""

    codes: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)  # log o(code), nats
    kl: list[float] = field(default_factory=list)  # KL(o || p) before the code, nats
    rarity: list[float] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)  # uint8 (S, S, 3)

    def first_wrong(self, threshold: float) -> int | None:
        """Position of the first code that is rarer than the threshold."""
        return next((t for t, rarity in enumerate(self.rarity) if rarity < threshold), None)


def save_animation(path: Path, episodes: Mapping[str, Episode], width: int, threshold: float) -> None:
    """Both episodes side by side, a frame per code; a red frame around the first wrong code of each."""
    parts = [_animate(name, episode, width, threshold) for name, episode in episodes.items()]
    frames = [Image.fromarray(np.concatenate(pictures, 1)) for pictures in zip(*parts, strict=True)]
    for frame in frames:  # one palette for all, the greys and red: choosing one per frame takes half a minute
        frame.putpalette([grey for grey in range(RED) for _ in range(3)] + [220, 0, 0])
    durations = [120] * (len(frames) - 1) + [4000]  # milliseconds
    write_atomic(
        path,
        lambda temporary: frames[0].save(
            temporary, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0
        ),
    )


def _animate(name: str, episode: Episode, width: int, threshold: float) -> list[np.ndarray]:
    """One episode's frames with two lines of text, as indices (Y, X) uint8 of greys and `RED`."""
    font, wrong, frames = ImageFont.load_default(size=15), episode.first_wrong(threshold), []
    scale = max(1, LEAST_SIDE // len(episode.frames[0]))
    side = len(episode.frames[0]) * scale
    cell = side // width
    for drawn, picture in enumerate(episode.frames):
        frame = Image.new("L", (side + 20, side + BAR + 10), RED - 1)
        grey = Image.fromarray(picture[..., 0].clip(max=RED - 1))
        frame.paste(grey.resize((side, side), Image.Resampling.NEAREST), (10, 10))
        pen = ImageDraw.Draw(frame)
        total = f"log o = {sum(episode.rewards[:drawn]):.1f}"
        pen.text((10, side + 16), f"{name}\ncode {drawn} of {len(episode.codes)}, {total}", 0, font)
        if wrong is not None and drawn > wrong:
            y, x = divmod(wrong, width)
            pen.rectangle((10 + x * cell, 10 + y * cell, 9 + (x + 1) * cell, 9 + (y + 1) * cell), None, RED, 4)
            pen.text((10, side + 54), f"first wrong code: number {wrong + 1}", 0, font)
        frames.append(np.asarray(frame))
    return frames
