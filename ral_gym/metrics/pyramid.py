"""Features without a network: how much detail of each size there is, and where (extractor `pyramid`).

A Laplacian pyramid (Burt and Adelson, 1983) splits an image into bands, each of details half as fine as the last one's.
The mean magnitude of each band in each cell of a coarse grid is what texture synthesis matches (Heeger and Bergen,
1995). A decoder renders codes that do not fit together with too much or too little detail, which these features show
and an average over the tokenizer's encoder does not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PyramidFeatures(nn.Module):
    """Mean magnitudes of a Laplacian pyramid's bands; works for images of any height, such as drawn rows alone.

    Args:
        levels: bands, from the finest on.
        cells: side of the grid that each band is averaged over.
    """

    name = "pyramid"

    def __init__(self, levels: int = 3, cells: int = 2) -> None:
        super().__init__()
        self.levels, self.cells = levels, cells
        self.num_features = levels * cells**2
        self.device = torch.device("cpu")

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images uint8 (B, C, h, S) -> (B, num_features) float32."""
        x = images.float() / 127.5 - 1  # (B, C, h, S)
        features = []
        for _ in range(self.levels):
            low = F.avg_pool2d(x, 2, ceil_mode=True)  # (B, C, h/2, S/2)
            band = x - F.interpolate(low, size=x.shape[-2:], mode="bilinear")
            features.append(F.adaptive_avg_pool2d(band.abs().mean(1), self.cells).flatten(1))  # (B, cells^2)
            x = low
        return torch.cat(features, 1)
