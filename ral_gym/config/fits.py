"""Which settings fit one another: what a later stage would refuse is refused before the first."""

from __future__ import annotations

from typing import Any

from ral_gym.config.effects import FEATURE_TERMS
from ral_gym.errors import ConfigError

LITE0_PIXELS = 16
"""The smallest images that the extractor lite0 takes: its last convolutions are larger than what is left of others."""


def check_fits(config: Any) -> None:
    """Refuse settings of a `Config` that contradict one another.

    Raises:
        ConfigError: which one, its value, and what it has to fit.
    """
    _check_sides(config)
    _check_small_images(config)
    _check_attention(config)
    _check_image_losses(config)
    _check_rewards(config)
    _check_critic(config)
    _check_all_actions(config)
    _check_rollouts(config.ral)


def _check_sides(config: Any) -> None:
    """Refuse strided convolutions that do not divide the image's side."""
    # Of a tokenizer of one's own only the tokenizer knows what fits it.
    sides = [("vqvae.layers", config.vqvae.layers, config.strided_layers)] if config.vqvae.kind == "vqvae" else []
    if config.vqvae.adversarial_weight:
        layers = config.vqvae.discriminator_layers
        sides += [("vqvae.discriminator_layers", layers, layers)]
    if config.critic.kind == "patch":
        sides += [("critic.layers", config.critic.layers, config.critic.layers)]
    for name, value, layers in sides:
        if config.data.image_size % 2**layers:
            levels = " (one for the second level)" if layers > value else ""
            raise ConfigError(
                f"{name} is {value}{levels}: data.image_size {config.data.image_size} must be a multiple of "
                f"2**{layers}; change one of them"
            )


def _check_small_images(config: Any) -> None:
    """Refuse images, and grids of one level or one code, that stage 3 or the evaluation would refuse, after hours."""
    if config.vqvae.levels == 1 and config.ral.train_levels != "both":
        raise ConfigError(
            f"ral.train_levels is {config.ral.train_levels}, but vqvae.levels is 1: give both, or vqvae.levels 2"
        )
    if config.vqvae.levels == 1 and config.vqvae.kind == "vqvae" and config.grid_size * config.ral.n_envs == 1:
        raise ConfigError(
            "ral.n_envs is 1, and an image is one code: an update on one code has nothing to compare it with; give "
            "ral.n_envs 2 or more, larger images or fewer vqvae.layers"
        )
    if config.ral.reset_mode in ("continue", "mixed") and config.grid_size < 2:
        raise ConfigError(
            f"ral.reset_mode is {config.ral.reset_mode}, but {config.data.image_size} pixels give one row of codes, "
            "which cannot be continued: give ral.reset_mode full, larger images or fewer vqvae.layers"
        )
    small = config.data.image_size < LITE0_PIXELS
    for name, value in (
        ("evaluation.extractor", config.evaluation.extractor),
        ("ral.reward_features", config.ral.reward_features),
    ):
        if value == "lite0" and small:
            raise ConfigError(
                f"{name} lite0 needs images of {LITE0_PIXELS} pixels or more, data.image_size is "
                f"{config.data.image_size}: give larger images, or {name} encoder"
            )


def _check_attention(config: Any) -> None:
    """Refuse attention that does not fit the prior's network."""
    for name, prior in (("prior", config.prior), ("bottom", config.bottom)):
        if prior.attention_layers > prior.layers:
            raise ConfigError(
                f"{name}.attention_layers is {prior.attention_layers}: give at most {name}.layers, {prior.layers}"
            )
        if prior.attention_layers and prior.hidden_units % prior.attention_heads:
            raise ConfigError(
                f"{name}.attention_heads is {prior.attention_heads}: it must divide {name}.hidden_units, "
                f"{prior.hidden_units}; change one of them"
            )


def _check_image_losses(config: Any) -> None:
    """Refuse a network of the perceptual loss that there is none of, and an adversarial loss that never begins."""
    vqvae = config.vqvae
    if vqvae.perceptual_network != "lite0" and not 1 <= len(lpips_files(vqvae.perceptual_network)) <= 2:
        raise ConfigError(
            f"vqvae.perceptual_network is {vqvae.perceptual_network!r}: give lite0, lpips:VGG16,LINEAR with the files "
            "of VGG16 and of LPIPS' linear weights, or lpips:FILE with both in one"
        )
    if vqvae.perceptual_weight and config.data.image_size < LITE0_PIXELS:
        raise ConfigError(
            f"vqvae.perceptual_weight is {vqvae.perceptual_weight}: its networks need images of {LITE0_PIXELS} pixels "
            f"or more, data.image_size is {config.data.image_size}; give larger images, or weight 0"
        )
    if vqvae.adversarial_weight and vqvae.adversarial_start >= vqvae.training_steps:
        raise ConfigError(
            f"vqvae.adversarial_start is {vqvae.adversarial_start}: the adversarial loss would never begin in "
            f"{vqvae.training_steps} vqvae.training_steps; give a smaller one, or vqvae.adversarial_weight 0"
        )


def lpips_files(network: str) -> list[str]:
    """The files that `vqvae.perceptual_network` names after ``lpips:``; none if it names no LPIPS."""
    kind, _, files = network.partition(":")
    return [file for file in files.split(",") if file.strip()] if kind == "lpips" else []


def check_reward_files(ral: Any) -> None:
    """Refuse rewards without the files that they need.

    Raises:
        ConfigError: the setting that names the file.
    """
    for reward, names in (("clip", ("clip_path",)), ("hps", ("clip_path", "hps_path"))):
        for name in names:
            if reward in ral.reward_weights and getattr(ral, name) is None:
                raise ConfigError(f"the reward {reward} needs ral.{name}: give --ral.{name.replace('_', '-')}")


def _check_rewards(config: Any) -> None:
    """Refuse statistics of whole images where episodes stop early."""
    ral = config.ral
    if ral.reward_reference is not None and ral.reset_mode in ("scratch", "mixed"):
        raise ConfigError(
            f"ral.reward_reference has statistics of whole images, but ral.reset_mode is {ral.reset_mode}, which stops "
            "some early: give ral.reset_mode full or continue"
        )


def _check_all_actions(config: Any) -> None:
    """Refuse a sum over all codes where no critic scores them."""
    ral, kind = config.ral, config.critic.kind
    if ral.algo == "reinforce" and ral.reinforce.all_actions and not (ral.uses_critic and kind != "patch"):
        found = (
            f"critic.kind is {kind}"
            if ral.uses_critic
            else f"ral.reward_weights has none ({' '.join(ral.reward_weights)})"
        )
        raise ConfigError(
            f"ral.reinforce.all_actions needs a critic that scores every code that could be drawn, but {found}: give "
            "critic.kind causal, or leave all_actions out"
        )


def _check_critic(config: Any) -> None:
    """Refuse two penalties of a critic's slope that contradict each other, and changed pixels where there are none."""
    critic = config.critic
    if not config.ral.uses_critic:
        return
    if critic.kind == "causal" and critic.augment:
        raise ConfigError(
            f"critic.augment is {' '.join(critic.augment)}, which changes pixels, but critic.kind causal sees codes: "
            "leave critic.augment out, or give critic.kind patch"
        )
    if critic.kind != "causal" and critic.loss == "wgan_gp" and critic.r1:
        raise ConfigError(
            f"critic.r1 is {critic.r1:g}, which asks for slopes of 0 on real images, but critic.loss is wgan_gp, whose "
            "penalty asks for slopes of 1: give critic.loss hinge, or critic.r1 0"
        )


def _check_rollouts(ral: Any) -> None:
    """Refuse roll-outs of rewards that no single image has as a whole."""
    if ral.n_rollouts == 1:
        return
    if ral.reward == "intermediate" and ral.uses_critic:
        raise ConfigError(
            f"ral.n_rollouts is {ral.n_rollouts}, but ral.reward intermediate pays every code: give ral.reward single, "
            "or ral.n_rollouts 1"
        )
    if compared := [name for name in ral.reward_weights if name in FEATURE_TERMS]:
        raise ConfigError(
            f"ral.n_rollouts is {ral.n_rollouts}, but the reward {compared[0]} compares sets of images, and a "
            "completion is one image: leave it out, or give ral.n_rollouts 1"
        )
