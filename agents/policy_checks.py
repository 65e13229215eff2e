"""What a policy refuses: environments that do not fit its prior, and arguments that it does not have."""

from __future__ import annotations

from typing import Any

from gymnasium import spaces

from ral_gym.agents.spaces import sequence_shape
from ral_gym.errors import ConfigError
from ral_gym.grid import CodeGrid

OF_OTHERS = {"q_net": "DQN", "quantile_net": "QRDQN", "lstm_actor": "RecurrentPPO"}
"""The network that an algorithm asks its policy for -> the algorithm; a `PriorPolicy` has no such network."""


class NoSuchNetwork(ConfigError, AttributeError):
    """An `AttributeError` too, for `hasattr`."""


def check_spaces(
    grid: CodeGrid,
    levels: tuple[int, ...] | None,
    train_levels: str,
    observation_space: spaces.Space,
    action_space: spaces.Space,
) -> None:
    """Refuse an environment that draws other codes than the prior.

    Args:
        grid: the prior's codes.
        levels: how many codes each level of the environment has; None: unknown.
        train_levels: the setting.
        observation_space: the environment's.
        action_space: the environment's.

    Raises:
        ConfigError: says what differs.
    """
    size, shapes = grid.codebook_size, " + ".join(f"{rows}x{columns}" for rows, columns in grid.shapes)
    if not isinstance(action_space, spaces.Discrete) or int(action_space.n) != size:
        raise ConfigError(f"the prior draws {size} codes, but the environment's action space is {action_space}")
    shape = sequence_shape(observation_space, action_space)
    if shape is not None and shape.n_codes == grid.n_codes and shape.classes != grid.classes:
        raise ConfigError(
            f"the prior knows {grid.classes or 'no'} classes, but the environment has {shape.classes or 'none'}: "
            f"give a prior that was made with classes={shape.classes}"
        )
    if observation_space.shape != (grid.length,):
        raise ConfigError(
            f"the prior draws grids of {shapes} = {grid.n_codes} codes, but the "
            f"environment's observations have shape {observation_space.shape}"
        )
    if levels is not None and levels != grid.level_sizes:
        raise ConfigError(
            f"the prior draws grids of {shapes} codes, but the environment's levels have {' + '.join(map(str, levels))}"
        )
    if train_levels not in ("both", "top", "bottom"):
        raise ConfigError(f"train_levels {train_levels!r} is unknown: choose both, top or bottom")
    if train_levels != "both" and grid.levels == 1:
        raise ConfigError(f"train_levels={train_levels!r} needs a prior of two levels, this one has one")


def refuse_drawing(policy: str, drawing: dict[str, Any]) -> None:
    """Raise for arguments that do not exist, with the reason for those that samplers have."""
    name = next(iter(drawing))
    if name not in ("temperature", "top_k", "top_p", "cutoff"):
        raise TypeError(f"{policy} got an unexpected keyword argument {name!r}")
    raise ConfigError(
        f"{name}={drawing[name]} in rollouts: the codes would not be drawn from the policy whose log-probabilities are "
        "trained; leave it out, and give it to a sampler or to ral-gym sample"
    )
