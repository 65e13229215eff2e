"""The priors of a run: one; or with two levels, one of the top codes and one of the bottom codes given the top codes.

Each level is trained on its own codes and has its own settings and files (`SECTIONS`, `SUFFIXES`); together they form
one generator of whole images (`ral_gym.priors.two_level`). After RAL it is one file.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ral_gym.config import Config, PriorConfig
from ral_gym.errors import ConfigError, RunError
from ral_gym.grid import CodeGrid
from ral_gym.metrics import nll
from ral_gym.presets import PRESETS
from ral_gym.priors.base import KIND, build_prior, prior_class
from ral_gym.priors.check import check_prior
from ral_gym.priors.transfer import sent
from ral_gym.priors.two_level import load_levels
from ral_gym.runs.run import Run
from ral_gym.settings import constructor_parameters, part_arguments
from ral_gym.tokenizers.base import Tokenizer, load_tokenizer
from ral_gym.tokenizers.code_set import CodeSet

SECTIONS = ("prior", "bottom")
"""The settings of each level's prior."""
NLL_BATCH = 256
TRAINING = (
    *("learning_rate_schedule", "decay_share", "patience", "adam_beta1", "adam_beta2", "weight_decay"),
    *("batch_size", "training_steps", "learning_rate", "ema_decay", "augmented_passes", "evaluate_every", "held_out"),
    *("scheduled_sampling", "scheduled_sampling_schedule", "scheduled_sampling_share"),
)
"""Settings of a prior that stage 2's training loop reads; the others are the network's."""
GIVEN = ("codebook_size", "height", "width", "condition", "classes")
"""Arguments of a prior that the code grid determines."""
GENERATORS = {
    "prior": "maximum likelihood, the weights of the best held-out NLL",
    "prior_ema": "their exponential average",
    "prior_continued": "maximum likelihood continued for as many updates as RAL",
    "prior_equal_time": "maximum likelihood continued for as much time as RAL, annealed",
    "policy": "RAL, the live policy",
    "policy_ema": "RAL, the exponential average",
}
"""The generators of a finished run, by the names of their files."""


def sequence_grid(config: Config, grid: CodeGrid, codes: CodeSet) -> CodeGrid:
    """The grid of the sequences that a run's priors draw: a tokenizer's, with the classes of the run's images.

    There are none if the network of a level does not take classes.
    """
    taken = all("classes" in constructor_parameters(prior_class(kind))[0] for kind in _kinds(config, grid))
    return codes.grid_of(grid) if taken else grid


def _kinds(config: Config, grid: CodeGrid) -> list[str]:
    return [getattr(config, section).kind for section in SECTIONS[: grid.levels]]


def prior_of(config: Config, grid: CodeGrid, level: int = 0) -> Any:
    """The untrained prior of a configuration: the only one or the top one (0), or the bottom one (1).

    Raises:
        ConfigError: an unknown kind, code whose import was not allowed, settings or options that it does not take, or a
            network that breaks the protocol (`ral_gym.priors.check`).
    """
    arguments = _arguments(config, level)
    arguments |= dict(zip(GIVEN, (grid.codebook_size, *grid.shapes[level]), strict=False))
    if level:
        arguments["condition"] = (*grid.shapes[0], grid.codebook_size)
    if grid.classes:
        arguments["classes"] = grid.classes
    prior = build_prior(arguments)
    check_prior(prior, level=level)
    return prior


def check_prior_settings(config: Config) -> list[Any]:
    """Refuse before stage 1 what stage 2 could not build; returns the user's own priors, untrained.

    Raises:
        ConfigError: see `prior_of`.
    """
    grid = CodeGrid(config.grid_size, config.grid_size, config.vqvae.codebook_size, config.vqvae.levels)
    kinds = [_arguments(config, level)[KIND] for level in range(grid.levels)]
    if config.vqvae.kind != "vqvae":
        return []  # only the tokenizer itself knows the shape of its codes
    with torch.random.fork_rng(devices=[]):
        return [prior_of(config, grid, level) for level, kind in enumerate(kinds) if kind != "pixelcnn"]


def _arguments(config: Config, level: int) -> dict[str, Any]:
    """The arguments of `build_prior` for a level, except those that the code grid determines."""
    section = SECTIONS[level]
    settings = getattr(config, section)
    cls, untouched = prior_class(settings.kind), _untouched(config, section)
    arguments = part_arguments(cls, settings, section, training=TRAINING, given=GIVEN, untouched=untouched)
    if level and "condition" not in constructor_parameters(cls)[0]:
        raise ConfigError(
            f"bottom.kind is {settings.kind}, which takes no condition (the top codes): give its constructor and its "
            "features an argument condition, or choose pixelcnn"
        )
    return {KIND: settings.kind, **arguments}


def _untouched(config: Config, section: str) -> list[Any]:
    """Settings not chosen by the user: the defaults and the preset's, or every bundled preset's if it is the user's."""
    names = [config.preset] if config.preset in PRESETS else PRESETS.builtin
    return [PriorConfig(), *(getattr(PRESETS[name], section) for name in names)]


@dataclass(frozen=True)
class LevelCodes:
    """The data of one prior: its codes (N, T'), and what they are given.

    `condition` is, for a bottom prior, the top codes (N, H * W); with classes the label, from 0, is its last entry, or
    the only one.
    """

    codes: Tensor
    condition: Tensor | None = None

    @classmethod
    def of(cls, codes: np.ndarray, grid: CodeGrid, level: int) -> LevelCodes:
        """Level `level` of whole sequences (N, `grid.length`)."""
        sequences = torch.from_numpy(codes)
        levels, labels = grid.split(sequences), grid.labels_of(sequences)
        given = ([levels[0]] if level else []) + ([] if labels is None else [labels[:, None]])
        return cls(levels[level], torch.cat(given, 1) if given else None)

    def with_labels(self, labels: Tensor) -> LevelCodes:
        """The same images with other classes (N,)."""
        assert self.condition is not None
        return LevelCodes(self.codes, torch.cat([self.condition[:, :-1], labels[:, None].to(self.condition)], 1))

    def __getitem__(self, rows: Tensor | slice) -> LevelCodes:
        """Some of the images."""
        return LevelCodes(self.codes[rows], None if self.condition is None else self.condition[rows])

    def to(self, device: torch.device) -> LevelCodes:
        """As int64 on a device; sent as they are stored, and the host does not wait for it."""
        condition = None if self.condition is None else sent(self.condition, device).long()
        return LevelCodes(sent(self.codes, device).long(), condition)


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


def wrong_labels(labels: Tensor, classes: int, seed: int) -> Tensor:
    """For each label (N,) one of the other classes, at random."""
    shift = torch.randint(1, classes, labels.shape, generator=torch.Generator().manual_seed(seed))
    return (labels + shift) % classes


def label_nlls(prior: Any, data: LevelCodes, classes: int, seed: int) -> dict[str, float]:
    """Held-out nats per code where every image has a wrong label, or none: is the condition used at all?

    Args:
        prior: of the level.
        data: the level's held-out codes, with labels.
        classes: how many there are.
        seed: seeds the wrong labels, each one of the other classes.

    Returns:
        `nll_wrong_label` with two classes or more, `nll_no_label` for a network that knows "no class".
    """
    assert data.condition is not None
    found, labels = {}, data.condition[:, -1].long()
    if classes > 1:
        found["nll_wrong_label"] = held_out_nll(prior, data.with_labels(wrong_labels(labels, classes, seed)))
    if getattr(prior, "null_class", True):
        found["nll_no_label"] = held_out_nll(prior, data.with_labels(torch.full_like(labels, classes)))
    return found


def load_vqvae(run: Run, device: torch.device | str = "cpu") -> Tokenizer:
    """The run's trained tokenizer, of one level or two.

    Raises:
        ConfigError: its file names an unknown kind, or code whose import was not allowed.
        RunError: the file is missing, damaged or of another number of levels.
    """
    file = run.file("vqvae.safetensors")
    tokenizer: Tokenizer = load_tokenizer(file, device)
    if tokenizer.grid.levels != run.config.vqvae.levels:
        raise RunError(f"{file} has {tokenizer.grid.levels} levels of codes, not {run.config.vqvae.levels}; remove it")
    return tokenizer


def load_generator(run: Run, name: str, device: torch.device | str = "cpu") -> Any:
    """A trained generator of the run, of one level or two.

    Args:
        run: the run folder.
        name: one of `GENERATORS`.
        device: where it goes.

    Raises:
        ConfigError: its file names an unknown kind, or code whose import was not allowed.
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
