"""Stage 0, listing: the image files of a folder or a zip, with stamps that reveal changes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import NamedTuple, Protocol

from ral_gym.data.opening import LIMITS, SUFFIXES, Limits, check_regular, close_zip, open_zip
from ral_gym.errors import DataError, printable


class ImageFile(NamedTuple):
    """One file, by its path relative to the folder or zip; `stamp` (mtime or CRC) changes with its content."""

    name: str
    size: int
    stamp: int


class Files(Sized, Iterable[ImageFile], Protocol):
    """Images to decode, in order: a list, or `ral_gym.data.sources.Entries`."""


def is_image(name: str) -> bool:
    """True for image suffixes, whatever their case; hidden files (`._a.jpg` of macOS) are not images."""
    base = name[name.rfind("/") + 1 :]
    dot = base.rfind(".")
    if dot < 1 or base[dot:].lower() not in SUFFIXES:
        return False
    return not any(part.startswith(".") and part != "." for part in name.split("/"))


def list_folder(root: Path, limits: Limits = LIMITS) -> tuple[list[ImageFile], list[str]]:
    """All images under `root` sorted by path, and what could not be read: folders, FIFOs, devices, sockets.

    Links are followed, each real folder is visited once, so that loops end. No file is opened.

    Raises:
        DataError: more images than the limit.
    """
    files: list[ImageFile] = []
    unreadable: list[str] = []
    start = len(os.path.join(root, ""))
    for folder, name in _walk(root, unreadable):
        path = os.path.join(folder, name)
        relative = path[start:].replace(os.sep, "/")
        try:
            status = os.stat(path)
            check_regular(status.st_mode)
            files.append(ImageFile(relative, status.st_size, status.st_mtime_ns))
        except OSError:  # a broken link: decoding names it
            files.append(ImageFile(relative, 0, 0))
        except ValueError as error:
            unreadable.append(f"{printable(relative)}: {error}")
        if len(files) > limits.max_files:
            raise DataError(
                f"{root} holds more than {limits.max_files:,} images: raise data.max_files if all are wanted"
            )
    return sorted(files), unreadable


def _walk(root: Path, unreadable: list[str]) -> Iterator[tuple[str, str]]:
    """(folder, name) of every image file under `root`."""
    visited: set[str] = set()

    def failed(error: OSError) -> None:
        unreadable.append(f"{printable(error.filename)}: {error.strerror or error}")

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=failed):
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from ((folder, name) for name in filter(is_image, names))


def list_zip(path: Path, limits: Limits = LIMITS) -> tuple[list[ImageFile], list[str]]:
    """All images in a zip file sorted by path, and the names it holds twice, of which the last counts.

    Raises:
        DataError: it is not a readable zip file, or lists more files than the limit.
    """
    archive = open_zip(path, limits)
    try:
        entries = archive.infolist()
    finally:
        close_zip(archive)
    files: dict[str, ImageFile] = {}
    twice: list[str] = []
    for entry in entries:
        name = entry.filename
        if is_image(name) and not name.startswith("__MACOSX/"):
            if name in files:
                twice.append(f"{printable(name)}: twice in the zip, the last one is used")
            files[name] = ImageFile(name, entry.file_size, entry.CRC)
    return sorted(files.values()), twice
