"""Stage 0, data sources: their interface, and how one is found by its name.

``--data NAME:ARGUMENT`` calls the part that is registered as NAME (`ral_gym.registry.SOURCES`) with the argument. It
returns the items, a function that reads one, and optionally labels::

    @SOURCES.register("npy")
    class Array:
        def __init__(self, path):
            self.images = np.load(path, mmap_mode="r")
            self.items = range(len(self.images))

        def read(self, item):
            return self.images[item]

Split, crop, cache and the report of skipped images are the same for every source. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image

from ral_gym.config.models import NO_IMAGES
from ral_gym.data.files import Reader
from ral_gym.data.labels import held_out_rows
from ral_gym.data.listing import Files, ImageFile
from ral_gym.data.opening import LIMITS, Limits, check_regular
from ral_gym.errors import DataError, RalGymError, printable
from ral_gym.registry import SOURCES, is_path

TEST_SHARE, TEST_LIMIT = 0.05, 10_000  # for sources without an own split
KNOWN = (
    "faces, emoji, celeba:PATH (a folder or zip of img_align_celeba), folder:PATH, lsun:PATH (an LMDB folder) or "
    "hf:NAME[:SPLIT] (a Hugging Face dataset)"
)


class Split(NamedTuple):
    """Which images are trained on and which are held out, as sorted row numbers of `Source.files`."""

    train: np.ndarray
    """(N,) int64."""
    test: np.ndarray
    """(M,) int64: held-out images."""
    new_people: np.ndarray | None
    """(P,) int64: images of held-out people, if the source knows who is on an image."""
    words: str
    """How they were chosen."""


class Source:
    """Images before they are decoded and split; whatever a part of `SOURCES` returns is converted to one.

    Args:
        files: the images, in order.
        root: where they come from, for messages and the cache.
        title: the beginning of the description.
        reader: gets the image of a file's name; None: the files of the folder or zip `root`.
        labels: (N,) the class of every file, from 0; None: unknown.
        classes: the names of the classes.
        skipped: files that cannot be used, each as "path: reason".
        cacheable: whether sizes and stamps reveal changed images, so that decoded ones may be cached.
    """

    argument: ClassVar[str] = "ARGUMENT"
    """The argument after the colon, for messages."""
    crop: int | None = None
    """Side of the centre crop in source pixels; None: the shorter side. `data.crop` overrides it."""
    grey: bool = False
    """Whether all images are grey."""

    def __init__(
        self,
        files: Files,
        *,
        root: Path | str,
        title: str,
        reader: Reader | None = None,
        labels: Sequence[int] | np.ndarray | None = None,
        classes: Sequence[str] = (),
        skipped: Sequence[str] = (),
        cacheable: bool = True,
    ) -> None:
        self.files, self.root, self.title, self.reader = files, str(root), title, reader
        self.labels = None if labels is None else _labels(labels, len(files), title)
        self.classes, self.skipped, self.cacheable = tuple(classes), tuple(skipped), cacheable

    def split(self, seed: int) -> Split:
        """Which images are held out: a seeded random share, unless a source overrides it."""
        return random_split(np.arange(len(self.files)), seed, self.labels)


def random_split(rows: np.ndarray, seed: int, labels: np.ndarray | None = None) -> Split:
    """Hold out a seeded share, at least one if there are two images; both parts keep their order.

    With labels (N,) of the rows each class is held out by its share.
    """
    count = len(rows)
    n_test = min(TEST_LIMIT, max(1, round(TEST_SHARE * count))) if count > 1 else 0
    words = "a random sample" if n_test == TEST_LIMIT else f"a random {TEST_SHARE:.0%}"
    if labels is not None:
        held_out, words = held_out_rows(labels, n_test, seed), f"{words} of each class"
        return Split(rows[~held_out], rows[held_out], None, words)
    held_out = np.zeros(count, bool)
    held_out[np.random.default_rng(seed).permutation(count)[:n_test]] = True
    return Split(rows[~held_out], rows[held_out], None, words)


class Entries:
    """Rows of a database as `ImageFile`s that are created on access: millions cost some MB, not GB.

    Args:
        name_of: the name of a row of the database.
        rows: (N,) int64, which of its rows these are, in order.
        size, stamp: of every file; they must change when the database does.
    """

    def __init__(self, name_of: Callable[[int], str], rows: np.ndarray, size: int, stamp: int) -> None:
        self.name_of, self.rows, self.size, self.stamp = name_of, rows, size, stamp

    def __len__(self) -> int:
        """N."""
        return len(self.rows)

    def __iter__(self) -> Iterator[ImageFile]:
        """Create one `ImageFile` after the other."""
        return (ImageFile(self.name_of(int(row)), self.size, self.stamp) for row in self.rows)

    def take(self, indices: np.ndarray) -> Entries:
        """Some of these entries, in the order of `indices`."""
        return Entries(self.name_of, self.rows[indices], self.size, self.stamp)


def take(files: Files, indices: np.ndarray) -> Files:
    """Some files, in the order of `indices`."""
    if isinstance(files, Entries):
        return files.take(indices)
    listed = files if isinstance(files, list) else list(files)
    return [listed[index] for index in indices.tolist()]


# By name ------------------------------------------------------------------------------------------------------------


def split_source(source: str) -> tuple[str, str]:
    """``NAME:ARGUMENT`` or ``module:Class:ARGUMENT`` -> name and argument, which may be empty.

    Raises:
        DataError: not the name of a data source.
        ConfigError: a ``module:Class`` that only a file names.
    """
    name, _, argument = source.partition(":")
    if name in SOURCES:
        return name, argument.strip()
    module, _, rest = source.partition(":")
    attribute, _, argument = rest.partition(":")
    path = f"{module}:{attribute}"
    if is_path(path) and (path in SOURCES or not os.path.exists(rest)):
        SOURCES.check(path)
        return path, argument.strip()
    hint = f"; is folder:{source} meant?" if source and "\0" not in source and os.path.exists(source) else ""
    more = [known for known in SOURCES if known not in ("faces", "emoji", "celeba", "folder", "lsun", "hf")]
    others = f", {', '.join(more)}" if more else ""
    raise DataError(f"Unknown data source {source!r}: give {KNOWN}{others}, or your own as module:Class:ARGUMENT{hint}")


def source_part(source: str) -> Any:
    """The part of `SOURCES` that a setting ``data.source`` names; not called, so no images are searched for.

    Raises:
        DataError, ConfigError: there is none, or it may not be imported.
    """
    return SOURCES.get(split_source(source)[0])


def open_source(source: str, progress: bool = False, limits: Limits = LIMITS) -> Source:
    """Find the images that ``data.source`` names.

    Args:
        source: ``NAME:ARGUMENT``.
        progress: whether to show progress bars; passed to parts that take it.
        limits: size limits; passed to parts that take it.

    Raises:
        DataError: the source is unknown, missing, empty or unusable.
    """
    name, argument = split_source(source)
    if source == NO_IMAGES:
        raise DataError("data.source is none: this run has no images; import the checkpoint again with --data")
    part = SOURCES.get(name)
    given = {"progress": progress, "limits": limits}
    try:
        taken = inspect.signature(part).parameters
    except (TypeError, ValueError):
        raise DataError(f"data source {name!r} is not a function or class") from None
    options = {key: value for key, value in given.items() if key in taken}
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for key, p in taken.items() if key not in options and p.kind in by_position]
    if argument and not needed:
        raise DataError(f"data source {source!r}: {name} takes no argument after a colon; write {name}")
    if not argument and needed and needed[0].default is inspect.Parameter.empty:
        wanted = getattr(part, "argument", needed[0].name.upper())
        raise DataError(f"Data source {source!r} names no images: write {name}:{wanted}")
    try:
        found = part(*([argument] if argument else []), **options)
        return found if isinstance(found, Source) else _adopted(found, name, argument, part, limits)
    except RalGymError:
        raise
    except Exception as error:  # third-party code may raise anything
        if getattr(part, "__module__", "").startswith("ral_gym."):
            raise
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise DataError(f"data source {source!r} failed: {type(error).__name__}: {reason}") from error


def existing_path(text: str, kind: str) -> Path:
    """The path that ``kind:text`` names, of a regular file or a folder; links are not resolved.

    Raises:
        DataError: there is none, or it is a FIFO, a device or a socket.
    """
    path = Path(os.path.abspath(Path(text).expanduser())) if "\0" not in text else None
    try:
        if path is None or not path.exists():
            where = text if path is None else path
            raise DataError(f"{where} of data source {f'{kind}:{text}'!r} does not exist: give a path that does")
        if not path.is_dir():
            check_regular(path.stat().st_mode)
    except ValueError as error:
        raise DataError(f"{path} is {error}: give a folder or a file of images") from None
    except OSError as error:
        raise DataError(f"{printable(text)} cannot be read ({error.strerror or error}): give another path") from None
    return path


def require_images(files: Sequence[ImageFile], unreadable: Sequence[str], root: Path) -> None:
    """Raise `DataError` if there are none."""
    if not files:
        reason = f" ({unreadable[0]})" if unreadable else ""
        raise DataError(
            f"No images in {root}{reason}: give a folder that holds png, jpg, webp, bmp, pgm, ppm, tif or gif files"
        )


# Sources of your own ------------------------------------------------------------------------------------------------


class ItemReader:
    """Reads by the name of an item; sent to worker processes with the function and the items."""

    def __init__(self, read: Callable[[Any], Any], items: Sequence[Any]) -> None:
        self._read, self._items = read, items
        self._rows: dict[str, int] | None = None

    def __call__(self, name: str) -> bytes | np.ndarray | Image.Image:
        """The image of the item called `name`."""
        if self._rows is None:
            self._rows = {str(item): row for row, item in enumerate(self._items)}
        return self._read(self._items[self._rows[name]])

    def close(self) -> None:
        """Nothing to close: the source keeps its own files open."""


def _adopted(found: Any, name: str, argument: str, part: Any, limits: Limits) -> Source:
    """A third-party part's result as a `Source`: (items, read), (items, read, labels) or an object with these."""
    if isinstance(found, tuple) and len(found) in (2, 3):
        (items, read), labels = found[:2], found[2] if len(found) == 3 else None
    elif hasattr(found, "items") and hasattr(found, "read"):
        items, read, labels = found.items, found.read, getattr(found, "labels", None)
        items = items() if callable(items) else items
    else:
        raise DataError(
            f"data source {name!r} gave a {type(found).__name__}: give (items, read), (items, read, labels), or an "
            "object with `items` and `read`"
        )
    if not callable(read) or not isinstance(items, Iterable):
        raise DataError(f"data source {name!r}: its items must be a list, and `read` a function of one item")
    items = items if isinstance(items, range) else list(items)
    if not items:
        raise DataError(f"data source {name!r} has no images{f' in {argument}' if argument else ''}")
    if len(items) > limits.max_files:
        raise DataError(f"data source {name!r} has more than {limits.max_files:,} items: raise data.max_files")
    stamp = _stamp(getattr(found, "stamp", None), argument, part)
    files = [ImageFile(str(item), 0, stamp or 0) for item in items]
    if len({file.name for file in files}) < len(files):
        raise DataError(f"data source {name!r} has two items of one name: their texts must differ")
    source = Source(
        files,
        root=f"{name}:{argument}" if argument else name,
        title=str(getattr(found, "title", "") or f"Images of {name}" + (f" from {argument}" if argument else "")),
        reader=ItemReader(read, items),
        labels=labels,
        classes=getattr(found, "classes", ()),
        cacheable=stamp is not None,
    )
    source.crop, source.grey = getattr(found, "crop", None), bool(getattr(found, "grey", False))
    return source


def _stamp(stated: Any, argument: str, part: Any) -> int | None:
    """A number that changes when the images may have changed: from the source's stamp or its file; None: unknown."""
    if stated is None:
        path = os.path.expanduser(argument)
        if not argument or "\0" in argument or not os.path.isfile(path):
            return None
        status = os.stat(path)
        stated = (status.st_size, status.st_mtime_ns)
    return int.from_bytes(hashlib.sha256(repr((stated, _code_stamp(part))).encode()).digest()[:7], "big")


def _code_stamp(part: Any) -> Any:
    """A value that changes with the file of a part's code."""
    try:
        status = os.stat(inspect.getfile(part))
    except (OSError, TypeError):
        return None
    return status.st_size, status.st_mtime_ns


def _labels(labels: Sequence[int] | np.ndarray, count: int, title: str) -> np.ndarray:
    """(N,) int64.

    Raises:
        DataError: the numbers of labels and images differ, or a label is not an integer of 0 or more.
    """
    values = np.asarray(labels)
    if values.shape != (count,) or values.dtype.kind not in "iu" or (count and values.min() < 0):
        raise DataError(
            f"{title}: its labels have shape {values.shape} and type {values.dtype}; give one integer from 0 for each "
            f"of the {count:,} images"
        )
    return values.astype(np.int64)


def folder_labels(files: Sequence[ImageFile]) -> tuple[array[int], list[str]] | None:
    """The first folder of every path as its class, where each image lies in one and there are two or more."""
    folders = [file.name.partition("/") for file in files]
    if not all(rest for _, _, rest in folders):
        return None
    classes = sorted({folder for folder, _, _ in folders})
    if len(classes) < 2:
        return None
    numbers = {name: number for number, name in enumerate(classes)}
    return array("q", (numbers[folder] for folder, _, _ in folders)), classes
