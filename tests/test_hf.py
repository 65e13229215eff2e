"""Hugging Face datasets: what that library writes to disk is read, without a network."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is imported

import datasets
import numpy as np
import pytest
from PIL import Image

from ral_gym.config import DataConfig
from ral_gym.data import files as image_files
from ral_gym.data.sources import list_huggingface
from tests.image_folders import colour_of, indices, load, message_of, peak_memory, small, write_images


@pytest.fixture(autouse=True)
def quiet_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Its cache in a folder of the test, no bars."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def build(count: int, column: str = "image", **more: Any) -> datasets.Dataset:
    images = [Image.new("RGB", (24, 20), colour_of(index)) for index in range(count)]
    return datasets.Dataset.from_dict({**more, column: images})


def test_a_saved_dataset(tmp_path: Path) -> None:
    build(60, label=list(range(60))).save_to_disk(tmp_path / "saved")
    images = load(small(f"hf:{tmp_path / 'saved'}"))
    assert images.train.shape == (57, 3, 8, 8) and images.test.shape == (3, 3, 8, 8) and images.new_people is None
    assert sorted(indices(images.train) + indices(images.test)) == list(range(60))
    assert f"Hugging Face dataset {tmp_path / 'saved'} (train, column image)" in images.description
    assert "8x8 colour (resized from 20x20)" in images.description and images.skipped == ()


def test_the_same_images_as_those_of_a_folder(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 30)
    build(30).save_to_disk(tmp_path / "saved")
    for changes in ({}, {"limit": 7}, {"crop": 12, "grey": True}):
        one, other = load(small(tmp_path / "images", **changes)), load(small(f"hf:{tmp_path / 'saved'}", **changes))
        assert np.array_equal(one.train, other.train) and np.array_equal(one.test, other.test)


def test_splits_of_a_saved_dictionary(tmp_path: Path) -> None:
    whole = build(20)
    parts = {"train": whole.select(range(12)), "validation": whole.select(range(12, 20))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    for source, expected in (
        (f"hf:{tmp_path / 'both'}", range(12)),
        (f"hf:{tmp_path / 'both'}:validation", range(12, 20)),
    ):
        images = load(small(source))
        assert sorted(indices(images.train) + indices(images.test)) == list(expected)
    message = message_of(small(f"hf:{tmp_path / 'both'}:test"))
    assert "Cannot load the split 'test'" in message and str(tmp_path / "both") in message
    whole.save_to_disk(tmp_path / "one")
    assert "it has no split 'test'" in message_of(small(f"hf:{tmp_path / 'one'}:test"))


@pytest.mark.parametrize("kind", ["parquet folder", "parquet file", "images"])
def test_files_that_the_library_understands(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "here"
    if kind == "images":
        write_images(path, 20)
    else:
        path.mkdir()
        build(20).to_parquet(path / "train.parquet")
    images = load(small(f"hf:{path / 'train.parquet' if kind == 'parquet file' else path}"))
    assert sorted(indices(images.train) + indices(images.test)) == list(range(20))
    half = load(small(f"hf:{path / 'train.parquet' if kind == 'parquet file' else path}:train[:50%]"))
    assert sorted(indices(half.train) + indices(half.test)) == list(range(10))


def test_the_image_column_is_found(tmp_path: Path) -> None:
    build(3, "photo", label=[0, 1, 2]).save_to_disk(tmp_path / "one")
    assert "column photo" in load(small(f"hf:{tmp_path / 'one'}")).description
    twice = build(3, "img").add_column("n", [0, 1, 2])
    masks = datasets.Dataset.from_dict({"mask": [Image.new("L", (9, 9))] * 3})
    datasets.concatenate_datasets([masks, twice], axis=1).save_to_disk(tmp_path / "two")
    images = load(small(f"hf:{tmp_path / 'two'}"))
    assert "column img" in images.description and sorted(indices(images.train) + indices(images.test)) == [0, 1, 2]


def test_rows_without_a_usable_image_are_named(tmp_path: Path) -> None:
    rows = [None, {"bytes": b"junk", "path": None}]
    good = [{"bytes": None, "path": str(path)} for path in write_images(tmp_path / "images", 10)]
    table = datasets.Dataset.from_dict({"image": rows + good}).cast(datasets.Features({"image": datasets.Image()}))
    table.save_to_disk(tmp_path / "saved")
    images = load(small(f"hf:{tmp_path / 'saved'}"))
    assert len(images.train) + len(images.test) == 10
    reasons = dict(entry.split(": ", 1) for entry in images.skipped)
    assert reasons == {"row 0": "no image in this row", "row 1": "not an image"}


def test_workers_read_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(100).save_to_disk(tmp_path / "saved")
    _, entries, reader = list_huggingface(str(tmp_path / "saved"), progress=False)
    assert len(pickle.dumps(reader)) < 5000  # the files' names, not their content
    monkeypatch.setattr(image_files, "WORKERS_FROM_SECONDS", 0.0)
    monkeypatch.setattr(image_files, "_cpus", lambda: 2)
    alone, together = (load(small(f"hf:{tmp_path / 'saved'}", workers=workers)) for workers in (1, 2))
    assert np.array_equal(alone.train, together.train) and len(entries) == 100


def test_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    peaks = []
    for count in (300, 1200):
        path = tmp_path / str(count)
        build(count).save_to_disk(path)
        config = small(f"hf:{path}", image_size=64, memory_budget_mb=0, cache_dir=str(tmp_path / "cache"))
        load(config)
        peaks.append(peak_memory(small(f"hf:{path}", image_size=65, memory_budget_mb=0, cache_dir=config.cache_dir)))
    assert isinstance(load(config).train, np.memmap)
    assert peaks[1] < 1200 * 3 * 65**2 / 5 and peaks[1] - peaks[0] < 900 * 250  # of 15 MB


def test_the_cache_follows_the_dataset(tmp_path: Path) -> None:
    def config(name: str) -> DataConfig:
        return small(f"hf:{tmp_path / name}", memory_budget_mb=0, cache_dir=str(tmp_path / "cache"))

    build(10).save_to_disk(tmp_path / "saved")
    load(config("saved"))
    load(config("saved"))
    assert len(list((tmp_path / "cache").iterdir())) == 1
    build(10).select(range(9, -1, -1)).save_to_disk(tmp_path / "again")
    os.rename(tmp_path / "saved", tmp_path / "old")
    os.rename(tmp_path / "again", tmp_path / "saved")
    changed = load(config("saved"))
    assert (
        len(list((tmp_path / "cache").iterdir())) == 2
        and indices(changed.train) == sorted(indices(changed.train))[::-1]
    )


# Bad input ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    assert "/does/not/exist" in message_of(small("hf:/does/not/exist"))
    message = message_of(small("hf:nobody/nothing"))
    assert "Cannot load the split 'train' of the Hugging Face dataset nobody/nothing (" in message
    assert "save_to_disk" in message and "hf:NAME:SPLIT" in message
    assert "nobody/nothing" in message_of(small("hf:nobody/nothing:validation"))
    (tmp_path / "empty").mkdir()
    assert "Cannot load" in message_of(small(f"hf:{tmp_path / 'empty'}"))
    (tmp_path / "broken.parquet").write_bytes(b"junk")
    assert "Cannot load" in message_of(small(f"hf:{tmp_path / 'broken.parquet'}"))


def test_a_dataset_without_images(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"], "label": [1]}).save_to_disk(tmp_path / "words")
    assert "no column of images among text, label" in message_of(small(f"hf:{tmp_path / 'words'}"))


def test_an_empty_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(3).to_parquet(tmp_path / "three.parquet")
    assert "Cannot load the split 'train[:0]'" in message_of(small(f"hf:{tmp_path / 'three.parquet'}:train[:0]"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **more: build(3).select([]))
    assert "The split 'train' of some/name is empty" in message_of(small("hf:some/name"))


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = message_of(small(f"hf:{tmp_path}"))
    assert "needs the package datasets" in message and 'pip install "ral-gym[hf]"' in message


def test_progress_bars_are_left_as_they_were(tmp_path: Path) -> None:
    write_images(tmp_path / "here", 4)
    datasets.enable_progress_bars()
    load(small(f"hf:{tmp_path / 'here'}"))
    assert not datasets.are_progress_bars_disabled()
