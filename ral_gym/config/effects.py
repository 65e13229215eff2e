"""Which settings have an effect only where others say so: one table, by which training says what is not read.

A setting that the user changed and that nothing reads is named at the start. One that the preset set is left alone, so
that switching (another loss, one level instead of two) needs no second flag.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

TEXT_TERMS = ("clip", "hps")
"""Built-in rewards by an image's text."""
STATELESS_TERMS = ("critic", "kid", *TEXT_TERMS)
"""Built-in rewards that keep no moments over rollouts."""
PIXEL_TERMS = ("critic", *TEXT_TERMS)
"""Built-in rewards that see no features."""
FEATURE_TERMS = ("loo_fd", "loo_fd_first_order", "loo_fd_diagonal", "kid")
"""Built-in rewards that see features."""


UNLABELLED = ("faces", "celeba", "lsun")
"""Built-in sources that give no classes."""


def may_have_classes(config: Any) -> bool:
    """Whether the images could have classes: what a source really gives is known when it is read."""
    return config.data.labels != "none" and config.data.source.partition(":")[0] not in UNLABELLED


@dataclass(frozen=True)
class Effect:
    """Settings that are read only if a condition holds.

    Attributes:
        settings: their names; a section's name stands for all of its settings.
        needs: the condition in words.
        holds: the condition, of a `Config`.
    """

    settings: str
    needs: str
    holds: Callable[[Any], bool]


def _prior_effects(section: str) -> tuple[Effect, ...]:
    prior = operator.attrgetter(section)
    return (
        Effect(
            f"{section}.attention_heads",
            f"{section}.attention_layers above 0",
            lambda config: prior(config).kind != "pixelcnn" or prior(config).attention_layers > 0,
        ),
        Effect(
            f"{section}.decay_share",
            f"{section}.learning_rate_schedule linear or cosine",
            lambda config: prior(config).learning_rate_schedule != "constant",
        ),
        Effect(
            f"{section}.scheduled_sampling_schedule {section}.scheduled_sampling_share",
            f"{section}.scheduled_sampling two_pass or sequential",
            lambda config: prior(config).scheduled_sampling != "none",
        ),
    )


EFFECTS = (
    Effect("bottom ral.train_levels ral.per_level_discount", "vqvae.levels 2", lambda config: config.vqvae.levels == 2),
    Effect(
        "bottom.augmented_passes",
        "the value of prior.augmented_passes, since both levels' codes come from the same passes",
        lambda config: config.bottom.augmented_passes == config.prior.augmented_passes,
    ),
    Effect(
        "prior.conditioning_stack_layers",
        "a condition, which only the bottom prior of two levels has (bottom.conditioning_stack_layers)",
        lambda config: config.prior.kind != "pixelcnn",
    ),
    Effect(
        "vqvae.perceptual_network", "vqvae.perceptual_weight above 0", lambda config: config.vqvae.perceptual_weight > 0
    ),
    Effect(
        "vqvae.adversarial_start vqvae.discriminator_units vqvae.discriminator_layers "
        "vqvae.discriminator_learning_rate",
        "vqvae.adversarial_weight above 0",
        lambda config: config.vqvae.adversarial_weight > 0,
    ),
    *_prior_effects("prior"),
    *_prior_effects("bottom"),
    Effect(
        "critic ral.reward ral.reward_normalization",
        "the reward critic among ral.reward_weights",
        lambda config: config.ral.uses_critic,
    ),
    Effect(
        "critic.gradient_penalty",
        "critic.loss wgan_gp",
        lambda config: config.critic.kind != "patch" or config.critic.loss == "wgan_gp",
    ),
    Effect(
        "critic.hidden_units critic.layers critic.loss critic.gradient_penalty critic.augment critic.r1 "
        "critic.r1_every critic.spectral_norm ral.reward",
        "a critic other than causal, whose network is the prior's",
        lambda config: config.critic.kind != "causal",
    ),
    Effect(
        "critic.dropout critic.weight_decay critic.max_grad_norm",
        "critic.kind causal, or a critic of your own that takes it",
        lambda config: config.critic.kind != "patch",
    ),
    Effect("critic.r1_every", "critic.r1 above 0", lambda config: config.critic.r1 > 0),
    Effect("critic.replay", "critic.fakes previous", lambda config: config.critic.fakes == "previous"),
    Effect(
        "ral.image_gamma",
        "rewards of codes and of whole images, such as those of critic.kind causal and loo_fd",
        lambda config: len(config.ral.reward_weights) > 1,
    ),
    Effect(
        "ral.reward_features",
        "a reward or a critic that sees features, such as loo_fd, among ral.reward_weights",
        lambda config: config.critic.kind != "patch" or bool(config.ral.reward_weights.keys() - set(PIXEL_TERMS)),
    ),
    Effect(
        "ral.reward_ema",
        "a reward that keeps moments, such as loo_fd, among ral.reward_weights",
        lambda config: bool(config.ral.reward_weights.keys() - set(STATELESS_TERMS)),
    ),
    Effect(
        "ral.clip_path ral.prompt",
        "the reward clip or hps, or one of your own, among ral.reward_weights",
        lambda config: bool(config.ral.reward_weights.keys() - {"critic", *FEATURE_TERMS}),
    ),
    Effect(
        "ral.hps_path",
        "the reward hps, or one of your own, among ral.reward_weights",
        lambda config: bool(config.ral.reward_weights.keys() - {"critic", "clip", *FEATURE_TERMS}),
    ),
    Effect(
        "ral.grpo.group_size",
        "ral.reset_mode continue or mixed, or images with classes: otherwise all images start alike and are one group",
        lambda config: config.ral.reset_mode in ("continue", "mixed") or may_have_classes(config),
    ),
    Effect(
        "ral.label_draw critic.class_conditional evaluation.guidance",
        "images with classes, which the source does not give or data.labels none turns off",
        lambda config: may_have_classes(config),
    ),
    Effect(
        "ral.normalize_advantage",
        "no ral.grpo.scale_advantage, which GRPO has in its place",
        lambda config: config.ral.algo != "grpo" or config.ral.grpo.scale_advantage is None,
    ),
    Effect("ral.rollout_positions", "ral.n_rollouts above 1", lambda config: config.ral.n_rollouts > 1),
    Effect("ral.guidance_log_probs", "ral.guidance other than 1", lambda config: config.ral.guidance != 1),
    Effect("data.grey", "images in colour, and faces are grey", lambda config: config.data.source != "faces"),
)
"""Every conditional setting of the built-in parts; `part_arguments` judges what a part of one's own takes."""


def without_effect(config: Any) -> Iterator[tuple[str, str]]:
    """The settings of a `Config` that nothing reads, each with what it needs."""
    for effect in EFFECTS:
        if not effect.holds(config):
            for name in effect.settings.split():
                for setting in _fields(config, name):
                    yield setting, effect.needs


def effect_notes(config: Any, base: Any) -> list[str]:
    """One line for each setting that the user changed and that nothing reads.

    Args:
        config: the settings.
        base: where they started from: a preset.
    """
    lines = []
    for name, needs in without_effect(config):
        value, before = operator.attrgetter(name)(config), operator.attrgetter(name)(base)
        if value != before:
            lines.append(f"{name} is {value}, which has no effect here: it needs {needs}")
    return list(dict.fromkeys(lines))


def _fields(config: Any, name: str) -> Iterator[str]:
    """A setting's name, or the names of all settings of a section."""
    value = operator.attrgetter(name)(config)
    if not dataclasses.is_dataclass(value):
        yield name
        return
    for field in dataclasses.fields(value):
        yield from _fields(config, f"{name}.{field.name}")
