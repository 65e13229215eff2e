"""DiffAugment: random changes of the images that a critic is trained on, real and drawn ones alike.

From "Differentiable Augmentation for Data-Efficient GAN Training" (Zhao et al., 2020): a critic that never sees an
image twice alike does not learn the few there are by heart. The numbers are the paper's: brightness within 0.5 of
images in [-1, 1], saturation times 0 to 2, contrast times 0.5 to 1.5; a shift by up to an eighth of each side; a blank
rectangle of half of each side. What is shifted in or cut out is 0, mid-grey.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from ral_gym.priors.transfer import sent

AUGMENTATIONS = ("colour", "translation", "cutout")
"""What there is, in the order in which it is done."""
DRAWS = 7
"""Random numbers of an image: 3 for its colour, 2 for its shift, 2 for its cut-out."""
SHIFT = 1 / 8
CUT = 1 / 2


def draw_augmentations(n: int, generator: Generator) -> Tensor:
    """Uniforms (n, DRAWS) float32 on the CPU, the same for any choice of augmentations."""
    return torch.rand(n, DRAWS, generator=generator, dtype=torch.float32)


def augmented(images: Tensor, kinds: Collection[str], uniforms: Tensor) -> Tensor:
    """New images, each changed in its own way; gradients flow back to `images`.

    Args:
        images: (B, C, h, S) float, in [-1, 1].
        kinds: some of `AUGMENTATIONS`.
        uniforms: (B, DRAWS) in [0, 1), of `draw_augmentations`.

    Returns:
        (B, C, h, S); colour may leave [-1, 1].
    """
    u = sent(uniforms, images.device)
    if "colour" in kinds:
        images = _colour(images, *u[:, :3].to(images.dtype).T)
    if "translation" in kinds:
        images = _translation(images, *u[:, 3:5].T)
    if "cutout" in kinds:
        images = _cutout(images, *u[:, 5:7].T)
    return images


def _colour(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    brightness, saturation, contrast = (one[:, None, None, None] for one in (brightness, saturation, contrast))
    images = images + brightness - 0.5
    grey = images.mean(1, keepdim=True)  # (B, 1, h, S)
    images = grey + (images - grey) * (2 * saturation)
    mean = images.mean((1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    return mean + (images - mean) * (contrast + 0.5)


def _translation(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    height, width = images.shape[2:]
    rows = _shifted(height, down)  # (B, h)
    columns = _shifted(width, right)  # (B, S)
    image = torch.arange(len(images), device=images.device)[:, None, None]
    found = F.pad(images, (1, 1, 1, 1))[image, :, rows[:, :, None], columns[:, None, :]]  # (B, h, S, C)
    return found.permute(0, 3, 1, 2)


def _shifted(size: int, uniform: Tensor) -> Tensor:
    """Where each place of a shifted side comes from (B, size), in a side that has a border of one place."""
    most = _rounded(size * SHIFT)
    shift = _integers(uniform, 2 * most + 1) - most  # (B,)
    places = torch.arange(size, device=uniform.device)  # (size,)
    return (places - shift[:, None] + 1).clamp(0, size + 1)


def _cutout(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    height, width = images.shape[2:]
    rows, columns = _covered(height, down), _covered(width, right)  # (B, h), (B, S)
    hidden = rows[:, :, None] & columns[:, None, :]  # (B, h, S)
    return images.masked_fill(hidden[:, None], 0.0)


def _covered(size: int, uniform: Tensor) -> Tensor:
    """Which places of a side (B, size) a piece covers, whose middle may be anywhere, so that it may stick out."""
    length = _rounded(size * CUT)
    first = _integers(uniform, size + 1 - length % 2)[:, None] - length // 2  # (B, 1)
    places = torch.arange(size, device=uniform.device)  # (size,)
    return (places >= first) & (places < first + length)


def _rounded(value: float) -> int:
    return int(value + 0.5)


def _integers(uniform: Tensor, n: int) -> Tensor:
    """Uniforms (B,) as integers in 0..n-1; the product may round up to n."""
    return (uniform * n).long().clamp(max=n - 1)
