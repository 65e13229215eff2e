"""The residual block that encoders, decoders and the conditioning stack share."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

_OLD_NAMES = {"body.1.": "inner.", "body.3.": "out."}
"""Names of the two convolutions in tokenizer files of versions before 0.2."""


class ResidualBlock(nn.Module):
    """x + 1x1(relu(3x3(relu(x)))) on grids (B, C, H, W).

    Args:
        hidden_units: C.
        residual_units: channels between the two convolutions.
        dropout: probability, before the second one.
    """

    def __init__(self, hidden_units: int, residual_units: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.inner = nn.Conv2d(hidden_units, residual_units, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Conv2d(residual_units, hidden_units, 1)
        self.register_load_state_dict_pre_hook(_rename)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        return x + self.out(self.dropout(F.relu(self.inner(F.relu(x)))))


def present_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a whole network, with older names replaced by the current ones."""
    renamed = {}
    for name, tensor in state.items():
        for old, new in _OLD_NAMES.items():
            name = name.replace(f".{old}", f".{new}")
        renamed[name] = tensor
    return renamed


def _rename(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """The same for one block, also when a stage's checkpoint is loaded."""
    for old, new in _OLD_NAMES.items():
        for part in ("weight", "bias"):
            if (name := f"{prefix}{old}{part}") in state:
                state[f"{prefix}{new}{part}"] = state.pop(name)
