"""A stranger's data source goes through split, cache, skipped images and stages, by its name alone."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ral_gym.commands.cli import main
from ral_gym.data import cache as image_cache
from ral_gym.data import files as image_files
from ral_gym.data.base import Source, open_source
from ral_gym.errors import ConfigError
from ral_gym.registry import SOURCES, allow
from tests.image_folders import encoded, load, message_of, small

EXTENDING = Path(__file__).parents[1] / "examples" / "extending"
NAME = "own_data:Archive"


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples' folder on the path; what a test registers or allows is forgotten."""
    monkeypatch.syspath_prepend(str(EXTENDING))
    monkeypatch.setattr("ral_gym.registry._allowed", set())
    monkeypatch.setattr(SOURCES, "_parts", dict(SOURCES._parts))
    monkeypatch.delitem(sys.modules, "own_data", raising=False)


def archive(tmp_path: Path, count: int = 40, **more: Any) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32), np.uint8)
    np.savez(tmp_path / "images.npz", images=images, **more)
    return tmp_path / "images.npz"


def test_the_example_trains_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = f"{NAME}:{archive(tmp_path)}"
    flags = ["--runs", str(tmp_path / "runs"), "--name", "r", "--quiet", "--stages", "vqvae", "--data", data]
    assert main(["train", "--preset", "smoke", *flags, "--vqvae.training-steps", "2"]) == 0
    assert "Images of images.npz: 38 training and 2 held-out images" in capsys.readouterr().out


def test_labels_follow_their_images(tmp_path: Path) -> None:
    labels = np.arange(40) % 7
    path = archive(tmp_path, labels=labels)
    allow(NAME)
    images = load(small(f"{NAME}:{path}", image_size=32, grey=True))
    with np.load(path) as found:
        label_of = {image.tobytes(): int(label) for image, label in zip(found["images"], labels, strict=True)}
    assert images.labels is not None
    for part, given in ((images.train, images.labels.train), (images.test, images.labels.test)):
        assert [label_of[image.tobytes()] for image in part] == given.tolist()


def test_labels_pass_over_images_that_are_skipped() -> None:
    @SOURCES.register("some bad")
    def some_bad() -> tuple[list[int], Callable[[int], Any], list[int]]:
        return list(range(240)), lambda item: b"junk" if item % 20 == 0 else encoded(item), [n % 3 for n in range(240)]

    images = load(small("some bad"))
    assert len(images.skipped) == 12 and images.skipped[0].endswith(": not an image")
    assert images.labels is not None
    assert images.labels.train.tolist() == (images.train[:, 0, 0, 0] % 3).tolist()
    assert images.labels.test.tolist() == (images.test[:, 0, 0, 0] % 3).tolist()


@pytest.mark.parametrize(
    "read",
    [
        lambda item: encoded(item),
        lambda item: Image.new("RGB", (24, 20), (item, 0, 0)),
        lambda item: np.full((20, 24, 3), item, np.uint8),
        lambda item: np.full((1, 20, 24), item, np.uint8),
        lambda item: np.full((20, 24), item, np.uint8),
    ],
)
def test_an_item_is_bytes_a_pillow_image_or_an_array(read: Callable[[int], Any]) -> None:
    SOURCES.register("numbers")(lambda: (range(20), read))
    images = load(small("numbers"))
    assert sorted([*images.train[:, 0, 0, 0], *images.test[:, 0, 0, 0]]) == list(range(20))


def test_what_does_not_fit_is_said_in_one_line(tmp_path: Path) -> None:
    broken: dict[str, Any] = {
        "nothing": lambda: None,
        "empty": lambda: ([], bytes),
        "not a function": lambda: ([1, 2], 3),
        "twice": lambda: (["a", "a"], bytes),
        "labels": lambda: ([1, 2], bytes, [0]),
        "negative": lambda: ([1, 2], bytes, [0, -1]),
        "raises": lambda: 1 / 0,
        "needs": lambda path: ([1], bytes),
    }
    for name, part in broken.items():
        SOURCES.register(name)(part)
        assert name in message_of(small(name))
    assert "no images: write needs:PATH" in message_of(small("needs"))
    assert "takes no argument after a colon" in message_of(small("twice:x"))


def test_code_that_only_a_file_names_is_not_imported(tmp_path: Path) -> None:
    assert f"--plugin {NAME}" in message_of(small(f"{NAME}:{tmp_path / 'images.npz'}"), ConfigError)
    assert "own_data" not in sys.modules


def test_a_changed_archive_is_read_again_and_an_unchanged_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(NAME)
    monkeypatch.setattr(image_cache, "KEEP_AFTER_SECONDS", -1.0)
    config = small(f"{NAME}:{archive(tmp_path)}", cache_dir=str(tmp_path / "cache"))
    first = load(config)
    with monkeypatch.context() as patch:
        patch.setattr(image_cache, "iterate_decoded", None)  # would fail
        assert np.array_equal(load(config).train, first.train)
    archive(tmp_path, count=41)
    assert len(load(config).train) == 39


def test_a_source_that_cannot_say_when_it_changes_is_never_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_cache, "KEEP_AFTER_SECONDS", -1.0)
    SOURCES.register("plain")(lambda: (range(20), encoded))
    config = small("plain", cache_dir=str(tmp_path / "cache"))
    assert load(config).cache is None and not (tmp_path / "cache").exists()
    assert "`stamp`" in message_of(small("plain", memory_budget_mb=0, cache_dir=str(tmp_path / "cache")))


def test_workers_decode_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allow(NAME)
    config = small(f"{NAME}:{archive(tmp_path, count=100)}")
    alone = load(config)
    monkeypatch.setattr(image_files, "WORKERS_FROM_SECONDS", 0.0)
    monkeypatch.setattr(image_files, "_cpus", lambda: 2)
    assert np.array_equal(load(dataclasses.replace(config, workers=2)).train, alone.train)


def test_folders_of_classes_and_class_labels_give_labels(tmp_path: Path) -> None:
    for number in range(12):
        folder = tmp_path / ("cat" if number % 3 else "dog")
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.png").write_bytes(encoded(number))
    images = load(small(tmp_path))
    assert images.labels is not None and images.labels.classes == ("cat", "dog")
    assert images.labels.train.tolist() == [int(n % 3 == 0) for n in images.train[:, 0, 0, 0].tolist()]
    (tmp_path / "loose.png").write_bytes(encoded(99))
    assert load(small(tmp_path)).labels is None


@pytest.mark.parametrize("source", ["faces", "folder:images"])
def test_the_built_in_sources_come_in_by_the_same_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(encoded(1))
    monkeypatch.chdir(tmp_path)
    assert isinstance(open_source(source), Source)
    assert issubclass(SOURCES.get(source.partition(":")[0]), Source)
