"""Settings of tiny runs, drawn at random over all sections: for tests that walk through the whole pipeline."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ral_gym.config import (
    SECTIONS,
    Config,
    CriticConfig,
    DataConfig,
    EvaluationConfig,
    PriorConfig,
    RALConfig,
    VQVAEConfig,
)

Choose = Callable[[Sequence[Any]], Any]
"""Picks one of several values."""

WEIGHTS: tuple[dict[str, float], ...] = (
    {"critic": 1.0},
    {"critic": 0.5},
    {"critic": 1.0, "loo_fd": 0.5},
    {"loo_fd": 1.0},
    {"loo_fd_first_order": 1.0},
    {"loo_fd_diagonal": 0.5, "kid": 1.0},
    {"kid": 1.0},
)


def random_config(choose: Choose) -> Config:
    """A tiny configuration; not all of them are allowed."""
    ral = _ral(choose)
    prior = _prior(choose)
    bottom = replace(prior, conditioning_stack_layers=choose((0, 1)), conv_filter_size=choose((3, 7)))
    return Config(
        preset="random",
        data=DataConfig(
            image_size=choose((8, 9, 10, 12, 14, 15, 16, 20, 24, 32, 40)),
            limit=choose((12, 13, 17, 30)),
            test_limit=choose((None, 1, 2, 5)),
            workers=0,
            cache_mb=0,
        ),
        vqvae=VQVAEConfig(
            hidden_units=choose((2, 5, 8)),
            residual_units=choose((1, 4)),
            residual_blocks=choose((0, 1)),
            layers=choose((1, 2, 3, 4)),
            levels=choose((1, 1, 2)),
            codebook_size=choose((2, 3, 16)),
            codebook_dim=choose((1, 4)),
            encoder_filter_size=choose((1, 3, 5)),
            decoder_filter_size=choose((2, 4)),
            threshold_ema_dead_code=choose((0, 2)),
            batch_size=choose((1, 7, 64)),
            training_steps=choose((1, 2)),
            augment=choose((False, True)),
            perceptual_weight=choose((0.0, 0.0, 0.5)),
            adversarial_weight=choose((0.0, 0.0, 0.1)),
            adversarial_start=choose((0, 0, 1)),
            discriminator_units=choose((1, 8)),
            discriminator_layers=choose((1, 2)),
        ),
        prior=prior,
        bottom=bottom,
        critic=CriticConfig(
            hidden_units=choose((1, 4)),
            layers=choose((1, 2, 3, 4)),
            loss=choose(("wgan_gp", "hinge")),
            augment=choose(((), (), ("colour", "cutout"), ("translation",))),
            r1=choose((0.0, 0.0, 1.0)),
            r1_every=choose((1, 3)),
            spectral_norm=choose((False, True)),
            batch_size=choose((1, 2, 8)),
            warmup_steps=choose((0, 1)),
            n_critic=choose((0, 1)),
            fakes=choose(("previous", "fresh")),
            held_out=choose((0, 1, 3)),
        ),
        ral=ral,
        evaluation=EvaluationConfig(
            n_samples=choose((12, 13, 24)),
            extractor=choose(("encoder", "encoder", "pyramid", "lite0")),
            temperatures=choose(((), (0.5,))),
            held_out=choose((1, 5)),
            sampling_seeds=choose((1, 1, 2)),
        ),
        seed=choose((0, 1)),
    )


def _prior(choose: Choose) -> PriorConfig:
    layers = choose((1, 2))
    return PriorConfig(
        hidden_units=choose((1, 4, 6)),
        residual_units=choose((1, 4)),
        layers=layers,
        conv_filter_size=choose((3, 5)),
        dropout=choose((0.0, 0.3)),
        output_stack_layers=choose((0, 1)),
        attention_layers=choose((0, 0, 1)),
        attention_heads=choose((1, 2)),
        position_embedding=choose((False, True)),
        batch_size=choose((1, 9)),
        training_steps=choose((1, 2)),
        weight_decay=choose((0.0, 0.0, 0.1)),
        learning_rate_schedule=choose(("constant", "linear", "cosine")),
        decay_share=choose((0.1, 0.5, 1.0)),
        patience=choose((None, 1)),
        ema_decay=choose((0.0, 0.9)),
        augmented_passes=choose((1, 2)),
        evaluate_every=choose((1, 5)),
        held_out=choose((1, 5)),
        scheduled_sampling=choose(("none", "none", "two_pass", "sequential")),
        scheduled_sampling_schedule=choose(("linear", "exponential", "inverse_sigmoid")),
    )


def _ral(choose: Choose) -> RALConfig:
    algo = choose(tuple(SECTIONS))
    own: dict[str, Any] = {"ent_coef": choose((0.0, 0.01))} if algo != "trpo" else {}
    if own.get("ent_coef"):
        own |= {"entropy_target": choose((None, 0.5, "start"))}
    if algo not in ("a2c",):
        own |= {"batch_size": choose((None, 2, 5))}
    if algo == "reinforce":
        own |= {"baseline": choose(("none", "mean", "leave_one_out", "value"))}
    if algo == "grpo":
        own |= {
            "group_size": choose((None, 2, 3)),
            "ratio": choose(("sequence", "token")),
            "scale_advantage": choose((None, "batch", "none")),
            "mixed_precision": choose(("no", "no", "bf16")),
        }
    if algo == "trpo":
        own |= {"cg_max_steps": 2, "line_search_max_iter": 2, "sub_sampling_factor": choose((1, 2, 7))}
    return RALConfig(
        algo=algo,
        reward=choose(("single", "intermediate")),
        reward_normalization=choose(("max_abs", "standard", "none")),
        reward_weights=choose(WEIGHTS),
        reward_features=choose(("encoder", "pyramid")),
        reward_ema=choose((0.0, 0.5)),
        reset_mode=choose(("full", "continue", "scratch", "mixed")),
        n_envs=choose((1, 2, 3, 6, 8)),
        n_updates=choose((1, 3)),
        learning_rate=1e-3,
        gamma=choose((0.0, 0.9, 1.0)),
        normalize_advantage=choose((True, True, False)),
        mle_coef=(mle_coef := choose((0.0, 0.1))),
        mle_dropout=mle_coef > 0 and choose((False, True)),
        kl_coef=choose((0.0, 0.1)),
        train_levels=choose(("both", "top", "bottom")),
        per_level_discount=choose((True, False)),
        ema_decay=choose((0.0, 0.9)),
        checkpoint_every=choose((1, 2)),
        **{algo: SECTIONS[algo](**own)},
    )
