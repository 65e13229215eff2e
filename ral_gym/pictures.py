"""Pictures of a run: sample grids, generators side by side, nearest training images, curves, FD against entropy.

Everything is drawn with matplotlib's object interface (no window, no global state) and written atomically. A generator
has the same colour in all figures, from Okabe and Ito's palette, which colour-blind readers can tell apart; curves and
points also differ in marker. Images are enlarged by whole factors without smoothing, so that pixels stay sharp.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.text
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ral_gym.metrics.table import results_caption, results_markdown, results_table
from ral_gym.runs.storage import write_atomic

__all__ = [
    "colour",
    "results_caption",
    "results_markdown",
    "results_table",
    "save_comparison",
    "save_curves",
    "save_frontier",
    "save_grid",
    "save_neighbours",
]

Images = Tensor | np.ndarray
"""uint8 images (N, C, S, S), C = 1 or 3."""

DPI = 100
FACE_PIXELS = 128  # Side at which a small image is shown in a grid.
MAX_WIDTH = 2600  # Pictures wider than this are shown at a smaller scale.
GAP = 3  # Pixels between two images of a grid.

COLOURS = {
    "real": "#000000",
    "reconstruction": "#7f7f7f",
    "floor": "#7f7f7f",
    "mle": "#0072B2",
    "mle_temperature": "#0072B2",
    "mle_ema": "#56B4E9",
    "mle_best_temperature": "#56B4E9",
    "mle_best_guidance": "#56B4E9",
    "mle_continued": "#009E73",
    "mle_equal_time": "#000000",
    "ral": "#D55E00",
    "ral_best_temperature": "#D55E00",
    "ral_best_guidance": "#D55E00",
    "ral_live": "#E69F00",
}
OTHER_COLOURS = ("#CC79A7", "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#000000")
Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Label -> (x, y)."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def colour(label: str, others: Sequence[str] = ()) -> str:
    """Colour of a generator by its name (`mle_continued`, or as printed: `MLE continued`).

    Args:
        label: the name.
        others: all labels of the figure; those without a fixed colour share a second list of colours in order.
    """
    if (name := _name(label)) in COLOURS:
        return COLOURS[name]
    unknown = [_name(other) for other in others if _name(other) not in COLOURS]
    return OTHER_COLOURS[(unknown.index(name) if name in unknown else 0) % len(OTHER_COLOURS)]


class _Panel(NamedTuple):
    """A block of images: its label, the picture (H, W, 3), and row labels by the height of the row's middle."""

    label: str
    canvas: np.ndarray
    rows: Sequence[tuple[float, str]] = ()


def save_grid(path: str | Path, images: Images, *, columns: int, title: str, caption: str | None = None) -> None:
    """One grid of images in raster order.

    Args:
        path: PNG file to write.
        images: uint8 (N, C, S, S).
        columns: images per row.
        title: above the grid.
        caption: below the grid, small.

    Raises:
        RunError: the file cannot be written.
    """
    array = _array(images)
    columns = min(columns, len(array))
    panel = _Panel("", _tile(array, columns, _scale(array.shape[-1], columns)))
    _write_panels(path, [panel], title, caption)


def save_comparison(
    path: str | Path, columns: Mapping[str, Images], *, title: str, caption: str | None = None, rows: int = 4
) -> None:
    """Generators side by side, each as a labelled block of images.

    Args:
        path: PNG file to write.
        columns: label -> uint8 (N, C, S, S). All blocks show equally many images: as many full columns of `rows` as the
            shortest has.
        title: above the blocks.
        caption: below the blocks, small.
        rows: rows of each block.

    Raises:
        RunError: the file cannot be written.
    """
    blocks = {label: _array(images) for label, images in columns.items()}
    shortest = min(len(array) for array in blocks.values())
    rows = min(rows, shortest)
    width = shortest // rows
    scale = _scale(max(array.shape[-1] for array in blocks.values()), width * len(blocks))
    panels = [_Panel(label, _tile(array[: rows * width], width, scale)) for label, array in blocks.items()]
    _write_panels(path, panels, title, caption)


def save_class_grid(
    path: str | Path, columns: Mapping[str, Images], names: Sequence[str], *, title: str, caption: str | None = None
) -> None:
    """A row of images per class, generators side by side.

    Args:
        path: PNG file to write.
        columns: label -> uint8 (N k, C, S, S), k images of the first class, then k of the second, ...
        names: of the N classes, the rows' labels.
        title: above the blocks.
        caption: below the blocks, small.
    """
    blocks = {label: _array(images) for label, images in columns.items()}
    each = len(next(iter(blocks.values()))) // len(names)
    scale = _scale(next(iter(blocks.values())).shape[-1], each * len(blocks))
    panels = [_Panel(label, _tile(array[: each * len(names)], each, scale)) for label, array in blocks.items()]
    tall, short = panels[0].canvas.shape[0] / len(names), [n if len(n) <= 16 else f"{n[:14]}.." for n in names]
    panels[0] = panels[0]._replace(rows=[((row + 0.5) * tall, name) for row, name in enumerate(short)])
    _write_panels(path, panels, title, caption)


def save_neighbours(
    path: str | Path, samples: Images, neighbours: Images, *, title: str, caption: str | None = None, columns: int = 12
) -> None:
    """Each sample above its nearest training image: equal pairs are memorised images.

    Args:
        path: PNG file to write.
        samples: uint8 (N, C, S, S).
        neighbours: uint8 (N, C, S, S), the nearest training image of each.
        title: above the pairs.
        caption: below the pairs, small.
        columns: pairs per row.

    Raises:
        RunError: the file cannot be written.
    """
    above, below = _array(samples), _array(neighbours)
    columns = min(columns, len(above))
    scale = _scale(above.shape[-1], columns)
    parts: list[np.ndarray] = []
    labels: list[tuple[float, str]] = []
    y = 0
    for start in range(0, len(above), columns):
        for label, images, gap in (("sample", above, GAP), ("nearest", below, 6 * GAP)):
            strip = _tile(images[start : start + columns], columns, scale)
            labels.append((y + len(strip) / 2, label))
            parts += [strip, np.full((gap, strip.shape[1], 3), 255, np.uint8)]
            y += len(strip) + gap
    _write_panels(path, [_Panel("", np.concatenate(parts[:-1]), labels)], title, caption)


def draw_curves(
    axes: Axes, curves: Curves, *, tint: str | None = None, markers: int, fontsize: int, **style: Any
) -> None:
    """Lines on given axes, with a legend where there are several; points whose y is NaN are left out.

    Args:
        axes: where.
        curves: label -> (x, y).
        tint: the colour of a single curve; several have colours of their own.
        markers: about how many a line has: one on each of many points would hide it.
        fontsize: the legend's.
        **style: matplotlib's.
    """
    for number, (label, (x, y)) in enumerate(curves.items()):
        known = np.isfinite(np.asarray(y, float))
        xs, ys = np.asarray(x, float)[known], np.asarray(y, float)[known]
        axes.plot(
            xs,
            ys,
            label=label,
            color=tint if tint and len(curves) == 1 else colour(label, list(curves)),
            marker=MARKERS[number % len(MARKERS)],
            markevery=max(1, len(xs) // markers),
            **style,
        )
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=fontsize)


def save_curves(
    path: str | Path,
    curves: Curves,
    *,
    xlabel: str,
    ylabel: str,
    title: str,
) -> None:
    """Lines over a common axis, for instance a loss over steps.

    Args:
        path: PNG file to write.
        curves: label -> (x, y); points whose y is NaN are left out.
        xlabel: what x is, with its unit.
        ylabel: what y is, with its unit.
        title: above the plot.

    Raises:
        RunError: the file cannot be written.
    """
    figure, axes = _axes(xlabel, ylabel, title)
    draw_curves(axes, curves, markers=12, markersize=5, linewidth=1.8, fontsize=10)
    _write(figure, path)


def save_frontier(
    path: str | Path,
    curve: Sequence[tuple[float, float, float]],
    points: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    sweeps: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
) -> None:
    """FD against entropy: temperature sweeps as curves, other generators and checkpoints as points.

    Lower is better at the same entropy. A generator that only sharpens lies on MLE's curve.

    Args:
        path: PNG file to write.
        curve: (temperature, entropy in nats per code, FD) of MLE's sweep.
        points: label -> (entropy, FD) of each checkpoint, in order; NaN are left out.
        title: above the plot.
        sweeps: label -> sweep of another generator, as `curve`.

    Raises:
        RunError: the file cannot be written.
    """
    figure, axes = _axes("entropy (nats per code)", "FD (lower is better)", title)
    sweeps = {"mle": curve, **(sweeps or {})}
    for label, sweep in sweeps.items():
        _draw_sweep(axes, sweep, "MLE by temperature" if label == "mle" else f"{label} by temperature", colour(label))
    _name_temperatures(axes, list(sweeps.values()))
    for number, (label, measured) in enumerate(points.items()):
        known = [(entropy, fd) for entropy, fd in measured if math.isfinite(entropy) and math.isfinite(fd)]
        axes.plot(
            [entropy for entropy, _ in known],
            [fd for _, fd in known],
            label=f"{label} (checkpoints in order)" if len(known) > 1 else label,
            color=colour(label, list(points)),
            marker=MARKERS[(number + 1) % len(MARKERS)],
            markersize=8,
            linestyle=":" if len(known) > 1 else "none",
            linewidth=1,
            markeredgecolor="white",
        )
        if len(known) > 1:
            for order, position in enumerate(known, start=1):
                axes.annotate(str(order), position, xytext=(-9, 5), textcoords="offset points", fontsize=8)
    axes.margins(0.08, 0.12)
    axes.legend(frameon=False, fontsize=10)
    _write(figure, path)


def _draw_sweep(axes: Axes, curve: Sequence[tuple[float, float, float]], label: str, line_colour: str) -> None:
    """One generator's (temperature, entropy, FD), joined by entropy."""
    sweep = sorted((entropy, fd) for _, entropy, fd in curve)
    axes.plot([e for e, _ in sweep], [f for _, f in sweep], color=line_colour, marker="o", label=label)


def _name_temperatures(axes: Axes, curves: Sequence[Sequence[tuple[float, float, float]]]) -> None:
    """Each temperature once, below its lowest point; FD is logarithmic where a high one would hide the others."""
    places = sorted((place for curve in curves for place in curve), key=lambda place: -place[2])
    for temperature, lowest in {place[0]: place[1:] for place in places}.items():
        axes.annotate(f"T={temperature:g}", lowest, (0, -16), textcoords="offset points", ha="center", fontsize=8)
    if places[0][2] > 4 * places[-1][2] > 0:
        axes.set_yscale("log")
        axes.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")


def _name(label: str) -> str:
    return label.strip().lower().replace(" ", "_").replace("-", "_")


def _array(images: Images) -> np.ndarray:
    """Images as uint8 (N, C, S, S).

    Raises:
        ValueError: they are something else.
    """
    array = images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1] not in (1, 3) or len(array) == 0:
        raise ValueError(f"images must be uint8 (N >= 1, 1 or 3, S, S), not {array.dtype} {array.shape}")
    return array


def _scale(side: int, across: int) -> int:
    """Whole number by which images are enlarged: up to `FACE_PIXELS` each and `MAX_WIDTH` together."""
    return max(1, min(FACE_PIXELS // side, MAX_WIDTH // (across * side)))


def _tile(images: np.ndarray, columns: int, scale: int) -> np.ndarray:
    """Images (N, C, S, S) as one white-backed RGB picture (rows, columns, 3), enlarged without smoothing."""
    n, channels, height, width = images.shape
    rows = math.ceil(n / columns)
    step_y, step_x = height * scale + GAP, width * scale + GAP
    canvas = np.full((rows * step_y - GAP, columns * step_x - GAP, 3), 255, np.uint8)
    large = images.repeat(scale, axis=2).repeat(scale, axis=3).transpose(0, 2, 3, 1)  # (N, S', S', C)
    for i in range(n):
        y, x = i // columns * step_y, i % columns * step_x
        canvas[y : y + step_y - GAP, x : x + step_x - GAP] = large[i] if channels == 3 else large[i].repeat(3, axis=2)
    return canvas


def _write_panels(path: str | Path, panels: Sequence[_Panel], title: str, caption: str | None) -> None:
    """Write panels side by side without resampling, with title, labels and caption around them."""
    inner = sum(panel.canvas.shape[1] for panel in panels)
    text = int(min(34, max(15, inner / 55)))  # Pixels; wide pictures are shown smaller.
    between, margin = 2 * text, text
    longest = max((len(words) for panel in panels for _, words in panel.rows), default=0)
    left = margin + (int(max(5, 0.65 * longest + 0.5) * text) if longest else 0)
    width = max(left + inner + between * (len(panels) - 1) + margin, 24 * text)
    # Characters per line: DejaVu's are 0.56 em wide on average, bold ones 0.68.
    title_lines = textwrap.wrap(title, int((width - 2 * margin) / (0.68 * 1.25 * text)))
    caption_lines = textwrap.wrap(caption or "", int((width - 2 * margin) / (0.56 * text)))
    label_height = 2 * text if any(panel.label for panel in panels) else 0
    top = int(margin + 1.7 * text * len(title_lines) + 0.5 * text + label_height)
    tallest = max(panel.canvas.shape[0] for panel in panels)
    height = int(top + tallest + margin + (1.4 * text * len(caption_lines) if caption_lines else 0))

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")

    def write_text(x: float, y: float, words: str, size: float, **style: Any) -> None:
        figure.text(x / width, 1 - y / height, words, fontsize=size * 72 / DPI, **style)

    write_text(margin, margin, "\n".join(title_lines), 1.25 * text, va="top", weight="bold")
    labels, x = [panel.label for panel in panels], left
    for panel in panels:
        tall, wide = panel.canvas.shape[:2]
        # figimage takes pixels, so that nothing is resampled.
        figure.figimage(panel.canvas, xo=x, yo=height - top - tall, origin="upper")
        if panel.label:
            tint = colour(panel.label, labels)
            write_text(x, top - 0.75 * text, panel.label, 1.1 * text, va="bottom", color=tint, weight="bold")
            bar = Rectangle(
                (x / width, 1 - (top - 0.3 * text) / height), wide / width, 0.25 * text / height, color=tint
            )
            figure.add_artist(bar)
        for centre, words in panel.rows:
            write_text(left - 0.5 * text, top + centre, words, text, va="center", ha="right")
        x += wide + between
    write_text(margin, top + tallest + 0.7 * text, "\n".join(caption_lines), text, va="top", color="#444444")
    _write(figure, path)


def _axes(xlabel: str, ylabel: str, title: str) -> tuple[Figure, Axes]:
    """A plot with the labels every plot has."""
    figure = Figure(figsize=(8, 5), dpi=2 * DPI, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel, fontsize=11)
    axes.set_ylabel(ylabel, fontsize=11)
    axes.set_title("\n".join(textwrap.wrap(title, 80)), fontsize=12, weight="bold", loc="left")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def show_as_written(figure: Figure) -> None:
    """Show dollar signs in names and titles as they are: as formulas they might not parse."""
    for text in figure.findobj(matplotlib.text.Text):
        text.set_parse_math(False)


def _write(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, atomically; no date or version in it, so that equal figures are equal files."""
    show_as_written(figure)
    write_atomic(Path(path), lambda temporary: figure.savefig(temporary, format="png", metadata={"Software": None}))
