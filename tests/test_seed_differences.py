"""Differences over seeds: paired, and "beyond" only where the interval excludes 0."""

import math
import random
from statistics import mean, stdev

import pytest

from ral_gym.errors import ConfigError
from ral_gym.metrics import SeedDifference
from ral_gym.metrics.intervals import student_t
from ral_gym.metrics.seeds import ON_EVERY_SEED


def random_pair(chance: random.Random, n: int) -> tuple[dict[int, float], dict[int, float]]:
    """Two rows of n seeds: what a seed shares is large, the difference small."""
    before = {seed: chance.gauss(30, 10) for seed in range(n)}
    return before, {seed: value - chance.gauss(2, 1.5) for seed, value in before.items()}


@pytest.mark.parametrize("number", range(30))
def test_beyond_and_bold_are_the_same_as_an_interval_without_0(number: int) -> None:
    before, after = random_pair(random.Random(number), 2 + number % 4)
    found = SeedDifference.of(before, after)
    values = [after[seed] - before[seed] for seed in before]
    half = student_t(len(values) - 1) * stdev(values) / len(values) ** 0.5
    assert found.value == pytest.approx(mean(values)) and found.half == pytest.approx(half)
    assert found.beyond == (abs(mean(values)) > half)
    assert found.markdown().startswith("**") == found.beyond
    assert (found.verdict() == "beyond the interval") == found.beyond
    same = all(v < 0 for v in values) or all(v > 0 for v in values)
    assert found.on_every_seed == same
    assert (found.verdict() == ON_EVERY_SEED) == (same and not found.beyond)
    mirrored = SeedDifference.of(after, before)
    assert (mirrored.beyond, mirrored.on_every_seed) == (found.beyond, found.on_every_seed)


def test_the_same_sign_on_every_seed_is_not_enough() -> None:
    found = SeedDifference.of({0: 29.2, 1: 27.5, 2: 19.8}, {0: 21.5, 1: 21.3, 2: 17.7})
    assert found.each() == "-7.7 / -6.2 / -2.1" and found.on_every_seed and not found.beyond
    assert found.verdict() == ON_EVERY_SEED and found.markdown() == found.text() == "-5.3 ± 7.2"
    assert found.ends() == "-5.3 [-12.5, +1.9]"


def test_one_seed_has_no_interval_and_is_never_beyond() -> None:
    found = SeedDifference.of({3: 10.0, 4: 1.0}, {3: 2.0, 5: 1.0})  # the seeds that both have
    assert found.n == 1 and found.by_seed == {3: -8.0} and found.interval is None and found.half is None
    assert not found.beyond and not found.on_every_seed and found.verdict() == "one seed, no interval"
    assert found.text() == found.ends() == found.markdown() == "-8.0"


def test_values_that_are_no_numbers_are_never_beyond() -> None:
    assert not SeedDifference.from_values({0: math.nan, 1: -1.0, 2: -1.0}).beyond
    assert not SeedDifference.from_values({0: 0.0, 1: 0.0}).beyond  # the interval is 0 itself


def test_seeds_that_share_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no seed is in both \(seeds 0, 1 and 2\)"):
        SeedDifference.of({0: 1.0, 1: 1.0}, {2: 1.0})
