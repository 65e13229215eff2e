"""Stage 0, one image file to one uint8 square, in this process or in worker processes.

`ral_gym.data.images` decides which files a run uses, `ral_gym.data.listing` finds them, `ral_gym.data.opening` opens
them, and `ral_gym.data.cache` keeps what is decoded here. Nothing in this file imports torch, because every worker
process imports it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing.synchronize import Event
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps

from ral_gym.data.opening import (
    LIMITS,
    Limits,
    close_zip,
    open_image,
    open_zip,
    own_pixel_limit,
    read_file,
    read_zip_entry,
)
from ral_gym.errors import DataError, printable

CHUNK = 32  # images per task: large enough to hide the cost of a task, small enough for a smooth progress bar
WORKERS_FROM_SECONDS = 3.0  # of decoding that is left; below, starting workers takes longer than they save


class Reader(Protocol):
    """Gets an image by its name; it is sent to worker processes before the first call."""

    def __call__(self, name: str, /) -> bytes | np.ndarray | Image.Image:
        """The image with this name, encoded or not; on failure any exception, whose message says why."""

    def close(self) -> None:
        """Called after the last read."""


@dataclass(frozen=True)
class Decoding:
    """Where the files are and how each one becomes a square uint8 image."""

    root: str
    """A folder, a zip file, or the name of another source."""
    crop: int | None
    """Side of the centre crop in source pixels; None: the image's shorter side."""
    image_size: int
    """Side after the resize."""
    grey: bool
    """One channel instead of three."""
    reader: Reader | None = None
    """Reads another kind of source; None: the files of the folder or zip."""
    limits: Limits = LIMITS
    """Size limits."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, S, S)."""
        return (1 if self.grey else 3, self.image_size, self.image_size)


def to_square(image: Image.Image, decoding: Decoding) -> np.ndarray:
    """Orient, centre-crop and resize one opened image.

    Returns:
        (C, S, S) uint8.

    Raises:
        ValueError: The image is smaller than the crop, or its pixels have no known range.
    """
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _from_16_bits(image)
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no stated range; convert it to 8 or 16 bits")
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")  # palettes, alpha, CMYK; not all of them convert to grey directly
    wanted = "L" if decoding.grey else "RGB"
    if image.mode != wanted:
        image = image.convert(wanted)
    width, height = image.size
    side = decoding.crop or min(width, height)
    if min(width, height) < side:
        raise ValueError(f"{width}x{height} pixels are smaller than the crop of {side}")
    left, top = (width - side) // 2, (height - side) // 2
    with own_pixel_limit(decoding.limits):
        image = image.crop((left, top, left + side, top + side))
    # Pillow's Lanczos widens with the reduction, so it is an antialiasing filter.
    image = image.resize((decoding.image_size, decoding.image_size), Image.Resampling.LANCZOS)
    pixels = np.asarray(image).reshape(decoding.image_size, decoding.image_size, -1)  # (S, S, C)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # (C, S, S)


def as_image(data: bytes | np.ndarray | Image.Image, limits: Limits = LIMITS) -> Image.Image:
    """A reader's result (encoded bytes, a Pillow image, or an array) as a Pillow image.

    Args:
        data: an array is uint8, (h, w), (h, w, C) or (C, h, w) with C 1 or 3.
        limits: what is too large.

    Raises:
        PIL.UnidentifiedImageError: bytes in another format than the documented ones.
        ValueError: too large, or an array of another type or shape.
    """
    if isinstance(data, bytes | bytearray | memoryview):
        return open_image(bytes(data), limits)
    if isinstance(data, Image.Image):
        limits.check_pixels(*data.size)
        return data.copy()  # the source keeps its own, and this one is rotated in place
    pixels = np.asarray(data)
    if pixels.dtype != np.uint8:
        raise ValueError(f"an array of {pixels.dtype}: give uint8, from 0 to 255")
    if pixels.ndim == 3 and pixels.shape[-1] not in (1, 3) and pixels.shape[0] in (1, 3):
        pixels = pixels.transpose(1, 2, 0)  # (h, w, C)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]  # (h, w)
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[-1] != 3) or not pixels.size:
        raise ValueError(f"an array of shape {np.shape(data)}: give (h, w), (h, w, C) or (C, h, w) with C 1 or 3")
    limits.check_pixels(pixels.shape[1], pixels.shape[0])
    return Image.fromarray(np.ascontiguousarray(pixels))


def source_side(decoding: Decoding, names: Iterable[str]) -> int | None:
    """Side in source pixels of the square that `to_square` cuts from the first readable one of a few images."""
    with contextlib.closing(Decoder(decoding)) as decoder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in islice(names, CHUNK):
            with contextlib.suppress(Exception), as_image(decoder.reader(name), decoding.limits) as image:
                return decoding.crop or min(image.size)
    return None


def _from_16_bits(image: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits; Pillow's own conversion clips instead of scaling."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit pixels have no stated range; convert it to 8 or 16 bits")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))  # 257 is odd: no ties


class FileReader:
    """Reads files of one folder or zip; a zip is held open, by one handle of this process."""

    def __init__(self, root: str, limits: Limits = LIMITS) -> None:
        self.root, self.limits = root, limits
        self.archive = open_zip(root, limits) if os.path.isfile(root) else None

    def __call__(self, name: str) -> bytes:
        """The content of the file `name`."""
        if self.archive is not None:
            return read_zip_entry(self.archive, name, self.limits)
        return read_file(os.path.join(self.root, name), self.limits)

    def close(self) -> None:
        """Close the zip."""
        if self.archive is not None:
            close_zip(self.archive)


class Decoder:
    """Decodes images of one source."""

    def __init__(self, decoding: Decoding, stop: Event | None = None) -> None:
        self.decoding = decoding
        self.stop = stop
        self.reader: Reader = decoding.reader or FileReader(decoding.root, decoding.limits)

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
        data: Any = None
        try:
            data = self.reader(name)
            with as_image(data, self.decoding.limits) as image:
                return to_square(image, self.decoding)
        except Image.UnidentifiedImageError:
            return "not an image" if data else "empty file"
        except Exception as error:  # damaged files make Pillow's readers raise nearly anything
            # Only what the system says about a file is worth repeating without its path.
            reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
            return printable(reason, 200)


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
    """Delay Ctrl-C while worker processes start, because it would leave them half initialised.

    Workers inherit the signal mask and so ignore it from the start. In this process another thread (of BLAS, of torch)
    may still receive the signal, so the main thread's handler has to wait too.
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
    """Yield the images of `count` files, in order and chunk by chunk; an unusable file gives the reason instead.

    Decoding starts in this process. Workers join if the rest would take long enough and there are CPUs for them:
    starting them takes a second or two, and a database may be open only once in a process.
    """
    rest = iter(names)  # only few names are in memory at a time: there may be millions
    chunks = iter(lambda: list(islice(rest, CHUNK)), [])
    started, done = time.perf_counter(), 0
    useful = workers > 1 and _cpus() > 1 and _can_be_sent(decoding)
    with contextlib.closing(Decoder(decoding)) as decoder:
        for chunk in chunks:
            yield decoder(chunk)
            done += len(chunk)
            left = (count - done) * (time.perf_counter() - started) / done
            if useful and left > WORKERS_FROM_SECONDS:
                break
        else:
            return
    yield from _with_workers(decoding, chunks, workers)


def _cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _can_be_sent(decoding: Decoding) -> bool:
    """Whether the reader, which may be third-party code, can be sent to worker processes."""
    if decoding.reader is None:
        return True
    try:
        pickle.dumps(decoding.reader)
    except Exception:  # a lambda, an open file, anything
        return False
    return True


def _with_workers(
    decoding: Decoding, chunks: Iterator[list[str]], workers: int
) -> Generator[list[np.ndarray | str], None, None]:
    """The images of all chunks, in order, by worker processes."""
    context = multiprocessing.get_context("spawn")  # fork would copy torch's locked threads
    stop = context.Event()
    executor = ProcessPoolExecutor(workers, context, _start_worker, (decoding, stop))
    # Only few chunks are in progress at once, so that decoded images never pile up in front of a slow disk.
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
