"""What a run without images can do: one that `ral-gym import` made from checkpoints alone (``data.source none``).

It can be sampled from, and stage 3 can tune its prior on whole images with rewards that need no real ones. What needs
real images is refused before anything starts.
"""

from __future__ import annotations

from collections.abc import Collection

from ral_gym.config import Config
from ral_gym.errors import ConfigError
from ral_gym.registry import REWARDS
from ral_gym.rewards.terms import RewardTerm

REMEDY = "or import the checkpoint again with --data"


def check_without_images(config: Config, stages: Collection[str]) -> None:
    """Refuse what needs real images in a run that has none; other runs pass.

    Raises:
        ConfigError: which stage or setting, and what to give instead.
    """
    if config.data.has_images:
        return
    none = "this run has no images (data.source none)"
    if "evaluate" in stages:
        raise ConfigError(f"stage evaluate compares with real images, but {none}: give --stages ral, {REMEDY}")
    if "ral" not in stages:
        return
    ral = config.ral
    if ral.reset_mode in ("continue", "mixed"):
        raise ConfigError(
            f"ral.reset_mode {ral.reset_mode} continues real images, but {none}: give --ral.reset-mode full, {REMEDY}"
        )
    if ral.mle_coef:
        raise ConfigError(
            f"ral.mle_coef {ral.mle_coef:g} is maximum likelihood on real images, but {none}: give 0, {REMEDY}"
        )
    if ral.uses_critic:
        raise ConfigError(
            f"the critic is trained on real images, but {none}: give --ral.reward-weights terms other than critic, "
            f"{REMEDY}"
        )
    for name in ral.reward_weights:
        term = RewardTerm(name, REWARDS.get(name))
        if term.takes_moments and ral.reward_reference is None:
            raise ConfigError(
                f"the reward {name} compares with real images, but {none}: give their statistics "
                f"(--ral.reward-reference), {REMEDY}"
            )
        if term.needs_reference and not term.takes_moments:
            raise ConfigError(f"the reward {name} compares with real images, but {none}: leave it out, {REMEDY}")
