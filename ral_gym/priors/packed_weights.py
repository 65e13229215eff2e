"""The PixelCNN's weights laid out for the cached sampler's matrix products: (inputs, outputs), taps side by side.

They are copies, so that the network can go on training; ``PackedWeights.refresh`` copies again. What a code adds to the
first layers and to the attention's memory is precomputed as a row of a table.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ral_gym.priors.attention import CausalAttention
from ral_gym.priors.blocked_products import BlockedProducts, can_block
from ral_gym.priors.condition import ClassConditioning, ConditioningStack
from ral_gym.priors.layers import GatedBlock, InputLayer, OutputStack


class Network(Protocol):
    """The parts of a `PixelCNN`, whose file imports this one."""

    codebook_size: int
    height: int
    width: int
    hidden_units: int
    residual_units: int
    layers: int
    conv_filter_size: int
    attention_layers: int
    attention_heads: int
    classes: int
    attention_after: list[int]
    input: InputLayer
    blocks: Sequence[GatedBlock]
    attention: Sequence[CausalAttention]
    conditioning: ConditioningStack | ClassConditioning | None
    output: OutputStack


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias


class PackedWeights:
    """A copy of the PixelCNN's weights, packed.

    Args:
        prior: the network; `refresh` copies its weights again, to the same addresses.

    Attributes:
        attention_of: block -> the attention layer that follows it, for the blocks that have one.
        conditioning: the network on the condition, without dropout; None if there is no condition.
        by_products: convolve by matrix products; set on CUDA, where drawing in float32 took nine times the memory of
            bfloat16 with cuDNN's convolutions (docs/results.md).
    """

    @torch.inference_mode(False)  # buffers made inside inference mode could not be written outside of it
    def __init__(self, prior: Network):
        blocks, stack = prior.blocks, prior.output
        like = prior.input.embedding.weight.detach()
        reach, side = prior.conv_filter_size // 2, prior.conv_filter_size
        channels, inner = prior.hidden_units, prior.residual_units
        tokens = prior.codebook_size + 1  # token K stands for "nothing here" and adds nothing

        self.prior = prior
        # The first layer's products of each code and tap, precomputed: sums of table rows replace its convolutions.
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
        heads, attention = prior.attention_heads, range(prior.attention_layers)
        self.attention_of = dict(zip(prior.attention_after, attention, strict=True))
        # Query, key and value of each head side by side; the base holds what a position adds to them.
        self.project = [like.new_empty(channels, 3 * channels) for _ in attention]
        self.project_base = [like.new_empty(prior.height * prior.width, 3 * channels) for _ in attention]
        self.attention_out = [like.new_empty(channels, channels) for _ in attention]
        memory = (len(attention), tokens, heads, 2 * channels // heads)  # the last: a key and a value
        self.memory_table = like.new_zeros(memory)
        self.memory_start = like.new_zeros(memory[0], *memory[2:])
        self.condition = [like.new_empty(channels, 2 * inner) for block in blocks if block.condition is not None]
        self.conditioning = copy.deepcopy(prior.conditioning)
        if self.conditioning is not None:
            self.conditioning.eval().requires_grad_(False)
        blocked = can_block(like)
        self._blocked: list[Tensor] | None = [] if blocked else None
        self.horizontal_product = BlockedProducts(self.horizontal, blocked)
        self.across_product = BlockedProducts(self.across, blocked)
        self.by_products = like.is_cuda
        self.refresh()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.to_logits.device

    @property
    def dtype(self) -> torch.dtype:
        """Their type."""
        return self.to_logits.dtype

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
            if block.condition is not None:
                self.condition[layer].copy_(block.condition.weight.t())
        for packed, linear in zip([*self.stack, self.to_logits], [*stack.layers, stack.to_logits], strict=True):
            packed[:-1].copy_(linear.weight.t())
            packed[-1].copy_(linear.bias)
        for number in range(len(self.project)):
            self._refresh_attention(number)
        if self.conditioning is not None:
            assert self.prior.conditioning is not None
            self.conditioning.load_state_dict(self.prior.conditioning.state_dict())
        if self._blocked is not None:
            padding = [0, self.prior.conv_filter_size // 2]
            self._blocked = [torch.ops.mkldnn._reorder_convolution_weight(x, padding) for x in self.vertical]
        self.horizontal_product.refresh()
        self.across_product.refresh()

    def _refresh_attention(self, number: int) -> None:
        attention = self.prior.attention[number]
        heads, scale = attention.heads, math.sqrt(attention.heads / self.prior.hidden_units)
        hidden, code = attention.memory.weight.chunk(2, dim=1)  # of the activations and of the code, (2 C, C) each

        def side_by_side(query: Tensor, memory: Tensor) -> Tensor:
            by_head = [query.unflatten(0, (heads, -1)) * scale, memory.unflatten(0, (heads, -1))]
            return torch.cat(by_head, dim=1).flatten(0, 1)

        self.project[number].copy_(side_by_side(attention.query.weight, hidden).t())
        query, memory = (position.flatten(0, 1).t() for position in attention.positions())  # (C, H W), (2 C, H W)
        self.project_base[number].copy_(side_by_side(query + attention.query.bias[:, None], memory).t())
        added = self.prior.input.embedding.weight @ code.t()  # (K, 2 C)
        self.memory_table[number, :-1] = added.unflatten(1, (heads, -1))
        self.memory_start[number] = attention.start.view(heads, -1)
        self.attention_out[number].copy_(attention.out.weight.t())

    def convolve(self, x: Tensor, layer: int, seen: int) -> Tensor:
        """A block's vertical convolution, whose last `seen` kernel rows lie on the grid: (n, rows + seen - 1, W, C).

        Returns:
            (n, rows, W, 2 R).
        """
        weight, bias = self.vertical[layer], self.vertical_bias[layer]
        if self.by_products:
            return _convolve_by_products(x, weight[:, :, -seen:], bias)
        padding, x = [0, weight.shape[3] // 2], x.permute(0, 3, 1, 2)
        if self._blocked is not None and seen == weight.shape[2]:
            packed = self._blocked[layer]
            pre = torch.ops.mkldnn._convolution_pointwise(x, packed, bias, padding, [1, 1], [1, 1], 1, "none", [], "")
        else:
            pre = F.conv2d(x, weight[:, :, -seen:], bias, padding=padding)
        return pre.permute(0, 2, 3, 1)


def _convolve_by_products(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve (n, rows + seen - 1, W, C) with a kernel (O, C, seen, k) by one matrix product per kernel row.

    Columns beyond the sides are zero; the kernel lies channels last in memory.

    Returns:
        (n, rows, W, O).
    """
    seen, side = weight.shape[2:]
    rows, reach = x.shape[1] - seen + 1, side // 2
    windows = F.pad(x, (0, 0, reach, reach)).unfold(2, side, 1)  # (n, rows + seen - 1, W, C, k)
    windows = windows.transpose(3, 4).flatten(3)  # (n, rows + seen - 1, W, k C)
    kernel = weight.permute(2, 3, 1, 0).flatten(1, 2)  # (seen, k C, O)
    out = bias.expand(windows[:, :rows].flatten(0, 2).shape[0], -1)  # (n rows W, O)
    for row in range(seen):
        out = torch.addmm(out, windows[:, row : row + rows].flatten(0, 2), kernel[row])
    return out.view(len(x), rows, x.shape[2], -1)
