"""The linear layer of all priors: on a CPU, large products in float32 are oneDNN's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LARGE = 2**22
"""Multiply-adds from which oneDNN's products are faster, its own start included."""


class Linear(nn.Linear):
    """`nn.Linear`, with the same weights and results.

    torch multiplies float32 matrices on a CPU by MKL, which on an AMD EPYC takes about twice as long as oneDNN, with
    which torch convolves (docs/results.md). So a large product is written as a convolution of 1x1.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., channels in) -> (..., channels out)."""
        if not self._by_convolution(x):
            return super().forward(x)
        columns = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # (1, C, 1, N), channels last in memory
        # Without the dilation, which a kernel of 1x1 does not have, one thread would not be given oneDNN.
        found = F.conv2d(columns, self.weight[:, :, None, None], self.bias, dilation=2)  # (1, O, 1, N)
        return found.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)

    def _by_convolution(self, x: Tensor) -> bool:
        if not (x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32):
            return False
        if x.numel() * self.out_features < LARGE or torch.is_autocast_enabled("cpu"):
            return False
        return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
