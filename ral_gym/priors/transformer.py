"""A prior of another kind: LlamaGen's causal transformer over the codes in raster order (Sun et al., 2024).

"Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation", https://arxiv.org/abs/2406.06525. Blocks of
attention and SwiGLU behind RMSNorm, no bias, and rotary positions (RoPE) in two dimensions: half of a head's pairs
turns by the row of a code, the other half by its column. Nothing is learned per position. Modules are named as in the
released files, so that their weights load as they are.

The input is [class, c_0 .. c_{T-2}], the output belongs to c_0 .. c_{T-1}. Two details that a port misses easily:

* cosine and sine of the class token are 0 and 0, not 1 and 0: its query and its key are zero vectors, its value is not;
* the pairs that turn together are neighbours, (x_0, x_1), (x_2, x_3), ..., not the two halves of a head.

`ral_gym.priors.causal` has what it shares with other causal transformers: start token, labels, attention.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ral_gym.errors import ConfigError
from ral_gym.priors.causal import (
    AttentionKind,
    Block,
    CausalTransformer,
    SelfAttention,
    Turn,
    check_counts,
    check_share,
)
from ral_gym.priors.linear import Linear

ROTARY_BASE = 10_000.0


def rotary_table(height: int, width: int, head_size: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles by which each slot's pairs turn: slot 0 the class token, slot 1 + t code t.

    Args:
        height: H, rows of the grid.
        width: W, columns of the grid.
        head_size: h, a multiple of 4.

    Returns:
        two tensors (1 + H W, h / 2) float64: the first h / 4 pairs by the row, the others by the column; the first row
        is zero in both.
    """
    frequencies = ROTARY_BASE ** (-torch.arange(0, head_size // 2, 2, dtype=torch.float64) / (head_size // 2))  # (h/4,)
    rows = torch.arange(height, dtype=torch.float64)[:, None] * frequencies  # (H, h/4)
    columns = torch.arange(width, dtype=torch.float64)[:, None] * frequencies  # (W, h/4)
    angles = torch.cat([rows.repeat_interleave(width, 0), columns.repeat(height, 1)], 1)  # (H W, h/2)
    nothing = angles.new_zeros(1, head_size // 2)
    return torch.cat([nothing, angles.cos()]), torch.cat([nothing, angles.sin()])


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight; the mean is taken in float32 at least."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.w1 = Linear(size, inner, bias=False)
        self.w3 = Linear(size, inner, bias=False)
        self.w2 = Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Transformer(CausalTransformer):
    """LlamaGen's causal transformer over an H x W grid of codes in raster order.

    Args:
        codebook_size: K, number of codes.
        height: H, rows of the grid. The network also runs on its first r rows alone, 1 <= r <= H.
        width: W, columns of the grid.
        hidden_units: C, width of the network.
        layers: blocks.
        attention_heads: heads of each; C / heads must be a multiple of 4.
        dropout: probability on the input, on what attention and on what SwiGLU add; in training mode only.
        multiple_of: SwiGLU has int(8 C / 3) inner units, rounded up to a multiple of this.
        classes: N, labels; 0: none.
        class_dropout: share of the labels that training mode replaces by "no class", for classifier-free guidance.
        attention: `math` has second-order gradients (TRPO) and holds T^2 scores per head; `fused` is torch's own
            kernel, which has none, for long grids.

    Raises:
        ConfigError: an argument is out of range.
    """

    cosine: Tensor
    sine: Tensor

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
        multiple_of: int = 256,
        classes: int = 0,
        class_dropout: float = 0.1,
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
        self.multiple_of, self.class_dropout = multiple_of, class_dropout
        check_counts(multiple_of=multiple_of)
        check_share("class_dropout", class_dropout)
        if hidden_units % (4 * attention_heads):
            raise ConfigError(
                f"hidden_units={hidden_units} does not fit attention_heads={attention_heads}: give a multiple of "
                f"{4 * attention_heads}, since rotary positions turn pairs by row and by column"
            )
        inner = -(-int(8 * hidden_units / 3) // multiple_of) * multiple_of
        norm = partial(RMSNorm, hidden_units)
        self.build(
            layers,
            lambda: Block(SelfAttention(hidden_units, attention_heads), FeedForward(hidden_units, inner), norm),
            norm,
        )
        cosine, sine = rotary_table(height, width, hidden_units // attention_heads)
        self.register_buffer("cosine", cosine.to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("sine", sine.to(torch.get_default_dtype()), persistent=False)
        self.reset_parameters()

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments; `Transformer(**config)` builds the same network."""
        return self.arguments("multiple_of", "class_dropout")

    def turns(self, slots: slice | int | Tensor) -> Turn:
        """Cosine and sine (S, h / 2) of the angles of slots, or (B, 1, 1, h / 2) of one slot (B,) for each row."""
        cosine, sine = self.cosine[slots], self.sine[slots]
        return (cosine[:, None, None], sine[:, None, None]) if isinstance(slots, Tensor) else (cosine, sine)
