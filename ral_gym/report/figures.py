"""The report's figures: strips of images, score maps over images, and plots in the page's colours.

The same colours and markers as in `ral_gym.pictures`, drawn for a page: images without frames or text, which the page
supplies, and plots as SVG, legible on a phone.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ral_gym.pictures import MARKERS, Curves, _array, _scale, _tile, colour, draw_curves, show_as_written
from ral_gym.report.page import image, inline_svg

HEAT_SHARE = 0.55
"""Opacity of the score's colour over the image."""
Points = Mapping[str, Sequence[tuple[float, float]]]


def strip(images: Tensor | np.ndarray, alt: str, columns: int) -> Markup:
    """Images (N, C, S, S) uint8 in raster order, as an ``<img>``; the gaps between them are transparent."""
    array = _array(images)
    columns = min(columns, len(array))
    scale = _scale(array.shape[-1], max(columns, 4))
    canvas = _tile(array, columns, scale)  # (H, W, 3)
    opaque = 255 - _tile(np.zeros_like(array), columns, scale)[..., :1]  # (H, W, 1)
    colours = canvas if array.shape[1] == 3 else canvas[..., :1]
    pixels = np.concatenate([colours, opaque], -1)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="png", optimize=True)
    return image(file.getvalue(), alt, canvas.shape[1], canvas.shape[0])


def heat(images: Tensor, score_map: Tensor, low: float, high: float) -> np.ndarray:
    """Score maps over their images: each patch is tinted by its score.

    Args:
        images: (N, C, S, S) uint8.
        score_map: (N, h, w) float, whose h and w divide S.
        low: the score that gets the scale's first colour, as do lower ones.
        high: the score that gets its last colour.

    Returns:
        (N, 3, S, S) uint8.
    """
    array = _array(images).astype(np.float32) / 255
    side = array.shape[-1]
    scores = score_map.cpu().numpy()
    large = scores.repeat(side // scores.shape[1], 1).repeat(side // scores.shape[2], 2)  # (N, S, S)
    tints = heat_map()((large - low) / max(high - low, 1e-12))[..., :3].transpose(0, 3, 1, 2)  # (N, 3, S, S)
    mixed = HEAT_SHARE * tints + (1 - HEAT_SHARE) * array
    return np.round(255 * mixed).clip(0, 255).astype(np.uint8)


def heat_map() -> matplotlib.colors.Colormap:
    """Orange through white to violet, which colour-blind readers can tell apart."""
    return matplotlib.colormaps["PuOr"]


def heat_colours(n: int = 11) -> list[str]:
    """The scale's colours from low to high."""
    return [matplotlib.colors.to_hex(heat_map()(value)) for value in np.linspace(0, 1, n)]


def curves_svg(name: str, curves: Curves, *, xlabel: str, ylabel: str, tint: str, alt: str) -> Markup:
    """Lines over a common axis; points whose y is NaN are left out.

    Args:
        name: makes the ids unique on the page.
        curves: label -> (x, y).
        xlabel: what x is.
        ylabel: what y is.
        tint: the colour of a single curve; several have colours of their own.
        alt: what a screen reader says.
    """
    figure, axes = _axes(xlabel, ylabel)
    draw_curves(axes, curves, tint=tint, markers=8, markersize=4, linewidth=1.5, fontsize=9)
    return _svg(figure, name, alt)


def frontier_svg(
    name: str, sweeps: Mapping[str, Sequence[tuple[float, float, float]]], points: Points, alt: str
) -> Markup:
    """FD against entropy: temperature sweeps as curves, other generators and checkpoints as points.

    Args:
        name: makes the ids unique on the page.
        sweeps: label -> (temperature, entropy, FD).
        points: label -> (entropy, FD) of each checkpoint, in order.
        alt: what a screen reader says.
    """
    figure, axes = _axes("entropy (nats per code)", "FD (lower is better)", (4.8, 4.2))
    for number, (label, sweep) in enumerate(sweeps.items()):
        ordered = sorted((entropy, fd, temperature) for temperature, entropy, fd in sweep)
        tint, marker = colour(label), MARKERS[number % len(MARKERS)]
        axes.plot([e for e, _, _ in ordered], [f for _, f, _ in ordered], color=tint, marker=marker, label=label)
        for entropy, fd, temperature in ordered:
            place = (entropy, fd)
            axes.annotate(
                f"T={temperature:.2f}", place, xytext=(0, -13), textcoords="offset points", fontsize=8, ha="center"
            )
    for number, (label, measured) in enumerate(points.items(), start=len(sweeps)):
        several = len(measured) > 1
        axes.plot(
            [entropy for entropy, _ in measured],
            [fd for _, fd in measured],
            label=label,
            color=colour(label, list(points)),
            marker=MARKERS[number % len(MARKERS)],
            markersize=7,
            linestyle=":" if several else "none",
            linewidth=1,
            markeredgecolor="#ffffff",
        )
        for order, position in enumerate(measured if several else (), start=1):
            axes.annotate(str(order), position, xytext=(-9, 5), textcoords="offset points", fontsize=8)
    axes.margins(0.1, 0.14)
    axes.legend(frameon=False, fontsize=9)
    return _svg(figure, name, alt)


def _axes(xlabel: str, ylabel: str, size: tuple[float, float] = (4.8, 3.2)) -> tuple[Figure, Axes]:
    """A plot without a title: the page has the caption."""
    figure = Figure(figsize=size, facecolor="none", layout="constrained")
    axes = figure.add_subplot(facecolor="none")
    axes.set_xlabel(xlabel, fontsize=10)
    axes.set_ylabel(ylabel, fontsize=10)
    axes.tick_params(labelsize=9)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Figure, name: str, alt: str) -> Markup:
    """The figure as an element of the page; equal figures are equal text."""
    show_as_written(figure)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return inline_svg(file.getvalue(), alt, name)
