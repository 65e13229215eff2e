"""Tokenizers side by side, trained for the same time: what a perceptual and an adversarial loss do to the pictures.

    python examples/compare_tokenizers.py                        # the demo's faces, about five CPU minutes
    python examples/compare_tokenizers.py --preset demo-classes  # another preset's images and tokenizer
    python examples/compare_tokenizers.py --only vqvae perceptual --minutes 1

The first is the preset's own tokenizer; its training, in CPU seconds of one thread, is the budget of all. The others
change its loss (`ral_gym.stages.image_losses`) or its network, and take as many steps as fit. Images that none of them
was trained on are encoded and decoded again, and compared with what they were:

* PSNR and SSIM, of pixels;
* the distance of features, and their Frechet distance (FD): of EfficientNet-Lite0's block 10, whose earlier blocks are
  the loss of some (marked *), and of a Laplacian pyramid, which is the loss of none. The distance is the mean squared
  one between an image and its reconstruction, divided by the one between two different images.

Writes ``table.md``, ``tokenizers.json`` and ``tokenizers.png`` into ``runs/tokenizers``; finished tokenizers are kept.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from ral_gym.commands.ending import run_command
from ral_gym.config import Config
from ral_gym.data.images import ImageSet, load_images
from ral_gym.errors import ConfigError
from ral_gym.metrics.distances import frechet_distance
from ral_gym.metrics.features import extract, make_extractor
from ral_gym.pictures import save_comparison
from ral_gym.presets import get_preset
from ral_gym.runs.run import Run
from ral_gym.runs.storage import load_json, save_json, write_text
from ral_gym.stages.train_vqvae import train_vqvae
from ral_gym.tokenizers.base import load_tokenizer
from ral_gym.tokenizers.code_set import decode_codes, encode_images

TIMED_STEPS = 12
"""Steps by which the time of one is measured, half of them to warm up."""
SHOWN = 8
PERCEPTUAL: dict[str, Any] = {"perceptual_weight": 1.0}
ADVERSARIAL: dict[str, Any] = {"adversarial_weight": 0.1, "discriminator_units": 32, "discriminator_layers": 3}
NETWORK: dict[str, Any] = {
    "kind": "vqgan",
    "options": {"multipliers": "1,1,2,2", "z_channels": 32, "norm_groups": 8, "codebook_l2_norm": True},
    "hidden_units": 24,
    "residual_blocks": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "vqvae": {},
    "perceptual": PERCEPTUAL,
    "with discriminator": PERCEPTUAL | ADVERSARIAL,
    "vqgan": NETWORK | PERCEPTUAL | ADVERSARIAL,
}
"""Tokenizer -> the settings of `vqvae` that it changes; the first changes none."""


@dataclass
class Arguments:
    """Which tokenizers, and for how long."""

    preset: str = "demo-patchgan"
    """Preset of the images and of the first tokenizer."""
    data: str | None = None
    """Other images, as `ral-gym train --data` takes them."""
    only: tuple[str, ...] = tuple(VARIANTS)
    """Which tokenizers."""
    minutes: float | None = None
    """CPU minutes of training of each. None: what the first one takes for its training steps."""
    seed: int = 0
    """Seed of the split of the images and of all training."""
    runs: str = "runs"
    """Folder that holds the run folders."""
    quiet: bool = False
    """No progress bars."""


def main(argv: Sequence[str]) -> int:
    """The script; returns the exit status."""
    return run_command(lambda words, console: compare(tyro.cli(Arguments, args=words), console), argv)


def compare(arguments: Arguments, console: Console) -> None:
    """Train, measure, write."""
    unknown = [name for name in arguments.only if name not in VARIANTS]
    if unknown:
        raise ConfigError(f"tokenizer {unknown[0]!r} is unknown: choose some of {', '.join(VARIANTS)}")
    torch.set_num_threads(1)  # CPU seconds of several threads depend on what else the machine does
    folder = Path(arguments.runs) / "tokenizers"
    base = replace(get_preset(arguments.preset), seed=arguments.seed)
    if arguments.data is not None:
        base = replace(base, data=replace(base.data, source=arguments.data))
    images = load_images(base.data, base.seed, progress=not arguments.quiet)
    budget = 60 * arguments.minutes if arguments.minutes is not None else None
    rows, pictures = {}, {"real": held_out(images)}
    for name in arguments.only:
        config = replace(base, vqvae=replace(base.vqvae, **VARIANTS[name]))
        rows[name], pictures[name] = measured(folder / name.replace(" ", "_"), config, images, budget, arguments.quiet)
        budget = budget or rows[name]["seconds"]
        console.print(f"{name}: {line(rows[name])}", highlight=False, soft_wrap=True)
    save_json(folder / "tokenizers.json", {"preset": arguments.preset, "seed": arguments.seed, "rows": rows})
    write_text(folder / "table.md", table(rows))
    budget = budget or 0.0
    caption = f"held-out images, not selected; every tokenizer trained for {budget:,.0f} CPU seconds"
    shown = {name: picture[:: max(1, len(picture) // SHOWN)][:SHOWN] for name, picture in pictures.items()}
    save_comparison(folder / "tokenizers.png", shown, title="Images and their reconstructions", caption=caption)
    console.print(f"  {folder / 'table.md'}\n  {folder / 'tokenizers.png'}", highlight=False, soft_wrap=True)


def held_out(images: ImageSet) -> np.ndarray:
    """uint8 images (N, C, S, S) that no tokenizer is trained on."""
    others = [images.test, *([] if images.new_people is None else [images.new_people])]
    return np.concatenate(others)


def seconds_per_step(config: Config, images: ImageSet) -> float:
    """CPU seconds of a training step, of all its losses."""
    vqvae = replace(config.vqvae, adversarial_start=0, training_steps=TIMED_STEPS)
    taken = []
    with tempfile.TemporaryDirectory() as scratch:
        for steps in (TIMED_STEPS // 2, TIMED_STEPS):
            run = Run(Path(scratch) / str(steps), replace(config, vqvae=replace(vqvae, training_steps=steps)))
            begun = time.process_time()
            train_vqvae(run, images, torch.device("cpu"), progress=False)
            taken.append(time.process_time() - begun)
    return max(taken[1] - taken[0], 1e-3) / (TIMED_STEPS - TIMED_STEPS // 2)


def measured(
    path: Path, config: Config, images: ImageSet, budget: float | None, quiet: bool
) -> tuple[dict[str, Any], np.ndarray]:
    """Train one tokenizer, or read it, and compare held-out images with their reconstructions.

    Args:
        path: its run folder.
        config: its settings; without a budget with the number of training steps.
        images: to train on, and to hold out.
        budget: CPU seconds of training.
        quiet: no progress bar.

    Returns:
        the row of the table, and the reconstructions (N, C, S, S) uint8.
    """
    if not (path / "seconds_of_cpu.json").exists():
        steps = config.vqvae.training_steps
        if budget is not None:
            steps = max(1, round(budget / seconds_per_step(config, images)))
        config = replace(config, vqvae=replace(config.vqvae, training_steps=steps))
        begun = time.process_time()
        train_vqvae(Run(path, config), images, torch.device("cpu"), progress=not quiet)
        save_json(path / "seconds_of_cpu.json", {"steps": steps, "seconds": time.process_time() - begun})
    tokenizer = load_tokenizer(path / "vqvae.safetensors")
    real = torch.from_numpy(held_out(images))
    codes = encode_images(tokenizer, real.numpy(), progress=False)
    rebuilt = decode_codes(tokenizer, codes)
    ours, theirs = (one.float() / 255 for one in (rebuilt, real))
    similarity = structural_similarity_index_measure(ours, theirs, data_range=1.0)
    assert isinstance(similarity, torch.Tensor)
    row = load_json(path / "seconds_of_cpu.json")
    row["psnr"] = float(peak_signal_noise_ratio(ours, theirs, data_range=1.0))
    row["ssim"] = float(similarity)
    row["codes"] = len(np.unique(codes))
    for name in ("lite0", "pyramid"):
        extractor = make_extractor(name)
        ours, theirs = (extract(extractor, one).double() for one in (rebuilt, real))
        apart = (theirs - theirs.roll(len(theirs) // 2, 0)).square().sum(1).mean()
        row[f"{name}_distance"] = float((ours - theirs).square().sum(1).mean() / apart)
        row[f"{name}_fd"] = frechet_distance(ours, theirs)
    row["loss"] = "lite0" if config.vqvae.perceptual_weight else "pixels"
    return row, rebuilt.numpy()


COLUMNS = {
    "steps": ("steps", "{:,}"),
    "seconds": ("CPU s", "{:,.0f}"),
    "psnr": ("PSNR, dB", "{:.2f}"),
    "ssim": ("SSIM", "{:.3f}"),
    "lite0_distance": ("lite0, block 10: distance", "{:.3f}"),
    "lite0_fd": ("FD", "{:,.0f}"),
    "pyramid_distance": ("pyramid: distance", "{:.3f}"),
    "pyramid_fd": ("FD", "{:.3g}"),
    "codes": ("codes in use", "{}"),
}
"""Figure -> heading, format."""


def line(row: dict[str, Any]) -> str:
    """A row in words."""
    return ", ".join(f"{head} {form.format(row[name])}" for name, (head, form) in COLUMNS.items())


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [f"| tokenizer | {' | '.join(head for head, _ in COLUMNS.values())} |", "|---|" + "---:|" * len(COLUMNS)]
    for name, row in rows.items():
        marked = {"lite0_distance", "lite0_fd"} if row["loss"] == "lite0" else set()
        cells = [form.format(row[key]) + (" *" if key in marked else "") for key, (_, form) in COLUMNS.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "(* earlier blocks of the same network are in this tokenizer's loss.)", ""])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
