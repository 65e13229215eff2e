"""Stage 0, images: where they come from and which of them are held out.

`load_images` turns a `DataConfig` into uint8 arrays, cropped and resized as in the paper's experiments (CelebA: the
usual centre crop of 148 pixels, then an antialiased resize). Unlike the paper, which reports no held-out metrics, every
source holds images out, so that memorisation can be measured: `test` always, and `new_people` if it is known who is on
a photo. `ral_gym.data.base` finds sources by name, `ral_gym.data.files` decodes their images and `ral_gym.data.cache`
keeps them. Images of more than `memory_budget_mb` are written to a cache on disk in small chunks, whatever the source.
Also here: conversions between uint8 and the networks' [-1, 1], and stage 1's augmentation.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ral_gym.config import DataConfig
from ral_gym.data.base import Source, open_source, source_part, take
from ral_gym.data.cache import DecodedImages, Keeping, decode_groups
from ral_gym.data.files import Decoding, source_side
from ral_gym.data.labels import check_classes, matched, nested_order, read_class_names
from ral_gym.data.listing import Files
from ral_gym.data.opening import Limits
from ral_gym.errors import ConfigError, DataError, printable

logger = logging.getLogger("ral_gym")


@dataclass(frozen=True, eq=False)
class Labels:
    """The classes of the images of an `ImageSet`, if the source knows them."""

    train: np.ndarray
    """(N,) int64, from 0."""
    test: np.ndarray
    """(M,) int64."""
    classes: tuple[str, ...]
    """The classes' names; empty if only numbers are known."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """The images of a run, uint8, all cropped and resized alike.

    Larger sets are read-only memory maps: take rows first (`train[rows]` copies just those), then make tensors.
    """

    train: np.ndarray
    """(N, C, S, S) training images."""
    test: np.ndarray
    """(M, C, S, S) held-out images; faces: 2 photos of each of 36 people; CelebA: its validation part."""
    new_people: np.ndarray | None
    """(40, C, S, S) all photos of 4 people who are in neither `train` nor `test`; only for faces, else None."""
    description: str
    """One sentence: the data set, its source, and the numbers of images."""
    skipped: tuple[str, ...]
    """Files that could not be used, each as "path: reason"."""
    labels: Labels | None = None
    """The classes of `train` and `test`; None: unknown."""
    cache: Path | None = None
    """Where the decoded images are on disk, or None."""

    @property
    def channels(self) -> int:
        """C: 1 (grey) or 3."""
        return int(self.train.shape[1])

    @property
    def image_size(self) -> int:
        """S, the side in pixels."""
        return int(self.train.shape[-1])


def load_images(config: DataConfig, seed: int = 0, progress: bool = True) -> ImageSet:
    """Load, crop, resize and split the images of a run.

    Args:
        config: Source, crop, size and where to keep them.
        seed: Decides which images are held out, unless the source does, and which ones the limits keep.
        progress: Show a progress bar if decoding takes longer than a moment.

    Returns:
        The images. Unusable files among good ones are left out, listed in `skipped` and warned of once.

    Raises:
        ConfigError: A setting is out of range.
        DataError: The source is unknown, missing, empty or unusable, or the cache cannot be written.
    """
    _check(config)
    source = _open(config.source, config, progress)
    if config.class_names is not None and source.labels is None:
        raise ConfigError("data.class_names names classes, but the images have none: leave it out")
    if config.test is not None:
        return _with_own_test(source, config, seed, progress)
    rows, words = _rows(source, config, seed)
    decoding, decoded, resized = _decode(source, rows, config, progress)
    return _image_set(source, decoding, decoded, rows, words, resized, config.class_names)


def _open(text: str, config: DataConfig, progress: bool) -> Source:
    """A source, without its classes if they are turned off."""
    source = open_source(text, progress, limits_of(config))
    if config.labels == "none":
        source.labels, source.classes = None, ()
    return source


def _decode(
    source: Source, rows: list[np.ndarray], config: DataConfig, progress: bool
) -> tuple[Decoding, DecodedImages, str]:
    """The images of some rows of a source, decoded; and a description of the resize."""
    groups = [take(source.files, part) for part in rows]
    decoding = Decoding(
        root=source.root,
        crop=config.crop if config.crop is not None else source.crop,
        image_size=config.image_size,
        grey=config.grey or source.grey,
        reader=source.reader,
        limits=limits_of(config),
    )
    keeping = Keeping(config.memory_budget_mb, config.cache_dir, config.cache_mb, source.cacheable)
    decoded = decode_groups(groups, decoding, keeping, config.workers, progress)
    return decoding, decoded, _resized(groups, decoding)


def _with_own_test(source: Source, config: DataConfig, seed: int, progress: bool) -> ImageSet:
    """All images of the source, and held-out images from `config.test`.

    Raises:
        DataError: one source has classes and the other has not, a class that only one of them has, or images of other
            colours.
    """
    held_out = _open(str(config.test), config, progress)
    if (source.labels is None) != (held_out.labels is None):
        has, has_not = (held_out, source) if source.labels is None else (source, held_out)
        raise DataError(
            f"{has.title} has classes, but {has_not.title} has none: give both one folder per class, or turn labels "
            "off with --data.labels none"
        )
    limit = config.test_limit if config.test_limit is not None else config.limit
    parts, decoded = [], []
    for one, most in ((source, config.limit), (held_out, limit or None)):
        parts.append(_limited(np.arange(len(one.files)), most, seed, one.labels))
        decoded.append(_decode(one, [parts[-1]], config, progress))
    (decoding, train, resized), (other, test, _) = decoded
    if decoding.grey != other.grey:
        raise DataError(f"{source.title} and {held_out.title} are not both grey or both colour: set --data.grey True")
    skipped = (*source.skipped, *train.skipped, *held_out.skipped, *test.skipped)
    _warn_of_skipped(skipped, source.root)
    labels = None
    if source.labels is not None and held_out.labels is not None:
        theirs = matched(held_out.labels, held_out.classes, source.classes, str(config.test))
        known = [
            of[part[found.kept[0]]]
            for of, part, found in zip((source.labels, theirs), parts, (train, test), strict=True)
        ]
        labels = _named(known[0], known[1], source.classes, config.class_names)
    words = f"{train.counts[0]:,} training images, {test.counts[0]:,} held-out images from {printable(held_out.root)}"
    words += f", {_kind(decoding, resized)}" + (f", {len(skipped):,} files skipped" if skipped else "")
    return ImageSet(
        train=train.images,
        test=test.images,
        new_people=None,
        description=f"{printable(source.title)}: {words}",
        skipped=skipped,
        labels=labels,
        cache=train.cache,
    )


def _named(train: np.ndarray, test: np.ndarray, names: tuple[str, ...], file: str | None) -> Labels:
    """Labels with a name for each class, and an image of each on both sides."""
    names = check_classes(train, test, names)
    return Labels(train, test, names if file is None else read_class_names(file, len(names)))


def limits_of(config: DataConfig) -> Limits:
    """Size limits of one image, file or set."""
    return Limits(config.max_megapixels, config.max_file_mb, config.max_files)


def crop_of(config: DataConfig) -> int | None:
    """Side of the centre crop in source pixels, the source's own if none is set; None: the shorter side.

    Raises:
        DataError, ConfigError: the source is unknown, or may not be imported.
    """
    return config.crop if config.crop is not None else getattr(source_part(config.source), "crop", None)


def channels_of(config: DataConfig) -> int:
    """1 (grey) or 3, as far as it is known before images are read."""
    return 1 if config.grey or getattr(source_part(config.source), "grey", False) is True else 3


def _check(config: DataConfig) -> None:
    lowest = {"image_size": 8, "crop": 1, "limit": 1, "test_limit": 0, "workers": 0, "memory_budget_mb": 0}
    lowest |= {"cache_mb": 0, "max_megapixels": 1, "max_file_mb": 1, "max_files": 1}
    for name, low in lowest.items():
        value = getattr(config, name)
        if value is not None and value < low:
            raise ConfigError(f"data.{name} is {value}: give {low} or more")


def _rows(source: Source, config: DataConfig, seed: int) -> tuple[list[np.ndarray], str]:
    """The files of the training images, the held-out ones and the held-out people; and how they were split."""
    split = source.split(seed)
    held_out = config.test_limit if config.test_limit is not None else config.limit
    parts = [
        _limited(part, limit, seed, source.labels)
        for part, limit in ((split.train, config.limit), (split.test, held_out or None))
    ]
    if split.new_people is not None:
        parts.append(_limited(split.new_people, held_out or None, seed, None))
    return parts, split.words


def _limited(rows: np.ndarray, limit: int | None, seed: int, labels: np.ndarray | None) -> np.ndarray:
    """The first `limit` rows of a seeded order, so that a larger limit only adds to a smaller one.

    With labels (N,) of all files each class gets its share.
    """
    if limit is None or limit >= len(rows):
        return rows
    if labels is not None:
        return rows[np.sort(nested_order(labels[rows], seed)[:limit])]
    return rows[np.sort(np.random.default_rng([seed, 1]).permutation(len(rows))[:limit])]


def _kind(decoding: Decoding, resized: str) -> str:
    return f"{decoding.image_size}x{decoding.image_size} {'grey' if decoding.grey else 'colour'}{resized}"


def _image_set(
    source: Source,
    decoding: Decoding,
    decoded: DecodedImages,
    rows: list[np.ndarray],
    split: str,
    resized: str,
    class_names: str | None,
) -> ImageSet:
    """Slice the decoded images into the parts of the split, and describe them."""
    n_train, n_test = decoded.counts[:2]
    # Unusable files may have emptied one side of the split: each keeps an image where there are two.
    n_known = n_train + n_test
    n_train = min(max(n_train, 1), max(n_known - 1, 1))
    skipped = (*source.skipped, *decoded.skipped)
    _warn_of_skipped(skipped, source.root)
    title = printable(source.title)
    description = f"{title}: {n_train:,} training and {n_known - n_train:,} held-out images ({printable(split)})"
    if len(decoded.counts) > 2:
        description += f", {decoded.counts[2]} of 4 other people"
    labels = None
    if source.labels is not None:
        known = np.concatenate([source.labels[part[kept]] for part, kept in zip(rows, decoded.kept, strict=True)])
        labels = _named(known[:n_train], known[n_train:n_known], source.classes, class_names)
    return ImageSet(
        train=decoded.images[:n_train],
        test=decoded.images[n_train:n_known],
        new_people=decoded.images[n_known:] if len(decoded.counts) > 2 else None,
        description=f"{description}, {_kind(decoding, resized)}"
        + (f", {len(skipped):,} files skipped" if skipped else ""),
        skipped=skipped,
        labels=labels,
        cache=decoded.cache,
    )


def _resized(groups: Sequence[Files], decoding: Decoding) -> str:
    """A description of the resize, by the first readable image; warns if it enlarges."""
    side = source_side(decoding, (file.name for group in groups for file in group))
    if side is None or side == decoding.image_size:
        return ""
    if side < decoding.image_size:
        logger.warning(
            "%s: its images (the first gives a square of %d pixels) are smaller than data.image_size %d: they are "
            "enlarged, which adds no detail",
            printable(decoding.root), side, decoding.image_size,
        )  # fmt: skip
    return f" (resized from {side}x{side})"


def _warn_of_skipped(skipped: Sequence[str], root: str) -> None:
    if skipped:
        more = f"; and {len(skipped) - 5:,} more" if len(skipped) > 5 else ""
        logger.warning(
            "%s: %s unusable files were skipped: %s%s",
            printable(root),
            f"{len(skipped):,}",
            "; ".join(skipped[:5]),
            more,
        )


# Tensors ------------------------------------------------------------------------------------------------------------


def to_float(images_uint8: Tensor) -> Tensor:
    """Stored images, uint8 of any shape, as the networks' input: float32 in [-1, 1].

    Raises:
        TypeError: They are not uint8, so that they may have been converted already.
    """
    if images_uint8.dtype != torch.uint8:
        raise TypeError(f"expected uint8 images, got {images_uint8.dtype}")
    return images_uint8.float() / 127.5 - 1


def float_batch(pixels: np.ndarray, device: torch.device) -> Tensor:
    """`to_float` of stored images on a device: sent as bytes, and to CUDA from pinned memory, without a wait.

    While the device still works on one batch, the host can so gather and send the next.

    Args:
        pixels: (B, C, S, S) uint8, an array of its own.
        device: where the images are to be.
    """
    stored = torch.from_numpy(pixels)
    if device.type == "cuda":
        stored = stored.pin_memory().to(device, non_blocking=True)
    return to_float(stored)


def to_uint8(images: Tensor) -> Tensor:
    """The inverse of `to_float`: rounds to the nearest value and clamps what lies outside [-1, 1]."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def augment(images: Tensor, generator: torch.Generator, max_shift: int = 3) -> Tensor:
    """Flip half of the images and shift each by up to `max_shift` pixels, repeating its edge.

    Args:
        images: (B, C, S, S) of any dtype.
        generator: Source of randomness; it may live on another device than the images.
        max_shift: Largest shift in pixels, in each direction of both axes.

    Returns:
        (B, C, S, S) new images, of the same dtype.
    """
    batch, channels, height, width = images.shape
    device = generator.device
    shift = torch.randint(-max_shift, max_shift + 1, (2, batch, 1), generator=generator, device=device)  # (2, B, 1)
    flip = torch.rand((batch, 1), generator=generator, device=device) < 0.5  # (B, 1)
    shift, flip = shift.to(images.device, non_blocking=True), flip.to(images.device, non_blocking=True)
    rows = (torch.arange(height, device=images.device) + shift[0]).clamp(0, height - 1)  # (B, S)
    columns = (torch.arange(width, device=images.device) + shift[1]).clamp(0, width - 1)  # (B, S)
    columns = torch.where(flip, width - 1 - columns, columns)  # (B, S)
    index = (rows[:, :, None] * width + columns[:, None, :]).reshape(batch, 1, -1)  # (B, 1, S*S)
    pixels = images.reshape(batch, channels, -1).gather(2, index.expand(-1, channels, -1))  # (B, C, S*S)
    return pixels.reshape(images.shape)  # (B, C, S, S)
