"""A pass of an update through the policy: what it gives, its precision, and which policies an algorithm can take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ral_gym.agents.episodes import Episodes
from ral_gym.agents.policy import PriorPolicy
from ral_gym.errors import ConfigError

Precision = Literal["no", "bf16"]
Figures = dict[str, Tensor | float]
"""Numbers for the log; scalars on the device are fetched once per update, since each fetch waits for the device."""


class Pass(NamedTuple):
    """What the policy says of N transitions, in 32 bits or more."""

    features: Tensor
    """(N, C)."""
    position: Tensor
    """(N,) int64, of the next code in its image."""
    stop: Tensor
    """(N,) int64, how many codes the image will have."""
    log_probs: Tensor
    """(N, K)."""
    log_prob: Tensor
    """(N,), of the codes that were drawn."""
    actions: Tensor
    """(N,) int64, those codes."""


def look(policy: PriorPolicy, episodes: Episodes, precision: Precision) -> Pass:
    """One pass over episodes."""
    with autocast(policy, precision):
        features, position, stop = policy._features(episodes)
        logits = policy.episode_logits(episodes, features)
    log_probs = in_32_bits(logits).log_softmax(1)  # (N, K)
    actions = episodes.codes[episodes.row, episodes.pos]
    log_prob = log_probs.gather(1, actions[:, None]).squeeze(1)  # (N,)
    return Pass(in_32_bits(features), position, stop, log_probs, log_prob, actions)


def autocast(policy: PriorPolicy, precision: Precision) -> torch.autocast:
    """The context of a pass."""
    return torch.autocast(policy.device.type, torch.bfloat16, enabled=precision == "bf16")


def in_32_bits(tensor: Tensor) -> Tensor:
    """float16 and bfloat16 as float32; others as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def in_64_bits(value: Tensor | float) -> Tensor | float:
    """A number for the log without its gradient, as precise as Python's own."""
    return value.detach().double() if isinstance(value, Tensor) else value


def checked_precision(precision: Precision) -> Precision:
    """Raise `ConfigError` for a precision that there is none of."""
    if precision not in ("no", "bf16"):
        raise ConfigError(f"mixed_precision {precision!r} is unknown: choose no or bf16")
    return precision


def check_policy(policy: Any, names: Iterable[str], algorithm: str) -> None:
    """Refuse a policy that draws no whole images.

    Raises:
        ConfigError: neither one of the names nor a `PriorPolicy`.
    """
    fits = policy in names if isinstance(policy, str) else issubclass(policy, PriorPolicy)
    if not fits:
        name = repr(policy) if isinstance(policy, str) else policy.__name__
        raise ConfigError(f"{algorithm} draws whole images, which policy {name} cannot: give PriorPolicy")
