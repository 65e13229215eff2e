"""Helpers of the tests that read images."""

from __future__ import annotations

import dataclasses
import gc
import io
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image

from ral_gym.config import DataConfig
from ral_gym.data.images import ImageSet, load_images
from ral_gym.errors import DataError


def colour_of(index: int) -> tuple[int, int, int]:
    """A colour that tells which image this is."""
    return (index % 256, 200 - index % 200, index // 256 * 50)


def write_images(folder: Path, count: int, size: tuple[int, int] = (24, 20), suffix: str = "png") -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:06d}.{suffix}" for index in range(count)]
    for index, path in enumerate(paths):
        Image.new("RGB", size, colour_of(index)).save(path)
    return paths


def small(source: Path | str, **changes: object) -> DataConfig:
    source = source if isinstance(source, str) else f"folder:{source}"
    return dataclasses.replace(DataConfig(source=source, image_size=8, workers=1), **changes)  # type: ignore[arg-type]


def load(config: DataConfig, seed: int = 0) -> ImageSet:
    return load_images(config, seed, progress=False)


def indices(images: np.ndarray) -> list[int]:
    """Which of `write_images`' (up to 256) images these are."""
    return images[:, 0, 0, 0].tolist()


def keys(images: np.ndarray) -> set[bytes]:
    return {image.tobytes() for image in images}


def message_of(config: DataConfig, error: type[Exception] = DataError) -> str:
    with pytest.raises(error) as caught:
        load(config)
    text = str(caught.value)
    assert "\n" not in text
    return text


def encoded(index: int, size: tuple[int, int] = (24, 20), kind: str = "png") -> bytes:
    """The bytes of an image file in the colour of `index`."""
    file = io.BytesIO()
    Image.new("RGB", size, colour_of(index)).save(file, kind, lossless=True)
    return file.getvalue()


def write_lmdb(folder: Path, values: Sequence[bytes]) -> Path:
    """An LMDB laid out as LSUN's: a key of 40 hexadecimal digits per encoded image; the order is `values`'."""
    folder.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(folder), map_size=2**28) as environment, environment.begin(write=True) as transaction:
        for index, value in enumerate(values):
            transaction.put(f"{index:040x}".encode(), value)
    return folder


def peak_memory(config: DataConfig) -> int:
    """Bytes that loading allocates at once, memory maps not counted."""
    gc.collect()
    tracemalloc.start()
    try:
        load(config)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
