"""The presets against the supplement's Tables 4 to 10, copied here row by row, and against released tokenizers."""

import re
from dataclasses import dataclass

import pytest
import torch

from ral_gym.config import Config, PriorConfig
from ral_gym.errors import ConfigError
from ral_gym.grid import CodeGrid
from ral_gym.presets import PRESETS, get_preset
from ral_gym.stages.levels import prior_of
from ral_gym.tokenizers.base import tokenizer_of

# (a), (b): PixelCNNs. (c) or the last part: VQ-VAE. Rows and numbers as printed.
PRIOR_ROWS = """
    Input size | Batch size | Hidden units | Residual units | Layers | Attention layers | Conv Filter size | Dropout
    | Output stack layers | Training steps
"""
VQVAE_ROWS = """
    Input size | Latent Layers | beta | Batch size | Hidden units | Residual units | Layers | Codebook size
    | Codebook dimension | Encoder filter size | Decoder filter size | Training steps
"""


@dataclass
class Table:
    vqvae: str
    prior: str
    bottom: str | None = None


VQVAE_4 = "64x64 | 8x8 | 0.25 | 128 | 128 | 64 | 3 | 128 | 64 | 3 | 4 | 156250"
VQVAE_7 = "128x128 | 16x16 | 0.25 | 128 | 128 | 64 | 3 | 512 | 64 | 3 | 4 | 156250"
PRIOR_7 = "16x16 | 480 | 512 | 512 | 20 | 8 | 5 | 0.1 | 20 | 41666"
TABLE_8 = Table(
    "128x128 | 16x16, 32x32 | 0.25 | 128 | 128 | 64 | 2 | 512 | 64 | 3 | 4 | 156250",
    "16x16 | 480 | 512 | 512 | 20 | 8 | 5 | 0.1 | 20 | 166664",
    "32x32 | 128 | 512 | 512 | 20 | 0 | 5 | 0.1 | 20 | 156250",
)
TABLES = {
    "celeba64": Table(VQVAE_4, "8x8 | 1024 | 128 | 128 | 5 | 0 | 5 | 0.1 | 5 | 19531"),
    "celeba64-oracle": Table(VQVAE_4, "8x8 | 1024 | 256 | 256 | 5 | 0 | 5 | 0.1 | 5 | 90039"),
    "lsun64-8x8": Table(
        "64x64 | 8x8 | 0.25 | 128 | 128 | 64 | 3 | 512 | 64 | 3 | 4 | 234375",
        "8x8 | 1536 | 512 | 512 | 20 | 0 | 5 | 0.1 | 5 | 97656",
    ),
    "lsun64-16x16": Table(
        "64x64 | 16x16 | 0.25 | 128 | 128 | 64 | 2 | 512 | 64 | 3 | 4 | 234375",
        "16x16 | 480 | 512 | 512 | 20 | 8 | 5 | 0.1 | 20 | 31250",
    ),
    "celeba128-16x16": Table(VQVAE_7, PRIOR_7),
    "lsun128-16x16": Table(VQVAE_7, PRIOR_7),
    "celeba128": TABLE_8,
    "lsun128": TABLE_8,
    "celeba256": Table(
        "256x256 | 32x32, 64x64 | 0.25 | 128 | 128 | 64 | 2 | 512 | 64 | 3 | 4 | 156250",
        "32x32 | 128 | 512 | 512 | 20 | 0 | 5 | 0.1 | 20 | 187500",
        "64x64 | 128 | 128 | 128 | 16 | 0 | 5 | 0.1 | 20 | 125000",
    ),
    "celebahq512": Table(
        "512x512 | 32x32, 64x64 | 0.25 | 128 | 128 | 64 | 3 | 512 | 64 | 3 | 4 | 23437",
        "32x32 | 128 | 512 | 512 | 20 | 0 | 5 | 0.1 | 20 | 20625",
        "64x64 | 128 | 128 | 128 | 16 | 0 | 5 | 0.1 | 20 | 42187",
    ),
}
SMALL = {
    *("demo", "demo-converged", "demo-patchgan", "demo-2level", "demo-attention"),
    *("demo-classes", "demo-cifar10", "demo-celeba", "smoke"),
}
TOKENIZERS = {"vqgan-f16": (1024, 256, 16), "vq-16": (16_384, 8, 16), "vq-8": (16_384, 8, 32)}
"""K, dimension of a code vector, side of the grid."""
LLAMAGEN = {
    "llamagen-b": (16, 12, 768, 2048, 110_888_448),
    "llamagen-l": (16, 24, 1024, 2816, 342_910_976),
    "llamagen-l-384": (24, 24, 1024, 2816, 342_910_976),
    "llamagen-xl-384": (24, 36, 1280, 3584, 774_699_520),
    "llamagen-grpo": (16, 24, 1024, 2816, 342_910_976),
}
"""Side of the grid, layers, width, width of SwiGLU, weights with 1000 classes: the tables of LlamaGen."""


def cells(text: str) -> list[str]:
    return [re.sub(r"\s+", " ", cell).strip() for cell in text.split("|")]


def rows_of(names: str, values: str) -> dict[str, str]:
    return dict(zip(cells(names), cells(values), strict=True))


def square(side: int) -> str:
    return f"{side}x{side}"


def prior_rows(prior: PriorConfig, side: int) -> dict[str, str]:
    values = (prior.batch_size, prior.hidden_units, prior.residual_units, prior.layers, prior.attention_layers)
    more = (prior.conv_filter_size, prior.dropout, prior.output_stack_layers, prior.training_steps)
    return rows_of(PRIOR_ROWS, " | ".join(map(str, (square(side), *values, *more))))


def vqvae_rows(config: Config) -> dict[str, str]:
    vqvae, side = config.vqvae, config.grid_size
    latent = square(side) if vqvae.levels == 1 else f"{square(side)}, {square(2 * side)}"
    values = (vqvae.beta, vqvae.batch_size, vqvae.hidden_units, vqvae.residual_units, vqvae.layers)
    codebook = (vqvae.codebook_size, vqvae.codebook_dim)
    filters = (vqvae.encoder_filter_size, vqvae.decoder_filter_size)
    numbers = (square(config.data.image_size), latent, *values, *codebook, *filters, vqvae.training_steps)
    return rows_of(VQVAE_ROWS, " | ".join(map(str, numbers)))


@pytest.mark.parametrize("name", TABLES)
def test_a_preset_is_its_table(name) -> None:
    config, table = get_preset(name), TABLES[name]
    assert vqvae_rows(config) == rows_of(VQVAE_ROWS, table.vqvae)
    assert prior_rows(config.prior, config.grid_size) == rows_of(PRIOR_ROWS, table.prior)
    assert config.vqvae.levels == (1 if table.bottom is None else 2)
    if table.bottom is not None:
        assert prior_rows(config.bottom, 2 * config.grid_size) == rows_of(PRIOR_ROWS, table.bottom)
        assert config.bottom.conditioning_stack_layers == 20


def test_every_table_and_every_small_kind_has_a_preset() -> None:
    assert set(PRESETS) == set(TABLES) | set(TOKENIZERS) | set(LLAMAGEN) | SMALL
    assert get_preset("demo-2level").vqvae.levels == 2 and get_preset("demo-2level").grid_size == 8
    assert get_preset("demo-attention").prior.attention_layers == 2


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_preset_is_the_released_network(name: str) -> None:
    config, (size, dim, side) = get_preset(name), TOKENIZERS[name]
    config.check()
    with torch.device("meta"):
        model = tokenizer_of(config, config.data.image_size, 3)
    parameters = {"vqgan-f16": 72_141_699, "vq-16": 71_883_403, "vq-8": 70_109_835}[name]
    assert sum(weight.numel() for weight in model.parameters()) == parameters
    assert (model.grid.codebook_size, model.num_features, model.grid.height, config.grid_size) == (
        size,
        dim,
        side,
        side,
    )
    assert model.codebook_l2_norm is (name != "vqgan-f16")


@pytest.mark.parametrize("name", LLAMAGEN)
def test_a_preset_of_llamagen_is_the_released_network(name: str) -> None:
    config, (side, layers, width, inner, weights) = get_preset(name), LLAMAGEN[name]
    if name == "llamagen-grpo":
        config.check(files=False)
        with pytest.raises(ConfigError, match=r"the reward clip needs ral\.clip_path"):
            config.check()
    else:  # stages 1 and 2 need no reward's files
        config.check()
    assert config.vqvae == get_preset("vq-16").vqvae and config.grid_size == side
    with torch.device("meta"):
        prior = prior_of(config, CodeGrid(side, side, 16_384, classes=1000))
    assert (len(prior.layers), prior.hidden_units) == (layers, width)
    assert prior.layers[0].feed_forward.w1.out_features == inner
    assert prior.hidden_units // prior.attention_heads == 64
    assert sum(weight.numel() for weight in prior.parameters()) == weights
    prior_settings = config.prior
    assert (prior_settings.learning_rate, prior_settings.adam_beta1, prior_settings.adam_beta2) == (1e-4, 0.9, 0.95)
    assert (prior_settings.batch_size, prior_settings.weight_decay, prior_settings.class_dropout) == (256, 0.05, 0.1)


def test_the_recipe_is_that_of_the_released_code() -> None:
    ral = get_preset("llamagen-grpo").ral
    assert (ral.algo, ral.n_envs, ral.grpo.group_size, ral.grpo.n_epochs, ral.n_updates) == ("grpo", 144, 12, 2, 600)
    assert (ral.grpo.ratio, ral.grpo.clip_range, ral.max_grad_norm, ral.reward_ema) == ("sequence", 0.2, 1.0, 0.5)
    assert (ral.grpo.ent_coef, ral.grpo.entropy_target, ral.grpo.entropy_schedule) == (2.2e-3, 0.78, True)
    assert ral.reward_weights == {"loo_fd_diagonal": 2.0, "clip": 1.0, "hps": 1.0} and ral.kl_coef > 0
    assert (ral.guidance, ral.grpo.mixed_precision) == (1.0, "bf16")


@pytest.mark.parametrize("name", TABLES)
def test_what_the_paper_says_of_stage_3(name) -> None:
    # Section 4.4, and Section 5.1 and Table 3b for the score map.
    config = get_preset(name)
    critic, ral = config.critic, config.ral
    assert (critic.learning_rate, critic.adam_beta1, critic.adam_beta2) == (1e-4, 0.5, 0.999)
    assert (ral.learning_rate, ral.adam_beta1, ral.adam_beta2) == (4e-6, 0.5, 0.999)
    assert (critic.warmup_steps, critic.n_critic, critic.batch_size, critic.loss) == (100, 5, 16, "wgan_gp")
    assert (ral.algo, ral.reward, ral.train_levels, ral.reset_mode) == ("reinforce", "single", "both", "mixed")
    assert config.data.image_size // 2**critic.layers == 4


def test_the_set_of_images_is_in_the_name() -> None:
    for name in TABLES:
        source, size = get_preset(name).data.source, get_preset(name).data.image_size
        assert str(size) in name
        expected = {"lsun": "lsun:", "celebahq": "folder:", "celeba": ("celeba:", "faces")}
        (kind,) = re.findall(r"^[a-z]+", name)
        assert source.startswith(expected[kind])
