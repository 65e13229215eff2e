"""A prior of your own, a small causal transformer: all of RAL with it. To be run in this folder.

    ral-gym train --preset smoke --name gpt --prior.kind own_prior:GPT --prior.options heads 2 --prior.hidden-units 32
Afterwards the name is asked for again: ``ral-gym sample runs/gpt --plugin own_prior:GPT``.
"""

import torch
from torch import Tensor, nn

from ral_gym.grid import CodeGrid


class GPT(nn.Module):
    """A `ral_gym.priors.base.Prior` without a sampling cache (`Packed` there): drawing takes a full pass per code."""

    levels = 1

    def __init__(self, codebook_size: int, height: int, width: int, hidden_units: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.codebook_size, self.height, self.width, self.hidden_units = codebook_size, height, width, hidden_units
        sizes = {"codebook_size": codebook_size, "height": height, "width": width}
        self.config, self.grid = {**sizes, "hidden_units": hidden_units, "heads": heads}, CodeGrid(**sizes)
        self.code = nn.Embedding(codebook_size + 1, hidden_units)  # the last one stands before the first code
        self.position = nn.Parameter(0.02 * torch.randn(height * width, hidden_units))
        self.block = nn.TransformerEncoderLayer(hidden_units, heads, 4 * hidden_units, 0.0, batch_first=True)
        self.head = nn.Linear(hidden_units, codebook_size)

    def features(self, codes: Tensor) -> Tensor:
        """Codes (B, T') -> (B, T', C); position t has seen codes[:, :t]."""
        seen = nn.functional.pad(codes[:, :-1].clamp(max=self.codebook_size - 1), (1, 0), value=self.codebook_size)
        mask = nn.Transformer.generate_square_subsequent_mask(codes.shape[1], device=codes.device)
        return self.block(self.code(seen) + self.position[: codes.shape[1]], mask, is_causal=True)

    def logits(self, features: Tensor, position: Tensor | None = None) -> Tensor:
        """Features (..., C) -> (..., K)."""
        return self.head(features)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes (B, T') -> logits (B, T', K)."""
        return self.logits(self.features(codes))
