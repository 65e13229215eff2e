"""A setting that the user changed and that nothing would read is named_so, by one table for all of them."""

import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ral_gym.commands.arguments import parse_train
from ral_gym.config import Config, effect_notes, without_effect
from ral_gym.config.effects import EFFECTS
from ral_gym.presets import DEMO_2LEVEL, DEMO_PATCHGAN, PRESETS, SMOKE
from tests.odd_settings import ODD

ONE_LEVEL = {"ral.train_levels", "ral.per_level_discount", "prior.conditioning_stack_layers"}
SCHEDULE = {f"prior.scheduled_sampling_{name}" for name in ("schedule", "share")}
DEMO_HAS_NO = {
    *ONE_LEVEL,
    *SCHEDULE,
    *("prior.attention_heads", "prior.decay_share", "critic.gradient_penalty", "ral.reward_features", "ral.reward_ema"),
    *(
        "ral.grpo.group_size",
        "ral.label_draw",
        "ral.guidance_log_probs",
        "ral.rollout_positions",
        "ral.clip_path",
        "ral.prompt",
        "ral.hps_path",
        "critic.class_conditional",
        "evaluation.guidance",
        "data.grey",
    ),
    *("vqvae.perceptual_network", "vqvae.adversarial_start"),
    *("critic.dropout", "critic.weight_decay", "critic.max_grad_norm", "critic.r1_every", "ral.image_gamma"),
    *(f"vqvae.discriminator_{name}" for name in ("units", "layers", "learning_rate")),
}


def names(section: Any, path: str = "") -> Iterator[str]:
    for field in dataclasses.fields(section):
        value, name = getattr(section, field.name), f"{path}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from names(value, f"{name}.")
        else:
            yield name


def with_setting(config: Any, name: str, value: Any) -> Any:
    first, _, rest = name.partition(".")
    return replace(config, **{first: with_setting(getattr(config, first), rest, value) if rest else value})


def test_every_field_of_the_demo_has_an_effect_or_is_named() -> None:
    named_so = set()
    for name in names(DEMO_PATCHGAN):
        base = with_setting(DEMO_PATCHGAN, name, "another value")  # the effect of none of them depends on the base
        for note in effect_notes(DEMO_PATCHGAN, base):
            assert note.startswith(f"{name} is ")
            named_so.add(name)
    bottom = {name for name in names(DEMO_PATCHGAN) if name.startswith("bottom.")}
    assert named_so == DEMO_HAS_NO | bottom


def test_every_field_of_the_odd_settings_has_an_effect() -> None:
    # test_settings_reach shows that they reach their consumers.
    expected = {
        "ral.reward_ema",
        "critic.gradient_penalty",
        *("critic.replay", "critic.dropout", "critic.weight_decay", "critic.max_grad_norm"),
        "prior.conditioning_stack_layers",
        "ral.normalize_advantage",
        "ral.label_draw",
        "critic.class_conditional",
        "evaluation.guidance",
        "ral.guidance_log_probs",
        "ral.rollout_positions",
        "ral.clip_path",
        "ral.prompt",
        "ral.hps_path",
        "data.grey",
    }
    assert {name for name, _ in without_effect(ODD)} == expected


def test_the_table_names_settings_that_exist() -> None:
    known = {*names(Config()), *(field.name for field in dataclasses.fields(Config))}
    for effect in EFFECTS:
        assert set(effect.settings.split()) <= known
        assert effect.needs


@pytest.mark.parametrize("preset", list(PRESETS.builtin))
def test_presets_and_what_they_set_are_left_alone(preset: str) -> None:
    base = PRESETS[preset]
    assert not effect_notes(base, base)
    if base.ral.uses_critic and base.critic.kind == "patch":
        assert not effect_notes(replace(base, critic=replace(base.critic, loss="hinge")), base)
    assert not effect_notes(replace(base, ral=replace(base.ral, reward_weights={"kid": 1.0})), base)
    assert not effect_notes(replace(base, vqvae=replace(base.vqvae, levels=1)), base)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--preset demo-patchgan --critic.gradient-penalty 5", "critic.gradient_penalty is 5.0"),
        ("--preset demo-patchgan --prior.conditioning-stack-layers 3", "prior.conditioning_stack_layers"),
        ("--preset demo-patchgan --bottom.layers 3", "bottom.layers is 3"),
        ("--preset demo-2level --bottom.augmented-passes 3", "bottom.augmented_passes is 3"),
        ("--preset demo-patchgan --prior.scheduled-sampling-share 0.3", "prior.scheduled_sampling two_pass"),
        ("--preset demo-patchgan --ral.no-per-level-discount", "vqvae.levels 2"),
        ("--preset demo-patchgan --prior.attention-heads 2", "prior.attention_layers above 0"),
        ("--preset demo-patchgan --ral.reward-ema 0.3", "ral.reward_ema is 0.3"),
        ("--preset demo-patchgan --ral.reward-weights kid 1 --critic.layers 3", "critic.layers is 3"),
        ("--preset demo-patchgan --ral.reward-weights kid 1 --ral.reward single", "ral.reward is single"),
        ("--preset demo-patchgan --ral.algo grpo --ral.grpo.group-size 4", "ral.reset_mode continue or mixed"),
        ("--preset smoke --vqvae.perceptual-network lpips:vgg16.pth,vgg.pth", "vqvae.perceptual_weight above 0"),
        ("--preset smoke --vqvae.adversarial-start 5", "vqvae.adversarial_weight above 0"),
        ("--preset smoke --vqvae.discriminator-layers 2", "vqvae.adversarial_weight above 0"),
        ("--preset demo-patchgan --evaluation.guidance 2", "evaluation.guidance is (2.0,)"),
        ("--preset demo-classes --data.labels none --ral.label-draw data", "or data.labels none turns off"),
    ],
)
def test_a_command_line_says_what_has_no_effect(flags: str, named: str, tmp_path: Path) -> None:
    config = parse_train([*flags.split(), "--runs", str(tmp_path)]).config
    notes = effect_notes(config, PRESETS[config.preset])
    assert len(notes) == 1
    assert named in notes[0]
    assert "\n" not in notes[0]


@pytest.mark.parametrize(
    "flags",
    [
        "--preset demo-patchgan --critic.loss wgan_gp --critic.gradient-penalty 5",
        "--preset demo-2level --bottom.layers 3 --ral.train-levels top --prior.augmented-passes 3",
        "--preset demo-patchgan --prior.scheduled-sampling two_pass --prior.scheduled-sampling-share 0.3",
        "--preset demo-patchgan --prior.attention-layers 1 --prior.attention-heads 2",
        "--preset demo-patchgan --ral.reward-weights loo_fd 1 --ral.reward-ema 0.3 --ral.reward-features pyramid",
        "--preset smoke --ral.algo grpo --ral.grpo.group-size 4",
        "--preset demo-2level --vqvae.levels 1",
        "--preset smoke --vqvae.adversarial-weight 0.1 --vqvae.adversarial-start 5 --vqvae.discriminator-units 8",
    ],
)
def test_with_what_it_needs_a_setting_is_taken(flags: str, tmp_path: Path) -> None:
    config = parse_train([*flags.split(), "--runs", str(tmp_path)]).config
    assert not effect_notes(config, PRESETS[config.preset])


def test_two_levels_read_the_bottom_prior() -> None:
    assert not {name for name, _ in without_effect(DEMO_2LEVEL) if name.startswith("bottom.")} - {
        "bottom.attention_heads",
        "bottom.decay_share",
        "bottom.scheduled_sampling_schedule",
        "bottom.scheduled_sampling_share",
    }
    assert {name for name, _ in without_effect(SMOKE)} >= ONE_LEVEL
