"""Action values by Monte-Carlo roll-outs: the mean reward of several images that begin with the same codes.

SeqGAN (Yu et al., 2017, Eq. 4) takes for the action value Q(s_t, a_t) of an intermediate code the mean reward of N
completions that the policy draws behind the codes 0..t; that of the last code is the reward of the finished image. RAL
takes one. The end of the episode itself is such a completion, so N - 1 more are drawn here, and N = 1 costs nothing.

Positions are sub-sampled: m codes per image, evenly spread from a random place on, have completions. A code between two
of them is given the estimate of the next one at t' > t. That is unbiased as well, since the codes up to t' are the
policy's own continuation of those up to t: E[Q(s_t', a_t') | s_t, a_t] = Q(s_t, a_t). Its variance is at most that of
the episode's own reward, which codes behind the last chosen one keep. Which positions are chosen does not depend on
rewards. So the expected gradient is that of one roll-out, whatever N and m.

The critic and the scale of the rewards are those of the rollout; completions are neither trained on nor compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from ral_gym.agents.algorithms.base import EpisodeAlgorithm
from ral_gym.agents.episodes import EpisodeRolloutBuffer
from ral_gym.agents.policy import PriorPolicy
from ral_gym.agents.rewards.rollout_reward import RolloutReward
from ral_gym.errors import ConfigError
from ral_gym.grid import CodeGrid
from ral_gym.runs.sharing import Processes

COMPLETIONS_AT_ONCE = 256
"""Completions that are drawn and scored together, so that memory does not grow with N."""


class MonteCarloReturns(BaseCallback):
    """Replace the returns of a rollout by means over roll-outs; put it right behind the reward's callback.

        reward = CompositeReward({"warm": 1.0}, functions={"warm": redness})
        model.learn(100_000, callback=[reward, MonteCarloReturns(reward, n_rollouts=4)])

    Completions are drawn from a generator of its own: the episodes' random numbers are those of training without it.
    Logs `rollout/completions`, how many were drawn, and `rollout/rollout_std`, the mean standard deviation of the
    rewards behind the same codes.

    Args:
        reward: the callback that writes the rewards.
        n_rollouts: N, the episode's own end included; 2 or more.
        positions: m, codes per image that have completions of their own; fewer if the image has fewer.
        seed: seeds positions and completions.
        verbose: as in SB3.

    Raises:
        ConfigError: N below 2 or m below 1; at the start of training, an algorithm other than Reinforce, GRPO or a
            subclass of `EpisodeAlgorithm`, or rewards that are not of single images as a whole.
    """

    def __init__(
        self, reward: RolloutReward, n_rollouts: int, positions: int = 8, *, seed: int = 0, verbose: int = 0
    ) -> None:
        super().__init__(verbose)
        if n_rollouts < 2 or positions < 1:
            raise ConfigError(
                f"n_rollouts={n_rollouts} at positions={positions}: give 2 or more roll-outs at 1 or more positions, "
                "or leave MonteCarloReturns out for one roll-out"
            )
        self.reward, self.n_rollouts, self.positions = reward, n_rollouts, positions
        self.generator = torch.Generator().manual_seed(seed)

    def _init_callback(self) -> None:
        if not isinstance(self.model, EpisodeAlgorithm):
            raise ConfigError(
                f"{type(self.model).__name__} takes its action values from a value function: roll-outs are for "
                "Reinforce and GRPO"
            )
        self.reward.check_alone()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer: EpisodeRolloutBuffer = self.model.rollout_buffer  # type: ignore[attr-defined]
        mask, codes = buffer.mask, buffer.codes  # (n, L)
        if not len(codes):  # a rollout after a stop, in which no episode ended
            return
        paid = np.zeros(mask.shape)
        paid[mask] = buffer.rewards
        own = paid.sum(1)  # (n,)
        shares = torch.rand(len(mask), generator=self.generator, dtype=torch.float64).numpy()
        chosen = spread_positions(mask, self.positions, shares)  # (n, L)
        row, position = np.nonzero(chosen)
        rewards = self._completed(codes, mask, row, position)  # (m, N - 1)
        values = np.zeros(mask.shape)
        values[row, position] = (own[row] + rewards.sum(1)) / self.n_rollouts
        buffer.write_image_values(next_values(chosen, values, own))
        self.logger.record("rollout/completions", rewards.size)
        if len(row):
            everything = np.concatenate([own[row, None], rewards], 1)
            self.logger.record("rollout/rollout_std", float(everything.std(1, ddof=1).mean()))

    def _completed(self, codes: np.ndarray, mask: np.ndarray, row: np.ndarray, position: np.ndarray) -> np.ndarray:
        """The rewards (m, N - 1) of completions behind codes (m,) of some images (m,)."""
        policy: PriorPolicy = self.model.policy  # type: ignore[assignment]
        grid, sampler = policy.prior.grid, policy.cache.sampler()
        heights = (grid.without_labels(codes) != grid.never_drawn).sum(1) // grid.codes_of(1)  # (n,)
        rewards = np.zeros((len(row), self.n_rollouts - 1))
        for part in _chunks(heights[row], position, self.n_rollouts - 1):
            at = part // (self.n_rollouts - 1)
            begun, behind = codes[row[at]].astype(np.int64), np.arange(codes.shape[1]) > position[at, None]
            begun[mask[row[at]] & behind] = grid.not_drawn
            start = torch.from_numpy(begun).to(policy.device)
            finished = complete(sampler, grid, start, int(heights[row[at[0]]]), self.generator, policy.processes)
            rewards.reshape(-1)[part] = self.reward.score(finished.cpu())
        policy.cache.forget()
        return rewards

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, at the start of a rollout."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.generator.set_state(state["generator"])


def spread_positions(mask: np.ndarray, number: int, shares: np.ndarray) -> np.ndarray:
    """Choose drawn positions, evenly spread, but never an image's last: its value is the reward itself.

    Args:
        mask: (n, L) bool, the codes that were drawn.
        number: how many of each image; all but the last if there are no more.
        shares: (n,) in [0, 1): how far the first one is from the beginning, as a share of the distance between two.

    Returns:
        (n, L) bool.
    """
    before_last = mask.sum(1) - 1  # (n,)
    ranks = np.floor((np.arange(number) + shares[:, None]) * before_last[:, None] / number).astype(int)  # (n, number)
    picked = np.zeros((len(mask), mask.shape[1] + 1), bool)  # by rank among the drawn positions
    few = before_last <= number  # (n,)
    picked[np.arange(len(mask))[:, None], np.where(few[:, None], mask.shape[1], ranks)] = True
    picked[few] = np.arange(picked.shape[1]) < before_last[few, None]
    rank = mask.cumsum(1) - mask  # (n, L)
    return mask & np.take_along_axis(picked, rank, 1)


def next_values(chosen: np.ndarray, values: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Give every position the value of the next chosen one, itself included, and the image's own behind the last.

    Args:
        chosen: (n, L) bool.
        values: (n, L), read where chosen.
        own: (n,) the images' rewards.

    Returns:
        (n, L).
    """
    length = chosen.shape[1]
    following = np.where(chosen, np.arange(length), length)
    following = np.minimum.accumulate(following[:, ::-1], axis=1)[:, ::-1]
    return np.take_along_axis(np.concatenate([values, own[:, None]], 1), following, 1)


def complete(
    sampler: Any,
    grid: CodeGrid,
    codes: Tensor,
    rows: int,
    generator: torch.Generator,
    processes: Processes | None = None,
) -> Tensor:
    """Draw what is left of images of the same height; in each level that is everything from some position on.

    Args:
        sampler: a `Sampler` of the prior.
        grid: the shape of the codes.
        codes: (B, L) int64 with K where a code is to be drawn, K + 1 where the image has none.
        rows: how many (top) rows the images have.
        generator: source of the uniforms, on the CPU.
        processes: those that share the drawing; None: this one alone.

    Returns:
        (B, L) int64 without K.
    """
    begun = grid.crop(codes, rows)  # (B, codes_of(rows)), and the label with classes
    levels = [level == grid.not_drawn for level in grid.split(begun)]
    starts = [torch.where(level.any(1), level.int().argmax(1), level.shape[1]).cpu() for level in levels]  # (B,) each
    uniforms = torch.rand(len(codes), grid.codes_of(rows), generator=generator).to(codes.device)

    def drawn_by(own: slice) -> Tensor:
        own_starts = [start[own] for start in starts]
        place = {"start": own_starts[0]} if grid.levels == 1 else {"starts": own_starts}
        found: Tensor = sampler.sample(codes=begun[own], uniforms=uniforms[own], **place)[0]
        return found

    drawn = (processes or Processes()).split(len(codes), drawn_by)
    finished = codes.clone()
    finished[:, torch.from_numpy(grid.mask(0, rows)).to(codes.device)] = drawn
    return finished


def _chunks(heights: np.ndarray, positions: np.ndarray, each: int) -> Iterator[np.ndarray]:
    """Numbers of the completions, `each` of them behind every position (m,), in parts that are drawn together.

    Completions of a part are of images of one height, and begin near one another: a part costs the codes from the
    first of its positions on.
    """
    for height in np.unique(heights):
        same = np.flatnonzero(heights == height)
        same = same[np.argsort(positions[same], kind="stable")]
        numbers = (same[:, None] * each + np.arange(each)).reshape(-1)
        parts = -(-len(numbers) // COMPLETIONS_AT_ONCE)
        yield from np.array_split(numbers, parts)
