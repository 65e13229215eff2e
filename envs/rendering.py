"""Pictures and text of episodes, finished or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ral_gym.envs.worlds import World
from ral_gym.grid import CodeGrid

RENDER_MODES = ("rgb_array", "ansi")
RENDER_FPS = 8
GREY = 128
MINIMUM_SIZE = 256
"""Smaller images are enlarged by a whole factor, so that their cells are visible."""


def check_render_mode(render_mode: str | None) -> None:
    """Raise `ValueError` for a render mode that does not exist."""
    if render_mode is not None and render_mode not in RENDER_MODES:
        raise ValueError(f"render_mode {render_mode!r} is unknown: choose from {', '.join(RENDER_MODES)}, or None")


def render_codes(world: World, codes: np.ndarray) -> np.ndarray:
    """The images so far: drawn codes decoded in one batch, every other cell grey.

    Args:
        world: decodes the codes.
        codes: (E, L) observations, with the tokens K and K + 1.

    Returns:
        (E, side, side, 3) uint8, at least 256 pixels a side.
    """
    grid = world.grid
    codes = grid.without_labels(codes)
    drawn = torch.from_numpy(codes < grid.codebook_size)  # (E, T)
    images = world.decode(torch.from_numpy(codes).long().where(drawn, 0).to(world.device)).cpu()  # (E, C, S, S)
    # With two levels a cell shows its bottom code once it is drawn; before that, the decoding of its top code alone.
    seen = torch.zeros(len(codes), 1, *images.shape[2:], dtype=torch.bool)
    for level, (height, width) in zip(replace(grid, classes=0).split(drawn), grid.shapes, strict=True):
        scale = images.shape[-1] // width
        seen |= level.reshape(-1, 1, height, width).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    pixels = torch.where(seen, images, GREY).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)  # (E, S, S, 3)
    factor = max(1, -(-MINIMUM_SIZE // images.shape[-1]))
    return pixels.numpy().repeat(factor, 1).repeat(factor, 2)


def render_text(grid: CodeGrid, codes: np.ndarray, class_names: Sequence[str] = ()) -> list[str]:
    """The codes (E, L) as tables, one per level: ``.`` not drawn yet, ``x`` not drawn in this episode.

    With classes a last line names the image's: its name, or its number if there are no names.
    """
    digits = len(str(grid.codebook_size - 1))
    marks = {grid.not_drawn: ".", grid.never_drawn: "x"}
    texts = []
    for row in codes:
        tables = []
        for level, (_, width) in zip(grid.split(row), grid.shapes, strict=True):
            cells = [marks.get(code, str(code)).rjust(digits) for code in level.tolist()]
            tables.append("".join(" ".join(cells[i : i + width]) + "\n" for i in range(0, len(cells), width)))
        label = int(row[-1]) - grid.first_label
        ending = f"class: {class_names[label] if class_names else label}\n" if grid.classes else ""
        texts.append("\n".join(tables) + ending)
    return texts
