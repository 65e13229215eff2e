"""Image files from strangers: other formats than named, no regular files, larger than they look, odd names."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ral_gym.config import DataConfig
from ral_gym.data.files import Decoding, as_image, to_square
from ral_gym.data.opening import Limits, check_regular, open_image, read_file, read_zip_entry
from ral_gym.errors import DataError
from ral_gym.stages.completion import read_image
from ral_gym.tokenizers.base import tokenizer_of
from tests.image_folders import encoded, load, message_of, small, write_images, write_lmdb
from tests.test_completion import ONE

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n(x) print\nshowpage\n"


# Formats ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for gs first on the path; the file that it leaves once it was started on something."""
    (tmp_path / "bin").mkdir()
    gs, ran = tmp_path / "bin" / "gs", tmp_path / "ran"
    gs.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo 10.0 && exit 0\necho "$@" >> {ran}\n')
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{gs.parent}:{os.environ['PATH']}")
    return ran


def test_postscript_is_never_run_wherever_it_comes_from(tmp_path: Path, ghostscript: Path) -> None:
    write_images(tmp_path / "images", 3)
    (tmp_path / "images" / "photo.png").write_bytes(POSTSCRIPT)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in (tmp_path / "images").iterdir():
            archive.write(file, file.name)
    write_lmdb(tmp_path / "a_lmdb", [encoded(0), POSTSCRIPT, encoded(1)])
    for source in (f"folder:{tmp_path / 'images'}", f"celeba:{tmp_path / 'a.zip'}", f"lsun:{tmp_path / 'a_lmdb'}"):
        images = load(small(source, crop=8))
        (skipped,) = images.skipped
        assert skipped.endswith(": not an image") and len(images.train) + len(images.test) == len("abc") - (
            "lsun" in source
        )
    with pytest.raises(DataError, match="cannot be read as an image"):
        read_image(tmp_path / "images" / "photo.png", tokenizer_of(ONE, 32, 1), DataConfig())
    assert not ghostscript.exists()


def test_the_stand_in_would_have_been_seen(tmp_path: Path, ghostscript: Path) -> None:
    """So that the test above can fail: without the list of formats Pillow starts Ghostscript."""
    (tmp_path / "photo.png").write_bytes(POSTSCRIPT)
    with pytest.raises(Exception), Image.open(tmp_path / "photo.png") as image:  # noqa: B017
        image.load()
    assert ghostscript.exists()


@pytest.mark.parametrize("kind", ["ICO", "TGA", "PCX", "SGI", "IM", "DDS"])
def test_formats_that_the_documentation_does_not_name_are_no_images(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (16, 16)).save(path, kind)
    with pytest.raises(Image.UnidentifiedImageError):
        open_image(path.read_bytes())


# Not regular --------------------------------------------------------------------------------------------------------


def test_fifos_devices_and_sockets_are_named_and_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "images", 3)
    os.mkfifo(tmp_path / "images" / "fifo.png")
    (tmp_path / "images" / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "images" / "fifo.png")
    monkeypatch.chdir(tmp_path / "images")  # a socket's path may have 107 letters
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.png")
        images = load(small(tmp_path / "images"))
    assert dict(entry.split(": ", 1) for entry in images.skipped) == {
        "fifo.png": "a FIFO, not a regular file",
        "link.png": "a FIFO, not a regular file",
        "zero.png": "a device, not a regular file",
        "socket.png": "a socket, not a regular file",
    }
    assert len(images.train) + len(images.test) == 3


def test_a_file_that_is_no_file_is_refused_at_every_entrance(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "set").mkdir()
    os.mkfifo(tmp_path / "set" / "x.parquet")
    for source in ("celeba", "folder", "lsun", "hf"):
        assert "FIFO" in message_of(small(f"{source}:{tmp_path / 'fifo'}"))
    assert "x.parquet" in message_of(small(f"hf:{tmp_path / 'set'}"))
    with pytest.raises(DataError, match="a FIFO"):
        read_image(tmp_path / "fifo", tokenizer_of(ONE, 32, 1), DataConfig())
    with pytest.raises(ValueError, match="a device"):
        read_file("/dev/zero")
    with pytest.raises(ValueError, match="a folder"):
        check_regular(tmp_path.stat().st_mode)


# Sizes --------------------------------------------------------------------------------------------------------------


def flat_png(width: int, height: int) -> bytes:
    """A black PNG of any size in a few bytes."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packed = zlib.compressobj(9)
    rows = b"".join(packed.compress(bytes(1 + width)) for _ in range(height)) + packed.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", rows) + part(b"IEND", b"")


MEASURE = """
import resource, sys
from ral_gym.config import DataConfig
from ral_gym.data.images import load_images
from ral_gym.errors import DataError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try: load_images(DataConfig(source=sys.argv[1], image_size=8), progress=False)
except DataError as error: print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def what_loading_takes(source: str) -> tuple[str, int]:
    """The error's message, and MiB of memory."""
    done = subprocess.run([sys.executable, "-c", MEASURE, source], capture_output=True, text=True, check=True)
    *lines, memory = done.stdout.splitlines()
    return lines[0], int(memory)


def test_bombs_take_no_memory(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("huge.png", "w", force_zip64=True) as file:
            for _ in range(300):
                file.write(bytes(2**20))
        archive.writestr("wide.png", flat_png(13_000, 13_000))
    message, memory = what_loading_takes(f"celeba:{bomb}")
    assert "None of the 2 images" in message and memory < 150
    with (
        zipfile.ZipFile(bomb) as archive,
        pytest.raises(ValueError, match=r"300\.0 MiB are more than data\.max_file_mb"),
    ):
        read_zip_entry(archive, "huge.png")


def test_limits_can_be_raised(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in "ab":
        (tmp_path / "images" / f"{name}.png").write_bytes(flat_png(1500, 1000))
    tight = small(tmp_path / "images", max_megapixels=1)
    assert "1500x1000 pixels are more than data.max_megapixels 1" in message_of(tight)
    assert len(load(small(tmp_path / "images", max_megapixels=2)).train) == 1
    assert "more than 1 images: raise data.max_files" in message_of(small(tmp_path / "images", max_files=1))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)).save(tmp_path / "images/c.bmp")
    images = load(small(tmp_path / "images", max_file_mb=1))
    assert images.skipped == ("c.bmp: 1.4 MiB are more than data.max_file_mb 1",)
    assert load(small(tmp_path / "images", max_file_mb=2)).skipped == ()


def test_a_raised_limit_goes_beyond_pillows_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)  # Pillow refuses twice that
    limits = Limits(max_megapixels=1)
    square = to_square(open_image(flat_png(600, 500), limits), Decoding("", None, 8, True, limits=limits))
    assert square.shape == (1, 8, 8) and Image.MAX_IMAGE_PIXELS == 100_000


def test_a_zip_that_lists_too_many_files_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        for number in range(30):
            archive.writestr(f"{number}.png", b"")
    assert "lists more than 29 files" in message_of(small(f"celeba:{tmp_path / 'c.zip'}", max_files=29))
    content = bytearray((tmp_path / "c.zip").read_bytes())
    end = content.rfind(b"PK\x05\x06")
    content[end + 12 : end + 16] = struct.pack("<I", 2**31)  # says that its list has 2 GB
    (tmp_path / "lie.zip").write_bytes(content)
    assert "lie.zip" in message_of(small(f"celeba:{tmp_path / 'lie.zip'}"))


def test_other_compressions_than_deflate_are_not_unpacked(tmp_path: Path) -> None:
    for number, kind in enumerate((zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)):
        with zipfile.ZipFile(tmp_path / f"{number}.zip", "w", kind) as archive:
            archive.writestr("a.png", encoded(1))
        assert "another method than deflate" in message_of(small(f"celeba:{tmp_path / f'{number}.zip'}"))


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((8, 8), np.float32), np.zeros((8, 8, 4), np.uint8), np.zeros(8, np.uint8), np.zeros((0, 8), np.uint8)],
)
def test_arrays_that_are_no_images(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="an array of"):
        as_image(wrong)


# Names --------------------------------------------------------------------------------------------------------------


def test_control_characters_of_names_never_reach_the_terminal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "images\x1b[2J"
    write_images(folder, 3)
    (folder / "a\x1b[31m\nb.png").write_bytes(b"broken")
    (folder / os.fsdecode(b"\xff.png")).write_bytes(b"broken")
    images = load(small(folder))
    text = " ".join([images.description, *images.skipped, caplog.text])
    assert "a\\x1b[31m\\nb.png: not an image" in images.skipped and "\x1b" not in text
    text.encode()  # no halves of surrogates
    values = [b"junk", encoded(1), encoded(2)]
    images = load(small(f"lsun:{write_lmdb(tmp_path / 'a_lmdb', values)}"))
    assert len(images.skipped) == 1
