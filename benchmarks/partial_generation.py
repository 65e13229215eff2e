"""How long does it take to sample a batch: whole images against partial generation (supplement, Table 11).

    python benchmarks/partial_generation.py                      # CPU, then CUDA if there is a device
    python benchmarks/partial_generation.py --sizes celeba128    # only 16x16 + 32x32 codes
    python benchmarks/partial_generation.py --threads 1          # on a busy machine
    python benchmarks/partial_generation.py --quick              # seconds, tiny networks: a smoke test, no result

Two-level images are drawn by `TwoLevelSampler.sample` from networks with fresh weights, at the table's two sizes. On
CUDA these are the presets' own networks. On CPU they are small (32 units, a fifth of the layers), so that it takes
minutes; their seconds say nothing about the presets.

* full: every code of 16 images.
* continue: n rows of the top codes are given, and the bottom codes under them; the rest is drawn.
* scratch: the first n rows are drawn, the rest never is.
* mixed: a batch has one mode and one n, as in lockstep rollouts; n is uniform in 1..H-1, modes are half and half.

Nothing is left to chance: a round draws one batch of every mode with every n, 2 (H - 1) batches, so that its mean is
the expectation and `mixed` the mean of both modes. In codes it is half of `full`, hence 2 is the most that the ratio
can be; a given prefix still needs its vertical stack, and with attention everything before the output stack.

`prefill` is `SamplingCache.fill`: what a prefix implies, and in the bottom level the condition's stack, which runs once
per batch whatever is drawn. What a prefix adds to it is what it takes in `continue` beyond `scratch`.

Full batches come in between partial ones, so that a busy machine slows them alike: seconds are medians over the rounds
of a round's mean, ratios medians of the ratios within a round. CPU seconds are the process's own: they do not count
waiting for other processes. The cache's memory is given for these batches; `sampling.py` gives it for 64 images with
the presets' channels.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from torch import Tensor

from ral_gym.config import Config, PriorConfig
from ral_gym.grid import CodeGrid
from ral_gym.presets import get_preset
from ral_gym.priors.pixelcnn_cache import SamplingCache
from ral_gym.priors.two_level import TwoLevelPrior, TwoLevelSampler
from ral_gym.report.tables import plain_table
from ral_gym.stages.levels import prior_of

Mode = Literal["full", "continue", "scratch"]
WANTED = {"cpu": 1.5, "cuda": 1.8}
"""What full/mixed should be at least."""
WANTED_SECONDS = {"celeba128": (2.0, 1.2)}
"""On CUDA: full and mixed."""
RATIOS = ("full/this", "in CPU s", "in codes")
PAPER = {"celeba128": (102, 61), "celeba256": (170, 123)}
"""Table 11: seconds of 16 images, full and partial."""
ROWS: dict[str, tuple[Mode, ...]] = {
    "full": ("full",),
    "mixed": ("continue", "scratch"),
    "continue": ("continue",),
    "scratch": ("scratch",),
}
"""The table's rows: means over the batches of these modes."""
FULL_EVERY = 6
"""Partial batches for each full one."""


@dataclass
class Arguments:
    """Options of the benchmark."""

    quick: bool = False
    """Small grids, tiny networks and one round: shows that everything runs."""
    sizes: tuple[Literal["celeba128", "celeba256"], ...] = ("celeba128", "celeba256")
    """Presets: 16x16 + 32x32 codes, 32x32 + 64x64 codes."""
    batch: int = 16
    """Images per batch."""
    rounds: int = 3
    """Rounds; each draws every mode with every number of rows."""
    threads: int | None = None
    """CPU threads; default: PyTorch's choice."""
    device: Literal["both", "cpu", "cuda"] = "both"
    """Where; both: CPU, and CUDA if there is a device."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations."""


@dataclass(frozen=True)
class Draw:
    """What a batch draws: top rows prefix_rows..stop_rows-1, and the bottom rows under them."""

    mode: Mode
    prefix_rows: int
    stop_rows: int

    def codes_drawn(self, grid: CodeGrid) -> int:
        """Codes drawn per image."""
        return int(grid.mask(self.prefix_rows, self.stop_rows).sum())


@dataclass(frozen=True)
class Spent:
    """Seconds."""

    wall: float
    cpu: float
    """Of this process."""
    prefill: float
    """Wall clock of `SamplingCache.fill`."""


def partial_draws(height: int) -> list[Draw]:
    """Each mode with each number of rows in 1..H-1, once: their mean is that of mode and rows drawn uniformly.

    Two neighbours have the same n and draw a whole image's codes together, so that no stretch of a round is cheaper.
    """
    rows = range(1, height)
    continued = [Draw("continue", n, height) for n in rows]
    return [draw for pair in zip(continued, (Draw("scratch", 0, n) for n in rows), strict=True) for draw in pair]


def small(settings: PriorConfig) -> PriorConfig:
    """A network of 32 units with a fifth of the layers and heads."""
    counts = ("layers", "output_stack_layers", "attention_layers", "attention_heads", "conditioning_stack_layers")
    fewer = {name: -(-getattr(settings, name) // 5) for name in counts}  # rounded up; 0 stays 0
    return replace(settings, hidden_units=32, residual_units=32, **fewer)


def tiny(settings: PriorConfig) -> PriorConfig:
    """A network that only shows that everything runs."""
    return replace(
        small(settings), hidden_units=8, residual_units=8, layers=2, attention_layers=min(1, settings.attention_layers)
    )


def make_sampler(config: Config, side: int, device: torch.device, dtype: torch.dtype) -> TwoLevelSampler:
    """A sampler of the configuration's two networks, with fresh weights, for a top grid of side x side codes."""
    torch.manual_seed(0)
    grid = CodeGrid(side, side, config.vqvae.codebook_size, levels=2)
    prior = TwoLevelPrior(prior_of(config, grid, 0), prior_of(config, grid, 1))
    return TwoLevelSampler(prior.to(device, dtype).eval())


def sample(sampler: TwoLevelSampler, draw: Draw, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and log-probabilities (B, codes_of(stop_rows)) of a batch; codes (B, T) give its prefix."""
    given = sampler.prior.grid.crop(codes, draw.stop_rows)
    return sampler.sample(codes=given, prefix_rows=draw.prefix_rows)


@contextmanager
def prefill_clock(device: torch.device) -> Iterator[list[float]]:
    """Collect the seconds of each `SamplingCache.fill` while the context lasts."""
    fill, found = SamplingCache.fill, []

    def timed(*args: Any, **kwargs: Any) -> None:
        before = now(device)[0]
        fill(*args, **kwargs)
        found.append(now(device)[0] - before)

    SamplingCache.fill = timed  # type: ignore[method-assign]
    try:
        yield found
    finally:
        SamplingCache.fill = fill  # type: ignore[method-assign]


def now(device: torch.device) -> tuple[float, float]:
    """Wall clock and process time, when the device has done all it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def time_batch(sampler: TwoLevelSampler, draw: Draw, codes: Tensor) -> Spent:
    """Time one batch."""
    with prefill_clock(codes.device) as prefill:
        wall, cpu = now(codes.device)
        sample(sampler, draw, codes)
        wall_after, cpu_after = now(codes.device)
    return Spent(wall_after - wall, cpu_after - cpu, sum(prefill))


def measure(sampler: TwoLevelSampler, batch: int, rounds: int) -> list[dict[str, Spent]]:
    """The mean of every row of the table, in every round."""
    grid, device = sampler.prior.grid, next(sampler.prior.parameters()).device
    whole = Draw("full", 0, grid.height)
    order = partial_draws(grid.height)
    for place in reversed(range(0, len(order), FULL_EVERY)):
        order.insert(place, whole)
    codes = torch.randint(grid.codebook_size, (batch, grid.n_codes), device=device)
    for draw in (whole, Draw("continue", grid.height // 2, grid.height)):
        sample(sampler, draw, codes)  # warms up, and records CUDA graphs
    return [means([(draw.mode, time_batch(sampler, draw, codes)) for draw in order]) for _ in range(rounds)]


def means(spent: Sequence[tuple[Mode, Spent]]) -> dict[str, Spent]:
    """Means of each mode's batches; `mixed` is that of all partial ones."""
    groups = {row: [s for mode, s in spent if mode in modes] for row, modes in ROWS.items()}
    return {
        row: Spent(*(statistics.fmean(column) for column in zip(*map(astuple, group), strict=True)))
        for row, group in groups.items()
    }


def prefix_share(round_: dict[str, Spent]) -> float:
    """The part of the mixed time that goes into what a given prefix adds to the prefill."""
    return (round_["mixed"].prefill - round_["scratch"].prefill) / round_["mixed"].wall


def cache_megabytes(sampler: TwoLevelSampler) -> float:
    """Memory of both levels' caches, without the weights."""
    caches = [sampler.top._cache, sampler.bottom._cache]
    return sum(cache.nbytes for cache in caches if isinstance(cache, SamplingCache)) / 1e6


def settings_of(size: str, device: torch.device, quick: bool) -> tuple[Config, int]:
    """The preset with the networks that are measured, and the side of the top grid."""
    config = get_preset(size)
    side = config.data.image_size // 2 ** (config.vqvae.layers + 1)
    if quick:
        return replace(config, prior=tiny(config.prior), bottom=tiny(config.bottom)), side // 4
    if device.type == "cpu":
        config = replace(config, prior=small(config.prior), bottom=small(config.bottom))
    return config, side


def report(arguments: Arguments, size: str, device: torch.device, console: Console) -> None:
    """Measure one size on one device and print its table."""
    config, side = settings_of(size, device, arguments.quick)
    sampler = make_sampler(config, side, device, getattr(torch, arguments.dtype))
    rounds = 1 if arguments.quick else arguments.rounds
    results = measure(sampler, arguments.batch, rounds)

    threads = torch.get_num_threads()
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{threads} CPU thread" + "s" * (threads > 1)
    networks = " + ".join(
        f"{p.hidden_units} units x {p.layers} layers" + f", {p.attention_layers} attention" * bool(p.attention_layers)
        for p in (config.prior, config.bottom)
    )
    grid, partial, (paper_full, paper_partial) = sampler.prior.grid, partial_draws(side), PAPER[size]
    caption = (
        f"{networks}; {arguments.dtype}, cache {cache_megabytes(sampler):.0f} MB. Rounds: {rounds} of {len(partial)} "
        "partial batches. Prefill is a part of the seconds: what given prefixes add to it is "
        f"{statistics.median(map(prefix_share, results)):.1%} of mixed. Paper: {paper_full} s and {paper_partial} s, "
        f"ratio {paper_full / paper_partial:.2f}."
    )
    if device.type == "cuda" and size in WANTED_SECONDS:
        caption += " Wanted: {} s and {} s at most.".format(*WANTED_SECONDS[size])
    title = f"{size}: {arguments.batch} images of {side}x{side} + {2 * side}x{2 * side} codes, {where}"
    headings = ("", "codes", "seconds", "CPU s", "prefill", *RATIOS, "wanted")
    table = plain_table(headings, title=title, caption=caption, min_width=78)
    for row, modes in ROWS.items():
        codes = statistics.fmean(d.codes_drawn(grid) for d in (Draw("full", 0, side), *partial) if d.mode in modes)
        wanted = f">= {WANTED[device.type]}" if row == "mixed" and not arguments.quick else ""
        table.add_row(row, f"{codes:g}", *_cells(results, row), f"{grid.n_codes / codes:.2f}", wanted)
    console.print(table, "")


def _cells(results: Sequence[dict[str, Spent]], row: str) -> list[str]:
    """Seconds, CPU seconds, share of the prefill, and the two measured ratios of a row."""
    spent = [(round_["full"], round_[row]) for round_ in results]
    columns = (
        ("{:.3f}", [s.wall for _, s in spent]),
        ("{:.3f}", [s.cpu for _, s in spent]),
        ("{:.1%}", [s.prefill / s.wall for _, s in spent]),
        ("{:.2f}", [full.wall / s.wall for full, s in spent]),
        ("{:.2f}", [full.cpu / s.cpu for full, s in spent]),
    )
    return [form.format(statistics.median(values)) for form, values in columns]


def main(argv: Sequence[str], console: Console) -> None:
    """Measure, and print a table per size and device."""
    arguments = tyro.cli(Arguments, args=list(argv), description=__doc__)
    for name in ("batch", "rounds", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            sys.exit(f"--{name} {value}: give at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: PyTorch finds no CUDA device; leave it out, or give --device cpu")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    console.print(f"torch {torch.__version__}, load average {os.getloadavg()[0]:.1f}\n")
    for device in ("cpu", "cuda"):
        if device == "cuda" and arguments.device == "both" and not torch.cuda.is_available():
            console.print("CUDA: not measured, there is no device here")
        elif arguments.device in ("both", device):
            for size in arguments.sizes:
                report(arguments, size, torch.device(device), console)


if __name__ == "__main__":
    main(sys.argv[1:], Console())
