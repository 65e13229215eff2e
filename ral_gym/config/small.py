"""Presets for a CPU: minutes on bundled pictures, and under an hour on real data sets."""

from __future__ import annotations

from dataclasses import replace

from ral_gym.config.algorithms import GRPOConfig
from ral_gym.config.models import DataConfig, PriorConfig, VQVAEConfig
from ral_gym.config.stages import Config, CriticConfig, EvaluationConfig, RALConfig

# The method of the paper at a CPU's size: PatchGAN critic, a plain VQ-VAE, a prior trained at one learning rate.
DEMO_PATCHGAN = Config(
    preset="demo-patchgan",
    data=DataConfig(source="faces", image_size=64),
    vqvae=VQVAEConfig(
        hidden_units=48,
        residual_units=32,
        residual_blocks=1,
        layers=3,
        codebook_size=128,
        codebook_dim=16,
        decay=0.97,
        batch_size=16,
        training_steps=1500,
        learning_rate=1e-3,
        augment=True,
    ),
    prior=PriorConfig(
        hidden_units=64,
        residual_units=64,
        layers=3,
        dropout=0.3,
        output_stack_layers=2,
        position_embedding=True,
        batch_size=64,
        training_steps=900,
        learning_rate=1e-3,
        ema_decay=0.99,
        augmented_passes=32,
        evaluate_every=50,
    ),
    # Tuned on seed 100 only. WGAN-GP at this size hardly learns (held-out AUC 0.6 after 600 steps); hinge does (0.9).
    critic=CriticConfig(
        hidden_units=16,
        layers=4,
        loss="hinge",
        learning_rate=1e-3,
        batch_size=32,
        warmup_steps=400,
        n_critic=20,
    ),
    ral=RALConfig(
        reward="intermediate",
        reset_mode="full",
        n_envs=256,
        n_updates=50,
        learning_rate=2e-4,
        gamma=0.9,
        mle_coef=0.1,
        ema_decay=0.95,
        checkpoint_every=10,
    ),
    evaluation=EvaluationConfig(n_samples=2000, temperatures=(0.75, 0.85)),
)

# What draws best in ten minutes, tuned on seed 100 only: a perceptual loss of the tokenizer, a prior whose
# learning rate falls to 0, the causal critic with leave-one-out FD, and maximum likelihood of equal time beside it.
DEMO_CONVERGED = replace(
    DEMO_PATCHGAN,
    preset="demo-converged",
    vqvae=replace(DEMO_PATCHGAN.vqvae, training_steps=736, perceptual_weight=1.0),
    prior=replace(DEMO_PATCHGAN.prior, training_steps=1100, learning_rate_schedule="linear", decay_share=0.18),
    critic=CriticConfig(
        kind="causal",
        learning_rate=5e-4,
        adam_beta1=0.9,
        adam_beta2=0.99,
        batch_size=32,
        warmup_steps=200,
        n_critic=5,
        replay=2,
    ),
    ral=RALConfig(
        reward_weights={"critic": 1.0, "loo_fd": 1.0},
        reward_features="pyramid",
        reset_mode="full",
        n_envs=256,
        n_updates=30,
        learning_rate=3e-4,
        gamma=0.95,
        image_gamma=1.0,
        mle_coef=0.3,
        ema_decay=0.95,
        checkpoint_every=10,
        equal_time_control=True,
    ),
)

# The same recipe, shortened to four minutes of two cores.
DEMO = replace(
    DEMO_CONVERGED,
    preset="demo",
    vqvae=replace(DEMO_CONVERGED.vqvae, training_steps=650),
    prior=replace(DEMO_CONVERGED.prior, training_steps=950),
    ral=replace(DEMO_CONVERGED.ral, n_updates=24),
    evaluation=EvaluationConfig(n_samples=1000, temperatures=(0.85,)),
)

# Two levels: 8 x 8 top codes and 16 x 16 bottom codes of the same faces.
DEMO_2LEVEL = replace(
    DEMO_PATCHGAN,
    preset="demo-2level",
    vqvae=replace(DEMO_PATCHGAN.vqvae, layers=2, levels=2, training_steps=1000),
    bottom=replace(
        DEMO_PATCHGAN.prior,
        hidden_units=48,
        residual_units=48,
        conditioning_stack_layers=2,
        batch_size=32,
        training_steps=400,
    ),
    ral=replace(DEMO_PATCHGAN.ral, n_envs=64, n_updates=40),
    evaluation=EvaluationConfig(n_samples=1000, temperatures=(0.85,)),
)

# One level of 16 x 16 codes; the PixelCNN has self-attention.
DEMO_ATTENTION = replace(
    DEMO_PATCHGAN,
    preset="demo-attention",
    vqvae=replace(DEMO_PATCHGAN.vqvae, layers=2, training_steps=1000),
    prior=replace(
        DEMO_PATCHGAN.prior, layers=4, attention_layers=2, attention_heads=4, batch_size=32, training_steps=400
    ),
    ral=replace(DEMO_PATCHGAN.ral, n_envs=64, n_updates=40),
    evaluation=EvaluationConfig(n_samples=1000, temperatures=(0.85,)),
)

# Ten groups of emoji, or any images with classes by --data: a transformer given the class, tuned by GRPO with
# leave-one-out FD and without a critic.
DEMO_CLASSES = Config(
    preset="demo-classes",
    data=DataConfig(source="emoji", image_size=64),
    vqvae=VQVAEConfig(
        hidden_units=64,
        residual_units=32,
        residual_blocks=1,
        layers=3,
        codebook_size=256,
        codebook_dim=16,
        decay=0.97,
        batch_size=32,
        training_steps=1500,
        learning_rate=1e-3,
        augment=True,
        perceptual_weight=1.0,
    ),
    prior=PriorConfig(
        kind="transformer",
        hidden_units=128,
        layers=4,
        attention_heads=4,
        dropout=0.2,
        batch_size=64,
        training_steps=1100,
        learning_rate=7e-4,
        learning_rate_schedule="linear",
        decay_share=0.5,
        ema_decay=0.995,
        augmented_passes=16,
        evaluate_every=100,
    ),
    ral=RALConfig(
        algo="grpo",
        reward_weights={"loo_fd": 1.0},
        reward_features="pyramid",
        reset_mode="full",
        n_envs=240,
        n_updates=30,
        learning_rate=1e-4,
        mle_coef=0.1,
        ema_decay=0.9,
        grpo=GRPOConfig(group_size=12),
    ),
    evaluation=EvaluationConfig(n_samples=1000, temperatures=(0.85,), guidance=(1.5, 2.0, 3.0)),
)

# Real data sets, the recipe of `demo-converged` but for sizes: a prior trained until little is left to gain.
DEMO_CIFAR10 = replace(
    DEMO_CONVERGED,
    preset="demo-cifar10",
    data=DataConfig(source="folder:cifar10/train", test="folder:cifar10/test", image_size=32, labels="none"),
    vqvae=replace(DEMO_CONVERGED.vqvae, layers=2, codebook_size=256, batch_size=32, training_steps=1500),
    prior=replace(
        DEMO_CONVERGED.prior,
        dropout=0.0,
        batch_size=128,
        training_steps=4000,
        decay_share=0.5,
        augmented_passes=2,
        evaluate_every=200,
    ),
    ral=replace(DEMO_CONVERGED.ral, n_updates=80),
    # The best temperatures are just below 1.
    evaluation=replace(DEMO_CONVERGED.evaluation, temperatures=(0.85, 0.95, 0.975)),
)

# CelebA at half size, 74 of whose pixels are the usual crop of 148.
DEMO_CELEBA = replace(
    DEMO_CONVERGED,
    preset="demo-celeba",
    data=DataConfig(source="celeba:celeba_half.zip", image_size=64, crop=74),
    vqvae=replace(DEMO_CONVERGED.vqvae, codebook_size=256, batch_size=32, training_steps=1500),
    prior=replace(
        DEMO_CONVERGED.prior,
        dropout=0.1,
        batch_size=128,
        training_steps=3000,
        decay_share=0.5,
        augmented_passes=8,
        evaluate_every=200,
    ),
    ral=replace(DEMO_CONVERGED.ral, n_updates=80),
    # The best temperatures are just below 1.
    evaluation=replace(DEMO_CONVERGED.evaluation, temperatures=(0.85, 0.95, 0.975)),
)

SMOKE = Config(
    preset="smoke",
    data=DataConfig(source="faces", image_size=32, limit=64),
    vqvae=VQVAEConfig(
        hidden_units=16,
        residual_units=8,
        residual_blocks=1,
        layers=3,
        codebook_size=16,
        codebook_dim=8,
        decay=0.9,
        batch_size=16,
        training_steps=20,
        learning_rate=1e-3,
    ),
    prior=PriorConfig(
        hidden_units=16,
        residual_units=16,
        layers=2,
        conv_filter_size=3,
        output_stack_layers=1,
        batch_size=16,
        training_steps=20,
        learning_rate=1e-3,
        evaluate_every=10,
    ),
    critic=CriticConfig(hidden_units=8, layers=3, learning_rate=1e-3, batch_size=8, warmup_steps=4, n_critic=2),
    ral=RALConfig(
        n_envs=8,
        n_updates=4,
        learning_rate=1e-3,
        gamma=1.0,
        mle_coef=0.1,
        checkpoint_every=2,
    ),
    evaluation=EvaluationConfig(n_samples=64, extractor="encoder", temperatures=(0.8, 0.9)),
)
