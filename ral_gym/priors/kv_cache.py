"""What sampling from a causal transformer keeps: the keys and values of every slot so far.

Slot 0 is the class token, slot 1 + t is code t. The features of code t come out of slot t, which reads the label for
t = 0 and code t - 1 else: a step runs one slot through all blocks, writes its key and value, and attends to the slots
up to its own. Slots behind a row's own may hold anything: they are not attended to, and written before they are.

Shapes: B batch rows, L blocks, C units, N heads of size h, T slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ral_gym.errors import ConfigError
from ral_gym.priors.cuda_graphs import CudaGraphs
from ral_gym.priors.transfer import indices_on, on_device

FEWEST_SLOTS = 64
"""Slots that a recorded step attends to, at least; twice as many whenever they are full: few graphs, little waste."""

Transformer = Any
"""`ral_gym.priors.causal.CausalTransformer`, which imports this file."""


class PackedTransformer:
    """The live weights of a transformer: a product per weight and step, so there is nothing to prepare.

    Args:
        prior: the network.
    """

    def __init__(self, prior: Transformer) -> None:
        self.prior = prior

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.prior.output.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Their type."""
        return self.prior.output.weight.dtype

    def refresh(self) -> None:
        """The weights are the live ones; a cache that was filled before holds what the old ones gave."""

    def make_cache(self, batch: int) -> KVCache:
        """A cache for B batch rows."""
        return KVCache(self.prior, batch)


class KVCache:
    """Keys and values of a batch whose images each stand at some position of their grid.

    Dropout is never applied, whatever the network's mode.

    Args:
        prior: the network; its weights are read live.
        batch: B.

    Attributes:
        use_cuda_graphs: on a CUDA device, replay `step` and `step_at` as CUDA graphs, recorded at their third call.
        features: (B, C), written by `step` and `step_at`.
        logits: (B, K), written by `step` and `step_at`.
    """

    @torch.inference_mode(False)
    def __init__(self, prior: Transformer, batch: int) -> None:
        self.prior, self.batch, self.use_cuda_graphs = prior, batch, False
        like = prior.output.weight.detach()
        slots, heads = prior.height * prior.width, prior.attention_heads
        shape = (len(prior.layers), batch, heads, slots, prior.hidden_units // heads)
        self._keys, self._values = like.new_zeros(shape), like.new_zeros(shape)  # (L, B, N, T, h)
        self._codes = torch.zeros(batch, slots, dtype=torch.int64, device=like.device)
        self._labels = torch.full((batch,), max(0, prior.largest_label), dtype=torch.int64, device=like.device)
        self._rows = torch.arange(batch, device=like.device)
        self._slots = torch.arange(slots, device=like.device)
        self._at = torch.zeros(batch, dtype=torch.int64, device=like.device)  # each row's slot, for recorded steps
        self._graphs, self._recorded = CudaGraphs(like.device), self._addresses()
        self._nothing = like.new_zeros(1, 1, 1)
        # Turning a pair is a complex product; there are none in half precision.
        turns = prior.turns(slice(0, slots)) if like.dtype in (torch.float32, torch.float64) else None
        self._turns = None if turns is None else torch.complex(*turns)  # (T, h / 2)
        self.features = like.new_zeros(batch, prior.hidden_units)
        self.logits = like.new_zeros(batch, prior.codebook_size)

    @property
    def nbytes(self) -> int:
        """Memory of the cache's own tensors, without the weights."""
        return sum(x.untyped_storage().nbytes() for x in vars(self).values() if isinstance(x, Tensor))

    def fill(self, rows: Tensor | slice, codes: Tensor, positions: np.ndarray, condition: Tensor | None = None) -> None:
        """Run the slots before each position, for some batch rows or all, in one pass up to the last of them.

        Args:
            rows: (n,) int64 or slice(None), batch rows.
            codes: (n, T') int64; those from each position on are not read.
            positions: (n,) int64 on the host, 0..T'.
            condition: (n, 1) int64, labels, for a network with classes.
        """
        if self.use_cuda_graphs and self._recorded != self._addresses():
            self._graphs, self._recorded = CudaGraphs(self._codes.device), self._addresses()
        given = on_device(positions, codes.device)[:, None] > self._slots[: codes.shape[1]]  # (n, T')
        codes = codes.clamp(max=self.prior.codebook_size - 1).masked_fill(~given, 0)
        self._codes[rows, : codes.shape[1]] = codes
        labels = self._unlabelled(len(codes)) if condition is None else condition[:, 0]
        self._labels[rows] = labels
        # The slot of a position is the step's to run, so that the last one here is that of the position before.
        count = min(int(positions.max()), codes.shape[1])
        if count == 0:
            return
        x = self.prior.embed(codes[:, : count - 1], labels)  # (n, count, C)
        turn = self.prior.turns(slice(0, count))
        for layer, block in enumerate(self.prior.layers):
            queries, keys, values = block.qkv(x, turn)
            self._keys[layer, rows, :, :count] = keys
            self._values[layer, rows, :, :count] = values
            if layer + 1 < len(self.prior.layers):
                x = block.finish(x, self.prior.attend(queries, keys, values))

    def _addresses(self) -> tuple[int, ...]:
        """Where the weights lie, which recorded steps read: a module that was moved has others."""
        return tuple(x.data_ptr() for x in (*self.prior.parameters(), *self.prior.buffers()))

    def _unlabelled(self, rows: int) -> Tensor:
        """The labels (n,) of rows that were given none: the start token, or "no class"."""
        if self.prior.classes and not self.prior.null_class:
            raise ConfigError(
                f"this {type(self.prior).__name__} draws images of a class, and has no row for no class: pass "
                f"sequences whose last entry is a label, one of {self.prior.classes} classes"
            )
        return self._labels.new_full((rows,), self.prior.classes)

    def step(self, row: int, column: int) -> None:
        """Features and logits of all batch rows at one position."""
        slot = row * self.prior.width + column
        if self.use_cuda_graphs:
            self._at.fill_(slot)
            self._replay(slot)
            return
        x = self.prior.embed_at(self._codes[:, slot - 1], self._labels, slot)
        seen = slice(0, slot + 1)

        def write(cache: Tensor, new: Tensor) -> Tensor:
            cache[:, :, slot] = new
            return cache[:, :, seen]

        self._run(x, self.prior.turns(slot) if self._turns is None else self._turns[slot], write, None)

    def step_at(self, grid_rows: np.ndarray, columns: np.ndarray) -> None:
        """Features and logits of the batch rows, each at a position of its own (B,)."""
        slots = on_device(grid_rows * self.prior.width + columns, self._codes.device)  # (B,)
        last = int((grid_rows * self.prior.width + columns).max())
        if self.use_cuda_graphs:
            self._at.copy_(slots)
            self._replay(last)
        else:
            self._step_rows(slots, last + 1)

    def _replay(self, last: int) -> None:
        """Step the rows at the slots `_at`, of which `last` is the last, by a graph that serves many positions."""
        seen = min(len(self._slots), max(FEWEST_SLOTS, 1 << last.bit_length()))
        self._graphs.run(seen, lambda: self._step_rows(self._at, seen))

    def _step_rows(self, slots: Tensor, seen: int) -> None:
        """Features and logits of the batch rows at slots (B,), of the first `seen` at most."""
        before = self._codes[self._rows, (slots - 1).clamp(min=0)]  # (B,)
        x = self.prior.embed_at(before, self._labels, slots)  # (B, C)
        behind = (self._slots[:seen] > slots[:, None])[:, None, None]  # (B, 1, 1, seen)

        def write(cache: Tensor, new: Tensor) -> Tensor:
            cache[self._rows, :, slots] = new
            return cache[:, :, :seen]

        if self._turns is not None:
            turn: Any = self._turns[slots][:, None, None]  # (B, 1, 1, h / 2)
        else:
            turn = self.prior.turns(slots)
            turn = None if turn is None else tuple(part[:, 0] for part in turn)  # (B, 1, h / 2) each
        self._run(x, turn, write, behind)

    def _run(
        self,
        x: Tensor,
        turn: Any,
        write: Callable[[Tensor, Tensor], Tensor],
        behind: Tensor | None,
    ) -> None:
        """One slot through all blocks.

        Args:
            x: its input (B, C).
            turn: see `SelfAttention.one_slot`.
            write: enters keys or values (B, N, h) into a layer's cache (B, N, T, h), and returns those to attend to.
            behind: (B, 1, 1, S) bool, of these the slots that a row must not see; None: it sees all.
        """
        scale = (self.prior.hidden_units // self.prior.attention_heads) ** -0.5
        for layer, block in enumerate(self.prior.layers):
            queries, new_keys, new_values = block.attention.one_slot(block.attention_norm(x), turn)  # (B, N, h)
            keys = write(self._keys[layer], new_keys).flatten(0, 1)  # (B N, S, h), a view
            values = write(self._values[layer], new_values).flatten(0, 1)
            queries = queries.reshape(len(keys), 1, -1)  # (B N, 1, h)
            scores = torch.baddbmm(self._nothing, queries, keys.mT, beta=0, alpha=scale)  # (B N, 1, S)
            if behind is not None:
                scores = scores.view(self.batch, -1, *scores.shape[1:]).masked_fill(behind, -torch.inf).flatten(0, 1)
            x = block.rest(x, torch.bmm(scores.softmax(-1), values).view(self.batch, -1))  # (B, C)
        self.features.copy_(self.prior.norm(x))
        self.logits.copy_(self.prior.logits(self.features))

    def put(self, codes: Tensor, row: int, column: int) -> None:
        """Enter the codes (B,) of all batch rows at one position."""
        self._codes[:, row * self.prior.width + column] = codes

    def put_at(self, rows: np.ndarray, codes: Tensor, grid_rows: np.ndarray, columns: np.ndarray) -> None:
        """Enter the codes (n,) of some batch rows (n,), each at a position of its own."""
        at, slots = indices_on(codes.device, rows, grid_rows * self.prior.width + columns)
        self._codes[at, slots] = codes

    def next_row(self, row: int) -> None:
        """Nothing is kept per grid row."""

    def next_row_of(self, rows: np.ndarray, grid_rows: np.ndarray) -> None:
        """Nothing is kept per grid row."""
