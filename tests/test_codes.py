"""The code file: what was encoded is what is read, and nothing else is."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ral_gym.codes import CodeGrid, CodeSet, decode_codes, encode_images, encode_set
from ral_gym.data import ImageSet, to_float
from ral_gym.errors import RunError
from ral_gym.storage import save_tensors
from ral_gym.vqvae import VQVAE

GRID = CodeGrid(height=4, width=4, codebook_size=8)


@pytest.fixture(scope="module")
def vqvae() -> VQVAE:
    """Untrained, with a k-means codebook."""
    torch.manual_seed(0)
    vqvae = VQVAE(16, 1, codebook_size=8, codebook_dim=4, hidden_units=8, residual_units=4, layers=2)
    vqvae.train()(to_float(torch.from_numpy(images(64))))
    return vqvae.eval()


def images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 1, 16, 16), dtype=np.uint8)


def code_set(new_people: bool = True) -> CodeSet:
    rng = np.random.default_rng(0)
    train, test, new = (rng.integers(0, 8, (n, 16)).astype(np.int16) for n in (12, 3, 2))
    return CodeSet(train, test, new if new_people else None, clean=6)


def test_the_grid_has_two_more_tokens() -> None:
    grid = CodeGrid(height=2, width=3, codebook_size=5)
    assert (grid.n_codes, grid.not_drawn, grid.never_drawn) == (6, 5, 6)


@pytest.mark.parametrize("new_people", [True, False])
def test_codes_survive_a_file(tmp_path, new_people) -> None:
    codes = code_set(new_people)
    codes.save(tmp_path / "codes.safetensors")
    again = CodeSet.load(tmp_path / "codes.safetensors", GRID)
    for name in ("train", "test", *(["new_people"] if new_people else [])):
        assert np.array_equal(getattr(again, name), getattr(codes, name))
        assert getattr(again, name).dtype == np.int16
    assert again.clean == 6 and (again.new_people is None) == (not new_people)


def test_an_empty_test_set_survives_a_file(tmp_path) -> None:
    CodeSet(code_set().train, np.empty((0, 16), np.int16), None, 12).save(tmp_path / "codes.safetensors")
    assert CodeSet.load(tmp_path / "codes.safetensors", GRID).test.shape == (0, 16)


def test_damaged_and_foreign_code_files_are_refused(tmp_path) -> None:
    path = tmp_path / "codes.safetensors"
    with pytest.raises(RunError, match=r"codes\.safetensors is missing"):
        CodeSet.load(path)
    code_set().save(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(RunError, match=r"is damaged .*; remove it"):
        CodeSet.load(path)
    save_tensors(path, {"train": torch.zeros(1)}, {"class": "VQVAE"})
    with pytest.raises(RunError, match=r"is not a code file .*; remove it to encode again"):
        CodeSet.load(path)


@pytest.mark.parametrize("other", [CodeGrid(4, 4, 7), CodeGrid(8, 4, 8), CodeGrid(2, 4, 8)])
def test_codes_of_another_vqvae_are_refused(tmp_path: Path, other: CodeGrid) -> None:
    path = tmp_path / "codes.safetensors"
    code_set().save(path)
    with pytest.raises(RunError, match=r"belongs to another VQ-VAE: its codes are not .*; remove it to encode again"):
        CodeSet.load(path, other)
    negative = code_set()
    negative.test[0, 0] = -1
    negative.save(path)
    with pytest.raises(RunError, match="belongs to another VQ-VAE"):
        CodeSet.load(path, GRID)


def test_the_first_pass_encodes_the_images_as_they_are(vqvae) -> None:
    photos = images(10)
    codes = encode_images(vqvae, photos, passes=3, seed=1, batch_size=4, progress=False)
    assert codes.shape == (30, 16) and codes.dtype == np.int16
    assert np.array_equal(codes[:10], vqvae.encode(to_float(torch.from_numpy(photos))).numpy())
    assert not np.array_equal(codes[10:20], codes[:10]) and not np.array_equal(codes[10:20], codes[20:])


def test_augmented_passes_follow_their_seed(vqvae) -> None:
    one, same, other = (encode_images(vqvae, images(6), passes=2, seed=s, progress=False) for s in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one[6:], other[6:])


def test_read_only_images_are_encoded_without_a_warning(vqvae) -> None:
    # Large sets are read-only memory maps; torch warns of tensors over such memory.
    photos = images(6)
    expected = encode_images(vqvae, photos, progress=False)
    photos.flags.writeable = False
    assert np.array_equal(encode_images(vqvae, photos, progress=False), expected)


def test_held_out_images_are_encoded_once(vqvae) -> None:
    photos = ImageSet(images(5), images(3, 1), images(2, 2), "noise", ())
    codes = encode_set(vqvae, photos, passes=4, seed=0, progress=False)
    assert codes.new_people is not None
    assert [len(part) for part in (codes.train, codes.test, codes.new_people)] == [20, 3, 2] and codes.clean == 5
    assert encode_set(vqvae, ImageSet(images(5), images(3), None, "", ()), passes=1, seed=0).new_people is None


def test_decoding_gives_bytes_whatever_the_batch(vqvae) -> None:
    codes = code_set().train
    whole = decode_codes(vqvae, codes)
    assert whole.shape == (12, 1, 16, 16) and whole.dtype == torch.uint8
    assert torch.equal(decode_codes(vqvae, torch.from_numpy(codes), batch_size=5), whole)
    assert decode_codes(vqvae, codes[:, :8]).shape == (12, 1, 8, 16)
