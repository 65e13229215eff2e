"""Images that took long to decode are kept on disk, below a limit, until they change or are removed."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ral_gym.commands.cli import main
from ral_gym.config import DataConfig
from ral_gym.data import cache as image_cache
from ral_gym.data import cache_folder
from tests.image_folders import load, small, write_images


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """60 images that are kept, however fast they were decoded."""
    monkeypatch.setattr(image_cache, "KEEP_AFTER_SECONDS", -1.0)
    write_images(tmp_path / "images", 60, suffix="bmp")
    return small(tmp_path / "images", cache_dir=str(tmp_path / "cache"))


def sets(config: DataConfig) -> list[Path]:
    return sorted(Path(str(config.cache_dir)).glob("images-*"))


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_cache, "iterate_decoded", None)


def test_a_kept_set_is_the_same_and_not_decoded_again(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    (Path(config.source.partition(":")[2]) / "000007.bmp").write_bytes(b"broken")
    first = load(config)
    assert first.cache == sets(config)[0]
    forbid_decoding(monkeypatch)
    again = load(config)
    assert np.array_equal(again.train, first.train) and np.array_equal(again.test, first.test)
    assert again.skipped == first.skipped == ("000007.bmp: not an image",)
    assert again.description == first.description and not isinstance(again.train.base, np.memmap)


def test_what_is_decoded_in_a_moment_is_not_kept(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_cache, "KEEP_AFTER_SECONDS", 2.0)
    assert load(config).cache is None and not sets(config)


def test_nothing_is_kept_where_none_may_be(config: DataConfig) -> None:
    assert load(dataclasses.replace(config, cache_mb=0)).cache is None and not sets(config)


@pytest.mark.parametrize("change", ["content", "time", "size", "seed", "crop", "pillow", "format"])
def test_any_change_is_seen(config: DataConfig, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    load(config)
    path, seed = Path(config.source.partition(":")[2]) / "000003.bmp", 0
    if change in ("content", "size"):
        Image.new("RGB", (24, 20 + (change == "size")), (255, 255, 255)).save(path)
    elif change == "time":
        os.utime(path, ns=(1, 1))
    elif change == "crop":
        config = dataclasses.replace(config, crop=10)
    elif change == "pillow":
        monkeypatch.setattr(cache_folder.PIL, "__version__", "0")
    elif change == "format":
        monkeypatch.setattr(cache_folder, "FORMAT_VERSION", 0)
    else:
        seed = 1
    images = load(config, seed)
    assert len(sets(config)) == 2
    assert ((images.train == 255).any() or (images.test == 255).any()) == (change in ("content", "size"))


@pytest.mark.parametrize("damage", ["flip", "cut", "index", "numbers", "no index"])
def test_a_damaged_set_is_made_again(config: DataConfig, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    expected = load(config).train
    file, index = sets(config)[0] / "images.npy", sets(config)[0] / "index.json"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-5] ^= 255
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-7])
    elif damage == "index":
        index.write_text("[1")
    elif damage == "numbers":
        index.write_text(json.dumps(json.loads(index.read_text()) | {"bad": [[-1, "x"], [99, "y"]]}))
    else:
        index.unlink()
    assert np.array_equal(load(config).train, expected)
    assert ("damaged" in caplog.text) == (damage != "no index")
    caplog.clear()
    assert np.array_equal(load(config).train, expected) and "damaged" not in caplog.text


def test_the_least_recently_used_set_makes_room(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_folder, "MB", 60 * 3 * 64 + 200)  # one set with its header is 1 MB now
    config = dataclasses.replace(config, cache_mb=2)
    for seed, used in ((0, 100), (1, 50)):
        os.utime(load(config, seed).cache / "index.json", (used, used))  # type: ignore[operator]
    kept = load(config, 0).cache  # used again, now
    load(config, 2)
    assert len(sets(config)) == 2 and kept in sets(config)
    larger = dataclasses.replace(config, image_size=16)
    assert load(larger).cache is None and len(sets(config)) == 2


def test_a_folder_that_cannot_be_written_is_only_warned_of(
    config: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("in the way")
    assert load(config).cache is None and "Cannot write the image cache" in caplog.text


def test_the_command_lists_and_clears(config: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ["--cache-dir", str(config.cache_dir)]
    assert main(["cache", *folder]) == 0 and "no decoded images" in capsys.readouterr().out
    load(config)
    (Path(str(config.cache_dir)) / "somebody-elses").mkdir()
    (Path(str(config.cache_dir)) / "images-x.tmp-1").mkdir()
    assert main(["cache", *folder]) == 0
    assert "60" in (shown := capsys.readouterr().out) and "--clear" in shown
    assert main(["cache", "--clear", *folder]) == 0 and "removed" in capsys.readouterr().out
    assert not sets(config) and (Path(str(config.cache_dir)) / "somebody-elses").exists()


SCRIPT = """
import sys
from ral_gym.config import DataConfig
from ral_gym.data import cache
from ral_gym.data.images import load_images
cache.KEEP_AFTER_SECONDS = -1.0
images = load_images(DataConfig(source=sys.argv[1], image_size=8, cache_dir=sys.argv[2], workers=1), progress=False)
print(int(images.train.sum()))
"""


def test_two_processes_at_once(config: DataConfig) -> None:
    command = [sys.executable, "-c", SCRIPT, config.source, str(config.cache_dir)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sums = {process.communicate(timeout=120)[0] for process in both}
    assert sums == {f"{int(load(config).train.sum())}\n"} and [process.returncode for process in both] == [0, 0]
    assert len(sets(config)) == 1
