"""The value function of a policy, on the prior's features."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ValueHead(nn.Module):
    """V(s) from the prior's features and the episode's position and stop.

    The features depend on the codes so far, but not on where a partial episode stops, so position and stop are inputs
    too.

    Args:
        hidden_units: C, channels of the features.
        units: width of the hidden layer.
        detach: keep the value loss out of the pretrained trunk.
    """

    def __init__(self, hidden_units: int, units: int, detach: bool) -> None:
        super().__init__()
        self.detach = detach
        self.net = nn.Sequential(nn.Linear(hidden_units + 2, units), nn.Tanh(), nn.Linear(units, 1))

    def forward(self, features: Tensor, position: Tensor, stop: Tensor, n_codes: int) -> Tensor:
        """Features (N, C), position and stop (N,) int64 -> values (N, 1)."""
        where = torch.stack([position, stop], 1).to(features.dtype) / n_codes  # (N, 2)
        return self.net(torch.cat([features.detach() if self.detach else features, where], 1))
