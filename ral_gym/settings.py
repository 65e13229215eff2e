"""Settings that are dicts: named rewards with their weights, a part's own options; how a command line gives them."""

from __future__ import annotations

import ast
import math
from typing import Annotated, Any

import tyro

from ral_gym.errors import ConfigError

CRITIC_ALONE = {"critic": 1.0}
"""The paper's reward."""
REWARD_TERMS = ("critic", "loo_fd", "loo_fd_first_order", "loo_fd_diagonal", "kid")
"""The co-trained critic, and the terms of `ral_gym.rewards.distribution`."""


def weight_words(weights: dict[str, float]) -> list[str]:
    """What a command line would say."""
    return [word for term, weight in weights.items() for word in (term, _number(weight))]


def _number(value: float) -> str:
    """The shortest words that are read as this number again."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _parse(words: list[str]) -> dict[str, float]:
    """``TERM WEIGHT TERM WEIGHT ..`` of a command line."""
    if len(words) % 2:
        raise ValueError("give pairs, such as: critic 1 loo_fd 0.5")
    return {term: float(weight) for term, weight in zip(words[::2], words[1::2], strict=True)}


RewardWeights = Annotated[
    dict[str, float],
    # Without it, a dict with a default becomes one flag per term that is there, and no term could be added.
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
    """What a command line would say; text that would be read as something else, or as a flag, is quoted."""
    words: list[str] = []
    for name, value in options.items():
        plain = isinstance(value, str) and _literal(value) == value and not value.startswith("-")
        words += [name, value if plain else _literal_of(value)]
    return words


def _literal_of(value: Any) -> str:
    """What `ast.literal_eval` reads as this value; infinity is not one of Python's literals."""
    return repr(value).replace("inf", "1e999") if isinstance(value, float) else repr(value)


def _parse_options(words: list[str]) -> dict[str, Any]:
    """``NAME VALUE NAME VALUE ..``; a value is a Python literal (4, 0.5, True, None) or else text."""
    if len(words) % 2:
        raise ValueError("give pairs, such as: heads 4 width 32")
    return {name: _literal(value) for name, value in zip(words[::2], words[1::2], strict=True)}


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
    """Refuse what is no set of weighed terms.

    Raises:
        ConfigError: no term, an unknown one, or a weight that is not a finite number above 0.
    """
    allowed = ", ".join(REWARD_TERMS)
    if not isinstance(weights, dict) or not weights:
        raise ConfigError(f"ral.reward_weights is {weights!r}: give one or more of {allowed}, each with its weight")
    for term, weight in weights.items():
        if term not in REWARD_TERMS:
            raise ConfigError(f"ral.reward_weights names {term!r}: choose among {allowed}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ConfigError(f"ral.reward_weights: {term} weighs {weight!r}: give a number above 0, or leave it out")
