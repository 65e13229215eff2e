"""Stage 0, one image file to one uint8 square: list folders and zips, decode their files in worker processes.

`ral_gym.data.images` decides which files a run uses, `ral_gym.data.cache` keeps what is decoded here;
`ral_gym.data.sources` lists and reads images that are no files. Nothing in this file imports torch, because every
worker process imports it.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import threading
import warnings
import zipfile
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageOps

from ral_gym.errors import DataError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".pgm", ".ppm", ".tif", ".tiff", ".gif"})
CHUNK = 32  # images per task: large enough to hide the cost of a task, small enough for a smooth progress bar
IN_PROCESS_BELOW = 500  # images; starting workers takes longer than decoding so few


class ImageFile(NamedTuple):
    """One file, by its path relative to the folder or zip; `stamp` (mtime or CRC) changes with its content."""

    name: str
    size: int
    stamp: int


class Files(Sized, Iterable[ImageFile], Protocol):
    """Images to decode, in order: a list, or `image_sources.Entries`."""


class Reader(Protocol):
    """Gets the bytes of an encoded image; it is sent to worker processes before the first call."""

    def __call__(self, name: str, /) -> bytes:
        """What is stored under a name; any exception's message says why there is nothing."""

    def close(self) -> None:
        """Called once nothing more is read."""


@dataclass(frozen=True)
class Decoding:
    """Where the files are and how each one becomes a square uint8 image."""

    root: str
    """A folder, a zip file, or another source's name for itself."""
    crop: int | None
    """Side of the centre crop in source pixels; None: the image's shorter side."""
    image_size: int
    """Side after the resize."""
    grey: bool
    """One channel instead of three."""
    reader: Reader | None = None
    """What reads a source of other kind; None: the files of the folder or zip."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, S, S)."""
        return (1 if self.grey else 3, self.image_size, self.image_size)


# Listing ------------------------------------------------------------------------------------------------------------


def is_image(name: str) -> bool:
    """True for image suffixes, whatever their case; hidden files (`._a.jpg` of macOS) are no images."""
    path = Path(name)
    return path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in path.parts)


def list_folder(root: Path) -> tuple[list[ImageFile], list[str]]:
    """All images under `root` sorted by path, and the folders that could not be read.

    Links to folders are followed, each real folder is visited once, so that loops end.
    """
    files: list[ImageFile] = []
    unreadable: list[str] = []
    visited: set[str] = set()
    walk = os.walk(root, followlinks=True, onerror=lambda error: unreadable.append(f"{error.filename}: {error}"))
    for folder, subfolders, names in walk:
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in filter(is_image, names):
            path = os.path.join(folder, name)
            try:
                status = os.stat(path)
                size, stamp = status.st_size, status.st_mtime_ns
            except OSError:  # a broken link: decoding names it
                size, stamp = 0, 0
            files.append(ImageFile(Path(path).relative_to(root).as_posix(), size, stamp))
    return sorted(files), unreadable


def list_zip(path: Path) -> list[ImageFile]:
    """All images in a zip file sorted by path; raises `DataError` where it is not a readable zip file."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(
            f"{path} is not a readable zip file ({error}): give a folder or a whole zip of images"
        ) from None
    inside = [entry for entry in entries if is_image(entry.filename) and not entry.filename.startswith("__MACOSX/")]
    return sorted(ImageFile(entry.filename, entry.file_size, entry.CRC) for entry in inside)


# Decoding -----------------------------------------------------------------------------------------------------------


def to_square(image: Image.Image, decoding: Decoding) -> np.ndarray:
    """Orient, centre-crop and resize one opened image.

    Returns:
        (C, S, S) uint8.

    Raises:
        ValueError: The image is smaller than the crop, or its pixels have no known range.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _from_16_bits(image)
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no stated range; convert it to 8 or 16 bits")
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")  # palettes, alpha, CMYK; not all of them convert to grey directly
    image = image.convert("L" if decoding.grey else "RGB")
    width, height = image.size
    side = decoding.crop or min(width, height)
    if min(width, height) < side:
        raise ValueError(f"{width}x{height} pixels are smaller than the crop of {side}")
    left, top = (width - side) // 2, (height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    # Pillow's Lanczos widens with the reduction, so it is an antialiasing filter.
    image = image.resize((decoding.image_size, decoding.image_size), Image.Resampling.LANCZOS)
    pixels = np.asarray(image).reshape(decoding.image_size, decoding.image_size, -1)  # (S, S, C)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # (C, S, S)


def source_side(decoding: Decoding, names: Iterable[str]) -> int | None:
    """Side in source pixels of the square that `to_square` cuts from the first readable one of a few images."""
    with contextlib.closing(decoding.reader or FileReader(decoding.root)) as reader, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in islice(names, CHUNK):
            with contextlib.suppress(Exception), Image.open(io.BytesIO(reader(name))) as image:
                return decoding.crop or min(image.size)
    return None


def _from_16_bits(image: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits; Pillow's own conversion clips instead of scaling."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit pixels have no stated range; convert it to 8 or 16 bits")
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


class FileReader:
    """Reads files of one folder or zip; a zip is held open, by one handle of this process."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.archive = zipfile.ZipFile(root) if os.path.isfile(root) else None

    def __call__(self, name: str) -> bytes:
        """The content of the file `name`."""
        return self.archive.read(name) if self.archive else Path(self.root, name).read_bytes()

    def close(self) -> None:
        """Close the zip."""
        if self.archive is not None:
            self.archive.close()


class Decoder:
    """Decodes images of one source."""

    def __init__(self, decoding: Decoding, stop: Event | None = None) -> None:
        self.decoding = decoding
        self.stop = stop
        self.reader: Reader = decoding.reader or FileReader(decoding.root)

    def close(self) -> None:
        """Close what the reader holds open."""
        self.reader.close()

    def __call__(self, names: Sequence[str]) -> list[np.ndarray | str]:
        """For each file its (C, S, S) uint8 image, or why there is none; ends early once `stop` is set."""
        results: list[np.ndarray | str] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata of images it does read
            for name in names:
                if self.stop is not None and self.stop.is_set():
                    break
                results.append(self._decode(name))
        return results

    def _decode(self, name: str) -> np.ndarray | str:
        try:
            data = self.reader(name)
            with Image.open(io.BytesIO(data)) as image:
                return to_square(image, self.decoding)
        except Image.UnidentifiedImageError:
            return "not an image" if data else "empty file"
        except Exception as error:  # damaged files make Pillow's readers raise nearly anything
            # Only what the system says about a file is worth repeating without its path.
            return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


_decoder: Decoder | None = None  # of a worker process


def _start_worker(decoding: Decoding, stop: Event) -> None:
    global _decoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; for systems without signal masks
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _decoder = Decoder(decoding, stop)


def _exit_with_parent() -> None:
    """A killed parent cannot tell its workers to stop, and they would wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _decode_chunk(names: Sequence[str]) -> list[np.ndarray | str]:
    assert _decoder is not None
    return _decoder(names)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back while worker processes start, which it would leave half made.

    The signal mask makes them deaf to it from their birth. In this process another thread (of BLAS, of torch) may
    still receive the signal, so that the main thread's handler has to wait too.
    """
    held: list[int] = []
    handler = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    masked = hasattr(signal, "pthread_sigmask")
    if handler is not None:
        signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if masked else set()
    try:
        yield
    finally:
        if masked:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        if held:
            signal.raise_signal(signal.SIGINT)


def iterate_decoded(
    decoding: Decoding, names: Iterable[str], count: int, workers: int
) -> Generator[list[np.ndarray | str], None, None]:
    """Yield the images of `count` files, in order and chunk by chunk; a file without one gives the reason instead."""
    rest = iter(names)  # few names are held at a time: there may be millions
    chunks = iter(lambda: list(islice(rest, CHUNK)), [])
    if workers <= 1 or count < IN_PROCESS_BELOW:
        with contextlib.closing(Decoder(decoding)) as decoder:
            yield from map(decoder, chunks)
        return
    context = multiprocessing.get_context("spawn")  # fork would copy torch's locked threads
    stop = context.Event()
    executor = ProcessPoolExecutor(workers, context, _start_worker, (decoding, stop))
    # Few chunks are under way at once, so that decoded images never pile up before a slow disk.
    pending: deque[Future[list[np.ndarray | str]]] = deque()
    try:
        with _interrupts_held():
            pending.extend(executor.submit(_decode_chunk, chunk) for chunk in islice(chunks, 4 * workers))
        while pending:
            yield pending.popleft().result()
            pending.extend(executor.submit(_decode_chunk, chunk) for chunk in islice(chunks, 1))
    except BrokenProcessPool:
        raise DataError(
            "A process that decodes images died (out of memory, or the calling script lacks "
            '`if __name__ == "__main__":`): set data.workers to 1 to decode without such processes'
        ) from None
    finally:
        stop.set()
        executor.shutdown(wait=True, cancel_futures=True)
