"""Images: sources, cuts, splits, the cache on disk, bad files and the tensor helpers."""

from __future__ import annotations

import io
import logging
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ral_gym.data import files as image_files
from ral_gym.data.images import augment, to_float, to_uint8
from ral_gym.errors import ConfigError
from tests.image_folders import indices, load, message_of, small, write_images

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
        ("mnist", "faces, emoji, celeba:PATH"),
        ("lsun:/data", "'lsun:/data'"),
        ("faces:/data", "'faces:/data'"),
        ("folder:", "folder:PATH"),
        ("lsun:", "lsun:PATH"),
        ("hf: ", "hf:NAME"),
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
