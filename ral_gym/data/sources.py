"""Stage 0, images stored in databases instead of files: LSUN's LMDB folders and Hugging Face datasets.

Each of the two lists its images as `Entries`, whose names are made on access, and has a reader that every worker
process opens for itself; images then go through `ral_gym.data.files` and `ral_gym.data.cache` like all others. Their
libraries are optional and imported on use. Nothing in this file imports torch.
"""

from __future__ import annotations

import contextlib
import logging
import os
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from ral_gym.data.base import Entries, Source, existing_path
from ral_gym.data.opening import LIMITS, Limits, check_regular, open_image, read_file
from ral_gym.errors import DataError, printable

TRIED = 16  # entries of an LMDB of which one must be an image: any may be damaged


# LSUN ---------------------------------------------------------------------------------------------------------------


class Lsun(Source):
    """One category of LSUN (Yu et al., 2015); the images' shorter side is 256 pixels there.

    Args:
        path: the LMDB folder, or the `data.mdb` in it.
        limits: what is too large.
    """

    argument = "PATH"

    def __init__(self, path: str, limits: Limits = LIMITS) -> None:
        folder, entries = list_lsun(existing_path(path, "lsun"), limits)
        title = f"LSUN (Yu et al., 2015) from {folder}"
        super().__init__(entries, root=folder, title=title, reader=LsunReader(str(folder)))


class LsunReader:
    """Reads encoded images of an LMDB by key; opened at the first read, so that it can be sent to a process."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.environment: Any = None

    def __call__(self, name: str) -> bytes:
        """The encoded image under the key `name`."""
        if self.environment is None:
            self.environment = open_lmdb(self.folder)
        with self.environment.begin() as transaction:
            value = transaction.get(name.encode("latin-1"))
        if value is None:
            raise ValueError("it is no longer in the database")
        return value

    def close(self) -> None:
        """Close the database; a process may have it open only once."""
        if self.environment is not None:
            self.environment.close()
            self.environment = None


def list_lsun(path: Path, limits: Limits = LIMITS) -> tuple[Path, Entries]:
    """The images of one LSUN category.

    Args:
        path: the folder that LSUN's zip unpacks to, `bedroom_train_lmdb` for example, or the `data.mdb` in it.
        limits: how many entries there may be.

    Returns:
        The folder, and its images in the order of their keys (about 50 bytes of memory each).

    Raises:
        DataError: the package lmdb is missing, or this is no LMDB, a damaged or empty one, or not one of images.
    """
    folder = path.parent if path.name == "data.mdb" else path
    data = folder / "data.mdb"
    if not data.is_file():
        inside = sorted(place.parent.name for place in folder.glob("*/data.mdb"))
        hint = f"one of its folders {', '.join(inside[:5])}" if inside else "the folder that LSUN's zip unpacks to"
        raise DataError(f"{path} holds no data.mdb, so it is not an LMDB: give {hint} (such as bedroom_train_lmdb)")
    status = data.stat()
    environment = open_lmdb(str(folder))
    try:
        _check_whole(environment, data, status.st_size)
        with environment.begin() as transaction:
            _check_images(transaction, folder)
            keys, ends = bytearray(), array("Q", [0])
            for key in transaction.cursor().iternext(values=False):
                keys += key
                ends.append(len(keys))
                if len(ends) > limits.max_files:
                    raise DataError(f"{folder} holds more than {limits.max_files:,} images: raise data.max_files")
    except _lmdb().Error as error:
        raise DataError(f"{folder} is a damaged LMDB ({error}): download it again") from None
    finally:
        environment.close()

    def name_of(row: int) -> str:
        return keys[ends[row] : ends[row + 1]].decode("latin-1")  # any bytes, and back again

    return folder, Entries(name_of, np.arange(len(ends) - 1), status.st_size, status.st_mtime_ns)


def open_lmdb(folder: str) -> Any:
    """Open an LMDB for reading; raises `DataError` if that is impossible."""
    lmdb = _lmdb()
    try:
        return lmdb.open(folder, readonly=True, lock=False, readahead=False, create=False)
    except (lmdb.Error, OSError) as error:
        if "already open" in str(error):
            raise DataError(f"{folder} is open already in this process: close that environment first") from None
        raise DataError(f"{folder} is not a readable LMDB ({error}): download it again") from None


def _lmdb() -> Any:
    try:
        import lmdb
    except ImportError:
        raise DataError(
            'The data source lsun needs the package lmdb, which is not installed: pip install "ral-gym[lsun]"'
        ) from None
    return lmdb


def _check_whole(environment: Any, data: Path, size: int) -> None:
    """Refuse a file that ends early: reading a memory map beyond its end kills the process."""
    need = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if size < need:
        raise DataError(f"{data} is cut off ({size:,} of {need:,} bytes): download or unpack it again")


def _check_images(transaction: Any, folder: Path) -> None:
    """One of the first entries must be an image, as all of LSUN's are."""
    tried = 0
    for _, value in transaction.cursor().iternext():
        with contextlib.suppress(Exception), open_image(value):  # Pillow's readers raise nearly anything
            return
        tried += 1
        if tried == TRIED:
            break
    if not tried:
        raise DataError(f"{folder} is an empty LMDB: give the folder that LSUN's zip unpacks to")
    raise DataError(
        f"{folder} is an LMDB, but not LSUN's: none of its first {tried} entries is an encoded image; "
        "give the folder that LSUN's zip unpacks to"
    )


# Hugging Face -------------------------------------------------------------------------------------------------------


class HuggingFace(Source):
    """One split of a Hugging Face dataset, with the classes of its first ClassLabel column.

    Args:
        text: NAME or NAME:SPLIT; see `list_huggingface`.
        progress: let the library show its progress bars.
        limits: what is too large.
    """

    argument = "NAME"

    def __init__(self, text: str, progress: bool = False, limits: Limits = LIMITS) -> None:
        name, entries, reader = list_huggingface(text, progress, limits)
        labels, classes = _class_labels(reader.dataset)
        title = f"Hugging Face dataset {printable(name)}"
        super().__init__(entries, root=name, title=title, reader=reader, labels=labels, classes=classes)


def _class_labels(dataset: Any) -> tuple[np.ndarray | None, list[str]]:
    """The ClassLabel column `label`, or the first one, as integers, and its names; None and [] if there is none."""
    kind = _datasets().ClassLabel
    columns = [name for name, feature in dataset.features.items() if isinstance(feature, kind)]
    column = "label" if "label" in columns else next(iter(columns), None)
    if column is None:
        return None, []
    labels = np.array(dataset.select_columns(column).with_format("numpy")[:][column])
    if labels.dtype.kind not in "iu" or labels.min() < 0:
        return None, []
    return labels, list(dataset.features[column].names)


class HuggingFaceReader:
    """Reads encoded images of a dataset by row; the dataset is a memory map of files, and is sent as their names."""

    def __init__(self, dataset: Any, column: str, limits: Limits = LIMITS) -> None:
        self.dataset, self.column, self.limits = dataset, column, limits

    def __call__(self, name: str) -> bytes:
        """The encoded image of the row `name`."""
        value = self.dataset[int(name.removeprefix("row "))][self.column]
        if value is None or (value["bytes"] is None and value["path"] is None):
            raise ValueError("no image in this row")
        if value["bytes"] is None:
            return read_file(value["path"], self.limits)
        self.limits.check_size(len(value["bytes"]))
        return value["bytes"]

    def close(self) -> None:
        """Nothing to close."""


def list_huggingface(text: str, progress: bool, limits: Limits = LIMITS) -> tuple[str, Entries, HuggingFaceReader]:
    """The images of a Hugging Face dataset.

    Args:
        text: NAME or NAME:SPLIT. NAME is a dataset's name on the hub, or a path: a folder written by `save_to_disk`, a
            folder of parquet or image files, or one parquet file. SPLIT is `train` unless given.
        progress: let the library show its progress bars.
        limits: what is too large.

    Returns:
        A description (name, split and column), the rows, and their reader. The image column is the one called image or
        img, else the first that holds images.

    Raises:
        DataError: the package datasets is missing, the dataset cannot be loaded, or it has no images.
    """
    name, split = _name_and_split(text)
    datasets = _datasets()
    _check_files(name, limits)
    dataset = _load_dataset(name, split, progress)
    split = split or "train"
    columns = [column for column, kind in dataset.features.items() if isinstance(kind, datasets.Image)]
    if not columns:
        raise DataError(
            f"{name} has no column of images among {', '.join(dataset.features) or 'its columns'}: give a dataset "
            "that has one (the Image feature)"
        )
    if not len(dataset):
        raise DataError(f"The split {split!r} of {name} is empty: give another one as hf:NAME:SPLIT")
    column = next((wanted for wanted in ("image", "img") if wanted in columns), columns[0])
    reader = HuggingFaceReader(dataset.cast_column(column, datasets.Image(decode=False)), column, limits)
    stamp = int.from_bytes(str(dataset._fingerprint).encode(), "big")  # the library's own hash of the content
    return f"{name} ({split}, column {column})", Entries(_row_name, np.arange(len(dataset)), 0, stamp), reader


def _check_files(name: str, limits: Limits) -> None:
    """Refuse a folder that holds a FIFO, a device or a socket: the library would open it and block."""
    seen = 0
    for folder, _, files in os.walk(name) if os.path.isdir(name) else [(os.path.dirname(name), [], [name])]:
        for file in files:
            path = os.path.join(folder, file)
            try:
                check_regular(os.stat(path).st_mode)
            except ValueError as error:
                raise DataError(f"{path} is {error}: remove it from the dataset's folder") from None
            except OSError:  # a broken link, or a name on the hub
                continue
            seen += 1
        if seen > limits.max_files:
            raise DataError(f"{name} holds more than {limits.max_files:,} files: raise data.max_files")


def _row_name(row: int) -> str:
    return f"row {row}"


def _name_and_split(text: str) -> tuple[str, str | None]:
    """Split NAME:SPLIT; a path, and a split such as `train[:10%]`, may hold colons too."""
    parts = text.split(":")
    for end in range(len(parts), 0, -1):
        path = os.path.expanduser(":".join(parts[:end]))
        if os.path.exists(path):
            return os.path.abspath(path), ":".join(parts[end:]) or None
    name, _, rest = text.partition(":")
    return name, rest or None


def _load_dataset(name: str, split: str | None, progress: bool) -> Any:
    """Load one split, whatever kind of dataset `name` is."""
    if not os.path.exists(name) and (os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1):
        raise DataError(f"{name} of data source 'hf:{name}' does not exist: give a path that does, or a hub name")
    if split and os.path.isfile(os.path.join(name, "state.json")):
        raise DataError(f"{name} is one saved dataset, it has no split {split!r}: write hf:{name}")
    datasets = _datasets()
    hidden = not progress and not datasets.are_progress_bars_disabled()
    if hidden:
        datasets.disable_progress_bars()
    library = logging.getLogger("datasets")
    level = library.level
    library.setLevel(logging.CRITICAL)  # it says on the terminal what it also raises, and quotes the files as they are
    try:
        if os.path.isfile(os.path.join(name, "dataset_dict.json")):
            return datasets.load_from_disk(os.path.join(name, split or "train"))
        if os.path.isfile(os.path.join(name, "state.json")):
            return datasets.load_from_disk(name)
        if os.path.isfile(name):
            return datasets.load_dataset("parquet", data_files=name, split=split or "train")
        return datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the library's own errors, those of its files and those of the network
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"Cannot load the split {split or 'train'!r} of the Hugging Face dataset {name} ({reason}): give hf:NAME "
            "or hf:NAME:SPLIT with a hub name, a folder written by save_to_disk, or parquet or image files"
        ) from None
    finally:
        library.setLevel(level)
        if hidden:
            datasets.enable_progress_bars()


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(
            'The data source hf needs the package datasets, which is not installed: pip install "ral-gym[hf]"'
        ) from None
    return datasets
