"""``ral_gym/ToyClasses-v0``: the colour wheel with classes, each of which has its own rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ral_gym.envs.generation import RegisteredEnv
from ral_gym.envs.vector import RegisteredVectorEnv
from ral_gym.envs.worlds import (
    CRITIC_REWARDS,
    TOY_GRID,
    Scorer,
    World,
    check_reward,
    decode_toy,
    make_masks,
    term_scorer,
)
from ral_gym.rewards.score_map import RewardKind, step_rewards
from ral_gym.stages.device import resolve_device

CLASS_NAMES = ("same", "next", "previous")
STEPS = torch.tensor([0, 1, -1])
"""How many colours after its neighbour's a tile's should be, by class."""
GRID = replace(TOY_GRID, classes=len(CLASS_NAMES))


def toy_classes_world(reward: str = "single", device: str = "cpu", forbidden_codes: Sequence[int] = ()) -> World:
    """The colour wheel with three classes: no learned weights. The class says which colour follows a neighbour's.

    Raises:
        ValueError: unknown reward, or masks that leave nothing to draw.
        DeviceError: a device that does not exist here.
    """
    check_reward(reward, registered=True)
    where = resolve_device(device, auto=False)
    scorer: Scorer | None = None
    if reward in CRITIC_REWARDS:
        kind: RewardKind = "intermediate" if reward == "intermediate" else "single"
        scorer = partial(score_toy_classes, reward=kind)
    elif reward != "none":
        scorer = term_scorer(reward, TOY_GRID, decode_toy, where)
    return World(
        grid=GRID,
        decode=decode_toy,
        scorer=scorer,
        real_codes=toy_classes_sequences(),
        row_multiple=1,
        device=where,
        masks=make_masks(GRID.codebook_size, forbidden_codes, None, None),
        recipe=(toy_classes_world, (reward, device, tuple(forbidden_codes))),
        class_names=CLASS_NAMES,
    )


def score_toy_classes(codes: Tensor, labels: Tensor, reward: RewardKind) -> tuple[Tensor, Tensor]:
    """Codes (B, r * 4) and classes (B,) -> score map (B, r, 4), step rewards (B, r * 4)."""
    score_map = toy_classes_score_map(codes, labels)
    return score_map, step_rewards(score_map, score_map.shape[1], GRID.width, reward)


def toy_classes_score_map(codes: Tensor, labels: Tensor) -> Tensor:
    """1 where a code obeys its class's rule (or is the first one), else 0: (B, r * 4), (B,) -> (B, r, 4) float32."""
    grid = codes.reshape(len(codes), -1, GRID.width)  # (B, r, 4)
    above = F.pad(grid[:, :-1, :1], (0, 0, 1, 0))  # (B, r, 1)
    neighbour = torch.cat([above, grid[:, :, :-1]], 2)  # (B, r, 4)
    wanted = (neighbour + STEPS.to(codes.device)[labels][:, None, None]) % GRID.codebook_size
    wanted[:, 0, 0] = grid[:, 0, 0]
    return (grid == wanted).float()


def toy_classes_sequences() -> np.ndarray:
    """The K perfect images of every class with their labels, (3 K, T + 1) int16."""
    first = np.arange(GRID.codebook_size)[:, None, None]
    away = np.arange(GRID.height)[:, None] + np.arange(GRID.width)  # (H, W) steps from the first tile
    images = [((first + step * away) % GRID.codebook_size).reshape(len(first), -1) for step in STEPS.tolist()]
    labels = np.arange(GRID.classes).repeat(GRID.codebook_size)
    return GRID.with_labels(np.concatenate(images).astype(np.int16), labels)


class ToyClassesEnv(RegisteredEnv):
    """Draw 4 x 4 coloured tiles by the rule of the class that the episode asks for.

    ## Description

    `ToyEnv` with three classes: each tile should have the *same* colour as its neighbour (class 0), the *next* one
    (class 1) or the *previous* one (class 2). The neighbour is the tile to the left, in the first column the one above;
    the first tile is free. There are 24 perfect images, 8 of each class. Nobody who ignores the class can score more
    than 0.38 on average.

    >>> import gymnasium as gym, ral_gym
    >>> env = gym.make("ral_gym/ToyClasses-v0", render_mode="ansi")
    >>> observation, info = env.reset(seed=0, options={"label": "previous"})
    >>> observation[-1], info
    (np.int16(12), {'label': 2})
    >>> for code in [3, 2, 1, 0, 2, 1, 0, 7, 1, 0, 7, 6, 0, 7, 6, 4]:
    ...     observation, reward, terminated, truncated, info = env.step(code)
    >>> print(env.render(), end="")
    3 2 1 0
    2 1 0 7
    1 0 7 6
    0 7 6 4
    class: previous
    >>> reward, info["label"]
    (0.9375, 2)

    ## Action Space

    ``Discrete(8)``: the next tile's colour.

    ## Observation Space

    ``Box(0, 12, (17,), int16)``: the 16 tiles in raster order; 8 means "not drawn yet", 9 "will not be drawn in this
    episode". The last entry is the class's label, 10, 11 or 12, from the first observation on.

    ## Rewards

    0 until the last tile. Then the share of tiles that obey the rule of the class (`reward="single"`), or their number
    (`reward="intermediate"`; ``info["step_rewards"]`` has 1 or 0 for every drawn tile). `reward="none"`: always 0.
    A random policy scores 0.18; the best possible is 1 (or 16), and from 0.9 on (`reward="single"`) the task counts as
    solved: ``spec.reward_threshold``.

    ## Starting State

    As `LatentCodeEnv`, options included; the real images are the 24 perfect ones. The class is drawn uniformly, that of
    a continued image is its own, and `reset(options={"label": ...})` gives another: 0, 1, 2 or a name.

    >>> observation, info = env.reset(seed=0, options={"label": 1, "prefix_rows": 2})
    >>> print(env.render(), end="")
    6 7 0 1
    7 0 1 2
    . . . .
    . . . .
    class: next

    ## Episode End

    `terminated` after the episode's last tile. `truncated` is always False.

    ## Information

    After a reset `label`, the class as an int. At the last step also `codes` (17,) int16 (the last observation),
    `score_map` (4, 4) float32, `step_rewards` (16,) float32.

    ## Arguments

    `reward`, `reset_mode`, `render_mode`, `device`, `forbidden_codes`, `label_draw`: as `LatentCodeEnv`. `gym.make_vec`
    takes `autoreset_mode`, `lockstep` and `paired` too: see `GenerationVectorEnv`.

    ## Version History

    * v0: first release.
    """

    make_world = staticmethod(toy_classes_world)


class ToyClassesVectorEnv(RegisteredVectorEnv):
    """Many `ToyClassesEnv` episodes at once; `GenerationVectorEnv` explains the arguments."""

    make_world = staticmethod(toy_classes_world)
