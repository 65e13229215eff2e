"""The world of a run folder: a trained tokenizer, the codes of its images and a critic, loaded once per process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ral_gym.config import Config
from ral_gym.envs.worlds import CRITIC_REWARDS, Scorer, World, check_reward, make_masks, term_scorer
from ral_gym.errors import RunError
from ral_gym.grid import CodeGrid
from ral_gym.priors.base import Prior, load_prior
from ral_gym.priors.two_level import load_levels
from ral_gym.registry import load_plugins
from ral_gym.rewards.making import build_critic, critic_class, load_critic, row_multiple
from ral_gym.rewards.scorer import CriticScorer
from ral_gym.runs.run import read_config
from ral_gym.runs.storage import load_metadata, load_module
from ral_gym.stages.device import resolve_device
from ral_gym.stages.labels import names_in
from ral_gym.tokenizers.base import Tokenizer, load_tokenizer
from ral_gym.tokenizers.code_set import CodeSet, decode_codes


def run_world(
    run: str,
    reward: str = "single",
    device: str = "cpu",
    forbidden_codes: Sequence[int] = (),
    top_k: int | None = None,
    plugins: Sequence[str] = (),
) -> World:
    """The world of a run folder: its tokenizer, its training images' codes and its critic, frozen.

    It has classes if the run's prior has: then the codes' labels are at the end of the real codes. In a run imported
    without images there are no real codes.

    Args:
        run: path of the folder, with stages 1 and 2 done (and stage 3, if its critic is the reward).
        reward: `single` or `intermediate`; the name of a reward of single images (`ral_gym.rewards.terms`); or `none`:
            rewards are 0, for a callback that writes them.
        device: `cpu`, `cuda` or `cuda:N`.
        forbidden_codes: see `Masks`.
        top_k: see `Masks`; the prior is the run's.
        plugins: modules that register parts, or ``module:Class`` names that the run's files may use.

    Raises:
        ValueError: unknown reward, or masks that leave nothing to draw.
        ConfigError: a plug-in that cannot be imported, or a file that names code whose import was not allowed.
        DeviceError: a device that does not exist here.
        RunError: the folder lacks a stage, a file is damaged, or its files do not belong together.
    """
    load_plugins(plugins)
    check_reward(reward, registered=True)
    where = resolve_device(device, auto=False)
    folder = Path(run)
    config = read_config(folder)
    vqvae: Tokenizer = _load(folder / "vqvae.safetensors", load_tokenizer, device)
    grid = replace(vqvae.grid, classes=prior_classes(folder))
    codes, class_names = _real_codes(folder, config, grid)
    make_prior = partial(run_prior, folder, config.vqvae.levels, device)
    scorer: Scorer | None = None
    if reward in CRITIC_REWARDS:
        what = (vqvae, folder, config.vqvae.levels, device)
        critic, normalizer, extractor = _load(folder / "critic.safetensors", _load_critic, what)
        scorer = CriticScorer(vqvae, critic, reward, normalizer, extractor=extractor)  # type: ignore[arg-type]
    elif reward != "none":
        scorer = term_scorer(reward, grid, vqvae.decode, where)
    prior = None if top_k is None else make_prior()
    return World(
        grid=grid,
        decode=partial(decode_codes, vqvae),
        scorer=scorer,
        real_codes=codes,
        row_multiple=_row_multiple(config, vqvae, make_prior),
        device=where,
        masks=make_masks(grid.codebook_size, forbidden_codes, top_k, prior),
        recipe=(run_world, (run, reward, device, tuple(forbidden_codes), top_k, tuple(plugins))),
        class_names=class_names,
    )


def _real_codes(folder: Path, config: Config, grid: CodeGrid) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """As `load_real_codes`; in a run without images no codes, and the classes' names that the prior came with."""
    if config.data.has_images:
        return load_real_codes(folder / "codes.safetensors", grid)
    return None, names_in(folder / "prior.safetensors", grid.classes)


def prior_classes(folder: Path) -> int:
    """How many classes the maximum-likelihood prior of a run has; 0: it has none, or there is no prior yet.

    Raises:
        RunError: its file is damaged.
    """
    path = folder / "prior.safetensors"
    config = load_metadata(path).get("config") if path.exists() else None
    classes = config.get("classes", 0) if isinstance(config, dict) else 0
    return classes if isinstance(classes, int) else 0


def _row_multiple(config: Config, vqvae: Tokenizer, make_prior: Callable[[], Prior]) -> int:
    """Code rows per score-map row of the run's critic, trained or not."""
    if config.critic.kind == "patch":
        return max(1, vqvae.grid.height // (vqvae.image_size // 2**config.critic.layers))
    if not config.ral.uses_critic or not hasattr(critic_class(config.critic.kind), "row_multiple"):
        return 1
    with torch.random.fork_rng(devices=[]):
        return row_multiple(build_critic(config.critic, vqvae, make_prior=make_prior), vqvae.grid.height)


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


def load_real_codes(path: Path, grid: CodeGrid) -> tuple[np.ndarray, tuple[str, ...]]:
    """The real images' sequences (N, `length`) int16 for a grid, and the names of its classes; once per process.

    Raises:
        RunError: see `CodeSet.load`; or the grid has classes, and the file has labels of others or none.
    """
    return _load(path, _load_codes, grid)


def _load_codes(path: Path, grid: CodeGrid) -> tuple[np.ndarray, tuple[str, ...]]:
    """The training images as they are, without augmented passes."""
    codes = CodeSet.load(path, grid)
    if grid.classes and len(codes.classes) != grid.classes:
        raise RunError(
            f"{path} has labels of {len(codes.classes) or 'no'} classes, but the prior beside it draws images of "
            f"{grid.classes}; remove the file to encode again"
        )
    return codes.sequences("clean", grid), codes.classes if grid.classes else ()


def _load_critic(path: Path, what: tuple[Tokenizer, Path, int, str]) -> Any:
    """The critic, the scale it was saved with, and the extractor of what it sees."""
    vqvae, folder, levels, device = what
    return load_critic(path, vqvae, device, partial(run_prior, folder, levels, device))


def _load(path: Path, load: Callable[[Path, Any], Any], argument: Any) -> Any:
    """The result of ``load(path, argument)``, once per process; a file that was rewritten is read again."""
    version = (path.stat().st_mtime_ns, path.stat().st_size) if path.exists() else None
    return _load_once(path, path.absolute(), version, load, argument)


@lru_cache(maxsize=16)
def _load_once(path: Path, absolute: Path, version: Any, load: Callable[[Path, Any], Any], argument: Any) -> Any:
    return load(path, argument)
