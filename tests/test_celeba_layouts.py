"""CelebA as its downloads unpack it: the official partition is found from every level, or its place is taken."""

from __future__ import annotations

import logging
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ral_gym.data.celeba import CelebA, find_images
from ral_gym.data.listing import ImageFile
from ral_gym.errors import DataError
from tests.image_folders import encoded, indices, load, message_of, small, write_images

PARTS = [0] * 24 + [1] * 8 + [2] * 8
NAMES = [f"{number:06d}" for number in range(1, 41)]
TEXT = "".join(f"{name}.jpg {part}\n" for name, part in zip(NAMES, PARTS, strict=True))
CSV = "image_id,partition\n" + TEXT.replace(" ", ",")
LAYOUTS = {
    "kaggle": ("img_align_celeba/img_align_celeba", "jpg", "list_eval_partition.csv", CSV),
    "torchvision": ("celeba/img_align_celeba", "jpg", "celeba/list_eval_partition.txt", TEXT),
    "official": ("Img/img_align_celeba", "jpg", "Eval/list_eval_partition.txt", TEXT),
    "png": ("Img/img_align_celeba_png", "png", "Eval/list_eval_partition.txt", TEXT),
    "byte-order mark": ("img_align_celeba", "jpg", "list_eval_partition.txt", "\ufeff" + TEXT),
    "mark and header": ("img_align_celeba", "jpg", "list_eval_partition.csv", "\ufeff" + CSV),
}


def write_layout(root: Path, images: str, suffix: str, partition: str, text: str) -> None:
    folder = root / images
    write_images(folder, 41, suffix=suffix)[0].unlink()  # CelebA counts from 1
    (root / "Anno").mkdir()
    (root / "Anno" / "list_attr_celeba.txt").write_text("40\n")
    (root / partition).parent.mkdir(exist_ok=True)
    (root / partition).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_partition_is_found_from_every_level(tmp_path: Path, layout: str) -> None:
    write_layout(tmp_path, *LAYOUTS[layout])
    folder = tmp_path / LAYOUTS[layout][0]
    while folder != tmp_path.parent:
        images = load(small(f"celeba:{folder}", crop=8))
        assert (len(images.train), len(images.test), images.skipped) == (24, 8, ()), folder
        assert "by CelebA's numbers" not in images.description
        folder = folder.parent


def write_zip(path: Path, entries: list[tuple[str, bytes]]) -> Path:
    with pytest.MonkeyPatch.context() as patch, zipfile.ZipFile(path, "w") as archive:
        patch.setattr("warnings.warn", lambda *arguments, **options: None)  # of names that come twice
        for name, data in entries:
            archive.writestr(name, data)
    return path


def test_a_zip_in_the_official_places(tmp_path: Path) -> None:
    (tmp_path / "Img").mkdir()
    (tmp_path / "Eval").mkdir()
    (tmp_path / "Eval" / "list_eval_partition.txt").write_text(TEXT)
    entries = [(f"img_align_celeba/{name}.jpg", encoded(3, kind="jpeg")) for name in NAMES]
    write_zip(tmp_path / "Img" / "img_align_celeba.zip", entries)
    for place in ("", "Img", "Img/img_align_celeba.zip"):
        images = load(small(f"celeba:{tmp_path / place}", crop=8))
        assert (len(images.train), len(images.test)) == (24, 8)


def test_what_a_zip_holds_twice_is_used_once_and_named(tmp_path: Path) -> None:
    entries = [(f"a/{name}.png", encoded(int(name))) for name in NAMES[:10]]
    entries += [("a/000003.png", encoded(200)), ("b/000004.png", encoded(201)), ("a/000005.jpg", encoded(202))]
    images = load(small(f"celeba:{write_zip(tmp_path / 'c.zip', entries)}", crop=8))
    assert images.skipped == (
        "a/000003.png: twice in the zip, the last one is used",
        "a/000005.png: the same image as a/000005.jpg",
        "b/000004.png: the same image as a/000004.png",
    )
    assert sorted(indices(images.train) + indices(images.test)) == [1, 2, 4, 6, 7, 8, 9, 10, 200, 202]


def numbered(tmp_path: Path, numbers: list[int]) -> Path:
    entries = [(f"{number:06d}.jpg", encoded(row)) for row, number in enumerate(numbers)]
    return write_zip(tmp_path / "c.zip", entries)


def test_without_a_partition_file_the_numbers_decide(tmp_path: Path) -> None:
    path = numbered(tmp_path, [1, 162_770, 162_771, 182_637, 182_638, 202_599])
    images = load(small(f"celeba:{path}", crop=8))
    assert indices(images.train) == [0, 1] and indices(images.test) == [2, 3]
    assert "the validation partition, by CelebA's numbers" in images.description
    path = numbered(tmp_path, [182_638, 202_599])
    assert "makes none of the 2 images" in message_of(small(f"celeba:{path}", crop=8))


def test_a_random_split_of_other_names_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path / "a", 5)
    load(small(f"celeba:{tmp_path}", crop=8))
    assert "test images" not in caplog.text  # 000000 to 000004: training images all
    (tmp_path / "a" / "000000.png").rename(tmp_path / "a" / "face.png")
    with caplog.at_level(logging.WARNING):
        load(small(f"celeba:{tmp_path}", crop=8))
    assert "CelebA's test images may be among the training ones" in caplog.text


def test_the_official_partition_is_that_of_the_numbers() -> None:
    """162,770 training, 19,867 validation and 19,962 test images, as the data set's page says."""
    from ral_gym.data.celeba import _official_numbers

    partition = _official_numbers([ImageFile(f"{number:06d}.jpg", 1, 1) for number in range(1, 202_600)])
    assert partition is not None
    assert np.bincount(list(partition.values())).tolist() == [162_770, 19_867, 19_962]
    assert _official_numbers([ImageFile("202600.jpg", 1, 1)]) is None


def test_an_image_in_two_parts_is_refused(tmp_path: Path) -> None:
    write_layout(tmp_path, "img_align_celeba", "jpg", "list_eval_partition.txt", TEXT + "000001.jpg 2\n")
    assert "000001.jpg' is in two parts" in message_of(small(f"celeba:{tmp_path}", crop=8))


def test_images_are_looked_for_a_few_folders_down_only(tmp_path: Path) -> None:
    write_images(tmp_path / "a" / "b" / "img_align_celeba", 3)
    assert find_images(tmp_path) == tmp_path / "a" / "b" / "img_align_celeba"
    with pytest.raises(DataError, match="No images"):
        (tmp_path / "empty").mkdir()
        CelebA(str(tmp_path / "empty"))
