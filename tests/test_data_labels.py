"""Classes of images: splits that have all of them on both sides, held-out sources, names."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ral_gym.config import Config, DataConfig
from ral_gym.data.images import ImageSet, load_images
from ral_gym.data.labels import held_out_rows, nested_order, read_class_names
from ral_gym.errors import ConfigError, DataError
from ral_gym.presets import SMOKE
from ral_gym.runs.run import Run, read_config

COUNTS = {"ant": 30, "bee": 10, "cat": 4}


def make_folder(root: Path, counts: dict[str, int] = COUNTS, first: int = 0) -> Path:
    """Images whose red channel is their class's number and whose green one is their own."""
    for label, (name, count) in enumerate(sorted(counts.items())):
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (12, 12), (label * 40, first + number, 0)).save(root / name / f"{number:03d}.png")
    return root


def load(root: Path, **settings: object) -> ImageSet:
    config = DataConfig(source=f"folder:{root}", image_size=8, workers=0, cache_mb=0)
    return load_images(replace(config, **settings), progress=False)  # type: ignore[arg-type]


def assert_labels_fit(images: ImageSet) -> None:
    assert images.labels is not None
    for part, labels in ((images.train, images.labels.train), (images.test, images.labels.test)):
        np.testing.assert_allclose(part[:, 0, 0, 0] / 40, labels, atol=0.1)


def test_each_class_is_held_out_by_its_share(tmp_path: Path) -> None:
    images = load(make_folder(tmp_path / "all"))
    assert images.labels is not None and images.labels.classes == ("ant", "bee", "cat")
    assert_labels_fit(images)
    assert np.bincount(images.labels.test).tolist() == [1, 1, 1] and len(images.train) == 41
    assert "a random 5% of each class" in images.description


@pytest.mark.parametrize("n_test", [1, 5, 20, 43])
def test_no_class_is_lost_and_the_share_is_kept(n_test: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [30, 10, 4]))
    held_out = held_out_rows(labels, n_test, seed=3)
    inside = np.bincount(labels[held_out], minlength=3)
    assert (inside >= 1).all() and (inside < [30, 10, 4]).all()
    assert (np.abs(inside - np.maximum(n_test * np.array([30, 10, 4]) / 44, 1)) <= 1).all()
    assert (held_out == held_out_rows(labels, n_test, seed=3)).all()
    assert (held_out != held_out_rows(labels, n_test, seed=4)).any()


def test_a_larger_limit_only_adds_to_a_smaller_one() -> None:
    labels = np.repeat([0, 1, 2], [30, 10, 4])
    order = nested_order(labels, 5)
    assert sorted(order) == list(range(44))
    for limit in (4, 11, 22, 44):
        share = np.bincount(labels[order[:limit]], minlength=3)
        assert (np.abs(share - limit * np.array([30, 10, 4]) / 44) <= 1).all()


def test_a_limited_set_keeps_its_classes(tmp_path: Path) -> None:
    images = load(make_folder(tmp_path / "all"), limit=15, test_limit=0)
    assert_labels_fit(images)
    assert images.labels is not None and np.bincount(images.labels.train).tolist() == [11, 3, 1]


def test_held_out_images_of_their_own_source(tmp_path: Path) -> None:
    train, test = make_folder(tmp_path / "train"), make_folder(tmp_path / "test", {"ant": 3, "bee": 2, "cat": 2}, 100)
    images = load(train, test=f"folder:{test}")
    assert_labels_fit(images)
    assert len(images.train) == 44 and len(images.test) == 7 and (images.test[:, 1, 0, 0] >= 100).all()
    assert "44 training images, 7 held-out images from" in images.description
    few = load(train, test=f"folder:{test}", limit=12, test_limit=3)
    assert len(few.train) == 12 and len(few.test) == 3 and few.labels is not None
    assert np.bincount(few.labels.test).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"ant": 3, "bee": 2, "dog": 2}, "a class 'dog' that the training images do not have.*must be ant, bee, cat"),
        ({"ant": 3, "bee": 2}, "class 'cat' has no held-out image"),
        ({"ant": 3}, "has classes, but .* has none: give both one folder per class"),
    ],
)
def test_held_out_images_of_other_classes_are_refused(tmp_path: Path, counts: dict[str, int], message: str) -> None:
    train, test = make_folder(tmp_path / "train"), make_folder(tmp_path / "test", counts)
    with pytest.raises(DataError, match=message):
        load(train, test=f"folder:{test}")


def test_held_out_classes_in_another_order_get_their_own_numbers(tmp_path: Path) -> None:
    train = make_folder(tmp_path / "train", {"b": 3, "c": 3})
    test = make_folder(tmp_path / "test", {"b": 3, "c": 3})
    images = load(train, test=f"folder:{test}")
    assert_labels_fit(images)


def test_a_class_of_one_image_is_refused_and_labels_can_be_turned_off(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "all", {"ant": 30, "bee": 1})
    with pytest.raises(DataError, match="class 'bee' has no held-out image: give each class two images or more"):
        load(root)
    images = load(root, labels="none")
    assert images.labels is None and "of each class" not in images.description


def test_skipped_files_drop_their_label(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "all")
    (root / "bee/000.png").write_bytes(b"junk")
    (root / "ant/003.png").write_bytes(b"junk")
    images = load(root)
    assert len(images.skipped) == 2
    assert_labels_fit(images)


@pytest.mark.parametrize(
    "write",
    [
        lambda names: "\n".join(names) + "\n",
        lambda names: json.dumps(names),
        lambda names: json.dumps({str(n): name for n, name in enumerate(names)}),
        lambda names: repr(dict(enumerate(names))),
        lambda names: "\n".join(f"{name}, alias of {name}" for name in names),
    ],
)
def test_names_from_a_file(tmp_path: Path, write: Callable[[list[str]], str]) -> None:
    (tmp_path / "names").write_text(write(["Ant lion", "Bee", "Cat"]))
    images = load(make_folder(tmp_path / "all"), class_names=str(tmp_path / "names"))
    assert images.labels is not None and images.labels.classes == ("Ant lion", "Bee", "Cat")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nb\n", "names 2 classes, but there are 3"),
        ("__import__('os').system('true')", "names 1 classes"),
        ("{0: 'a', 1: 'b', 3: 'c'}", "no list of class names"),
        ("[1, 2, 3]", "no list of class names"),
        ("{0: __import__('os')}", "no list of class names"),
        ("", "names 0 classes"),
    ],
)
def test_a_file_without_the_names_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "names").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_class_names(tmp_path / "names", 3)


def test_names_without_classes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("a\n")
    root = make_folder(tmp_path / "all", {"ant": 5})
    with pytest.raises(ConfigError, match="the images have none"):
        load(root, class_names=str(tmp_path / "names"))
    with pytest.raises((ConfigError, DataError), match="missing"):
        load(make_folder(tmp_path / "more"), class_names=str(tmp_path / "missing"))


def test_a_run_from_before_labels_goes_on_without_them(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", SMOKE)
    values = json.loads(run.file("config.json").read_text())
    for name in ("labels", "test", "class_names"):
        del values["data"][name]
    run.file("config.json").write_text(json.dumps(values))
    run.file("vqvae.safetensors").write_bytes(b"there")
    assert read_config(run.path).data.labels == "none"
    assert Run(tmp_path / "run", SMOKE).config.data.labels == "none"
    assert Config.from_dict(json.loads(SMOKE.to_json())).data.labels == "auto"
