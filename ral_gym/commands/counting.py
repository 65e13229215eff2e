"""Counting what a network costs without running it: its passes on the meta device, which computes shapes only.

FLOPs are those of `torch.utils.flop_counter`, for matrix products and convolutions, forward and backward; a
multiply-add counts as two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ral_gym.grid import CodeGrid
from ral_gym.priors.base import logits_of
from ral_gym.stages.processes import Compute
from ral_gym.tokenizers.base import Tokenizer
from ral_gym.tokenizers.vqvae import VQVAE

META = torch.device("meta")
DECODER_PARTS = ("decoder", "upsample_top")
"""Submodules of a VQ-VAE's decoder; the others belong to the encoder."""


@dataclass(frozen=True)
class StageCost:
    """One stage's estimate."""

    stage: str
    """Its name."""
    parameters: int
    """Trained weights."""
    batch_size: int
    """Images or code grids per step."""
    steps: int
    """Number of steps."""
    flops_per_step: int
    """FLOPs of one step, forward and backward."""
    memory: int
    """Bytes per process while it trains."""
    parts: dict[str, int] = field(default_factory=dict)
    """Part of the forward pass -> its FLOPs per image."""
    sent: int = 0
    """Bytes of gradients that several processes sum in a step."""
    codes: int = 0
    """Codes that the environment and the buffer handle in a step of stage 3."""
    drawing_flops: int = 0
    """Of `flops_per_step`, those of drawing images."""
    read: int = 0
    """Bytes of weights that drawing reads in a step, however few images are drawn."""


@dataclass
class Count:
    """The cost of one pass over a batch, counted on the meta device."""

    flops: int = 0
    kept: int = 0
    """Bytes that the backward pass needs, without weights."""
    by_module: dict[str, Any] = field(default_factory=dict)


def logits_on_meta(prior: nn.Module, grid: CodeGrid, level: int, n: int) -> Tensor:
    """Logits of n code grids of one level, on the meta device."""
    sizes = grid.level_sizes
    codes = torch.zeros(n, sizes[level], dtype=torch.int64, device=META)
    above = torch.zeros(n, sizes[0], dtype=torch.int64, device=META) if level else None
    return logits_of(prior, codes, above)


def count(run: Callable[[], Any], backward: bool = True) -> Count:
    """Count one pass, and the backward pass from the scalar that it returns."""
    found, storages = Count(), {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not (tensor.is_leaf and tensor.requires_grad):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = (storage, storage.nbytes())  # held, so that no address comes twice
        return tensor

    counter = FlopCounterMode(display=False)
    with torch.set_grad_enabled(backward), counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = run()
        if backward:
            result.backward()
    found.flops = counter.get_total_flops()
    found.kept = sum(size for _, size in storages.values())
    modules = counter.get_flop_counts()
    found.by_module = {
        name.partition(".")[2]: sum(counts.values()) for name, counts in modules.items() if name.count(".") == 1
    }
    return found


@contextmanager
def without_lookup(vqvae: VQVAE, vectors: list[int]) -> Iterator[None]:
    """Make a VQ-VAE's quantisers return their input, and count the vectors."""

    def passed(z: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        vectors[0] += z.shape[:-1].numel()
        return z, torch.zeros(z.shape[:-1], dtype=torch.int64, device=z.device), z.new_zeros(1)

    for quantiser in vqvae.quantisers:
        quantiser.forward = passed
    try:
        yield
    finally:
        for quantiser in vqvae.quantisers:
            del quantiser.forward


def share_of(batch_size: int, shares: int) -> int:
    """Images of one process's part of a batch."""
    return max(1, batch_size // shares)


def image_shape(vqvae: Tokenizer) -> tuple[int, int, int]:
    """(C, S, S) of a tokenizer's images."""
    return (vqvae.channels, vqvae.image_size, vqvae.image_size)


def sum_of(*tensors: Tensor) -> Tensor:
    """A scalar that depends on all of the tensors."""
    return torch.stack([tensor.sum() for tensor in tensors]).sum()


def parameters_of(module: nn.Module) -> int:
    """How many weights it has."""
    return sum(parameter.numel() for parameter in module.parameters())


def bytes_of(tensors: Any) -> int:
    """Bytes of all of them together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def trained_bytes(module: nn.Module, averages: int = 0) -> int:
    """Bytes of weights, gradients, Adam's two moments and weight averages, and of buffers."""
    return (4 + averages) * bytes_of(module.parameters()) + bytes_of(module.buffers())


def activation_bytes(count: Count, compute: Compute) -> int:
    """Bytes that the backward pass of a pass needs."""
    return count.kept // (2 if compute.mixed_precision == "bf16" else 1)


def decoding_flops(tokenizer: Any) -> int:
    """FLOPs of decoding one image; 0 if they cannot be counted on the meta device."""
    if isinstance(tokenizer, VQVAE):
        with without_lookup(tokenizer, [0]):
            one = torch.empty(1, *image_shape(tokenizer), device=META)
            both = count(lambda: tokenizer(one), backward=False)
        return sum(count for name, count in both.by_module.items() if name in DECODER_PARTS)
    codes = torch.zeros(1, tokenizer.grid.n_codes, dtype=torch.int64, device=META)
    try:
        return count(lambda: tokenizer.decode(codes), backward=False).flops
    except Exception:  # see `_own_tokenizer_cost`
        return 0
