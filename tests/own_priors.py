"""Priors that a stranger would write, for the tests: a small transformer, alone and of bottom codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ral_gym.grid import CodeGrid
from ral_gym.priors.pixelcnn import PixelCNN


class GPT(nn.Module):
    """A causal transformer over the codes in raster order; with a condition its mean embedding is added everywhere."""

    levels = 1

    def __init__(
        self,
        codebook_size: int,
        height: int,
        width: int,
        hidden_units: int = 32,
        dropout: float = 0.0,
        heads: int = 4,
        condition: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.codebook_size, self.height, self.width, self.hidden_units = codebook_size, height, width, hidden_units
        self.dropout, self.heads, self.condition = dropout, heads, condition
        self.code = nn.Embedding(codebook_size + 1, hidden_units)  # the last one: the start
        self.position = nn.Parameter(0.1 * torch.randn(height * width, hidden_units))
        self.block = nn.TransformerEncoderLayer(hidden_units, heads, 64, dropout, batch_first=True)
        self.head = nn.Linear(hidden_units, codebook_size)
        if condition is not None:
            self.above = nn.Embedding(condition[2] + 1, hidden_units)

    @property
    def config(self) -> dict[str, Any]:
        sizes = {"codebook_size": self.codebook_size, "height": self.height, "width": self.width}
        config = {**sizes, "hidden_units": self.hidden_units, "dropout": self.dropout, "heads": self.heads}
        return config if self.condition is None else {**config, "condition": list(self.condition)}

    @property
    def grid(self) -> CodeGrid:
        return CodeGrid(self.height, self.width, self.codebook_size)

    def features(self, codes: Tensor, condition: Tensor | None = None) -> Tensor:
        start = torch.full_like(codes[:, :1], self.codebook_size)
        seen = torch.cat([start, codes[:, :-1].clamp(max=self.codebook_size - 1)], 1)  # (B, T')
        x = self.code(seen) + self.position[: codes.shape[1]]  # (B, T', C)
        if condition is not None and self.condition is not None:
            x = x + self.above(condition.clamp(max=self.condition[2])).mean(1, keepdim=True)
        mask = nn.Transformer.generate_square_subsequent_mask(codes.shape[1], device=x.device, dtype=x.dtype)
        return self.block(x, src_mask=mask, is_causal=True)

    def logits(self, features: Tensor, position: Tensor | None = None) -> Tensor:
        return self.head(features)

    def forward(self, codes: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.logits(self.features(codes, condition))


class Labelled(GPT):
    """A sequence is T codes and a class label behind them, K + 2 + class; the label's embedding is the start."""

    classes = 3

    def __init__(self, codebook_size: int, height: int, width: int, **settings: Any) -> None:
        super().__init__(codebook_size, height, width, **settings)
        self.label = nn.Embedding(self.classes, self.hidden_units)

    def split(self, sequence: Tensor) -> tuple[Tensor, Tensor]:
        return sequence[:, :-1], sequence[:, -1:] - self.codebook_size - 2

    def features(self, codes: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is None:
            codes, condition = self.split(codes)
        return super().features(codes) + self.label(condition)


class Sharp(PixelCNN):
    """A PixelCNN that is surer of itself."""

    def __init__(self, codebook_size: int, height: int, width: int, sharpness: float = 3.0, **settings: Any) -> None:
        super().__init__(codebook_size, height, width, **settings)
        self.sharpness = sharpness

    @property
    def config(self) -> dict[str, Any]:
        return {**super().config, "sharpness": self.sharpness}

    def logits(self, features: Tensor, position: Tensor | None = None) -> Tensor:
        return self.sharpness * super().logits(features)
