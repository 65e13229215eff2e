"""The shape of an image's codes, and a set of images encoded once: the code file of stage 2 and of partial generation.

Vocabulary used everywhere: an image is a grid of H rows and W columns of codes, T = H * W of them in raster order
(left to right, then top to bottom), each one of K. With two levels (VQ-VAE-2) H and W are the top grid's; the bottom
grid has 2H rows and 2W columns of the same K codes, and the image is one sequence: the top codes in raster order, then
the bottom codes in raster order, T = 5 * H * W. At rest codes are int16 arrays (N, T).

An image's first r rows, counted in rows of the top grid, are a sequence of their own: r * W top codes, then the
2r * 2W bottom codes under them. Everything that takes codes takes such short sequences.

Two more tokens appear in observations only: K, "not drawn yet", and K + 1, "will not be drawn in this episode".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ral_gym.data import ImageSet, augment, to_float, to_uint8
from ral_gym.errors import ConfigError, RunError
from ral_gym.storage import load_tensors, save_tensors

if TYPE_CHECKING:  # its quantiser's library takes seconds to import, which the toy environment has no use for
    from ral_gym.vqvae import VQVAE

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
    """

    height: int
    width: int
    codebook_size: int
    levels: int = 1

    def __post_init__(self) -> None:
        if self.levels not in (1, 2):
            raise ConfigError(f"a code grid of {self.levels} levels: give 1 or 2")

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
        """Which codes an episode draws that is given rows 0..prefix_rows-1 and stops before row `stop_rows`.

        Args:
            prefix_rows: (top) rows that are given, 0..stop_rows.
            stop_rows: (top) rows that the image will have, 0..H.

        Returns:
            (T,) bool: True in the rows prefix_rows..stop_rows-1, and in the bottom rows that lie under them.
        """
        drawn = [np.zeros(shape, bool) for shape in self.shapes]
        for level, rows in enumerate(drawn):
            rows[prefix_rows * 2**level : stop_rows * 2**level] = True
        return np.concatenate([rows.reshape(-1) for rows in drawn])  # (T,)

    def split(self, codes: Codes) -> list[Codes]:
        """Take a sequence apart: (..., codes_of(r)) -> every level's codes, top first: (..., r*W) and (..., 4*r*W).

        Raises:
            ConfigError: the length is not that of 1..H rows.
        """
        rows = self.rows_of(codes.shape[-1])
        if self.levels == 1:
            return [codes]
        n_top = rows * self.width
        return [codes[..., :n_top], codes[..., n_top:]]

    def crop(self, codes: Codes, rows: int) -> Codes:
        """The sequence of an image's first `rows` (top) rows.

        Args:
            codes: (..., T), or a sequence of at least `rows` rows; array or tensor.
            rows: how many to keep, 1..H.

        Returns:
            (..., codes_of(rows)) of the same kind; with one level a view.
        """
        kept = [level[..., : rows * self.width * 4**number] for number, level in enumerate(self.split(codes))]
        if len(kept) == 1:
            return kept[0]
        joined: Any = torch.cat(kept, -1) if isinstance(codes, Tensor) else np.concatenate(kept, -1)
        return joined

    def short_position(self, position: Position, rows: int) -> Position:
        """Where a code of the whole grid stands in the sequence of the image's first `rows` (top) rows.

        Args:
            position: 0..T-1, a number, an array or a tensor of any shape; they must lie in those rows.
            rows: (top) rows of the shorter image; a number, or an array or tensor that fits `position`'s.

        Returns:
            Indices of `position`'s kind and shape in 0..codes_of(rows)-1.
        """
        # Only the bottom codes move: fewer top codes come before them. With one level there are none.
        short: Any = position - (position >= self.height * self.width) * ((self.height - rows) * self.width)
        return short


@dataclass(frozen=True)
class CodeSet:
    """Codes of the training and the held-out images, int16 (N, T) each.

    Attributes:
        train: codes of the training images, all augmented passes.
        test: held-out images (of known people, for faces).
        new_people: held-out people, or None.
        clean: rows of `train` that belong to the images as they are; the first `clean` rows.
    """

    train: np.ndarray
    test: np.ndarray
    new_people: np.ndarray | None
    clean: int

    def save(self, path: Path) -> None:
        """Write atomically as safetensors."""
        tensors = {"train": torch.from_numpy(self.train), "test": torch.from_numpy(self.test)}
        if self.new_people is not None:
            tensors["new_people"] = torch.from_numpy(self.new_people)
        save_tensors(path, tensors, {"clean": self.clean})

    @classmethod
    def load(cls, path: Path, grid: CodeGrid | None = None) -> CodeSet:
        """Read what `save` wrote.

        Args:
            path: the file.
            grid: the shape that the codes must have; None: whatever it is.

        Raises:
            RunError: the file is missing, truncated, not a code file, or does not fit the grid.
        """
        tensors, metadata = load_tensors(path)
        if "train" not in tensors or "test" not in tensors or "clean" not in metadata:
            raise RunError(f"{path} is not a code file (no train and test codes in it); remove it to encode again")
        if grid is not None and not all(_fits(codes, grid) for codes in tensors.values()):
            raise RunError(
                f"{path} belongs to another VQ-VAE: its codes are not {' + '.join(map(str, grid.level_sizes))} per "
                f"image in 0..{grid.codebook_size - 1}; remove it to encode again"
            )
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        return cls(arrays["train"], arrays["test"], arrays.get("new_people"), metadata["clean"])


def _fits(codes: Tensor, grid: CodeGrid) -> bool:
    """Whether codes (N, T) have the grid's T and lie in its codebook."""
    inside = codes.numel() == 0 or 0 <= int(codes.min()) <= int(codes.max()) < grid.codebook_size
    return codes.shape[1:] == (grid.n_codes,) and inside


@torch.no_grad()
def encode_images(
    vqvae: VQVAE,
    images: np.ndarray,
    *,
    passes: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
    label: str = "encode",
) -> np.ndarray:
    """Encode a set of images, the first pass as they are, every further one augmented with its own seed.

    Args:
        vqvae: the trained VQ-VAE, of one level or two.
        images: (N, C, S, S) uint8.
        passes: how often to go through the set.
        seed: seeds the augmentation.
        batch_size: images per step; None: 256, and fewer where they are larger than 64x64 pixels.
        progress: show a progress bar.
        label: its label.

    Returns:
        (passes * N, T) int16.
    """
    device = next(vqvae.parameters()).device
    batch_size = batch_size or _default_batch_size(vqvae)
    codes = np.empty((passes * len(images), vqvae.grid.n_codes), np.int16)
    generator = torch.Generator().manual_seed(seed)
    starts = [(p, i) for p in range(passes) for i in range(0, len(images), batch_size)]
    for number, start in tqdm(starts, desc=label, unit="batch", disable=not progress, leave=False):
        batch = to_float(torch.from_numpy(np.array(images[start : start + batch_size])))  # (B, C, S, S)
        if number:
            batch = augment(batch, generator)
        row = number * len(images) + start
        codes[row : row + len(batch)] = torch.cat(vqvae.encode(batch.to(device)), 1).cpu().numpy()
    return codes


def encode_set(vqvae: VQVAE, images: ImageSet, *, passes: int, seed: int, progress: bool = True) -> CodeSet:
    """Encode the training images (in `passes` passes) and the held-out ones (as they are)."""
    train = encode_images(vqvae, images.train, passes=passes, seed=seed, progress=progress)
    test = encode_images(vqvae, images.test, progress=False)
    new_people = None if images.new_people is None else encode_images(vqvae, images.new_people, progress=False)
    return CodeSet(train, test, new_people, clean=len(images.train))


@torch.no_grad()
def decode_codes(vqvae: VQVAE, codes: np.ndarray | Tensor, batch_size: int | None = None) -> Tensor:
    """Codes (N, codes_of(r)) of r rows -> images (N, C, r * S / H, S) uint8 on the CPU; `batch_size` as above."""
    device = next(vqvae.parameters()).device
    batch_size = batch_size or _default_batch_size(vqvae)
    codes = torch.as_tensor(codes).long()
    batches = [
        to_uint8(vqvae.decode(codes[i : i + batch_size].to(device))).cpu() for i in range(0, len(codes), batch_size)
    ]
    return torch.cat(batches)


def _default_batch_size(vqvae: VQVAE) -> int:
    """At most as many pixels as 256 images of 64x64 have, since activations grow with them."""
    return max(1, min(256, 256 * 64**2 // vqvae.image_size**2))
