"""The PixelCNN's sampling cache: activations of both stacks, keys and values of the attention, the condition.

`ral_gym.priors.sampler` uses this file and decides when each part runs. Once per grid row `SamplingCache.next_row` runs
the vertical stack for all columns at once; once per code `SamplingCache.step` runs the horizontal stack, its attention
and the output stack for one column. Both use few, large operations on buffers that are never reallocated: at a batch of
16, most of the time per code goes into reading weights and launching operations.

What a condition adds to the vertical stack is not cached: at 64 x 64 and 16 blocks that would be gigabytes. Only its
features are, at their own resolution, and each grid row computes its share from them.

Shapes: B batch rows, L blocks, C channels of the stacks, R channels inside a block, k side of the kernels, p = k // 2;
A attention layers of h heads with d = C / h channels. The grid has f times the rows and columns of its condition.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ral_gym.priors.attention import attend
from ral_gym.priors.condition import upsample
from ral_gym.priors.cuda_graphs import CudaGraphs
from ral_gym.priors.layers import gate
from ral_gym.priors.packed_weights import PackedWeights
from ral_gym.priors.transfer import indices_on, on_device


class SamplingCache:
    """The activations of a batch of images, each of which may be at a different position of its grid.

    The caller keeps track of positions. Before `step` can run at a column, `fill` or `next_row` must have prepared the
    grid row, and `step` and `put` must have run at the columns before.

    Args:
        weights: packed weights; refreshing them needs no new cache, only a new `fill`.
        batch: B.

    Attributes:
        use_cuda_graphs: on a CUDA device, replay `step` and `next_row` as CUDA graphs, recorded at their third call.
        features: (B, C), written by `step`.
        logits: (B, K), written by `step`.
    """

    @torch.inference_mode(False)
    def __init__(self, weights: PackedWeights, batch: int):
        prior, like = weights.prior, weights.to_logits
        reach, width, layers = prior.conv_filter_size // 2, prior.width, prior.layers
        channels, inner = prior.hidden_units, prior.residual_units
        padded = width + 2 * reach
        self.weights, self.batch, self.use_cuda_graphs = weights, batch, False
        self.width, self.reach, self.side = width, reach, prior.conv_filter_size
        self._nothing = prior.codebook_size
        self._graphs = CudaGraphs(like.device)

        shape = (batch, prior.height + reach, padded)
        self._tokens = torch.full(shape, self._nothing, dtype=torch.int64, device=like.device)
        # Rows of the vertical table for the token at each tap, and of the horizontal one, farthest code first.
        taps = torch.arange(reach * self.side, device=like.device)
        self._vertical_offsets = taps * (self._nothing + 1)
        self._horizontal_offsets = torch.arange(reach, device=like.device).flip(0)
        # Inputs of the vertical stack's blocks in the last p + 1 grid rows.
        self._above = like.new_zeros(layers, batch, reach + 1, width, channels)
        # What the vertical stack adds to the horizontal pre-activations in the current grid row.
        self._terms = like.new_zeros(layers, batch, width, 2 * inner)
        # Inputs of the horizontal stack's blocks in the current grid row. Those of the first block are running sums
        # over the codes drawn so far; the extra columns on the right catch what reaches beyond the row.
        self._line = like.new_zeros(layers, batch, padded, channels)
        # The same at one column, gathered, for batch rows at different columns.
        self._mixed_terms = like.new_empty(layers, batch, 2 * inner)
        self._mixed_line = like.new_empty(layers, batch, reach + 1, channels)
        # Keys and values of the attention: the start token's, then those of every position. `step` writes the part that
        # comes from a position's activations, `put` adds the part that comes from its code.
        positions = prior.height * width
        number, heads, size = weights.memory_start.shape
        self._memory = like.new_zeros(number, batch, heads, positions + 1, size)  # (A, B, h, H W + 1, 2 d)
        self._slots = torch.arange(positions, device=like.device)
        self._at = torch.zeros(batch, dtype=torch.int64, device=like.device)  # positions, for rows at different ones
        self._rows = torch.arange(batch, device=like.device)
        self._reaches = torch.arange(reach + 1, device=like.device)
        self._condition: Tensor | None = None
        if weights.conditioning is not None:
            height, columns = weights.conditioning.height, weights.conditioning.width
            self._condition = like.new_zeros(batch, height, columns, channels)
        self.features = like.new_empty(batch, channels)
        self.logits = like.new_empty(batch, prior.codebook_size)
        self._pre = like.new_empty(batch, 2 * inner)
        self._halves = self._pre.chunk(2, dim=1)
        self._gated = like.new_empty(batch, inner)
        self._hidden = like.new_empty(batch, channels)
        self._rectified = like.new_ones(batch, channels + 1)  # the column of ones multiplies the bias
        self._column_views = [
            self._views(self._line[:, :, column : column + reach + 1], self._terms[:, :, column])
            for column in range(width)
        ]
        self._right = [self._line[0, :, x + reach + 1 : x + 2 * reach + 1] for x in range(width)]  # (B, p, C) each
        self._mixed_views = self._views(self._mixed_line, self._mixed_terms)

    @property
    def nbytes(self) -> int:
        """Memory of the cache's own tensors, without the weights."""
        return sum(x.untyped_storage().nbytes() for x in vars(self).values() if isinstance(x, Tensor))

    def _views(self, line: Tensor, terms: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """What a step at one column reads and writes, per block: (window, term, its input, the next one's input)."""
        inputs = line[:, :, -1]  # (L, B, C)
        return list(zip(line.flatten(2), terms, inputs, [*inputs[1:], self.features], strict=True))

    # Filling from a prefix --------------------------------------------------------------------------------------

    def fill(self, rows: Tensor | slice, codes: Tensor, positions: np.ndarray, condition: Tensor | None = None) -> None:
        """Compute what the codes before each position imply, for some batch rows or all.

        The vertical stack runs over the grid rows before the position that can matter, at once; the horizontal one
        over the position's grid row if any of its codes are given, and with attention over all of them; the output
        stack not at all.

        Args:
            rows: (n,) int64 or slice(None), batch rows.
            codes: (n, T) int64 with T = r W; those from each position on are not read.
            positions: (n,) int64 on the host, 0..T.
            condition: (n, T') int64, the codes of the condition, if there is one.
        """
        count, length = codes.shape
        grid_rows = np.minimum(positions, length - 1) // self.width
        last, reach = int(grid_rows.max()), self.reach
        given = torch.arange(length, device=codes.device) < on_device(positions, codes.device)[:, None]
        codes = codes.clamp(max=self._nothing - 1).masked_fill(~given, self._nothing)
        tokens = self._tokens.new_full((count, *self._tokens.shape[1:]), self._nothing)
        tokens[:, reach : reach + length // self.width, reach:-reach] = codes.view(count, -1, self.width)
        self._tokens[rows] = tokens
        guide = None
        if self.weights.conditioning is not None and self._condition is not None:
            if condition is None:  # an image of no class
                condition = codes.new_full((count, 1), self.weights.prior.classes)
            guide = self.weights.conditioning(condition)  # (n, H / f, W / f, C)
            self._condition[rows] = guide
        self._memory[:, :, :, 0][:, rows] = self.weights.memory_start[:, None]
        self._fill_stacks(rows, tokens[:, : reach + last + 1], positions, grid_rows, guide)

    def _fill_stacks(
        self, rows: Tensor | slice, tokens: Tensor, positions: np.ndarray, grid_rows: np.ndarray, guide: Tensor | None
    ) -> None:
        """The two stacks over the grid rows whose tokens (n, p + rows, W + 2 p) are given."""
        weights, reach, layers = self.weights, self.reach, len(self.weights.vertical)
        begun = bool((positions % self.width).any())
        whole = bool(weights.attention_of) and bool(positions.any())  # all grid rows of the horizontal stack are needed
        at = torch.arange(len(tokens), device=tokens.device)
        # The grid rows from grid_row - p to grid_row are those that end with the position's own.
        recent = on_device(grid_rows[:, None] + np.arange(-reach, 1), tokens.device)
        current = recent[:, -1]
        count = tokens.shape[1] - reach
        own = at * count + current if whole else at  # the positions' own grid rows among the lines
        # The first grid row that each block's input is needed in: one block sees p rows further up than the next.
        first = [0 if whole else max(0, int(grid_rows.min()) - reach * (layers - i)) for i in range(layers + 1)]

        def lines(x: Tensor, start: int = 0) -> Tensor:
            """The grid rows that the horizontal stack runs on, of (n, rows, ...) from grid row `start` on."""
            return x.flatten(0, 1) if whole else x[at, current - start]

        v = self._vertical_input(tokens[:, first[0] : -1]) + weights.vertical_base[first[0] : count]  # (n, rows, W, C)
        seen = min(count, reach + 1)
        h = self._horizontal_input(lines(tokens[:, reach:]))  # (m, W, C)
        h = h + (
            weights.horizontal_base[:count].repeat(len(tokens), 1, 1) if whole else weights.horizontal_base[current]
        )
        for layer in range(layers):
            start, stop = first[layer : layer + 2]
            # Above the grid there is nothing; then come the rows from `start` on.
            x = v if start else F.pad(v, (0, 0, 0, 0, reach, 0))  # (n, p + rows, W, C)
            top = start or -reach
            self._above[layer, rows] = x[at[:, None], recent - top]
            pre = weights.convolve(x[:, stop + 1 - seen - top :], layer, seen)  # (n, rows from `stop` on, W, 2 R)
            if guide is not None:
                pre = pre + self._guide_rows(guide, layer, stop, count)
            terms = lines(pre, stop) @ weights.across[layer] + weights.across_bias[layer]  # (m, W, 2 R)
            self._terms[layer, rows] = terms[own]
            if layer + 1 < layers:
                v = v[:, stop - start :] + gate(pre) @ weights.vertical_out[layer]
            if layer == 0 or begun:
                # Columns from the position on are wrong, and written again by `step` before they are read.
                self._line[layer, rows, reach:-reach] = h[own]
            if whole or (begun and layer + 1 < layers):
                h = self._fill_block(layer, h, terms)
            if whole and layer in weights.attention_of:
                number, given = weights.attention_of[layer], tokens[:, reach:, reach:-reach]
                query, memory = self._fill_memory(number, rows, h, given)
                if layer + 1 < layers:  # of the last block, only what later positions attend to is needed
                    h = self._fill_attention(number, h, query, memory)

    def _guide_rows(self, guide: Tensor, layer: int, start: int, stop: int) -> Tensor:
        """What the condition's features (n, H / f, W / f, C) add in grid rows start..stop-1: (n, rows, W, 2 R)."""
        factor = self.width // guide.shape[2]
        above = start // factor
        added = guide[:, above : -(-stop // factor)] @ self.weights.condition[layer]
        return upsample(added, factor)[:, start - above * factor : stop - above * factor]

    def _fill_block(self, layer: int, h: Tensor, terms: Tensor) -> Tensor:
        """A block of the horizontal stack on whole grid rows, (m, W, C) to (m, W, C)."""
        windows = F.pad(h, (0, 0, self.reach, 0)).unfold(1, self.reach + 1, 1).transpose(2, 3)  # (m, W, p + 1, C)
        pre = windows.flatten(2) @ self.weights.horizontal[layer] + terms
        return h + gate(pre) @ self.weights.horizontal_out[layer]

    def _fill_memory(self, number: int, rows: Tensor | slice, h: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions of the first grid rows: h (n rows, W, C), tokens (n, rows, W).

        Returns:
            Queries (n, h, T, d), and keys and values (n, h, T, 2 d).
        """
        weights, heads = self.weights, self._memory.shape[2]
        x, tokens = h.view(len(tokens), -1, h.shape[-1]), tokens.flatten(1)  # (n, T, C), (n, T)
        pre = x @ weights.project[number] + weights.project_base[number][: x.shape[1]]  # (n, T, 3 C)
        pre = pre.unflatten(-1, (heads, -1)).transpose(1, 2)  # (n, h, T, 3 d)
        query, memory = pre.tensor_split([pre.shape[-1] // 3], dim=-1)
        memory = memory + weights.memory_table[number][tokens].transpose(1, 2)  # (n, h, T, 2 d)
        self._memory[number][rows, :, 1 : x.shape[1] + 1] = memory
        return query, memory

    def _fill_attention(self, number: int, h: Tensor, query: Tensor, memory: Tensor) -> Tensor:
        """What an attention layer adds to the activations (n rows, W, C), from `_fill_memory`'s results."""
        weights = self.weights
        start = weights.memory_start[number][:, None].expand(len(memory), -1, -1, -1)  # (n, h, 1, 2 d)
        memory = torch.cat([start, memory[:, :, :-1]], dim=2)
        slots = self._slots[: memory.shape[2]]
        found = attend(query, memory, slots > slots[:, None])  # (n, h, T, d)
        return h + (found.transpose(1, 2).flatten(2) @ weights.attention_out[number]).view_as(h)

    # Once per grid row ------------------------------------------------------------------------------------------

    def next_row(self, row: int) -> None:
        """Run the vertical stack for a grid row of all batch rows; the one before must be complete."""
        self._run(("row", row), lambda: self._next_row(row))

    def _next_row(self, row: int) -> None:
        tokens = self._tokens[:, row : row + self.reach]
        seen = min(row, self.reach) + 1
        guide = None if self._condition is None else self._condition[:, row * self._condition.shape[2] // self.width]
        self._run_row(tokens, self.weights.vertical_base[row], self._above, self._terms, seen, guide)
        self._line[0, :, self.reach : -self.reach] = self.weights.horizontal_base[row]

    def next_row_of(self, rows: np.ndarray, grid_rows: np.ndarray) -> None:
        """Run the vertical stack for grid rows (n,) of some batch rows (n,)."""
        weights, device = self.weights, self._tokens.device
        at, current = indices_on(device, rows, grid_rows)
        tokens = self._tokens[at[:, None], current[:, None] + torch.arange(self.reach, device=device)]
        above, terms = self._above[:, at], self._terms[:, at]
        guide = None
        if self._condition is not None:
            guide = self._condition[at, current * self._condition.shape[2] // self.width]
        self._run_row(tokens, weights.vertical_base[current], above, terms, self.reach + 1, guide)
        self._above[:, at] = above
        self._terms[:, at] = terms
        self._line[0, at, self.reach : -self.reach] = weights.horizontal_base[current]

    def _run_row(
        self, tokens: Tensor, base: Tensor, above: Tensor, terms: Tensor, seen: int, guide: Tensor | None
    ) -> None:
        """One grid row of the vertical stack, from the tokens (n, p, W + 2 p) of those above, `seen` rows at most.

        The condition's features for that row are (n, W / f, C).
        """
        weights, width = self.weights, self.width
        for row in range(self.reach):
            above[:, :, row] = above[:, :, row + 1]
        v = (self._vertical_input(tokens)[:, 0] + base).flatten(0, 1)  # (n W, C)
        for layer in range(len(weights.vertical)):
            above[layer, :, -1] = v.view(-1, width, v.shape[-1])
            pre = weights.convolve(above[layer][:, -seen:], layer, seen).flatten(0, 2)  # (n W, 2 R)
            if guide is not None:
                added = guide @ weights.condition[layer]  # (n, W / f, 2 R)
                pre.view(*added.shape[:2], -1, added.shape[2]).add_(added[:, :, None])
            term = terms[layer].flatten(0, 1)  # (n W, 2 R), a view
            added = weights.across_product(layer, weights.across_bias[layer], pre, term)
            if added is not term:
                term.copy_(added)
            if layer < len(weights.vertical_out):
                v.addmm_(gate(pre), weights.vertical_out[layer])

    def _vertical_input(self, tokens: Tensor) -> Tensor:
        """First layer of the vertical stack, (n, p - 1 + rows, W + 2 p) tokens to (n, rows, W, C), without its bias."""
        windows = tokens.unfold(1, self.reach, 1).unfold(2, self.side, 1)  # (n, rows, W, p, k)
        indices = windows.flatten(3) + self._vertical_offsets  # (n, rows, W, p k)
        x = F.embedding_bag(indices.flatten(0, 2), self.weights.vertical_table.flatten(0, 2), mode="sum")
        return x.view(*indices.shape[:3], -1)

    def _horizontal_input(self, lines: Tensor) -> Tensor:
        """First layer of the horizontal stack, (m, W + 2 p) tokens to (m, W, C), without its bias."""
        # Codes from the position on are "nothing" and add nothing: `put` adds them when they are drawn.
        indices = lines.unfold(1, self.reach, 1)[:, : self.width] * self.reach + self._horizontal_offsets  # (m, W, p)
        h = F.embedding_bag(indices.flatten(0, 1), self.weights.horizontal_table.flatten(0, 1), mode="sum")
        return h.view(-1, self.width, h.shape[-1])

    # Once per code ----------------------------------------------------------------------------------------------

    def step(self, row: int, column: int) -> None:
        """Features and logits of all batch rows at one position."""
        position = row * self.width + column
        if self.use_cuda_graphs:
            # A recorded step serves its column in every grid row, so it reads the position from memory.
            self._at.fill_(position)
        known = None if self.use_cuda_graphs else position
        self._run(("step", column), lambda: self._step(self._column_views[column], known, len(self._slots)))

    def step_at(self, grid_rows: np.ndarray, columns: np.ndarray) -> None:
        """Features and logits of the batch rows, each at a position of its own (B,)."""
        rows = np.arange(self.batch)
        first, positions = rows * self._line.shape[2] + columns, grid_rows * self.width + columns
        first, at, now = indices_on(self._tokens.device, first, rows * self.width + columns, positions)
        windows = (first[:, None] + self._reaches).flatten()  # (B (p + 1),)
        torch.index_select(self._line.flatten(1, 2), 1, windows, out=self._mixed_line.flatten(1, 2))
        torch.index_select(self._terms.flatten(1, 2), 1, at, out=self._mixed_terms)
        self._at.copy_(now)
        slots = len(self._slots) if self.use_cuda_graphs else int(positions.max()) + 1
        self._run(("step", -1), lambda: self._step(self._mixed_views, None, slots))
        self._line.flatten(1, 2).index_copy_(1, first + self.reach, self._mixed_line[:, :, -1])

    def _step(self, views: list[tuple[Tensor, Tensor, Tensor, Tensor]], position: int | None, slots: int) -> None:
        """One code of all batch rows, at one position or (None) at `_at`, where `slots` are enough for all of them."""
        weights, gated, rectified = self.weights, self._gated, self._rectified
        for layer, (window, term, x, y) in enumerate(views):
            pre = weights.horizontal_product(layer, term, window, self._pre)
            torch.sigmoid(pre, out=pre)
            a, b = self._halves if pre is self._pre else pre.chunk(2, dim=1)
            torch.addcmul(b, a, b, value=-2, out=gated)
            torch.addmm(x, gated, weights.horizontal_out[layer], out=y)
            if layer in weights.attention_of:
                self._attend(weights.attention_of[layer], y, position, slots)
        x, relu = self.features, rectified[:, :-1]
        for linear in weights.stack:
            torch.clamp_min(x, 0, out=relu)
            x = torch.addmm(x, rectified, linear, out=self._hidden)
        torch.clamp_min(x, 0, out=relu)
        torch.mm(rectified, weights.to_logits, out=self.logits)

    def _attend(self, number: int, x: Tensor, position: int | None, slots: int) -> None:
        """Add an attention layer's result to the activations (B, C), and their key and value to the memory."""
        weights, memory = self.weights, self._memory[number]  # (B, h, H W + 1, 2 d)
        base = weights.project_base[number]
        base = base[position] if position is not None else base.index_select(0, self._at)
        pre = torch.addmm(base, x, weights.project[number])  # (B, 3 C)
        query, own = pre.view(*memory.shape[:2], 1, -1).tensor_split([memory.shape[-1] // 2], dim=-1)
        if position is not None:
            memory[:, :, position + 1 : position + 2] = own
            memory, later = memory[:, :, : position + 1], None
        else:
            memory[self._rows, :, self._at + 1] = own[:, :, 0]
            later = (self._slots[:slots] > self._at[:, None])[:, None, None]  # (B, 1, 1, slots)
            memory = memory[:, :, :slots]
        found = attend(query, memory, later)  # (B, h, 1, d)
        x.addmm_(found.flatten(1), weights.attention_out[number])

    def put(self, codes: Tensor, row: int, column: int) -> None:
        """Enter the codes (B,) of all batch rows at one position."""
        self._tokens[:, row + self.reach, column + self.reach] = codes
        self._right[column] += self.weights.horizontal_table.index_select(0, codes)
        if self.weights.attention_of:
            self._memory[:, :, :, row * self.width + column + 1] += self.weights.memory_table.index_select(1, codes)

    def put_at(self, rows: np.ndarray, codes: Tensor, grid_rows: np.ndarray, columns: np.ndarray) -> None:
        """Enter the codes (n,) of some batch rows (n,), each at a position of its own."""
        at, row, column = indices_on(codes.device, rows, grid_rows, columns)
        self._tokens[at, row + self.reach, column + self.reach] = codes
        first = at * self._line.shape[2] + column + self.reach + 1
        right = first[:, None] + self._reaches[:-1]  # (n, p)
        table = self.weights.horizontal_table
        self._line[0].flatten(0, 1).index_add_(0, right.flatten(), table[codes].flatten(0, 1))
        if self.weights.attention_of:
            slots = row * self.width + column + 1
            self._memory[:, at, :, slots] += self.weights.memory_table[:, codes].transpose(0, 1)  # (n, A, h, 2 d)

    def _run(self, key: tuple[str, int], work: Callable[[], None]) -> None:
        """Do the work, or replay it as a CUDA graph."""
        if self.use_cuda_graphs:
            self._graphs.run(key, work)
        else:
            work()


class PackedPixelCNN(PackedWeights):
    """Packed weights that make their own cache; returned by `PixelCNN.pack`."""

    def make_cache(self, batch: int) -> SamplingCache:
        """A cache for `batch` images."""
        return SamplingCache(self, batch)
