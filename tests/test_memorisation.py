"""Memorising is seen, and only memorising: copies of training images against held-out ones."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ral_gym.errors import ConfigError, DivergedError
from ral_gym.metrics import Memorisation


def gaussian(n: int, seed: int, scale: float = 1.0, features: int = 6) -> Tensor:
    return scale * torch.randn(n, features, generator=torch.Generator().manual_seed(seed))


TRAIN, HELD_OUT = gaussian(400, seed=1), gaussian(100, seed=2)


@pytest.fixture
def memory() -> Memorisation:
    """400 training and 100 held-out images, alike."""
    return Memorisation(TRAIN, HELD_OUT[:, None], extractor="test")


def test_the_figures_are_those_of_brute_force() -> None:
    held_out, samples = gaussian(12, seed=2).view(4, 3, 6), gaussian(9, seed=3, scale=0.7)
    distance = lambda point: min(float((point - other).norm()) for other in TRAIN)  # noqa: E731
    given, new = [distance(point) for image in held_out for point in image], [distance(point) for point in samples]
    pairs = [(a < b) + 0.5 * (a == b) for a in new for b in given]
    measured = Memorisation(TRAIN, held_out, extractor="test").measure(samples)
    assert measured["score"] == pytest.approx(np.mean(pairs), abs=1e-12)
    assert measured["near"] == pytest.approx(np.mean(np.array(new) <= np.quantile(given, 0.05)))


def test_copies_score_as_memorised_and_new_images_do_not(memory) -> None:
    copies = memory.measure(TRAIN[:200] + gaussian(200, seed=3, scale=0.01))
    assert copies == {"score": 1.0, "near": 1.0}
    alike = memory.estimates(gaussian(1000, seed=4))
    assert alike["score"].low < 0.5 < alike["score"].high and alike["near"].low < 0.05 < alike["near"].high
    assert memory.measure(HELD_OUT)["score"] == pytest.approx(0.5)
    assert memory.measure(gaussian(200, seed=5, scale=3))["score"] < 0.1


def test_a_few_copies_among_poor_samples_are_seen_by_the_nearest_ones(memory) -> None:
    poor, copies = gaussian(80, seed=5, scale=4), TRAIN[:20]
    measured = memory.measure(torch.cat([poor, copies]))
    assert measured["score"] < 0.5  # it looks at whole sets
    assert measured["near"] >= 0.2


def test_a_part_of_the_training_images_does_not_bias_the_score() -> None:
    part = Memorisation(TRAIN[:100], HELD_OUT[:, None], extractor="test").estimates(gaussian(1000, seed=4))
    assert part["score"].low < 0.5 < part["score"].high


def test_standard_errors_are_those_of_independent_sets() -> None:
    draw = lambda seed, n: gaussian(n, seed=seed, scale=0.9)  # noqa: E731
    independent = [
        Memorisation(TRAIN, draw(seed, 100)[:, None], extractor="test").measure(draw(seed + 500, 300))
        for seed in range(100, 160)
    ]
    estimates = [
        Memorisation(TRAIN, draw(seed, 100)[:, None], extractor="test").estimates(draw(seed + 500, 300))
        for seed in range(5)
    ]
    for name in ("score", "near"):
        spread = np.std([result[name] for result in independent], ddof=1)
        error = np.mean([estimate[name].standard_error for estimate in estimates])
        assert 0.7 * spread < error < 1.4 * spread, name
    assert (estimates[0]["score"].n, estimates[0]["score"].extractor) == (300, "test")


def test_versions_of_one_image_do_not_pass_for_more_images() -> None:
    samples, once = gaussian(300, seed=4), gaussian(16, seed=2)[:, None]
    one, four = (
        Memorisation(TRAIN, held_out, extractor="test").estimates(samples)["score"]
        for held_out in (once, once.expand(-1, 4, -1))
    )
    assert four.value == pytest.approx(one.value) and four.standard_error == pytest.approx(one.standard_error)


def test_what_cannot_be_compared_is_refused(memory) -> None:
    with pytest.raises(ConfigError, match="0 training and 100 held-out images"):
        Memorisation(TRAIN[:0], HELD_OUT[:, None], extractor="test")
    with pytest.raises(ConfigError, match="0 held-out images"):
        Memorisation(TRAIN, HELD_OUT[:0, None], extractor="test")
    with pytest.raises(ConfigError, match="3 samples and 100 held-out images are too few"):
        memory.estimates(TRAIN[:3])
    with pytest.raises(DivergedError, match="extractor test are NaN"):
        memory.measure(TRAIN * float("nan"))
