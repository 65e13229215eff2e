"""The named rewards of stage 3 and their weights, as settings: what they may be, and how a command line gives them."""

from __future__ import annotations

import math
from typing import Annotated, Any

import tyro

from ral_gym.errors import ConfigError

CRITIC_ALONE = {"critic": 1.0}
"""The paper's reward."""
REWARD_TERMS = ("critic", "loo_fd", "loo_fd_first_order", "loo_fd_diagonal", "kid")
"""The co-trained critic, and the terms of `ral_gym.distribution_rewards`."""


def _words(weights: dict[str, float]) -> list[str]:
    """What a command line would say."""
    return [word for term, weight in weights.items() for word in (term, f"{weight:g}")]


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
        str_from_instance=_words,
    ),
]
"""Term -> weight; on a command line ``critic 1 loo_fd 0.5``."""


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
