"""Generalised advantage estimation on partial and two-level episodes, with optional discounting per level."""

from __future__ import annotations

import numpy as np


def episode_advantages(
    rewards: np.ndarray,
    values: np.ndarray,
    mask: np.ndarray,
    level: np.ndarray,
    image_rewards: np.ndarray,
    gamma: float,
    gae_lambda: float,
) -> np.ndarray:
    """The advantages of finished episodes (Schulman et al., 2016); nothing is bootstrapped after their ends.

    If the codes of an episode belong to several levels, each level is discounted as a separate episode, and its last
    code also gets the reward of the whole image.

    Args:
        rewards: (n, T) float32, 0 where nothing was drawn.
        values: (n, T) float32, as `rewards`.
        mask: (n, T) bool, the codes that were drawn.
        level: (T,) int, the level of every position, rising; all equal: one discount throughout.
        image_rewards: (n,) float32, the reward of each whole image.
        gamma: discount.
        gae_lambda: lambda of the estimator; 1: Monte Carlo returns minus values.

    Returns:
        (n, T) float32, 0 where nothing was drawn.
    """
    advantages = np.zeros(mask.shape, np.float32)
    later, next_value = np.zeros(len(mask), np.float32), np.zeros(len(mask), np.float32)  # of the next code drawn
    following = np.full(len(mask), -1)  # its level
    several = bool((level != level[0]).any())
    for t in reversed(range(mask.shape[1])):
        drawn, reward = mask[:, t], rewards[:, t]
        if several:
            ends = drawn & (following > level[t])  # a level's last code
            reward = reward + np.where(ends, image_rewards, 0)
            later, next_value = np.where(ends, 0, later), np.where(ends, 0, next_value)
        delta = reward + gamma * next_value - values[:, t]
        advantages[:, t] = np.where(drawn, delta + gamma * gae_lambda * later, 0)
        later = np.where(drawn, advantages[:, t], later)
        next_value = np.where(drawn, values[:, t], next_value)
        following = np.where(drawn, level[t], following)
    return advantages
