"""The time of an update with N roll-outs, in units of that with one."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.logger import configure
from torch import Tensor

from ral_gym.agents import CodeVecEnv, EpisodeRolloutBuffer, MonteCarloReturns, PriorPolicy, Reinforce
from ral_gym.agents.rewards.rollout_reward import RolloutReward
from ral_gym.envs.worlds import World
from ral_gym.grid import CodeGrid
from ral_gym.priors.pixelcnn import PixelCNN

GRID = CodeGrid(8, 8, 128)
NUMBERS = (1, 4, 16)
PART = "8x8 codes, K=128, PixelCNN of 64 units and 4 layers, 16 images, rewards from a table"


class MeanScore(RolloutReward):
    """The mean of a random score per code: next to nothing to compute, so that the time is that of drawing."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = np.random.default_rng(0).normal(size=GRID.codebook_size)

    def check_alone(self) -> None:
        """An image has its reward alone."""

    def score(self, codes: Tensor) -> np.ndarray:
        """(m, T) -> (m,)."""
        found: np.ndarray = self.scores[codes.numpy()].mean(1)
        return found

    def write(self, buffer: EpisodeRolloutBuffer, codes: Tensor) -> np.ndarray:
        """Pay at the last code."""
        rewards = np.zeros(codes.shape, np.float32)
        rewards[:, -1] = self.score(codes)
        buffer.write_rewards(rewards)
        totals: np.ndarray = rewards.sum(1)
        return totals

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


def make_trainer(n_rollouts: int) -> tuple[Reinforce, CallbackList]:
    """The algorithm and its callbacks."""

    def decode(codes: Tensor) -> Tensor:
        return torch.zeros(len(codes), 1, GRID.height, GRID.width, dtype=torch.uint8)

    torch.manual_seed(0)
    prior = PixelCNN(GRID.codebook_size, GRID.height, GRID.width, hidden_units=64, residual_units=64, layers=4)
    world = World(GRID, decode, scorer=None, real_codes=None, row_multiple=1, device=torch.device("cpu"))
    env = CodeVecEnv(world, 16)
    model = Reinforce(PriorPolicy, env, seed=0, device="cpu", policy_kwargs={"prior": prior})
    model.set_logger(configure(None, []))
    reward = MeanScore()
    callbacks = CallbackList([reward, *([MonteCarloReturns(reward, n_rollouts)] if n_rollouts > 1 else [])])
    _, made = model._setup_learn(1, callbacks)
    return model, made  # type: ignore[return-value]


def rollout_costs(quick: bool = False) -> dict[int, tuple[float, float, float]]:
    """N -> median, lowest and highest ratio of an update's time to that with one roll-out, taken in turns."""
    trainers = {number: make_trainer(number) for number in NUMBERS}
    ratios: dict[int, list[float]] = {number: [] for number in NUMBERS}
    for round_ in range(2 if quick else 6):
        seconds = {}
        for number, (model, callbacks) in trainers.items():
            began = time.perf_counter()
            model.collect_rollouts(model.env, callbacks, model.rollout_buffer, model.n_steps)  # type: ignore[arg-type]
            model.train()
            seconds[number] = time.perf_counter() - began
        for number in NUMBERS if round_ else ():  # the first one warms up
            ratios[number].append(seconds[number] / seconds[1])
    return {number: (statistics.median(found), min(found), max(found)) for number, found in ratios.items()}
