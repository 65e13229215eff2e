"""A finished run folder with random weights, made in a moment: for every test that needs one."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ral_gym.grid import CodeGrid
from ral_gym.presets import SMOKE
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.two_level import SUFFIXES
from ral_gym.rewards.critic import PatchCritic
from ral_gym.runs.storage import config_arguments, save_module, write_text
from ral_gym.tokenizers.code_set import CodeSet
from ral_gym.tokenizers.vqvae import VQVAE
from ral_gym.tokenizers.vqvae2 import vqvae_class

GRID = CodeGrid(height=4, width=4, codebook_size=16)
N_IMAGES = 12


def arguments(settings: Any, cls: type[nn.Module]) -> dict[str, Any]:
    """The fields of a configuration that a module's constructor takes."""
    taken = inspect.signature(cls).parameters
    return config_arguments(settings, tuple(f.name for f in dataclasses.fields(settings) if f.name in taken))


def make_tiny_run(path: Path, seed: int = 0, *, critic_layers: int = 3, levels: int = 1) -> Path:
    """Write what a run of the `smoke` preset leaves (32 x 32 grey images, 4 x 4 codes, K = 16), untrained.

    Args:
        path: the folder; made if it does not exist.
        seed: seeds weights and codes.
        levels: 2: 4 x 4 top codes and 8 x 8 bottom codes.
        critic_layers: 3: a score map of 4 x 4, one row per code row; 4: 2 x 2, so that episodes stop after 2 or 4 rows.

    Returns:
        `path`, with config.json, vqvae.safetensors, codes.safetensors, prior.safetensors and critic.safetensors.
    """
    config = dataclasses.replace(
        SMOKE,
        critic=dataclasses.replace(SMOKE.critic, layers=critic_layers),
        vqvae=dataclasses.replace(SMOKE.vqvae, levels=levels, layers=SMOKE.vqvae.layers + 1 - levels),
        seed=seed,
    )
    side, grid = config.data.image_size, dataclasses.replace(GRID, levels=levels)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vqvae = vqvae_class(levels)(side, 1, **arguments(config.vqvae, VQVAE))
        for quantiser in vqvae.quantisers:
            quantiser.codebook = torch.randn(GRID.codebook_size, config.vqvae.codebook_dim)
        settings = arguments(config.prior, PixelCNN) | {"conditioning_stack_layers": 1}
        given = [{}, {"condition": (*grid.shapes[0], GRID.codebook_size)}]
        priors = [PixelCNN(GRID.codebook_size, *shape, **settings, **given[i]) for i, shape in enumerate(grid.shapes)]
        critic = PatchCritic(side, 1, hidden_units=config.critic.hidden_units, layers=critic_layers)
        for weights in [*vqvae.decoder.parameters(), *critic.parameters()]:
            weights.data *= 2  # else all images, and all scores, are nearly the same
    rng = np.random.default_rng(seed)
    codes = rng.integers(GRID.codebook_size, size=(2 * N_IMAGES + 4, grid.n_codes)).astype(np.int16)
    write_text(path / "config.json", config.to_json())
    save_module(path / "vqvae.safetensors", vqvae)
    # The second half of the training codes stands for an augmented pass.
    CodeSet(codes[:-4], codes[-4:], None, clean=N_IMAGES).save(path / "codes.safetensors")
    for prior, suffix in zip(priors, SUFFIXES, strict=False):
        save_module(path / f"prior{suffix}.safetensors", prior)
    save_module(path / "critic.safetensors", critic, normalization="standard", shift=0.01, scale=0.5)
    return path
