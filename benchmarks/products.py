"""What oneDNN's matrix products save beside torch's own ones (MKL), on this processor.

    python benchmarks/products.py            # a minute on an idle machine
    python benchmarks/products.py --quick    # seconds, tiny networks: a smoke test, no result

A line per network: CPU time of a step of maximum likelihood and of drawing a batch with the cached sampler, with the
priors' own linear layers and packed weights (`ral_gym/priors/linear.py`, `blocked_products.py`), and with products
that are all torch's. The sides of a ratio take turns: figures are
medians over the rounds, ratios medians of the ratios within a round.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import tyro
from cost import in_turns, medians
from rich.console import Console

from ral_gym.priors import blocked_products, linear
from ral_gym.priors.base import maximum_likelihood_loss
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.sampler import CachedSampler
from ral_gym.priors.transformer import Transformer
from ral_gym.report.tables import plain_table

NEVER = 2**62
"""More multiply-adds than any product has."""


@dataclass
class Arguments:
    """Options of the benchmark."""

    quick: bool = False
    """Tiny networks and one round: shows that everything runs."""
    rounds: int = 7
    """Rounds per ratio."""
    threads: int = 1
    """CPU threads."""


@dataclass(frozen=True)
class Line:
    """A network and its batches: images of a training step, 0: none; images drawn at once."""

    name: str
    make: Callable[[], Any]
    trained: int
    drawn: int


def lines(quick: bool) -> list[Line]:
    """The networks."""

    def pixelcnn(size: int, units: int, layers: int, codes: int, **more: Any) -> PixelCNN:
        given: dict[str, Any] = {"hidden_units": units, "residual_units": units, "layers": layers, **more}
        return PixelCNN(codes, size, size, **given)

    def transformer() -> Transformer:
        return Transformer(256, 8, 8, hidden_units=128, layers=4, attention_heads=4)

    if quick:
        return [Line("tiny", lambda: pixelcnn(2, 64, 1, 8), 64, 64)]
    return [
        Line("PixelCNN of demo, 8x8, 64 x 3", lambda: pixelcnn(8, 64, 3, 128), 64, 256),
        Line(
            "PixelCNN, 16x16, 128 x 8, attention",
            lambda: pixelcnn(16, 128, 8, 512, attention_layers=2),
            16,
            64,
        ),
        Line("transformer, 8x8, 128 x 4", transformer, 64, 240),
        Line("PixelCNN, 4x4, 512 x 4", lambda: pixelcnn(4, 512, 4, 512), 0, 16),
    ]


@contextmanager
def torchs_own() -> Iterator[None]:
    """All products are torch's."""
    kept = linear.LARGE, blocked_products.LARGE
    linear.LARGE = blocked_products.LARGE = NEVER
    try:
        yield
    finally:
        linear.LARGE, blocked_products.LARGE = kept


def step_of(prior: Any, images: int) -> Callable[[], None]:
    """A step of maximum likelihood, but for the optimizer's."""
    codes = torch.randint(prior.codebook_size, (images, prior.height * prior.width))

    def step() -> None:
        prior.zero_grad()
        maximum_likelihood_loss(prior, codes).backward()

    return step


def ratio_of(work: Callable[[], object], rounds: int) -> tuple[float, float, float]:
    """Milliseconds with the package's products and with torch's own, and how many times as long those take."""

    def other() -> None:
        with torchs_own():
            work()

    found = in_turns([lambda: (work(), None)[1], other], rounds)
    own, torchs = medians(found)
    return 1e3 * own, 1e3 * torchs, statistics.median(after / before for before, after in found)


def main(argv: Sequence[str], console: Console) -> None:
    """Measure every network, and print a table."""
    arguments = tyro.cli(Arguments, args=list(argv), description=__doc__)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    title = f"oneDNN's products against torch's own; {torch.get_num_threads()} CPU thread(s), float32"
    table = plain_table(
        ("milliseconds", "work", "images", "package", "torch's", "ratio"),
        title=title,
        min_width=78,
        caption=f"grid, units x layers; torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}",
    )
    for line in lines(arguments.quick):
        prior = line.make()
        works: list[tuple[str, int, Callable[[], object]]] = []
        if line.trained:
            works.append(("training", line.trained, step_of(prior, line.trained)))
        works.append(("drawing", line.drawn, partial(CachedSampler(prior).sample, line.drawn)))
        for what, images, work in works:
            own, torchs, ratio = ratio_of(work, 1 if arguments.quick else arguments.rounds)
            table.add_row(line.name, what, str(images), f"{own:.1f}", f"{torchs:.1f}", f"{ratio:.2f}x")
    console.print(table)


if __name__ == "__main__":
    main(sys.argv[1:], Console())
