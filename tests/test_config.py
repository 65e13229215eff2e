"""The settings: what is out of range is refused at the border, with the value and what is allowed."""

import dataclasses
import json
import operator
import re
from typing import Any

import pytest

from ral_gym.config import RANGES, Config
from ral_gym.errors import ConfigError
from ral_gym.presets import PRESETS, SMOKE, get_preset


def changed(name: str, value: Any, config: Any = SMOKE) -> Any:
    """The settings with one field changed, in a section or in an algorithm's section of a section."""
    first, _, rest = name.partition(".")
    return dataclasses.replace(config, **{first: changed(rest, value, getattr(config, first)) if rest else value})


def value_of(name: str) -> Any:
    return operator.attrgetter(name)(SMOKE)


LIMITED = {name: allowed for (allowed, _), names in RANGES.items() for name in names}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_in_range_and_survive_json(preset) -> None:
    config = get_preset(preset)
    config.check(files=preset != "llamagen-grpo")  # whose rewards need files
    assert config.preset == preset
    assert Config.from_dict(json.loads(config.to_json())) == config


@pytest.mark.parametrize("name", LIMITED)
def test_numbers_out_of_range_are_refused(name) -> None:
    for value in (-1, float("nan")):
        wrong = changed(name, (value,) if isinstance(value_of(name), tuple) else value)
        with pytest.raises(ConfigError) as caught:
            wrong.check()
        none_by_default = name.endswith(("_size", "crop", "limit", "patience"))
        integer = isinstance(value_of(name), int) or none_by_default
        whole = integer and isinstance(value, float)
        assert str(caught.value) == f"{name} is {value}: give {'an integer' if whole else LIMITED[name]}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vqvae.batch_size", -3),
        ("vqvae.training_steps", 0),
        ("vqvae.codebook_size", 32_767),
        ("vqvae.levels", 0),
        ("vqvae.levels", 3),
        ("vqvae.encoder_filter_size", 4),
        ("vqvae.decoder_filter_size", 3),
        ("vqvae.learning_rate", float("inf")),
        ("prior.hidden_units", 0),
        ("prior.dropout", 2.0),
        ("prior.dropout", 1.0),
        ("prior.conv_filter_size", 4),
        ("prior.conv_filter_size", 1),
        ("prior.attention_layers", -1),
        ("bottom.attention_heads", 0),
        ("bottom.dropout", 1.0),
        ("bottom.conditioning_stack_layers", -1),
        ("critic.layers", 0),
        ("ral.n_envs", 0),
        ("ral.gamma", 1.01),
        ("ral.ema_decay", 1.0),
        ("evaluation.temperatures", (0.9, 0.0)),
        ("evaluation.n_samples", 11),
        ("evaluation.sampling_seeds", 0),
        ("seed", 4_000_001),
    ],
)
def test_the_edges_of_the_ranges(name, value) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} is .*: give "):
        changed(name, value).check()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vqvae.residual_blocks", 0),
        ("vqvae.threshold_ema_dead_code", 0),
        ("vqvae.codebook_size", 32_766),
        ("prior.dropout", 0.0),
        ("prior.output_stack_layers", 0),
        ("bottom.conditioning_stack_layers", 0),
        ("critic.n_critic", 0),
        ("ral.gamma", 0.0),
        ("ral.gamma", 1.0),
        ("ral.n_envs", 1),
        ("evaluation.n_samples", 12),
        ("evaluation.temperatures", ()),
        ("seed", 4_000_000),
    ],
)
def test_the_last_values_inside_the_ranges(name, value) -> None:
    changed(name, value).check()


@pytest.mark.parametrize("name", ["vqvae.layers", "critic.layers"])
def test_layers_that_do_not_fit_the_image_are_refused_before_training(name) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is 6: data.image_size 32 must be a multiple of 2\*\*6"):
        changed(name, 6).check()


def test_the_second_level_needs_one_more_halving() -> None:
    two = dataclasses.replace(SMOKE, vqvae=dataclasses.replace(SMOKE.vqvae, layers=4, levels=2))
    two = changed("ral.reset_mode", "full", two)  # one row of top codes
    two.check()
    assert two.grid_size == 1
    wrong = dataclasses.replace(two, vqvae=dataclasses.replace(two.vqvae, layers=5))
    message = r"vqvae.layers is 5 \(one for the second level\): data.image_size 32 must be a multiple of 2\*\*6"
    with pytest.raises(ConfigError, match=message):
        wrong.check()


@pytest.mark.parametrize("section", ["prior", "bottom"])
def test_attention_must_fit_the_prior(section) -> None:
    prior = dataclasses.replace(getattr(SMOKE, section), hidden_units=16, layers=2, attention_layers=2)
    for change, message in (
        ({"attention_layers": 3}, rf"{section}.attention_layers is 3: give at most {section}.layers, 2"),
        ({"attention_heads": 3}, rf"{section}.attention_heads is 3: it must divide {section}.hidden_units, 16"),
    ):
        dataclasses.replace(SMOKE, **{section: prior}).check()
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(SMOKE, **{section: dataclasses.replace(prior, **change)}).check()
    without = dataclasses.replace(prior, attention_layers=0, attention_heads=3)
    dataclasses.replace(SMOKE, **{section: without}).check()


def test_a_configuration_from_before_two_levels_is_read() -> None:
    values = json.loads(SMOKE.to_json())
    del values["bottom"], values["vqvae"]["levels"], values["ral"]["train_levels"], values["ral"]["per_level_discount"]
    for name in ("attention_layers", "attention_heads", "conditioning_stack_layers"):
        del values["prior"][name]
    assert Config.from_dict(values) == SMOKE
    with pytest.raises(ConfigError, match=r"bottom\.colour is an unknown setting"):
        Config.from_dict({**values, "bottom": {"colour": 1}})


def test_every_number_has_a_range() -> None:
    # A new setting cannot be forgotten.
    def numbers_of(section: Any, path: str) -> set[str]:
        found = set()
        for field in dataclasses.fields(section):
            value, name = getattr(section, field.name), f"{path}{field.name}"
            if dataclasses.is_dataclass(value):
                found |= numbers_of(value, f"{name}.")
            elif re.search(r"\b(int|float|EntropyTarget)\b", str(field.type)):
                found.add(name)
        return found

    numbers = numbers_of(SMOKE, "")
    assert numbers | {"seed"} == set(LIMITED)


def test_an_unknown_preset_is_named_with_the_known_ones() -> None:
    message = r"preset 'celebahq' is unknown \(.*celebahq512\?\): choose one of demo, .*, smoke, or give module:NAME"
    with pytest.raises(ConfigError, match=message):
        get_preset("celebahq")


def test_images_that_a_later_stage_would_refuse_are_refused_before_the_first() -> None:
    small = changed("data.image_size", 8)  # one row of codes
    with pytest.raises(ConfigError, match=r"ral.reset_mode is mixed, but 8 pixels give one row of codes"):
        small.check()
    changed("ral.reset_mode", "full", small).check()
    changed("vqvae.layers", 2, small).check()
    for size, fits in ((8, False), (12, False), (16, True)):
        config = changed("vqvae.layers", 2, changed("data.image_size", size, changed("critic.layers", 2)))
        lite0 = changed("evaluation.extractor", "lite0", config)
        config.check()
        if fits:
            lite0.check()
        else:
            with pytest.raises(ConfigError, match="lite0 needs images of 16 pixels or more"):
                lite0.check()
