"""What the package's loops cost beside plain PyTorch, and its sampler beside a full pass per code.

    python benchmarks/throughput.py             # four minutes on an idle machine
    python benchmarks/throughput.py --quick     # half a minute, tiny networks: a smoke test, no result

* Training: images per second of CPU time, on one thread, of stages 1 and 2 through the package's own loops, against
  loops of a dozen lines that are written here, of the same network, batches and optimizer. The package's also check
  every loss, log, keep a moving average of the weights (stage 2) and can be stopped at any time. No measurement or
  picture falls in the timed steps.
* Sampling: a cached sample against a full pass per code, the way in which PixelSNAIL, attention included, is usually
  sampled; `sampling.py` measures both.
* Threads: cached samples on a machine of which another process keeps one core busy, in processes of their own: one
  thread and two, which wait for each other as the commands let them (GOMP_SPINCOUNT), or as OpenMP does by default.

The sides of a ratio take turns, so that a busy machine slows them alike: figures are medians over the rounds, ratios
medians of the ratios within a round.
"""

from __future__ import annotations

import contextlib
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from cost import Done, TimedRun, in_turns, medians
from rich.console import Console
from rich.table import Table
from sampling import SETTINGS, measure
from torch.nn import functional as F

from ral_gym.commands.ending import spin_count
from ral_gym.config import Config
from ral_gym.data.images import ImageSet, augment, to_float
from ral_gym.presets import get_preset
from ral_gym.priors.base import build_prior
from ral_gym.report.tables import plain_table
from ral_gym.stages.levels import prior_of
from ral_gym.stages.train_prior import train_prior
from ral_gym.stages.train_vqvae import build_vqvae, train_vqvae
from ral_gym.tokenizers.code_set import CodeSet

CPU = torch.device("cpu")
FROM = 10
"""The step from which loops are timed; the package's writes a line of its log there, and at the last one."""
WAYS = ("as commands wait", "OpenMP's default")


@dataclass(frozen=True)
class Settings:
    """How large everything is."""

    preset: str = "demo-patchgan"
    steps: tuple[int, int] = (60, 40)
    rounds: int = 5
    sampled: str = "the same with 2 attention layers"
    thread_rounds: int = 15
    prior: tuple[int, int, int] = (512, 16, 8)


QUICK = Settings("smoke", (20, 20), 1, "8x8, K=128, transformer 128 x 5", 1, (16, 4, 1))


@dataclass
class Arguments:
    """Options of the benchmark."""

    quick: bool = False
    """Tiny networks and one round: shows that everything runs."""
    rounds: int | None = None
    """Rounds per ratio."""
    threads: int = 1
    """CPU threads of training and sampling."""
    only: str = ""
    """`training`, `sampling` or `threads`; default: all."""


# Training -----------------------------------------------------------------------------------------------------------


class Training:
    """Stages 1 and 2 of a preset on made-up images, each by the package's loop and by a plain one."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        config = get_preset(settings.preset)
        plain: dict[str, Any] = {"perceptual_weight": 0.0, "adversarial_weight": 0.0, "training_steps": 10**6}
        prior = replace(config.prior, training_steps=10**6, evaluate_every=10**6, learning_rate_schedule="constant")
        self.config: Config = replace(config, vqvae=replace(config.vqvae, **plain), prior=prior)
        rng, side = np.random.default_rng(0), config.data.image_size
        train, test = (rng.integers(0, 256, (n, 1, side, side), np.uint8) for n in (400, 40))
        self.images = ImageSet(train, test, None, "made up", ())
        self.grid = build_vqvae(self.run(FROM), self.images).grid
        train, test = (rng.integers(self.grid.codebook_size, size=(n, self.grid.n_codes)) for n in (400, 40))
        self.codes = CodeSet(train.astype(np.int16), test.astype(np.int16), None, clean=400)

    def run(self, until: int) -> TimedRun:
        """A new run folder, whose stage ends at a step."""
        run = TimedRun(self.folder / str(time.perf_counter_ns()), self.config)
        run.until = until
        return run

    def package(self, stage: int) -> float:
        """Seconds per step of the package's loop."""
        run, until = self.run(until := self.settings.steps[stage - 1]), until
        with contextlib.suppress(Done):
            if stage == 1:
                train_vqvae(run, self.images, CPU, progress=False)
            else:
                train_prior(run, self.codes, self.grid, CPU, progress=False)
        return (run.times[until] - run.times[FROM]) / (until - FROM)

    def plain(self, stage: int) -> float:
        """Seconds per step of the loop that one would write for it."""
        torch.manual_seed(0)
        step = self.plain_stage_1() if stage == 1 else self.plain_stage_2()
        until = self.settings.steps[stage - 1]
        for number in range(1, until + 1):
            step()
            if number == FROM:
                start = time.process_time()
        return (time.process_time() - start) / (until - FROM)

    def plain_stage_1(self) -> Callable[[], None]:
        """A step of a tokenizer."""
        config, images = self.config.vqvae, self.images.train
        vqvae = build_vqvae(self.run(0), self.images).train()
        betas = (config.adam_beta1, config.adam_beta2)
        optimizer = torch.optim.Adam(vqvae.parameters(), lr=config.learning_rate, betas=betas)

        def step() -> None:
            rows = torch.randint(len(images), (config.batch_size,))
            batch = to_float(torch.from_numpy(images[rows.numpy()]))
            batch = augment(batch, torch.default_generator) if config.augment else batch
            optimizer.zero_grad()
            painted, _, commitment = vqvae(batch)
            (F.mse_loss(painted, batch) + commitment).backward()
            optimizer.step()

        return step

    def plain_stage_2(self) -> Callable[[], None]:
        """A step of a prior."""
        config, codes = self.config.prior, torch.from_numpy(self.codes.train)
        prior = prior_of(self.config, self.grid).train()
        betas = (config.adam_beta1, config.adam_beta2)
        optimizer = torch.optim.Adam(prior.parameters(), lr=config.learning_rate, betas=betas)

        def step() -> None:
            batch = codes[torch.randint(len(codes), (config.batch_size,))].long()
            optimizer.zero_grad()
            F.cross_entropy(prior(batch).flatten(0, 1), batch.flatten()).backward()
            torch.nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
            optimizer.step()

        return step


def compare_training(settings: Settings, folder: Path, table: Table) -> None:
    """Fill the table of training, one row per stage."""
    training = Training(folder, settings)
    for stage, batch in ((1, training.config.vqvae.batch_size), (2, training.config.prior.batch_size)):
        works = [lambda: training.package(stage), lambda: training.plain(stage)]  # noqa: B023
        rounds = in_turns(works, settings.rounds)
        ours, plain = medians(rounds)
        ratio = statistics.median(plain / ours for ours, plain in rounds)
        name = f"stage {stage}, {batch} a step"
        table.add_row(name, f"{batch / ours:,.0f}", f"{batch / plain:,.0f}", f"{ratio:.2f}x", ">= 1.0x")


# Sampling -----------------------------------------------------------------------------------------------------------


def compare_sampling(settings: Settings, table: Table) -> None:
    """Fill the table of sampling, one row per batch size."""
    for batch in (16, 64):
        torch.manual_seed(0)
        with torch.no_grad():
            prior = build_prior({"kind": "pixelcnn", **SETTINGS[settings.sampled]}).eval()
            _, cached, naive, _ = measure(prior, batch, True)
        ratio = statistics.median(n / c for n, c in zip(naive, cached[::3], strict=True))
        shown = [f"{1000 * statistics.median(times) / batch:,.1f}" for times in (cached, naive)]
        table.add_row(f"T={prior.height * prior.width}, {batch} images", *shown, f"{ratio:.0f}x", ">= 100x")


# Threads ------------------------------------------------------------------------------------------------------------

CHILD = """
import sys, time
import torch
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.sampler import CachedSampler
torch.set_num_threads(int(sys.argv[1]))
size, side, layers = map(int, sys.argv[2:])
torch.manual_seed(0)
sampler = CachedSampler(PixelCNN(size, side, side, layers=layers).eval())
for _ in sys.stdin:
    start = time.perf_counter()
    sampler.sample(16)
    print(time.perf_counter() - start, flush=True)
"""
BUSY = "while True: pass"


@contextmanager
def child(threads: str, spin: str | None, prior: Sequence[int]) -> Iterator[Callable[[], float]]:
    """A process that samples on demand; calling it gives the seconds."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    if spin is not None:
        environment["GOMP_SPINCOUNT"] = spin
    command = [sys.executable, "-c", CHILD, threads, *map(str, prior)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:

        def sample() -> float:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            return float(process.stdout.readline())

        try:
            yield sample
        finally:
            process.kill()


@contextmanager
def busy_core(busy: bool) -> Iterator[None]:
    """Another process that computes all the time, or none."""
    if not busy:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", BUSY]) as process:
        try:
            time.sleep(0.2)  # until it has begun
            yield
        finally:
            process.kill()


def compare_threads(settings: Settings, table: Table) -> None:
    """Fill the table of threads, one row per side; the side that takes many times as long has a fifth of the rounds."""
    for way in WAYS:
        cells, gently = [], way == WAYS[0]
        for busy in (False, True):
            with busy_core(busy):
                spin = spin_count() if gently else None
                with child("1", spin, settings.prior) as one, child("2", spin, settings.prior) as two:
                    rounds = in_turns([one, two], settings.thread_rounds if gently else settings.thread_rounds // 5 + 1)
            ratio = statistics.median(first / second for first, second in rounds)
            cells += [*(f"{seconds:.3f} s" for seconds in medians(rounds)), f"{ratio:.2f}x"]
        table.add_row(way, *cells, ">= 1.0x" if gently else "-")


def main(argv: Sequence[str], console: Console) -> None:
    """Measure, and print a table per question."""
    arguments = tyro.cli(Arguments, args=list(argv), description=__doc__)
    torch.set_num_threads(arguments.threads)
    settings = QUICK if arguments.quick else Settings()
    if arguments.rounds:
        settings = replace(settings, rounds=arguments.rounds, thread_rounds=arguments.rounds)
    how = f"medians of {settings.rounds} rounds, load average {os.getloadavg()[0]:.1f}"
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} CPU thread, float32, {how}\n")
    if arguments.only in ("", "training"):
        headings = ("images per second", "package", "plain", "ratio", "wanted")
        title = f"Training, the preset {settings.preset}'s networks"
        table = plain_table(headings, title=title, min_width=78, caption="ratio: package / plain")
        with tempfile.TemporaryDirectory() as folder:
            compare_training(settings, Path(folder), table)
        console.print(table, "")
    if arguments.only in ("", "sampling"):
        headings = ("milliseconds per image", "cached", "pass per code", "ratio", "wanted")
        table = plain_table(headings, title="Sampling, PixelCNN with attention", min_width=78, caption=settings.sampled)
        compare_sampling(settings, table)
        console.print(table, "")
    if arguments.only in ("", "threads"):
        columns = ("16 images", "one\nthread", "two", "ratio", "one,\nbusy", "two,\nbusy", "ratio", "wanted")
        title, caption = f"Threads on {os.cpu_count()} cores", "busy: another process keeps a core busy"
        table = plain_table(columns, title=title, min_width=78, caption=caption)
        compare_threads(settings, table)
        console.print(table)


if __name__ == "__main__":
    logging.getLogger("ral_gym").setLevel(logging.ERROR)  # made-up images are not to be learnt
    main(sys.argv[1:], Console())
