"""Check with a few forward passes, before hours of training, that a user's network keeps the `Prior` protocol."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ral_gym.errors import ConfigError, RalGymError
from ral_gym.priors.base import build_prior, check_members, config_of, kind_of, logits_of, split

TOLERANCE = 1e-2
"""Largest difference between features that should be equal, in units of their spread; kernels round differently."""


def is_own(prior: Any) -> bool:
    """Whether a network's class comes from outside this package."""
    return type(prior).__module__.partition(".")[0] != "ral_gym"


def check_prior(prior: Any, level: int = 0) -> None:
    """Refuse a network that breaks `ral_gym.priors.base.Prior`; the package's own networks are not checked.

    Checked: members, a config that makes the same network again, shapes, tokens of K and more, and causality. Random
    states, weights and the training mode do not change.

    Args:
        prior: the network.
        level: 0: the only or top prior; 1: a prior of bottom codes.

    Raises:
        ConfigError: what is wrong.
    """
    if not is_own(prior) or next(prior.parameters()).is_meta:
        return
    kind = kind_of(prior)
    check_members(prior, kind)
    if prior.levels != 1:
        raise ConfigError(
            f"prior {kind!r} has levels={prior.levels}: a prior of your own draws one grid, so set levels = 1"
        )
    if level and getattr(prior, "condition", None) is None:
        raise ConfigError(
            f"prior {kind!r} does not keep its condition: set self.condition to the constructor's argument"
        )
    training = prior.training
    with torch.random.fork_rng(), torch.no_grad():
        _check_config(prior, kind)
        try:
            prior.eval()
            _check_passes(prior, kind)
        except RalGymError:
            raise
        except Exception as error:  # third-party code
            reason = (str(error).strip() or "no reason given").splitlines()[0]
            raise ConfigError(f"prior {kind!r} fails on codes ({type(error).__name__}: {reason})") from error
        finally:
            prior.train(training)


def _check_config(prior: Any, kind: str) -> None:
    again = build_prior(config_of(prior))
    here, there = ({name: tuple(x.shape) for name, x in one.state_dict().items()} for one in (prior, again))
    if here != there:
        names = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
        raise ConfigError(
            f"prior {kind!r}: its config does not rebuild the same network ({names[0]} differs): it must hold every "
            "argument of the constructor"
        )


def _check_passes(prior: Any, kind: str) -> None:
    """Run it on one code grid, and on others that begin with the same codes."""
    size, length = prior.codebook_size, prior.height * prior.width
    device = next(prior.parameters()).device
    codes = torch.randint(size, (1, length), device=device)  # (1, T)
    above, classes = getattr(prior, "condition", None), getattr(prior, "classes", 0)
    if classes:
        prior.split(prior.grid.with_labels(codes, codes.new_zeros(1)))
    else:
        taken, own = split(prior, codes)
        if own is not None or taken.shape != codes.shape:
            return  # its sequences hold more than codes, in a format that only it knows
    entries = (0 if above is None else above[0] * above[1]) + (classes > 0)
    beside = (codes.new_zeros(1, entries),) if entries else ()
    features, logits = prior.features(codes, *beside), logits_of(prior, codes, *beside)
    for name, found, last in (("features", features, prior.hidden_units), ("a call", logits, size)):
        if tuple(found.shape) != (1, length, last):
            raise ConfigError(
                f"prior {kind!r}: {name} on codes (1, {length}) gives {tuple(found.shape)}: it must end in {last}"
            )
    _check_equal(prior.logits(features), logits, f"prior {kind!r}: logits(features(codes)) differ from a call's")
    here = length // 2
    for last, why in ((None, "is not causal"), (size, "reads the token K, not drawn yet"), (size + 1, "reads K + 1")):
        other = codes.clone()
        other[:, here:] = (codes[:, here:] + 1) % size if last is None else last
        found = prior.features(other, *beside)[:, : here + 1]
        said = f"prior {kind!r} {why}: changing the codes from position {here} on changes its features up to there"
        _check_equal(found, features[:, : here + 1], said)
    if above is None:
        found = prior.features(codes[:, : prior.width], *beside)
        _check_equal(found, features[:, : prior.width], f"prior {kind!r}: the first row alone gives other features")


def _check_equal(found: Tensor, expected: Tensor, message: str) -> None:
    spread = max(float(expected.std()), torch.finfo(expected.dtype).tiny)
    if found.shape != expected.shape or not float((found - expected).abs().max()) <= TOLERANCE * spread:
        raise ConfigError(message)
