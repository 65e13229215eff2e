"""A prior of the kind that taming-transformers draws with: GPT-2's network over the codes in raster order.

"Taming Transformers for High-Resolution Image Synthesis" (Esser et al., 2021), https://arxiv.org/abs/2012.09841, whose
transformer is minGPT: LayerNorm before attention and before a feed-forward layer with the exact GELU, biases everywhere
but in the output layer, and a learned vector per position. Dropout is that of `ral_gym.priors.causal`; minGPT's on
attention weights is left out.

There is no row for "no class", so that classifier-free guidance is not possible. taming's class-conditional model uses
the embedding of code number `label` as its class token: `ral-gym import taming` copies these rows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ral_gym.errors import ConfigError
from ral_gym.priors.causal import AttentionKind, Block, CausalTransformer, SelfAttention
from ral_gym.priors.linear import Linear


class GPT(CausalTransformer):
    """minGPT over an H x W grid of codes in raster order.

    Args:
        codebook_size: K, number of codes.
        height: H, rows of the grid. The network also runs on its first r rows alone, 1 <= r <= H.
        width: W, columns of the grid.
        hidden_units: C, width of the network.
        layers: blocks.
        attention_heads: heads of each; divides C.
        dropout: probability on the input, on what attention and on what the feed-forward layer add; in training mode
            only.
        classes: N, labels; 0: none.
        attention: `math` has second-order gradients (TRPO) and holds T^2 scores per head; `fused` is torch's own
            kernel, which has none, for long grids.

    Raises:
        ConfigError: an argument is out of range.
    """

    null_class = False

    def __init__(
        self,
        codebook_size: int,
        height: int,
        width: int,
        *,
        hidden_units: int = 128,
        layers: int = 4,
        attention_heads: int = 4,
        dropout: float = 0.1,
        classes: int = 0,
        attention: AttentionKind = "math",
    ) -> None:
        super().__init__(
            codebook_size,
            height,
            width,
            hidden_units=hidden_units,
            layers=layers,
            attention_heads=attention_heads,
            dropout=dropout,
            classes=classes,
            attention=attention,
        )
        if hidden_units % attention_heads:
            raise ConfigError(
                f"hidden_units={hidden_units} does not fit attention_heads={attention_heads}: give a multiple of it"
            )
        norm = partial(nn.LayerNorm, hidden_units)
        self.build(
            layers,
            lambda: Block(SelfAttention(hidden_units, attention_heads, bias=True), feed_forward(hidden_units), norm),
            norm,
        )
        self.position = nn.Parameter(torch.empty(height * width, hidden_units))
        self.reset_parameters()

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments; `GPT(**config)` builds the same network."""
        return self.arguments()

    def place(self, x: Tensor, slots: slice | int | Tensor) -> Tensor:
        """Add the learned vector of every slot: x (B, S, C) or (B, C) -> the same."""
        return x + self.position[slots]


def feed_forward(size: int) -> nn.Sequential:
    """C -> 4 C -> C, with the exact GELU."""
    return nn.Sequential(Linear(size, 4 * size), nn.GELU(), Linear(4 * size, size))
