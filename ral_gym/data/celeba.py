"""Stage 0, `celeba:PATH`: CelebA (Liu et al., 2015), as its downloads unpack, with the official partition.

These layouts are found, from any level of their folders: torchvision's (`celeba/img_align_celeba`), Kaggle's nesting
(`img_align_celeba/img_align_celeba` beside a csv file), the official one (`Img/img_align_celeba`, or the PNG files
`Img/img_align_celeba_png`, and `Eval/`), and zips of the images with the partition inside or beside them.
"""

from __future__ import annotations

import logging
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ral_gym.data.base import Source, Split, existing_path, random_split, require_images
from ral_gym.data.listing import ImageFile, is_image, list_folder, list_zip
from ral_gym.data.opening import LIMITS, Limits, close_zip, open_zip, read_file, read_zip_entry
from ral_gym.errors import DataError, printable

logger = logging.getLogger("ral_gym")

CROP = 148  # of 178x218 pixels, as in every work on CelebA since Larsen et al. (2016)
PARTITION_NAMES = ("list_eval_partition.txt", "list_eval_partition.csv")
IMAGE_FOLDERS = ("img_align_celeba", "img_align_celeba_png")
DEPTH = 3  # most levels between the given folder and that of the images, up or down
FIRST_VALIDATION, FIRST_TEST, LAST = 162_771, 182_638, 202_599  # the official partition, by the files' numbers


class CelebA(Source):
    """Aligned CelebA: partition 0 is `train`, partition 1 (validation) is `test`, partition 2 (test) is not used.

    Args:
        path: a folder at any level of a download, or a zip.
        limits: what is too large.
    """

    argument = "PATH"
    crop = CROP

    def __init__(self, path: str, limits: Limits = LIMITS) -> None:
        given = existing_path(path, "celeba")
        root = find_images(given)
        files, skipped = list_folder(root, limits) if root.is_dir() else list_zip(root, limits)
        require_images(files, skipped, root)
        files, twice = _each_once(files)
        found = find_partition(given, root, limits)
        if found is None:
            self.partition_file, partition = None, _official_numbers(files)
        else:
            self.partition_file, partition = found
        title = f"CelebA (Liu et al., 2015) from {printable(given)}"
        self.parts: np.ndarray | None = None
        outside: list[str] = []
        if partition is not None:
            by_stem = {_stem(name): part for name, part in partition.items()}
            part_of = [partition.get(base, by_stem.get(_stem(base))) for base in map(_base, files)]
            where = Path(self.partition_file).name if self.partition_file else ""
            outside = [f"{printable(f.name)}: not in {where}" for f, p in zip(files, part_of, strict=True) if p is None]
            known = [(file, part) for file, part in zip(files, part_of, strict=True) if part is not None]
            files, self.parts = [file for file, _ in known], np.array([part for _, part in known], np.int64)
            if not (self.parts == 0).any():
                raise DataError(
                    f"{self.partition_file or 'CelebA'} makes none of the {len(part_of):,} images in {root} a training "
                    "image (partition 0): give the file that belongs to them, or remove it for a random split"
                )
        else:
            logger.warning(
                "%s: no %s found, and the names are not CelebA's numbers: the held-out images are a random share, and "
                "CelebA's test images may be among the training ones", printable(given), PARTITION_NAMES[0],
            )  # fmt: skip
        super().__init__(files, root=root, title=title, skipped=[*skipped, *twice, *outside])

    def split(self, seed: int) -> Split:
        """By the partition; at random among the training images if it has no validation images."""
        if self.parts is None:
            split = super().split(seed)
            return split._replace(words=f"{split.words}: no {PARTITION_NAMES[0]} found")
        train, test = np.flatnonzero(self.parts == 0), np.flatnonzero(self.parts == 1)
        if not len(test):  # the first thousands of CelebA, for example, are all training images
            split = random_split(train, seed)
            return split._replace(words=f"{split.words}: no validation images among them")
        words = "the validation partition" if self.partition_file else "the validation partition, by CelebA's numbers"
        return Split(train, test, None, words)


def find_images(path: Path) -> Path:
    """The folder or zip of the images, in the places where CelebA's downloads put it, at or below `path`."""
    if path.is_file() or _holds_images(path):
        return path
    level = [path]
    for _ in range(DEPTH):
        for name in IMAGE_FOLDERS:
            for place in (folder / name for folder in level):
                if place.is_dir():
                    return _innermost(place)
                if place.with_suffix(".zip").is_file():
                    return place.with_suffix(".zip")
        level = [folder for parent in level for folder in _subfolders(parent)]
    return path


def _innermost(place: Path) -> Path:
    """Kaggle's zips unpack to a folder of the same name inside; the one that holds the images."""
    while not _holds_images(place) and (place / place.name).is_dir():
        place = place / place.name
    return place


def _holds_images(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(is_image(entry.name) for entry in entries)
    except OSError:
        return False


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(item for item in folder.iterdir() if item.is_dir() and not item.name.startswith("."))
    except OSError:
        return []


def find_partition(path: Path, root: Path, limits: Limits = LIMITS) -> tuple[str, dict[str, int]] | None:
    """The partition file inside, beside or above the images: its name and each image's part.

    Args:
        path: what was given.
        root: the images' folder or zip.
        limits: what is too large.

    Raises:
        DataError: there is one that is damaged.
    """
    above = [*([root] if root.is_dir() else []), *list(root.parents)[:DEPTH]]
    folders = [path, *above] if path.is_dir() else above
    places = [
        folder / inside / name for folder in folders for inside in ("", "Eval", "eval") for name in PARTITION_NAMES
    ]
    place = next((place for place in places if place.is_file()), None)
    try:
        if place is not None:
            return str(place), _read_partition(read_file(place, limits), str(place))
        return _partition_of_zip(root, limits) if root.is_file() else None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"Cannot read {place or root} ({error}): download it again") from None


def _partition_of_zip(root: Path, limits: Limits) -> tuple[str, dict[str, int]] | None:
    archive = open_zip(root, limits)
    try:
        for name in archive.namelist():
            if Path(name).name in PARTITION_NAMES and not name.startswith("__MACOSX/"):
                source = f"{root}/{name}"
                return source, _read_partition(read_zip_entry(archive, name, limits), source)
    finally:
        close_zip(archive)
    return None


def _read_partition(content: bytes, source: str) -> dict[str, int]:
    """Lines "NAME PART", or "NAME,PART" after a header as on Kaggle; a byte-order mark is skipped."""
    partition: dict[str, int] = {}
    for number, line in enumerate(content.decode("utf-8-sig", errors="replace").splitlines(), start=1):
        words = line.replace(",", " ").split()
        if not words or (number == 1 and words[-1] == "partition"):
            continue
        if len(words) != 2 or words[1] not in ("0", "1", "2"):
            raise DataError(
                f"{source}, line {number}: {line[:80]!r} is not an image name and 0, 1 or 2: "
                "download the file again, or remove it for a random split"
            )
        name, part = words[0], int(words[1])
        if partition.setdefault(name, part) != part:
            raise DataError(f"{source}, line {number}: {name[:80]!r} is in two parts: download the file again")
    return partition


def _official_numbers(files: Sequence[ImageFile]) -> dict[str, int] | None:
    """The official partition of files that bear CelebA's numbers (000001 to 202599); None: other names."""
    numbers = {base: _number(base) for base in map(_base, files)}
    if any(number is None for number in numbers.values()):
        return None
    return {base: (n >= FIRST_VALIDATION) + (n >= FIRST_TEST) for base, n in numbers.items() if n is not None}


def _number(base: str) -> int | None:
    stem = _stem(base)
    return int(stem) if re.fullmatch(r"[0-9]{6}", stem) and int(stem) <= LAST else None


def _each_once(files: Sequence[ImageFile]) -> tuple[list[ImageFile], list[str]]:
    """Leave out duplicates of an image, such as jpg and png versions, or copies in two folders."""
    first: dict[str, ImageFile] = {}
    kept, twice = [], []
    for file in files:
        same = first.setdefault(_stem(_base(file)), file)
        if same is file:
            kept.append(file)
        else:
            twice.append(f"{printable(file.name)}: the same image as {printable(same.name)}")
    return kept, twice


def _base(file: ImageFile) -> str:
    return file.name[file.name.rfind("/") + 1 :]


def _stem(base: str) -> str:
    return base[: base.rfind(".")]
