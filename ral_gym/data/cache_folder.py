"""The cache of decoded images: a folder with one subfolder per set, `images.npy` and `index.json` in each.

A set's name is a hash of everything that determines its pixels: the files with their sizes and stamps, crop and size,
Pillow's version and this format's. Sets are written atomically (to a temporary folder, then renamed), several processes
may use one folder at once, and a damaged set is made again. `ral-gym cache` lists and empties it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import PIL

from ral_gym.data.files import Decoding
from ral_gym.data.listing import Files
from ral_gym.data.opening import MB
from ral_gym.errors import DataError, printable

logger = logging.getLogger("ral_gym")

FORMAT_VERSION = 2  # of the cache on disk; raise it whenever the same file decodes to other pixels
STALE_SECONDS = 24 * 3600  # an unfinished set this old was left by a killed process
CHUNK_BYTES = 16 * MB
PREFIX = "images-"

Bad = dict[int, str]
"""Number of an unusable file among all -> "name: reason"; in order."""


class Kept(NamedTuple):
    """A decoded set."""

    images: np.ndarray
    """(N, C, S, S) uint8."""
    bad: Bad
    """The files that could not be decoded."""


@dataclass(frozen=True)
class Entry:
    """One set, as `ral-gym cache` shows it."""

    path: Path
    source: str
    images: int
    bytes: int
    used: float
    """When it was last used, in seconds since 1970."""


@dataclass(frozen=True)
class CacheFolder:
    """The folder of all sets."""

    path: Path

    @classmethod
    def of(cls, cache_dir: str | None) -> CacheFolder:
        """The folder that `data.cache_dir` names; None: `~/.cache/ral_gym`."""
        return cls(Path(cache_dir or "~/.cache/ral_gym").expanduser())

    def place_of(self, groups: Sequence[Files], decoding: Decoding) -> Path:
        """Where the set of exactly these files lies, if it is there."""
        return self.path / f"{PREFIX}{cache_key(groups, decoding)}"

    def read(self, final: Path, sizes: Sequence[int], shape: tuple[int, int, int], in_memory: bool) -> Kept | None:
        """A finished set, or None if there is none or it is damaged.

        Args:
            final: its folder.
            sizes: files of every group, all of which it must account for.
            shape: (C, S, S).
            in_memory: read and check it whole; else a read-only memory map.
        """
        if not final.exists():
            return None
        try:
            index = json.loads((final / "index.json").read_text())
            images = np.load(final / "images.npy", mmap_mode="r")  # (N, C, S, S)
            bad = {int(number): str(reason) for number, reason in index["bad"]}
            expected = (sum(sizes) - len(bad), *shape)
            if not all(0 <= number < sum(sizes) for number in bad):
                raise ValueError("it names files that are not there")
            if images.shape != expected or images.dtype != np.uint8:
                raise ValueError(f"shape {images.shape} instead of {expected}")
            if in_memory:
                images = np.array(images)
                if _checksum(images) != index["checksum"]:
                    raise ValueError("its checksum is wrong")
            os.utime(final / "index.json")  # used now
        except FileNotFoundError:  # removed by another process while we looked
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning(
                "The image cache %s is damaged (%s): decoding the images again", printable(final), printable(error)
            )
            return None
        return Kept(images, bad)

    def keep(self, final: Path, kept: Kept, source: str, limit_mb: int) -> Path | None:
        """Write a set that is in memory, if it fits below the limit; returns its folder, or None.

        The least recently used sets are removed to make room. A failure to write only logs a warning.
        """
        if kept.images.nbytes > limit_mb * MB:
            return None
        try:
            self._make_room(kept.images.nbytes, limit_mb * MB)
            with self.writing(final, source, kept.images.shape[1:], kept.images.nbytes) as writer:
                rows = max(1, CHUNK_BYTES // max(1, kept.images[:1].nbytes))
                for start in range(0, len(kept.images), rows):
                    writer.append(kept.images[start : start + rows])
                writer.finish(kept.bad)
        except DataError as error:
            logger.warning("%s; continuing without the cache", error)
            return None
        return final

    @contextlib.contextmanager
    def writing(self, final: Path, source: str, shape: tuple[int, ...], need: int) -> Iterator[_Writer]:
        """Write a set; it exists once the block has ended, and nothing is left if the block raised.

        Raises:
            DataError: the disk is full or the folder cannot be written.
        """
        with disk_errors(self.path, need):
            self.path.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(final, ignore_errors=True)  # damaged, else it had been found
            self._remove_stale()
            if shutil.disk_usage(self.path).free < need:
                raise OSError("no space left")
            temporary = self.path / f"{final.name}.tmp-{uuid.uuid4().hex[:8]}"
            temporary.mkdir()
        try:
            with disk_errors(self.path, need):
                file = open(temporary / "images.npy", "wb")  # noqa: SIM115 (closed below, inside the error handler)
            writer = _Writer(file, temporary, source, shape, need)
            try:
                yield writer
            finally:
                with contextlib.suppress(OSError):  # closing flushes once more
                    file.close()
            with disk_errors(self.path, need):
                _rename_unless_there(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def entries(self) -> list[Entry]:
        """The finished sets, the least recently used one first."""
        found = []
        for path in self.path.glob(f"{PREFIX}*") if self.path.is_dir() else ():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                if ".tmp-" in path.name:
                    continue
                index = json.loads((path / "index.json").read_text())
                used, size = (path / "index.json").stat().st_mtime, (path / "images.npy").stat().st_size
                found.append(Entry(path, str(index["source"]), int(index["count"]), size, used))
        return sorted(found, key=lambda entry: entry.used)

    def clear(self) -> int:
        """Remove all sets, unfinished ones too; returns the number of bytes removed."""
        removed = 0
        for path in list(self.path.glob(f"{PREFIX}*")) if self.path.is_dir() else ():
            removed += sum(file.stat().st_size for file in path.glob("*") if file.is_file())
            shutil.rmtree(path, ignore_errors=True)
        return removed

    def _make_room(self, need: int, limit: int) -> None:
        """Remove the least recently used sets until `need` bytes fit below the limit."""
        entries = self.entries()
        total = sum(entry.bytes for entry in entries)
        for entry in entries:
            if total + need <= limit:
                break
            shutil.rmtree(entry.path, ignore_errors=True)  # a process that has it mapped keeps its pages
            total -= entry.bytes

    def _remove_stale(self) -> None:
        for left in self.path.glob(f"{PREFIX}*.tmp-*"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > STALE_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)


class _Writer:
    """Plain file writes: a full disk raises an error there, while writing to a memory map would kill the process."""

    def __init__(self, file: BinaryIO, folder: Path, source: str, shape: tuple[int, ...], need: int) -> None:
        self.file, self.folder, self.source, self.shape, self.need = file, folder, source, shape, need
        self.count = self.checksum = 0
        with disk_errors(folder.parent, need):
            _write_header(file, (0, *shape))

    def append(self, images: np.ndarray) -> None:
        """Add (n, C, S, S) uint8."""
        data = images.tobytes()
        with disk_errors(self.folder.parent, self.need):
            self.file.write(data)
        self.checksum = zlib.crc32(data, self.checksum)
        self.count += len(images)

    def finish(self, bad: Bad) -> None:
        """Write the index and the final header."""
        with disk_errors(self.folder.parent, self.need):
            self.file.seek(0)
            _write_header(self.file, (self.count, *self.shape))
            self.file.flush()
            os.fsync(self.file.fileno())
            index = {"source": self.source, "count": self.count, "bad": list(bad.items()), "checksum": self.checksum}
            (self.folder / "index.json").write_text(json.dumps(index))


def cache_key(groups: Sequence[Files], decoding: Decoding) -> str:
    """A hash of everything that changes the decoded array: source, crop, size, channels, files and their order."""
    cut = {name: getattr(decoding, name) for name in ("root", "crop", "image_size", "grey")}
    version = [FORMAT_VERSION, PIL.__version__, astuple(decoding.limits)]
    digest = hashlib.sha256(json.dumps([version, cut, list(map(len, groups))]).encode())
    for group in groups:
        for name, size, stamp in group:
            digest.update(f"{name}\0{size}\0{stamp}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()[:20]


def _checksum(images: np.ndarray) -> int:
    return zlib.crc32(images.reshape(-1).data) if images.size else 0


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    """The .npy header; numpy leaves room for the first dimension to grow, so its length does not depend on it."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _rename_unless_there(temporary: Path, final: Path) -> None:
    try:
        os.rename(temporary, final)
    except OSError:
        if not final.exists():  # else another run was faster, and its set is identical
            raise


@contextlib.contextmanager
def disk_errors(folder: Path, need: int) -> Iterator[None]:
    """Turn errors of writing the cache into one that says what can be done."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"Cannot write the image cache in {folder} ({error.strerror or error}; it needs {need / MB:,.1f} MB): "
            "free some space, give another folder as data.cache_dir, or raise data.memory_budget_mb to keep the images "
            "in memory"
        ) from None
