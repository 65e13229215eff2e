"""Settings from outside: whatever stands in a file, it is a `Config` in range or one line that says what is wrong."""

import dataclasses
import json
import random
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from ral_gym.config import Config
from ral_gym.errors import ConfigError, printable
from ral_gym.presets import SMOKE
from ral_gym.schema import check_types, config_from, type_hints


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    size: int | None = None


@dataclass(frozen=True)
class Outer:
    name: str
    kind: Literal["a", "b"] = "a"
    inner: Inner = field(default_factory=Inner)
    sizes: tuple[int, ...] = ()
    pair: tuple[int, str] = (1, "x")
    weights: dict[str, float] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    on: bool = False
    either: int | str = 0


def test_every_kind_of_field_is_read() -> None:
    values = {
        "name": "x",
        "kind": "b",
        "inner": {"rate": 1, "size": 3},
        "sizes": [1, 2],
        "pair": [2, "y"],
        "weights": {"kid": 2},
        "options": {"a": None, "b": True, "c": "d", "e": 1.5},
        "on": True,
        "either": "z",
    }
    expected = Outer("x", "b", Inner(1.0, 3), (1, 2), (2, "y"), {"kid": 2.0}, values["options"], True, "z")
    read = config_from(Outer, values)
    assert read == expected and isinstance(read.inner.rate, float)
    check_types(read)


def test_what_is_left_out_has_the_default_or_the_given_settings_value() -> None:
    base = Outer("base", inner=Inner(0.1, 7), sizes=(1,))
    assert config_from(Outer, {"inner": {"rate": 0.2}}, defaults=base) == Outer("base", inner=Inner(0.2, 7), sizes=(1,))
    assert config_from(Outer, {"name": "n", "inner": {"size": 4}}) == Outer("n", inner=Inner(0.5, 4))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": 1}, "here: name is 1: give text"),
        ({"name": "a\0b"}, "name is 'a"),
        ({"name": "x" * 5000}, "name is 'xxx"),
        ({"colour": 1}, "here: colour is an unknown setting"),
        ({"inner": {"rat": 1}}, r"here: inner.rat is an unknown setting \(did you mean inner.rate\?\)"),
        ({"inner": []}, "here: inner is a list: give names and values"),
        ({"inner": {"rate": 10**400}}, "here: inner.rate is an integer of 1329 bits: give a number"),
        ({"inner": {"rate": True}}, "inner.rate is True: give a number"),
        ({"inner": {"size": 1.0}}, "inner.size is 1.0: give an integer"),
        ({"kind": "c"}, "kind is 'c': give a or b"),
        ({"kind": ["a"]}, "kind is a list: give a or b"),
        ({"sizes": 5}, "sizes is 5: give a list; each entry an integer"),
        ({"sizes": "12"}, "sizes is '12': give a list"),
        ({"sizes": [None]}, "sizes is None: give an integer"),
        ({"pair": [1]}, "pair is a list: give a list"),
        ({"weights": {"kid": "x"}}, "weights.kid is 'x': give a number"),
        ({"options": {"a": [1]}}, "options.a is a list: give a number, true, false, null or text"),
        ({"on": 1}, "on is 1: give true or false"),
        ({"either": []}, "either is a list: give text"),
    ],
)
def test_other_values_are_refused_by_name(change, words) -> None:
    with pytest.raises(ConfigError, match=words):
        config_from(Outer, {"name": "x", **change}, "here")
    with pytest.raises(ConfigError, match="name is missing"):
        config_from(Outer, {})


def test_a_config_that_a_program_builds_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="seed is 'abc': give an integer"):
        dataclasses.replace(SMOKE, seed="abc").check()  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"prior is None: give a PriorConfig"):
        dataclasses.replace(SMOKE, prior=None).check()  # type: ignore[arg-type]


def fields_of(cls: type, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, hint in type_hints(cls).items():
        found += fields_of(hint, (*path, name)) if dataclasses.is_dataclass(hint) else [(*path, name)]  # type: ignore[arg-type]
    return found


HOSTILE: list[Any] = [
    None, True, -1, 0, 3.5, 10**9, 10**30, 10**400, float("nan"), float("inf"), -1e308, "", "abc", "16", "\0",
    "x" * 5000, "../../x",
    "\x1b[31m", "\udc80", [], ["ppo"], [None], [[[]]], {}, {"a": "b"}, {"critic": "x"}, {"<script>": 1},
]  # fmt: skip


def test_any_value_in_any_place_is_a_setting_in_range_or_one_short_line() -> None:
    """Every field with every odd value; what passes must also survive being written and read."""
    whole = json.loads(SMOKE.to_json())
    sections = [(name,) for name in whole]
    refused = 0
    for path in [*sections, *fields_of(Config), ("extra",), ("data", "extra")]:
        for value in HOSTILE:
            changed = json.loads(SMOKE.to_json())
            place = changed
            for name in path[:-1]:
                place = place[name]
            place[path[-1]] = value
            try:
                config = Config.from_dict(changed)
                config.check()
            except ConfigError as error:
                refused += 1
                message = str(error)
                assert message.isprintable() and len(message) < 600, message
            else:
                assert Config.from_dict(json.loads(config.to_json())) == config
    assert refused > 1000


def test_every_number_has_a_largest_value_and_no_number_may_be_nan() -> None:
    """So that memory and time have an end, whatever a file says."""
    for path in fields_of(Config):
        section = SMOKE
        for name in path[:-1]:
            section = getattr(section, name)
        hint = type_hints(type(section))[path[-1]]
        wrong = {int: 10**15, int | None: 10**15, float: float("nan"), tuple[float, ...]: (float("nan"),)}.get(hint)
        if wrong is None:
            continue
        values = json.loads(SMOKE.to_json())
        place = values
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = wrong
        with pytest.raises(ConfigError, match=path[-1]):
            Config.from_dict(values).check()


def test_a_random_tree_of_json_is_never_more_than_one_line() -> None:
    rng = random.Random(0)

    def tree(depth: int) -> Any:
        kind = rng.randrange(3 if depth else 1)
        if kind == 1:
            return [tree(depth - 1) for _ in range(rng.randrange(4))]
        if kind == 2:
            names = [*dataclasses.asdict(SMOKE), "kind", "\x1b", ""]
            return {rng.choice(names): tree(depth - 1) for _ in range(rng.randrange(6))}
        return rng.choice(HOSTILE)

    for _ in range(300):
        values = {**json.loads(SMOKE.to_json()), **{rng.choice(list(dataclasses.asdict(SMOKE))): tree(4)}}
        try:
            Config.from_dict(values).check()
        except ConfigError as error:
            assert str(error).isprintable()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("naïve Zürich 日本", "naïve Zürich 日本"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("one\ntwo\r\u2028", r"one\ntwo\r\u2028"),
        ("\u202egnp.exe\u2069", r"\u202egnp.exe\u2069"),
        ("caf\udce9", r"caf\udce9"),
        ("\x9b31m", r"\x9b31m"),
    ],
)
def test_printable_text_shows_what_a_terminal_would_obey(text, expected) -> None:
    assert printable(text) == expected


def test_printable_text_has_an_end_and_every_error_is_printable() -> None:
    assert len(printable("x" * 10**6)) <= 2000
    assert printable("start" + "x" * 5000 + "end", 40).startswith("start")
    assert printable("start" + "x" * 5000 + "end", 40).endswith("end")
    assert str(ConfigError("a\x1b[2J\nb")) == r"a\x1b[2J\nb"
