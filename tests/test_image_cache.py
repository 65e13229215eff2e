"""Images in memory or in the cache on disk, and the processes that decode them."""

from __future__ import annotations

import dataclasses
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
from PIL import Image

from ral_gym.data import cache as image_cache
from ral_gym.data import cache_folder, listing
from ral_gym.data import files as image_files
from ral_gym.data.cache_folder import CacheFolder
from ral_gym.data.images import load_images
from tests.image_folders import indices, load, message_of, small, write_images

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
    files, _ = listing.list_folder(tmp_path / "images")
    decoding = image_files.Decoding(str(tmp_path / "images"), None, 8, False)
    groups = [files[6:], files[:3], files[3:6]]
    keeping = image_cache.Keeping(budget_mb, str(tmp_path / "cache"))
    decoded = image_cache.decode_groups(groups, decoding, keeping, 1, False)
    assert indices(decoded.images) == [6, 7, 8, 9, 11, 1, 2, 3, 4] and decoded.counts == [5, 2, 2]
    usable = [[True] * 4 + [False, True], [False, True, True], [True, True, False]]
    assert [rows.tolist() for rows in decoded.kept] == usable
    assert [entry.split(":")[0] for entry in decoded.skipped] == ["000010.png", "000000.png", "000005.png"]


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
    CacheFolder(tmp_path / "cache")._remove_stale()
    assert not killed_yesterday.exists()
    assert len(load(config).train) == 95


def test_unwritable_cache_folder(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 5)
    (tmp_path / "file").write_text("in the way")
    message = message_of(small(tmp_path / "images", memory_budget_mb=0, cache_dir=str(tmp_path / "file" / "cache")))
    assert str(tmp_path / "file") in message and "data.cache_dir" in message and "data.memory_budget_mb" in message


def test_full_disk_is_seen_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "images", 5)
    full = type(cache_folder.shutil.disk_usage(tmp_path))(10, 10, 0)
    monkeypatch.setattr(cache_folder.shutil, "disk_usage", lambda folder: full)
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
    monkeypatch.setattr(image_files, "WORKERS_FROM_SECONDS", 0.0)
    monkeypatch.setattr(image_files, "_cpus", lambda: 2)
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
        assert "decoding images: 64 of 64 imgs in 0:0" in shown  # not a terminal: a line, and no bar
        load_images(small(tmp_path), progress=False)
        assert capsys.readouterr().err == ""


SCRIPT = """
import sys
if {guard}:
    from ral_gym.data.cache import Keeping, decode_groups
    from ral_gym.data.files import Decoding
    from ral_gym.data.listing import list_folder
    from pathlib import Path
    try:
        print("started", flush=True)
        files, _ = list_folder(Path(sys.argv[1]))
        decode_groups([files], Decoding(sys.argv[1], None, 256, False), Keeping(cache_mb=0), workers=2, progress=False)
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
