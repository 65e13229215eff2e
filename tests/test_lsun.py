"""LSUN: its LMDB folders, what is none of them, and sets larger than memory."""

from __future__ import annotations

import logging
import pickle
import sys
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image

from ral_gym.config import DataConfig
from ral_gym.data import files as image_files
from ral_gym.data import sources as image_sources
from ral_gym.data.base import random_split, take
from ral_gym.data.listing import ImageFile
from ral_gym.data.sources import Entries, LsunReader, list_lsun
from tests.image_folders import encoded, indices, load, message_of, peak_memory, small, write_images, write_lmdb


def test_every_image_is_split_once_and_cut_to_the_centre_square(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "bedroom_val_lmdb", [encoded(i, kind="webp" if i % 2 else "png") for i in range(60)])
    images = load(small(f"lsun:{path}"))
    assert images.train.shape == (57, 3, 8, 8) and images.test.shape == (3, 3, 8, 8) and images.new_people is None
    assert sorted(indices(images.train) + indices(images.test)) == list(range(60))
    assert indices(images.train) == sorted(indices(images.train)) and images.skipped == ()
    assert "LSUN (Yu et al., 2015)" in images.description and "57 training and 3 held-out" in images.description
    assert "8x8 colour (resized from 20x20)" in images.description
    assert np.array_equal(load(small(f"lsun:{path}/data.mdb")).train, images.train)
    assert indices(load(small(f"lsun:{path}"), seed=1).test) != indices(images.test)
    assert (tmp_path / "bedroom_val_lmdb" / "data.mdb").stat().st_size == (path / "data.mdb").stat().st_size


def test_the_same_images_as_those_of_a_folder(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "images", 30, size=(30, 40))
    path = write_lmdb(tmp_path / "lmdb", [path.read_bytes() for path in paths])
    for changes in ({}, {"limit": 7}, {"crop": 12, "grey": True}):
        one, other = load(small(tmp_path / "images", **changes)), load(small(f"lsun:{path}", **changes))
        assert np.array_equal(one.train, other.train) and np.array_equal(one.test, other.test)


def test_keys_of_any_bytes(tmp_path: Path) -> None:
    keys = [b"\x00", b"\x00\x00", b"a\x00", b"\xff\xfe", bytes(range(200, 240))]
    with lmdb.open(str(tmp_path), map_size=2**20) as environment, environment.begin(write=True) as transaction:
        for index, key in enumerate(keys):
            transaction.put(key, encoded(10 * index))
    images = load(small(f"lsun:{tmp_path}"))
    assert sorted(indices(images.train) + indices(images.test)) == [0, 10, 20, 30, 40] and images.skipped == ()


def test_damaged_entries_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = [encoded(index) for index in range(20)]
    values[0], values[5] = b"junk", values[5][:60]
    images = load(small(f"lsun:{write_lmdb(tmp_path / 'a_lmdb', values)}"))
    assert len(images.train) + len(images.test) == 18
    assert images.skipped[0] == f"{0:040x}: not an image" and images.skipped[1].startswith(f"{5:040x}: ")
    assert "2 unusable files were skipped" in caplog.text


def test_workers_read_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "WORKERS_FROM_SECONDS", 0.0)
    monkeypatch.setattr(image_files, "_cpus", lambda: 2)
    path = write_lmdb(tmp_path / "a_lmdb", [encoded(index) for index in range(100)])
    alone, together = (load(small(f"lsun:{path}", workers=workers)) for workers in (1, 2))
    assert np.array_equal(alone.train, together.train) and np.array_equal(alone.test, together.test)


def test_workers_import_neither_torch_nor_the_library_to_start() -> None:
    reader = pickle.loads(pickle.dumps(LsunReader("nowhere")))
    assert reader.folder == "nowhere" and reader.environment is None
    assert image_sources.__dict__.keys().isdisjoint({"torch", "lmdb", "datasets"})


# More than memory holds ---------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    peaks = []
    for count in (300, 1200):
        path = write_lmdb(tmp_path / f"{count}_lmdb", [encoded(0)] * count)
        config = small(f"lsun:{path}", image_size=64, memory_budget_mb=0, cache_dir=str(tmp_path / "cache"))
        load(config)  # what is imported and compiled at first use is no part of it
        peaks.append(peak_memory(small(f"lsun:{path}", image_size=65, memory_budget_mb=0, cache_dir=config.cache_dir)))
    assert isinstance(load(config).train, np.memmap)
    assert peaks[1] < 1200 * 3 * 65**2 / 5 and peaks[1] - peaks[0] < 900 * 90  # bytes, of 15 MB


def test_a_name_exists_only_while_it_is_looked_at() -> None:
    entries = Entries(lambda row: f"key {row}", np.arange(10), size=7, stamp=9)
    some = entries.take(np.array([2, 5]))
    assert list(some) == [ImageFile("key 2", 7, 9), ImageFile("key 5", 7, 9)] and len(some) == 2
    assert some.take(np.array([1])).rows.tolist() == [5]


def test_the_cache_follows_the_database(tmp_path: Path) -> None:
    config = small(f"lsun:{tmp_path / 'a_lmdb'}", memory_budget_mb=0, cache_dir=str(tmp_path / "cache"))
    write_lmdb(tmp_path / "a_lmdb", [encoded(index) for index in range(10)])
    assert not (load(config).train == 255).all()
    load(config)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    white = Image.new("RGB", (24, 20), (255, 255, 255))
    white.save(tmp_path / "white.png")
    write_lmdb(tmp_path / "a_lmdb", [(tmp_path / "white.png").read_bytes()] * 10)
    assert (load(config).train == 255).all()


def test_large_sets_hold_out_no_more_than_needed() -> None:
    entries = Entries(str, np.arange(300_000), 0, 0)
    split = random_split(np.arange(300_000), seed=0)
    train, test, words = take(entries, split.train), take(entries, split.test), split.words
    assert (len(train), len(test), words) == (290_000, 10_000, "a random sample")
    assert isinstance(train, Entries) and isinstance(test, Entries)
    assert len(np.union1d(train.rows, test.rows)) == 300_000 and (np.diff(test.rows) > 0).all()


# Bad input ----------------------------------------------------------------------------------------------------------


def test_a_folder_without_data_names_the_ones_inside(tmp_path: Path) -> None:
    assert "holds no data.mdb" in message_of(small(f"lsun:{tmp_path}"))
    write_lmdb(tmp_path / "church_outdoor_train_lmdb", [encoded(0)])
    message = message_of(small(f"lsun:{tmp_path}"))
    assert "holds no data.mdb" in message and "one of its folders church_outdoor_train_lmdb" in message
    assert "/does/not/exist" in message_of(small("lsun:/does/not/exist"))


def test_an_lmdb_that_is_not_lsuns(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "words_lmdb", [pickle.dumps(index) for index in range(40)])
    message = message_of(small(f"lsun:{path}"))
    assert "is an LMDB, but not LSUN's: none of its first 16 entries is an encoded image" in message
    with lmdb.open(str(tmp_path / "named"), map_size=2**20, max_dbs=2) as environment:
        environment.open_db(b"images")  # its entry in the main database cannot be read as a value
    (tmp_path / "named").mkdir(exist_ok=True)
    assert "LMDB" in message_of(small(f"lsun:{tmp_path / 'named'}"))


def test_an_empty_lmdb(tmp_path: Path) -> None:
    assert "is an empty LMDB" in message_of(small(f"lsun:{write_lmdb(tmp_path / 'a_lmdb', [])}"))


def test_a_damaged_or_cut_off_lmdb(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "a_lmdb", [encoded(0, (300, 300), "bmp")] * 10)
    whole = (path / "data.mdb").read_bytes()
    (path / "data.mdb").write_bytes(whole[: len(whole) // 2])  # a download that stopped
    message = message_of(small(f"lsun:{path}"))
    assert "is cut off" in message and f"{len(whole):,} bytes" in message
    (path / "data.mdb").write_bytes(b"no database" * 1000)
    assert "is not a readable LMDB" in message_of(small(f"lsun:{path}"))
    (path / "data.mdb").write_bytes(b"")
    assert "LMDB" in message_of(small(f"lsun:{path}"))
    assert list(path.iterdir())  # and none of these made a new one


def test_nothing_stays_open_after_an_error(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "a_lmdb", [b"junk"])
    for _ in range(2):  # a process may open an LMDB only once
        assert "not LSUN's" in message_of(small(f"lsun:{path}"))


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lmdb(tmp_path / "a_lmdb", [encoded(0)])
    monkeypatch.setitem(sys.modules, "lmdb", None)
    message = message_of(small(f"lsun:{path}"))
    assert "needs the package lmdb" in message and 'pip install "ral-gym[lsun]"' in message


# Resizing, of every source ------------------------------------------------------------------------------------------


def test_large_photos_become_512(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # CelebA-HQ: a folder of 1024x1024 images, here smaller ones.
    write_images(tmp_path / "images", 3, size=(640, 640))
    config = DataConfig(f"folder:{tmp_path / 'images'}", 512, memory_budget_mb=1, cache_dir=str(tmp_path / "cache"))
    images = load(config)
    assert images.train.shape == (2, 3, 512, 512) and isinstance(images.train, np.memmap)
    assert images.description.endswith("512x512 colour (resized from 640x640)") and not caplog.records


def test_smaller_images_are_enlarged_and_that_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path, 10)
    with caplog.at_level(logging.INFO, logger="ral_gym"):
        images = load(small(tmp_path, image_size=32))
    (record,) = caplog.records
    assert "square of 20 pixels" in record.getMessage() and "data.image_size 32" in record.getMessage()
    assert images.description.endswith("32x32 colour (resized from 20x20)")
    assert load(small(tmp_path, image_size=20)).description.endswith("20x20 colour")


def test_listing_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "a_lmdb", [encoded(0)])
    (path / "lock.mdb").unlink()
    folder, entries = list_lsun(path)
    assert folder == path and len(entries) == 1 and [file.name for file in path.iterdir()] == ["data.mdb"]
