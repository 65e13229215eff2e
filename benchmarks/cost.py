"""How the cost of drawing and of training grows with the image, and that it does not grow with the set of images.

    python benchmarks/cost.py             # one minute on an idle machine
    python benchmarks/cost.py --quick     # seconds, tiny sizes: a smoke test, no result

* Grids: seconds per image drawn by the cached sampler, and per REINFORCE update (a round of images and its optimizer
  step), at growing grids of T codes. The slope is that of the least-squares line through log cost against log T: 1 is a
  cost in proportion to the codes. Small grids pay for what is the same for all, so the slope between the two largest
  ones stands beside it. Attention compares every code with all before it: a table of its own, where no slope is wanted.
* Sets: seconds per update of stages 1 to 3, per measurement of held-out likelihood and per row of the results table,
  with growing sets of made-up training images; a tenth as many are held out. Stage 3 has the critic, with its real
  batches and its augmented codes, continues real images, and has a distribution reward, with its reference. Up to 2,048
  training images the critic's decoded inputs are kept, so that the smallest set costs less.

Seconds are CPU time of this process, on one thread, so that other work on the machine hardly counts. All columns take
turns: seconds are medians over the rounds, slopes and ratios medians of those within a round.
"""

from __future__ import annotations

import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from rollout import tile_world
from stable_baselines3.common.logger import configure

from ral_gym.agents import CodeVecEnv, Reinforce
from ral_gym.agents.train_ral import make_stage
from ral_gym.config import Config
from ral_gym.data.images import ImageSet
from ral_gym.grid import CodeGrid
from ral_gym.presets import get_preset
from ral_gym.priors.base import save_prior
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.sampler import CachedSampler
from ral_gym.report.tables import plain_table
from ral_gym.runs.run import Run
from ral_gym.stages.common import WeightAverage
from ral_gym.stages.generator_metrics import GeneratorMetrics
from ral_gym.stages.levels import LevelCodes, load_generator, load_vqvae, prior_of
from ral_gym.stages.prior_measurements import HeldOut
from ral_gym.stages.train_prior import train_prior
from ral_gym.stages.train_vqvae import build_vqvae, train_vqvae
from ral_gym.tokenizers.base import save_tokenizer
from ral_gym.tokenizers.code_set import CodeSet

CPU = torch.device("cpu")
FROM, UNTIL = 10, 60
"""Steps of stages 1 and 2 between which they are timed: at both their loops write a line of the log."""
MOST_SLOPE, MOST_GROWTH = 1.1, 1.1


@dataclass(frozen=True)
class Settings:
    """How large everything is."""

    sides: tuple[int, ...] = (8, 16, 32, 64)
    attention_sides: tuple[int, ...] = (8, 16, 32)
    sets: tuple[int, ...] = (1_000, 10_000, 100_000)
    rounds: int = 5
    codebook_size: int = 128
    units: int = 32
    layers: int = 3
    batch: int = 8
    samples: int = 300
    until: int = UNTIL


QUICK = Settings((2, 4), (2, 4), (50, 500), 1, codebook_size=8, units=8, layers=1, batch=2, samples=24, until=20)


@dataclass
class Arguments:
    """Options of the benchmark."""

    quick: bool = False
    """Tiny sizes and one round: shows that everything runs."""
    rounds: int | None = None
    """Rounds per figure."""
    threads: int = 1
    """CPU threads; with more than one their times add up, waiting included."""
    only: str = ""
    """`grids` or `sets`; default: both."""


Work = Callable[[], object]


def in_turns(works: Sequence[Work], rounds: int) -> list[list[float]]:
    """Seconds of every work in every round, after one round to warm up: [round][work].

    A work may return the seconds itself, of the part of it that counts.
    """
    found = []
    for _ in range(rounds + 1):
        spent = []
        for work in works:
            start = time.process_time()
            own = work()
            spent.append(own if isinstance(own, float) else time.process_time() - start)
        found.append(spent)
    return found[1:]


def slope(sizes: Sequence[int], costs: Sequence[float]) -> float:
    """The slope of the least-squares line through log cost against log size."""
    x, y = np.log(sizes), np.log(costs)
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def medians(rounds: Sequence[Sequence[float]]) -> list[float]:
    """Of every column."""
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


# Grids --------------------------------------------------------------------------------------------------------------


def drawing(settings: Settings, side: int, attention: int) -> Work:
    """Drawing a batch of images."""
    sampler = CachedSampler(network(settings, side, attention).eval())
    return lambda: sampler.sample(settings.batch)


def updating(settings: Settings, side: int, attention: int) -> Work:
    """A REINFORCE update: a round of images, and the optimizer step."""
    prior = network(settings, side, attention)
    env = CodeVecEnv(tile_world(CodeGrid(side, side, settings.codebook_size), CPU), settings.batch)
    env.seed(0)
    model = Reinforce("PriorPolicy", env, policy_kwargs={"prior": prior}, device="cpu", seed=0)
    model.set_logger(configure(None, []))

    def update() -> None:
        _, callback = model._setup_learn(1, None, reset_num_timesteps=False)
        model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)  # type: ignore[arg-type]
        model.train()

    return update


def network(settings: Settings, side: int, attention: int) -> PixelCNN:
    """A small PixelCNN."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_units": settings.units,
        "residual_units": settings.units,
        "layers": settings.layers,
    }
    return PixelCNN(settings.codebook_size, side, side, **sizes, attention_layers=attention, attention_heads=2)


def grid_rows(settings: Settings, sides: Sequence[int], attention: int, table: Table) -> None:
    """Fill the table of costs by grid."""
    wanted = f"<= {MOST_SLOPE}" if not attention else "-"
    codes = [side * side for side in sides]
    for name, make, share in (("an image drawn", drawing, settings.batch), ("an update", updating, 1)):
        rounds = in_turns([make(settings, side, attention) for side in sides], settings.rounds)
        fitted = statistics.median(slope(codes, costs) for costs in rounds)
        last = statistics.median(slope(codes[-2:], costs[-2:]) for costs in rounds)
        cells = [f"{1000 * cost / share:,.1f}" for cost in medians(rounds)]
        table.add_row(name, *cells, f"{fitted:.2f}", f"{last:.2f}", wanted)


# Sets ---------------------------------------------------------------------------------------------------------------


class Done(Exception):
    """A stage has trained for as long as it is timed."""


class TimedRun(Run):
    """Notes when the lines of a stage's log are written, and ends it at one of them.

    Attributes:
        until: the step at which it ends; at 10^6 planned ones no measurement or picture falls into a short time.
        times: of every line, by its step.
    """

    until = -1

    def log(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Append one line, and note the time."""
        super().log(stage, step, metrics)
        self.times = {**getattr(self, "times", {}), step: time.process_time()}
        if step == self.until:
            raise Done


class Set:
    """A run folder with a made-up set of n images: codes of them, codes of augmented ones, and untrained networks.

    Args:
        folder: where to put it; made.
        n: training images; a tenth as many are held out.
        settings: sizes.
    """

    def __init__(self, folder: Path, n: int, settings: Settings) -> None:
        self.settings, self.folder, self.config = settings, folder, config_of(settings)
        rng, held_out = np.random.default_rng(0), max(n // 10, 20)
        side = self.config.data.image_size
        pixels = rng.integers(0, 256, (n + held_out, 1, side, side), np.uint8)
        self.images = ImageSet(pixels[:n], pixels[n:], None, "made up", ())
        run = self.run("base")
        torch.manual_seed(0)
        vqvae: Any = build_vqvae(run, self.images)
        for quantiser in vqvae.quantisers:
            quantiser.codebook = torch.randn_like(quantiser.codebook)
        self.grid = vqvae.grid
        drawn = [rng.integers(self.grid.codebook_size, size=(m, self.grid.n_codes)) for m in (2 * n, *2 * [held_out])]
        train, test, augmented = (codes.astype(np.int16) for codes in drawn)
        self.codes = CodeSet(train, test, None, clean=n, augmented=augmented)
        save_tokenizer(run.file("vqvae.safetensors"), vqvae)
        save_prior(run.file("prior.safetensors"), prior_of(self.config, self.grid))
        self.codes.save(run.file("codes.safetensors"))
        self.base = run  # never ends by itself

    def run(self, name: str) -> TimedRun:
        """A new run folder."""
        return TimedRun(self.folder / name, self.config)

    def _timed(self, train: Callable[[Run], object]) -> Work:
        """Seconds per step of a stage's loop in a new run folder."""

        def step() -> float:
            run = self.run(f"run{time.perf_counter_ns()}")
            run.until = until = self.settings.until
            with suppress(Done):
                train(run)
            return (run.times[until] - run.times[FROM]) / (until - FROM)

        return step

    def stage_1(self) -> Work:
        """A step of the tokenizer."""
        return self._timed(lambda run: train_vqvae(run, self.images, CPU, progress=False))

    def stage_2(self) -> Work:
        """A step of the prior."""
        return self._timed(lambda run: train_prior(run, self.codes, self.grid, CPU, progress=False))

    def measurement(self) -> Work:
        """Held-out likelihood as stage 2 measures it."""
        held_out = LevelCodes.of(self.codes.sequences("test", self.grid), self.grid, 0)
        prior = prior_of(self.config, self.grid)
        measured, average = HeldOut(held_out, None, 1, limit=self.config.prior.held_out), WeightAverage(prior, 0.9)
        return lambda: measured.measure(prior, average, 1)

    def stage_3(self) -> Work:
        """One update of policy and critic."""
        vqvae, prior = load_vqvae(self.base, CPU), load_generator(self.base, "prior", CPU)
        stage = make_stage(self.base, vqvae, prior, CodeSet.load(self.base.file("codes.safetensors")), CPU, False)
        callbacks = stage.callbacks
        return lambda: stage.model.learn(1, callbacks, reset_num_timesteps=False)

    def row(self) -> Work:
        """One row of the results table, after what all rows share."""
        metrics = GeneratorMetrics(self.base, load_vqvae(self.base, CPU), self.codes, self.images, CPU)
        prior = load_generator(self.base, "prior", CPU)
        metrics.row(prior)
        return lambda: metrics.row(prior)


def config_of(settings: Settings) -> Config:
    """The smoke preset with the benchmark's sizes; nothing in it depends on the set."""
    config = get_preset("smoke")
    return replace(
        config,
        vqvae=replace(config.vqvae, training_steps=10**6),
        prior=replace(config.prior, training_steps=10**6, evaluate_every=10**6, held_out=500),
        critic=replace(config.critic, held_out=min(500, settings.samples), warmup_steps=2),
        ral=replace(config.ral, n_updates=10**6, checkpoint_every=10**6, reward_weights={"critic": 1.0, "loo_fd": 0.5}),
        evaluation=replace(config.evaluation, n_samples=settings.samples, held_out=500),
    )


def set_rows(settings: Settings, folder: Path, table: Table) -> None:
    """Fill the table of costs by the size of the set."""
    sets = [Set(folder / str(n), n, settings) for n in settings.sets]
    parts: dict[str, Callable[[Set], Work]] = {
        "stage 1, an update": Set.stage_1,
        "stage 2, an update": Set.stage_2,
        "stage 2, a measurement": Set.measurement,
        "stage 3, an update": Set.stage_3,
        "a row of the table": Set.row,
    }
    for name, make in parts.items():
        rounds = in_turns([make(one) for one in sets], settings.rounds)
        cells = [f"{1000 * cost:,.1f}" for cost in medians(rounds)]
        ratio = statistics.median(costs[-1] / costs[-2] for costs in rounds)
        table.add_row(name, *cells, f"{ratio:.2f}x", f"<= {MOST_GROWTH}x")


def main(argv: Sequence[str], console: Console) -> None:
    """Measure, and print a table per question."""
    arguments = tyro.cli(Arguments, args=list(argv), description=__doc__)
    torch.set_num_threads(arguments.threads)
    settings = QUICK if arguments.quick else Settings()
    if arguments.rounds:
        settings = replace(settings, rounds=arguments.rounds)
    how = f"medians of {settings.rounds} rounds, load average {os.getloadavg()[0]:.1f}"
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} CPU thread, CPU time, float32, {how}\n")
    size = f"K={settings.codebook_size}, {settings.units} units x {settings.layers} layers"
    plans = [("PixelCNN", settings.sides, 0), ("one attention layer", settings.attention_sides, 1)]
    for title, sides, attention in plans if arguments.only in ("", "grids") else ():
        headings = ("milliseconds", *(f"T={side * side:,}" for side in sides), "slope", "last", "wanted")
        caption = f"{size}, {settings.batch} images at once. last: the slope between the two largest grids"
        table = plain_table(headings, title=f"Cost by grid, {title}", min_width=78, caption=caption)
        grid_rows(settings, sides, attention, table)
        console.print(table, "")
    if arguments.only in ("", "sets"):
        headings = ("milliseconds", *(f"{n:,}" for n in settings.sets), "last two", "wanted")
        table = plain_table(headings, title="Cost by number of training images", min_width=78, caption="T=16")
        with tempfile.TemporaryDirectory() as folder:
            set_rows(settings, Path(folder), table)
        console.print(table)


if __name__ == "__main__":
    logging.getLogger("ral_gym").setLevel(logging.ERROR)  # made-up images are not to be learnt
    main(sys.argv[1:], Console())
