"""The priors of a run: one, or with two levels one of the top codes and one of the bottom codes given the top ones.

Each level is trained on its own codes and has its own settings and files (`SECTIONS`, `SUFFIXES`); together they are
one generator of whole images (`ral_gym.priors.two_level`). After RAL that is one file.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ral_gym.config import Config
from ral_gym.errors import RunError
from ral_gym.grid import CodeGrid
from ral_gym.metrics import nll
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.two_level import load_levels
from ral_gym.runs.run import Run
from ral_gym.runs.storage import config_arguments, load_module
from ral_gym.tokenizers.vqvae import VQVAE
from ral_gym.tokenizers.vqvae2 import vqvae_class

SECTIONS = ("prior", "bottom")
"""The settings of each level's prior."""
NLL_BATCH = 256
GENERATORS = {
    "prior": "maximum likelihood, the weights of the best held-out NLL",
    "prior_ema": "their exponential average",
    "prior_continued": "maximum likelihood for as many more updates as RAL",
    "policy": "RAL, the live policy",
    "policy_ema": "RAL, the exponential average",
}
"""The generators of a finished run, by the names of their files."""


def prior_of(config: Config, grid: CodeGrid, level: int = 0) -> Any:
    """The untrained prior of a configuration: the only one or the top one (0), or the bottom one (1)."""
    names = [
        "hidden_units",
        "residual_units",
        "layers",
        "conv_filter_size",
        "dropout",
        "output_stack_layers",
        "position_embedding",
        "attention_layers",
        "attention_heads",
        *(["conditioning_stack_layers"] if level else []),
    ]
    arguments = config_arguments(getattr(config, SECTIONS[level]), tuple(names))
    if level:
        arguments["condition"] = (*grid.shapes[0], grid.codebook_size)
    return PixelCNN(grid.codebook_size, *grid.shapes[level], **arguments)


@dataclass(frozen=True)
class LevelCodes:
    """What one prior models: its codes (N, T') and, for the bottom one, the top codes (N, H * W) they belong to."""

    codes: Tensor
    condition: Tensor | None = None

    @classmethod
    def of(cls, codes: np.ndarray, grid: CodeGrid, level: int) -> LevelCodes:
        """Level `level` of whole sequences (N, T)."""
        levels = grid.split(torch.from_numpy(codes))
        return cls(levels[level], levels[0] if level else None)

    def __getitem__(self, rows: Tensor | slice) -> LevelCodes:
        """Some of the images."""
        return LevelCodes(self.codes[rows], None if self.condition is None else self.condition[rows])

    def to(self, device: torch.device) -> LevelCodes:
        """As int64 on a device."""
        return LevelCodes(
            self.codes.long().to(device), None if self.condition is None else self.condition.long().to(device)
        )


def held_out_nll(prior: Any, data: LevelCodes) -> float:
    """Nats per code of one level's held-out codes, teacher-forced."""
    device = next(prior.parameters()).device
    if data.condition is None:
        return nll(prior, data.codes, device=device)
    total = 0.0
    for start in range(0, len(data.codes), NLL_BATCH):
        batch = data[start : start + NLL_BATCH].to(device)
        total += len(batch.codes) * nll(partial(prior, condition=batch.condition), batch.codes)
    return total / len(data.codes)


def load_vqvae(run: Run, device: torch.device | str = "cpu") -> VQVAE:
    """The run's trained VQ-VAE, of one level or two.

    Raises:
        RunError: the file is missing or damaged.
    """
    return load_module(run.file("vqvae.safetensors"), vqvae_class(run.config.vqvae.levels), device)


def load_generator(run: Run, name: str, device: torch.device | str = "cpu") -> Any:
    """A trained generator of the run, of one level or two.

    Args:
        run: the run folder.
        name: one of `GENERATORS`.
        device: where it goes.

    Raises:
        ConfigError: its file names a kind that is unknown here, or code that nobody has allowed.
        RunError: there is no such generator, or its file is missing, damaged or of another number of levels.
    """
    if name not in GENERATORS:
        raise RunError(f"generator '{name}' is unknown: choose one of {', '.join(GENERATORS)}")
    levels = run.config.vqvae.levels
    prior = load_levels(run.path, name, 1 if name.startswith("policy") else levels, device)
    if prior.levels != levels:
        file = run.file(f"{name}.safetensors")
        raise RunError(
            f"{file} draws {prior.levels} levels of codes, but the run has {levels}; remove it to make it again"
        )
    return prior
