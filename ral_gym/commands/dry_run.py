"""The cost of a configuration, without training: its models run on the meta device, which computes shapes only.

FLOPs are those of `torch.utils.flop_counter`, for matrix products and convolutions, forward and backward; a
multiply-add counts as two. Memory is weights, gradients, Adam's two moments and averages, and the activations that the
backward pass keeps for one part of a batch, without the framework's own buffers. The quantiser's forward does not run
on the meta device, so encoder, lookup and decoder are counted separately.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from ral_gym.config import Config, CriticConfig
from ral_gym.data.images import channels_of
from ral_gym.grid import CodeGrid
from ral_gym.priors.base import logits_of
from ral_gym.priors.two_level import join_priors
from ral_gym.rewards.making import build_critic, critic_class
from ral_gym.rewards.scorer import CriticScorer, find_features
from ral_gym.stages.image_losses import make_discriminator
from ral_gym.stages.levels import SECTIONS, prior_of
from ral_gym.stages.perceptual import make_perceptual
from ral_gym.stages.processes import Compute
from ral_gym.tokenizers.base import Tokenizer, tokenizer_of
from ral_gym.tokenizers.quantiser import PIECE
from ral_gym.tokenizers.vqvae import VQVAE

META = torch.device("meta")
DECODER_PARTS = ("decoder", "upsample_top")
"""Submodules of a VQ-VAE's decoder; the others belong to the encoder."""
PENALTY_PASSES = 6
"""Cost of a gradient penalty in forward passes: one forward, one to the image, and twice each for their gradients."""


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


@dataclass(frozen=True)
class DryRun:
    """The estimate of all stages."""

    grid: CodeGrid
    """The shape of an image's codes; `grid.n_codes` is T."""
    channels: int
    """1 (grey) or 3."""
    stages: list[StageCost]
    """In order."""


@dataclass
class _Count:
    """The cost of one pass over a batch, counted on the meta device."""

    flops: int = 0
    kept: int = 0
    """Bytes that the backward pass needs, without weights."""
    by_module: dict[str, Any] = field(default_factory=dict)


def dry_run(config: Config, compute: Compute | None = None, processes: int = 1) -> DryRun:
    """Estimate all stages of a configuration.

    Args:
        config: the settings; no data are read: images have one channel if `data.grey` or `faces`, else three.
        compute: precision and accumulation parts of stages 1 and 2.
        processes: number of processes that share each batch of stages 1 and 2.

    Raises:
        ConfigError: the settings do not fit one another.
    """
    config.check()
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
    stages.append(_ral_cost(config, vqvae, priors, grid))
    return DryRun(grid, channels, stages)


def _vqvae_cost(config: Config, vqvae: Any, compute: Compute, processes: int) -> StageCost:
    """Stage 1: encoder, lookup and decoder, forward and backward."""
    settings, shares = config.vqvae, processes * compute.gradient_accumulation
    images = torch.empty(_share(settings.batch_size, shares), *_image_shape(vqvae), device=META)
    if not isinstance(vqvae, VQVAE):
        return _own_tokenizer_cost(config, vqvae, images, compute, shares)
    vectors = [0]
    with _without_lookup(vqvae, vectors):
        once = _count(lambda: _sum(vqvae(images)[0]))
        forward = _count(lambda: vqvae(images), backward=False)
    lookup = 2 * settings.codebook_size * settings.codebook_dim * vectors[0] // 2  # counted in two passes
    painted = sum(count for name, count in forward.by_module.items() if name in DECODER_PARTS)
    n = len(images)
    return StageCost(
        stage="1 VQ-VAE" if vqvae.levels == 1 else "1 VQ-VAE-2",
        parameters=_parameters(vqvae),
        batch_size=settings.batch_size,
        steps=settings.training_steps,
        flops_per_step=shares * (once.flops + lookup),
        memory=_trained(vqvae) + _activations(once, compute) + _lookup_memory(vqvae, n),
        parts={"encoder": (forward.flops - painted) // n, "lookup": lookup // n, "decoder": painted // n},
    )


def _with_image_losses(cost: StageCost, config: Config, vqvae: Any, compute: Compute, processes: int) -> StageCost:
    """Stage 1 with the perceptual and the adversarial loss; the discriminator's step follows the tokenizer's."""
    settings, shares = config.vqvae, processes * compute.gradient_accumulation
    n = _share(settings.batch_size, shares)
    pairs = [torch.empty(n, *_image_shape(vqvae), device=META, requires_grad=needs) for needs in (True, False)]
    flops, kept, memory, parts = 0, 0, 0, dict[str, int]()
    if settings.perceptual_weight:
        network = make_perceptual(settings.perceptual_network, weights=False)
        once = _count(lambda: network(*pairs))
        flops, kept, memory = once.flops, once.kept, _bytes(network.parameters()) + _bytes(network.buffers())
        parts["perceptual"] = _count(lambda: network(*pairs), backward=False).flops // n
    if settings.adversarial_weight:
        with META:
            judge = make_discriminator(settings, vqvae)
        frozen = _count(lambda: _sum(functional_call(judge, _fixed(judge), (pairs[0],))))
        step = _count(lambda: _sum(judge(torch.cat([pairs[1], pairs[1]]))))
        flops, memory = flops + frozen.flops + step.flops, memory + _trained(judge)
        kept = max(kept + frozen.kept, step.kept)
        parts["discriminator"] = _count(lambda: judge(pairs[1]), backward=False).flops // n
    extra = memory + _activations(_Count(kept=kept), compute)
    total = cost.flops_per_step + shares * flops
    return replace(cost, flops_per_step=total, memory=cost.memory + extra, parts=cost.parts | parts)


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
    settings, once = config.vqvae, _Count()
    learns = hasattr(tokenizer, "training_loss")
    if learns:
        try:
            once = _count(lambda: _loss(tokenizer, images))
        except Exception:  # third-party code may read values, which the meta device does not have
            once = _Count()
    return StageCost(
        stage=f"1 {type(tokenizer).__name__}",
        parameters=_parameters(tokenizer),
        batch_size=settings.batch_size if learns else len(images),
        steps=settings.training_steps if learns else 0,
        flops_per_step=shares * once.flops,
        memory=_trained(tokenizer) + _activations(once, compute),
    )


def _loss(tokenizer: Any, images: Tensor) -> Tensor:
    loss = tokenizer.training_loss(images)
    return loss[0] if isinstance(loss, tuple) else loss


def _decoding_flops(tokenizer: Any) -> int:
    """FLOPs of decoding one image; 0 if they cannot be counted on the meta device."""
    if isinstance(tokenizer, VQVAE):
        with _without_lookup(tokenizer, [0]):
            one = torch.empty(1, *_image_shape(tokenizer), device=META)
            both = _count(lambda: tokenizer(one), backward=False)
        return sum(count for name, count in both.by_module.items() if name in DECODER_PARTS)
    codes = torch.zeros(1, tokenizer.grid.n_codes, dtype=torch.int64, device=META)
    try:
        return _count(lambda: tokenizer.decode(codes), backward=False).flops
    except Exception:  # see `_own_tokenizer_cost`
        return 0


def _prior_cost(
    config: Config, prior: nn.Module, grid: CodeGrid, level: int, compute: Compute, processes: int
) -> StageCost:
    """Stage 2 of one level."""
    settings, shares = getattr(config, SECTIONS[level]), processes * compute.gradient_accumulation
    n = _share(settings.batch_size, shares)
    once = _count(lambda: _sum(_logits(prior, grid, level, n)))
    forward = _count(lambda: _logits(prior, grid, level, 1), backward=False)
    network = type(prior).__name__
    name = f"2 {network}" if grid.levels == 1 else f"2 {network} {('top', 'bottom')[level]}"
    return StageCost(
        stage=name,
        parameters=_parameters(prior),
        batch_size=settings.batch_size,
        steps=settings.training_steps,
        flops_per_step=shares * once.flops,
        memory=_trained(prior, averages=1) + _activations(once, compute),
        parts={network: forward.flops},
    )


def _ral_cost(config: Config, vqvae: Any, priors: list[nn.Module], grid: CodeGrid) -> StageCost:
    """Stage 3: whole images drawn, one pass of the policy gradient, the critic's steps if there is one."""
    ral, settings = config.ral, config.critic
    sees_features = getattr(critic_class(settings.kind), "sees", "pixels") == "features"
    features = find_features(ral.reward_features, None) if sees_features else None
    networks: Any = priors
    with META:
        patch = CriticConfig(hidden_units=settings.hidden_units, layers=settings.layers)
        critic = build_critic(
            settings if ral.uses_critic else patch,
            vqvae,
            extractor=features,
            make_prior=lambda: join_priors(networks),
            untouched=(settings,),
        )
    wanted = {"both": range(grid.levels), "top": [0], "bottom": [grid.levels - 1]}[ral.train_levels]
    tuned = [priors[level] for level in wanted]
    drawn = _count(lambda: [_logits(p, grid, level, ral.n_envs) for level, p in enumerate(priors)], backward=False)
    update = _count(lambda: _sum(*(_logits(priors[level], grid, level, ral.n_envs) for level in wanted)))
    scorer = CriticScorer(vqvae, critic, extractor=features)
    step = _critic_count(lambda: _sum(critic(_seen(scorer, 2 * settings.batch_size))))
    once = _critic_count(lambda: critic(_seen(scorer, settings.batch_size)), backward=False)
    penalised = settings.loss == "wgan_gp" and not hasattr(critic, "loss")
    critic_flops = step.flops + (PENALTY_PASSES * once.flops if penalised else 0)
    decoded = _decoding_flops(vqvae)
    scored = _critic_count(lambda: critic(_seen(scorer, 1)), backward=False).flops
    per_update = drawn.flops + update.flops + ral.n_envs * decoded
    if ral.uses_critic:
        shown = 0 if scorer.sees == "codes" else 2 * settings.batch_size * decoded
        per_update += ral.n_envs * scored + settings.n_critic * (critic_flops + shown)
    frozen = sum(_bytes(module.parameters()) for module in [vqvae, *priors])
    trained = sum(_trained(prior, averages=1) for prior in tuned) + (_trained(critic) if ral.uses_critic else 0)
    return StageCost(
        stage=f"3 RAL ({ral.algo})",
        parameters=sum(map(_parameters, tuned)),
        batch_size=ral.n_envs,
        steps=ral.n_updates,
        flops_per_step=per_update,
        memory=frozen + trained + max(update.kept, step.kept if ral.uses_critic else 0),
        parts={"drawing": drawn.flops // ral.n_envs, "decoder": decoded}
        | ({"critic": scored} if ral.uses_critic else {}),
    )


def _seen(scorer: CriticScorer, n: int) -> Tensor:
    """A critic's input for n images, on the meta device."""
    if scorer.sees == "codes":
        return torch.zeros(n, scorer.grid.n_codes, dtype=torch.int64, device=META)
    if scorer.sees == "features":
        assert scorer.extractor is not None
        return torch.empty(n, scorer.extractor.num_features, device=META)
    return torch.empty(n, *_image_shape(scorer.vqvae), device=META)


def _critic_count(run: Callable[[], Any], backward: bool = True) -> _Count:
    """Like `_count`, but zero for a critic of your own that does not run on the meta device."""
    try:
        return _count(run, backward)
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return _Count()


def _logits(prior: nn.Module, grid: CodeGrid, level: int, n: int) -> Tensor:
    """Logits of n code grids of one level, on the meta device."""
    sizes = grid.level_sizes
    codes = torch.zeros(n, sizes[level], dtype=torch.int64, device=META)
    above = torch.zeros(n, sizes[0], dtype=torch.int64, device=META) if level else None
    return logits_of(prior, codes, above)


def _count(run: Callable[[], Any], backward: bool = True) -> _Count:
    """Count one pass, and the backward pass from the scalar that it returns."""
    count, storages = _Count(), {}

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
    count.flops = counter.get_total_flops()
    count.kept = sum(size for _, size in storages.values())
    modules = counter.get_flop_counts()
    count.by_module = {
        name.partition(".")[2]: sum(counts.values()) for name, counts in modules.items() if name.count(".") == 1
    }
    return count


@contextmanager
def _without_lookup(vqvae: VQVAE, vectors: list[int]) -> Iterator[None]:
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


def _share(batch_size: int, shares: int) -> int:
    return max(1, batch_size // shares)


def _image_shape(vqvae: Tokenizer) -> tuple[int, int, int]:
    return (vqvae.channels, vqvae.image_size, vqvae.image_size)


def _sum(*tensors: Tensor) -> Tensor:
    return torch.stack([tensor.sum() for tensor in tensors]).sum()


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _trained(module: nn.Module, averages: int = 0) -> int:
    """Bytes of weights, gradients, Adam's two moments and weight averages, and of buffers."""
    return (4 + averages) * _bytes(module.parameters()) + _bytes(module.buffers())


def _activations(count: _Count, compute: Compute) -> int:
    return count.kept // (2 if compute.mixed_precision == "bf16" else 1)
