"""Causal self-attention over all earlier codes, between the gated blocks of the PixelCNN.

Follows "PixelSNAIL: An Improved Autoregressive Generative Model" (Chen et al., 2018): convolutions see what is near,
attention sees everything drawn so far. The supplement's Tables 6 to 8 have 8 such layers at 16 x 16.

Differences from PixelSNAIL: the first code attends to a learned "start" token instead of to nothing, and positions
enter as learned vectors per row and per column instead of as two coordinate channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ral_gym.priors.linear import Linear


def attention_blocks(layers: int, attention_layers: int) -> list[int]:
    """Indices of the blocks that an attention layer follows: spread evenly, always including the last block.

    Args:
        layers: gated blocks.
        attention_layers: number of attention layers, at most `layers`.
    """
    return [i for i in range(layers) if (i + 1) * attention_layers // layers > i * attention_layers // layers]


def attend(query: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax-weighted means of values; in plain operations, because TRPO differentiates them twice.

    Args:
        query: (..., n, d), scaled by 1 / sqrt(d) already.
        memory: (..., m, 2 d), a key and a value side by side.
        mask: (..., n, m) bool, True where attention is not allowed.

    Returns:
        (..., n, d).
    """
    key, content = memory.chunk(2, dim=-1)
    scores = query @ key.transpose(-1, -2)  # (..., n, m)
    if mask is not None:
        scores = scores.masked_fill(mask, -math.inf)
    return torch.softmax(scores, dim=-1) @ content


class CausalAttention(nn.Module):
    """Every position of the horizontal stack attends to all codes strictly before it.

    The query is computed from the position's activations; keys and values from the activations of an earlier position,
    which have seen the codes before it, concatenated with the embedding of the earlier position's own code.

    Args:
        hidden_units: C, channels of the horizontal stack.
        heads: attention heads, a divisor of C.
        height: H, rows of the grid.
        width: W, columns of the grid.
        dropout: probability, on the attended values.
    """

    def __init__(self, hidden_units: int, heads: int, height: int, width: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.query = Linear(hidden_units, hidden_units)
        self.memory = Linear(2 * hidden_units, 2 * hidden_units, bias=False)  # per head, a key and a value
        self.start = nn.Parameter(torch.empty(2 * hidden_units))
        self.row_position = nn.Parameter(torch.empty(height, 2 * hidden_units))
        self.column_position = nn.Parameter(torch.empty(width, 2 * hidden_units))
        self.out = Linear(hidden_units, hidden_units, bias=False)
        self.dropout = nn.Dropout(dropout)

    def positions(self) -> tuple[Tensor, Tensor]:
        """What a position adds to its query, (H, W, C), and to its key and value, (H, W, 2 C)."""
        query, key = (self.row_position[:, None] + self.column_position).chunk(2, dim=-1)  # (H, W, C) each
        key = key.unflatten(-1, (self.heads, -1))  # (H, W, heads, d)
        return query, F.pad(key, (0, key.shape[-1])).flatten(-2)  # values carry no position

    def forward(self, horizontal: Tensor, embedded: Tensor) -> Tensor:
        """The horizontal stack (B, rows, W, C) and the embedded codes (B, rows, W, C) to the horizontal stack."""
        batch, rows, width, channels = horizontal.shape
        to_query, to_memory = (position[:rows] for position in self.positions())
        query = ((self.query(horizontal) + to_query) * math.sqrt(self.heads / channels)).flatten(1, 2)  # (B, T, C)
        seen = self.memory(torch.cat([horizontal, embedded], dim=-1)) + to_memory  # (B, rows, W, 2 C)
        # Shifted by one position: the start token comes first, and a position attends to the codes before it only.
        memory = torch.cat([self.start.expand(batch, 1, -1), seen.flatten(1, 2)[:, :-1]], dim=1)  # (B, T, 2 C)
        length = rows * width
        query = query.view(batch, length, self.heads, -1).transpose(1, 2)  # (B, heads, T, d)
        memory = memory.view(batch, length, self.heads, -1).transpose(1, 2)  # (B, heads, T, 2 d)
        later = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)  # (T, T)
        found = attend(query, memory, later)  # (B, heads, T, d)
        found = self.out(self.dropout(found.transpose(1, 2).flatten(2)))  # (B, T, C)
        return horizontal + found.view(batch, rows, width, channels)

    def reset_parameters(self, attention_layers: int) -> None:
        """Initialise as the PixelCNN does: small, and all attention layers together add about one variance.

        Args:
            attention_layers: how many of them the network has.
        """
        channels = self.out.in_features
        nn.init.normal_(self.query.weight, std=1 / math.sqrt(channels))
        nn.init.zeros_(self.query.bias)
        nn.init.normal_(self.memory.weight, std=1 / math.sqrt(2 * channels))
        nn.init.normal_(self.start, std=0.1)
        # Large enough to prefer some places from the start. In 400 steps on 8 x 8, a network whose kernels do not reach
        # from the last row to the first learned to copy it (2.08 to 0.52 nats); with std=0.1 it did not (2.08).
        for position in (self.row_position, self.column_position):
            nn.init.normal_(position, std=math.sqrt(0.5))
        nn.init.normal_(self.out.weight, std=1 / math.sqrt(channels * attention_layers))
