"""What a PixelCNN is conditioned on: the top codes of a two-level model, a class, or both.

Follows "Generating Diverse High-Fidelity Images with VQ-VAE-2" (Razavi et al., 2019): p(bottom | top) is a PixelCNN
without attention that sees the top codes through 20 residual blocks ("Conditioning Output stack layers" in the
supplement's Tables 8 to 10). Top codes that are not drawn are replaced by a learned token, so that an image may have
fewer rows.

A class is a learned vector, added to the features of the top codes or in their place; "no class" has one of its own. As
in "Conditional Image Generation with PixelCNN Decoders" (van den Oord et al., 2016, Eq. 4), every block adds what it
makes of it to its pre-activations, at all positions alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ral_gym.errors import ConfigError
from ral_gym.tokenizers.residual import ResidualBlock


def upsample(x: Tensor, factor: int) -> Tensor:
    """Repeat rows and columns: (B, h, w, C) to (B, factor h, factor w, C)."""
    return x.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


class ConditioningStack(nn.Module):
    """Embeds a grid of codes and lets every position see its surroundings, later codes included.

    Args:
        codebook_size: K of these codes.
        height: H, rows of their grid.
        width: W, columns of their grid.
        hidden_units: C, channels of the result.
        residual_units: channels inside a residual block.
        layers: residual blocks.
        dropout: probability inside them.
    """

    def __init__(
        self,
        codebook_size: int,
        height: int,
        width: int,
        hidden_units: int,
        residual_units: int,
        layers: int,
        dropout: float,
    ):
        super().__init__()
        self.codebook_size, self.height, self.width = codebook_size, height, width
        self.embedding = nn.Embedding(codebook_size + 1, hidden_units)  # the last one: no code here
        blocks = (ResidualBlock(hidden_units, residual_units, dropout) for _ in range(layers))
        self.blocks = cast(Sequence[ResidualBlock], nn.ModuleList(blocks))

    def forward(self, codes: Tensor) -> Tensor:
        """Codes to the features that condition another grid.

        The whole grid is always computed, so that an image's features do not depend on the heights of others in the
        batch.

        Args:
            codes: (B, r W) int64, r from 1 to H; entries of K and more, and the rows left out, count as absent.

        Returns:
            (B, H, W, C).

        Raises:
            ConfigError: the codes are not whole rows of the grid.
        """
        batch, length = codes.shape
        full = self.height * self.width
        if length % self.width or not 0 < length <= full:
            raise ConfigError(
                f"a condition of {length} codes does not fit the PixelCNN: pass whole rows of the top grid, a multiple "
                f"of {self.width} from {self.width} to {full}"
            )
        codes = F.pad(codes, (0, full - length), value=self.codebook_size).clamp(max=self.codebook_size)
        x = self.embedding(codes.view(batch, self.height, self.width)).permute(0, 3, 1, 2)  # (B, C, H, W)
        for block in self.blocks:
            x = block(x)
        return x.permute(0, 2, 3, 1)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise so that each of N blocks adds about 1 / N of the variance; "no code" starts as zeros."""
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.embedding.weight[-1] = 0
        for block in self.blocks:
            nn.init.normal_(block.inner.weight, std=1 / math.sqrt(block.inner.weight[0].numel()))
            nn.init.normal_(block.out.weight, std=2 / math.sqrt(block.out.in_channels * len(self.blocks)))
            for layer in (block.inner, block.out):
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)


class ClassConditioning(nn.Module):
    """The features of a class, on top of those of another grid's codes if there are any.

    Args:
        classes: N.
        hidden_units: C, channels of the result.
        height: rows of the result.
        width: columns of the result.
        class_dropout: share of the labels that training mode replaces by "no class".
        stack: the network on another grid's codes, of height x width and C channels; None: the class alone.
    """

    def __init__(
        self,
        classes: int,
        hidden_units: int,
        height: int,
        width: int,
        class_dropout: float,
        stack: ConditioningStack | None,
    ) -> None:
        super().__init__()
        self.classes, self.height, self.width, self.class_dropout = classes, height, width, class_dropout
        self.embedding = nn.Embedding(classes + 1, hidden_units)  # the last one: no class
        self.stack = stack

    def forward(self, condition: Tensor) -> Tensor:
        """Codes and label to features.

        Args:
            condition: (B, 1) int64, the label, 0..N, N for "no class"; behind the other grid's codes with a stack.

        Returns:
            (B, height, width, C).

        Raises:
            ConfigError: see `ConditioningStack`; or no label.
        """
        codes, labels = condition[:, :-1], condition[:, -1]  # (B, T''), (B,)
        if self.stack is None and codes.shape[1]:
            raise ConfigError(f"a condition of {condition.shape[1]} entries: pass one label for each image")
        if self.training and self.class_dropout:
            dropped = torch.rand(len(labels), device=labels.device) < self.class_dropout
            labels = labels.masked_fill(dropped, self.classes)
        features = self.embedding(labels)[:, None, None]  # (B, 1, 1, C)
        if self.stack is not None:
            return self.stack(codes) + features
        return features.expand(-1, self.height, self.width, -1)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise: classes start alike, and without effect."""
        nn.init.zeros_(self.embedding.weight)
        if self.stack is not None:
            self.stack.reset_parameters()
