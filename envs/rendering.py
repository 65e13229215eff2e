"""Pictures and text of episodes, finished or not."""

from __future__ import annotations

import numpy as np
import torch

from ral_gym.codes import CodeGrid
from ral_gym.envs.worlds import World

RENDER_MODES = ("rgb_array", "ansi")
RENDER_FPS = 8
GREY = 128
MINIMUM_SIZE = 256
"""Smaller images are enlarged by a whole factor, so that their cells can be seen."""


def check_render_mode(render_mode: str | None) -> None:
    """Raise `ValueError` for a render mode that does not exist."""
    if render_mode is not None and render_mode not in RENDER_MODES:
        raise ValueError(f"render_mode {render_mode!r} is unknown: choose from {', '.join(RENDER_MODES)}, or None")


def render_codes(world: World, codes: np.ndarray) -> np.ndarray:
    """The images so far: drawn codes decoded in one batch, every other cell grey.

    Args:
        world: decodes.
        codes: (E, T) with the tokens K and K + 1.

    Returns:
        (E, side, side, 3) uint8, at least 256 pixels a side.
    """
    grid = world.grid
    drawn = torch.from_numpy(codes < grid.codebook_size)  # (E, T)
    images = world.decode(torch.from_numpy(codes).long().where(drawn, 0).to(world.device)).cpu()  # (E, C, S, S)
    scale = images.shape[-1] // grid.width
    mask = drawn.reshape(-1, 1, grid.height, grid.width).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    pixels = torch.where(mask, images, GREY).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)  # (E, S, S, 3)
    factor = max(1, -(-MINIMUM_SIZE // images.shape[-1]))
    return pixels.numpy().repeat(factor, 1).repeat(factor, 2)


def render_text(grid: CodeGrid, codes: np.ndarray) -> list[str]:
    """The codes (E, T) as tables: ``.`` not drawn yet, ``x`` not drawn in this episode."""
    width = len(str(grid.codebook_size - 1))
    marks = {grid.not_drawn: ".", grid.never_drawn: "x"}
    texts = []
    for row in codes.tolist():
        cells = [marks.get(code, str(code)).rjust(width) for code in row]
        lines = [" ".join(cells[i : i + grid.width]) for i in range(0, len(cells), grid.width)]
        texts.append("\n".join(lines) + "\n")
    return texts
