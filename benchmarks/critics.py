"""How well does a PatchGAN tell real images from samples that it has not seen, with augmentation, R1, spectral norm?

    python benchmarks/critics.py --run runs/demo-patchgan    # 15 minutes on one core
    python benchmarks/critics.py --quick                     # seconds, a tiny run: shows that everything runs

The policy stands still: the fakes are fixed samples of the run's maximum-likelihood prior, some to train on and others
to be judged by. Each critic takes the same number of steps, with the hinge loss and the run's settings but for those in
its name. Columns: the area under the ROC curve (AUC) on held-out real images, augmented by the passes that augment the
training ones, and on held-out samples, after some of the steps and after all of them; the same on images that it was
trained on; all as means over critics from several seeds, the held-out ones with their standard deviation; and the time
of a step, relative to the first line. Without a finished stage 2 in the folder stages 1 and 2 are trained first.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ral_gym.agents import CoTrainedCritic
from ral_gym.commands.cli import train_main
from ral_gym.config import CriticConfig
from ral_gym.metrics import auc
from ral_gym.report.tables import plain_table
from ral_gym.rewards.augmentation import AUGMENTATIONS
from ral_gym.rewards.making import build_critic
from ral_gym.runs.run import Run, read_config
from ral_gym.stages.levels import load_generator, load_vqvae
from ral_gym.stages.pictures import sample_codes
from ral_gym.tokenizers.base import Tokenizer
from ral_gym.tokenizers.code_set import CodeSet

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "DiffAugment": {"augment": AUGMENTATIONS},
    "DiffAugment, translation": {"augment": ("translation",)},
    "R1, gamma 0.1": {"r1": 0.1},
    "R1, gamma 1": {"r1": 1.0},
    "R1, gamma 10": {"r1": 10.0},
    "spectral norm": {"spectral_norm": True},
    "DiffAugment, spectral norm": {"augment": AUGMENTATIONS, "spectral_norm": True},
}
"""The lines of the table: changes of the run's critic."""
CPU = torch.device("cpu")


@dataclass
class Arguments:
    """Options of the benchmark."""

    run: str = "runs/demo-patchgan"
    """Folder of a run with a PatchGAN; made with the preset demo-patchgan and seed 100 if it has no stage 2."""
    steps: int = 1400
    """Steps of each critic; the preset's stage 3 takes 400 + 50 x 20."""
    early: int = 400
    """Also measured after so many."""
    samples: int = 2000
    """Samples to train on; as many others are held out, and at most as many real images judged."""
    seeds: tuple[int, ...] = (0, 1)
    """Of the critics' weights and batches."""
    quick: bool = False
    """A tiny run and a few steps."""


@dataclass
class Parts:
    """What all critics share."""

    config: CriticConfig
    vqvae: Tokenizer
    train: Tensor
    """(N, T) real codes."""
    held_out: Tensor
    """(M, T)."""
    fakes: tuple[Tensor, Tensor]
    """(n, T) to train on, and (n, T) held out."""


@dataclass
class Line:
    """A critic's figures, a number per seed."""

    early: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)
    training: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Per step."""


def load_parts(path: Path, samples: int) -> Parts:
    """Models and codes of a run, and samples of its prior."""
    run = Run(path, read_config(path))
    vqvae, prior = load_vqvae(run, CPU), load_generator(run, "prior", CPU)
    codes = CodeSet.load(run.file("codes.safetensors"), vqvae.grid)
    drawn = sample_codes(prior, 2 * samples, seed=run.config.seed)
    real = [torch.from_numpy(codes.sequences(part, vqvae.grid)) for part in ("train", "held_out")]
    return Parts(run.config.critic, vqvae, real[0], real[1], (drawn[:samples], drawn[samples:]))


def measure(parts: Parts, changes: dict[str, Any], arguments: Arguments, seed: int, line: Line) -> None:
    """Train one critic, and add its figures."""
    config = replace(parts.config, **changes, held_out=arguments.samples)
    torch.manual_seed(seed)
    network = build_critic(config, parts.vqvae, untouched=(parts.config,))
    critic = CoTrainedCritic(
        parts.vqvae, network, parts.train.numpy(), parts.held_out.numpy(), config, reward="intermediate", seed=seed
    )
    pool, spent = critic.finished(parts.fakes[0]), 0.0
    for steps, found in ((arguments.early, line.early), (arguments.steps - arguments.early, line.last)):
        began = time.process_time()
        critic.train(pool, steps)
        spent += time.process_time() - began
        found.append(area(critic, critic.held_out_codes, parts.fakes[1]))
    line.training.append(area(critic, parts.train[: arguments.samples], parts.fakes[0]))
    line.seconds.append(spent / arguments.steps)


def area(critic: CoTrainedCritic, real: Tensor, fake: Tensor) -> float:
    """The area under the ROC curve on whole images."""
    scores = [critic.scorer.image_scores(critic.score_map(codes.long())).cpu() for codes in (real, fake)]
    return auc(*scores)


def report(lines: dict[str, Line], arguments: Arguments) -> Table:
    """The table."""
    headings = ("critic", f"{arguments.early} steps", f"{arguments.steps} steps", "trained on", "time")
    table = plain_table(headings, title="AUC of a PatchGAN against fixed samples")
    first = statistics.mean(next(iter(lines.values())).seconds)
    for name, line in lines.items():
        held_out = [f"{statistics.mean(one):.3f} ± {spread(one):.3f}" for one in (line.early, line.last)]
        time_of_step = f"{statistics.mean(line.seconds) / first:.2f}"
        table.add_row(name, *held_out, f"{statistics.mean(line.training):.3f}", time_of_step)
    return table


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds; 0 of one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def main(argv: Sequence[str], console: Console) -> None:
    """Measure, and print the table."""
    arguments = tyro.cli(Arguments, args=list(argv), description=__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path, flags = Path(arguments.run), ["--preset", "demo-patchgan", "--seed", "100"]
        if arguments.quick:
            path, flags = Path(folder) / "quick", ["--preset", "smoke"]
            arguments.steps, arguments.early, arguments.samples, arguments.seeds = 4, 2, 20, (0,)
        if not (path / "prior.safetensors").exists():
            where = ["--runs", str(path.parent), "--name", path.name, "--stages", "vqvae", "prior", "--quiet"]
            if train_main([*flags, *where]):
                sys.exit(1)
        parts = load_parts(path, arguments.samples)
        lines = {name: Line() for name in VARIANTS}
        for seed in arguments.seeds:
            for name, changes in VARIANTS.items():
                measure(parts, {"loss": "hinge"} | changes, arguments, seed, lines[name])
    console.print(report(lines, arguments))


if __name__ == "__main__":
    main(sys.argv[1:], Console())
