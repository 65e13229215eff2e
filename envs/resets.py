"""Where an episode starts and stops: partial generation (Section 4.3), and the options of ``reset``.

* full: draw all H rows.
* continue (the paper's mode 1): n rows of a real image's codes are given, the rest is drawn.
* scratch (mode 2): the first n rows are drawn, the other rows never are.
* mixed: continue or scratch, half and half. The paper says "randomly" for the mode and for n: n is uniform here.

A short image must have whole score-map rows, so the rows of a scratch episode are a multiple of `row_multiple` (code
rows per score-map row).

With classes every episode also has a label, see `ral_gym.envs.labels`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from ral_gym.envs.labels import LabelDistribution
from ral_gym.grid import CodeGrid

ResetMode = Literal["full", "continue", "scratch", "mixed"]
RESET_MODES: tuple[str, ...] = get_args(ResetMode)
Options = Mapping[str, Any] | Sequence[Mapping[str, Any] | None]
"""The options of ``reset``: one mapping for all rows, or one per row."""
OPTION_NAMES = ("mode", "prefix_rows", "stop_rows", "codes", "image_index", "label")


@dataclass(frozen=True)
class StartRequest:
    """A checked request of ``reset(options=...)``; None: to be drawn at random.

    Attributes:
        mode: `full`, `continue`, `scratch` or `mixed`, for this one episode.
        prefix_rows: rows given.
        stop_rows: rows of the image; the episode stops after them.
        image_index: which real image the given rows come from.
        codes: (L,) int16, the first observation itself; its label is not read.
        label: the image's class.
    """

    mode: str | None = None
    prefix_rows: int | None = None
    stop_rows: int | None = None
    image_index: int | None = None
    codes: np.ndarray | None = None
    label: int | None = None

    @property
    def key(self) -> Hashable:
        """A key that is equal for equal requests."""
        codes = None if self.codes is None else self.codes.tobytes()
        return self.mode, self.prefix_rows, self.stop_rows, self.image_index, codes, self.label


class StartDistribution:
    """Draws the starts of episodes in one mode.

    Args:
        grid: the code grid.
        mode: `full`, `continue`, `scratch` or `mixed`.
        n_images: how many real code grids there are; 0: `continue` is impossible.
        row_multiple: rows of a scratch episode are a multiple of this; divides H.
        paired: for `mixed`, draw complementary pairs: continue after n rows, then n rows from scratch, T codes in
            all, so that two episodes in a row always fill ``n_steps = T``.
        labels: the classes; None: there are none.

    Raises:
        ValueError: an unknown mode, no real codes to continue, or a grid too small for partial generation.
    """

    def __init__(
        self,
        grid: CodeGrid,
        mode: str = "full",
        *,
        n_images: int = 0,
        row_multiple: int = 1,
        paired: bool = False,
        labels: LabelDistribution | None = None,
    ) -> None:
        if row_multiple < 1 or grid.height % row_multiple:
            raise ValueError(f"row_multiple {row_multiple} must divide the {grid.height} rows of the code grid")
        self.grid, self.mode, self.n_images = grid, mode, n_images
        self.row_multiple, self.paired = row_multiple, paired and mode == "mixed"
        self.labels = LabelDistribution(grid, None) if labels is None else labels
        self.check_mode(mode, "reset_mode")

    def check_mode(self, mode: str, name: str) -> None:
        """Raise `ValueError` for a mode that is unknown or impossible here; `name` is its name in messages."""
        if mode not in RESET_MODES:
            raise ValueError(f"{name}={mode!r} is unknown: choose one of {', '.join(RESET_MODES)}")
        if mode not in ("continue", "mixed"):
            return
        if self.n_images == 0:
            raise ValueError(f"{name}={mode!r} continues real images, but this environment has no real codes")
        if self.grid.height < 2:
            raise ValueError(f"{name}={mode!r} needs at least 2 rows of codes, the grid has {self.grid.height}")

    def draw(self, rng: np.random.Generator, pending: int = 0, mode: str | None = None) -> tuple[int, int, int]:
        """One start.

        Args:
            rng: the row's random generator.
            pending: rows of the scratch episode that completes a pair; 0: no pair is open.
            mode: another mode for this draw only.

        Returns:
            ``(prefix_rows, stop_rows, pending)``; pass the last to the next draw.
        """
        height = self.grid.height
        mode = self.mode if mode is None else mode
        if mode == "mixed" and self.paired:
            return self._draw_of_pair(rng, pending)
        if mode == "mixed":
            mode = "continue" if rng.random() < 0.5 else "scratch"
        if mode == "continue":
            return int(rng.integers(1, height)), height, 0
        if mode == "scratch" and self._scratch_choices > 0:
            return 0, self._scratch_rows(rng), 0
        return 0, height, 0

    def _draw_of_pair(self, rng: np.random.Generator, pending: int) -> tuple[int, int, int]:
        height = self.grid.height
        if pending:
            return 0, pending, 0
        if self._scratch_choices == 0:  # no partial image is possible: only a whole image has T codes
            return 0, height, 0
        rows = self._scratch_rows(rng)
        return rows, height, rows

    def draw_requested(self, request: StartRequest, rng: np.random.Generator, pending: int) -> tuple[int, int, int]:
        """Like `draw`, with the rows that a request fixes."""
        if request.prefix_rows is None and request.stop_rows is None:
            return self.draw(rng, pending, request.mode)
        stop = self.grid.height if request.stop_rows is None else request.stop_rows
        return request.prefix_rows or 0, stop, 0

    @property
    def _scratch_choices(self) -> int:
        """Number of possible row counts below H of a scratch episode; 0: it is always a full one."""
        return self.grid.height // self.row_multiple - 1

    def _scratch_rows(self, rng: np.random.Generator) -> int:
        return self.row_multiple * int(rng.integers(1, self._scratch_choices + 1))

    def draw_image(self, rng: np.random.Generator, label: int | None = None) -> int:
        """A row of the real codes, uniformly; only among those of a class if there is a `label`."""
        return int(rng.integers(self.n_images)) if label is None else self.labels.draw_image(rng, label)

    def check_label(self, request: StartRequest) -> None:
        """Raise `ValueError` if an episode with this label may have to continue an image, and the class has none."""
        if request.label is None or request.image_index is not None or request.codes is not None:
            return
        rows_given = (request.prefix_rows, request.stop_rows) != (None, None)
        mode = self.mode if request.mode is None else request.mode
        continues = bool(request.prefix_rows) if rows_given else mode in ("continue", "mixed")
        if continues and not self.labels.count(request.label):
            raise ValueError(
                f"option label={self.labels.name(request.label)}: no real image of this class to continue; choose "
                "another one, or mode='full'"
            )


def parse_requests(options: Options | None, n: int, distribution: StartDistribution) -> list[StartRequest]:
    """`parse_options` for n rows; one mapping gives all of them the same request object.

    Raises:
        ValueError: neither a mapping nor one for each row, or see `parse_options`.
    """
    if options is None or isinstance(options, Mapping):
        return [parse_options(options or {}, distribution)] * n
    if isinstance(options, str | bytes) or not isinstance(options, Sequence):
        raise ValueError(f"options are {options!r}: give a mapping such as {{'prefix_rows': 2}}")
    if len(options) != n:
        raise ValueError(f"options for {len(options)} environments: give one mapping, or a list of {n}")
    wrong = [one for one in options if not (one is None or isinstance(one, Mapping))]
    if wrong:
        raise ValueError(f"options of one environment are {wrong[0]!r}: give a mapping or None for each")
    return [parse_options(one or {}, distribution) for one in options]


def parse_options(options: Mapping[str, Any], distribution: StartDistribution) -> StartRequest:
    """Check ``reset(options=...)``; draws nothing.

    Args:
        options: `mode`, `prefix_rows` (0..H-1), `stop_rows` (a multiple of `row_multiple` in 1..H, above
            `prefix_rows`), `codes` (a grid to continue, (H, W), some whole rows of it (r, W), or a prefix (n,); the
            codes before its first K or K + 1 are given; with two levels a prefix of the sequence), `image_index` (which
            real image the prefix comes from; alone, it means `mode` "continue"), `label` (the image's class, a number
            or a name; images to continue are then drawn among its own, unless `image_index` or `codes` is given).
            None means that an option is not given.
        distribution: the environment's own.

    Raises:
        ValueError: an unknown name, a value out of range, or options that contradict each other.
    """
    grid = distribution.grid
    unknown = [name for name in options if name not in OPTION_NAMES]
    if unknown:
        raise ValueError(f"reset option {unknown[0]!r} is unknown: choose from {', '.join(OPTION_NAMES)}")
    label = options.get("label")
    number = None if label is None else distribution.labels.number(label)
    request = _parse_start(options, distribution)
    own = _label_in_codes(options.get("codes"), grid)
    if None not in (own, number) and own != number:
        raise ValueError(f"option label={label!r} differs from the label {own} at the end of option codes: give one")
    request = replace(request, label=own if number is None else number)
    distribution.check_label(request)
    return request


def _parse_start(options: Mapping[str, Any], distribution: StartDistribution) -> StartRequest:
    """The request without its label."""
    grid = distribution.grid
    mode, image = options.get("mode"), options.get("image_index")
    if mode is not None:
        distribution.check_mode(mode, "option mode")
    prefix = _integer(options, "prefix_rows", 0, grid.height - 1)
    stop = _integer(options, "stop_rows", 1, grid.height)
    if stop is not None and stop % distribution.row_multiple:
        raise ValueError(
            f"option stop_rows={stop} would give the critic a broken score-map row: choose a multiple of "
            f"{distribution.row_multiple} up to {grid.height}"
        )
    if options.get("codes") is not None:
        if mode is not None or image is not None:
            raise ValueError("option codes gives the prefix itself: leave mode and image_index out")
        return _from_codes(options["codes"], prefix, grid.height if stop is None else stop, grid)
    if prefix is not None and stop is not None and prefix >= stop:
        raise ValueError(f"option prefix_rows={prefix} leaves nothing to draw before stop_rows={stop}: give fewer rows")
    if (mode in ("full", "mixed") and (prefix, stop) != (None, None)) or (mode == "scratch" and prefix):
        raise ValueError(f"option mode={mode!r} contradicts prefix_rows or stop_rows: give the mode or the rows")
    if mode == "continue" and prefix is None and stop is not None:
        raise ValueError("option mode='continue' with stop_rows needs prefix_rows too: give it, or leave stop_rows out")
    if (prefix or image is not None) and distribution.n_images == 0:
        raise ValueError(
            "options prefix_rows and image_index continue a real image, but this environment has no real "
            "codes: give option codes"
        )
    image = _integer(options, "image_index", 0, distribution.n_images - 1)
    if image is not None and prefix is None:
        if mode in ("full", "scratch") or stop is not None:
            raise ValueError(f"option image_index={image} needs rows to continue: give prefix_rows, or mode='continue'")
        mode = mode or "continue"
        distribution.check_mode(mode, "option mode")
    return StartRequest(mode, prefix, stop, image)


def _from_codes(given: Any, prefix_rows: int | None, stop_rows: int, grid: CodeGrid) -> StartRequest:
    """A start from a given grid: its codes up to `prefix_rows`, or up to the first one that is not drawn."""
    codes = np.asarray(given)
    if _label_in_codes(codes, grid) is not None:
        codes = codes[:-1]
    whole_rows = grid.levels == 1 and codes.ndim == 2 and codes.shape[1] == grid.width and codes.shape[0] <= grid.height
    if not (whole_rows or (codes.ndim == 1 and codes.size <= grid.n_codes)):
        grids = f"{(grid.height, grid.width)}, fewer rows of {grid.width}, or " if grid.levels == 1 else ""
        order = "raster order" if grid.levels == 1 else "drawing order, the top codes first"
        raise ValueError(f"option codes has shape {codes.shape}: give {grids}up to {grid.n_codes} codes in {order}")
    if codes.size and codes.dtype.kind not in "iu":
        raise ValueError(f"option codes has dtype {codes.dtype}: give integers")
    codes = codes.reshape(-1)
    if codes.size and (codes.min() < 0 or codes.max() > grid.never_drawn):
        raise ValueError(
            f"option codes lies in {codes.min()}..{codes.max()}: codes are 0..{grid.codebook_size - 1}, "
            f"{grid.not_drawn} means not drawn yet"
        )
    drawn = codes < grid.codebook_size
    length = codes.size if drawn.all() else int(np.argmin(drawn))
    given = np.arange(grid.length) < length  # (L,)
    if prefix_rows is not None:
        given = grid.mask(0, prefix_rows)
        if not np.pad(drawn, (0, grid.length - codes.size))[given].all():
            raise ValueError(
                f"option prefix_rows={prefix_rows} needs {int(given.sum())} codes, but codes gives {length}"
            )
    image = grid.mask(0, stop_rows)  # (L,)
    if not (image & ~given).any():
        raise ValueError(
            f"option codes gives {length} codes and nothing is left to draw: give fewer than {stop_rows * grid.width}, "
            "or prefix_rows"
        )
    start = np.where(image, grid.not_drawn, grid.never_drawn).astype(np.int16)
    start[given & image] = codes[: grid.n_codes][np.flatnonzero(given & image)]
    return StartRequest(stop_rows=stop_rows, codes=start)


def _label_in_codes(codes: Any, grid: CodeGrid) -> int | None:
    """The class in a whole observation that is given as option `codes`, or None."""
    if not grid.classes or codes is None:
        return None
    array = np.asarray(codes)
    if array.shape != (grid.length,) or array.dtype.kind not in "iu":
        return None
    label = int(array[-1]) - grid.first_label
    return label if 0 <= label < grid.classes else None


def _integer(options: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    """The option as an int in low..high, or None if it is not given."""
    value = options.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"option {name}={value!r} must be an integer in {low}..{high}")
    if not low <= value <= high:
        raise ValueError(f"option {name}={value} is out of range: choose {low}..{high}")
    return int(value)
