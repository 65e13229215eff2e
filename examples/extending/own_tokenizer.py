"""A tokenizer of your own: every patch becomes the nearest of K real patches, drawn at random; no network at all.

ral-gym train --preset smoke --evaluation.extractor pyramid --vqvae.kind own_tokenizer:Patches --vqvae.options patch 8
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ral_gym.data.images import to_float
from ral_gym.grid import CodeGrid


class Patches(nn.Module):
    """Images -> the nearest of K patches at every position -> images."""

    def __init__(self, image_size: int, channels: int, codebook_size: int = 16, patch: int = 8) -> None:
        super().__init__()
        self.config = dict(image_size=image_size, channels=channels, codebook_size=codebook_size, patch=patch)
        self.image_size, self.channels, self.patch = image_size, channels, patch
        self.grid = CodeGrid(image_size // patch, image_size // patch, codebook_size)
        self.patches = nn.Parameter(torch.zeros(codebook_size, channels * patch**2), requires_grad=False)

    def fit(self, images: np.ndarray, seed: int) -> None:
        """Take K random patches of uint8 images (N, C, S, S)."""
        rng = np.random.default_rng(seed)
        real = to_float(torch.from_numpy(images[rng.permutation(len(images))[:500]])).to(self.patches.device)
        vectors = F.unfold(real, self.patch, stride=self.patch).mT.flatten(0, 1)  # (N, C p p)
        self.patches.copy_(vectors[rng.permutation(len(vectors))[: len(self.patches)]])

    def encode(self, images: Tensor) -> list[Tensor]:
        """(B, C, S, S) -> [(B, T)]."""
        return [torch.cdist(F.unfold(images, self.patch, stride=self.patch).mT, self.patches).argmin(-1)]

    def decode(self, codes: Tensor) -> Tensor:
        """(B, r * W) -> (B, C, r * patch, S)."""
        size = (codes.shape[1] // self.grid.width * self.patch, self.image_size)
        return F.fold(self.patches[codes].transpose(1, 2), size, self.patch, stride=self.patch).clamp(-1, 1)
