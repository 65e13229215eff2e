"""Stage 0, CelebA (Liu et al., 2015): where its downloads put the images and the official partition.

`ral_gym.data.images` makes training and held-out images of them.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from ral_gym.errors import DataError

PARTITION_NAMES = ("list_eval_partition.txt", "list_eval_partition.csv")


def find_images(path: Path) -> Path:
    """The folder or zip of the images, in the places where CelebA's downloads put it."""
    if path.is_file():
        return path
    for place in (path / "img_align_celeba", path / "Img" / "img_align_celeba"):
        if place.is_dir():
            return place
    for place in (path / "img_align_celeba.zip", path / "Img" / "img_align_celeba.zip"):
        if place.is_file():
            return place
    return path


def find_partition(path: Path, root: Path) -> tuple[str, dict[str, int]] | None:
    """The partition file inside or beside the images: its name and each image's part."""
    folders = [path, root, root.parent, path.parent, path / "Eval", path.parent / "Eval"]
    places = [folder / name for folder in folders if folder.is_dir() for name in PARTITION_NAMES]
    place = next((place for place in places if place.is_file()), None)
    try:
        if place is not None:
            return str(place), _read_partition(place.read_bytes(), str(place))
        if root.is_file():
            with zipfile.ZipFile(root) as archive:
                for name in archive.namelist():
                    if Path(name).name in PARTITION_NAMES:
                        return f"{root}/{name}", _read_partition(archive.read(name), f"{root}/{name}")
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"Cannot read {place or root} ({error}): download it again") from None
    return None


def _read_partition(content: bytes, source: str) -> dict[str, int]:
    """Lines "NAME PART", or "NAME,PART" after a header as on Kaggle."""
    partition: dict[str, int] = {}
    for number, line in enumerate(content.decode(errors="replace").splitlines(), start=1):
        words = line.replace(",", " ").split()
        if not words or (number == 1 and words[-1] == "partition"):
            continue
        if len(words) != 2 or words[1] not in ("0", "1", "2"):
            raise DataError(
                f"{source}, line {number}: {line[:80]!r} is not an image name and 0, 1 or 2: "
                "download the file again, or remove it for a random split"
            )
        partition[words[0]] = int(words[1])
    return partition
