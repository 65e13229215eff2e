"""The code file: what was encoded is what is read, and nothing else is."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ral_gym.data.images import ImageSet, to_float
from ral_gym.errors import ConfigError, RunError
from ral_gym.grid import CodeGrid
from ral_gym.runs.storage import save_tensors
from ral_gym.tokenizers.code_set import CodeSet, decode_codes, encode_images, encode_set
from ral_gym.tokenizers.vqvae import VQVAE

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


# A name for every code of a grid of two levels: (level, row, column), by plain loops over the definition.
TWO = CodeGrid(height=4, width=3, codebook_size=8, levels=2)
PLACES = [(0, row, column) for row in range(4) for column in range(3)]
PLACES += [(1, row, column) for row in range(8) for column in range(6)]


def top_row(place: tuple[int, int, int]) -> int:
    level, row, _ = place
    return row // 2 if level else row


def test_sizes_of_one_level_and_of_two() -> None:
    one = CodeGrid(height=4, width=3, codebook_size=8)
    assert (one.n_codes, one.level_sizes, one.shapes) == (12, (12,), ((4, 3),))
    assert (TWO.n_codes, TWO.level_sizes, TWO.shapes) == (60, (12, 48), ((4, 3), (8, 6)))
    assert [one.codes_of(rows) for rows in (1, 4)] == [3, 12] and [TWO.codes_of(rows) for rows in (1, 4)] == [15, 60]
    assert [grid.rows_of(grid.codes_of(3)) for grid in (one, TWO)] == [3, 3]
    with pytest.raises(ConfigError, match="a code grid of 3 levels: give 1 or 2"):
        CodeGrid(4, 4, 8, levels=3)


@pytest.mark.parametrize("length", [0, 12, 48, 61, 75])
def test_lengths_that_are_no_whole_rows_are_refused(length: int) -> None:
    with pytest.raises(ConfigError, match=rf"^{length} codes per image do not fit two levels of 12 \+ 48: "):
        TWO.crop(np.zeros((1, length)), 1)


@pytest.mark.parametrize(("prefix", "stop"), [(0, 4), (1, 4), (0, 2), (1, 3), (2, 2)])
def test_the_mask_is_the_rows_of_both_levels(prefix: int, stop: int) -> None:
    mask = TWO.mask(prefix, stop)
    assert mask.tolist() == [prefix <= top_row(place) < stop for place in PLACES] and mask.dtype == bool
    assert CodeGrid(4, 3, 8).mask(prefix, stop).tolist() == mask[:12].tolist()


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_an_images_first_rows_are_a_sequence_of_their_own(rows: int) -> None:
    kept = [index for index, place in enumerate(PLACES) if top_row(place) < rows]
    codes = np.arange(120).reshape(2, 60)
    assert np.array_equal(TWO.crop(codes, rows), codes[:, kept])
    assert torch.equal(TWO.crop(torch.from_numpy(codes), rows), torch.from_numpy(codes[:, kept]))
    assert np.array_equal(TWO.crop(TWO.crop(codes, 3), min(rows, 3)), TWO.crop(codes, min(rows, 3)))
    one = CodeGrid(4, 3, 8)
    assert np.array_equal(one.crop(codes[:, :12], rows), codes[:, : 3 * rows])
    # Where each of these codes has gone to.
    positions = torch.tensor(kept)
    assert TWO.short_position(positions, rows).tolist() == list(range(len(kept)))
    assert TWO.short_position(positions.numpy(), rows).tolist() == list(range(len(kept)))
    assert TWO.short_position(positions, torch.full_like(positions, rows)).tolist() == list(range(len(kept)))
    assert [TWO.short_position(position, rows) for position in kept] == list(range(len(kept)))
    assert [one.short_position(position, rows) for position in range(3 * rows)] == list(range(3 * rows))


def test_a_sequence_is_split_into_its_levels() -> None:
    codes = np.arange(30)[None]  # 2 rows
    assert [level.tolist() for level in TWO.split(codes)] == [[list(range(6))], [list(range(6, 30))]]
    assert CodeGrid(4, 3, 8).split(codes[:, :6])[0].shape == (1, 6)


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
    with pytest.raises(
        RunError, match=r"belongs to another VQ-VAE: its codes \(tensor .*\) are not .*; remove it to encode again"
    ):
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
    assert np.array_equal(codes[:10], vqvae.encode(to_float(torch.from_numpy(photos)))[0].numpy())
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
