"""The models of taming-transformers and of LlamaGen, and the recipe that tunes the latter, as presets.

Network and training are those of the projects' own configuration: CompVis/taming-transformers,
`configs/imagenet_vqgan.yaml` (K = 1024), and FoundationVision/LlamaGen, `tokenizer/tokenizer_image/vq_train.py` and
`vq_model.py`. Images are 256 x 256. What differs: their perceptual network is LPIPS, for which
`--vqvae.perceptual-network lpips:VGG16,LINEAR` takes your files (without it, `lite0`); their discriminators have batch
norm and one more layer, LlamaGen clips gradients, and taming's reconstruction loss is L1, with a weight of the
adversarial loss that follows the gradients' norms.
"""

from __future__ import annotations

from dataclasses import replace

from ral_gym.config.algorithms import GRPOConfig
from ral_gym.config.models import DataConfig, PriorConfig, VQVAEConfig
from ral_gym.config.stages import Config, RALConfig

VQGAN_F16 = VQVAEConfig(
    kind="vqgan",
    options={"multipliers": "1,1,2,2,4", "z_channels": 256},
    hidden_units=128,
    residual_blocks=2,
    codebook_size=1024,
    codebook_dim=256,
    batch_size=24,  # its learning rate is 4.5e-6 times the images per step: 3 on each of 8 GPUs
    learning_rate=1.08e-4,
    adam_beta1=0.5,
    adam_beta2=0.9,
    training_steps=500_000,  # not stated; its discriminator starts halfway
    perceptual_weight=1.0,
    adversarial_weight=0.8,
    adversarial_start=250_000,
)
"""Taming's VQGAN, 16 pixels to a code; the released file of K = 16384 differs in `codebook_size` only."""

VQ_16 = replace(
    VQGAN_F16,
    options={"multipliers": "1,1,2,2,4", "z_channels": 256, "codebook_l2_norm": True},
    codebook_size=16_384,
    codebook_dim=8,
    batch_size=128,
    learning_rate=1e-4,
    adam_beta1=0.9,
    adam_beta2=0.95,
    training_steps=400_000,  # 40 passes over the 1,281,167 images of ImageNet
    augment=True,
    adversarial_weight=0.5,
    adversarial_start=20_000,
)
"""LlamaGen's VQ-16, 16 pixels to a code. Its crops are larger than the shifts of `augment`."""

VQ_8 = replace(VQ_16, options={"multipliers": "1,2,2,4", "z_channels": 256, "codebook_l2_norm": True})
"""LlamaGen's VQ-8, 8 pixels to a code."""


# Policy-based Tuning of Autoregressive Image Models with Instance- and Distribution-Level Rewards (Baran et al., 2026,
# arXiv 2603.23086), as in its released code: 12 images of each of 12 classes, two optimizer steps per round, the
# sequence-level ratio clipped at 0.2, adaptive entropy around 0.78 ln K with its schedule, a diagonal leave-one-out FD
# of weight 2 with moments kept by half, gradient norms of at most 1, 600 updates. What differs, and why:
# * learning rate: 1e-5 is theirs for weights in bf16, of which most never move; weights are float32 here, passes bf16;
# * no guidance in the rollouts (theirs: 1.5, with plain log-probabilities), so that the policy is what is drawn from;
# * advantages are divided by the deviation of the batch, not of each group, and the surrogate is the pessimistic one;
# * the weight of the KL: theirs, 3, is of k3 of an image's mean log-ratio, which is smaller than the mean k3 of codes;
# * no weight decay: 0.01 at this rate takes 2 millionths of a weight per hundred updates.
OF_IMAGES = {"loo_fd_diagonal": 2.0}
RECIPE = RALConfig(
    algo="grpo",
    reward_weights=OF_IMAGES | {"clip": 1.0, "hps": 1.0},
    reward_features="inception",
    reward_ema=0.5,
    reset_mode="full",
    n_envs=144,
    n_updates=600,
    learning_rate=2e-6,
    adam_beta1=0.9,
    adam_beta2=0.95,
    kl_coef=0.03,
    max_grad_norm=1.0,
    checkpoint_every=50,
    ema_decay=0.99,
    grpo=GRPOConfig(
        group_size=12,
        ratio="sequence",
        clip_range=0.2,
        n_epochs=2,
        ent_coef=2.2e-3,
        entropy_target=0.78,
        entropy_schedule=True,
        batch_size=4096,  # codes per pass: 16 images of 256
        mixed_precision="bf16",
    ),
)


def _gpt(layers: int, width: int, heads: int) -> PriorConfig:
    """LlamaGen's class-conditional GPT of `autoregressive/models/gpt.py`, trained as `train_c2i.py` does."""
    return PriorConfig(
        kind="transformer",
        hidden_units=width,
        layers=layers,
        attention_heads=heads,
        dropout=0.1,
        class_dropout=0.1,
        batch_size=256,
        training_steps=1_501_000,  # 300 passes over the 1,281,167 images of ImageNet
        learning_rate=1e-4,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.05,
        ema_decay=0.9999,
        augmented_passes=10,  # its ten crops of each image
        evaluate_every=5000,
        held_out=10_000,
    )


def _run(name: str, vqvae: VQVAEConfig, prior: PriorConfig, image_size: int = 256) -> Config:
    """A preset of a tokenizer and a prior; its stage 3 is the recipe without the rewards that need files."""
    data = DataConfig(source="folder:", image_size=image_size)
    return Config(preset=name, data=data, vqvae=vqvae, prior=prior, ral=replace(RECIPE, reward_weights=OF_IMAGES))


# Taming's `configs/faceshq_transformer.yaml`.
_MINGPT = PriorConfig(kind="gpt", hidden_units=1024, layers=24, attention_heads=16, batch_size=64)
_GPT_B, _GPT_L, _GPT_XL = _gpt(12, 768, 12), _gpt(24, 1024, 16), _gpt(36, 1280, 20)

VQGAN_F16_RUN = _run("vqgan-f16", VQGAN_F16, _MINGPT)
VQ_16_RUN = _run("vq-16", VQ_16, _GPT_B)
VQ_8_RUN = _run("vq-8", VQ_8, _GPT_B)
LLAMAGEN_B = _run("llamagen-b", VQ_16, _GPT_B)
LLAMAGEN_L = _run("llamagen-l", VQ_16, _GPT_L)
LLAMAGEN_L_384 = _run("llamagen-l-384", VQ_16, _GPT_L, 384)
LLAMAGEN_XL_384 = _run("llamagen-xl-384", VQ_16, _GPT_XL, 384)
LLAMAGEN_GRPO = replace(LLAMAGEN_L, preset="llamagen-grpo", ral=RECIPE)
"""For `--start-from` a run of `ral-gym import llamagen`: LlamaGen-L, and the whole recipe."""
