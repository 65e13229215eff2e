"""What would you pick instead? A small GAN on the same pixels, with the same PatchGAN, trained for equal time.

    python examples/gan_baseline.py runs/demo                 # as many seconds as the run's stages 1 to 3 took
    python examples/gan_baseline.py runs/demo --steps 1500    # so many steps instead, for instance to repeat a row

The paper compares reinforced adversarial learning with PGGAN and COCO-GAN; this is the GAN of a CPU's size. A generator
of convolutions draws an image from 64 Gaussian numbers in one pass; the critic is the PatchGAN of
`ral_gym.rewards.critic` on real pixels, with DiffAugment (Zhao et al., 2020) unless `--augment` says less; the
generator's weights are averaged. Its samples are measured as the run's rows are: with the same features, reference, and
number of samples.

Read both distances: `FD` is to the decoded training codes, whose blur the run's generators share and the GAN does not;
`FD, real` is to the training images themselves, whose sharpness the GAN can learn and a tokenizer's decoder limits.

Writes ``gan_baseline/gan.json``, ``table.md`` and ``samples_1.png`` into the run's folder. The same command again
prints the table; other settings, such as another seed, add a row and a picture.
"""

import copy
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from torch import Tensor, nn

from ral_gym.commands.ending import run_command
from ral_gym.commands.generate import need, open_run
from ral_gym.data.images import ImageSet, augment, load_images, to_float, to_uint8
from ral_gym.data.subsets import subset
from ral_gym.errors import ConfigError, DivergedError
from ral_gym.pictures import save_comparison
from ral_gym.presets import DEMO_PATCHGAN
from ral_gym.report.tables import markdown_table, plain_table
from ral_gym.rewards.augmentation import augmented, draw_augmentations
from ral_gym.rewards.critic import PatchCritic, critic_loss
from ral_gym.runs.progress import progress_bar
from ral_gym.runs.run import Run
from ral_gym.runs.storage import load_json, save_json, write_text
from ral_gym.stages.device import resolve_device
from ral_gym.stages.generator_metrics import GeneratorMetrics
from ral_gym.stages.levels import load_vqvae
from ral_gym.tokenizers.code_set import CodeSet

LATENT = 64
BASE = 4
"""Side of the generator's first feature map."""
STAGES = ("vqvae", "prior", "ral")
"""The stages whose seconds are the GAN's."""
ROWS = ("mle", "mle_equal_time", "mle_equal_time_best_temperature", "ral", "ral_best_temperature")
FIGURES = {
    "fd": ("FD", 1),
    "fd_real": ("FD,\nreal", 1),
    "precision": ("preci-\nsion", 3),
    "recall": ("recall", 3),
    "memorisation": ("mem-\nory", 2),
}
"""Figure -> heading, digits."""


@dataclass
class Arguments:
    """The run, and how the GAN is trained."""

    run: tyro.conf.Positional[str]
    """A finished run folder."""
    seconds: float | None = None
    """How long to train; None: as long as the run's tokenizer, prior and RAL together."""
    steps: int | None = None
    """Train for so many steps, however long they take."""
    loss: Literal["hinge", "wgan_gp"] = "hinge"
    """The critic's; `wgan_gp` with a gradient penalty of 10."""
    batch_size: int = 32
    """Real and as many drawn images per step."""
    hidden_units: int = 16
    """The generator's channels at full size, doubled with every halving of the side, up to 8 times."""
    learning_rate: float = 1e-3
    """Adam's, of both networks; betas 0.5 and 0.999."""
    augment: tuple[Literal["colour", "translation", "cutout"], ...] = ("colour", "translation", "cutout")
    """Random changes of what the critic sees, real and drawn (`--augment` alone: none)."""
    ema_decay: float = 0.995
    """Of the generator's averaged weights, which draw the samples."""
    seed: int = 0
    """Of weights, batches and samples."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N, mps."""

    def check(self) -> None:
        """Raise `ConfigError` for what cannot be run."""
        if (self.steps is not None and self.steps < 1) or (self.seconds is not None and self.seconds <= 0):
            raise ConfigError("a GAN of no step was asked for: give --steps 1 or more, or --seconds above 0")
        if self.batch_size < 2 or self.hidden_units < 1 or not 0 <= self.ema_decay < 1:
            raise ConfigError("at least 2 images a step, 1 hidden unit and an ema_decay from 0 to below 1 are needed")


class Generator(nn.Module):
    """Numbers (B, 64) to images (B, C, S, S) in [-1, 1]; S is 4 times a power of 2."""

    def __init__(self, image_size: int, channels: int, hidden_units: int) -> None:
        super().__init__()
        doublings = (image_size // BASE).bit_length() - 1
        if image_size != BASE * 2**doublings:
            raise ConfigError(f"images of side {image_size} are no doubled side of {BASE}: give 32, 64 or 128")
        widths = [hidden_units * min(2**level, 8) for level in range(doublings, -1, -1)]
        self.first = nn.Linear(LATENT, widths[0] * BASE**2)
        body: list[nn.Module] = []
        for width, narrower in pairwise(widths):
            body += [nn.Upsample(scale_factor=2), nn.Conv2d(width, narrower, 3, padding=1), nn.BatchNorm2d(narrower)]
            body += [nn.ReLU()]
        self.body = nn.Sequential(*body, nn.Conv2d(widths[-1], channels, 3, padding=1), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        """(B, 64) -> (B, C, S, S)."""
        images: Tensor = self.body(self.first(z).view(len(z), -1, BASE, BASE))
        return images


class GAN:
    """The two networks, their optimizers, and the averaged generator."""

    def __init__(self, arguments: Arguments, images: np.ndarray, device: torch.device) -> None:
        torch.manual_seed(arguments.seed)
        self.arguments, self.device, self.images = arguments, device, images
        channels, side = images.shape[1:3]
        settings = DEMO_PATCHGAN.critic
        self.generator = Generator(side, channels, arguments.hidden_units).to(device)
        self.average = copy.deepcopy(self.generator).requires_grad_(False)
        self.critic = PatchCritic(side, channels, hidden_units=settings.hidden_units, layers=settings.layers).to(device)
        adam: dict[str, Any] = {"lr": arguments.learning_rate, "betas": (0.5, 0.999)}
        self.optimizers = [torch.optim.Adam(network.parameters(), **adam) for network in (self.critic, self.generator)]
        self.random = torch.Generator().manual_seed(arguments.seed)

    def step(self) -> dict[str, float]:
        """One step of the critic and one of the generator."""
        n, (of_critic, of_generator) = self.arguments.batch_size, self.optimizers
        rows = torch.randint(len(self.images), (n,), generator=self.random).numpy()
        real = to_float(augment(torch.from_numpy(self.images[rows]), self.random).to(self.device))  # (B, C, S, S)
        fake = self.generator(self._latent(n))
        loss, figures = critic_loss(
            self.critic, self._changed(real), self._changed(fake.detach()), 10.0, self.random, self.arguments.loss
        )
        of_critic.zero_grad()
        loss.backward()
        of_critic.step()
        wanted = -self.critic(self._changed(fake)).mean()
        of_generator.zero_grad()
        wanted.backward()
        of_generator.step()
        self._follow()
        if not np.isfinite(figures["loss"]):
            raise DivergedError("the GAN's critic has a loss of NaN or infinity: lower --learning-rate")
        return figures

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """Images (n, C, S, S) uint8 of the averaged generator."""
        self.average.eval()
        random = torch.Generator().manual_seed(self.arguments.seed)
        parts = torch.randn(n, LATENT, generator=random).split(256)
        return torch.cat([to_uint8(self.average(part.to(self.device))).cpu() for part in parts])

    def _latent(self, n: int) -> Tensor:
        return torch.randn(n, LATENT, generator=self.random).to(self.device)

    def _changed(self, images: Tensor) -> Tensor:
        return augmented(images, self.arguments.augment, draw_augmentations(len(images), self.random))

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the averages towards the weights; batch statistics are averages already."""
        for mean, weight in zip(self.average.parameters(), self.generator.parameters(), strict=True):
            mean.lerp_(weight, 1 - self.arguments.ema_decay)
        for kept, buffer in zip(self.average.buffers(), self.generator.buffers(), strict=True):
            kept.copy_(buffer)


def main(argv: Sequence[str], console: Console) -> None:
    """Train the GAN, measure it, print and save the table."""
    arguments = tyro.cli(Arguments, args=list(argv), description=__doc__)
    arguments.check()
    run = open_run(arguments.run)
    need(run, ["results.json", "vqvae.safetensors", "codes.safetensors"], "finish it with ral-gym train")
    folder = run.file("gan_baseline")
    settings = {name: value for name, value in asdict(arguments).items() if name not in ("run", "device")}
    settings["augment"] = list(arguments.augment)
    gans = load_json(folder / "gan.json") if (folder / "gan.json").exists() else []
    if settings not in [gan["settings"] for gan in gans]:
        folder.mkdir(exist_ok=True)
        gans.append({"settings": settings, **trained(arguments, run, folder / f"samples_{len(gans) + 1}.png")})
        save_json(folder / "gan.json", gans)
    headings, cells = table_of(load_json(run.file("results.json"))["rows"], gans)
    caption = caption_of(run, gans)
    console.print(plain_table(headings, cells, title="A GAN of equal time", caption=caption))
    write_text(folder / "table.md", markdown_table(headings, cells, caption))
    for file in ("table.md", f"samples_{len(gans)}.png"):
        console.print(f"  {folder / file}", highlight=False)


def trained(arguments: Arguments, run: Run, picture: Path) -> dict[str, Any]:
    """Train and measure a GAN, and draw its samples beside real images."""
    device = resolve_device(arguments.device)
    images = load_images(run.config.data, seed=run.config.seed)
    gan = GAN(arguments, np.asarray(images.train), device)
    steps, seconds = train(gan, arguments.steps, 0.0 if arguments.steps else seconds_of(arguments, run))
    row = measured(run, images, gan, device)
    shown = {
        "real": torch.from_numpy(np.asarray(images.train[subset(len(images.train), 16, arguments.seed)])),
        "gan": gan.sample(16),
    }
    caption = f"{steps:,} steps of {arguments.batch_size} images, {seconds:.0f} s; not selected; seed {arguments.seed}"
    save_comparison(picture, shown, title="Real | GAN", caption=caption)
    return {"row": row, "steps": steps, "seconds": round(seconds, 1)}


def seconds_of(arguments: Arguments, run: Run) -> float:
    """How long the GAN may train."""
    if arguments.seconds is not None:
        return arguments.seconds
    taken = run.seconds()
    if missing := [stage for stage in STAGES if stage not in taken]:
        raise ConfigError(f"{run.path} does not know how long {', '.join(missing)} took: give --seconds")
    return sum(taken[stage] for stage in STAGES)


def train(gan: GAN, wanted: int | None, seconds: float) -> tuple[int, float]:
    """As many steps as are wanted, or None: until the time is up; returns steps and seconds."""
    start, done = time.monotonic(), 0
    bar = progress_bar(total=wanted or round(seconds), desc="GAN", unit="step" if wanted else "s")
    while done < wanted if wanted else time.monotonic() - start < seconds:
        figures = gan.step()
        done += 1
        bar.set_postfix({name: f"{value:.3g}" for name, value in figures.items()}, refresh=False)
        passed = done if wanted else min(int(time.monotonic() - start), round(seconds))
        bar.update(passed - bar.n)
    bar.close()
    return done, time.monotonic() - start


def measured(run: Run, images: ImageSet, gan: GAN, device: torch.device) -> dict[str, Any]:
    """The GAN's row, by the run's own measures."""
    vqvae = load_vqvae(run, device)
    codes = CodeSet.load(run.file("codes.safetensors"), vqvae.grid)
    evaluation = GeneratorMetrics(run, vqvae, codes, images, device)
    return evaluation.image_distances(gan.sample(evaluation.n_samples))


def table_of(rows: dict[str, Any], gans: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: the run's rows, then a row per GAN."""
    shown = {name: rows[name] for name in ROWS if name in rows}
    shown |= {f"gan {number + 1}": gan["row"] for number, gan in enumerate(gans)}
    cells = [
        [name, *("-" if row.get(f) is None else f"{row[f]:.{digits}f}" for f, (_, digits) in FIGURES.items())]
        for name, row in shown.items()
    ]
    return ["row", *(heading for heading, _ in FIGURES.values())], cells


def caption_of(run: Run, gans: Sequence[dict[str, Any]]) -> str:
    """What the table shows."""
    taken = run.seconds()
    stages = sum(taken.get(stage, 0.0) for stage in STAGES)
    described = "; ".join(
        f"gan {number + 1}: {gan['settings']['loss']}, seed {gan['settings']['seed']}, {gan['steps']:,} steps of "
        f"{gan['settings']['batch_size']} images in {gan['seconds']:.0f} s, "
        f"{' '.join(gan['settings']['augment']) or 'no'} augmentation"
        for number, gan in enumerate(gans)
    )
    return (
        f"Run {run.path.name} ({run.config.preset}, seed {run.config.seed}), whose stages 1 to 3 took {stages:.0f} s; "
        f'{described}. FD is to the decoded training codes, "FD, real" to the training images; '
        f"{run.config.evaluation.n_samples:,} samples a row. memory: 0.5 where samples are as near to training "
        "images as held-out images are, 1 for copies."
    )


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
