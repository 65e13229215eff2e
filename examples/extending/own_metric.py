"""An extractor and two columns of the results table of your own, without an edit in the package.

From this folder, on the bundled faces (a few seconds):

    ral-gym train --preset smoke --data faces --name own_metric \
        --evaluation.extractor own_metric:Edges --evaluation.metrics own_metric:brightness own_metric:common_codes
    ral-gym report runs/own_metric --plugin own_metric:Edges own_metric:brightness own_metric:common_codes

FD, KID, precision and recall are then those of `Edges`. A run only names its parts: whoever opens it names them again
with --plugin, since they are code; those of an installed package's entry points (ral_gym.metrics) need no --plugin.
"""

import torch
from torch import Tensor, nn

from ral_gym.metrics import mean_estimate


class Edges(nn.Module):
    """How steep the edges are, in each cell of a 4 x 4 grid."""

    def forward(self, images: Tensor) -> Tensor:
        """Images uint8 (B, C, S, S) -> features (B, 32)."""
        grey = images.float().mean(1, keepdim=True)  # (B, 1, S, S)
        steps = [grey.diff(dim=dim).abs() for dim in (2, 3)]
        return torch.cat([nn.functional.adaptive_avg_pool2d(step, 4).flatten(1) for step in steps], 1)


def brightness(generated: Tensor, reference: Tensor) -> tuple[float, float, float]:
    """Mean grey value less that of the training images."""
    found = mean_estimate(generated.float().mean((1, 2, 3)) - reference.float().mean())
    return found.value, found.low, found.high


def common_codes(generated: Tensor, reference: Tensor) -> float:
    """Share of the training images' codes that samples use too."""
    return float(torch.isin(reference.unique(), generated.unique()).float().mean())


common_codes.sees = "codes"  # type: ignore[attr-defined]
