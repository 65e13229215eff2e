"""What the cached sampler keeps: the PixelCNN's weights in its own layout, and the activations of both stacks.

`ral_gym.sampler` is the user of this file and says when each part runs. Once per grid row `SamplingCache.next_row` runs
the vertical stack for all columns at once; once per code `SamplingCache.step` runs the horizontal stack and the output
stack for one column. Both are written for few and large operations on buffers that stay where they are: at a batch of
16 the time of a code goes into reading weights and into starting operations.

Shapes: B batch rows, L blocks, C channels of the stacks, R channels inside a block, k side of the kernels, p = k // 2.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ral_gym.pixelcnn import PixelCNN, gate


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def _can_block(like: Tensor) -> bool:
    """Whether kernels can be kept in oneDNN's own layout.

    `F.conv2d` brings the kernels into that layout at every call, a quarter of its time on one row of 16 grids. These
    operators, which torch.compile uses, are not public: without them `F.conv2d` does the same.
    """
    names = ("_reorder_convolution_weight", "_convolution_pointwise")
    operators = all(hasattr(torch.ops.mkldnn, name) for name in names)
    return (
        like.device.type == "cpu" and like.dtype == torch.float32 and torch.backends.mkldnn.is_available() and operators
    )


class PackedWeights:
    """The PixelCNN's weights as the sampler's matrix products want them: (inputs, outputs), taps side by side.

    Args:
        prior: the network; `refresh` copies its weights again, to the same addresses.
    """

    @torch.inference_mode(False)  # buffers made inside inference mode could not be written outside of it
    def __init__(self, prior: PixelCNN):
        blocks, stack = prior.blocks, prior.output
        like = prior.input.embedding.weight.detach()
        reach, side = prior.conv_filter_size // 2, prior.conv_filter_size
        channels, inner = prior.hidden_units, prior.residual_units
        tokens = prior.codebook_size + 1  # token K stands for "nothing here" and adds nothing

        self.prior = prior
        # The first layer of a code at each tap, convolved beforehand: sums of table rows replace its convolutions.
        self.vertical_table = like.new_zeros(reach, side, tokens, channels)
        self.horizontal_table = like.new_zeros(tokens, reach, channels)  # [code, d]: what it adds d + 1 columns on
        self.vertical_base = like.new_zeros(prior.height, prior.width, channels)
        self.horizontal_base = like.new_zeros(prior.height, prior.width, channels)
        kernels = [like.new_empty(2 * inner, reach + 1, side, channels) for _ in blocks]
        self.vertical = [kernel.permute(0, 3, 1, 2) for kernel in kernels]  # channels last in memory
        self.vertical_bias = [like.new_empty(2 * inner) for _ in blocks]
        self.vertical_out = [like.new_empty(inner, channels) for _ in blocks[:-1]]
        self.across = [like.new_empty(2 * inner, 2 * inner) for _ in blocks]
        self.across_bias = [like.new_empty(2 * inner) for _ in blocks]
        self.horizontal = [like.new_empty((reach + 1) * channels, 2 * inner) for _ in blocks]
        self.horizontal_out = [like.new_empty(inner, channels) for _ in blocks]
        self.stack = [like.new_empty(channels + 1, channels) for _ in stack.layers]  # the bias is the last row
        self.to_logits = like.new_empty(channels + 1, prior.codebook_size)
        self._blocked: list[Tensor] | None = [] if _can_block(like) else None
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the weights of the prior."""
        first, stack = self.prior.input, self.prior.output
        embedding = first.embedding.weight  # (K, C)
        self.vertical_table[:, :, :-1] = torch.einsum("kc,oc...->...ko", embedding, first.vertical.weight)
        taps = first.horizontal.weight[:, :, 0].flip(-1)  # the last tap is the nearest code
        self.horizontal_table[:-1] = torch.einsum("kc,oct->kto", embedding, taps)
        for base, conv in ((self.vertical_base, first.vertical), (self.horizontal_base, first.horizontal)):
            base.copy_(_bias(conv))
            if first.position is not None:
                base += first.position.permute(1, 2, 0)  # (H, W, C)
        for layer, block in enumerate(self.prior.blocks):
            self.vertical[layer].copy_(block.vertical.weight)
            self.vertical_bias[layer].copy_(_bias(block.vertical))
            if block.vertical_out is not None:
                self.vertical_out[layer].copy_(block.vertical_out.weight.t())
            self.across[layer].copy_(block.vertical_to_horizontal.weight.t())
            self.across_bias[layer].copy_(block.vertical_to_horizontal.bias)
            self.horizontal[layer].copy_(block.horizontal.weight[:, :, 0].permute(2, 1, 0).flatten(0, 1))
            self.horizontal_out[layer].copy_(block.horizontal_out.weight.t())
        for packed, linear in zip([*self.stack, self.to_logits], [*stack.layers, stack.to_logits], strict=True):
            packed[:-1].copy_(linear.weight.t())
            packed[-1].copy_(linear.bias)
        if self._blocked is not None:
            padding = [0, self.prior.conv_filter_size // 2]
            self._blocked = [torch.ops.mkldnn._reorder_convolution_weight(x, padding) for x in self.vertical]

    def convolve(self, x: Tensor, layer: int, seen: int) -> Tensor:
        """A block's vertical convolution, whose last `seen` kernel rows lie on the grid: (n, rows + seen - 1, W, C).

        Returns:
            (n, rows, W, 2 R).
        """
        weight, bias = self.vertical[layer], self.vertical_bias[layer]
        padding, x = [0, weight.shape[3] // 2], x.permute(0, 3, 1, 2)
        if self._blocked is not None and seen == weight.shape[2]:
            packed = self._blocked[layer]
            pre = torch.ops.mkldnn._convolution_pointwise(x, packed, bias, padding, [1, 1], [1, 1], 1, "none", [], "")
        else:
            pre = F.conv2d(x, weight[:, :, -seen:], bias, padding=padding)
        return pre.permute(0, 2, 3, 1)


class SamplingCache:
    """The activations of a batch whose images each stand at some position of their grid.

    Positions are the caller's business. Before `step` can run at a column, `fill` or `next_row` must have prepared the
    grid row, and `step` and `put` must have run at the columns before.

    Args:
        weights: packed weights; refreshing them needs no new cache, only a new `fill`.
        batch: B.

    Attributes:
        use_cuda_graphs: replay `step` and `next_row` as CUDA graphs, recorded at their first call.
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
        self._graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}

        shape = (batch, prior.height + reach, padded)
        self._tokens = torch.full(shape, self._nothing, dtype=torch.int64, device=like.device)
        # Rows of the vertical table for the token at each tap, and of the horizontal one, farthest code first.
        taps = torch.arange(reach * self.side, device=like.device)
        self._vertical_offsets = taps * (self._nothing + 1)
        self._horizontal_offsets = torch.arange(reach, device=like.device).flip(0)
        # Inputs of the vertical stack's blocks in the last p + 1 grid rows.
        self._above = like.new_zeros(layers, batch, reach + 1, width, channels)
        # What the vertical stack adds to the horizontal pre-activations in the current grid row.
        self._terms = like.new_empty(layers, batch, width, 2 * inner)
        # Inputs of the horizontal stack's blocks in the current grid row. Those of the first block are running sums
        # over the codes drawn so far; the columns on the right take what reaches beyond the row.
        self._line = like.new_zeros(layers, batch, padded, channels)
        # The same at one column, gathered, for batch rows that stand at different ones.
        self._mixed_terms = like.new_empty(layers, batch, 2 * inner)
        self._mixed_line = like.new_empty(layers, batch, reach + 1, channels)
        self.features = like.new_empty(batch, channels)
        self.logits = like.new_empty(batch, prior.codebook_size)
        self._pre = like.new_empty(batch, 2 * inner)
        self._gated = like.new_empty(batch, inner)
        self._hidden = like.new_empty(batch, channels)
        self._rectified = like.new_ones(batch, channels + 1)  # the column of ones meets the bias
        columns = range(width)
        self._column_views = [
            self._views(self._line[:, :, column : column + reach + 1], self._terms[:, :, column]) for column in columns
        ]
        self._right = [self._line[0, :, column + reach + 1 : column + 2 * reach + 1] for column in columns]  # (B, p, C)
        self._mixed_views = self._views(self._mixed_line, self._mixed_terms)

    def _views(self, line: Tensor, terms: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """What a step at one column reads and writes, per block: (window, term, its input, the next one's input)."""
        inputs = line[:, :, -1]  # (L, B, C)
        return list(zip(line.flatten(2), terms, inputs, [*inputs[1:], self.features], strict=True))

    # Filling from a prefix --------------------------------------------------------------------------------------

    def fill(self, rows: Tensor | slice, codes: Tensor, positions: np.ndarray) -> None:
        """Compute what the codes before each position imply, for some batch rows or all.

        The vertical stack runs over all grid rows before the position at once, the horizontal one over the position's
        grid row if any of its codes are given, the output stack not at all.

        Args:
            rows: (n,) int64 or slice(None), batch rows.
            codes: (n, T) int64 with T = r W; those from each position on are not read.
            positions: (n,) int64 on the host, 0..T.
        """
        count, length = codes.shape
        grid_rows = np.minimum(positions, length - 1) // self.width
        last, reach = int(grid_rows.max()), self.reach
        given = torch.arange(length, device=codes.device) < torch.as_tensor(positions, device=codes.device)[:, None]
        codes = codes.clamp(max=self._nothing - 1).masked_fill(~given, self._nothing)
        tokens = self._tokens.new_full((count, *self._tokens.shape[1:]), self._nothing)
        tokens[:, reach : reach + length // self.width, reach:-reach] = codes.view(count, -1, self.width)
        self._tokens[rows] = tokens
        self._fill_vertical(rows, tokens[:, : last + reach], grid_rows)
        self._fill_horizontal(rows, tokens, grid_rows, bool((positions % self.width).any()))

    def _fill_vertical(self, rows: Tensor | slice, tokens: Tensor, grid_rows: np.ndarray) -> None:
        weights, reach = self.weights, self.reach
        v = self._vertical_input(tokens)  # (n, rows, W, C)
        v += weights.vertical_base[: v.shape[1]]
        batch = np.arange(len(grid_rows))
        # The padded grid rows from grid_row to grid_row + p are those that end with the position's own.
        recent = torch.as_tensor(grid_rows[:, None] + np.arange(reach + 1), device=v.device)
        at = torch.as_tensor(batch, device=v.device)
        current = recent[:, 0]
        seen = min(v.shape[1], reach + 1)
        for layer in range(len(weights.vertical)):
            x = F.pad(v, (0, 0, 0, 0, reach, 0))  # (n, p + rows, W, C)
            self._above[layer, rows] = x[at[:, None], recent]
            pre = weights.convolve(x[:, reach + 1 - seen :], layer, seen)  # (n, rows, W, 2 R)
            self._terms[layer, rows] = pre[at, current] @ weights.across[layer] + weights.across_bias[layer]
            if layer < len(weights.vertical_out):
                v = v + gate(pre) @ weights.vertical_out[layer]

    def _fill_horizontal(self, rows: Tensor | slice, tokens: Tensor, grid_rows: np.ndarray, begun: bool) -> None:
        weights, reach, width = self.weights, self.reach, self.width
        current = torch.as_tensor(grid_rows, device=tokens.device)
        line = tokens[torch.arange(len(tokens), device=tokens.device), current + reach]  # (n, W + 2 p)
        # Codes from the position on are "nothing" and add nothing: `put` adds them when they are drawn.
        indices = line.unfold(1, reach, 1)[:, :width] * reach + self._horizontal_offsets  # (n, W, p)
        h = F.embedding_bag(indices.flatten(0, 1), weights.horizontal_table.flatten(0, 1), mode="sum")
        h = h.view(-1, width, h.shape[-1]) + weights.horizontal_base[current]  # (n, W, C)
        self._line[0, rows, reach:-reach] = h
        for layer in range(len(weights.horizontal) - 1 if begun else 0):
            window = F.pad(h, (0, 0, reach, 0)).unfold(1, reach + 1, 1).transpose(2, 3)  # (n, W, p + 1, C)
            pre = window.flatten(2) @ weights.horizontal[layer] + self._terms[layer, rows]
            h = h + gate(pre) @ weights.horizontal_out[layer]
            # Columns from the position on are wrong, and written again by `step` before they are read.
            self._line[layer + 1, rows, reach:-reach] = h

    # Once per grid row ------------------------------------------------------------------------------------------

    def next_row(self, row: int) -> None:
        """Run the vertical stack for a grid row of all batch rows; the one before must be complete."""
        self._run(("row", row), lambda: self._next_row(row))

    def _next_row(self, row: int) -> None:
        tokens = self._tokens[:, row : row + self.reach]
        seen = min(row, self.reach) + 1
        self._run_row(tokens, self.weights.vertical_base[row], self._above, self._terms, seen)
        self._line[0, :, self.reach : -self.reach] = self.weights.horizontal_base[row]

    def next_row_of(self, rows: np.ndarray, grid_rows: np.ndarray) -> None:
        """Run the vertical stack for grid rows (n,) of some batch rows (n,)."""
        weights, device = self.weights, self._tokens.device
        at, current = torch.as_tensor(rows, device=device), torch.as_tensor(grid_rows, device=device)
        tokens = self._tokens[at[:, None], current[:, None] + torch.arange(self.reach, device=device)]
        above, terms = self._above[:, at], self._terms[:, at]
        self._run_row(tokens, weights.vertical_base[current], above, terms, self.reach + 1)
        self._above[:, at] = above
        self._terms[:, at] = terms
        self._line[0, at, self.reach : -self.reach] = weights.horizontal_base[current]

    def _run_row(self, tokens: Tensor, base: Tensor, above: Tensor, terms: Tensor, seen: int) -> None:
        """One grid row of the vertical stack, from the tokens (n, p, W + 2 p) of those above, `seen` rows at most."""
        weights, width = self.weights, self.width
        for row in range(self.reach):
            above[:, :, row] = above[:, :, row + 1]
        v = (self._vertical_input(tokens)[:, 0] + base).flatten(0, 1)  # (n W, C)
        for layer in range(len(weights.vertical)):
            above[layer, :, -1] = v.view(-1, width, v.shape[-1])
            pre = weights.convolve(above[layer][:, -seen:], layer, seen).flatten(0, 2)  # (n W, 2 R)
            torch.addmm(weights.across_bias[layer], pre, weights.across[layer], out=terms[layer].flatten(0, 1))
            if layer < len(weights.vertical_out):
                v.addmm_(gate(pre), weights.vertical_out[layer])

    def _vertical_input(self, tokens: Tensor) -> Tensor:
        """First layer of the vertical stack, (n, p - 1 + rows, W + 2 p) tokens to (n, rows, W, C), without its bias."""
        windows = tokens.unfold(1, self.reach, 1).unfold(2, self.side, 1)  # (n, rows, W, p, k)
        indices = windows.flatten(3) + self._vertical_offsets  # (n, rows, W, p k)
        x = F.embedding_bag(indices.flatten(0, 2), self.weights.vertical_table.flatten(0, 2), mode="sum")
        return x.view(*indices.shape[:3], -1)

    # Once per code ----------------------------------------------------------------------------------------------

    def step(self, column: int) -> None:
        """Features and logits of all batch rows at a column of their grid row."""
        self._run(("step", column), lambda: self._step(self._column_views[column]))

    def step_at(self, columns: np.ndarray) -> None:
        """Features and logits of the batch rows, each at a column of its own (B,)."""
        first = np.arange(self.batch) * self._line.shape[2] + columns
        windows = torch.as_tensor(first[:, None] + np.arange(self.reach + 1), device=self._tokens.device).flatten()
        torch.index_select(self._line.flatten(1, 2), 1, windows, out=self._mixed_line.flatten(1, 2))
        at = torch.as_tensor(np.arange(self.batch) * self.width + columns, device=self._tokens.device)
        torch.index_select(self._terms.flatten(1, 2), 1, at, out=self._mixed_terms)
        self._run(("step", -1), lambda: self._step(self._mixed_views))
        own = torch.as_tensor(first + self.reach, device=self._tokens.device)
        self._line.flatten(1, 2).index_copy_(1, own, self._mixed_line[:, :, -1])

    def _step(self, views: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> None:
        weights, pre, gated, rectified = self.weights, self._pre, self._gated, self._rectified
        a, b = pre.chunk(2, dim=1)
        for (window, term, x, y), horizontal, out in zip(
            views, weights.horizontal, weights.horizontal_out, strict=True
        ):
            torch.addmm(term, window, horizontal, out=pre)
            torch.sigmoid(pre, out=pre)
            torch.addcmul(b, a, b, value=-2, out=gated)
            torch.addmm(x, gated, out, out=y)
        x, relu = self.features, rectified[:, :-1]
        for layer in weights.stack:
            torch.clamp_min(x, 0, out=relu)
            x = torch.addmm(x, rectified, layer, out=self._hidden)
        torch.clamp_min(x, 0, out=relu)
        torch.mm(rectified, weights.to_logits, out=self.logits)

    def put(self, codes: Tensor, row: int, column: int) -> None:
        """Enter the codes (B,) of all batch rows at one position."""
        self._tokens[:, row + self.reach, column + self.reach] = codes
        self._right[column] += self.weights.horizontal_table.index_select(0, codes)

    def put_at(self, rows: np.ndarray, codes: Tensor, grid_rows: np.ndarray, columns: np.ndarray) -> None:
        """Enter the codes (n,) of some batch rows (n,), each at a position of its own."""
        at, row, column = (torch.as_tensor(x, device=codes.device) for x in (rows, grid_rows, columns))
        self._tokens[at, row + self.reach, column + self.reach] = codes
        first = at * self._line.shape[2] + column + self.reach + 1
        right = first[:, None] + torch.arange(self.reach, device=codes.device)  # (n, p)
        table = self.weights.horizontal_table
        self._line[0].flatten(0, 1).index_add_(0, right.flatten(), table[codes].flatten(0, 1))

    def _run(self, key: tuple[str, int], work: Callable[[], None]) -> None:
        """Do the work, or replay it as the CUDA graph recorded after its first, ordinary run."""
        if not self.use_cuda_graphs:
            work()
        elif key in self._graphs:
            self._graphs[key].replay()
        else:
            work()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                work()
            self._graphs[key] = graph
