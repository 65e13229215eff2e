"""Leave-one-out rewards: each form against images left out one by one, REINFORCE with them against FD's gradient."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.distributions import MultivariateNormal

from ral_gym.errors import ConfigError, DivergedError
from ral_gym.metrics import FeatureDistance
from ral_gym.rewards.distribution import (
    DISTRIBUTION_TERMS,
    FrechetReward,
    KernelReward,
)
from ral_gym.rewards.rank_one import root_trace, root_trace_change, spectral


def sample(n: int, width: int, seed: int, shift: float = 0.2, mixing_seed: int = 0) -> Tensor:
    """(n, width) float64 correlated features, their means away from 0."""
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(mixing_seed)).double() / width**0.5
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)).double() @ mixing + shift + 3


def root_of(matrix: Tensor) -> Tensor:
    spectrum, vectors = torch.linalg.eigh(matrix)
    return (vectors * spectrum.clamp_min(0).sqrt()) @ vectors.T


def frechet(reference: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """FD from a reference's features, with the root of A S A; singular S are allowed."""
    root = root_of(torch.cov(reference.T, correction=0))
    inner = torch.linalg.eigvalsh(root @ covariance @ root)
    inner = inner * (inner > 1e-14 * inner.max())
    traces = torch.trace(torch.cov(reference.T, correction=0)) + torch.trace(covariance)
    return (reference.mean(0) - mean).square().sum() + traces - 2 * inner.sqrt().sum()


def frechet_diagonal(reference: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    deviations = covariance.diagonal().clamp_min(0).sqrt() - reference.std(0, correction=0)
    return (reference.mean(0) - mean).square().sum() + deviations.square().sum()


def brute_force(reference: Tensor, batches: list[Tensor], ema: float, start: Tensor | None, form: str) -> list[Tensor]:
    """Leave-one-out rewards of every batch: all moments, and a root, for every image left out."""
    distance = frechet if form == "exact" else frechet_diagonal
    moments, total = (torch.zeros(()), torch.zeros(())), 0.0
    if start is not None:
        moments, total = (start.mean(0), start.T @ start / len(start)), 1.0
    found = []
    for batch in batches:
        # An average whose weights are divided by their sum.
        weight = 1 - ema
        new_total = ema * total + weight

        def averaged(points: Tensor, weight=weight, total=total, new_total=new_total, moments=moments):
            raw = points.mean(0), points.T @ points / len(points)
            return [(ema * total * old + weight * new) / new_total for old, new in zip(moments, raw, strict=True)]

        def distance_of(points: Tensor, averaged=averaged) -> Tensor:
            mean, second = averaged(points)
            return distance(reference, mean, second - mean.outer(mean))

        whole, n = distance_of(batch), len(batch)
        left_out = [distance_of(torch.cat([batch[:i], batch[i + 1 :]])) - whole for i in range(n)]
        found.append(torch.stack(left_out) * (n - 1) / (weight / new_total))
        moments, total = averaged(batch), new_total
    return found


@pytest.mark.parametrize("form", ["exact", "diagonal"])
@pytest.mark.parametrize(("n", "width"), [(64, 16), (17, 16), (16, 16), (16, 32), (3, 8)])
@pytest.mark.parametrize(("ema", "started"), [(0.0, False), (0.5, False), (0.9, False), (0.9, True)])
def test_every_image_left_out_by_hand(form: str, n: int, width: int, ema: float, started: bool) -> None:
    reference = sample(100, width, seed=1, shift=0.0, mixing_seed=5)
    start = sample(50, width, seed=2) if started else None
    batches = [sample(n, width, seed=10 + i) for i in range(3)]
    reward = FrechetReward(reference, form, ema, start=start)
    for batch, expected in zip(batches, brute_force(reference, batches, ema, start, form), strict=True):
        found = reward(batch)
        assert found.dtype == torch.float64
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_roots_of_a_matrix_that_is_not_symmetric_agree() -> None:
    """A second way: the eigenvalues of S_r S'_i, no A, by another routine."""
    reference, batch = sample(200, 12, seed=1, mixing_seed=5), sample(60, 12, seed=2)
    parts = [batch, *(torch.cat([batch[:i], batch[i + 1 :]]) for i in range(60))]
    roots = [
        torch.linalg.eigvals(torch.cov(reference.T, correction=0) @ torch.cov(points.T, correction=0)).sqrt().real.sum()
        for points in parts
    ]
    whole, *left_out = (
        (reference.mean(0) - points.mean(0)).square().sum() + points.var(0, correction=0).sum() - 2 * root
        for points, root in zip(parts, roots, strict=True)
    )
    expected = 59 * (torch.stack(left_out) - whole)
    assert (FrechetReward(reference)(batch) - expected).abs().max() < 1e-6 * expected.abs().max()


def test_the_distance_is_torchmetrics() -> None:
    reference, batch = sample(400, 16, seed=1, mixing_seed=5), sample(300, 16, seed=2)
    expected = FeatureDistance(reference, extractor="made up").measure(batch)
    # torchmetrics divides covariances by N - 1, which 3e-3 of each trace allows for.
    for form in ("exact", "first_order"):
        reward = FrechetReward(reference, form)
        reward(batch)
        assert reward.distance == pytest.approx(expected["fd"], rel=0.02)
    kernel = KernelReward(reference)
    kernel(batch)
    assert kernel.distance == pytest.approx(expected["kid"], abs=3 * expected["kid_std"] / 10)


def test_a_root_after_a_downdate() -> None:
    generator = torch.Generator().manual_seed(0)
    for width, null in ((5, 0), (8, 3), (1, 0)):
        vectors = torch.linalg.qr(torch.randn(width, width, generator=generator).double())[0]
        spectrum = torch.logspace(-8, 3, width, dtype=torch.float64)
        spectrum[:null] = 0
        matrix = (vectors * spectrum) @ vectors.T
        z = torch.randn(20, width, generator=generator).double() @ root_of(matrix)  # inside the range of M
        factor = 0.999 / float((z * (z @ torch.linalg.pinv(matrix, rtol=1e-13))).sum(1).max())
        expected = torch.stack([root_trace(matrix - factor * v.outer(v)) - root_trace(matrix) for v in z])
        found_spectrum, found_vectors = spectral(matrix)
        squares = (z @ found_vectors).square() + (found_spectrum == 0)  # coordinates outside the range are ignored
        found = root_trace_change(found_spectrum, squares, factor)
        assert (found <= 0).all()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_first_order_form_is_what_many_images_make_of_the_exact_one(ema: float) -> None:
    reference = sample(2000, 32, seed=1, shift=0.0, mixing_seed=5)
    exact, first_order = FrechetReward(reference, ema=ema), FrechetReward(reference, "first_order", ema)
    for i in range(3):
        batch = sample(1200, 32, seed=10 + i, shift=0.2 * i)  # the average lags behind
        a, b = exact(batch), first_order(batch)
    assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.999
    centred = a - a.mean()
    assert (centred - b).norm() < 0.05 * centred.norm()  # the same scale, too
    assert exact.distance == pytest.approx(first_order.distance)


@pytest.mark.parametrize("form", ["exact", "first_order", "diagonal"])
def test_rewards_do_not_shrink_with_the_batch_or_the_average(form: str) -> None:
    reference, start = sample(500, 8, seed=1, mixing_seed=5), sample(4000, 8, seed=9)
    sizes = [(n, ema) for n in (200, 2000) for ema in (0.0, 0.9)]
    spread = [FrechetReward(reference, form, ema, start=start)(sample(n, 8, seed=2)).std() for n, ema in sizes]
    assert max(spread) < 1.3 * min(spread)


def test_sums() -> None:
    reference, batch = sample(300, 8, seed=1, mixing_seed=5), sample(40, 8, seed=2)
    for reward in (FrechetReward(reference, "first_order"), KernelReward(reference)):
        rewards = reward(batch)
        assert abs(rewards.sum()) < 1e-9 * rewards.abs().sum()
    # The exact one's mean is the jackknife's estimate of FD's bias, which falls as 1 / N.
    means = [float(FrechetReward(reference)(sample(n, 8, seed=2)).mean()) for n in (200, 2000)]
    assert 0 < means[0] == pytest.approx(10 * means[1], rel=0.1)


@pytest.mark.parametrize("form", ["exact", "first_order"])
def test_reinforce_with_the_reward_is_gradient_descent_on_the_distance(form: str) -> None:
    """A Gaussian with parameters: -E[grad log G reward] = grad FD, by autograd of the formula for Gaussians."""
    width = 3
    reference = sample(600, width, seed=1, shift=0.0, mixing_seed=5)
    location = (reference.mean(0) + torch.tensor([0.3, -0.2, 0.1])).requires_grad_()
    factor = (torch.eye(width).double() * 0.8 + 0.1 * torch.ones(width, width).double().tril(-1)).requires_grad_()
    expected = torch.autograd.grad(frechet(reference, location, factor @ factor.T), [location, factor])
    uniform = torch.quasirandom.SobolEngine(width, scramble=True, seed=0).draw(2**14, dtype=torch.float64)
    points = (location + torch.special.ndtri(uniform) @ factor.T).detach()
    rewards = FrechetReward(reference, form)(points)
    rewards = rewards - rewards.mean()
    log_probs = MultivariateNormal(location, scale_tril=factor).log_prob(points)
    found = torch.autograd.grad(-(log_probs * rewards).mean(), [location, factor])
    difference = torch.cat([found[0] - expected[0], (found[1] - expected[1]).tril().flatten()])
    assert difference.norm() < 0.01 * min(gradient.norm() for gradient in expected)


def test_reinforce_with_kid_has_no_bias_at_all() -> None:
    """Four possible images, batches of three: every batch there is, weighed by its probability."""
    reference, images = sample(30, 2, seed=1) - 3, torch.tensor([[0.0, 1.0], [1.0, -1.0], [2.0, 0.5], [-1.0, 0.0]])
    images, logits = images.double(), torch.tensor([0.1, -0.4, 0.8, 0.3]).double().requires_grad_()
    probabilities = logits.softmax(0)
    among, real = (images @ images.T / 2 + 1) ** 3, ((images @ reference.T / 2 + 1) ** 3).mean(1)
    distance = probabilities @ among @ probabilities - 2 * probabilities @ real
    (expected,) = torch.autograd.grad(distance, logits)
    reward, found = KernelReward(reference), torch.zeros(4).double()
    for batch in torch.cartesian_prod(*[torch.arange(4)] * 3):
        rewards = reward(images[batch]) * 3 / 2  # r_i N
        scores = torch.eye(4).double()[batch] - probabilities.detach()  # (3, 4) grad log G
        found -= probabilities[batch].prod().detach() * (rewards[:, None] * scores).mean(0)
    torch.testing.assert_close(found, expected)


def test_the_diagonal_form_does_not_see_correlations() -> None:
    """Real features are correlated, the batch's are not: one image of many goes along the correlation."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(2000, 1, generator=generator).double()
    reference = shared + 0.3 * torch.randn(2000, 2, generator=generator).double()
    batch = torch.randn(200, 2, generator=generator).double() * 1.044
    batch[0], batch[1] = torch.tensor([1.4, 1.4]), torch.tensor([1.4, -1.4])
    full, diagonal = (FrechetReward(reference, form)(batch) for form in ("exact", "diagonal"))
    assert full[0] > 0 > full[1]
    assert abs(diagonal[0] - diagonal[1]) < 0.3 * (full[0] - full[1])


def test_kid_left_out_by_hand() -> None:
    reference, batch = sample(70, 8, seed=1, mixing_seed=5), sample(12, 8, seed=2)

    def distance(points: Tensor) -> Tensor:
        def kernel(a: Tensor, b: Tensor) -> Tensor:
            return ((a * b).sum() / 8 + 1) ** 3

        n, m = len(points), len(reference)
        fake = sum(kernel(points[i], points[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
        real = sum(kernel(reference[i], reference[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
        return fake + real - 2 * sum(kernel(x, y) for x in points for y in reference) / (n * m)

    reward = KernelReward(reference)
    whole = distance(batch)
    expected = torch.stack([distance(torch.cat([batch[:i], batch[i + 1 :]])) - whole for i in range(12)]) * 11
    torch.testing.assert_close(reward(batch), expected, rtol=1e-8, atol=1e-8)
    assert reward.distance == pytest.approx(float(whole))


def test_a_missing_mode_is_worth_something() -> None:
    """Half of the real images lie elsewhere; of the drawn ones only 5 of 100 do."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(400, 4, generator=generator).double()
    reference[:200, 0] += 6
    batch = torch.randn(100, 4, generator=generator).double()
    batch[:5, 0] += 6
    for name in DISTRIBUTION_TERMS:
        rewards = DISTRIBUTION_TERMS[name](reference)(batch)
        assert rewards[:5].min() > rewards[5:].max(), name


@pytest.mark.parametrize("form", ["exact", "first_order", "diagonal"])
def test_components_are_the_references_principal_ones(form: str) -> None:
    reference, batch = sample(200, 10, seed=1, mixing_seed=5), sample(50, 10, seed=2)
    axes = torch.linalg.eigh(torch.cov(reference.T, correction=0))[1][:, -4:]
    expected = FrechetReward(reference @ axes, form)(batch @ axes)
    torch.testing.assert_close(FrechetReward(reference, form, components=4)(batch), expected)


@pytest.mark.parametrize("components", [None, 5])
@pytest.mark.parametrize("form", ["exact", "first_order", "diagonal"])
def test_a_restored_reward_goes_on_as_if_nothing_happened(form: str, components: int | None) -> None:
    reference = sample(200, 8, seed=1, mixing_seed=5)
    first = FrechetReward(reference, form, 0.9, components)
    fresh = FrechetReward(reference, form, 0.9, components)
    fresh.load_state_dict(first.state_dict())  # of one that has seen nothing
    for i in range(2):
        first(sample(20, 8, seed=10 + i))
    again = FrechetReward(reference, form, 0.9, components)
    if again.axes is not None:
        again.axes *= torch.tensor([1.0, -1.0]).double().repeat(4)[: again.axes.shape[1]]  # another machine's signs
    again.load_state_dict(first.state_dict())
    batch = sample(20, 8, seed=12)
    expected, found = first(batch), again(batch)
    assert torch.equal(found, expected)
    assert (fresh(batch) - expected).abs().max() > 1e-2


def test_what_cannot_be_is_refused() -> None:
    reference = sample(20, 4, seed=1)
    for arguments in ({"form": "full"}, {"ema": 1.0}, {"ema": -0.1}, {"components": 5}, {"components": 0}):
        with pytest.raises(ConfigError, match=f"{next(iter(arguments))}"):
            FrechetReward(reference, **arguments)
    for reward in (FrechetReward(reference), KernelReward(reference)):
        with pytest.raises(ConfigError, match=r"\(2, 4\): give \(N, 4\) with N >= 3"):
            reward(reference[:2])
        with pytest.raises(ConfigError, match=r"\(20, 3\): give \(N, 4\)"):
            reward(reference[:, :3])
        with pytest.raises(DivergedError, match="NaN"):
            reward(reference.where(reference > reference.min(), float("nan")))


def test_a_set_that_is_all_alike_gives_numbers() -> None:
    reference = sample(20, 4, seed=1)
    for name in DISTRIBUTION_TERMS:
        rewards = DISTRIBUTION_TERMS[name](reference)(torch.ones(5, 4))
        assert rewards.isfinite().all() and rewards.std() < 1e-6, name


def test_the_benchmark_runs(capsys) -> None:
    path = Path(__file__).parents[1] / "benchmarks" / "distribution_rewards.py"
    spec = importlib.util.spec_from_file_location("distribution_rewards_bench", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    module.main(["--quick", "--threads", "1"], Console(width=80))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    errors = [float(line.split()[-1]) for line in lines if line.startswith("16")]
    assert len(errors) == 2 and max(errors) < 1e-4
