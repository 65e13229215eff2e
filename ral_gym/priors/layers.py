"""The layers of the gated PixelCNN, each for a whole grid at once; ``ral_gym.priors.pixelcnn`` puts them together.

Grids have their channels last, (B, rows, W, C): the 1x1 layers are then plain matrix products. Kernels are cropped to
the taps that a mask would leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ral_gym.priors.condition import upsample
from ral_gym.priors.linear import Linear


def gate(pre: Tensor) -> Tensor:
    """The gated activation tanh(-a / 2) * sigmoid(b): Eq. 2 of van den Oord et al. up to a factor the weights absorb.

    Args:
        pre: (..., 2 R), a and b side by side.

    Returns:
        (..., R), between -1 and 1.
    """
    # tanh(-a / 2) = 1 - 2 sigmoid(a). On a CPU torch.tanh takes three times as long as torch.sigmoid.
    a, b = torch.sigmoid(pre).chunk(2, dim=-1)
    return torch.addcmul(b, a, b, value=-2)


def convolve(x: Tensor, conv: nn.Conv2d, above: int = 0, below: int = 0, left: int = 0, right: int = 0) -> Tensor:
    """Convolve a grid with rows and columns of zeros added on its sides; negative numbers crop.

    Args:
        x: (B, rows, W, C).
        conv: the convolution; its own padding is added to this one.
        above: rows added before the first.
        below: rows added after the last.
        left: columns added before the first.
        right: columns added after the last.

    Returns:
        (B, rows', W', channels out).
    """
    # Channels stay last in memory: the 1x1 layers are then plain matrix products and nothing is ever transposed.
    return conv(F.pad(x, (0, 0, left, right, above, below)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class InputLayer(nn.Module):
    """Code embeddings and the first layer of both stacks: rows strictly above, and codes strictly left.

    Args:
        codebook_size: K.
        hidden_units: C, channels of both stacks.
        conv_filter_size: k, odd.
        grid: (H, W) for a learned vector per position, None for none.
    """

    def __init__(self, codebook_size: int, hidden_units: int, conv_filter_size: int, grid: tuple[int, int] | None):
        super().__init__()
        self.reach = conv_filter_size // 2
        self.embedding = nn.Embedding(codebook_size, hidden_units)
        self.vertical = nn.Conv2d(hidden_units, hidden_units, (self.reach, conv_filter_size), padding=(0, self.reach))
        self.horizontal = nn.Conv2d(hidden_units, hidden_units, (1, self.reach))
        self.position = nn.Parameter(torch.empty(hidden_units, *grid)) if grid else None

    def forward(self, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded codes (B, rows, W, C) to the inputs of the two stacks, each (B, rows, W, C)."""
        reach, x = self.reach, embedded
        vertical = convolve(x, self.vertical, above=reach, below=-1)
        horizontal = convolve(x, self.horizontal, left=reach, right=-1)
        if self.position is not None:
            position = self.position.permute(1, 2, 0)[: x.shape[1]]  # (rows, W, C)
            vertical, horizontal = vertical + position, horizontal + position
        return vertical, horizontal


class GatedBlock(nn.Module):
    """One layer of both stacks (Figure 2 of van den Oord et al.).

    The vertical kernel sees its own row and those above, the horizontal one its own position and those to the left;
    the vertical pre-activations enter the horizontal ones through a 1x1 layer, never the other way round.

    Args:
        hidden_units: C, channels of both stacks.
        residual_units: R, channels inside the block (2 R before the gate).
        conv_filter_size: k, odd.
        dropout: probability, after both gates.
        last: no block follows, so the vertical stack ends before its gate.
        conditional: a condition is added to the vertical pre-activations, and through them to the horizontal ones.
    """

    def __init__(
        self,
        hidden_units: int,
        residual_units: int,
        conv_filter_size: int,
        dropout: float,
        last: bool,
        conditional: bool = False,
    ):
        super().__init__()
        self.reach = conv_filter_size // 2
        # Where possible use the convolution's own padding: oneDNN skips those taps, 15 % of the time on 8 x 8.
        self.vertical = nn.Conv2d(
            hidden_units, 2 * residual_units, (self.reach + 1, conv_filter_size), padding=(0, self.reach)
        )
        self.horizontal = nn.Conv2d(hidden_units, 2 * residual_units, (1, self.reach + 1), bias=False)
        self.vertical_to_horizontal = Linear(2 * residual_units, 2 * residual_units)
        self.vertical_out = None if last else Linear(residual_units, hidden_units, bias=False)
        self.horizontal_out = Linear(residual_units, hidden_units, bias=False)
        self.condition = Linear(hidden_units, 2 * residual_units, bias=False) if conditional else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, vertical: Tensor, horizontal: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Both stacks, each (B, rows, W, C), one layer on; a condition (B, H / f, W / f, C) is upsampled by f."""
        reach = self.reach
        above = convolve(vertical, self.vertical, above=reach)  # (B, rows, W, 2 R)
        if self.condition is not None and condition is not None:
            added = self.condition(condition)  # (B, H / f, W / f, 2 R): before upsampling, it costs f * f times less
            above = above + upsample(added, above.shape[2] // added.shape[2])[:, : above.shape[1]]
        left = convolve(horizontal, self.horizontal, left=reach)  # (B, rows, W, 2 R)
        left = left + self.vertical_to_horizontal(above)
        if self.vertical_out is not None:
            vertical = vertical + self.vertical_out(self.dropout(gate(above)))
        horizontal = horizontal + self.horizontal_out(self.dropout(gate(left)))
        return vertical, horizontal


class OutputStack(nn.Module):
    """Residual 1x1 layers from a position's features to the logits of its code.

    Args:
        hidden_units: C, channels of the features.
        codebook_size: K.
        layers: residual layers in front of the linear one.
    """

    def __init__(self, hidden_units: int, codebook_size: int, layers: int):
        super().__init__()
        self.layers = cast(Sequence[Linear], nn.ModuleList(Linear(hidden_units, hidden_units) for _ in range(layers)))
        self.to_logits = Linear(hidden_units, codebook_size)

    def forward(self, x: Tensor) -> Tensor:
        """Features (..., C) to logits (..., K)."""
        for layer in self.layers:
            x = x + layer(F.relu(x))
        return self.to_logits(F.relu(x))
