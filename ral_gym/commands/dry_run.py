"""The cost of a configuration, without training: its models run on the meta device, which computes shapes only.

FLOPs are those of `torch.utils.flop_counter`, for matrix products and convolutions, forward and backward; a
multiply-add counts as two. Memory is weights, gradients, Adam's two moments and averages, and the activations that the
backward pass keeps for one part of a batch, without the framework's own buffers. The quantiser's forward does not run
on the meta device, so encoder, lookup and decoder are counted separately.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ral_gym.commands.cost_of_ral import ral_cost
from ral_gym.commands.counting import (
    DECODER_PARTS,
    META,
    Count,
    StageCost,
    activation_bytes,
    bytes_of,
    count,
    image_shape,
    logits_on_meta,
    parameters_of,
    share_of,
    sum_of,
    trained_bytes,
    without_lookup,
)
from ral_gym.config import Config
from ral_gym.data.images import channels_of
from ral_gym.grid import CodeGrid
from ral_gym.stages.image_losses import make_discriminator
from ral_gym.stages.levels import SECTIONS, prior_of
from ral_gym.stages.perceptual import make_perceptual
from ral_gym.stages.processes import Compute
from ral_gym.tokenizers.base import tokenizer_of
from ral_gym.tokenizers.quantiser import PIECE
from ral_gym.tokenizers.vqvae import VQVAE


@dataclass(frozen=True)
class DryRun:
    """The estimate of all stages."""

    grid: CodeGrid
    """The shape of an image's codes; `grid.n_codes` is T."""
    channels: int
    """1 (grey) or 3."""
    stages: list[StageCost]
    """In order."""


def dry_run(config: Config, compute: Compute | None = None, processes: int = 1) -> DryRun:
    """Estimate all stages of a configuration.

    Args:
        config: the settings; no data are read: images have one channel if `data.grey` or `faces`, else three.
        compute: precision and accumulation parts of stages 1 and 2.
        processes: number of processes that share each batch.

    Raises:
        ConfigError: the settings do not fit one another.
    """
    config.check(files=False)
    compute = compute or Compute()
    compute.check()
    channels = channels_of(config.data)
    with META:
        vqvae = tokenizer_of(config, config.data.image_size, channels)
        grid = vqvae.grid
        priors = [prior_of(config, grid, level) for level in range(grid.levels)]
    stages = [_with_image_losses(_vqvae_cost(config, vqvae, compute, processes), config, vqvae, compute, processes)]
    for level, prior in enumerate(priors):
        stages.append(_prior_cost(config, prior, grid, level, compute, processes))
    stages.append(ral_cost(config, vqvae, priors, grid, processes))
    return DryRun(grid, channels, stages)


def _vqvae_cost(config: Config, vqvae: Any, compute: Compute, processes: int) -> StageCost:
    """Stage 1: encoder, lookup and decoder, forward and backward."""
    settings, shares = config.vqvae, processes * compute.gradient_accumulation
    images = torch.empty(share_of(settings.batch_size, shares), *image_shape(vqvae), device=META)
    if not isinstance(vqvae, VQVAE):
        return _own_tokenizer_cost(config, vqvae, images, compute, shares)
    vectors = [0]
    with without_lookup(vqvae, vectors):
        once = count(lambda: sum_of(vqvae(images)[0]))
        forward = count(lambda: vqvae(images), backward=False)
    lookup = 2 * settings.codebook_size * settings.codebook_dim * vectors[0] // 2  # counted in two passes
    painted = sum(count for name, count in forward.by_module.items() if name in DECODER_PARTS)
    n = len(images)
    return StageCost(
        stage="1 VQ-VAE" if vqvae.levels == 1 else "1 VQ-VAE-2",
        parameters=parameters_of(vqvae),
        batch_size=settings.batch_size,
        steps=settings.training_steps,
        flops_per_step=shares * (once.flops + lookup),
        memory=trained_bytes(vqvae) + activation_bytes(once, compute) + _lookup_memory(vqvae, n),
        sent=bytes_of(vqvae.parameters()),
        parts={"encoder": (forward.flops - painted) // n, "lookup": lookup // n, "decoder": painted // n},
    )


def _with_image_losses(cost: StageCost, config: Config, vqvae: Any, compute: Compute, processes: int) -> StageCost:
    """Stage 1 with the perceptual and the adversarial loss; the discriminator's step follows the tokenizer's."""
    settings, shares = config.vqvae, processes * compute.gradient_accumulation
    n = share_of(settings.batch_size, shares)
    pairs = [torch.empty(n, *image_shape(vqvae), device=META, requires_grad=needs) for needs in (True, False)]
    flops, kept, memory, parts = 0, 0, 0, dict[str, int]()
    if settings.perceptual_weight:
        network = make_perceptual(settings.perceptual_network, weights=False)
        once = count(lambda: network(*pairs))
        flops, kept, memory = once.flops, once.kept, bytes_of(network.parameters()) + bytes_of(network.buffers())
        parts["perceptual"] = count(lambda: network(*pairs), backward=False).flops // n
    if settings.adversarial_weight:
        with META:
            judge = make_discriminator(settings, vqvae)
        frozen = count(lambda: sum_of(functional_call(judge, _fixed(judge), (pairs[0],))))
        step = count(lambda: sum_of(judge(torch.cat([pairs[1], pairs[1]]))))
        flops, memory = flops + frozen.flops + step.flops, memory + trained_bytes(judge)
        kept = max(kept + frozen.kept, step.kept)
        parts["discriminator"] = count(lambda: judge(pairs[1]), backward=False).flops // n
    extra = memory + activation_bytes(Count(kept=kept), compute)
    total, sent = cost.flops_per_step + shares * flops, cost.sent
    if settings.adversarial_weight:
        sent += bytes_of(judge.parameters())
    return replace(cost, flops_per_step=total, memory=cost.memory + extra, parts=cost.parts | parts, sent=sent)


def _fixed(module: nn.Module) -> dict[str, Tensor]:
    """Its weights, without gradients."""
    return {name: weight.detach() for name, weight in module.named_parameters()}


def _lookup_memory(vqvae: VQVAE, n: int) -> int:
    """Peak bytes of the distances of n images to a codebook; levels are computed one after the other.

    The library holds distances, copies of them, one-hot integers and one-hot numbers at once (24 bytes, measured); in
    pieces it is distances and one-hot numbers of a quarter of `PIECE`.
    """
    most = max(n * size * vqvae.codebook_size for size in vqvae.grid.level_sizes)
    return 24 * most if most <= PIECE else 8 * PIECE // 4


def _own_tokenizer_cost(config: Config, tokenizer: Any, images: Tensor, compute: Compute, shares: int) -> StageCost:
    """Stage 1 of a tokenizer of your own: the cost of its loss, if it can be counted on the meta device."""
    settings, once = config.vqvae, Count()
    learns = hasattr(tokenizer, "training_loss")
    if learns:
        try:
            once = count(lambda: _loss(tokenizer, images))
        except Exception:  # third-party code may read values, which the meta device does not have
            once = Count()
    return StageCost(
        stage=f"1 {type(tokenizer).__name__}",
        parameters=parameters_of(tokenizer),
        batch_size=settings.batch_size if learns else len(images),
        steps=settings.training_steps if learns else 0,
        flops_per_step=shares * once.flops,
        memory=trained_bytes(tokenizer) + activation_bytes(once, compute),
        sent=bytes_of(tokenizer.parameters()) if learns else 0,
    )


def _loss(tokenizer: Any, images: Tensor) -> Tensor:
    loss = tokenizer.training_loss(images)
    return loss[0] if isinstance(loss, tuple) else loss


def _prior_cost(
    config: Config, prior: nn.Module, grid: CodeGrid, level: int, compute: Compute, processes: int
) -> StageCost:
    """Stage 2 of one level."""
    settings, shares = getattr(config, SECTIONS[level]), processes * compute.gradient_accumulation
    n = share_of(settings.batch_size, shares)
    once = count(lambda: sum_of(logits_on_meta(prior, grid, level, n)))
    forward = count(lambda: logits_on_meta(prior, grid, level, 1), backward=False)
    network = type(prior).__name__
    name = f"2 {network}" if grid.levels == 1 else f"2 {network} {('top', 'bottom')[level]}"
    return StageCost(
        stage=name,
        parameters=parameters_of(prior),
        batch_size=settings.batch_size,
        steps=settings.training_steps,
        flops_per_step=shares * once.flops,
        memory=trained_bytes(prior, averages=1) + activation_bytes(once, compute),
        sent=bytes_of(prior.parameters()),
        parts={network: forward.flops},
    )
