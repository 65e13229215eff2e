"""The door for presets: registered, in a module, or in a JSON file, which is data and never code."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ral_gym.agents.algorithm import check_stage
from ral_gym.commands.arguments import parse_train
from ral_gym.errors import ConfigError
from ral_gym.presets import SMOKE, get_preset
from ral_gym.registry import PRESETS, Registry, _allowed, allow

CPU = torch.device("cpu")
EXAMPLES = Path(__file__).parents[1] / "examples" / "extending"
OWN = replace(SMOKE, preset="whatever", seed=7)


@pytest.fixture(autouse=True)
def named_by_the_user() -> Iterator[None]:
    """What a test allows is forgotten afterwards."""
    before, parts = set(_allowed), dict(PRESETS._parts)
    yield
    _allowed.clear()
    _allowed.update(before)
    PRESETS._parts.clear()
    PRESETS._parts.update(parts)


def write(path: Path, values: Any) -> str:
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return str(path)


def test_a_preset_is_a_registered_name_a_path_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS._parts, "seven", OWN)
    assert get_preset("seven") == replace(OWN, preset="seven")
    allow(f"{__name__}:OWN")
    assert get_preset(f"{__name__}:OWN") == replace(OWN, preset="OWN")
    name = write(tmp_path / "mine.json", {"base": "smoke", "seed": 7})
    assert get_preset(name) == replace(OWN, preset="mine")
    whole = write(tmp_path / "whole.json", OWN.to_json())
    assert get_preset(whole) == OWN
    arguments = parse_train(["--preset", name, "--ral.gamma", "0.5"])
    assert (arguments.config.preset, arguments.name, arguments.config.ral.gamma) == ("mine", "mine-seed7", 0.5)


def test_a_file_may_choose_another_algorithm(tmp_path: Path) -> None:
    ral = {"algo": "grpo", "grpo": {"group_size": 4}}
    config = parse_train(["--preset", write(tmp_path / "a.json", {"base": "celeba64", "ral": ral})]).config
    assert (config.ral.algo, config.ral.grpo.group_size) == ("grpo", 4)
    check_stage(config.ral)
    wrong = write(tmp_path / "b.json", {"base": "smoke", "ral": ral | {"ppo": {"clip_range": 0.3}}})
    with pytest.raises(ConfigError, match=r"ral.ppo.clip_range is 0.3, but ral.algo is grpo"):
        check_stage(parse_train(["--preset", wrong]).config.ral)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("[", "is not a JSON file"),
        ("[" * 100_000, "is not a JSON file"),
        ([1], "is not a preset: give names and values"),
        ({"seed": 1}, 'data is missing; or name a preset to change, such as "base": "demo"'),
        ({"base": "nothing"}, "preset 'nothing' is unknown"),
        ({"base": "evil:Config"}, "is code that a file names"),
        ({"base": 3}, "base is 3: give a preset's name"),
        ({"base": "smoke", "colour": 1}, "colour is an unknown setting"),
        ({"base": "smoke", "ral": {"gamma": "high"}}, "ral.gamma is 'high': give a number"),
        ({"base": "smoke", "ral": {"ppo": {"n_epoch": 1}}}, r"did you mean ral.ppo.n_epochs\?"),
        ({"base": "smoke", "ral": {"baseline": "none"}}, "ral.baseline is ral.reinforce.baseline"),
        ({"base": "smoke", "preset": "../../x"}, "preset is '../../x': give a name of letters"),
    ],
)
def test_a_file_that_is_no_preset_is_refused_in_one_line(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        get_preset(write(tmp_path / "wrong.json", values))
    assert "\n" not in str(caught.value)


def test_what_is_no_file_or_no_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a file"):
        get_preset(str(tmp_path / "none.json"))
    allow(f"{__name__}:CPU")
    with pytest.raises(ConfigError, match=r"is a device: give a ral_gym\.config\.Config"):
        get_preset(f"{__name__}:CPU")


def test_two_presets_cannot_have_one_name() -> None:
    registry = Registry("preset", "none.at.all")
    registry.register("a")(SMOKE)
    registry.register("a")(replace(SMOKE))  # the same settings, as a module that runs twice gives
    with pytest.raises(ConfigError, match="called 'a' is registered already"):
        registry.register("a")(OWN)


def test_the_examples_give_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    allow("own_preset:SHORT")
    module, data = get_preset("own_preset:SHORT"), get_preset(str(EXAMPLES / "own_preset.json"))
    assert replace(module, preset="own_preset") == data and data.ral.grpo.group_size == 4
    assert get_preset("short-faces") == replace(data, preset="short-faces")
    data.check()
    check_stage(data.ral)
