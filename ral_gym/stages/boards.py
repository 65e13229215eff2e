"""Pictures in TensorBoard during training: a tokenizer's reconstructions and a prior's samples.

They change no random state and no weight, so a run with them is bit for bit the same as one without.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ral_gym.data.subsets import subset
from ral_gym.priors.base import Prior
from ral_gym.priors.sampler import make_sampler
from ral_gym.priors.two_level import join_priors
from ral_gym.stages.pictures import sequences_to_draw
from ral_gym.tokenizers.base import Tokenizer
from ral_gym.tokenizers.code_set import decode_codes, encode_images

N_GRIDS = 5
"""Picture grids per stage, at equal intervals; the last one at its end."""
N_IMAGES = 8


def due(step: int, steps: int) -> bool:
    """Whether step `step` of `steps` shows a grid."""
    return any(step == max(1, steps * number // N_GRIDS) for number in range(1, N_GRIDS + 1))


def add_grid(writer: SummaryWriter, tag: str, images: Tensor | np.ndarray, step: int, columns: int = N_IMAGES) -> None:
    """Add uint8 images (N, C, S, S) as one picture, row by row; gaps in the last row are black."""
    array = np.asarray(images)
    n, c, h, w = array.shape
    rows = -(-n // columns)
    padded = np.zeros((rows * columns, c, h, w), np.uint8)
    padded[:n] = array
    picture = padded.reshape(rows, columns, c, h, w).transpose(2, 0, 3, 1, 4).reshape(c, rows * h, columns * w)
    writer.add_image(tag, picture, step)


def add_reconstructions(writer: SummaryWriter, tag: str, vqvae: Tokenizer, images: np.ndarray, step: int) -> None:
    """Add some of the images, uint8 (N, C, S, S), above their reconstructions; always the same ones."""
    real = images[subset(len(images), N_IMAGES, seed=0)]
    rebuilt = decode_codes(vqvae, encode_images(vqvae, real, progress=False))  # (B, C, S, S) uint8
    add_grid(writer, tag, np.concatenate([real, rebuilt.numpy()]), step, columns=len(real))


def add_samples(
    writer: SummaryWriter,
    tag: str,
    prior: Prior,
    vqvae: Tokenizer,
    step: int,
    top: Prior | None = None,
    seed: int = 0,
) -> None:
    """Add images that a prior draws, always from the same uniforms.

    Args:
        writer: TensorBoard's.
        tag: the picture's name there.
        prior: a generator of whole images; or a prior of bottom codes, with `top`.
        vqvae: decodes.
        step: training step, for the time axis.
        top: the prior of top codes that belongs to it.
        seed: seeds the uniforms.
    """
    whole = join_priors([prior] if top is None else [top, prior])
    generator = torch.Generator(next(whole.parameters()).device).manual_seed(seed)
    codes, _ = make_sampler(whole).sample(
        2 * N_IMAGES, codes=sequences_to_draw(whole, 2 * N_IMAGES), generator=generator
    )
    add_grid(writer, tag, decode_codes(vqvae, codes), step)
