"""The networks that the parts draw from, made on the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from gpu_parts.common import Check
from ral_gym.grid import CodeGrid
from ral_gym.presets import get_preset
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.transformer import Transformer
from ral_gym.priors.two_level import TwoLevelPrior
from ral_gym.stages.levels import prior_of

TRANSFORMERS = {"B": (12, 12, 768), "L": (24, 16, 1024)}
"""LlamaGen's sizes: layers, heads, width."""


def small_two_level(device: str) -> TwoLevelPrior:
    """Two small networks with attention and a condition, weights of all sizes."""
    torch.manual_seed(0)
    sizes: Any = {"hidden_units": 12, "residual_units": 8, "layers": 3, "conv_filter_size": 3, "output_stack_layers": 2}
    top = PixelCNN(11, 4, 4, attention_layers=2, attention_heads=4, position_embedding=True, **sizes)
    bottom = PixelCNN(11, 8, 8, condition=(4, 4, 11), conditioning_stack_layers=2, **sizes)
    prior = TwoLevelPrior(top, bottom).eval()
    for weights in prior.parameters():
        torch.nn.init.normal_(weights, std=0.3)
    return prior.to(device)


def celeba128(check: Check, dtype: torch.dtype) -> TwoLevelPrior:
    """The paper's networks of Table 8: 16x16 codes above 32x32."""
    config, side = get_preset("celeba128"), 16
    if check.tiny:
        small: Any = {"hidden_units": 16, "residual_units": 16, "layers": 3, "output_stack_layers": 2}
        top = replace(config.prior, **small, attention_layers=1)
        bottom = replace(config.bottom, **small, conditioning_stack_layers=2)
        config, side = replace(config, prior=top, bottom=bottom), 4
    grid = CodeGrid(side, side, config.vqvae.codebook_size, levels=2)
    torch.manual_seed(0)
    with torch.device(check.device):
        prior = TwoLevelPrior(prior_of(config, grid, 0), prior_of(config, grid, 1))
    return prior.to(dtype).eval().requires_grad_(False)


def llamagen(check: Check, size: str, dtype: torch.dtype) -> Any:
    """LlamaGen's transformer over 16x16 codes, unconditional, with weights that are not zero."""
    layers, heads, width = (2, 2, 16) if check.tiny else TRANSFORMERS[size]
    side, codes = (4, 32) if check.tiny else (16, 16_384)
    torch.manual_seed(0)
    with torch.device(check.device):
        prior = Transformer(codes, side, side, hidden_units=width, layers=layers, attention_heads=heads)
        torch.nn.init.normal_(prior.output.weight, std=0.02)
    return prior.to(dtype).eval().requires_grad_(False)
