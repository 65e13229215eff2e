"""The command that the report prints: parsed, it is the same configuration, whatever that is."""

import dataclasses
import math
import shlex
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ral_gym import registry
from ral_gym.commands.arguments import parse, parse_train
from ral_gym.config import SECTIONS, Config
from ral_gym.config.flags import flags, parts_named
from ral_gym.errors import ConfigError
from ral_gym.presets import PRESETS, SMOKE, get_preset
from ral_gym.registry import REWARDS
from ral_gym.report.text import stage_command
from ral_gym.runs.run import Run
from ral_gym.schema import type_hints
from ral_gym.settings import _parse_options, option_words

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12).filter(lambda text: text != "None")
"""Of an optional setting, None would be None."""
NUMBERS = st.sampled_from([0.0, 1e-7, 0.1, 0.30000000000000004, 0.5, 0.9, 1.0, 2.5, 1e5])
OPTIONS = st.dictionaries(
    st.from_regex(r"[a-z_]{1,6}", fullmatch=True),
    st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.floats(allow_nan=False), st.just("4"), TEXT),
    max_size=3,
)
WEIGHTS = st.dictionaries(st.sampled_from(sorted(REWARDS)), st.floats(1e-6, 1e6), min_size=1, max_size=4)


def values(hint: Any, name: str) -> st.SearchStrategy[Any]:
    """Values of a setting by its type."""
    if get_origin(hint) is dict:
        return WEIGHTS if name.endswith("reward_weights") else OPTIONS
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return st.one_of([values(one, name) for one in get_args(hint)])
    if get_origin(hint) is tuple:
        entry = st.sampled_from(["brightness", "my_parts:sharp"]) if get_args(hint)[0] is str else NUMBERS
        return st.lists(entry, max_size=3).map(tuple)
    if hint is type(None):
        return st.none()
    return {bool: st.booleans(), int: st.sampled_from([0, 1, 2, 3, 4, 8, 16, 32, 100]), float: NUMBERS, str: TEXT}[hint]


NAMED = ("preset", "ral.algo", "ral.reward_features", "evaluation.extractor", "evaluation.metrics")
"""Settings that name parts: other text is no part's name."""


def names(config: Config) -> list[tuple[str, Any]]:
    """Every setting but names of parts, which must be known ones; of the algorithms' sections the own one's."""

    def walk(section: Any, path: str) -> Any:
        for name, hint in type_hints(type(section)).items():
            full = f"{path}{name}"
            if dataclasses.is_dataclass(getattr(section, name)):
                if full.removeprefix("ral.") not in SECTIONS or full == f"ral.{config.ral.algo}":
                    yield from walk(getattr(section, name), f"{full}.")
            elif name != "kind" and full not in NAMED:
                yield full, hint

    return list(walk(config, ""))


def changed(section: Any, name: str, value: Any) -> Any:
    """The configuration with one setting changed."""
    first, _, rest = name.partition(".")
    return dataclasses.replace(section, **{first: changed(getattr(section, first), rest, value) if rest else value})


@st.composite
def configurations(draw: st.DrawFn) -> Config:
    """A preset with some settings changed, as far as they are allowed."""
    config = PRESETS[draw(st.sampled_from(["smoke", "demo", "demo-2level", "celeba64"]))]
    algo = draw(st.sampled_from(["reinforce", "grpo", "ppo"]))
    plain = {name: cls() for name, cls in SECTIONS.items() if name != algo}
    config = dataclasses.replace(config, ral=dataclasses.replace(config.ral, algo=algo, **plain))
    for name, hint in draw(st.lists(st.sampled_from(names(config)), min_size=1, max_size=12)):
        other = changed(config, name, draw(values(hint, name)))
        try:
            other.check()
        except ConfigError:
            continue
        config = other
    return config


def make_run(path: Path, config: Config) -> Run:
    """A run as the report has it, without a folder."""
    run = Run.__new__(Run)
    run.path, run.config = path, config
    return run


@settings(max_examples=30)
@given(config=configurations())
def test_the_printed_command_parses_to_the_same_configuration(config) -> None:
    words = shlex.split(stage_command(make_run(Path("my runs/one"), config)))
    assert words[:2] == ["ral-gym", "train"]
    arguments = parse_train(words[2:])
    assert arguments.config == config
    assert (arguments.runs, arguments.name) == ("my runs", "one")


def test_every_setting_is_named_where_the_preset_is_unknown() -> None:
    words = flags(SMOKE)
    assert {f"--{name}".replace("_", "-") for name, hint in names(SMOKE) if hint is not bool} <= set(words)
    assert parse_train(["--preset", "demo", *words]).config == dataclasses.replace(SMOKE, preset="demo")


def test_a_run_with_other_reward_weights() -> None:
    config = changed(SMOKE, "ral.reward_weights", {"loo_fd": 1 / 3, "kid": 2.0})
    words = shlex.split(stage_command(make_run(Path("runs/x"), config), "ral"))
    assert " ".join(words).count("--ral.reward-weights loo_fd 0.3333333333333333 kid 2 ") == 1
    arguments = parse(words[1:])
    assert arguments.config == config and arguments.stages == ("ral",)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_preset_needs_no_flag(preset) -> None:
    assert flags(get_preset(preset), get_preset(preset)) == []


@given(options=OPTIONS)
def test_options_are_read_as_they_were(options) -> None:
    again = _parse_options(option_words(options))
    assert again == options and list(map(type, again.values())) == list(map(type, options.values()))
    assert not any(word.startswith("--") for word in option_words(options))


def test_parts_of_ones_own_are_named_and_sources_with_an_argument_are_not(monkeypatch) -> None:
    monkeypatch.setattr(registry, "_allowed", set())
    monkeypatch.setattr(registry.METRICS, "_parts", {"registered": len})
    config = SMOKE
    for name, value in {
        "data.source": "my_parts:Array:images.npy",
        "evaluation.extractor": "my_parts:Mine",
        "evaluation.metrics": ("my_parts:sharp", "registered"),
        "prior.options": {"block": "my_parts:Block"},
    }.items():
        config = changed(config, name, value)
    parts = ["my_parts:Array", "my_parts:Block", "my_parts:Mine", "my_parts:sharp"]
    assert sorted(parts_named(config)) == parts
    assert parts_named(changed(SMOKE, "data.source", "folder:images")) == []
    assert parse_train(["--preset", "smoke", *flags(config, SMOKE)]).config == config


def test_numbers_are_exact_and_words_that_look_like_flags_are_no_flags() -> None:
    config = changed(SMOKE, "ral.reward_weights", {"critic": math.pi})
    config = changed(config, "prior.options", {"a": -5, "b": "-5", "c": "--seed", "d": "", "e": -math.inf, "f": "a b"})
    config = changed(config, "data.source", "--name")
    config = changed(config, "vqvae.options", {})
    assert parse_train(["--preset", "smoke", *flags(config, SMOKE)]).config == config
