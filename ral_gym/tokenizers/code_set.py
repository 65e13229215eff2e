"""A set of images encoded once: the code file of stage 2 and of partial generation.

`ral_gym.grid` says what codes are and how they are ordered.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ral_gym.data.images import ImageSet, augment, to_float, to_uint8
from ral_gym.errors import RunError
from ral_gym.grid import CodeGrid
from ral_gym.runs.storage import load_tensors, save_tensors
from ral_gym.tokenizers.base import Tokenizer, device_of


@dataclass(frozen=True)
class CodeSet:
    """Codes of the training and the held-out images, int16 (N, T) each.

    Attributes:
        train: codes of the training images, all augmented passes.
        test: held-out images (of known people, for faces).
        new_people: held-out people, or None.
        clean: how many rows of `train`, the first ones, are codes of the images without augmentation.
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
            grid: the shape that the codes must have; None: any.

        Raises:
            RunError: the file is missing, truncated, not a code file, or does not fit the grid.
        """
        tensors, metadata = load_tensors(path)
        clean = metadata.get("clean")
        if "train" not in tensors or "test" not in tensors or isinstance(clean, bool) or not isinstance(clean, int):
            raise RunError(f"{path} is not a code file (no train and test codes in it); remove it to encode again")
        for name, codes in tensors.items():
            if codes.dtype != torch.int16 or codes.ndim != 2:
                raise RunError(
                    f"{path}: tensor {name} is {str(codes.dtype).removeprefix('torch.')} with {codes.ndim} dimensions, "
                    "codes are int16 (images, codes); remove the file to encode again"
                )
        if not 1 <= clean <= len(tensors["train"]):
            raise RunError(f"{path}: {clean} of {len(tensors['train'])} training rows; remove it to encode again")
        if grid is not None and (misfits := [name for name, codes in tensors.items() if not _fits(codes, grid)]):
            raise RunError(
                f"{path} belongs to another VQ-VAE: its codes (tensor {misfits[0]}) are not "
                f"{' + '.join(map(str, grid.level_sizes))} per image in 0..{grid.codebook_size - 1}; remove it to "
                "encode again"
            )
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        return cls(arrays["train"], arrays["test"], arrays.get("new_people"), clean)


def _fits(codes: Tensor, grid: CodeGrid) -> bool:
    """Whether codes (N, T) have the grid's T and lie in its codebook."""
    inside = codes.numel() == 0 or 0 <= int(codes.min()) <= int(codes.max()) < grid.codebook_size
    return codes.shape[1:] == (grid.n_codes,) and inside


@torch.no_grad()
def encode_images(
    vqvae: Tokenizer,
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
        vqvae: the trained tokenizer, of one level or two.
        images: (N, C, S, S) uint8.
        passes: number of passes over the set.
        seed: seeds the augmentation.
        batch_size: images per step; None: 256, and fewer where they are larger than 64x64 pixels.
        progress: show a progress bar.
        label: its label.

    Returns:
        (passes * N, T) int16.
    """
    device = device_of(vqvae)
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


def encode_set(vqvae: Tokenizer, images: ImageSet, *, passes: int, seed: int, progress: bool = True) -> CodeSet:
    """Encode the training images (in `passes` passes) and the held-out ones (as they are)."""
    train = encode_images(vqvae, images.train, passes=passes, seed=seed, progress=progress)
    test = encode_images(vqvae, images.test, progress=False)
    new_people = None if images.new_people is None else encode_images(vqvae, images.new_people, progress=False)
    return CodeSet(train, test, new_people, clean=len(images.train))


@torch.no_grad()
def decode_codes(vqvae: Tokenizer, codes: np.ndarray | Tensor, batch_size: int | None = None) -> Tensor:
    """Codes (N, codes_of(r)) of r rows -> images (N, C, r * S / H, S) uint8 on the CPU; `batch_size` as above."""
    device = device_of(vqvae)
    batch_size = batch_size or _default_batch_size(vqvae)
    codes = torch.as_tensor(codes).long()
    batches = [
        to_uint8(vqvae.decode(codes[i : i + batch_size].to(device))).cpu() for i in range(0, len(codes), batch_size)
    ]
    return torch.cat(batches)


def _default_batch_size(vqvae: Tokenizer) -> int:
    """At most as many pixels as in 256 images of 64x64, since activations grow with them."""
    return max(1, min(256, 256 * 64**2 // vqvae.image_size**2))
