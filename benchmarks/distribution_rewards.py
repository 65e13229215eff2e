"""How long do the distribution rewards of one batch take, compared with N separate matrix roots?

    python benchmarks/distribution_rewards.py            # half a minute on 2 idle cores
    python benchmarks/distribution_rewards.py --quick    # a second: shows that everything runs

Seconds are medians over the rounds, in which the forms take turns; features are synthetic (Gaussian, correlated) and in
float64, since the cost does not depend on their values. `brute force` computes the root's trace for a few images left
out, by an eigendecomposition each, and is scaled to all N; a star marks it. `error` is the exact form's largest
difference from those, relative to the largest of them. Aim: 2 s for N = 1,024 and D = 512 on 2 cores.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from rich.console import Console
from torch import Tensor

from ral_gym.report.tables import plain_table
from ral_gym.rewards.distribution import DISTRIBUTION_TERMS

AIM = (1024, 512, 2.0)
"""N, D, and the seconds that `loo_fd` may take there."""


@dataclass
class Arguments:
    """Options of the benchmark."""

    images: tuple[int, ...] = (128, 1024)
    """N, images per batch."""
    features: tuple[int, ...] = (112, 512)
    """D, features per image."""
    rounds: int = 3
    """Rounds per line."""
    threads: int = 2
    """Threads of torch."""
    brute: int = 4
    """Images that the brute force leaves out."""
    quick: bool = False
    """Tiny sizes, one round: shows that everything runs."""


def make_features(n: int, width: int, mixing: Tensor, shift: float) -> Tensor:
    """(n, width) correlated Gaussian features."""
    return torch.randn(n, width, dtype=torch.float64) @ mixing + shift


def brute_force(reference: Tensor, features: Tensor, count: int) -> Tensor:
    """(count,) leave-one-out rewards of the first images, a matrix root each."""
    n = len(features)
    centre = reference.mean(0)
    spectrum, vectors = torch.linalg.eigh(torch.cov(reference.T, correction=0))
    root = (vectors * spectrum.clamp_min(0).sqrt()) @ vectors.T  # (D, D)

    def distance(points: Tensor) -> Tensor:
        covariance = torch.cov(points.T, correction=0)
        inner = torch.linalg.eigvalsh(root @ covariance @ root)
        inner = inner * (inner > inner[-1] * len(inner) * torch.finfo(inner.dtype).eps)
        return (points.mean(0) - centre).square().sum() + torch.trace(covariance) - 2 * inner.sqrt().sum()

    whole = distance(features)
    left_out = [distance(torch.cat([features[:i], features[i + 1 :]])) - whole for i in range(count)]
    return torch.stack(left_out) * (n - 1)


def seconds_of(function: Callable[[], Any]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def measure(n: int, width: int, arguments: Arguments) -> tuple[dict[str, float], float, float]:
    """Seconds of every form, seconds of the brute force for all N, and the exact form's error."""
    mixing = torch.randn(width, width, dtype=torch.float64) / width**0.5
    reference = make_features(2 * n + 2 * width, width, mixing * 1.1, 0.1)
    features = make_features(n, width, mixing, 0.0)
    rewards = {name: DISTRIBUTION_TERMS[name](reference) for name in DISTRIBUTION_TERMS}
    times: dict[str, list[float]] = {name: [] for name in rewards}
    for _ in range(arguments.rounds):
        for name, reward in rewards.items():
            times[name].append(seconds_of(lambda reward=reward: reward(features)))  # type: ignore[misc]
    expected = brute_force(reference, features, arguments.brute)
    per_image = seconds_of(lambda: brute_force(reference, features, arguments.brute)) / (arguments.brute + 1)
    exact = DISTRIBUTION_TERMS["loo_fd"](reference)(features)[: arguments.brute]
    error = float((exact - expected).abs().max() / expected.abs().max())
    return {name: statistics.median(seconds) for name, seconds in times.items()}, per_image * n, error


def main(argv: Sequence[str], console: Console) -> None:
    """Measure, and print the table."""
    arguments = tyro.cli(Arguments, args=list(argv), description=__doc__)
    if arguments.quick:
        arguments.images, arguments.features, arguments.rounds, arguments.brute = (16,), (8, 24), 1, 2
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    headings = ("N", "D", "exact", "first order", "diagonal", "kid", "brute force", "error")
    table = plain_table(headings, title=f"Seconds per batch, {arguments.threads} threads")
    for n in arguments.images:
        for width in arguments.features:
            times, brute, error = measure(n, width, arguments)
            cells = [f"{times[name]:.4f}" for name in DISTRIBUTION_TERMS]
            table.add_row(f"{n:,}", f"{width:,}", *cells, f"{brute:,.1f}*", f"{error:.0e}")
            if (n, width) == AIM[:2]:
                met = "met" if times["loo_fd"] <= AIM[2] else "missed"
                table.caption = f"aim: exact at N = {n:,}, D = {width:,} in {AIM[2]:.0f} s: {met}"
    console.print(table)


if __name__ == "__main__":
    main(sys.argv[1:], Console())
