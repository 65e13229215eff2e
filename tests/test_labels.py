"""Labels in sequences and in code files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ral_gym.data.images import Labels
from ral_gym.errors import ConfigError, RunError
from ral_gym.grid import CodeGrid
from ral_gym.tokenizers.code_set import CodeSet

GRIDS = [CodeGrid(3, 2, 5, classes=4), CodeGrid(3, 2, 5, levels=2, classes=4)]


@pytest.mark.parametrize("grid", GRIDS)
def test_the_label_is_the_last_entry_and_comes_back(grid: CodeGrid) -> None:
    codes = torch.randint(5, (7, grid.n_codes))
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    sequence = grid.with_labels(codes, labels)
    assert sequence.shape == (7, grid.length) == (7, grid.n_codes + 1)
    assert sequence[:, -1].tolist() == [7, 8, 9, 10, 11, 7, 8] and grid.no_class == 11 and grid.largest_entry == 10
    assert torch.equal(grid.labels_of(sequence), labels)  # type: ignore[arg-type]
    assert torch.equal(grid.without_labels(sequence), codes)
    assert grid.mask(1, 2).shape == (grid.length,) and not grid.mask(0, 3)[-1]
    assert grid.mask(0, 3).sum() == grid.n_codes
    for with_labels, without in zip(grid.split(sequence), replace(grid, classes=0).split(codes), strict=True):
        assert torch.equal(with_labels, without)
    short = grid.crop(sequence.numpy(), 2)
    assert (short == grid.with_labels(replace(grid, classes=0).crop(codes, 2), labels).numpy()).all()


def test_without_classes_nothing_changes() -> None:
    grid = CodeGrid(3, 2, 5)
    codes = torch.randint(5, (7, 6))
    assert grid.length == grid.n_codes and grid.largest_entry == grid.never_drawn
    assert grid.labels_of(codes) is None and grid.without_labels(codes) is codes and grid.mask(0, 3).shape == (6,)
    with pytest.raises(ConfigError, match="without classes"):
        grid.with_labels(codes, torch.zeros(7, dtype=torch.int64))


def test_labels_and_grids_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"labels lie in 0\.\.5: the 4 classes are 0\.\.3"):
        GRIDS[0].with_labels(np.zeros((2, 6), np.int16), np.array([0, 5]))
    with pytest.raises(ConfigError, match="at most 32767"):
        CodeGrid(1, 1, 32_000, classes=1000)
    with pytest.raises(ConfigError, match="-1 classes"):
        CodeGrid(1, 1, 8, classes=-1)


def labelled_set() -> CodeSet:
    train, test = (np.arange(n * 6, dtype=np.int16).reshape(n, 6) % 5 for n in (4, 3))
    return CodeSet(train, test, None, 2, Labels(np.array([0, 2, 0, 2]), np.array([1, 1, 0]), ("a", "b", "c")))


def test_a_code_file_keeps_labels_and_class_names(tmp_path: Path) -> None:
    labelled_set().save(tmp_path / "codes.safetensors")
    grid = CodeGrid(3, 2, 5)
    codes = CodeSet.load(tmp_path / "codes.safetensors", grid)
    assert codes.classes == ("a", "b", "c") and codes.grid_of(grid).classes == 3
    assert codes.labels is not None and codes.labels.train.tolist() == [0, 2, 0, 2]
    whole = codes.sequences("clean", codes.grid_of(grid))
    assert whole.dtype == np.int16 and whole[:, -1].tolist() == [7, 9] and (whole[:, :-1] == codes.train[:2]).all()
    assert codes.sequences("test", codes.grid_of(grid))[:, -1].tolist() == [8, 8, 7]
    assert codes.sequences("test", grid).shape == (3, 6)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (Labels(np.array([0, 3, 0, 2]), np.array([1, 1, 0]), ("a", "b", "c")), r"one class in 0\.\.2"),
        (Labels(np.array([0, 2, 0]), np.array([1, 1, 0]), ("a", "b", "c")), "each of the 4 images"),
        (Labels(np.array([0, 2, 0, 2]), np.array([1, 1, 0]), ()), "no list of class names"),
    ],
)
def test_a_code_file_with_wrong_labels_is_refused(tmp_path: Path, labels: Labels, message: str) -> None:
    replace(labelled_set(), labels=labels).save(tmp_path / "codes.safetensors")
    with pytest.raises(RunError, match=message):
        CodeSet.load(tmp_path / "codes.safetensors")
