"""Stage 0, the one place where image files are opened: which formats, which kinds of file, how large.

Image folders, zips and datasets are untrusted. Only the formats that the documentation names are ever given to Pillow,
judged by content and not by suffix (a `.png` that is PostScript would start Ghostscript); FIFOs, devices and sockets
are never opened; sizes have limits, checked before memory is taken. Nothing here imports torch.
"""

from __future__ import annotations

import io
import os
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ral_gym.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "PPM", "BMP", "TIFF", "GIF")
"""Pillow's names of the formats that are opened; PPM is pgm and ppm."""
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".pgm", ".ppm", ".tif", ".tiff", ".gif"})
MB = 2**20
ZIP_RECORD = 46
"""Bytes of the shortest record in a zip's central directory."""


@dataclass(frozen=True)
class Limits:
    """Size limits of one source; the settings `data.max_*`.

    Decoding one image takes at most about `max_file_mb` and 12 bytes per pixel; listing a zip about 0.7 kB per file.
    """

    max_megapixels: int = 50
    """Millions of pixels of one image."""
    max_file_mb: int = 128
    """MiB of one file, unpacked."""
    max_files: int = 4_000_000
    """Files of one folder or zip."""

    @property
    def pixels(self) -> int:
        """Pixels of one image."""
        return self.max_megapixels * 1_000_000

    @property
    def bytes(self) -> int:
        """Bytes of one file."""
        return self.max_file_mb * MB

    def check_size(self, size: int) -> None:
        """Raise `ValueError` for a file of more bytes."""
        if size > self.bytes:
            raise ValueError(f"{size / MB:,.1f} MiB are more than data.max_file_mb {self.max_file_mb}")

    def check_pixels(self, width: int, height: int) -> None:
        """Raise `ValueError` for an image of more pixels."""
        if width * height > self.pixels:
            raise ValueError(f"{width}x{height} pixels are more than data.max_megapixels {self.max_megapixels} million")


LIMITS = Limits()
"""The defaults."""


def check_regular(mode: int) -> None:
    """Raise `ValueError` for a file mode of something that is not a regular file, and say what it is."""
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
        raise ValueError(f"{kinds.get(stat.S_IFMT(mode), 'a device')}, not a regular file")


def read_file(path: Path | str, limits: Limits = LIMITS) -> bytes:
    """The content of a regular file, links followed.

    Raises:
        OSError: it is missing or cannot be read.
        ValueError: it is a FIFO, a device or the like, which is not opened, or larger than the limit.
    """
    check_regular(os.stat(path).st_mode)
    # Not blocking: if it has become a FIFO since, opening it would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        status = os.fstat(descriptor)
        check_regular(status.st_mode)
        limits.check_size(status.st_size)
        parts, left = [], status.st_size
        while left and (part := os.read(descriptor, left)):
            parts.append(part)
            left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
    finally:
        os.close(descriptor)


def open_image(data: bytes, limits: Limits = LIMITS) -> Image.Image:
    """Open an encoded image; its pixels are decoded later, by the caller.

    Raises:
        PIL.UnidentifiedImageError: none of `FORMATS`.
        ValueError: more pixels than the limit.
    """
    with own_pixel_limit(limits):
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    limits.check_pixels(*image.size)
    return image


@contextmanager
def own_pixel_limit(limits: Limits) -> Iterator[None]:
    """Raise Pillow's own pixel limit to that of `limits`, if that is larger."""
    before = Image.MAX_IMAGE_PIXELS
    if before is None or limits.pixels <= before:
        yield
        return
    Image.MAX_IMAGE_PIXELS = limits.pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


class _BoundedReads(io.FileIO):
    """A file of which no single read may take more than `most` bytes: `zipfile` reads the list of files at once."""

    def __init__(self, path: Path | str, most: int) -> None:
        super().__init__(path, "rb")
        self.most = most

    def read(self, size: int | None = -1, /) -> bytes:
        """As `io.FileIO.read`; raises `ValueError` beyond the bound."""
        if size is None or size < 0:
            size = os.fstat(self.fileno()).st_size - self.tell()
        if size > self.most:
            raise ValueError("too many files")
        return super().read(size) or b""


def open_zip(path: Path | str, limits: Limits = LIMITS) -> zipfile.ZipFile:
    """Open a zip file that lists at most `limits.max_files` files.

    Raises:
        DataError: it is not a readable zip file, or lists more.
    """
    file = None
    try:
        check_regular(os.stat(path).st_mode)
        file = _BoundedReads(path, max(limits.max_files * ZIP_RECORD, MB))
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        if file is not None:
            file.close()
        if str(error) == "too many files":
            raise DataError(_too_many(path, limits)) from None
        raise DataError(
            f"{path} is not a readable zip file ({error}): give a folder or a whole zip of images"
        ) from None
    if len(archive.infolist()) > limits.max_files:
        close_zip(archive)
        raise DataError(_too_many(path, limits))
    return archive


def close_zip(archive: zipfile.ZipFile) -> None:
    """Close what `open_zip` opened."""
    file = archive.fp
    archive.close()
    if file is not None:
        file.close()


def _too_many(path: Path | str, limits: Limits) -> str:
    return f"{path} lists more than {limits.max_files:,} files: raise data.max_files if they are wanted"


def read_zip_entry(archive: zipfile.ZipFile, name: str, limits: Limits = LIMITS) -> bytes:
    """The content of one file of a zip.

    Raises:
        ValueError: it is larger than the limit, or compressed otherwise than by deflate.
        Exception: what `zipfile` raises for a damaged one; never more is unpacked than the zip declares.
    """
    entry = archive.getinfo(name)
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("compressed by another method than deflate: pack the zip again")
    limits.check_size(entry.file_size)
    with archive.open(entry) as file:
        return file.read(entry.file_size)
