"""The largest sizes that settings may ask for: config.json may come from anywhere, and memory must have an end."""

from __future__ import annotations

from typing import Any

from ral_gym.errors import ConfigError

SIZES: dict[int, str] = {
    16: "vqvae.layers critic.layers",
    1_000: """
        vqvae.residual_blocks prior.layers prior.attention_layers prior.attention_heads prior.output_stack_layers
        prior.conditioning_stack_layers prior.augmented_passes data.workers
        """,
    16_384: """
        vqvae.hidden_units vqvae.residual_units vqvae.codebook_dim prior.hidden_units prior.residual_units
        critic.hidden_units data.image_size data.crop
        """,
    255: "vqvae.encoder_filter_size vqvae.decoder_filter_size prior.conv_filter_size",
    1_000_000: """
        vqvae.batch_size prior.batch_size critic.batch_size ral.n_envs critic.n_critic evaluation.n_samples
        vqvae.threshold_ema_dead_code
        """,
    1_000_000_000: """
        vqvae.training_steps prior.training_steps prior.evaluate_every ral.n_updates ral.checkpoint_every
        critic.warmup_steps data.limit data.memory_budget_mb
        """,
}
"""The largest size -> the settings that it holds for."""


def both_priors(names: str) -> tuple[str, ...]:
    """Names of settings; those of the prior are those of the bottom one too."""
    given = names.split()
    return (*given, *(name.replace("prior.", "bottom.") for name in given if name.startswith("prior.")))


def check_sizes(config: Any) -> None:
    """Refuse sizes of a `Config` that nothing could be built with.

    Raises:
        ConfigError: which one, and the largest that is allowed.
    """
    for most, names in SIZES.items():
        for name in both_priors(names):
            section, _, field_name = name.rpartition(".")
            value = getattr(getattr(config, section), field_name)
            if value is not None and value > most:
                raise ConfigError(f"{name} is {value}: give at most {most}")
