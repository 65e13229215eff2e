"""What the causal transformers over codes share: blocks, the class token, features, and the sampler's view of them.

The input is [class, c_0 .. c_{T-2}], the output belongs to c_0 .. c_{T-1}. With ``classes=0`` there is one learned
start token and no label. With classes a sequence is T' codes and, at its end, the label as K + 2 + class. A network
with a "no class" row (`null_class`) also takes K + 2 + `classes`, which its training mode puts in the place of a share
of labels. `ral_gym.priors.kv_cache` draws from all of them without repeating work.

A subclass says where a code stands: by turning queries and keys (`turns`), or by adding to the input (`place`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ral_gym.errors import ConfigError
from ral_gym.grid import CodeGrid
from ral_gym.priors.base import split_label
from ral_gym.priors.kv_cache import PackedTransformer
from ral_gym.priors.linear import Linear

AttentionKind = Literal["math", "fused"]
INIT_STD = 0.02
Turn = tuple[Tensor, Tensor] | None
"""Cosine and sine of the angles by which queries and keys turn; None: they do not."""


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn the neighbouring pairs of heads (..., h) by angles whose cosine and sine (..., h / 2) are given."""
    even, odd = x[..., 0::2], x[..., 1::2]  # (..., h/2)
    return torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], -1).flatten(-2)  # (..., h)


class SelfAttention(nn.Module):
    """The projections of an attention layer; who attends to whom is the caller's."""

    def __init__(self, size: int, heads: int, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.wqkv = Linear(size, 3 * size, bias=bias)
        self.wo = Linear(size, size, bias=bias)

    def qkv(self, x: Tensor, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        """X (B, S, C), angles (B or 1, 1, S, h / 2) -> turned queries and keys, values, (B, heads, S, h) each."""
        queries, keys, values = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.wqkv(x).chunk(3, -1)
        )
        return (queries, keys, values) if turn is None else (rotate(queries, *turn), rotate(keys, *turn), values)

    def one_slot(self, x: Tensor, turn: Turn | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `qkv`, of one slot: x (B, C) -> (B, heads, h) each.

        Args:
            x: the slot's input.
            turn: cosine and sine (h / 2) or (B, 1, h / 2); or cosine + i sine (h / 2) or (B, 1, 1, h / 2), complex;
                None.
        """
        parts = self.wqkv(x).unflatten(-1, (3, self.heads, -1))  # (B, 3, heads, h)
        if isinstance(turn, Tensor):  # one product turns queries and keys: a tenth of the operations
            pairs = torch.view_as_complex(parts[:, :2].unflatten(-1, (-1, 2)))  # (B, 2, heads, h / 2)
            queries, keys = torch.view_as_real(pairs * turn).flatten(-2).unbind(1)
            return queries, keys, parts[:, 2]
        queries, keys, values = parts.unbind(1)
        return (queries, keys, values) if turn is None else (rotate(queries, *turn), rotate(keys, *turn), values)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)).

    Args:
        attention: the projections.
        feed_forward: (..., C) -> (..., C).
        norm: makes a norm of (..., C).
    """

    def __init__(self, attention: SelfAttention, feed_forward: nn.Module, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.attention = attention
        self.feed_forward = feed_forward
        self.attention_norm = norm()
        self.ffn_norm = norm()

    def qkv(self, x: Tensor, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        """See `SelfAttention.qkv`."""
        return self.attention.qkv(self.attention_norm(x), turn)

    def finish(self, x: Tensor, attended: Tensor, dropout: float = 0.0) -> Tensor:
        """The rest of the block: x (B, S, C) and what its heads have attended to (B, heads, S, h) -> (B, S, C)."""
        return self.rest(x, attended.transpose(1, 2).flatten(2), dropout)

    def rest(self, x: Tensor, joined: Tensor, dropout: float = 0.0) -> Tensor:
        """As `finish`, of heads side by side: (..., C) each -> (..., C)."""
        x = x + F.dropout(self.attention.wo(joined), dropout)
        return x + F.dropout(self.feed_forward(self.ffn_norm(x)), dropout)


class ClassEmbedding(nn.Module):
    """A vector per class; in a network with `null_class` the last one stands for "no class"."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, size)

    def forward(self, labels: Tensor) -> Tensor:
        """(B,) int64 -> (B, C)."""
        return self.embedding_table(labels)


class CausalTransformer(nn.Module):
    """Base of the causal transformers over an H x W grid of codes in raster order.

    Args:
        codebook_size: K, number of codes.
        height: H, rows of the grid. The network also runs on its first r rows alone, 1 <= r <= H.
        width: W, columns of the grid.
        hidden_units: C, width of the network.
        layers: blocks.
        attention_heads: heads of each.
        dropout: probability on the input and on what a block's two halves add; in training mode only.
        classes: N, labels; 0: none.
        attention: `math` has second-order gradients (TRPO) and holds T^2 scores per head; `fused` is torch's own
            kernel, which has none, for long grids.

    Attributes:
        null_class: whether there is a row for "no class", which classifier-free guidance needs.

    Raises:
        ConfigError: an argument is out of range.
    """

    levels = 1
    null_class = True
    class_dropout = 0.0

    def __init__(
        self,
        codebook_size: int,
        height: int,
        width: int,
        *,
        hidden_units: int,
        layers: int,
        attention_heads: int,
        dropout: float,
        classes: int,
        attention: AttentionKind,
    ) -> None:
        super().__init__()
        self.codebook_size, self.height, self.width = codebook_size, height, width
        self.hidden_units, self.attention_heads, self.dropout = hidden_units, attention_heads, dropout
        self.classes, self.attention = classes, attention
        counts = {"hidden_units": hidden_units, "layers": layers, "attention_heads": attention_heads}
        check_counts(**counts, codebook_size=codebook_size, height=height, width=width)
        if classes < 0:
            raise ConfigError(f"classes={classes} must be 0 (none) or more")
        check_share("dropout", dropout)
        if attention not in ("math", "fused"):
            raise ConfigError(f"attention={attention!r} is unknown: choose math or fused")

    def build(self, layers: int, block: Callable[[], Block], norm: Callable[[], nn.Module]) -> None:
        """Make the modules and their first weights."""
        rows = self.classes + 1 if self.null_class else max(1, self.classes)
        self.cls_embedding = ClassEmbedding(rows, self.hidden_units)
        self.tok_embeddings = nn.Embedding(self.codebook_size, self.hidden_units)
        self.layers = nn.ModuleList(block() for _ in range(layers))
        self.norm = norm()
        self.output = Linear(self.hidden_units, self.codebook_size, bias=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """N(0, 0.02), and 0 for biases; the output layer is zero, so that an untrained network draws uniformly."""
        for name, weight in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(weight)
            elif not name.endswith("norm.weight"):
                nn.init.normal_(weight, std=INIT_STD)
        nn.init.zeros_(self.output.weight)

    def arguments(self, *more: str) -> dict[str, Any]:
        """The constructor's arguments: those of this class, and `more`."""
        names = ["codebook_size", "height", "width", "hidden_units", "attention_heads", "dropout", "classes"]
        return {**{name: getattr(self, name) for name in [*names, *more, "attention"]}, "layers": len(self.layers)}

    @property
    def grid(self) -> CodeGrid:
        """The shape of the codes, and how many classes there are."""
        return CodeGrid(self.height, self.width, self.codebook_size, classes=self.classes)

    @property
    def largest_label(self) -> int:
        """The largest label that a sequence may have: N for "no class", or N - 1."""
        return self.classes if self.null_class else self.classes - 1

    def split(self, sequence: Tensor) -> tuple[Tensor, Tensor | None]:
        """Sequences (B, T' + 1) -> codes (B, T') and labels (B, 1); without classes: the codes and None.

        Raises:
            ConfigError: there are classes, and a last entry is no label.
        """
        if not self.classes:
            return sequence, None
        return split_label(sequence, self.codebook_size, self.largest_label)

    def features(self, codes: Tensor, condition: Tensor | None = None) -> Tensor:
        """The last block's output, normalised.

        Args:
            codes: (B, T') int64 with T' = r W for some 1 <= r <= H, each 0 or more; K and more read as K - 1. With
                classes and without `condition`: sequences (B, T' + 1), see `split`.
            condition: (B, 1) int64, labels 0..N - 1, or N: "no class".

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
        turn = self.turns(slice(0, length))
        for layer in self.layers:
            queries, keys, values = layer.qkv(x, turn)  # type: ignore[operator]
            x = layer.finish(x, self.attend(queries, keys, values), dropout)  # type: ignore[operator]
        return self.norm(x)

    def _labels(self, condition: Tensor | None, batch: int) -> Tensor:
        """Labels (B,), with a share of them dropped in training mode; the start token's without classes."""
        if condition is None:
            return torch.zeros(batch, dtype=torch.int64, device=self.output.weight.device)
        labels = condition[:, 0]
        if self.training and self.class_dropout:
            dropped = torch.rand(batch, device=labels.device) < self.class_dropout
            labels = labels.masked_fill(dropped, self.classes)
        return labels

    def embed(self, codes: Tensor, labels: Tensor) -> Tensor:
        """The input of codes (B, S) behind their label (B,): (B, 1 + S, C)."""
        start = self.cls_embedding(labels)[:, None]  # (B, 1, C)
        x = torch.cat([start, self.tok_embeddings(codes.clamp(max=self.codebook_size - 1))], 1)
        return self.place(x, slice(0, x.shape[1]))

    def embed_at(self, before: Tensor, labels: Tensor, slots: int | Tensor) -> Tensor:
        """The input (B, C) of one slot, the same for all rows or (B,): the label's at 0, else the code's before."""
        if isinstance(slots, int):
            return self.place(self.tok_embeddings(before) if slots else self.cls_embedding(labels), slots)
        x = torch.where((slots == 0)[:, None], self.cls_embedding(labels), self.tok_embeddings(before))
        return self.place(x, slots)

    def place(self, x: Tensor, slots: slice | int | Tensor) -> Tensor:
        """Add to the input of some slots what says where they are; nothing by default."""
        return x

    def turns(self, slots: slice | int | Tensor) -> Turn:
        """The angles of some slots, or of one for each row of a batch; None: nothing turns."""
        return None

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
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


def check_counts(**counts: int) -> None:
    """Raise ConfigError unless all are at least 1."""
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")


def check_share(name: str, share: float) -> None:
    """Raise ConfigError unless it is a probability below 1."""
    if not 0 <= share < 1:
        raise ConfigError(f"{name}={share} must be from 0 to below 1")
