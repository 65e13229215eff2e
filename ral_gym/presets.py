"""Named configurations: the paper's tables, other projects' tokenizers, small ones for a CPU, and your own.

Your own are registered, in a module or in a file.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ral_gym.config import (
    SECTIONS,
    Config,
    CriticConfig,
    DataConfig,
    EvaluationConfig,
    GRPOConfig,
    PriorConfig,
    RALConfig,
    VQVAEConfig,
)
from ral_gym.config.modern import LLAMAGEN_B, LLAMAGEN_GRPO, LLAMAGEN_L, LLAMAGEN_L_384, LLAMAGEN_XL_384
from ral_gym.config.modern import VQ_8_RUN as VQ_8
from ral_gym.config.modern import VQ_16_RUN as VQ_16
from ral_gym.config.modern import VQGAN_F16_RUN as VQGAN_F16
from ral_gym.config.paper import (
    CELEBA64,
    CELEBA64_ORACLE,
    CELEBA128,
    CELEBA128_16X16,
    CELEBA256,
    CELEBAHQ512,
    LSUN64_8X8,
    LSUN64_16X16,
    LSUN128,
    LSUN128_16X16,
)
from ral_gym.errors import ConfigError
from ral_gym.registry import PRESETS, is_path
from ral_gym.schema import config_from, shown

__all__ = [
    "CELEBA64",
    "CELEBA64_ORACLE",
    "CELEBA128",
    "CELEBA128_16X16",
    "CELEBA256",
    "CELEBAHQ512",
    "DEMO",
    "DEMO_2LEVEL",
    "DEMO_ATTENTION",
    "DEMO_CLASSES",
    "DEMO_PATCHGAN",
    "LLAMAGEN_B",
    "LLAMAGEN_GRPO",
    "LLAMAGEN_L",
    "LLAMAGEN_L_384",
    "LLAMAGEN_XL_384",
    "LSUN64_8X8",
    "LSUN64_16X16",
    "LSUN128",
    "LSUN128_16X16",
    "SMOKE",
    "VQGAN_F16",
    "VQ_8",
    "VQ_16",
    "get_preset",
    "read_preset",
]

MOST_BYTES = 2**20
"""Largest size of a JSON file with settings."""

# Minutes on a CPU -------------------------------------------------------------------------------------------------

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

# What draws best in the same minutes, tuned on seed 100 only: a perceptual loss of the tokenizer, a prior whose
# learning rate falls to 0, the causal critic with leave-one-out FD, and maximum likelihood of equal time beside it.
DEMO = replace(
    DEMO_PATCHGAN,
    preset="demo",
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
    ),
    prior=PriorConfig(
        kind="transformer",
        hidden_units=128,
        layers=4,
        attention_heads=4,
        dropout=0.2,
        batch_size=64,
        training_steps=1200,
        learning_rate=7e-4,
        ema_decay=0.995,
        augmented_passes=16,
        evaluate_every=100,
    ),
    ral=RALConfig(
        algo="grpo",
        reward_weights={"loo_fd": 1.0},
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


def get_preset(name: str) -> Config:
    """The settings called `name`; their `preset` field is its last part.

    Args:
        name: a registered preset, ``module:NAME`` of a `Config` in a module, or a ``.json`` file (see `read_preset`).

    Raises:
        ConfigError: there is no such preset, or it may not be imported or cannot be read.
    """
    if name.lower().endswith(".json"):
        return read_preset(Path(name))
    if name not in PRESETS and not is_path(name):
        near = difflib.get_close_matches(name, list(PRESETS), n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        known = ", ".join(PRESETS)
        raise ConfigError(
            f"preset {name!r} is unknown{meant}: choose one of {known}, or give module:NAME or a .json file"
        )
    config = PRESETS.get(name)
    if not isinstance(config, Config):
        raise ConfigError(f"preset {name!r} is a {type(config).__name__}: give a ral_gym.config.Config")
    return replace(config, preset=name.rpartition(":")[2])


def read_preset(path: Path) -> Config:
    """Settings from a JSON file: all of them, as in a run's config.json, or some on top of a preset.

    ::

        {"base": "demo", "seed": 3, "ral": {"algo": "grpo", "grpo": {"group_size": 4}}}

    The file is treated as data: code that it names (``module:Class``) is imported only if the user names it too.

    Args:
        path: the file. `base` is the name of a preset to change; without it the file must be complete. `preset`, the
            name in logs and of the run folder, is the file's own name by default.

    Raises:
        ConfigError: no such file, not JSON, an unknown setting, or a value of another type.
    """
    values = _json(path)
    base = values.pop("base", None)
    values = {"preset": path.stem} | values
    name = values["preset"]
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
        raise ConfigError(f"{path}: preset is {shown(name)}: give a name of letters, digits, dots, - and _")
    if base is None:
        try:
            return Config.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f'{path}: {error}; or name a preset to change, such as "base": "demo"') from error
    if not isinstance(base, str) or base.lower().endswith(".json"):
        raise ConfigError(f"{path}: base is {shown(base)}: give a preset's name")
    if isinstance(values.get("ral"), dict) and "baseline" in values["ral"]:
        raise ConfigError(f"{path}: ral.baseline is ral.reinforce.baseline in this version")
    start = get_preset(base)
    config = config_from(Config, values, str(path), defaults=start)
    own = start.ral.algo
    if config.ral.algo != own and own in SECTIONS and own not in values["ral"]:  # it goes with its algorithm
        config = replace(config, ral=replace(config.ral, **{own: SECTIONS[own]()}))
    return config


def _json(path: Path) -> dict[str, Any]:
    """The names and values of a JSON file."""
    if not path.is_file():
        raise ConfigError(f"preset {path} is not a file: give a .json file, or the name of a preset")
    if path.stat().st_size > MOST_BYTES:
        raise ConfigError(f"{path} has {path.stat().st_size:,} bytes: a preset has at most {MOST_BYTES:,}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path} is not a JSON file ({shown(str(error), bare=True)})") from error
    if not isinstance(values, dict):
        raise ConfigError(f'{path} is not a preset: give names and values, such as {{"base": "demo", "seed": 3}}')
    return values
