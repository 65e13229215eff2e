"""LMDBs that are not LSUN's, odd Hugging Face datasets, odd folders: images, or one line; nothing raw on a terminal."""

import io
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ral_gym.config import DataConfig
from ral_gym.data.images import load_images
from ral_gym.errors import DataError
from tests import forks

SIZE = 16


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 20, 3), dtype=np.uint8))


def png(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def load(source: str) -> Any:
    return load_images(DataConfig(source=source, image_size=SIZE, workers=1), progress=False)


def outcome(source: str) -> str:
    """The line of a refusal, or what was skipped; an `Image` is all that may come of it otherwise."""
    try:
        images = load(source)
    except DataError as error:
        return str(error)
    assert len(images.train) + len(images.test) > 0
    return "; ".join(images.skipped)


def database(path: Path, entries: dict[bytes, bytes]) -> str:
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(path), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key, value)
    return f"lsun:{path}"


def images_of_keys(bad: bytes) -> dict[bytes, bytes]:
    return {b"\x1b]0;gotcha\x07%d" % i: bad if i % 3 == 0 else png(i) for i in range(12)}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({}, "is an empty LMDB"),
        ({b"a": b"hello", b"b": b"x"}, "none of its first 2 entries is an encoded image"),
        (images_of_keys(b"junk"), r"\x1b]0;gotcha\x070: not an image"),
        (images_of_keys(png()[:60]), r"\x1b]0;gotcha\x070: "),
    ],
)
def test_an_lmdb_that_is_not_lsuns(tmp_path, caplog, entries, words) -> None:
    said = outcome(database(tmp_path / "db", entries))
    assert words in said and said.isprintable()
    assert all(record.getMessage().isprintable() for record in caplog.records)


@pytest.mark.parametrize("content", [b"", b"junk" * 5000])
def test_a_file_that_is_no_lmdb(tmp_path, content) -> None:
    pytest.importorskip("lmdb")
    (tmp_path / "data.mdb").write_bytes(content)
    assert "is not a readable LMDB" in outcome(f"lsun:{tmp_path}")


@pytest.mark.parametrize("seed", range(4))
def test_an_lmdb_with_changed_bytes_ends_no_process(tmp_path, seed) -> None:
    source = database(tmp_path / "db", {bytes([i, 255]): png(i) for i in range(12)})
    file, rng = tmp_path / "db" / "data.mdb", random.Random(seed)
    changed = bytearray(file.read_bytes())
    for _ in range(40):
        changed[rng.randrange(8192, len(changed))] = rng.randrange(256)
    file.write_bytes(changed)
    child = forks.forked(lambda: 0 if outcome(source).isprintable() else 3, tmp_path / "log")
    assert forks.ended(child, 60) == 0, (tmp_path / "log").read_text()


def odd_dataset(hf: Any, name: str) -> Any:
    one = hf.Features({"image": hf.Image()})
    a_file = {"bytes": None, "path": "/etc/passwd"}
    values: dict[str, list[Any]] = {
        "none": [None, None],
        "empty": [],
        "some": [picture(), None, picture(1), picture(2)],
        "files": [a_file, {"bytes": png(), "path": "x"}, {"bytes": png(1), "path": None}],
    }
    if name in values:
        return hf.Dataset.from_dict({"image": values[name]}, features=one)
    return hf.Dataset.from_dict({"a\x1b[2J": [1, 2]} if name == "no image" else {"image": ["/etc/passwd"] * 3})


@pytest.fixture
def hf() -> Iterator[Any]:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    yield datasets
    datasets.enable_progress_bars()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no image", r"has no column of images among a\x1b[2J"),
        ("none", "no image in this row"),
        ("empty", ""),
        ("text", "has no column of images among image"),
        ("some", "row 1: no image in this row"),
        ("files", "row 0: not an image"),
    ],
)
def test_a_dataset_of_hugging_face_that_is_odd(tmp_path, caplog, hf, name, words) -> None:
    odd_dataset(hf, name).save_to_disk(tmp_path / "data")
    said = outcome(f"hf:{tmp_path / 'data'}")
    assert words in said and said.isprintable()
    assert all(record.getMessage().isprintable() for record in caplog.records)


def test_a_file_that_is_no_parquet_is_one_line_and_a_script_is_not_run(tmp_path, capfd, hf) -> None:
    bad = tmp_path / "\x1b[2Jbad.parquet"
    bad.write_bytes(b"PAR1junk")
    assert r"\x1b[2Jbad.parquet" in outcome(f"hf:{bad}")
    script = tmp_path / "script" / "script.py"
    script.parent.mkdir()
    script.write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    assert "Cannot load" in outcome(f"hf:{script.parent}")
    assert not (tmp_path / "executed").exists()
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize(
    "source", ["folder:", "folder:/nope", "celeba:/etc/passwd", "folder:\0", "celeba:" + "x" * 5000]
)
def test_a_source_that_is_none_is_one_line(source) -> None:
    with pytest.raises(DataError) as caught:
        load(source)
    assert str(caught.value).isprintable() and len(str(caught.value)) <= 2000


def test_names_of_files_are_printable_wherever_they_are_said(tmp_path, caplog) -> None:
    folder = tmp_path / "photos\x1b]0;gotcha\x07"
    folder.mkdir()
    for number in range(6):
        picture(number).save(folder / f"{number}.png")
    (folder / "\x1b[31mtext.png").write_bytes(b"hello")
    os.mkfifo(folder / "\x9bpipe.png")
    said = outcome(f"folder:{folder}")
    assert r"\x1b[31mtext.png" in said and r"\x9bpipe.png" in said and said.isprintable()
    assert caplog.records and all(record.getMessage().isprintable() for record in caplog.records)
