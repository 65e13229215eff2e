"""Random features and images, and an extractor that counts what it sees: for the tests of metrics."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def gaussian(n: int, shift: float = 0.0, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Correlated features (n, 5)."""
    generator = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(n, 5, generator=generator) @ (torch.eye(5) + torch.linspace(0, 1, 25).view(5, 5))


def images(n: int, channels: int = 3, size: int = 32, seed: int = 0) -> Tensor:
    """Noise, uint8 (n, channels, size, size)."""
    return torch.randint(
        0, 256, (n, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


class PixelMeans(nn.Module):
    """Extractor for tests: mean of each channel, and how many images it has seen."""

    name = "means"
    num_features = 3
    device = torch.device("cpu")
    seen = 0

    def forward(self, batch: Tensor) -> Tensor:
        self.seen += len(batch)
        return batch.float().mean((2, 3))
