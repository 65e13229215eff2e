"""Metrics: agreement with brute force, and what happens when an extractor is not there."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ral_gym.errors import ConfigError, DivergedError
from ral_gym.metrics import (
    FeatureDistance,
    ImageDistance,
    auc,
    entropy,
    floor,
    gap,
    match_temperature,
    nearest,
    nll,
    perplexity,
    unigram_nll,
    usage,
)
from tests.feature_sets import PixelMeans, gaussian, images

# --- FD and KID


def frechet_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), the symmetric form: no library shares it."""
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(cov_a)
    root_a = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def kid_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared MMD under (x.y / F + 1)^3, pair by pair."""
    kernel = lambda x, y: (x @ y / len(x) + 1) ** 3  # noqa: E731
    same = [np.mean([kernel(x, y) for x, y in itertools.permutations(points, 2)]) for points in (a, b)]
    return float(sum(same) - 2 * np.mean([kernel(x, y) for x in a for y in b]))


def test_fd_equals_brute_force():
    a, b = gaussian(200), gaussian(150, shift=0.3, scale=1.4, seed=1)
    measured = FeatureDistance(a, extractor="test").measure(b)["fd"]
    assert measured == pytest.approx(frechet_by_hand(a.double().numpy(), b.double().numpy()), rel=1e-8)


def test_fd_of_known_gaussians():
    a = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0], [0.0, 0.0], [0.0, 0.0]])
    distance = FeatureDistance(a, extractor="test")
    assert distance.measure(a + torch.tensor([3.0, 4.0]))["fd"] == pytest.approx(25)
    # Twice as wide in each direction: tr(C + 4C - 2 * 2C) = tr C = 2/5 + 8/5.
    assert distance.measure(2 * a)["fd"] == pytest.approx(2)


def test_fd_equals_torchmetrics_on_full_rank_sets():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Given(torch.nn.Module):
        num_features = 5

        def forward(self, features: Tensor) -> Tensor:
            return features

    a, b = gaussian(90).double(), gaussian(70, shift=0.2, seed=1).double()
    metric = FrechetInceptionDistance(feature=Given())
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert FeatureDistance(a, extractor="test").measure(b)["fd"] == pytest.approx(float(metric.compute()), rel=1e-8)


@pytest.mark.parametrize("seed", range(20))
def test_fd_of_a_singular_set_against_itself_is_0(seed):
    generator = torch.Generator().manual_seed(seed)
    direction, along = torch.randn(1, 64, generator=generator), torch.randn(40, 1, generator=generator)
    rank_one = along @ direction + 3  # eigenvalues of S S do not converge for some of these
    assert FeatureDistance(rank_one, extractor="test").measure(rank_one)["fd"] == 0
    few = torch.randn(8, 512, generator=generator)
    assert FeatureDistance(few, extractor="test").measure(few[torch.randperm(8, generator=generator)])["fd"] == 0
    constant = torch.full((8, 3), 1e6)
    assert FeatureDistance(constant, extractor="test").measure(constant)["fd"] == 0


def test_fd_of_8_samples_with_2048_features_is_0_against_itself_and_right_against_others():
    few = torch.randn(8, 2048)
    assert FeatureDistance(few, extractor="test").measure(few)["fd"] == 0
    # Two sets in orthogonal subspaces share nothing: FD is the shift and both traces.
    a, b = torch.zeros(8, 2048), torch.zeros(9, 2048)
    a[:, :7], b[:, 20:28] = torch.randn(8, 7), torch.randn(9, 8)
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum()
    assert FeatureDistance(a, extractor="test").measure(b)["fd"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("shift", [1e-3, 1e-5])
def test_a_small_distance_above_rounding_is_not_0(shift):
    a = gaussian(300).double()
    assert FeatureDistance(a, extractor="test").measure(a + shift)["fd"] == pytest.approx(5 * shift**2, rel=1e-3)


def test_kid_equals_brute_force(monkeypatch):
    """With one subset drawn as the permutation's start, KID is the unbiased MMD of those rows."""
    a, b = gaussian(36), gaussian(30, shift=0.5, seed=1)
    distance = FeatureDistance(a, extractor="test", seed=3)
    result = distance.measure(b)
    generator = torch.Generator().manual_seed(3)
    values = []
    for _ in range(100):
        rows_a = torch.randperm(36, generator=generator)[:10]
        rows_b = torch.randperm(30, generator=generator)[:10]
        values.append(kid_by_hand(a[rows_a].double().numpy(), b[rows_b].double().numpy()))
    assert result["kid_subset_size"] == 10
    assert result["kid"] == pytest.approx(np.mean(values), rel=1e-8)
    assert result["kid_std"] == pytest.approx(np.std(values), rel=1e-8)


def test_kid_is_unbiased():
    """Two samples of one distribution: KID is near 0 however few they are, FD is not."""
    results = [
        FeatureDistance(gaussian(60, seed=s), extractor="t").measure(gaussian(60, seed=s + 100)) for s in range(30)
    ]
    kid = np.array([r["kid"] for r in results])
    assert abs(kid.mean()) < 3 * kid.std() / math.sqrt(len(kid))
    assert min(r["fd"] for r in results) > 0


def test_measuring_again_gives_the_same_and_leaves_the_global_generator_alone():
    distance = FeatureDistance(gaussian(60), extractor="test")
    before = torch.get_rng_state()
    first = distance.measure(gaussian(30, seed=1))
    distance.measure(gaussian(45, shift=9, seed=2))
    assert distance.measure(gaussian(30, seed=1)) == first
    assert torch.equal(torch.get_rng_state(), before)


def test_kid_subsets_are_below_a_third_of_the_smaller_set():
    distance = FeatureDistance(gaussian(60), extractor="test")
    assert distance.measure(gaussian(31))["kid_subset_size"] == 10
    assert distance.measure(gaussian(500))["kid_subset_size"] == 20


def test_the_reference_is_extracted_once_and_each_image_once():
    extractor = PixelMeans()
    distance = ImageDistance(extractor, images(40))
    assert extractor.seen == 40
    result = distance.measure(images(20, seed=1))
    assert extractor.seen == 60
    assert (result["n"], result["n_reference"], result["extractor"]) == (20, 40, "means")


def test_batches_arrays_and_one_tensor_give_the_same():
    whole = ImageDistance(PixelMeans(), images(40)).measure(images(20, seed=1))
    batches = ImageDistance(PixelMeans(), images(40).split(7)).measure(iter(images(20, seed=1).split(6)))
    array = images(20, seed=1).numpy()
    array.flags.writeable = False  # as a memory-mapped set
    assert batches == whole
    assert ImageDistance(PixelMeans(), images(40), batch_size=3).measure(array) == whole


def test_floor_compares_two_disjoint_halves():
    generator = torch.Generator().manual_seed(5)
    reference = images(41, seed=5)
    result = floor(PixelMeans(), reference, seed=5)
    first, second = reference[torch.randperm(41, generator=generator)].chunk(2)
    assert result == ImageDistance(PixelMeans(), first, seed=5).measure(second)
    assert (result["n"], result["n_reference"]) == (20, 21)


def test_unusable_sets_are_refused():
    with pytest.raises(ConfigError, match="5 images are too few"):
        FeatureDistance(gaussian(5), extractor="test")
    with pytest.raises(ConfigError, match="0 images are too few"):
        ImageDistance(PixelMeans(), images(40)).measure(iter([]))
    with pytest.raises(DivergedError, match="NaN"):
        FeatureDistance(gaussian(9) * float("nan"), extractor="test")
    with pytest.raises(ValueError, match="uint8"):
        ImageDistance(PixelMeans(), images(40).float())


# --- codes


class Markov:
    """p(x_0) and p(x_t | x_t-1) over K codes: everything about it can be computed by hand."""

    def __init__(self, k: int = 4, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.start = torch.randn(k, generator=generator)
        self.step = 2 * torch.randn(k, k, generator=generator)

    def logits(self, codes: Tensor) -> Tensor:
        first = self.start.expand(len(codes), 1, -1)
        return torch.cat([first, self.step[codes[:, :-1]]], 1)

    def sample(self, n: int, t: int, temperature: float = 1.0, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        codes = torch.zeros(n, t, dtype=torch.int64)
        for i in range(t):
            probs = (self.logits(codes)[:, i] / temperature).softmax(-1)
            codes[:, i] = torch.multinomial(probs, 1, generator=generator)[:, 0]
        return codes

    def all_log_probs(self, t: int, temperature: float) -> tuple[Tensor, Tensor]:
        codes = torch.tensor(list(itertools.product(range(len(self.start)), repeat=t)))
        log_probs = (self.logits(codes) / temperature).log_softmax(-1)
        return codes, log_probs.gather(-1, codes[..., None])[..., 0].sum(1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_nll_equals_the_sum_over_codes_whatever_the_batch_size(temperature):
    model, codes = Markov(), torch.randint(0, 4, (37, 3))
    every, log_probs = model.all_log_probs(3, temperature)
    lookup = {tuple(c): float(p) for c, p in zip(every.tolist(), log_probs, strict=True)}
    expected = -np.mean([lookup[tuple(c)] for c in codes.tolist()]) / 3
    assert nll(model.logits, codes, temperature) == pytest.approx(expected, rel=1e-5)
    assert nll(model.logits, codes.short().numpy(), temperature, batch_size=5) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropy_estimates_the_exact_one_with_less_noise_than_minus_log_p(temperature):
    model = Markov()
    _, log_probs = model.all_log_probs(4, temperature)
    exact = float(torch.special.entr(log_probs.exp()).sum()) / 4
    estimates, plain = [], []
    for seed in range(20):
        codes = model.sample(200, 4, temperature, seed)
        estimates.append(entropy(model.logits, codes, temperature, batch_size=64))
        plain.append(nll(model.logits, codes, temperature))
    assert np.mean(estimates) == pytest.approx(exact, abs=4 * np.std(estimates) / math.sqrt(20))
    assert np.std(estimates) < 0.7 * np.std(plain)


def test_entropy_of_a_uniform_and_of_a_certain_generator():
    codes = torch.zeros(3, 5, dtype=torch.int16)
    assert entropy(lambda c: torch.zeros(*c.shape, 8), codes) == pytest.approx(math.log(8))
    certain = torch.full((8,), -torch.inf)
    certain[0] = 0
    assert entropy(lambda c: certain.expand(*c.shape, 8), codes) == 0


def test_unigram_nll_adds_one_to_each_count():
    train, test = torch.tensor([[0, 0, 1]]), torch.tensor([[0, 3]])
    # Counts 2, 1, 0, 0 plus one each: 3/7, 2/7, 1/7, 1/7.
    assert unigram_nll(train, test, 4) == pytest.approx(-(math.log(3 / 7) + math.log(1 / 7)) / 2)


def test_perplexity_and_usage():
    assert perplexity(torch.arange(8).view(2, 4), 8) == pytest.approx(8)
    assert perplexity(torch.full((2, 4), 5), 8) == pytest.approx(1)
    assert usage(np.array([[0, 3], [3, 7]], np.int16), 8) == 3
    for outside in (8, -1):
        with pytest.raises(ValueError, match=r"0\.\.7"):
            perplexity(torch.tensor([[outside]]), 8)


def test_no_codes_are_refused():
    with pytest.raises(ValueError, match="N >= 1"):
        nll(Markov().logits, torch.zeros(0, 3, dtype=torch.int64))


def test_match_temperature_finds_the_temperature_a_sample_came_from():
    model = Markov()
    sample = lambda temperature: model.sample(500, 6, temperature)  # noqa: E731
    entropy_of = lambda codes, temperature: entropy(model.logits, codes, temperature)  # noqa: E731
    target = entropy_of(sample(0.83), 0.83)
    found = match_temperature(sample, entropy_of, target)
    assert found.temperature == pytest.approx(0.83, abs=0.01)
    assert found.entropy == pytest.approx(target, abs=2e-3)
    assert found.entropy == entropy_of(sample(found.temperature), found.temperature)


@pytest.mark.parametrize(("target", "end"), [(-1.0, 0.5), (9.0, 1.2)])
def test_match_temperature_ends_at_the_end_when_the_target_is_out_of_reach(target, end):
    found = match_temperature(lambda t: torch.zeros(1, 1), lambda _, t: t, target)
    assert found.temperature == pytest.approx(end, abs=1e-3)
    assert found.entropy == found.temperature


# --- AUC and gap


def test_auc_equals_the_count_over_all_pairs_with_ties():
    generator = np.random.default_rng(0)
    real, fake = generator.integers(0, 6, 40) + 1.0, generator.integers(0, 6, 30) + 0.0
    pairs = [(r > f) + 0.5 * (r == f) for r in real for f in fake]
    assert auc(real, fake) == pytest.approx(np.mean(pairs))
    assert auc(torch.tensor(real).view(8, 5), fake) == pytest.approx(np.mean(pairs))
    assert auc(fake, real) == pytest.approx(1 - np.mean(pairs))


def test_auc_at_its_ends_and_with_nan():
    low, high = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0, 4.0])
    assert (auc(high, low), auc(low, high), auc(low, low)) == (1, 0, 0.5)
    assert math.isnan(auc(torch.tensor([float("nan"), 1.0]), low))
    with pytest.raises(ValueError, match="no fake scores"):
        auc(high, high[:0])


def test_gap():
    assert gap(torch.tensor([1.0, 3.0]), np.array([0.5, 0.5, 0.5])) == 1.5


# --- neighbours


@pytest.mark.parametrize("chunk", [3, 1000])
def test_nearest_equals_brute_force(chunk):
    samples, train = images(6, channels=1, size=8), images(20, channels=1, size=8, seed=1)
    train[13] = samples[2]
    differences = samples.double().flatten(1)[:, None] - train.double().flatten(1)
    expected, index = differences.square().sum(-1).sqrt().min(1)
    indices, distances = nearest(samples, train.numpy(), chunk)
    assert torch.equal(indices, index)
    torch.testing.assert_close(distances.double(), expected, rtol=1e-5, atol=0)
    assert (int(indices[2]), float(distances[2])) == (13, 0)


def test_nearest_tells_almost_equal_images_apart():
    """Bright images that differ in one grey level of one pixel."""
    train = torch.full((300, 1, 64, 64), 250, dtype=torch.uint8)
    for i in range(300):
        train[i, 0, i % 60] += 1 + i // 60
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    indices, distances = nearest(train[order], train, chunk=64)
    assert torch.equal(indices, order)
    assert float(distances.max()) == 0


def test_nearest_in_feature_space_and_refusals():
    indices, distances = nearest(torch.tensor([[0.0, 9.0]]), torch.tensor([[0.0, 0.0], [3.0, 5.0]]))
    assert (int(indices), float(distances)) == (1, 5)
    with pytest.raises(ValueError, match="cannot compare"):
        nearest(torch.zeros(2, 3), torch.zeros(4, 5))
    with pytest.raises(ValueError, match="cannot compare"):
        nearest(torch.zeros(2, 3), torch.zeros(0, 3))
