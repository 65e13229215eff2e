"""Stage 0, files to one array: decoded images in memory, or in a cache on disk if there are too many.

`ral_gym.data.images` decides which files are training images and which are held out; here `ral_gym.data.files` decodes
them into one uint8 array, in the given order, so that every part of the split is one slice of it. Images that take long
to decode are kept on disk for the next command; `ral_gym.data.cache_folder` is the cache.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ral_gym.data.cache_folder import Bad, CacheFolder, Kept
from ral_gym.data.files import Decoding, iterate_decoded
from ral_gym.data.listing import Files
from ral_gym.data.opening import MB
from ral_gym.errors import DataError, printable
from ral_gym.runs.progress import progress_bar

KEEP_AFTER_SECONDS = 2.0  # of decoding; less is not worth a file


class Keeping(NamedTuple):
    """Where decoded images are kept; the settings of `DataConfig`."""

    memory_budget_mb: int = 2048
    """A larger array is a read-only memory map of a cache on disk."""
    cache_dir: str | None = None
    """Folder of the cache; None: `~/.cache/ral_gym`."""
    cache_mb: int = 10_240
    """Most MiB of disk for arrays that fit into memory, all together."""
    cacheable: bool = True
    """Whether the files' sizes and stamps reveal changed images."""


class DecodedImages(NamedTuple):
    """`images` holds the usable images of all groups in order; group g has `counts[g]` of them."""

    images: np.ndarray
    """(N, C, S, S) uint8."""
    counts: list[int]
    """Usable images of every group."""
    skipped: list[str]
    """The others, as "name: reason"."""
    kept: list[np.ndarray]
    """Which files of every group are usable, (n_g,) bool each."""
    cache: Path | None
    """Where the images are on disk, or None."""


def decode_groups(
    groups: Sequence[Files], decoding: Decoding, keeping: Keeping, workers: int, progress: bool
) -> DecodedImages:
    """Decode groups of files into one array, where each group is one contiguous slice.

    Args:
        groups: Files, in the order wanted.
        decoding: Where they are and how they are cut.
        keeping: What is kept in memory and what on disk.
        workers: Processes that decode.
        progress: Show a bar.

    Raises:
        DataError: No file could be used, or a cache that is needed cannot be written.
    """
    sizes = list(map(len, groups))
    need = sum(sizes) * int(np.prod(decoding.shape))
    folder = CacheFolder.of(keeping.cache_dir)
    too_many = need > keeping.memory_budget_mb * MB
    if too_many and not keeping.cacheable:
        raise DataError(
            f"The images of {decoding.root} take {need / MB:,.0f} MiB, more than data.memory_budget_mb "
            f"{keeping.memory_budget_mb}: raise it, or give the source a `stamp` that changes when its images do, so "
            "that they can be cached on disk"
        )
    use_disk = too_many or (keeping.cacheable and keeping.cache_mb > 0)
    final = folder.place_of(groups, decoding) if use_disk else None
    found = folder.read(final, sizes, decoding.shape, in_memory=not too_many) if final is not None else None
    if found is None and final is not None and too_many:
        found = _decode_to_cache(folder, final, groups, decoding, need, workers, progress)
    if found is not None:
        return _result(found.images, sizes, found.bad, final)
    started = time.monotonic()
    images, bad = _decode_to_memory(groups, decoding, workers, progress)
    where = None
    if final is not None and time.monotonic() - started > KEEP_AFTER_SECONDS:
        where = folder.keep(final, Kept(images, bad), decoding.root, keeping.cache_mb)
    return _result(images, sizes, bad, where)


def _result(images: np.ndarray, sizes: Sequence[int], bad: Bad, where: Path | None) -> DecodedImages:
    usable = np.ones(sum(sizes), bool)
    usable[list(bad)] = False
    kept = np.split(usable, np.cumsum(sizes)[:-1])
    return DecodedImages(images, [int(part.sum()) for part in kept], list(bad.values()), kept, where)


def _decode_to_memory(
    groups: Sequence[Files], decoding: Decoding, workers: int, progress: bool
) -> tuple[np.ndarray, Bad]:
    images = np.empty((sum(map(len, groups)), *decoding.shape), np.uint8)  # (N, C, S, S)
    filled = 0

    def append(chunk: np.ndarray) -> None:
        nonlocal filled
        images[filled : filled + len(chunk)] = chunk
        filled += len(chunk)

    bad = _decode_into(append, groups, decoding, workers, progress)
    return images[:filled], bad


def _decode_into(
    append: Callable[[np.ndarray], None], groups: Sequence[Files], decoding: Decoding, workers: int, progress: bool
) -> Bad:
    """Hand all usable images to `append` in chunks of (n, C, S, S); the others, by their numbers, with the reason."""
    total = sum(map(len, groups))
    names = (file.name for group in groups for file in group)
    reported = enumerate(file.name for group in groups for file in group)
    bad: Bad = {}
    bar = progress_bar(total=total, desc="decoding images", unit="img", disable=not progress, delay=0.5)
    # An error in `append` must stop the workers here and now, not when the generator is collected.
    with bar, contextlib.closing(iterate_decoded(decoding, names, total, workers)) as chunks:
        for results in chunks:
            for result in results:
                number, name = next(reported)
                if isinstance(result, str):
                    bad[number] = f"{printable(name)}: {result}"
            good = [result for result in results if not isinstance(result, str)]
            if good:
                append(np.stack(good))
            bar.update(len(results))
    if len(bad) == total:
        raise DataError(
            f"None of the {total} images in {decoding.root} could be used; the first: {next(iter(bad.values()))}; "
            "give other images, or change data.crop"
        )
    return bad


def _decode_to_cache(
    folder: CacheFolder,
    final: Path,
    groups: Sequence[Files],
    decoding: Decoding,
    need: int,
    workers: int,
    progress: bool,
) -> Kept:
    """Decode to disk, chunk by chunk, and return a memory map."""
    with folder.writing(final, decoding.root, decoding.shape, need) as writer:
        writer.finish(_decode_into(writer.append, groups, decoding, workers, progress))
    found = folder.read(final, list(map(len, groups)), decoding.shape, in_memory=False)
    if found is None:
        raise DataError(f"The image cache {final} cannot be read back: give another folder as data.cache_dir")
    return found
