"""The world of a run folder: a trained VQ-VAE, the codes of its images and a critic, loaded once per process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ral_gym.envs.worlds import World, check_device, check_reward, make_masks
from ral_gym.errors import RunError
from ral_gym.grid import CodeGrid
from ral_gym.priors.base import Prior, load_prior
from ral_gym.priors.two_level import load_levels
from ral_gym.registry import load_plugins
from ral_gym.rewards.critic import PatchCritic
from ral_gym.rewards.score_map import CriticScorer, ScoreNormalizer
from ral_gym.runs.run import read_config
from ral_gym.runs.storage import load_metadata, load_module
from ral_gym.tokenizers.code_set import CodeSet, decode_codes
from ral_gym.tokenizers.vqvae import VQVAE
from ral_gym.tokenizers.vqvae2 import vqvae_class


def run_world(
    run: str,
    reward: str = "single",
    device: str = "cpu",
    forbidden_codes: Sequence[int] = (),
    top_k: int | None = None,
    plugins: Sequence[str] = (),
) -> World:
    """The world of a run folder: its VQ-VAE, its training images' codes and its critic, frozen.

    Args:
        run: path of the folder, with stages 1 and 2 done (and stage 3, unless `reward` is `none`).
        reward: `single`, `intermediate`, or `none`: rewards are 0, for a callback that writes them.
        device: `cpu`, `cuda` or `cuda:N`.
        forbidden_codes: see `Masks`.
        top_k: see `Masks`; the prior is the run's.
        plugins: modules that register parts, or ``module:Class`` names that the run's files may ask for.

    Raises:
        ValueError: unknown reward, or masks that leave nothing to draw.
        ConfigError: a plug-in that cannot be imported, or a file that names code nobody has allowed.
        DeviceError: a device that does not exist here.
        RunError: the folder lacks a stage, a file is damaged, or its files do not belong together.
    """
    check_reward(reward)
    load_plugins(plugins)
    where = check_device(device)
    folder = Path(run)
    config = read_config(folder)
    vqvae = load_frozen(folder / "vqvae.safetensors", vqvae_class(config.vqvae.levels), device)
    grid = vqvae.grid
    codes = load_real_codes(folder / "codes.safetensors", grid)
    scorer = None if reward == "none" else _critic_scorer(folder / "critic.safetensors", vqvae, reward, device)
    prior = None if top_k is None else run_prior(folder, config.vqvae.levels, device)
    map_size = vqvae.image_size // 2**config.critic.layers
    return World(
        grid=grid,
        decode=partial(decode_codes, vqvae),
        scorer=scorer,
        real_codes=codes,
        row_multiple=max(1, vqvae.height // map_size),
        device=where,
        masks=make_masks(grid.codebook_size, forbidden_codes, top_k, prior),
        recipe=(run_world, (run, reward, device, tuple(forbidden_codes), top_k, tuple(plugins))),
    )


def _critic_scorer(path: Path, vqvae: VQVAE, reward: str, device: str) -> CriticScorer:
    critic, normalizer = _load(path, _load_critic, device)
    expected = {"image_size": vqvae.image_size, "channels": vqvae.channels}
    found = {name: critic.config[name] for name in expected}
    if found != expected:
        raise RunError(f"{path} scores images of {found}, but the VQ-VAE beside it decodes {expected}; train it again")
    return CriticScorer(vqvae, critic, reward, normalizer)  # type: ignore[arg-type]


def run_prior(folder: Path, levels: int, device: str) -> Prior:
    """A run's maximum-likelihood generator, frozen: its prior, or those of two levels as one.

    Raises:
        RunError: see `load_levels`.
    """
    return load_levels(folder, "prior", levels, device, load_frozen_prior)


def load_frozen_prior(path: Path, device: str) -> Prior:
    """A prior from its file, in evaluation mode and without gradients, once per process.

    Raises:
        ConfigError: see `load_prior`.
        RunError: see `load_prior`.
    """
    return _load(path, load_prior, device)


def load_frozen(path: Path, cls: type[nn.Module], device: str) -> Any:
    """A network from its file, in evaluation mode and without gradients, once per process.

    Raises:
        RunError: see `load_module`.
    """
    return _load(path, _load_network, (cls, device))


def _load_network(path: Path, what: tuple[type[nn.Module], str]) -> nn.Module:
    cls, device = what
    return load_module(path, cls, device)


def load_real_codes(path: Path, grid: CodeGrid) -> np.ndarray:
    """The codes (N, T) int16 of the real images in a code file, once per process.

    Raises:
        RunError: see `CodeSet.load`.
    """
    return _load(path, _load_codes, grid)


def _load_codes(path: Path, grid: CodeGrid) -> np.ndarray:
    """The codes of the training images as they are, without augmented passes: (N, T) int16."""
    codes = CodeSet.load(path, grid)
    return codes.train[: codes.clean]


def _load_critic(path: Path, device: str) -> tuple[PatchCritic, ScoreNormalizer]:
    """The critic and the scale it was saved with."""
    critic = load_module(path, PatchCritic, device)
    return critic, ScoreNormalizer.from_file(path, load_metadata(path))


def _load(path: Path, load: Callable[[Path, Any], Any], argument: Any) -> Any:
    """What ``load(path, argument)`` reads, once per process; a file that was written again is read again."""
    version = (path.stat().st_mtime_ns, path.stat().st_size) if path.exists() else None
    return _load_once(path, path.absolute(), version, load, argument)


@lru_cache(maxsize=16)
def _load_once(path: Path, absolute: Path, version: Any, load: Callable[[Path, Any], Any], argument: Any) -> Any:
    return load(path, argument)
