"""What rewards take from the settings, checked before anything is trained."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from ral_gym.config import Config
from ral_gym.errors import ConfigError
from ral_gym.registry import EXTRACTORS, METRICS, REWARDS
from ral_gym.rewards.reference import load_reference
from ral_gym.rewards.terms import RewardTerm
from ral_gym.settings import constructor_parameters

REWARD_SETTINGS = ("clip_path", "hps_path", "prompt")
"""Settings of `ral` that a reward's constructor may name."""
FILLED_IN = ("reference", "ema", "components", "class_names", "device")
"""Other arguments that a reward gets from the run."""


def reward_options(config: Config) -> dict[str, Any]:
    """The settings that a reward's constructor may name: three of `ral`, and all of `ral.reward_options`."""
    return {name: getattr(config.ral, name) for name in REWARD_SETTINGS} | config.ral.reward_options


def check_terms(config: Config, terms: Sequence[RewardTerm]) -> None:
    """Refuse before stage 1 options and files that no reward takes, or that a reward refuses.

    Raises:
        ConfigError: which one, and what is allowed.
    """
    _check_options(config, terms)
    if config.ral.reward_reference is not None:
        _check_reference(config, terms)


def _check_options(config: Config, terms: Sequence[RewardTerm]) -> None:
    """Refuse options that no reward takes, and what the rewards' own checks refuse."""
    options = reward_options(config)
    taken: set[str] = set()
    for term in terms:
        check = getattr(term.part, "check", None)
        if isinstance(term.part, type):
            names, any_other = constructor_parameters(term.part)
            taken |= set(options) if any_other and not issubclass(term.part, nn.Module) else names
        if isinstance(term.part, type) and callable(check):
            check(**{name: options[name] for name in inspect.signature(check).parameters if name in options})
    for name in config.ral.reward_options:
        if name in REWARD_SETTINGS or name in FILLED_IN:
            where = f"give ral.{name}" if name in REWARD_SETTINGS else "which the run fills in: leave it out"
            raise ConfigError(f"ral.reward_options names {name}, {where}")
        if name not in taken:
            raise ConfigError(f"ral.reward_options names {name}, but none of the rewards takes it: leave it out")


def _check_reference(config: Config, terms: Sequence[RewardTerm]) -> None:
    """Refuse statistics that no reward could use."""
    using = [term.name for term in terms if term.takes_moments]
    if not using:
        raise ConfigError(
            "ral.reward_reference is given, but no reward compares to statistics: leave it out, or add loo_fd"
        )
    moments = load_reference(str(config.ral.reward_reference))
    if moments.extractor != config.ral.reward_features:
        raise ConfigError(
            f"ral.reward_reference has statistics of {moments.extractor[:60]} features, but ral.reward_features is "
            f"{config.ral.reward_features}: give a reference of these, or change one of them"
        )
    if moments.covariance.dim() == 1 and (others := [name for name in using if name != "loo_fd_diagonal"]):
        raise ConfigError(
            f"ral.reward_reference has variances only, which loo_fd_diagonal can use; {others[0]} needs the covariance"
        )


def judge_notes(config: Config) -> list[str]:
    """One line for each reward whose network also measures the result, which then says little."""
    judges = {config.evaluation.extractor: EXTRACTORS, **dict.fromkeys(config.evaluation.metrics, METRICS)}
    notes = []
    for term in config.ral.reward_weights:
        own = REWARDS.get(term)
        for name, kind in judges.items():
            if name == term or _network_of(own, term) == _network_of(kind.get(name), name):
                notes.append(
                    f"the reward {term} is by the network that also judges (evaluation: {name}): that column will say "
                    "little; judge by another one too"
                )
    return notes


def _network_of(part: Any, name: str) -> str:
    """What a part calls its network (`network_name`), or else its own name."""
    found = getattr(part, "network_name", None)
    return found if isinstance(found, str) else name
