"""The shape of an image's codes.

Terms used everywhere: an image is a grid of H rows and W columns of codes, T = H * W of them in raster order (left to
right, then top to bottom), each one of K. With two levels (VQ-VAE-2) H and W are the top grid's; the bottom grid has 2H
rows and 2W columns of the same K codes, and the image is one sequence: the top codes in raster order, then the bottom
codes in raster order, T = 5 * H * W. Stored codes are int16 arrays (N, T).

An image's first r rows, counted in rows of the top grid, are a sequence of their own: r * W top codes, then the 2r * 2W
bottom codes under them. Everything that takes codes accepts such short sequences.

Two more tokens appear in observations only: K, "not drawn yet", and K + 1, "will not be drawn in this episode".

With N classes a sequence has one more entry, always given: the label, at the end, as K + 2 + class. K + 2 + N is "no
class", for networks and samplers; it is never in an observation. A sequence of r rows is then `codes_of(r)` codes and
the label. Code files keep codes and labels apart; a tokenizer's grid has no classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ral_gym.errors import ConfigError

MOST_ENTRY = 32_767
"""The largest entry of a stored sequence: int16."""
Codes = TypeVar("Codes", np.ndarray, Tensor)
Position = TypeVar("Position", int, np.ndarray, Tensor)


@dataclass(frozen=True)
class CodeGrid:
    """The shape of one image's codes.

    Attributes:
        height: rows H of the (top) grid.
        width: columns W of the (top) grid.
        codebook_size: K.
        levels: 1, or 2: a bottom grid of 2H x 2W codes follows the top one.
        classes: N, how many classes an image's label may name; 0: images have no labels.
    """

    height: int
    width: int
    codebook_size: int
    levels: int = 1
    classes: int = 0

    def __post_init__(self) -> None:
        if self.levels not in (1, 2):
            raise ConfigError(f"a code grid of {self.levels} levels: give 1 or 2")
        if self.classes < 0:
            raise ConfigError(f"a code grid of {self.classes} classes: give 0 (no labels) or more")
        if self.largest_entry > MOST_ENTRY:
            raise ConfigError(
                f"{self.codebook_size} codes and {self.classes} classes need entries up to {self.largest_entry}, but "
                f"sequences are int16: at most {MOST_ENTRY}"
            )

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of every level, top first: ((H, W),) or ((H, W), (2H, 2W))."""
        return tuple((self.height * 2**level, self.width * 2**level) for level in range(self.levels))

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """How many codes each level has, top first: (H * W,) or (H * W, 4 * H * W)."""
        return tuple(height * width for height, width in self.shapes)

    @property
    def n_codes(self) -> int:
        """T: H * W, or 5 * H * W with two levels."""
        return sum(self.level_sizes)

    @property
    def not_drawn(self) -> int:
        """Token of a code that will be drawn later in the episode: K."""
        return self.codebook_size

    @property
    def never_drawn(self) -> int:
        """Token of a code that this episode does not draw: K + 1."""
        return self.codebook_size + 1

    @property
    def length(self) -> int:
        """Entries of a sequence: T, or T + 1 with classes."""
        return self.n_codes + (self.classes > 0)

    @property
    def first_label(self) -> int:
        """The entry that stands for class 0: K + 2."""
        return self.codebook_size + 2

    @property
    def no_class(self) -> int:
        """The entry that stands for "no class": K + 2 + N."""
        return self.first_label + self.classes

    @property
    def largest_entry(self) -> int:
        """The largest entry that an observation may have: K + 1, or K + 1 + N with classes."""
        return self.never_drawn + self.classes

    def with_labels(self, codes: Codes, labels: Codes) -> Codes:
        """Sequences (..., T' + 1) of codes (..., T') and classes (...) in 0..N, where N is "no class".

        Raises:
            ConfigError: the grid has no classes, or a label is out of range.
        """
        if not self.classes:
            raise ConfigError("labels for a code grid without classes: leave them out")
        if labels.shape[0] and not 0 <= int(labels.min()) <= int(labels.max()) <= self.classes:
            raise ConfigError(
                f"labels lie in {int(labels.min())}..{int(labels.max())}: the {self.classes} classes are "
                f"0..{self.classes - 1}"
            )
        last: Any = labels[..., None] + self.first_label
        if isinstance(codes, Tensor):
            return torch.cat([codes, last.to(codes)], -1)
        return np.concatenate([codes, last.astype(codes.dtype)], -1)

    def labels_of(self, sequence: Codes) -> Codes | None:
        """The classes (...) of sequences (..., T' + 1), N for "no class"; None without classes."""
        labels: Any = sequence[..., -1] - self.first_label if self.classes else None
        return labels

    def without_labels(self, sequence: Codes) -> Codes:
        """The codes (..., T') of sequences (..., T' + 1), a view; without classes the sequences themselves."""
        return sequence[..., :-1] if self.classes else sequence

    def codes_of(self, rows: int) -> int:
        """How many codes an image of `rows` (top) rows has; `codes_of(H)` is T."""
        return rows * self.n_codes // self.height

    def rows_of(self, n_codes: int) -> int:
        """How many (top) rows a sequence of `n_codes` codes has: the inverse of `codes_of`.

        Raises:
            ConfigError: not a whole number of rows, or not 1..H of them.
        """
        rows, rest = divmod(n_codes, self.codes_of(1))
        if rest or not 1 <= rows <= self.height:
            kind = f"two levels of {self.level_sizes[0]} + {self.level_sizes[1]}" if self.levels == 2 else "one level"
            raise ConfigError(
                f"{n_codes} codes per image do not fit {kind}: give a multiple of the {self.codes_of(1)} codes of a "
                f"row, at most {self.n_codes}"
            )
        return rows

    def mask(self, prefix_rows: int, stop_rows: int) -> np.ndarray:
        """Which codes an episode draws if rows 0..prefix_rows-1 are given and it stops before row `stop_rows`.

        Args:
            prefix_rows: (top) rows that are given, 0..stop_rows.
            stop_rows: (top) rows that the image will have, 0..H.

        Returns:
            (`length`,) bool: True in the rows prefix_rows..stop_rows-1, and in the bottom rows that lie under them;
            False at the label.
        """
        drawn = [np.zeros(shape, bool) for shape in self.shapes]
        for level, rows in enumerate(drawn):
            rows[prefix_rows * 2**level : stop_rows * 2**level] = True
        parts = [rows.reshape(-1) for rows in drawn]
        return np.concatenate([*parts, np.zeros(self.length - self.n_codes, bool)])  # (length,)

    def split(self, codes: Codes) -> list[Codes]:
        """Split a sequence of r rows into every level's codes, top first: (..., r*W) and (..., 4*r*W), no label.

        Raises:
            ConfigError: the length is not that of 1..H rows.
        """
        codes = self.without_labels(codes)
        rows = self.rows_of(codes.shape[-1])
        if self.levels == 1:
            return [codes]
        n_top = rows * self.width
        return [codes[..., :n_top], codes[..., n_top:]]

    def crop(self, codes: Codes, rows: int) -> Codes:
        """The sequence of an image's first `rows` (top) rows.

        Args:
            codes: (..., `length`), or a sequence of at least `rows` rows; array or tensor.
            rows: how many to keep, 1..H.

        Returns:
            (..., codes_of(rows)) of the same kind, and the label behind them with classes; else, with one level, a
            view.
        """
        kept = [level[..., : rows * self.width * 4**number] for number, level in enumerate(self.split(codes))]
        kept += [codes[..., -1:]] * (self.classes > 0)
        if len(kept) == 1:
            return kept[0]
        joined: Any = torch.cat(kept, -1) if isinstance(codes, Tensor) else np.concatenate(kept, -1)
        return joined

    def short_position(self, position: Position, rows: int) -> Position:
        """The position of a code of the whole grid in the sequence of the image's first `rows` (top) rows.

        Args:
            position: 0..T-1, a number, an array or a tensor of any shape; they must lie in those rows.
            rows: (top) rows of the shorter image; a number, or an array or tensor that fits `position`'s.

        Returns:
            Indices of `position`'s kind and shape in 0..codes_of(rows)-1.
        """
        # Only the bottom codes move: fewer top codes come before them. With one level there are none.
        short: Any = position - (position >= self.height * self.width) * ((self.height - rows) * self.width)
        return short
