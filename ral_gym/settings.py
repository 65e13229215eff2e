"""Settings that are dicts (reward weights, a part's own options), and their form on the command line."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import string
from collections.abc import Collection, Sequence
from typing import Annotated, Any

import tyro

from ral_gym.errors import ConfigError
from ral_gym.registry import CRITICS, EXTRACTORS, REWARDS

CRITIC_ALONE = {"critic": 1.0}
"""The paper's reward."""


def weight_words(weights: dict[str, float]) -> list[str]:
    """The weights as words of a command line."""
    return [word for term, weight in weights.items() for word in (term, _number(weight))]


def _number(value: float) -> str:
    """The shortest text that parses to this number again."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _pairs(words: list[str], example: str) -> list[tuple[str, str]]:
    if len(words) % 2:
        raise ValueError(f"give pairs, such as: {example}")
    return list(zip(words[::2], words[1::2], strict=True))


def _parse(words: list[str]) -> dict[str, float]:
    """``TERM WEIGHT TERM WEIGHT ..`` of a command line."""
    return {term: float(weight) for term, weight in _pairs(words, "critic 1 loo_fd 0.5")}


RewardWeights = Annotated[
    dict[str, float],
    # Without it, a dict with a default becomes one flag per existing term, and no term could be added.
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="TERM WEIGHT ..",
        instance_from_str=_parse,
        is_instance=lambda instance: isinstance(instance, dict),
        str_from_instance=weight_words,
    ),
]
"""Term -> weight; on a command line ``critic 1 loo_fd 0.5``."""


def option_words(options: dict[str, Any]) -> list[str]:
    """The options as words of a command line; text that would parse as another value or as a flag is quoted."""
    words: list[str] = []
    for name, value in options.items():
        plain = isinstance(value, str) and _literal(value) == value and not value.startswith("-")
        words += [name, value if plain else _literal_of(value)]
    return words


def _literal_of(value: Any) -> str:
    """Text that `ast.literal_eval` parses to this value; infinity is not a Python literal."""
    return repr(value).replace("inf", "1e999") if isinstance(value, float) else repr(value)


def _parse_options(words: list[str]) -> dict[str, Any]:
    """``NAME VALUE NAME VALUE ..``; a value is a Python literal (4, 0.5, True, None) or else text."""
    return {name: _literal(value) for name, value in _pairs(words, "heads 4 width 32")}


def _literal(word: str) -> Any:
    try:
        value = ast.literal_eval(word)
    except (MemoryError, RecursionError, SyntaxError, ValueError):
        return word
    return value if value is None or isinstance(value, bool | int | float | str) else word


Options = Annotated[
    dict[str, Any],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME VALUE ..",
        instance_from_str=_parse_options,
        is_instance=lambda instance: isinstance(instance, dict),
        str_from_instance=option_words,
    ),
]
"""Argument -> value (a number, a truth value, None or text); on a command line ``heads 4 width 32``."""


def check_reward_weights(weights: Any) -> None:
    """Refuse anything but a dict of weighted terms; `check_parts` looks the names up.

    Raises:
        ConfigError: no term, a name that is not text, or a weight that is not a finite number above 0.
    """
    known = ", ".join(REWARDS)
    if not isinstance(weights, dict) or not weights:
        raise ConfigError(f"ral.reward_weights is {weights!r}: give one or more of {known}, each with its weight")
    for term, weight in weights.items():
        if not isinstance(term, str) or not term or "/" in term or not term.isprintable():
            raise ConfigError(f"ral.reward_weights names {term!r}: choose among {known}, or your own module:function")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ConfigError(
                f"ral.reward_weights: {term} has weight {weight!r}: give a number above 0, or leave it out"
            )


def check_prompt(prompt: str, class_names: Sequence[str] | None = None) -> None:
    """Refuse a template that is no text with at most the field {name}.

    Args:
        prompt: `ral.prompt`.
        class_names: of the run's images; None: not known yet.

    Raises:
        ConfigError: an empty prompt, another field, a format, a stray brace; or {name} where no class has a name.
    """
    try:
        fields = list(string.Formatter().parse(prompt))
    except ValueError:
        fields = [("", "", "", "")]
    named = [field for field in fields if field[1] is not None]
    if not prompt.strip() or not prompt.isprintable() or any(field[1:] != ("name", "", None) for field in named):
        raise ConfigError(f"ral.prompt is {prompt[:60]!r}: give a text, with {{name}} where the name of the class goes")
    if class_names is not None and named and not class_names:
        raise ConfigError(
            f"ral.prompt is {prompt[:60]!r}, but the images have no labels to name: give a prompt without {{name}}"
        )


def check_parts(weights: dict[str, float], critic: str, features: str = "encoder") -> None:
    """Refuse names of rewards, their features, and the critic, that stage 3 would not find; nothing is imported.

    `Config.check` does not do this, so that a run made with custom parts can be sampled from without them.

    Raises:
        ConfigError: an unknown name, or code that only a file names.
    """
    for term in weights:
        REWARDS.check(term)
    if "critic" in weights:
        CRITICS.check(critic)
    EXTRACTORS.check(features)


def constructor_parameters(cls: type) -> tuple[frozenset[str], bool]:
    """The names that a class's constructor takes, and whether it takes any others.

    A constructor with ``**kwargs`` is assumed to pass them on to its base class's.
    """
    names: set[str] = set()
    for base in cls.__mro__:
        own = vars(base).get("__init__")
        if base is object or base.__module__.startswith("torch.nn.modules."):
            return frozenset(names - {"self"}), True
        if own is not None:
            parameters = inspect.signature(own).parameters.values()
            names |= {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
            if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                break
    return frozenset(names - {"self"}), False


def part_arguments(
    cls: type,
    settings: Any,
    section: str,
    *,
    training: Collection[str],
    given: Collection[str],
    untouched: Sequence[Any],
) -> dict[str, Any]:
    """A part's constructor arguments from its section of the settings: the fields that it takes, and its options.

    Args:
        cls: the part's class.
        settings: a dataclass with `kind`, `options` and further fields.
        section: its name, such as ``prior``.
        training: fields that the stage's training loop reads instead of the part.
        given: arguments that the caller fills in.
        untouched: defaults and the preset's settings: a value that equals one of them was not changed by the user.

    Raises:
        ConfigError: a changed setting or an option that the part does not take.
    """
    taken, any_other = constructor_parameters(cls)
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    kind, options = values.pop("kind"), values.pop("options")
    sizes = {name: value for name, value in values.items() if name not in training}
    for name, value in sizes.items():
        if name not in taken and all(value != getattr(other, name) for other in untouched):
            raise ConfigError(f"{section}.{name} is {value!r}, but {kind} takes no {name}: leave {section}.{name} out")
    free = sorted(taken - sizes.keys() - set(given) - set(training))
    for name in options:
        if name in given:
            raise ConfigError(f"{section}.options names {name}, which the run fills in: leave it out")
        if name in values:
            raise ConfigError(f"{section}.options names {name}, which is a setting: give {section}.{name}")
        if name not in taken and not any_other:
            choice = f"choose among {', '.join(free)}" if free else "it has no options"
            raise ConfigError(f"{section}.options names {name}, but {kind} takes no {name}: {choice}")
    return {name: value for name, value in sizes.items() if name in taken} | options
