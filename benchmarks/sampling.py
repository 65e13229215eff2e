"""How long does it take to draw code grids: cached sampling against one teacher-forced pass and naive sampling.

    python benchmarks/sampling.py            # some minutes
    python benchmarks/sampling.py --quick    # half a minute, rougher

`pass` is one pass over a batch of complete grids in evaluation mode: the same multiply-adds as drawing them once, with
everything known beforehand, hence the floor of any cached sampler. `cached` is `CachedSampler.sample` from an empty
grid, `naive` is `sample_naive`, a pass per code. The three take turns, so that a busy machine slows them alike; times
are medians over the rounds, ratios medians of the ratios within a round. GFLOP/s counts two operations for each
multiply-add of the network with its kernels cropped to the taps that a mask would leave, once per code for `pass` and
`cached` and once per code and pass for `naive`.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch

from ral_gym.pixelcnn import PixelCNN
from ral_gym.sampler import CachedSampler, draw, sample_naive

SETTINGS = {
    "8x8, K=128, 128 units x 5 layers": {"codebook_size": 128, "height": 8, "width": 8, "layers": 5},
    "16x16, K=512, 128 units x 8 layers": {"codebook_size": 512, "height": 16, "width": 16, "layers": 8},
}
BATCH_SIZES = (16, 64)
NAIVE_POSITIONS = 16


def multiply_adds_per_code(prior: PixelCNN) -> int:
    """Multiply-adds per grid position of one pass: every weight is used once, except embeddings and biases."""
    weights = [parameter for parameter in prior.parameters() if parameter.dim() > 1]
    return sum(weight.numel() for weight in weights) - prior.input.embedding.weight.numel()


def seconds(work: Callable[[], object], cuda: bool) -> float:
    """Wall-clock time of one call."""
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def naive_sample_of_positions(prior: PixelCNN, codes: torch.Tensor, positions: list[int]) -> None:
    """Naive sampling's work at some positions only."""
    for position in positions:
        logits = prior(codes)[:, position]
        draw(logits, torch.rand(len(codes), device=codes.device))


def measure(prior: PixelCNN, batch: int, rounds: int, quick: bool) -> dict[str, list[float]]:
    """Seconds per grid batch of each method, one number per round; naive sampling scaled to all positions."""
    device = prior.input.embedding.weight.device
    length = prior.height * prior.width
    sampler = CachedSampler(prior)
    codes = torch.randint(prior.codebook_size, (batch, length), device=device)
    scaled = quick or length > 64
    count = 4 if quick else NAIVE_POSITIONS
    positions = [length * i // count for i in range(count)]

    def naive() -> None:
        if scaled:
            naive_sample_of_positions(prior, codes, positions)
        else:
            sample_naive(prior, batch)

    times: dict[str, list[float]] = {"pass": [], "cached": [], "naive": []}
    for work in (lambda: prior(codes), lambda: sampler.sample(batch)):
        seconds(work, device.type == "cuda")  # warm-up
    for round_ in range(rounds):
        times["pass"].append(seconds(lambda: prior(codes), device.type == "cuda"))
        times["cached"].append(seconds(lambda: sampler.sample(batch), device.type == "cuda"))
        if round_ % 4 == 0 and (round_ == 0 or not quick) and round_ < 12:
            factor = length / count if scaled else 1
            times["naive"].append(factor * seconds(naive, device.type == "cuda"))
    return times
