"""How long does it take to draw code grids: cached sampling against one teacher-forced pass and naive sampling.

    python benchmarks/sampling.py            # 5 minutes on 2 idle cores
    python benchmarks/sampling.py --quick    # half a minute, rougher
    python benchmarks/sampling.py --only attention

`pass` is one pass over a batch of complete grids in evaluation mode. It does the multiply-adds of drawing them once,
but may do them all at the same time, and is what a cached sampler can hope for. `cached` is `CachedSampler.sample` from
an empty grid. `naive` is `sample_naive`, a full-grid pass per code; where that would take minutes, passes are made at
some evenly spaced positions only and their time is scaled to all, which a star marks.

The three take turns, so that a busy machine slows them alike: seconds are medians over the rounds, ratios medians of
the ratios within a round. GFLOP/s counts two operations per multiply-add of the network, its kernels cropped to the
taps that a mask would leave: once per code in `pass` and `cached`, once per code and pass in `naive`.

The last lines are the memory that the sampler keeps for a batch of two-level images at the sizes of the supplement's
Table 9, counted over the tensors of its cache, which are created on the meta device for that.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from ral_gym.priors.base import build_prior
from ral_gym.priors.packed_weights import PackedWeights
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.pixelcnn_cache import SamplingCache
from ral_gym.priors.sampler import CachedSampler, draw, sample_naive

SETTINGS: dict[str, dict[str, Any]] = {
    "8x8, K=128, 128 units x 5 layers": {"codebook_size": 128, "height": 8, "width": 8, "layers": 5},
    "8x8, K=128, transformer 128 x 5": {
        "kind": "transformer",
        "codebook_size": 128,
        "height": 8,
        "width": 8,
        "layers": 5,
    },
    "16x16, K=256, transformer 128 x 4": {
        "kind": "transformer",
        "codebook_size": 256,
        "height": 16,
        "width": 16,
        "layers": 4,
    },
    "16x16, K=512, 128 units x 8 layers": {"codebook_size": 512, "height": 16, "width": 16, "layers": 8},
    "the same with 2 attention layers": {
        "codebook_size": 512,
        "height": 16,
        "width": 16,
        "layers": 8,
        "attention_layers": 2,
    },
}
BATCH_SIZES = (16, 64)
# Table 9: 256 x 256 pixels in 32 x 32 + 64 x 64 codes.
TABLE_9: dict[str, dict[str, Any]] = {
    "top": {"height": 32, "width": 32, "hidden_units": 512, "residual_units": 512, "layers": 20},
    "bottom": {
        "height": 64,
        "width": 64,
        "hidden_units": 128,
        "residual_units": 128,
        "layers": 16,
        "output_stack_layers": 0,
        "condition": (32, 32, 512),
        "conditioning_stack_layers": 20,
    },
}


def multiply_adds_per_code(prior: Any) -> int:
    """Multiply-adds per grid position of one pass: every weight is used once, except embeddings and biases.

    Attention adds its products with the keys and values of earlier codes, on average half of all.
    """
    weights = [layer.weight for layer in prior.modules() if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)]
    seen = (prior.height * prior.width + 1) // 2
    attending = prior.config.get("attention_layers", prior.config["layers"])  # all layers of a transformer
    return sum(weight.numel() for weight in weights) + attending * 2 * seen * prior.hidden_units


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(prior: Any, batch: int, quick: bool) -> tuple[list[float], list[float], list[float], bool]:
    """Time the three methods in turns.

    Returns:
        Seconds of `pass`, `cached` and `naive` in each round (one round in three has the latter), and whether `naive`
        was scaled up from some positions.
    """
    device = next(prior.parameters()).device
    length = prior.height * prior.width
    codes = torch.randint(prior.codebook_size, (batch, length), device=device)
    sampler = CachedSampler(prior)
    scaled = quick or length > 64
    count = 4 if quick else 16
    positions = [length * i // count for i in range(count)]

    def naive_at_positions() -> None:
        for position in positions:
            draw(prior(codes)[:, position], torch.rand(batch, device=device))

    passes, cached, naive = [], [], []
    rounds = 3 if quick else 9
    for round_ in range(rounds + 1):
        passes.append(seconds(lambda: prior(codes), device))
        cached.append(seconds(lambda: sampler.sample(batch), device))
        if round_ % 3 == 1 and scaled:
            naive.append(seconds(naive_at_positions, device) * length / count)
        elif round_ % 3 == 1:
            naive.append(seconds(lambda: sample_naive(prior, batch), device))
    return passes[1:], cached[1:], naive, scaled  # the first round warms up


def report(name: str, prior: Any, batch: int, quick: bool) -> None:
    """Measure one setting and print its line of the table."""
    passes, cached, naive, scaled = measure(prior, batch, quick)
    length = prior.height * prior.width
    operations = 2e-9 * multiply_adds_per_code(prior) * batch * length
    cells = [
        f"{statistics.median(times):8.3f} s {factor * operations / statistics.median(times):6.0f}"
        for times, factor in ((passes, 1), (cached, 1), (naive, length))
    ]
    cached_to_pass = statistics.median(c / p for c, p in zip(cached, passes, strict=True))
    naive_to_cached = statistics.median(n / c for n, c in zip(naive, cached[::3], strict=True))
    ratios = f"{cached_to_pass:12.2f} {naive_to_cached:13.0f}"
    print(f"{name:36} {batch:5} " + " ".join(cells) + ("* " if scaled else "  ") + ratios, flush=True)


def report_memory(batch: int = 64) -> None:
    """Print what the sampler keeps for two-level images, in bfloat16."""
    sizes = {}
    for level, setting in TABLE_9.items():
        with torch.device("meta"):
            prior = PixelCNN(512, **setting).bfloat16()
        sizes[level] = SamplingCache(PackedWeights(prior), batch).nbytes / 1e6
    parts = " + ".join(f"{size:.0f} MB ({level})" for level, size in sizes.items())
    print(f"\ncache of {batch} images of 32x32 + 64x64 codes, Table 9's channels, bfloat16:")
    print(f"{parts} = {sum(sizes.values()):.0f} MB; the aim is below 1000 MB")


def main() -> None:
    """Print the table and the memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, naive sampling at 4 positions")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's choice")
    parser.add_argument("--only", default="", help="only the settings whose name contains this")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    place = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {place}, float32; seconds and GFLOP/s per batch of whole grids")
    load = os.getloadavg()[0]
    if device.type == "cpu" and load > 0.5:
        print(f"the machine is busy (load average {load:.1f}) and threads wait for each other: try --threads 1")
    columns = "".join(f"{column + ' GFLOP/s':>18} " for column in ("pass", "cached", "naive"))
    print(f"\n{'setting':36} batch {columns} cached/pass  naive/cached")
    for name, setting in ((name, setting) for name, setting in SETTINGS.items() if arguments.only in name):
        for batch in BATCH_SIZES:
            torch.manual_seed(0)
            with torch.no_grad():
                prior = build_prior({"kind": "pixelcnn", **setting})
                report(name, prior.eval().to(device), batch, arguments.quick)
    print("* timed at 4 or 16 evenly spaced positions, a full-grid pass each, and scaled to all")
    report_memory()


if __name__ == "__main__":
    main()
