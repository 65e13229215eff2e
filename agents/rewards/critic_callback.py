"""Writes the co-trained critic's rewards into an on-policy rollout, at its end (Section 4.4).

Order at the end of every rollout: the critic is trained (first a warm-up, later `n_critic` steps) on images other than
those it scores next; it scores the rollout's images; the rewards are written into the buffer and the returns are
recomputed; then the algorithm updates the policy.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ral_gym.agents.episodes import EpisodeRolloutBuffer
from ral_gym.agents.policy import PriorPolicy
from ral_gym.agents.rewards.co_trained_critic import CoTrainedCritic
from ral_gym.agents.rewards.rollout_reward import RolloutReward
from ral_gym.errors import ConfigError
from ral_gym.rewards.view import FinishedImages
from ral_gym.runs.checked_state import array_of, integer_of

logger = logging.getLogger("ral_gym")

WARM_UP_POOL_STEPS = 10
"""Critic steps on one pool of fresh samples during the warm-up."""
LEARNT_NOTHING_AUC = 0.55


class CriticCallback(RolloutReward):
    """Train the critic, score the rollout, write the rewards, recompute the returns.

    Logs `critic/loss`, `critic/gap`, `critic/gradient_penalty` (of its training batches), `critic/heldout_gap`,
    `critic/heldout_auc` (held-out real images against the rollout's, which it has not seen) and
    `rollout/critic_reward_mean`; `rollout/ep_rew_mean` shows the same rewards.

    Args:
        critic: the critic and its training.
        verbose: as in SB3.

    Raises:
        ConfigError: at the start of training, if the model's buffer or environment is of another kind.
    """

    def __init__(self, critic: CoTrainedCritic, verbose: int = 0) -> None:
        super().__init__(verbose)
        self.critic = critic
        self.rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=critic.generator)))
        self._pending = 0
        self._pool: FinishedImages | None = None
        self._rollouts: list[Tensor] = []
        self._warned = False

    def _init_callback(self) -> None:
        super()._init_callback()
        if self.critic.grid.classes != self.world.grid.classes:
            raise ConfigError(
                f"the critic was made for {self.critic.grid.classes or 'no'} classes, but the environment has "
                f"{self.world.grid.classes or 'none'}: give CoTrainedCritic classes={self.world.grid.classes}"
            )
        distribution = self.code_env.core.distribution
        if distribution.mode in ("scratch", "mixed"):
            grid, image = self.critic.grid, self.critic.real_codes[:1].long()
            codes, labels = grid.without_labels(image), grid.labels_of(image)
            self.critic.scorer.check_rows(codes, distribution.row_multiple, labels)
        name = type(self.critic.critic).__name__
        if getattr(self.model, "all_actions", False) and not hasattr(self.critic.critic, "all_codes"):
            raise ConfigError(
                f"all_actions needs a critic that scores every code that could be drawn, but {name} has no all_codes: "
                "give critic.kind causal, or leave all_actions out"
            )
        self.offer(self.critic.action_rewards)

    def write(self, buffer: EpisodeRolloutBuffer, codes: Tensor) -> np.ndarray:
        """Train and score; returns (n,) the sums of the rewards that were written."""
        rewards = self.earn(self.critic.finished(codes), buffer.mask)
        buffer.write_rewards(rewards)
        self.say_paid(rewards)
        totals: np.ndarray = rewards.sum(1)
        return totals

    def earn(self, images: FinishedImages, mask: np.ndarray) -> np.ndarray:
        """Train the critic on earlier images, and score these.

        Args:
            images: the rollout's n finished images.
            mask: (n, L) bool, the codes that were drawn.

        Returns:
            (n, L) float32 rewards, 0 where nothing was drawn.
        """
        self._train_critic()
        rewards, metrics = self.critic.rewards(images)
        # Decoded images are not kept.
        self._rollouts = [*self._rollouts, images.codes][-self.critic.config.replay :]
        self._pool = FinishedImages(torch.cat(self._rollouts), images.grid)
        rewards = rewards * mask
        self._report(rewards, metrics)
        return rewards

    def check_alone(self) -> None:
        """See `RolloutReward.check_alone`.

        Raises:
            ConfigError: the critic rewards codes.
        """
        if self.critic.scorer.dense:
            raise ConfigError(
                "roll-outs estimate the reward of a whole image, but this critic rewards every code: give ral.reward "
                "single, or ral.n_rollouts 1"
            )

    def score(self, codes: Tensor) -> np.ndarray:
        """See `RolloutReward.score`: the critic and the normalisation of the last rollout."""
        return self.score_images(self.critic.finished(codes))

    def score_images(self, images: FinishedImages) -> np.ndarray:
        """As `score`, of images that other rewards share."""
        critic = self.critic
        totals = torch.zeros(len(images), dtype=torch.float64)
        for height in images.heights:
            scores = critic.normalizer(critic.score_map(images.view(height)))
            totals[images.rows(height)] = critic.scorer.rewards(scores, height).detach().double().cpu().sum(1)
        return totals.numpy()

    def _train_critic(self) -> None:
        config = self.critic.config
        if self.critic.n_updates == 0:
            for done in range(0, config.warmup_steps, WARM_UP_POOL_STEPS):
                self._pool = self._fresh()
                metrics = self.critic.train(self._pool, min(WARM_UP_POOL_STEPS, config.warmup_steps - done))
        pool = self._fresh() if config.fakes == "fresh" or self._pool is None else self._pool
        metrics = self.critic.train(pool, config.n_critic)
        for name, value in metrics.items():
            self.logger.record(f"critic/{name}", value)

    def _fresh(self) -> FinishedImages:
        """As many new samples of the policy as there are environments, with starts drawn like the environment's."""
        env = self.code_env
        policy: PriorPolicy = self.model.policy  # type: ignore[assignment]
        grid = env.world.grid
        prefix, stop, self._pending = env.core.distribution.draw(self.rng, self._pending)
        start = torch.from_numpy(np.where(grid.mask(0, stop), grid.not_drawn, grid.never_drawn))  # (L,)
        codes = start.repeat(env.num_envs, 1)  # (E, L)
        if prefix:
            given = torch.from_numpy(grid.mask(0, prefix))  # (L,)
            given[grid.n_codes :] = True  # the label
            images = self.rng.integers(len(self.critic.real_codes), size=env.num_envs)
            codes[:, given] = self.critic.real_codes[images][:, given].long()
        elif grid.classes:
            labels = env.core.labels.draw_many(self.rng, env.num_envs)
            codes[:, -1] = grid.first_label + torch.from_numpy(labels)
        drawn, _, _ = policy.draw_round(codes, with_values=False)
        return FinishedImages(drawn.cpu(), grid)

    def _report(self, rewards: np.ndarray, metrics: dict[str, float]) -> None:
        totals = rewards.sum(1)  # (n,)
        self.logger.record("rollout/critic_reward_mean", float(totals.mean()))
        for name, value in metrics.items():
            self.logger.record(f"critic/{name}", value)
        if metrics["heldout_auc"] < LEARNT_NOTHING_AUC and not self._warned:
            self._warned = True
            logger.warning(
                "the critic tells held-out real images from drawn ones with an AUC of only %.2f (0.5 is chance): its "
                "rewards are close to noise; raise critic.warmup_steps or critic.learning_rate",
                metrics["heldout_auc"],
            )

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, at the start of a rollout."""
        pool = None if self._pool is None else self._pool.codes
        return {
            "critic": self.critic.state_dict(),
            "rng": self.rng.bit_generator.state,
            "pending": self._pending,
            "pool": pool,
            "rollouts": [len(codes) for codes in self._rollouts],
            "warned": self._warned,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.critic.load_state_dict(state["critic"])
        self.rng.bit_generator.state = state["rng"]
        grid = self.critic.grid
        self._pending, self._warned = integer_of(state["pending"], "pending", high=grid.height), bool(state["warned"])
        pool = state["pool"]
        if pool is not None:
            codes = array_of(pool, "pool", (None, grid.length), np.int64, 0, grid.largest_entry)
            sizes = [integer_of(size, "rollouts", high=len(codes)) for size in state.get("rollouts", [len(codes)])]
            if sum(sizes) > len(codes):
                raise ValueError("the pool of drawn images is smaller than its rollouts")
            self._rollouts = list(torch.from_numpy(codes)[: sum(sizes)].split(sizes)) if sizes else []
            pool = FinishedImages(torch.from_numpy(codes), grid)
        self._pool = pool
