"""Statistics of a run's real images, for `ral.reward_reference` of this run or of one without images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ral_gym.data.images import load_images
from ral_gym.errors import ConfigError
from ral_gym.rewards.moments import Moments
from ral_gym.rewards.reference import reference_of
from ral_gym.rewards.scorer import find_features, require_encoder_features
from ral_gym.runs.run import Run, read_config
from ral_gym.stages.device import resolve_device
from ral_gym.stages.levels import load_vqvae
from ral_gym.tokenizers.code_set import CodeSet, decode_codes

IMAGES_AT_ONCE = 256


def run_reference(
    run: Path | str,
    features: str = "encoder",
    *,
    data: str | None = None,
    n: int | None = None,
    device: str = "auto",
    progress: bool = False,
) -> Moments:
    """Mean and covariance of the features of real images, computed batch by batch.

    Args:
        run: a run folder with a tokenizer.
        features: as `ral.reward_features`.
        data: a source of images as in `ral-gym train`, cropped and resized as the run's; its training images are taken
            as they are. None: the run's training images after encoding and decoding, to which its rewards compare.
        n: use only this many, a seeded random subset; None: all.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        progress: show progress bars.

    Raises:
        ConfigError: unknown features, or fewer than 3 images.
        DataError: the source cannot be read.
        RunError: the run has no tokenizer, or no codes and no `data` is given.
    """
    config, where = read_config(run), resolve_device(device)
    folder = Run(run, config)
    vqvae = load_vqvae(folder, where)
    extractor = find_features(features, vqvae, where) or require_encoder_features(vqvae)
    if data is None:
        codes = CodeSet.load(folder.file("codes.safetensors"), vqvae.grid).sequences("clean", vqvae.grid)
        rows = _rows(len(codes), n, config.seed)
        batches: Iterator[Tensor] = (decode_codes(vqvae, codes[part]) for part in rows)
    else:
        source = dataclasses.replace(config.data, source=data)
        images = load_images(source, seed=config.seed, progress=progress).train
        batches = (torch.from_numpy(np.array(images[part])) for part in _rows(len(images), n, config.seed))
    return reference_of(batches, extractor)


def _rows(count: int, n: int | None, seed: int) -> list[np.ndarray]:
    """Which images, in batches.

    Raises:
        ConfigError: a number of images that is not 3 or more.
    """
    if n is not None and n < 3:
        raise ConfigError(f"n is {n}: a covariance needs 3 images or more")
    rows = np.sort(np.random.default_rng(seed).permutation(count)[:n]) if n is not None else np.arange(count)
    return np.array_split(rows, max(1, -(-len(rows) // IMAGES_AT_ONCE)))
