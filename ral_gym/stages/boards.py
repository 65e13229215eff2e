"""Pictures in TensorBoard during training: a tokenizer's reconstructions and a prior's samples.

They change no random state and no weight, so a run with them is bit for bit the same as one without.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ral_gym.data.subsets import subset
from ral_gym.pictures import save_comparison
from ral_gym.priors.base import Prior
from ral_gym.priors.sampler import make_sampler
from ral_gym.priors.two_level import join_priors
from ral_gym.runs.progress import note
from ral_gym.stages.pictures import sequences_to_draw
from ral_gym.tokenizers.base import Tokenizer
from ral_gym.tokenizers.code_set import decode_codes, encode_images

N_GRIDS = 5
"""Picture grids per stage, at equal intervals; the last one at its end."""
N_IMAGES = 8
PROGRESS = "samples/progress.png"
"""A run's picture of where its training is; stages 1 and 2 draw it again at each of their grids."""
FIRST_SECONDS = 20.0
"""From the beginning of stage 1: whoever waits sees images within the first minute."""


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


def save_first_images(
    path: Path, vqvae: Tokenizer, images: np.ndarray, step: int, steps: int, n: int = 2 * N_IMAGES
) -> None:
    """Write a picture of stage 1: some images, their reconstructions, and first generated ones.

    Those are of codes drawn independently of each other, every one as often as it occurs at its place: a prior that
    knows nothing of the codes before. What stage 2 adds is how codes belong together.

    Args:
        path: PNG file to write.
        vqvae: the tokenizer as it is now.
        images: (N, C, S, S) uint8.
        step: optimizer steps so far.
        steps: of the whole stage.
        n: images of each kind.
    """
    picked = images[subset(len(images), 256, seed=0)]
    codes = encode_images(vqvae, picked, progress=False)  # (M, T) int16
    random = np.random.default_rng(0)
    drawn = codes[random.integers(len(codes), size=(n, codes.shape[1])), np.arange(codes.shape[1])]  # (n, T)
    shown = {"real": picked[:n], "reconstruction": decode_codes(vqvae, codes[:n])}
    shown |= {"independent codes": decode_codes(vqvae, drawn)}
    caption = (
        "right: the first generated images; each code is drawn on its own, as often as it occurs at its place. Stage 2 "
        "learns how codes belong together."
    )
    save_comparison(path, shown, title=f"Stage 1, after {step:,} of {steps:,} steps", caption=caption)


class FirstImages:
    """Stage 1's picture (`save_first_images`): at every grid, and once before the first one if that is far off.

    Args:
        path: PNG file to write.
        vqvae: the tokenizer that is trained.
        images: (N, C, S, S) uint8.
        steps: of the whole stage.
        quiet: do not name the file on the error stream.
    """

    def __init__(self, path: Path, vqvae: Tokenizer, images: np.ndarray, steps: int, quiet: bool) -> None:
        self.path, self.vqvae, self.images, self.steps, self.quiet = path, vqvae, images, steps, quiet
        self._shown, self._soon = path.exists(), time.monotonic() + FIRST_SECONDS

    def show(self, step: int) -> None:
        """Write the picture if it is time; the first time, say where it is."""
        if due(step, self.steps) or (not self._shown and time.monotonic() >= self._soon):
            save_first_images(self.path, self.vqvae, self.images, step, self.steps)
            if not self._shown:
                note(f"First images: {self.path} (drawn again as training goes on)", disable=self.quiet)
            self._shown = True


def add_samples(
    writer: SummaryWriter,
    tag: str,
    prior: Prior,
    vqvae: Tokenizer,
    step: int,
    top: Prior | None = None,
    seed: int = 0,
) -> Tensor:
    """Add images that a prior draws, always from the same uniforms.

    Args:
        writer: TensorBoard's.
        tag: the picture's name there.
        prior: a generator of whole images; or a prior of bottom codes, with `top`.
        vqvae: decodes.
        step: training step, for the time axis.
        top: the prior of top codes that belongs to it.
        seed: seeds the uniforms.

    Returns:
        (N, C, S, S) uint8, the images.
    """
    whole = join_priors([prior] if top is None else [top, prior])
    generator = torch.Generator(next(whole.parameters()).device).manual_seed(seed)
    codes, _ = make_sampler(whole).sample(
        2 * N_IMAGES, codes=sequences_to_draw(whole, 2 * N_IMAGES), generator=generator
    )
    images = decode_codes(vqvae, codes)
    add_grid(writer, tag, images, step)
    return images
