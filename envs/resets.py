"""Where an episode starts and stops: partial generation (Section 4.3), and the options of ``reset``.

* full: draw all H rows.
* continue (the paper's mode 1): n rows of a real image's codes are given, the rest is drawn.
* scratch (mode 2): the first n rows are drawn, the rest never is.
* mixed: continue or scratch, half and half. The paper says "randomly" for the mode and for n: n is uniform here.

A short image must give the critic whole score-map rows, so the rows of a scratch episode come in multiples of
`row_multiple` (code rows per score-map row).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from ral_gym.codes import CodeGrid

ResetMode = Literal["full", "continue", "scratch", "mixed"]
RESET_MODES: tuple[str, ...] = get_args(ResetMode)
OPTION_NAMES = ("mode", "prefix_rows", "stop_rows", "codes", "image_index")


@dataclass(frozen=True)
class Start:
    """One episode's start.

    Attributes:
        position: first position to draw, 0..T-1.
        stop: one past the last position to draw, a multiple of W.
        image_index: row of the real codes the prefix comes from; -1: no real prefix.
        codes: the prefix itself where `reset` was given one, (T,) or shorter; None: take it from the real codes.
    """

    position: int
    stop: int
    image_index: int = -1
    codes: np.ndarray | None = None


class StartDistribution:
    """Draws starts for one mode.

    Args:
        grid: the code grid.
        mode: `full`, `continue`, `scratch` or `mixed`.
        n_images: how many real code grids there are; 0: `continue` is impossible.
        row_multiple: rows of a scratch episode are a multiple of this; divides H.
        paired: for `mixed`, draw complementary pairs: continue after n rows, then n rows from scratch, T codes in
            all, so that two episodes in a row always fill ``n_steps = T``.

    Raises:
        ValueError: an unknown mode, no real codes to continue, or a grid too small for partial generation.
    """

    def __init__(
        self, grid: CodeGrid, mode: str = "full", *, n_images: int = 0, row_multiple: int = 1, paired: bool = False
    ) -> None:
        if mode not in RESET_MODES:
            raise ValueError(f"reset_mode {mode!r} is unknown: choose one of {', '.join(RESET_MODES)}")
        if mode in ("continue", "mixed") and n_images == 0:
            raise ValueError(f"reset_mode {mode!r} continues real images, but there are no real codes: give some")
        if grid.height % row_multiple:
            raise ValueError(f"row_multiple {row_multiple} must divide the {grid.height} rows of the code grid")
        if mode in ("continue", "mixed") and grid.height < 2:
            raise ValueError(f"reset_mode {mode!r} needs at least 2 rows of codes, the grid has {grid.height}")
        self.grid, self.mode, self.n_images = grid, mode, n_images
        self.row_multiple, self.paired = row_multiple, paired

    def draw(self, rng: np.random.Generator, pending: int = 0, mode: str | None = None) -> tuple[int, int, int]:
        """One start.

        Args:
            rng: the row's random generator.
            pending: rows of the scratch episode that completes a pair; 0: no pair is open.
            mode: another mode for this one draw.

        Returns:
            ``(prefix_rows, stop_rows, pending)``; the last is to be handed to the next draw.
        """
        height = self.grid.height
        mode = self.mode if mode is None else mode
        if mode == "mixed" and pending:
            return 0, pending, 0
        if mode == "mixed":
            continues = self.paired or rng.random() < 0.5
            mode = "continue" if continues else "scratch"
            if self.paired and self._scratch_choices > 0:
                n = self._scratch_rows(rng)
                return n, height, n
        if mode == "continue":
            return int(rng.integers(1, height)), height, 0
        if mode == "scratch" and self._scratch_choices > 0:
            return 0, self._scratch_rows(rng), 0
        return 0, height, 0

    @property
    def _scratch_choices(self) -> int:
        """How many row counts below H a scratch episode may have; 0: it is a full one."""
        return self.grid.height // self.row_multiple - 1

    def _scratch_rows(self, rng: np.random.Generator) -> int:
        return self.row_multiple * int(rng.integers(1, self._scratch_choices + 1))

    def draw_image(self, rng: np.random.Generator) -> int:
        """A row of the real codes, uniformly."""
        return int(rng.integers(self.n_images))


def start_from_options(
    options: Mapping[str, Any],
    distribution: StartDistribution,
    rng: np.random.Generator,
    pending: int,
) -> tuple[Start, int]:
    """Check ``reset(options=...)`` and turn it into a start; what the options leave open is drawn.

    Args:
        options: `mode`, `prefix_rows` (0..H-1), `stop_rows` (a multiple of `row_multiple` in 1..H, above
            `prefix_rows`), `codes` (a grid to continue: (H, W), (T,) or a shorter prefix; K marks "not drawn"),
            `image_index` (which real image the prefix comes from).
        distribution: the environment's own.
        rng: the row's random generator.
        pending: see `StartDistribution.draw`.

    Returns:
        the start, and the new `pending`.

    Raises:
        ValueError: an unknown name or a value outside what is allowed; says both.
    """
    grid = distribution.grid
    unknown = sorted(set(options) - set(OPTION_NAMES))
    if unknown:
        raise ValueError(f"reset option {unknown[0]!r} is unknown: choose from {', '.join(OPTION_NAMES)}")
    mode = options.get("mode")
    if mode is not None and mode not in RESET_MODES:
        raise ValueError(f"option mode={mode!r} is unknown: choose one of {', '.join(RESET_MODES)}")
    if "codes" in options:
        return _start_from_codes(options, distribution), pending
    prefix = _integer(options, "prefix_rows", 0, grid.height - 1)
    stop = _integer(options, "stop_rows", 1, grid.height)
    image = _integer(options, "image_index", 0, distribution.n_images - 1)
    if (mode in ("full", "mixed") and (prefix, stop) != (None, None)) or (mode == "scratch" and prefix):
        raise ValueError(f"option mode={mode!r} contradicts prefix_rows or stop_rows: give the mode or the rows")
    if mode == "continue" and prefix is None and stop is not None:
        raise ValueError("option mode='continue' with stop_rows needs prefix_rows too: give it, or leave stop_rows out")
    needs_image = bool(prefix) or image is not None or mode in ("continue", "mixed")
    if needs_image and distribution.n_images == 0:
        raise ValueError("these options continue a real image, but this environment has no real codes: pass `codes`")
    if prefix is None and stop is None:
        if mode is None and image is not None and distribution.mode == "full":
            mode = "continue"
        prefix, stop, pending = distribution.draw(rng, pending, mode)
    prefix = prefix or 0
    stop = grid.height if stop is None else stop
    _check_rows(prefix, stop, distribution)
    if prefix and image is None:
        image = distribution.draw_image(rng)
    return Start(prefix * grid.width, stop * grid.width, -1 if image is None or not prefix else image), pending


def _start_from_codes(options: Mapping[str, Any], distribution: StartDistribution) -> Start:
    """A start from a given grid: its codes up to `prefix_rows`, or up to the first one that is not drawn."""
    grid = distribution.grid
    if options.get("image_index") is not None or options.get("mode") is not None:
        raise ValueError("option codes gives the prefix itself: leave image_index and mode out")
    try:
        codes = np.asarray(options["codes"]).astype(np.int64, casting="same_kind").reshape(-1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"option codes must be an integer array: {error}") from error
    if codes.size > grid.n_codes:
        raise ValueError(f"option codes has {codes.size} entries: at most {grid.n_codes} ({grid.height}x{grid.width})")
    if codes.size and (codes.min() < 0 or codes.max() > grid.never_drawn):
        raise ValueError(
            f"option codes lies in {codes.min()}..{codes.max()}: codes are 0..{grid.codebook_size - 1}, "
            f"{grid.not_drawn} means not drawn yet"
        )
    drawn = codes < grid.codebook_size
    length = codes.size if drawn.all() else int(np.argmin(drawn))
    prefix = _integer(options, "prefix_rows", 0, grid.height - 1)
    if prefix is not None:
        if prefix * grid.width > length:
            raise ValueError(f"option prefix_rows={prefix} needs {prefix * grid.width} codes, but codes gives {length}")
        length = prefix * grid.width
    stop_rows = _integer(options, "stop_rows", 1, grid.height)
    stop_rows = grid.height if stop_rows is None else stop_rows
    _check_rows(-(-(length + 1) // grid.width) - 1, stop_rows, distribution)
    if length >= stop_rows * grid.width:
        raise ValueError(
            f"option codes gives {length} codes and nothing is left to draw: give fewer than "
            f"{stop_rows * grid.width}, or prefix_rows"
        )
    return Start(length, stop_rows * grid.width, -1, codes[:length])


def _check_rows(prefix: int, stop: int, distribution: StartDistribution) -> None:
    height, multiple = distribution.grid.height, distribution.row_multiple
    if prefix >= stop:
        raise ValueError(f"prefix_rows={prefix} leaves nothing to draw before stop_rows={stop}: it must be smaller")
    if stop % multiple:
        raise ValueError(
            f"stop_rows={stop} would give the critic a broken score-map row: choose a multiple of {multiple} up to "
            f"{height}"
        )


def _integer(options: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    """The option as an int inside low..high, or None where it is not given."""
    value = options.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"option {name}={value!r} must be an integer in {low}..{high}")
    if not low <= value <= high:
        raise ValueError(f"option {name}={value} is out of range: choose {low}..{high}")
    return int(value)
