"""The cost of stage 3: whole images drawn, rewarded, and passes of the policy gradient over them.

| what | FLOPs per update | memory |
|---|---|---|
| drawing | one forward pass of each image (two with guidance), again for a critic's fresh fakes | the sampler's cache |
| the update | forward and backward of each image per epoch | weights, gradients, Adam, averages; a part's activations |
| bf16 | one forward pass more, for the log-probabilities before the update | half the activations |
| the KL's reference | a forward pass per epoch | its weights |
| rewards | decoding, and their networks | those networks, and the features' |
| roll-outs | per completion half a drawing, decoding and the rewards | part of the sampler's cache |
| the critic | its steps, with the images shown | weights, gradients, Adam, one step's activations |

A single pass covers `batch_size` codes where the algorithm has that setting, else the whole round. Several processes
share the images of a pass, of drawing and of the critic; all hold all weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ral_gym.commands.counting import (
    META,
    Count,
    StageCost,
    bytes_of,
    count,
    decoding_flops,
    image_shape,
    logits_on_meta,
    parameters_of,
    sum_of,
    trained_bytes,
)
from ral_gym.config import Config
from ral_gym.config.effects import FEATURE_TERMS
from ral_gym.grid import CodeGrid
from ral_gym.metrics.features import Lite0Features, lite0_network
from ral_gym.priors.two_level import join_priors
from ral_gym.rewards.cost import reward_cost
from ral_gym.rewards.making import build_critic, critic_class
from ral_gym.rewards.scorer import CriticScorer, find_features

PENALTY_PASSES = 6
"""Cost of a gradient penalty in forward passes: one forward, one to the image, and twice each for their gradients."""
PENALTY_KEPT = 1.5
"""What a penalty of gradients keeps, in activations of a forward pass: that pass, and its gradient's (measured)."""
INCEPTION = (11_400_000_000, 4 * 23_900_000)
"""FID's Inception-v3 at 299 x 299: FLOPs of one image and bytes, from its published multiply-adds and weights."""


def ral_cost(config: Config, vqvae: Any, priors: list[nn.Module], grid: CodeGrid, processes: int = 1) -> StageCost:
    """Stage 3 of a configuration on so many processes; its networks are on the meta device."""
    ral = config.ral
    wanted = {"both": range(grid.levels), "top": [0], "bottom": [grid.levels - 1]}[ral.train_levels]
    drawn = count(lambda: [logits_on_meta(p, grid, i, 1) for i, p in enumerate(priors)], backward=False).flops
    drawn *= 1 if ral.guidance == 1 else 2
    flops, kept = _update(config, priors, grid, wanted, processes)
    learnt, rounds = sum(bytes_of(priors[level].parameters()) for level in wanted), 1
    sent = _optimizer_steps(config, grid) * learnt
    decoded, n = decoding_flops(vqvae), ral.n_envs
    frozen = sum(bytes_of(module.parameters()) for module in [vqvae, *priors])
    trained = sum(trained_bytes(priors[level], averages=1) for level in wanted)
    parts = {"drawing": drawn, "decoder": decoded}
    if ral.kl_coef:
        frozen += sum(bytes_of(priors[level].parameters()) for level in wanted)
    for name, (work, memory) in _reward_networks(config).items():
        parts[name] = work
        frozen += memory
    if ral.uses_critic:
        steps, parts["critic"], memory, most, summed = _critic(config, vqvae, priors, decoded, processes)
        rounds += config.critic.fakes == "fresh"
        flops, trained, kept = flops + steps + (rounds - 1) * n * drawn, trained + memory, max(kept, most)
        sent += config.critic.n_critic * summed
    completions = n * (ral.n_rollouts - 1) * min(ral.rollout_positions, grid.n_codes - 1)  # on average half an image
    weights = sum(size * bytes_of(prior.parameters()) for size, prior in zip(grid.level_sizes, priors, strict=True))
    share = -(-n // processes)
    flops += n * sum(parts.values()) + completions * (sum(parts.values()) - drawn + drawn // 2)
    return StageCost(
        stage=f"3 RAL ({ral.algo})",
        parameters=sum(parameters_of(priors[level]) for level in wanted),
        batch_size=n,
        steps=ral.n_updates,
        flops_per_step=flops,
        memory=frozen + trained + max(kept, _cache_bytes(priors, share if ral.guidance == 1 else 2 * share)),
        parts=parts,
        sent=sent,
        codes=n * grid.n_codes,
        drawing_flops=(rounds * n + completions // 2) * drawn,
        read=rounds * weights,
    )


def _optimizer_steps(config: Config, grid: CodeGrid) -> int:
    """Steps of an update: one per epoch, and in SB3's algorithms with minibatches one for each of these."""
    section = getattr(config.ral, config.ral.algo, None)
    epochs, codes = getattr(section, "n_epochs", 1), getattr(section, "batch_size", None)
    if codes is None or config.ral.algo in ("reinforce", "grpo"):
        return epochs
    return epochs * -(-config.ral.n_envs // max(1, codes // grid.n_codes))


def _update(config: Config, priors: list[nn.Module], grid: CodeGrid, wanted: Any, processes: int) -> tuple[int, int]:
    """FLOPs of an update's passes over all images, and the bytes that one part of them keeps."""
    ral = config.ral
    section = getattr(ral, ral.algo, None)
    epochs, half = getattr(section, "n_epochs", 1), getattr(section, "mixed_precision", "no") == "bf16"
    codes = getattr(section, "batch_size", None)
    part = ral.n_envs if codes is None else min(ral.n_envs, max(1, codes // grid.n_codes))
    part = max(1, min(part, ral.n_envs // processes))
    passes = 1 if ral.guidance == 1 or ral.guidance_log_probs == "plain" else 2
    both = count(lambda: sum_of(*(logits_on_meta(priors[level], grid, level, part) for level in wanted)))
    forward = count(lambda: [logits_on_meta(priors[i], grid, i, 1) for i in wanted], backward=False).flops
    once_more = int(half) + (epochs if ral.kl_coef else 0)
    flops = passes * (epochs * both.flops * ral.n_envs // part + once_more * forward * ral.n_envs)
    return flops, passes * both.kept // (2 if half else 1)


def _reward_networks(config: Config) -> dict[str, tuple[int, int]]:
    """The networks behind the rewards of `ral.reward_weights`: FLOPs of one image, and bytes.

    Features of the tokenizer's encoder, of a pyramid and of your own are left out.
    """
    found = {cost.reward: (cost.flops, cost.memory) for cost in reward_cost(config)}
    features = config.ral.reward_features
    if set(config.ral.reward_weights) & set(FEATURE_TERMS) and features in ("inception", "lite0"):
        found[features] = INCEPTION if features == "inception" else _lite0(config.data.image_size)
    return found


def _lite0(side: int) -> tuple[int, int]:
    """FLOPs of one image and bytes of the layers of EfficientNet-Lite0 that `lite0` runs."""
    with META:
        network = lite0_network("the features lite0", weights=False).eval()
        layers = nn.Sequential(network._conv_stem, network._bn0, *network._blocks[: Lite0Features.blocks])
        image = torch.empty(1, 3, side, side)
    return count(lambda: layers(image), backward=False).flops, bytes_of(layers.parameters())


def _critic(
    config: Config, vqvae: Any, priors: list[nn.Module], decoded: int, processes: int
) -> tuple[int, int, int, int, int]:
    """FLOPs of the critic's steps of an update, of scoring an image; bytes it holds, a step keeps, and of gradients."""
    settings = config.critic
    sees_features = getattr(critic_class(settings.kind), "sees", "pixels") == "features"
    features = find_features(config.ral.reward_features, None) if sees_features else None
    networks: Any = priors
    with META:
        critic = build_critic(
            settings,
            vqvae,
            extractor=features,
            make_prior=lambda: join_priors(networks),
            untouched=(settings,),
        )
    scorer = CriticScorer(vqvae, critic, extractor=features)
    step = _critic_count(lambda: sum_of(critic(_seen(scorer, 2 * settings.batch_size))))
    once = _critic_count(lambda: critic(_seen(scorer, settings.batch_size)), backward=False)
    penalties = 0.0  # per step
    if not hasattr(critic, "loss"):
        penalties = 1.0 if settings.loss == "wgan_gp" else (settings.r1 > 0) / settings.r1_every
    flops = step.flops + round(penalties * PENALTY_PASSES * once.flops)
    flops += 0 if scorer.sees == "codes" else 2 * settings.batch_size * decoded
    scored = _critic_count(lambda: critic(_seen(scorer, 1)), backward=False).flops
    kept = step.kept + round((penalties > 0) * PENALTY_KEPT * step.kept / 2)  # on half of the images
    gradients = bytes_of(critic.parameters())
    return settings.n_critic * flops, scored, trained_bytes(critic), kept // processes, gradients


def _seen(scorer: CriticScorer, n: int) -> Tensor:
    """A critic's input for n images, on the meta device."""
    if scorer.sees == "codes":
        return torch.zeros(n, scorer.grid.n_codes, dtype=torch.int64, device=META)
    if scorer.sees == "features":
        assert scorer.extractor is not None
        return torch.empty(n, scorer.extractor.num_features, device=META)
    return torch.empty(n, *image_shape(scorer.vqvae), device=META)


def _critic_count(run: Callable[[], Any], backward: bool = True) -> Count:
    """Like `count`, but zero for a critic of your own that does not run on the meta device."""
    try:
        return count(run, backward)
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return Count()


def _cache_bytes(priors: list[nn.Module], n: int) -> int:
    """What a sampler keeps for n images: of the level that keeps most; 0 where the meta device has no such cache."""
    most, networks = 0, list[Any](priors)
    for prior in networks:
        if hasattr(prior, "pack"):
            try:
                cache = prior.pack().make_cache(n)
            except (NotImplementedError, RuntimeError, TypeError, ValueError):
                continue
            most = max(most, bytes_of(value for value in vars(cache).values() if isinstance(value, Tensor)))
    return most
