"""Pictures in a terminal: two pixels per character, in 24-bit colour, or in grey where a terminal has no colours."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from typing import Any, TextIO

import numpy as np

UPPER_HALF = "\N{UPPER HALF BLOCK}"
GREYS = " .:-=+*#%@"
"""From black to white, for terminals without colours and for files."""
RESET = "\x1b[0m"


class Screen:
    """Where pictures are shown as text.

    Args:
        stream: a terminal, or a file, which gets the last picture of an episode only.
        environment: its variables: `COLORTERM` (`truecolor` or `24bit`), `TERM` and `NO_COLOR` decide on colours.
    """

    def __init__(self, stream: TextIO, environment: Mapping[str, str]) -> None:
        self.stream, self.live = stream, stream.isatty()
        deep = environment.get("COLORTERM", "") in ("truecolor", "24bit") or "direct" in environment.get("TERM", "")
        dumb = environment.get("TERM", "dumb") == "dumb" or "NO_COLOR" in environment
        self.colours = self.live and deep and not dumb
        self.moves = self.live and environment.get("TERM", "dumb") != "dumb"
        encoding = (getattr(stream, "encoding", None) or "ascii").lower().replace("-", "")
        self.colours = self.colours and encoding.startswith("utf")

    def play(self, frames: np.ndarray, pause: float) -> None:
        """Show frames (F, S, S, 3) uint8 in one place, `pause` seconds each; without a terminal only the last."""
        if not self.moves:
            self._write(self.text(frames[-1]) + "\n")
            return
        for number, frame in enumerate(frames):
            text = self.text(frame)
            up = f"\x1b[{text.count(chr(10)) + 1}A" if number else ""
            self._write(f"{up}{text}\n")
            time.sleep(pause)

    def text(self, frame: np.ndarray) -> str:
        """A picture (S, S, 3) uint8 as lines that fit the terminal."""
        size = shutil.get_terminal_size((80, 24))
        side = max(8, min(size.columns, 2 * (size.lines - 3), 64))
        small = shrunk(frame, side // 2 * 2)
        return half_blocks(small) if self.colours else grey_text(small)

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


def shrunk(frame: np.ndarray, side: int) -> np.ndarray:
    """A picture (S, S, 3) uint8 as (side, side, 3), each pixel the mean of those that it covers."""
    whole = len(frame)
    edges = np.linspace(0, whole, side + 1).round().astype(int)
    starts, ends = np.minimum(edges[:-1], whole - 1), np.maximum(edges[1:], edges[:-1] + 1)
    sums = np.zeros((whole + 1, whole + 1, 3))
    sums[1:, 1:] = frame.astype(float).cumsum(0).cumsum(1)
    total = sums[ends][:, ends] - sums[starts][:, ends] - sums[ends][:, starts] + sums[starts][:, starts]
    area = (ends - starts)[:, None, None] * (ends - starts)[None, :, None]
    return np.asarray((total / area).round().clip(0, 255), np.uint8)


def half_blocks(picture: np.ndarray) -> str:
    """A picture (H, W, 3) uint8, H even, as H / 2 lines: upper pixels in the letters' colours, lower ones behind."""
    lines = []
    for above, below in zip(picture[::2], picture[1::2], strict=True):
        cells = [
            f"\x1b[38;2;{_rgb(upper)};48;2;{_rgb(lower)}m{UPPER_HALF}"
            for upper, lower in zip(above, below, strict=True)
        ]
        lines.append("".join(cells) + RESET)
    return "\n".join(lines)


def grey_text(picture: np.ndarray) -> str:
    """A picture (H, W, 3) uint8, H even, as H / 2 lines of characters that get denser with brightness."""
    bright = picture.astype(float).mean(-1)
    rows = (bright[::2] + bright[1::2]) / 2
    numbers = (rows / 256 * len(GREYS)).astype(int)
    return "\n".join("".join(GREYS[number] for number in row) for row in numbers)


def _rgb(pixel: Any) -> str:
    return ";".join(str(int(value)) for value in pixel)
