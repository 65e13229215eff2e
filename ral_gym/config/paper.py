"""The settings of the paper's tables, under the names that `ral_gym.presets` gives them."""

from __future__ import annotations

from dataclasses import replace

from ral_gym.config.algorithms import ReinforceConfig
from ral_gym.config.models import DataConfig, PriorConfig, VQVAEConfig
from ral_gym.config.stages import Config, CriticConfig, EvaluationConfig, RALConfig

CELEBA64 = Config(
    preset="celeba64",
    data=DataConfig(image_size=64),
    # The supplement's Table 4c.
    vqvae=VQVAEConfig(
        hidden_units=128,
        residual_units=64,
        layers=3,
        codebook_size=128,
        codebook_dim=64,
        beta=0.25,
        encoder_filter_size=3,
        decoder_filter_size=4,
        batch_size=128,
        training_steps=156_250,
    ),
    # Table 4b.
    prior=PriorConfig(
        hidden_units=128,
        residual_units=128,
        layers=5,
        conv_filter_size=5,
        dropout=0.1,
        output_stack_layers=5,
        batch_size=1024,
        training_steps=19_531,
        evaluate_every=200,
    ),
    # Section 4.4. The map's side at 64 x 64 is not stated; 4 x 4 is the best one for the single reward (Table 3b).
    critic=CriticConfig(
        layers=4,
        learning_rate=1e-4,
        adam_beta1=0.5,
        adam_beta2=0.999,
        gradient_penalty=10.0,
        batch_size=16,
        warmup_steps=100,
        n_critic=5,
    ),
    # Section 4.4; the number of updates is not stated.
    ral=RALConfig(
        algo="reinforce",
        reward="single",
        reward_normalization="max_abs",
        reset_mode="mixed",
        n_envs=16,
        n_updates=5_000,
        learning_rate=4e-6,
        adam_beta1=0.5,
        adam_beta2=0.999,
        gamma=0.99,
        reinforce=ReinforceConfig(baseline="none"),
        normalize_advantage=False,
        checkpoint_every=100,
        ema_decay=0.999,
    ),
    evaluation=EvaluationConfig(n_samples=10_000),
)

# Table 4a: the oracle, the network that plays the role of the data where true likelihoods are needed.
CELEBA64_ORACLE = replace(
    CELEBA64,
    preset="celeba64-oracle",
    prior=replace(CELEBA64.prior, hidden_units=256, residual_units=256, training_steps=90_039),
)

# Settings that Tables 5 to 10 share. Evaluating 20 layers on thousands of held-out codes takes a while.
_LARGE_VQVAE = replace(CELEBA64.vqvae, codebook_size=512)
_LARGE_PRIOR = replace(CELEBA64.prior, hidden_units=512, residual_units=512, layers=20, evaluate_every=1000)
_ATTENTION_PRIOR = replace(_LARGE_PRIOR, batch_size=480, attention_layers=8, output_stack_layers=20)


def _paper(
    name: str, source: str, image_size: int, vqvae: VQVAEConfig, prior: PriorConfig, bottom: PriorConfig | None = None
) -> Config:
    """A preset of the supplement's tables; unstated settings are those of 64 x 64.

    The critic has as many layers as leave a score map of 4 x 4, the best one for the single reward (Table 3b); 5 at 128
    x 128, as in Section 5.1. The source has no path: give it with `--data`.
    """
    return replace(
        CELEBA64,
        preset=name,
        data=DataConfig(source=f"{source}:", image_size=image_size),
        vqvae=vqvae,
        prior=prior,
        bottom=bottom or PriorConfig(),
        critic=replace(CELEBA64.critic, layers=(image_size // 4).bit_length() - 1),
    )


# Table 5.
LSUN64_8X8 = _paper(
    "lsun64-8x8",
    "lsun",
    64,
    replace(_LARGE_VQVAE, layers=3, training_steps=234_375),
    replace(_LARGE_PRIOR, batch_size=1536, output_stack_layers=5, training_steps=97_656),
)

# Table 6.
LSUN64_16X16 = _paper(
    "lsun64-16x16",
    "lsun",
    64,
    replace(_LARGE_VQVAE, layers=2, training_steps=234_375),
    replace(_ATTENTION_PRIOR, training_steps=31_250),
)

# Table 7.
CELEBA128_16X16 = _paper(
    "celeba128-16x16",
    "celeba",
    128,
    replace(_LARGE_VQVAE, layers=3, training_steps=156_250),
    replace(_ATTENTION_PRIOR, training_steps=41_666),
)
LSUN128_16X16 = replace(CELEBA128_16X16, preset="lsun128-16x16", data=DataConfig(source="lsun:", image_size=128))

# Tables 8 to 10. Their part b has one row "Conditioning Output stack layers 20", which merges two rows of VQ-VAE-2's
# own table, "conditioning stack residual blocks" and "output stack layers": both are 20 here.
_BOTTOM_PRIOR = replace(
    _LARGE_PRIOR, batch_size=128, attention_layers=0, output_stack_layers=20, conditioning_stack_layers=20
)
_NARROW_BOTTOM_PRIOR = replace(_BOTTOM_PRIOR, hidden_units=128, residual_units=128, layers=16)

# Table 8.
CELEBA128 = _paper(
    "celeba128",
    "celeba",
    128,
    replace(_LARGE_VQVAE, layers=2, levels=2, training_steps=156_250),
    replace(_ATTENTION_PRIOR, training_steps=166_664),
    replace(_BOTTOM_PRIOR, training_steps=156_250),
)
LSUN128 = replace(CELEBA128, preset="lsun128", data=DataConfig(source="lsun:", image_size=128))

# Table 9.
CELEBA256 = _paper(
    "celeba256",
    "celeba",
    256,
    replace(_LARGE_VQVAE, layers=2, levels=2, training_steps=156_250),
    replace(_LARGE_PRIOR, batch_size=128, output_stack_layers=20, training_steps=187_500),
    replace(_NARROW_BOTTOM_PRIOR, training_steps=125_000),
)

# Table 10; the images are a folder of 512 x 512 files.
CELEBAHQ512 = _paper(
    "celebahq512",
    "folder",
    512,
    replace(_LARGE_VQVAE, layers=3, levels=2, training_steps=23_437),
    replace(_LARGE_PRIOR, batch_size=128, output_stack_layers=20, training_steps=20_625),
    replace(_NARROW_BOTTOM_PRIOR, training_steps=42_187),
)
