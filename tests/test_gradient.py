"""Gradient estimators against the exact policy gradient.

On a 3 x 1 grid with K = 2 there are 8 images, so even an estimator's expectation over batches of two images is a sum
(36 distinct pairs): what must be unbiased is unbiased to rounding, not within some noise.
"""

import importlib.util
import sys
from functools import cache
from itertools import combinations_with_replacement
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from rich.console import Console
from stable_baselines3 import A2C, PPO
from torch import Tensor

from ral_gym.agents import GRPO, Reinforce

PATH = Path(__file__).parents[1] / "benchmarks" / "gradient.py"


@cache
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gradient_bench", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gradient_bench"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def float64():
    with bench().double_precision():
        yield


@cache
def toy():
    """Returns far from 0, so that a baseline pays."""
    made = bench().Toy(codebook_size=2, height=3, width=1)
    for name, rewards in made.rewards.items():
        rewards[:, -1] += 3
        if name == "whole":
            rewards[:, -1] -= 3
            rewards += 3 / rewards.shape[1]
    return made


@cache
def pairs() -> tuple[np.ndarray, Tensor]:
    """Every unordered pair of images (36, 2), and how likely it is."""
    probabilities = toy().probabilities()
    index = np.array(list(combinations_with_replacement(range(8), 2)))
    twice = torch.as_tensor(1.0 + (index[:, 0] != index[:, 1]))
    return index, twice * probabilities[index[:, 0]] * probabilities[index[:, 1]]


@cache
def exact_moments(algorithm: type, rewards: str = "single", **arguments: object) -> tuple[Tensor, float]:
    """An estimator's expectation (D,) over all batches of two images, and its total variance."""
    estimator = bench().Estimator("", algorithm, arguments, rewards)
    model = bench().make_model(toy(), estimator, 2)
    index, weights = pairs()
    estimates = torch.stack([bench().estimate(model, toy(), rewards, toy().images[pair]) for pair in index])
    mean = weights @ estimates
    return mean, (weights @ ((estimates - mean) ** 2).sum(1)).item()


def label(value: object) -> str:
    """A parameter in a test's name."""
    return " ".join(map(str, value.values())) if isinstance(value, dict) else getattr(value, "__name__", str(value))


def relative(difference: Tensor) -> float:
    return (difference.norm() / toy().exact().norm()).item()


PLAIN = {"normalize_advantage": False}
ONE_EPOCH = {"n_epochs": 1, "gamma": 1.0}
UNBIASED = [
    (Reinforce, PLAIN | {"baseline": "none"}),
    (Reinforce, PLAIN | {"baseline": "leave_one_out"}),
    (Reinforce, PLAIN | {"baseline": "value"}),
    (Reinforce, PLAIN | {"baseline": "leave_one_out", "batch_size": 1}),
    (PPO, PLAIN | ONE_EPOCH | {"gae_lambda": 1.0}),
    (A2C, PLAIN | {"gamma": 1.0, "use_rms_prop": False}),
]
GRPO_FIRST_STEP = {"n_epochs": 1, "scale_advantage": "none", "ratio": "token"}


@pytest.mark.parametrize("rewards", ["single", "causal"])
@pytest.mark.parametrize(("algorithm", "arguments"), UNBIASED, ids=label)
def test_the_expectation_is_the_exact_gradient(algorithm: type, arguments: dict, rewards: str) -> None:
    mean, _ = exact_moments(algorithm, rewards, **arguments)
    assert relative(mean - toy().exact()) < 1e-5


@pytest.mark.parametrize("rewards", ["single", "causal"])
@pytest.mark.parametrize(
    ("algorithm", "arguments"),
    [(Reinforce, PLAIN | {"baseline": "mean"}), (GRPO, GRPO_FIRST_STEP), (GRPO, GRPO_FIRST_STEP | {"batch_size": 1})],
    ids=label,
)
def test_a_mean_that_includes_the_image_itself_shrinks_the_gradient(
    algorithm: type, arguments: dict, rewards: str
) -> None:
    """By 1 - 1 / n, here a half; the direction stays."""
    mean, _ = exact_moments(algorithm, rewards, **arguments)
    assert relative(mean - toy().exact() / 2) < 1e-5


def test_a_discount_is_the_gradient_of_something_else() -> None:
    """The expectation is that of the discounted rewards-to-go, summed over all images by hand."""
    mean, _ = exact_moments(Reinforce, "causal", **PLAIN, baseline="none", gamma=0.7)
    returns = bench().to_go(toy().rewards["causal"], 0.7)
    weights = toy().probabilities()[:, None] * returns
    by_hand = -(weights[..., None] * toy().scores()).sum((0, 1)) / 3
    assert relative(mean - by_hand) < 1e-5
    assert relative(mean - toy().exact()) > 0.05


@pytest.mark.parametrize("gamma", [1.0, 0.7])
@pytest.mark.parametrize("more", [{}, {"batch_size": 1}], ids=label)
@pytest.mark.parametrize("baseline", ["none", "leave_one_out", "value"])
def test_the_sum_over_all_actions_has_the_same_expectation_and_less_variance(
    baseline: str, more: dict, gamma: float
) -> None:
    arguments = PLAIN | {"baseline": baseline, "gamma": gamma, **more}
    sampled, noise = exact_moments(Reinforce, "causal", **arguments)
    summed, less_noise = exact_moments(Reinforce, "causal", **arguments, all_actions=True)
    assert relative(summed - sampled) < 1e-5
    if gamma == 1:
        assert relative(summed - toy().exact()) < 1e-5
    assert less_noise < noise


def test_what_every_code_in_place_of_each_is_paid() -> None:
    codes = toy().images[[3, 6]]
    rewards = toy().action_rewards(codes)  # (2, 3, 2)
    for n, image in enumerate(codes):
        for t in range(3):
            for k in range(2):
                other = torch.cat([image[:t], torch.tensor([k]), image[t + 1 :]])
                index = int(toy().index(other.numpy()))
                assert rewards[n, t, k] == toy().rewards["causal"][index, t]


@pytest.mark.parametrize(
    ("algorithm", "arguments", "rewards"),
    [
        (Reinforce, PLAIN | {"baseline": "none"}, "whole"),
        (Reinforce, PLAIN | {"baseline": "leave_one_out"}, "whole"),
        (PPO, PLAIN | ONE_EPOCH | {"gae_lambda": 0.5}, "single"),
    ],
    ids=label,
)
def test_what_is_known_to_be_biased(algorithm: type, arguments: dict, rewards: str) -> None:
    """Rewards-to-go miss what a code does to earlier scores; GAE below 1 bootstraps on a wrong value head."""
    mean, _ = exact_moments(algorithm, rewards, **arguments)
    assert relative(mean - toy().exact()) > 0.05


def test_baselines_and_rewards_to_go_take_variance_away() -> None:
    _, none = exact_moments(Reinforce, **PLAIN, baseline="none")
    _, leave_one_out = exact_moments(Reinforce, **PLAIN, baseline="leave_one_out")
    _, mean = exact_moments(Reinforce, **PLAIN, baseline="mean")
    _, to_go = exact_moments(Reinforce, "causal", **PLAIN, baseline="leave_one_out")
    assert leave_one_out < 0.5 * none
    assert to_go < 0.9 * leave_one_out
    assert mean == pytest.approx(leave_one_out / 4, rel=1e-4)  # (1 - 1 / n)^2, here a quarter


def test_normalising_changes_the_length_of_every_batch_only() -> None:
    """`Reinforce` divides by the standard deviation; SB3's PPO and A2C also take the mean away."""
    codes = toy().images[[1, 6]]
    gradients = []
    for algorithm, arguments in (
        (Reinforce, {"baseline": "none"}),
        (Reinforce, PLAIN | {"baseline": "none"}),
        (PPO, ONE_EPOCH | {"gae_lambda": 1.0}),
        (A2C, {"gamma": 1.0, "use_rms_prop": False, "normalize_advantage": True}),
    ):
        model = bench().make_model(toy(), bench().Estimator("", algorithm, arguments), 2)
        gradients.append(bench().estimate(model, toy(), "single", codes))
    directions = [gradient / gradient.norm() for gradient in gradients]
    torch.testing.assert_close(directions[0], directions[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(directions[2], directions[3], atol=1e-6, rtol=0)
    assert directions[0] @ directions[2] < 0.999


def test_the_toy_is_what_it_says() -> None:
    probabilities = toy().probabilities()
    assert len(toy().images.unique(dim=0)) == 8
    assert probabilities.sum().item() == pytest.approx(1)
    assert probabilities.max() > 2 * probabilities.min()
    np.testing.assert_array_equal(toy().index(toy().images.numpy()), np.arange(8))
    returns = [rewards.sum(1) for rewards in toy().rewards.values()]
    torch.testing.assert_close(returns[0], returns[1])
    torch.testing.assert_close(returns[0], returns[2])
    causal = toy().rewards["causal"].view(2, 4, 3)
    assert (causal[..., 0].std(1) == 0).all()  # the first code's reward knows the first code only
    scores = toy().scores()
    torch.testing.assert_close((probabilities[:, None, None] * scores).sum(0), torch.zeros_like(scores[0]))
    by_scores = -(probabilities[:, None] * returns[0][:, None] * scores.sum(1)).sum(0) / 3
    torch.testing.assert_close(by_scores, toy().exact())


def test_summary_of_estimates_with_a_known_bias() -> None:
    """Half the length and turned by a right-angled fifth, in noise that a control variate knows most of."""
    exact, turn = torch.zeros(50), torch.zeros(50)
    exact[0], turn[1] = 2.0, 0.4
    noise = torch.randn(4000, 50)
    own = torch.randn(4000, 50) / 10
    summary = bench().summarise(0.5 * (exact + turn) + noise + own, 3 * noise + 7, torch.full((50,), 7.0), exact)
    assert summary.scale == pytest.approx(0.5, abs=4 * summary.scale_error)
    assert 0 < summary.scale_error < 0.005
    assert summary.bias == pytest.approx(0.2, abs=0.02)
    assert summary.cosine == pytest.approx(1 / 1.04**0.5, abs=0.005)
    assert summary.variance == pytest.approx(50 * 1.01 / 0.25, rel=0.05)
    unbiased = bench().summarise(exact + noise, own, torch.zeros(50), exact)
    assert unbiased.bias < 4 * unbiased.bias_error < 0.2
    assert unbiased.scale == pytest.approx(1, abs=4 * unbiased.scale_error)


@pytest.mark.commands
def test_the_whole_bench_runs_and_agrees_with_the_exact_gradient(capsys) -> None:
    """Monte Carlo on 81 images: unbiased lines lie within four standard errors."""
    estimators = [e for e in bench().all_estimators() if e.name in ("REINFORCE leave_one_out", "PPO")]
    for summary in bench().measure(bench().Toy(3), estimators, 8, 40):
        assert abs(summary.scale - 1) < 4 * summary.scale_error < 0.8
        assert summary.bias < 4 * summary.bias_error
    bench().main(["--quick"], Console(width=80))
    lines = capsys.readouterr().out.splitlines()
    assert "Gradient estimates" in lines[0]
    begun = ("REINFORCE", "PPO", "A2C", "GRPO", "leave_one_out, N", "all actions")
    assert sum(line.startswith(begun) for line in lines) == len(bench().all_estimators())
