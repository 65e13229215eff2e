"""Stage 0, files to one array: decoded images in memory, or in a cache on disk where they are too many.

`ral_gym.data.images` decides which files are training images and which are held out; this file has them decoded by
`ral_gym.data.files` into one uint8 array, in the order given, so that every part of the split is one slice of it.
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from ral_gym.data.files import Decoding, Files, iterate_decoded
from ral_gym.errors import DataError

logger = logging.getLogger("ral_gym")

FORMAT_VERSION = 1  # of the cache on disk; raise it whenever the same file would be decoded to other pixels
STALE_SECONDS = 24 * 3600  # an unfinished cache this old was left by a killed process


class DecodedImages(NamedTuple):
    """`images` holds the usable images of all groups in order; group g has `counts[g]` of them."""

    images: np.ndarray  # (N, C, S, S) uint8
    counts: list[int]
    skipped: list[str]


def decode_groups(
    groups: Sequence[Files],
    decoding: Decoding,
    memory_budget_mb: int,
    cache_dir: str | None,
    workers: int,
    progress: bool,
) -> DecodedImages:
    """Decode groups of files into one array, where each group is one contiguous slice.

    Args:
        groups: Files, in the order wanted.
        decoding: Where they are and how they are cut.
        memory_budget_mb: A larger array is a read-only memory map of a cache on disk, which later calls re-use.
        cache_dir: Folder of the cache; None: `~/.cache/ral_gym`.
        workers: Processes that decode.
        progress: Show a bar.

    Raises:
        DataError: No file could be used, or the cache cannot be written.
    """
    shape = (sum(map(len, groups)), *decoding.shape)
    need = int(np.prod(shape))
    if need > memory_budget_mb * 2**20:
        folder = Path(cache_dir or "~/.cache/ral_gym").expanduser()
        return _decode_to_cache(groups, decoding, folder, need, workers, progress)
    images = np.empty(shape, np.uint8)  # (N, C, S, S)
    filled = 0

    def append(chunk: np.ndarray) -> None:
        nonlocal filled
        images[filled : filled + len(chunk)] = chunk
        filled += len(chunk)

    counts, skipped = _decode_into(append, groups, decoding, workers, progress)
    return DecodedImages(images[:filled], counts, skipped)


def _decode_into(
    append: Callable[[np.ndarray], None],
    groups: Sequence[Files],
    decoding: Decoding,
    workers: int,
    progress: bool,
) -> tuple[list[int], list[str]]:
    """Hand all usable images to `append` in chunks of (n, C, S, S), and return the groups' counts and the skipped."""
    total = sum(map(len, groups))
    names = (file.name for group in groups for file in group)
    reported = ((file.name, index) for index, group in enumerate(groups) for file in group)
    counts, skipped = [0] * len(groups), []
    bar = tqdm(total=total, desc="decoding images", unit="img", disable=not progress, delay=0.5)
    # An error in `append` must stop the workers here and now, not when the generator is collected.
    with bar, contextlib.closing(iterate_decoded(decoding, names, total, workers)) as chunks:
        for results in chunks:
            for result in results:
                name, group = next(reported)
                if isinstance(result, str):
                    skipped.append(f"{name}: {result}")
                else:
                    counts[group] += 1
            good = [result for result in results if not isinstance(result, str)]
            if good:
                append(np.stack(good))
            bar.update(len(results))
    if not sum(counts):
        raise DataError(
            f"None of the {total} images in {decoding.root} could be used; the first: {skipped[0]}; "
            "give other images, or change data.crop"
        )
    return counts, skipped


def cache_key(groups: Sequence[Files], decoding: Decoding) -> str:
    """A hash that differs where the decoded array would: source, crop, size, channels, files and their order."""
    cut = {name: getattr(decoding, name) for name in ("root", "crop", "image_size", "grey")}
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, cut, list(map(len, groups))]).encode())
    for group in groups:
        for file in group:
            digest.update(f"{file.name}\0{file.size}\0{file.stamp}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()[:20]


def _decode_to_cache(
    groups: Sequence[Files], decoding: Decoding, folder: Path, need: int, workers: int, progress: bool
) -> DecodedImages:
    """Use the cache for exactly these files, or write it: a folder with `images.npy` and `index.json`."""
    final = folder / f"images-{cache_key(groups, decoding)}"
    found = _read_cache(final, decoding.shape)
    if found is not None:
        return found
    with _disk_errors(folder, need):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(final, ignore_errors=True)  # damaged, else it had been found
        _remove_stale(folder, final.name)
        if shutil.disk_usage(folder).free < need:
            raise OSError("no space left")
        temporary = folder / f"{final.name}.tmp-{uuid.uuid4().hex[:8]}"
        temporary.mkdir()
    try:
        _write_cache(temporary, groups, decoding, need, workers, progress)
        with _disk_errors(folder, need):
            _rename_unless_there(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    found = _read_cache(final, decoding.shape)
    if found is None:
        raise DataError(f"The image cache {final} cannot be read back: give another folder as data.cache_dir")
    return found


def _write_cache(
    temporary: Path,
    groups: Sequence[Files],
    decoding: Decoding,
    need: int,
    workers: int,
    progress: bool,
) -> None:
    """Decode to plain file writes: a full disk is an error there, while writing to a memory map would kill us."""
    with _disk_errors(temporary.parent, need):
        file = open(temporary / "images.npy", "wb")  # noqa: SIM115 (closed below, inside the error handler)

    def append(chunk: np.ndarray) -> None:
        with _disk_errors(temporary.parent, need):
            file.write(chunk.tobytes())

    try:
        with _disk_errors(temporary.parent, need):
            _write_header(file, (0, *decoding.shape))
        counts, skipped = _decode_into(append, groups, decoding, workers, progress)
        with _disk_errors(temporary.parent, need):
            file.seek(0)
            _write_header(file, (sum(counts), *decoding.shape))
            file.flush()
            os.fsync(file.fileno())
            index = {"source": decoding.root, "counts": counts, "skipped": skipped}
            (temporary / "index.json").write_text(json.dumps(index))
    finally:
        with contextlib.suppress(OSError):  # closing flushes once more
            file.close()


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    """The .npy header; numpy leaves room for the first dimension to grow, so its length does not depend on it."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _read_cache(final: Path, shape: tuple[int, int, int]) -> DecodedImages | None:
    """The finished cache as a read-only memory map, or None where there is none or it is damaged."""
    if not final.exists():
        return None
    try:
        index = json.loads((final / "index.json").read_text())
        images = np.load(final / "images.npy", mmap_mode="r")  # (N, C, S, S)
        counts, skipped = list(index["counts"]), list(index["skipped"])
        if images.shape != (sum(counts), *shape) or images.dtype != np.uint8:
            raise ValueError(f"shape {images.shape} instead of {(sum(counts), *shape)}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("The image cache %s is damaged (%s): decoding the images again", final, error)
        return None
    return DecodedImages(images, counts, skipped)


def _rename_unless_there(temporary: Path, final: Path) -> None:
    try:
        os.rename(temporary, final)
    except OSError:
        if not final.exists():  # else another run was faster, and its cache is as good
            raise


def _remove_stale(folder: Path, name: str) -> None:
    for left in folder.glob(f"{name}.tmp-*"):
        if time.time() - left.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _disk_errors(folder: Path, need: int) -> Iterator[None]:
    """Tell what can be done where the cache cannot be written."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"Cannot write the image cache in {folder} ({error.strerror or error}; it needs {need / 2**20:,.1f} MB): "
            "free some space, give another folder as data.cache_dir, or raise data.memory_budget_mb to keep the images "
            "in memory"
        ) from None
