"""The world of an environment: the code grid, real codes, and functions from codes to images and scores.

Environments are made from JSON-able arguments (paths and names), so that a spec can be stored and sent; the models
behind them are loaded once per process and shared. A world is pickled as those arguments, never as weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ral_gym.grid import CodeGrid
from ral_gym.priors.base import Prior
from ral_gym.registry import REWARDS as TERMS
from ral_gym.registry import is_path
from ral_gym.rewards.score_map import RewardKind, step_rewards
from ral_gym.rewards.terms import RewardTerm
from ral_gym.rewards.view import View
from ral_gym.stages.device import resolve_device

Scorer = Callable[..., tuple[Tensor, Tensor]]
"""Drawn codes (B, r * W) int64 -> score map (B, h, w), step rewards (B, r * W), all on the world's device.

In a world with classes a scorer gets the images' classes (B,) int64 as a second argument."""

CRITIC_REWARDS = ("single", "intermediate")
"""The rewards that a critic, or the toy environment's rule, can give."""
REWARDS = (*CRITIC_REWARDS, "none")


@dataclass(frozen=True)
class Masks:
    """The codes that an agent may draw next, for `MaskablePPO`; `step` accepts every code of the codebook.

    Attributes:
        forbidden_codes: codes that are never drawn.
        top_k: of the other codes allow only the k likeliest under `prior`, given the codes so far; None: all of them.
        prior: the network for `top_k`.
    """

    forbidden_codes: tuple[int, ...] = ()
    top_k: int | None = None
    prior: Prior | None = None


def make_masks(codebook_size: int, forbidden_codes: Sequence[int], top_k: int | None, prior: Prior | None) -> Masks:
    """Check the arguments `forbidden_codes` and `top_k` of an environment.

    Raises:
        ValueError: a code outside the codebook, nothing left to draw, or `top_k` without a prior.
    """
    codes = tuple(sorted({int(code) for code in forbidden_codes}))
    if codes and not 0 <= codes[0] <= codes[-1] < codebook_size:
        raise ValueError(f"forbidden_codes lie in {codes[0]}..{codes[-1]}: codes are 0..{codebook_size - 1}")
    if len(codes) == codebook_size:
        raise ValueError(f"forbidden_codes names all {codebook_size} codes: leave at least one")
    if top_k is not None and not 1 <= top_k <= codebook_size:
        raise ValueError(f"top_k={top_k} is out of range: choose 1..{codebook_size}")
    if top_k is not None and prior is None:
        raise ValueError(f"top_k={top_k} needs a prior, but this environment has none")
    return Masks(codes, top_k, None if top_k is None else prior)


@dataclass(frozen=True)
class World:
    """Everything an environment needs that does not change while it runs.

    Attributes:
        grid: the code grid, and how many classes there are.
        decode: codes (B, r * W), without labels, -> images (B, C, h, S) uint8.
        scorer: drawn codes -> score map and step rewards; None: rewards are 0.
        real_codes: (N, T) int16 codes of real images, with classes sequences (N, T + 1); or None.
        row_multiple: code rows per score-map row.
        device: where codes are decoded and scored.
        oracle: rewards every code at once with its log-probability, instead of the scorer at the end; score maps still
            come from the scorer. None: rewards come with the last code.
        masks: which codes an agent may draw.
        recipe: a function and its arguments that make the same world again, used for pickling and copying. None: the
            world itself is pickled, as far as its parts allow.
        class_names: the name of every class; empty: they have no names, or there are no classes.

    Raises:
        ValueError: real codes whose length is not that of the grid's sequences.
    """

    grid: CodeGrid
    decode: Callable[[Tensor], Tensor]
    scorer: Scorer | None
    real_codes: np.ndarray | None
    row_multiple: int
    device: torch.device
    oracle: Prior | None = None
    masks: Masks = Masks()
    recipe: tuple[Callable[..., World], tuple[Any, ...]] | None = None
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        real, length = self.real_codes, self.grid.length
        if self.grid.classes and real is not None and real.shape[1:] != (length,):
            raise ValueError(
                f"real_codes have shape {real.shape}: with {self.grid.classes} classes a row has {length} entries, "
                f"{self.grid.n_codes} codes and their label (CodeGrid.with_labels)"
            )

    def made_by(self, make: Callable[..., World], arguments: tuple[Any, ...]) -> World:
        """The same world with another recipe."""
        return replace(self, recipe=(make, arguments))

    def __reduce__(self) -> tuple[Any, ...]:
        if self.recipe is not None:
            return self.recipe
        parts = (self.grid, self.decode, self.scorer, self.real_codes, self.row_multiple, self.device)
        return World, (*parts, self.oracle, self.masks, None, self.class_names)


def check_reward(reward: str, allowed: Sequence[str] = REWARDS, registered: bool = False) -> None:
    """Raise `ValueError` for a reward that does not exist.

    Args:
        reward: its name.
        allowed: the environment's own.
        registered: names in `ral_gym.registry.REWARDS` are allowed too.
    """
    if reward in allowed or (registered and reward in TERMS):
        return
    if registered and is_path(reward):
        TERMS.check(reward)
        return
    own = ", or a registered reward" if registered else ""
    raise ValueError(f"reward {reward!r} is unknown: choose one of {', '.join(allowed)}{own}")


def term_scorer(reward: str, grid: CodeGrid, decode: Callable[[Tensor], Tensor], device: torch.device) -> Scorer:
    """A registered reward of single images as a scorer: a score map of one cell, given with the last code.

    Raises:
        ValueError: a reward that compares a whole batch, or that sees features.
    """
    part = TERMS.get(reward)
    if isinstance(part, type) or hasattr(part, "state_dict") or getattr(part, "sees", "pixels") == "features":
        raise ValueError(
            f"reward {reward!r} needs more than one image's pixels or codes, so an environment cannot give it: use "
            "CompositeReward, or --ral.reward-weights"
        )
    term = RewardTerm(reward, part)

    def score(codes: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        view = View(codes, decode, labels)
        rewards = term(view, grid.rows_of(codes.shape[1])).float().to(device)  # (B,) or (B, r * W)
        if rewards.dim() == 2:
            return rewards.mean(1)[:, None, None], rewards
        return rewards[:, None, None], F.pad(rewards[:, None], (codes.shape[1] - 1, 0))

    return score


TOY_GRID = CodeGrid(height=4, width=4, codebook_size=8)
TOY_TILE = 8
"""Pixels per tile."""
TOY_COLOURS = torch.tensor(
    [
        [0, 114, 178],
        [86, 180, 233],
        [0, 158, 115],
        [240, 228, 66],
        [230, 159, 0],
        [213, 94, 0],
        [204, 121, 167],
        [120, 94, 160],
    ],
    dtype=torch.uint8,
)


def toy_world(reward: str = "single", device: str = "cpu", forbidden_codes: Sequence[int] = ()) -> World:
    """The colour wheel: no learned weights. Each code should be the next colour after its neighbour.

    The neighbour is the code to the left, in the first column the one above; the first code is free. The score map has
    one cell per code, 1 where the rule holds and 0 elsewhere, so a perfect image has mean score 1 and there are K of
    them; a random one scores (1 + 15 / 8) / 16 = 0.18 on average.

    Raises:
        ValueError: unknown reward, or masks that leave nothing to draw.
        DeviceError: a device that does not exist here.
    """
    check_reward(reward, registered=True)
    where = resolve_device(device, auto=False)
    scorer: Scorer | None = None
    if reward in CRITIC_REWARDS:
        kind: RewardKind = "intermediate" if reward == "intermediate" else "single"
        scorer = partial(score_toy, reward=kind)
    elif reward != "none":
        scorer = term_scorer(reward, TOY_GRID, decode_toy, where)
    return World(
        grid=TOY_GRID,
        decode=decode_toy,
        scorer=scorer,
        real_codes=toy_images(),
        row_multiple=1,
        device=where,
        masks=make_masks(TOY_GRID.codebook_size, forbidden_codes, None, None),
        recipe=(toy_world, (reward, device, tuple(forbidden_codes))),
    )


def score_toy(codes: Tensor, reward: RewardKind) -> tuple[Tensor, Tensor]:
    """Codes (B, r * 4) -> score map (B, r, 4), step rewards (B, r * 4)."""
    score_map = toy_score_map(codes)
    return score_map, step_rewards(score_map, score_map.shape[1], TOY_GRID.width, reward)


def toy_score_map(codes: Tensor) -> Tensor:
    """1 where a code is its neighbour's successor (or the first code), else 0: (B, r * 4) -> (B, r, 4) float32."""
    grid = codes.reshape(len(codes), -1, TOY_GRID.width)  # (B, r, 4)
    wanted = torch.empty_like(grid)
    wanted[:, :, 1:] = grid[:, :, :-1] + 1
    wanted[:, 1:, 0] = grid[:, :-1, 0] + 1
    wanted[:, 0, 0] = grid[:, 0, 0]
    return (grid == wanted % TOY_GRID.codebook_size).float()


def toy_images() -> np.ndarray:
    """The K perfect images, (K, T) int16."""
    first = np.arange(TOY_GRID.codebook_size)[:, None, None]
    rows, columns = np.arange(TOY_GRID.height)[None, :, None], np.arange(TOY_GRID.width)[None, None, :]
    return ((first + rows + columns) % TOY_GRID.codebook_size).reshape(len(first), -1).astype(np.int16)


def decode_toy(codes: Tensor) -> Tensor:
    """Coloured tiles: (B, r * 4) -> (B, 3, r * 8, 32) uint8."""
    grid = torch.as_tensor(codes).long().cpu().reshape(len(codes), -1, TOY_GRID.width)  # (B, r, 4)
    tiles = TOY_COLOURS[grid].permute(0, 3, 1, 2)  # (B, 3, r, 4)
    return tiles.repeat_interleave(TOY_TILE, 2).repeat_interleave(TOY_TILE, 3)
