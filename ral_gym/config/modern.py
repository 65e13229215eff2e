"""The tokenizers of taming-transformers and of LlamaGen, under the names that `ral_gym.presets` gives them.

Network and training are those of the projects' own configuration: CompVis/taming-transformers,
`configs/imagenet_vqgan.yaml` (K = 1024), and FoundationVision/LlamaGen, `tokenizer/tokenizer_image/vq_train.py` and
`vq_model.py`. Images are 256 x 256. What differs: their perceptual network is LPIPS, for which
`--vqvae.perceptual-network lpips:VGG16,LINEAR` takes your files (without it, `lite0`); their discriminators have batch
norm and one more layer, LlamaGen clips gradients, and taming's reconstruction loss is L1, with a weight of the
adversarial loss that follows the gradients' norms.
"""

from __future__ import annotations

from dataclasses import replace

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


def _tokenizer(name: str, vqvae: VQVAEConfig, prior: PriorConfig) -> Config:
    """A preset for training a tokenizer (`--stages vqvae`), with a prior of the same project behind it."""
    return Config(
        preset=name,
        data=DataConfig(source="folder:", image_size=256),
        vqvae=vqvae,
        prior=prior,
        ral=RALConfig(algo="grpo", reset_mode="full"),
    )


# Taming's `configs/faceshq_transformer.yaml`.
_MINGPT = PriorConfig(kind="gpt", hidden_units=1024, layers=24, attention_heads=16, batch_size=64)
# LlamaGen-B of `autoregressive/models/gpt.py`.
_GPT_B = PriorConfig(kind="transformer", hidden_units=768, layers=12, attention_heads=12, batch_size=256)

VQGAN_F16_RUN = _tokenizer("vqgan-f16", VQGAN_F16, _MINGPT)
VQ_16_RUN = _tokenizer("vq-16", VQ_16, _GPT_B)
VQ_8_RUN = _tokenizer("vq-8", VQ_8, _GPT_B)
