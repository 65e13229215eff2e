"""A set of images encoded once: the code file of stage 2 and of partial generation.

`ral_gym.grid` says what codes are and how they are ordered.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ral_gym.data.images import ImageSet, Labels, augment, float_batch, to_uint8
from ral_gym.errors import RunError
from ral_gym.grid import CodeGrid
from ral_gym.runs.progress import progress_bar
from ral_gym.runs.storage import load_tensors, save_tensors
from ral_gym.tokenizers.base import Tokenizer, device_of

LABELLED = ("train", "test")
"""Parts of a code file that may have labels, in the tensors ``train_labels`` and ``test_labels``."""


@dataclass(frozen=True)
class CodeSet:
    """Codes of the training and the held-out images, int16 (N, T) each.

    Attributes:
        train: codes of the training images, all augmented passes.
        test: held-out images (of known people, for faces).
        new_people: held-out people, or None.
        clean: how many rows of `train`, the first ones, are codes of the images without augmentation.
        labels: the classes of `train` and `test`, int64 from 0, and the name of every class; None: no labels.
        augmented: one augmented pass over the images of `test`, if `train` has augmented passes: what a critic, which
            sees augmented training images, is measured on; None: there is none.
    """

    train: np.ndarray
    test: np.ndarray
    new_people: np.ndarray | None
    clean: int
    labels: Labels | None = None
    augmented: np.ndarray | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their numbers; empty without labels."""
        return () if self.labels is None else self.labels.classes

    def grid_of(self, grid: CodeGrid) -> CodeGrid:
        """A tokenizer's grid with this set's number of classes: the grid of its sequences."""
        return replace(grid, classes=len(self.classes))

    def sequences(self, part: str, grid: CodeGrid) -> np.ndarray:
        """The sequences (n, `length`) int16 of a part: its codes, with their labels if the grid has classes.

        Args:
            part: `train`, `test`, `clean`: the training images without augmentation, or `held_out`: the images of
                `test`, augmented as those of `train` are.
            grid: `grid_of`, or a grid without classes, which leaves the labels out.
        """
        name, rows = ("train", slice(self.clean)) if part == "clean" else (part, slice(None))
        name = "test" if part == "held_out" else name
        codes: np.ndarray = getattr(self, name)[rows]
        if part == "held_out" and self.augmented is not None:
            codes = self.augmented
        if not grid.classes:
            return codes
        assert self.labels is not None
        return grid.with_labels(codes, getattr(self.labels, name)[rows])

    def save(self, path: Path) -> None:
        """Write atomically as safetensors."""
        tensors = {"train": torch.from_numpy(self.train), "test": torch.from_numpy(self.test)}
        if self.new_people is not None:
            tensors["new_people"] = torch.from_numpy(self.new_people)
        if self.augmented is not None:
            tensors["test_augmented"] = torch.from_numpy(self.augmented)
        facts: dict[str, Any] = {"clean": self.clean}
        if self.labels is not None:
            tensors |= {f"{name}_labels": _stored_labels(getattr(self.labels, name)) for name in LABELLED}
            facts["classes"] = list(self.labels.classes)
        save_tensors(path, tensors, facts)

    @classmethod
    def load(cls, path: Path, grid: CodeGrid | None = None) -> CodeSet:
        """Read what `save` wrote.

        Args:
            path: the file.
            grid: the shape that the codes must have, whatever its classes; None: any.

        Raises:
            RunError: the file is missing, truncated, not a code file, or does not fit the grid.
        """
        tensors, metadata = load_tensors(path)
        clean = metadata.get("clean")
        if "train" not in tensors or "test" not in tensors or isinstance(clean, bool) or not isinstance(clean, int):
            raise RunError(f"{path} is not a code file (no train and test codes in it); remove it to encode again")
        labels = _labels_in(path, tensors, metadata)
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
        augmented = tensors.get("test_augmented")
        if augmented is not None and augmented.shape != tensors["test"].shape:
            raise RunError(
                f"{path}: {len(augmented)} augmented held-out rows for {len(tensors['test'])} held-out images; remove "
                "it to encode again"
            )
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        found = (arrays.get(name) for name in ("new_people", "test_augmented"))
        new_people, held_out = found
        return cls(arrays["train"], arrays["test"], new_people, clean, labels, held_out)


def _stored_labels(labels: np.ndarray) -> Tensor:
    return torch.from_numpy(labels.astype(np.int16))


def _labels_in(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> Labels | None:
    """The labels of a code file, or None; removes them from its `tensors`.

    Raises:
        RunError: there are labels for some parts only, or not one from 0 to N - 1 for every image.
    """
    found = {name: tensors.pop(f"{name}_labels", None) for name in LABELLED}
    names = metadata.get("classes")
    if names is None and not any(labels is not None for labels in found.values()):
        return None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise RunError(f"{path}: its labels have no list of class names; remove the file to encode again")
    for name, labels in found.items():
        fits = labels is not None and labels.dtype == torch.int16 and labels.shape == tensors[name].shape[:1]
        if not fits or labels is None or (len(labels) and not _between(labels, len(names))):
            raise RunError(
                f"{path}: tensor {name}_labels does not hold one class in 0..{len(names) - 1} (int16) for each of the "
                f"{len(tensors[name])} images; remove the file to encode again"
            )
    arrays = {name: labels.numpy().astype(np.int64) for name, labels in found.items() if labels is not None}
    return Labels(arrays["train"], arrays["test"], tuple(names))


def _fits(codes: Tensor, grid: CodeGrid) -> bool:
    """Whether codes (N, T) have the grid's T and lie in its codebook."""
    inside = codes.numel() == 0 or _between(codes, grid.codebook_size)
    return codes.shape[1:] == (grid.n_codes,) and inside


def _between(values: Tensor, count: int) -> bool:
    """Whether all values lie in 0..count - 1."""
    return bool(0 <= int(values.min()) <= int(values.max()) < count)


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
    for number, start in progress_bar(starts, desc=label, unit="batch", disable=not progress, leave=False):
        batch = float_batch(np.array(images[start : start + batch_size]), device)  # (B, C, S, S)
        if number:
            batch = augment(batch, generator)
        row = number * len(images) + start
        codes[row : row + len(batch)] = torch.cat(vqvae.encode(batch), 1).cpu().numpy()
    return codes


def encode_set(vqvae: Tokenizer, images: ImageSet, *, passes: int, seed: int, progress: bool = True) -> CodeSet:
    """Encode the training images (in `passes` passes) and the held-out ones (as they are)."""
    train = encode_images(vqvae, images.train, passes=passes, seed=seed, progress=progress)
    test = encode_images(vqvae, images.test, progress=False)
    new_people = None if images.new_people is None else encode_images(vqvae, images.new_people, progress=False)
    labels = None if images.labels is None else _repeated(images.labels, passes)
    augmented = None
    if passes > 1:
        augmented = encode_images(vqvae, images.test, passes=2, seed=seed + 1, progress=False)[len(test) :]
    return CodeSet(train, test, new_people, clean=len(images.train), labels=labels, augmented=augmented)


def _repeated(labels: Labels, passes: int) -> Labels:
    """The labels of `passes` passes over the training images; classes without a name are called by their number."""
    count = 1 + max(int(part.max(initial=0)) for part in (labels.train, labels.test))
    names = labels.classes or tuple(map(str, range(count)))
    return Labels(np.tile(labels.train, passes), labels.test, names)


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
