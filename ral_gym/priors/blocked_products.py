"""Products with weights that are kept in oneDNN's own layout: the cached sampler's largest ones, on a CPU.

torch multiplies by MKL there, which on an AMD EPYC takes about twice as long (docs/results.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LARGE = 2**20
"""Multiply-adds from which oneDNN's products are faster, its own start included."""
OPERATORS = (
    "_convolution_pointwise",
    "_linear_pointwise",
    "_reorder_convolution_weight",
    "_reorder_linear_weight",
)


def can_block(like: Tensor) -> bool:
    """Whether weights can be kept in oneDNN's own layout.

    `F.conv2d` brings the kernels into that layout at every call, a quarter of its time on one row of 16 grids. These
    operators, which torch.compile uses, are not public: without them torch's own do the same.
    """
    there = all(hasattr(torch.ops.mkldnn, name) for name in OPERATORS)
    return like.device.type == "cpu" and like.dtype == torch.float32 and torch.backends.mkldnn.is_available() and there


class BlockedProducts:
    """added + x @ weight, with one weight per layer.

    Args:
        weights: (I, O) each; `refresh` copies them again.
        blocked: `can_block`.
    """

    def __init__(self, weights: Sequence[Tensor], blocked: bool) -> None:
        self.weights = weights
        self._blocked: list[Tensor] | None = [] if blocked else None

    def refresh(self) -> None:
        """Copy the weights, which have changed."""
        if self._blocked is not None:
            self._blocked = [torch.ops.mkldnn._reorder_linear_weight(x.t().contiguous()) for x in self.weights]

    def __call__(self, layer: int, added: Tensor, x: Tensor, out: Tensor) -> Tensor:
        """Added (O,) or (n, O), x (n, I) -> (n, O): `out`, or a tensor of its own."""
        weight = self.weights[layer]
        if self._blocked is None or len(x) * weight.numel() < LARGE:
            return torch.addmm(added, x, weight, out=out)
        blocked, product = self._blocked[layer], torch.ops.mkldnn._linear_pointwise
        if added.dim() == 1:
            found: Tensor = product(x, blocked, added, "none", [], "")
        else:
            found = product.binary(x, added, blocked, None, "add")
        return found
