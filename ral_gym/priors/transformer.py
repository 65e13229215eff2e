"""A prior of another kind: LlamaGen's causal transformer over the codes in raster order (Sun et al., 2024).

"Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation", https://arxiv.org/abs/2406.06525. Blocks of
attention and SwiGLU behind RMSNorm, no bias, and rotary positions (RoPE) in two dimensions: half of a head's pairs
turns by the row of a code, the other half by its column. Nothing is learned per position. Modules are named as in the
released files, so that their weights load as they are.

The input is [class, c_0 .. c_{T-2}], the output belongs to c_0 .. c_{T-1}. Two details that a port misses easily:

* cosine and sine of the class token are 0 and 0, not 1 and 0: its query and its key are zero vectors, its value is not;
* the pairs that turn together are neighbours, (x_0, x_1), (x_2, x_3), ..., not the two halves of a head.

With ``classes=0`` there is one learned start token and no label. With classes a sequence is T' codes and, at its end,
the label as K + 2 + class; K + 2 + `classes` is "no class", which training mode puts in the place of a share of labels.
`ral_gym.priors.kv_cache` draws from this network without repeating work.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ral_gym.errors import ConfigError
from ral_gym.grid import CodeGrid
from ral_gym.priors.kv_cache import PackedTransformer

AttentionKind = Literal["math", "fused"]
INIT_STD = 0.02
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


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn the neighbouring pairs of heads (..., h) by angles whose cosine and sine (..., h / 2) are given."""
    even, odd = x[..., 0::2], x[..., 1::2]  # (..., h/2)
    return torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], -1).flatten(-2)  # (..., h)


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


class SelfAttention(nn.Module):
    """The projections of an attention layer; who attends to whom is the caller's."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wqkv = nn.Linear(size, 3 * size, bias=False)
        self.wo = nn.Linear(size, size, bias=False)

    def qkv(self, x: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """X (B, S, C), angles (B or 1, 1, S, h / 2) -> turned queries and keys, values, (B, heads, S, h) each."""
        queries, keys, values = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.wqkv(x).chunk(3, -1)
        )
        return rotate(queries, cosine, sine), rotate(keys, cosine, sine), values

    def output(self, attended: Tensor) -> Tensor:
        """(B, heads, S, h) -> (B, S, C)."""
        return self.wo(attended.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(size, inner, bias=False)
        self.w3 = nn.Linear(size, inner, bias=False)
        self.w2 = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, size: int, heads: int, inner: int) -> None:
        super().__init__()
        self.attention = SelfAttention(size, heads)
        self.feed_forward = FeedForward(size, inner)
        self.attention_norm = RMSNorm(size)
        self.ffn_norm = RMSNorm(size)

    def qkv(self, x: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `SelfAttention.qkv`."""
        return self.attention.qkv(self.attention_norm(x), cosine, sine)

    def finish(self, x: Tensor, attended: Tensor, dropout: float = 0.0) -> Tensor:
        """The rest of the block: x (B, S, C) and what its heads have attended to (B, heads, S, h) -> (B, S, C)."""
        x = x + F.dropout(self.attention.output(attended), dropout)
        return x + F.dropout(self.feed_forward(self.ffn_norm(x)), dropout)


class ClassEmbedding(nn.Module):
    """A vector per class; the last one stands for "no class"."""

    def __init__(self, classes: int, size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, size)

    def forward(self, labels: Tensor) -> Tensor:
        """(B,) int64 -> (B, C)."""
        return self.embedding_table(labels)


class Transformer(nn.Module):
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

    levels = 1
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
        super().__init__()
        self.codebook_size, self.height, self.width = codebook_size, height, width
        self.hidden_units, self.attention_heads, self.dropout = hidden_units, attention_heads, dropout
        self.multiple_of, self.classes, self.class_dropout = multiple_of, classes, class_dropout
        self.attention = attention
        self._check_config(layers)
        inner = -(-int(8 * hidden_units / 3) // multiple_of) * multiple_of
        self.cls_embedding = ClassEmbedding(classes, hidden_units)
        self.tok_embeddings = nn.Embedding(codebook_size, hidden_units)
        self.layers = nn.ModuleList(Block(hidden_units, attention_heads, inner) for _ in range(layers))
        self.norm = RMSNorm(hidden_units)
        self.output = nn.Linear(hidden_units, codebook_size, bias=False)
        cosine, sine = rotary_table(height, width, hidden_units // attention_heads)
        self.register_buffer("cosine", cosine.to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("sine", sine.to(torch.get_default_dtype()), persistent=False)
        self.reset_parameters()

    def _check_config(self, layers: int) -> None:
        counts = {"hidden_units": self.hidden_units, "layers": layers, "attention_heads": self.attention_heads}
        counts |= {"codebook_size": self.codebook_size, "height": self.height, "width": self.width}
        for name, value in {**counts, "multiple_of": self.multiple_of}.items():
            if value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        if self.classes < 0:
            raise ConfigError(f"classes={self.classes} must be 0 (none) or more")
        if self.hidden_units % (4 * self.attention_heads):
            raise ConfigError(
                f"hidden_units={self.hidden_units} does not fit attention_heads={self.attention_heads}: give a "
                f"multiple of {4 * self.attention_heads}, since rotary positions turn pairs by row and by column"
            )
        for name, share in (("dropout", self.dropout), ("class_dropout", self.class_dropout)):
            if not 0 <= share < 1:
                raise ConfigError(f"{name}={share} must be from 0 to below 1")
        if self.attention not in ("math", "fused"):
            raise ConfigError(f"attention={self.attention!r} is unknown: choose math or fused")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """N(0, 0.02) everywhere; the output layer is zero, so that an untrained network draws uniformly."""
        for name, weight in self.named_parameters():
            if not name.endswith("norm.weight"):
                nn.init.normal_(weight, std=INIT_STD)
        nn.init.zeros_(self.output.weight)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments; `Transformer(**config)` builds the same network."""
        names = ["codebook_size", "height", "width", "hidden_units", "attention_heads", "dropout", "multiple_of"]
        names += ["classes", "class_dropout", "attention"]
        return {**{name: getattr(self, name) for name in names}, "layers": len(self.layers)}

    @property
    def grid(self) -> CodeGrid:
        """The shape of the codes."""
        return CodeGrid(self.height, self.width, self.codebook_size)

    def split(self, sequence: Tensor) -> tuple[Tensor, Tensor | None]:
        """Sequences (B, T' + 1) -> codes (B, T') and labels (B, 1), 0..N; without classes: the codes and None.

        Raises:
            ConfigError: there are classes, and a last entry is no label.
        """
        if not self.classes:
            return sequence, None
        labels = sequence[:, -1:] - (self.codebook_size + 2)  # (B, 1)
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) <= self.classes:
            first = self.codebook_size + 2
            raise ConfigError(
                f"the last entry of a sequence is its label, {first}..{first + self.classes}: found "
                f"{int(labels.min()) + first}..{int(labels.max()) + first}"
            )
        return sequence[:, :-1], labels

    def features(self, codes: Tensor, condition: Tensor | None = None) -> Tensor:
        """The last block's output, normalised.

        Args:
            codes: (B, T') int64 with T' = r W for some 1 <= r <= H, each 0 or more; K and more read as K - 1. With
                classes and without `condition`: sequences (B, T' + 1), see `split`.
            condition: (B, 1) int64, labels 0..N; N is "no class".

        Returns:
            (B, T', C); position t has seen the label and codes[:, :t] only.

        Raises:
            ConfigError: T' is not a whole number of rows, or more rows than the grid has; or an entry is no label.
        """
        if condition is None:
            codes, condition = self.split(codes)
        batch, length = codes.shape
        if length % self.width or not 0 < length <= self.height * self.width:
            raise ConfigError(
                f"a grid of {length} codes does not fit the transformer: pass whole rows, a multiple of {self.width} "
                f"from {self.width} to {self.height * self.width}"
            )
        dropout = self.dropout if self.training else 0.0
        x = F.dropout(self.embed(codes[:, :-1], self._labels(condition, batch)), dropout)  # (B, T', C)
        cosine, sine = self.cosine[:length], self.sine[:length]  # (T', h / 2)
        for layer in self.layers:
            queries, keys, values = layer.qkv(x, cosine, sine)  # type: ignore[operator]
            x = layer.finish(x, self._attend(queries, keys, values), dropout)  # type: ignore[operator]
        return self.norm(x)

    def _labels(self, condition: Tensor | None, batch: int) -> Tensor:
        """Labels (B,), with a share of them dropped in training mode; the start token's without classes."""
        if condition is None:
            return torch.full((batch,), self.classes, dtype=torch.int64, device=self.cosine.device)
        labels = condition[:, 0]
        if self.training and self.class_dropout:
            dropped = torch.rand(batch, device=labels.device) < self.class_dropout
            labels = labels.masked_fill(dropped, self.classes)
        return labels

    def embed(self, codes: Tensor, labels: Tensor) -> Tensor:
        """The input of codes (B, S) behind their label (B,): (B, 1 + S, C)."""
        start = self.cls_embedding(labels)[:, None]  # (B, 1, C)
        return torch.cat([start, self.tok_embeddings(codes.clamp(max=self.codebook_size - 1))], 1)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Causal attention, (B, heads, S, h) each."""
        if self.attention == "fused":
            return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        slots = queries.shape[2]
        future = torch.ones(slots, slots, dtype=torch.bool, device=queries.device).triu(1)
        scores = queries @ keys.mT * queries.shape[-1] ** -0.5  # (B, heads, S, S)
        return scores.masked_fill(future, -torch.inf).softmax(-1) @ values

    def logits(self, features: Tensor, position: Tensor | None = None) -> Tensor:
        """Features (..., C) of `features` to logits (..., K); where they come from does not matter."""
        return self.output(features)

    def forward(self, codes: Tensor, condition: Tensor | None = None) -> Tensor:
        """Logits (B, T', K) of every code given those before it; see `features` for the arguments."""
        return self.logits(self.features(codes, condition))

    def pack(self) -> PackedTransformer:
        """What `ral_gym.priors.sampler.CachedSampler` draws with."""
        return PackedTransformer(self)
