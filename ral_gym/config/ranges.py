"""The allowed range of every setting, in words and as a test, and largest sizes, since files are untrusted."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

from ral_gym.errors import ConfigError

_Rule = tuple[str, Callable[[float], bool]]
_COUNT: _Rule = ("an integer of 1 or more", lambda value: value >= 1)
_NOT_NEGATIVE: _Rule = ("0 or more", lambda value: 0 <= value < math.inf)
_POSITIVE: _Rule = ("a number above 0", lambda value: 0 < value < math.inf)
_SHARE: _Rule = ("at least 0 and below 1", lambda value: 0 <= value < 1)
_NAMES: dict[_Rule, str] = {
    _COUNT: """
        vqvae.residual_units vqvae.layers vqvae.codebook_dim vqvae.batch_size vqvae.training_steps
        vqvae.discriminator_units vqvae.discriminator_layers
        prior.hidden_units prior.residual_units prior.layers prior.batch_size prior.training_steps
        prior.attention_heads prior.augmented_passes prior.patience prior.evaluate_every prior.held_out
        evaluation.held_out evaluation.sampling_seeds
        data.crop data.limit data.max_megapixels data.max_file_mb data.max_files
        critic.hidden_units critic.layers critic.batch_size critic.replay critic.r1_every
        ral.n_envs ral.n_updates ral.checkpoint_every ral.n_rollouts ral.rollout_positions
        ral.grpo.n_epochs ral.ppo.n_epochs ral.maskable_ppo.n_epochs ral.reinforce.batch_size ral.grpo.batch_size
        ral.trpo.n_critic_updates ral.trpo.cg_max_steps ral.trpo.line_search_max_iter ral.trpo.sub_sampling_factor
        """,
    _NOT_NEGATIVE: """
        data.test_limit data.workers data.memory_budget_mb data.cache_mb
        vqvae.residual_blocks vqvae.beta vqvae.threshold_ema_dead_code prior.output_stack_layers
        vqvae.perceptual_weight vqvae.adversarial_weight vqvae.adversarial_start
        prior.attention_layers prior.conditioning_stack_layers prior.weight_decay
        critic.gradient_penalty critic.r1 critic.weight_decay critic.warmup_steps critic.n_critic critic.held_out
        ral.mle_coef ral.kl_coef ral.guidance
        ral.reinforce.ent_coef ral.grpo.ent_coef ral.ppo.ent_coef ral.a2c.ent_coef ral.maskable_ppo.ent_coef
        ral.reinforce.vf_coef ral.ppo.vf_coef ral.a2c.vf_coef ral.maskable_ppo.vf_coef ral.trpo.cg_damping
        """,
    _POSITIVE: """
        vqvae.learning_rate vqvae.discriminator_learning_rate
        prior.learning_rate critic.learning_rate critic.max_grad_norm ral.learning_rate ral.max_grad_norm
        evaluation.temperatures evaluation.guidance
        ral.grpo.clip_range ral.ppo.clip_range ral.maskable_ppo.clip_range
        ral.grpo.target_kl ral.ppo.target_kl ral.maskable_ppo.target_kl ral.trpo.target_kl
        """,
    _SHARE: """
        vqvae.decay vqvae.adam_beta1 vqvae.adam_beta2
        prior.dropout prior.class_dropout prior.adam_beta1 prior.adam_beta2 prior.ema_decay
        critic.adam_beta1 critic.adam_beta2 critic.dropout
        ral.adam_beta1 ral.adam_beta2 ral.ema_decay ral.reward_ema
        """,
    ("above 0 and at most 1", lambda value: 0 < value <= 1): "prior.decay_share",
    ("at least 0 and at most 1", lambda value: 0 <= value <= 1): """
        ral.gamma ral.image_gamma prior.scheduled_sampling_share
        ral.ppo.gae_lambda ral.a2c.gae_lambda ral.trpo.gae_lambda ral.maskable_ppo.gae_lambda
        ral.reinforce.entropy_target ral.grpo.entropy_target ral.ppo.entropy_target ral.a2c.entropy_target
        ral.maskable_ppo.entropy_target
        """,
    ("1 or 2", lambda value: value in (1, 2)): "vqvae.levels",
    ("8 or more", lambda value: value >= 8): "data.image_size",
    ("2 or more", lambda value: value >= 2): """
        vqvae.hidden_units ral.grpo.group_size ral.ppo.batch_size ral.maskable_ppo.batch_size ral.trpo.batch_size
        """,
    ("2 to 32766, so that codes fit 16 bits", lambda value: 2 <= value <= 32_766): "vqvae.codebook_size",
    ("an odd number", lambda value: value >= 1 and value % 2 == 1): "vqvae.encoder_filter_size",
    ("an even number of 2 or more", lambda value: value >= 2 and value % 2 == 0): "vqvae.decoder_filter_size",
    ("an odd number of 3 or more", lambda value: value >= 3 and value % 2 == 1): "prior.conv_filter_size",
    ("12 or more, two halves that KID can compare", lambda value: value >= 12): "evaluation.n_samples",
    ("0 to 4000000, since numpy's seeds have 32 bits", lambda value: 0 <= value <= 4_000_000): "seed",
}


def both_priors(names: str) -> tuple[str, ...]:
    """Names of settings; those of the prior are repeated for the bottom prior."""
    given = names.split()
    return (*given, *(name.replace("prior.", "bottom.") for name in given if name.startswith("prior.")))


RANGES: dict[_Rule, tuple[str, ...]] = {rule: both_priors(names) for rule, names in _NAMES.items()}
"""A rule (in words, and as a test) -> the settings that it applies to, those of both priors included."""

SIZES: dict[int, str] = {
    16: "vqvae.layers vqvae.discriminator_layers critic.layers",
    1_000: """
        vqvae.residual_blocks prior.layers prior.attention_layers prior.attention_heads prior.output_stack_layers
        prior.conditioning_stack_layers prior.augmented_passes data.workers evaluation.sampling_seeds
        """,
    16_384: """
        vqvae.hidden_units vqvae.residual_units vqvae.codebook_dim prior.hidden_units prior.residual_units
        critic.hidden_units data.image_size data.crop vqvae.discriminator_units
        """,
    255: "vqvae.encoder_filter_size vqvae.decoder_filter_size prior.conv_filter_size",
    1_000_000: """
        vqvae.batch_size prior.batch_size critic.batch_size ral.n_envs critic.n_critic critic.replay
        evaluation.n_samples ral.n_rollouts ral.rollout_positions
        ral.grpo.group_size ral.grpo.n_epochs ral.ppo.n_epochs ral.maskable_ppo.n_epochs ral.trpo.n_critic_updates
        ral.trpo.cg_max_steps ral.trpo.line_search_max_iter ral.trpo.sub_sampling_factor
        vqvae.threshold_ema_dead_code
        """,
    1_000_000_000: """
        vqvae.training_steps vqvae.adversarial_start
        prior.training_steps prior.evaluate_every ral.n_updates ral.checkpoint_every
        prior.patience prior.held_out evaluation.held_out
        critic.warmup_steps critic.r1_every critic.held_out data.limit data.test_limit data.memory_budget_mb
        data.cache_mb data.max_megapixels data.max_file_mb data.max_files
        ral.reinforce.batch_size ral.grpo.batch_size ral.ppo.batch_size ral.maskable_ppo.batch_size ral.trpo.batch_size
        """,
}
"""The largest size -> the settings that it applies to."""


def check_ranges(config: Any) -> None:
    """Refuse numbers of a `Config` that are out of their range; None and text are left alone.

    Raises:
        ConfigError: which setting, its value, and what is allowed.
    """
    for (allowed, holds), names in RANGES.items():
        for name in names:
            value = operator.attrgetter(name)(config)
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int | float) and not holds(number):
                    raise ConfigError(f"{name} is {number}: give {allowed}")


def check_sizes(config: Any) -> None:
    """Refuse sizes of a `Config` that no model could be built with.

    Raises:
        ConfigError: which one, and the largest that is allowed.
    """
    for most, names in SIZES.items():
        for name in both_priors(names):
            value = operator.attrgetter(name)(config)
            if value is not None and value > most:
                raise ConfigError(f"{name} is {value}: give at most {most}")
