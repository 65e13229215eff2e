"""A rollout as whole images: the buffer that makes Stable-Baselines3 train a sequence model at sequence speed.

SB3's algorithms pass ``samples.observations`` to the policy unchanged, so it may be any object. Here it is `Episodes`:
code grids, and which position of which grid each transition is. One teacher-forced pass over B grids then gives the
log-probabilities of all their transitions, where the stock buffer would need one pass per transition.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from torch import Tensor

from ral_gym.agents.advantages import episode_advantages
from ral_gym.agents.episode_storage import EpisodeStorage
from ral_gym.grid import CodeGrid
from ral_gym.priors.base import Prior
from ral_gym.priors.guidance import mix
from ral_gym.priors.transfer import sent


class Episodes:
    """Transitions that share code grids.

    Attributes:
        codes: (B, L) int64 sequences as known at their episode's end, with the tokens K and K + 1; with classes their
            last entry is the label, and L is T + 1, else T.
        row: (N,) int64, the grid that a transition belongs to.
        pos: (N,) int64, the position that the transition drew.
        length: number of codes of the largest image, given ones included.
    """

    def __init__(self, codes: Tensor, row: Tensor, pos: Tensor, length: int) -> None:
        self.codes, self.row, self.pos, self.length = codes, row, pos, length

    def __len__(self) -> int:
        """N, the number of transitions."""
        return len(self.row)

    def __getitem__(self, index: slice | list[int]) -> Episodes:
        """Some of the transitions of the same grids (TRPO's sub-sampling)."""
        return Episodes(self.codes, self.row[index], self.pos[index], self.length)

    def without_class(self, grid: CodeGrid) -> Episodes:
        """The same transitions of images that have no class."""
        none = torch.full_like(self.codes[:, -1:], grid.no_class)
        return Episodes(torch.cat([self.codes[:, :-1], none], 1), self.row, self.pos, self.length)


def episode_logits(prior: Prior, episodes: Episodes, guidance: float = 1.0, features: Tensor | None = None) -> Tensor:
    """Logits (N, K) of a network for every transition of episodes, by one teacher-forced pass; guided ones by two.

    Args:
        prior: the network.
        episodes: the transitions.
        guidance: scale s; see `ral_gym.priors.guidance`.
        features: (N, C) what `episode_features` has returned; None: it is called.
    """
    features = episode_features(prior, episodes) if features is None else features
    logits = prior.logits(features, episodes.pos)
    if guidance == 1:
        return logits
    return mix(logits, episode_logits(prior, episodes.without_class(prior.grid)), guidance)


def episode_features(prior: Prior, episodes: Episodes) -> Tensor:
    """Features (N, C) of a network for every transition of episodes, by one teacher-forced pass."""
    grid = prior.grid
    rows = -(-episodes.length // grid.codes_of(1))
    features = prior.features(grid.crop(episodes.codes, rows))  # (B, T', C)
    return features[episodes.row, grid.short_position(episodes.pos, rows)]


class EpisodeRolloutBuffer(EpisodeStorage):
    """Drop-in ``rollout_buffer_class`` for PPO, A2C, TRPO and `Reinforce` on the generation MDP.

    An episode that is unfinished when the rollout ends is kept until the rollout in which it ends, so that the agent
    learns from finished episodes only. `values`, `returns`, `advantages` and `rewards` are 1-D arrays over the
    transitions of the finished episodes, episode by episode, in the order of drawing. Codes given as a prefix are no
    transitions.

    A callback may stop `learn` inside a rollout. SB3 then forgets the step at which it stopped, and the next `learn`
    draws again from the observation before it. Both steps are left out here, and what follows counts as an episode that
    begins with the codes drawn until then. An episode of one code that ends with the first step after a stop is left
    out too. If no episode ends in a rollout, the samples are transitions of the unfinished episodes with advantages of
    0, so the policy does not change.

    With two levels (top codes, then bottom codes) the discount applies per level by default: each level is discounted
    as a separate episode, and a terminal reward, that of the whole image, is given at the end of both. Over the 1,280
    codes of 16 x 16 and 32 x 32 maps, a gamma of 0.99 would otherwise leave 2.6e-6 of it for the top codes.

    Args:
        buffer_size: steps per environment and rollout (`n_steps`); must hold a whole episode, T.
        observation_space: ``Box(0, K + 1, (T,), int16)``, with N classes ``Box(0, K + 1 + N, (T + 1,), int16)``.
        action_space: ``Discrete(K)``.
        device: device of the samples.
        gae_lambda: lambda of generalised advantage estimation; 1: Monte Carlo returns minus values.
        gamma: discount.
        n_envs: E.
        levels: how many codes each level has; None: all are one level.
        per_level_discount: with two levels, discount each as a separate episode; False: one discount throughout.
        image_gamma: discount of the rewards of whole images that `write_rewards` was given, where `add_rewards` has
            added others, which `gamma` discounts; None: one discount for both. With `gae_lambda` 1 returns are exact.

    Raises:
        ConfigError: `buffer_size` < T, or spaces of another kind; in a rollout, when an episode ends before its last
            code, or an observation is not the one before it with the drawn code written in.
    """

    @property
    def episode_envs(self) -> np.ndarray:
        """(n,) which environment each finished episode belongs to."""
        return self._finished()[0]

    @property
    def mask(self) -> np.ndarray:
        """(n, L) bool: the positions that the finished episodes drew, never the label; L as in `Episodes`."""
        return self._finished()[2]

    @property
    def codes(self) -> np.ndarray:
        """(n, L) int32 sequences of the finished episodes, K + 1 where an episode never drew."""
        return self._finished()[3]

    @property
    def start(self) -> np.ndarray:
        """(n,) first position drawn."""
        return self._finished()[4]

    @property
    def stop(self) -> np.ndarray:
        """(n,) one past the last position drawn."""
        return self._finished()[5]

    @property
    def lengths(self) -> np.ndarray:
        """(n,) how many codes each finished episode drew."""
        return self.mask.sum(1)

    @property
    def values(self) -> np.ndarray:  # type: ignore[override]
        """(N,) value estimates."""
        return self._values[self._slots()]

    @property
    def rewards(self) -> np.ndarray:  # type: ignore[override]
        """(N,) rewards."""
        return self._rewards[self._slots()]

    @property
    def log_probs(self) -> np.ndarray:  # type: ignore[override]
        """(N,) log-probabilities at the time of drawing."""
        return self._log_probs[self._slots()]

    @property
    def returns(self) -> np.ndarray:  # type: ignore[override]
        """(N,) returns: advantages + values."""
        return self._returns[self._slots()]

    @property
    def advantages(self) -> np.ndarray:  # type: ignore[override]
        """(N,) advantages."""
        return self._advantages[self._slots()]

    def write_rewards(self, rewards: np.ndarray) -> None:
        """Replace the rewards of the finished episodes; call `compute_returns_and_advantage` afterwards.

        Args:
            rewards: (n, L) one per position; only drawn positions are used.
        """
        self._shared = self._image_rewards(rewards)
        self._rewards[self._slots()] = rewards[self.mask]

    def add_rewards(self, rewards: np.ndarray) -> None:
        """Add `rewards`, such as penalties, to the reward of every code; else like `write_rewards`."""
        mask = self.mask
        if self._shared is None:
            before = np.zeros(mask.shape, np.float32)
            before[mask] = self.rewards
            self._shared = self._image_rewards(before)
        self._rewards[self._slots()] += rewards[mask]

    def compute_returns_and_advantage(self, last_values: Tensor | None = None, dones: np.ndarray | None = None) -> None:
        """Generalised advantage estimation in every finished episode; advantages are 0 if none has ended.

        Both arguments are SB3's and unused: a finished episode needs no bootstrap.
        """
        self._complete = True  # SB3 calls this at a rollout's end, and not after a stop
        mask = self.mask
        if not len(mask):
            self._returns[self._slots()], self._advantages[self._slots()] = self.values, 0
            return
        rewards, values = np.zeros(mask.shape, np.float32), np.zeros(mask.shape, np.float32)  # (n, L)
        rewards[mask], values[mask] = self.rewards, self.values
        shared = self._image_rewards(rewards) if self._shared is None else self._shared
        ends = self._level if self.per_level_discount else np.zeros_like(self._level)
        if self.image_gamma is None or self._shared is None:
            advantages = episode_advantages(rewards, values, mask, ends, shared, self.gamma, self.gae_lambda)
        else:
            paid = np.zeros_like(rewards)
            paid[np.arange(len(paid)), self.stop - 1] = shared
            of_codes = (rewards - paid, values, mask, ends, np.zeros_like(shared), self.gamma, self.gae_lambda)
            of_images = (paid, np.zeros_like(values), mask, ends, shared, self.image_gamma, self.gae_lambda)
            advantages = episode_advantages(*of_codes) + episode_advantages(*of_images)
        self._advantages[self._slots()] = advantages[mask]
        self._returns[self._slots()] = (advantages + values)[mask]

    def write_image_values(self, values: np.ndarray) -> None:
        """Let other estimates of each image's reward take the place of the reward itself in returns and advantages.

        Args:
            values: (n, L) float, what the reward is expected to be after the code at each position; only drawn
                positions are used. They are discounted as the reward would be.
        """
        mask = self.mask
        paid, nothing = np.zeros(mask.shape, np.float32), np.zeros(mask.shape, np.float32)
        paid[np.arange(len(paid)), self.stop - 1] = 1
        ends = self._level if self.per_level_discount else np.zeros_like(self._level)
        discounts = episode_advantages(paid, nothing, mask, ends, paid.sum(1), self.gamma, 1.0)  # (n, L)
        returns = (discounts * values).astype(np.float32)[mask]
        self._returns[self._slots()] = returns
        self._advantages[self._slots()] = returns - self.values

    def _image_rewards(self, rewards: np.ndarray) -> np.ndarray:
        """(n,) rewards of whole images: an episode's last reward if it has no other, else 0 (per-code rewards)."""
        last = rewards[np.arange(len(rewards)), self.stop - 1]
        alone = (np.where(self.mask, rewards, 0) != 0).sum(1) <= 1
        return np.where(alone, last, 0)

    def to_torch(self, array: np.ndarray, copy: bool = True) -> Tensor:
        """SB3's, without a wait for a CUDA device."""
        device = torch.device(self.device)
        return sent(np.ascontiguousarray(array), device) if device.type == "cuda" else super().to_torch(array, copy)

    def episodes(self, rows: np.ndarray | None = None) -> Episodes:
        """The finished episodes (or some of them) as the policy's input, in order."""
        rows = np.arange(len(self.codes)) if rows is None else rows
        return self._input(self.codes[rows], self.mask[rows])

    def _input(self, codes: np.ndarray, mask: np.ndarray) -> Episodes:
        """The policy's input for the positions (n, L) of sequences (n, L)."""
        row, pos = np.nonzero(mask)
        length = int((codes <= self.not_drawn).sum(1).max(initial=0))
        return Episodes(self.to_torch(codes.astype(np.int64)), self.to_torch(row), self.to_torch(pos), length)

    def get(self, batch_size: int | None = None) -> Generator[RolloutBufferSamples, None, None]:
        """Minibatches of whole episodes in random order, each of at least `batch_size` transitions, then the rest.

        Args:
            batch_size: transitions; None: everything at once.
        """
        lengths = self.lengths  # (n,)
        if not len(lengths):
            yield self._without_episodes()
            return
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        order = np.random.permutation(len(lengths))
        done = np.cumsum(lengths[order])
        first = 0
        while first < len(order):
            before = done[first - 1] if first else 0
            wanted = done[-1] if batch_size is None else before + batch_size
            last = min(int(np.searchsorted(done, wanted)) + 1, len(order))
            rows = order[first:last]
            flat = np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in rows])
            samples = self._samples(self.episodes(rows), flat)
            yield twice(samples) if done[-1] == 1 else samples
            first = last

    def _without_episodes(self) -> RolloutBufferSamples:
        """Samples for an update that changes nothing, if no episode has ended."""
        _, _, mask, codes = self._unfinished()
        samples = self._samples(self._input(codes, mask), np.arange(int(mask.sum())))
        return twice(samples) if mask.sum() == 1 else samples

    def _samples(self, episodes: Episodes, flat: np.ndarray) -> RolloutBufferSamples:
        """The transitions of some episodes; `flat` (N,) are their numbers."""
        slots, envs = self._slots()
        at = (slots[flat], envs[flat])
        return RolloutBufferSamples(
            observations=episodes,  # type: ignore[arg-type]
            actions=self.to_torch(self._actions[at].astype(np.float32)[:, None]),
            old_values=self.to_torch(self._values[at]),
            old_log_prob=self.to_torch(self._log_probs[at]),
            advantages=self.to_torch(self._advantages[at]),
            returns=self.to_torch(self._returns[at]),
        )


def twice(samples: Any) -> Any:
    """Duplicate a single transition: A2C and TRPO divide by the standard deviation, which needs two."""
    found = samples._asdict().items()
    return samples._replace(**{name: value[[0, 0]] for name, value in found if value is not None})
