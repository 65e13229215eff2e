"""Brings the co-trained critic's rewards into an on-policy rollout, at its end (Section 4.4).

Order at the end of every rollout: the critic learns (the first time it warms up, then `n_critic` steps) from images
that are *not* scored now; it scores the rollout's images; the rewards go into the buffer and the returns are computed
again; then the algorithm updates the policy.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback

from ral_gym.agents.episodes import EpisodeRolloutBuffer
from ral_gym.agents.policy import PixelCNNPolicy
from ral_gym.agents.rewards.co_trained_critic import CoTrainedCritic, FakePool
from ral_gym.agents.vec_env import CodeVecEnv, unwrap_code_env
from ral_gym.errors import ConfigError

logger = logging.getLogger("ral_gym")

WARM_UP_POOL_STEPS = 10
"""Critic steps on one pool of fresh samples during the warm-up."""
LEARNT_NOTHING_AUC = 0.55


class CriticCallback(BaseCallback):
    """Train the critic, score the rollout, write the rewards, recompute the returns.

    Logs `critic/loss`, `critic/gap`, `critic/gradient_penalty` (of its training batches), `critic/heldout_gap`,
    `critic/heldout_auc` (held-out real images against the rollout's, which it has not seen) and
    `rollout/critic_reward_mean`; `rollout/ep_rew_mean` shows the same rewards.

    Args:
        critic: the critic and its training.
        verbose: SB3's.

    Raises:
        ConfigError: at the start of training, where the model's buffer or environment is of another kind.
    """

    def __init__(self, critic: CoTrainedCritic, verbose: int = 0) -> None:
        super().__init__(verbose)
        self.critic = critic
        self.rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=critic.generator)))
        self._pending = 0
        self._pool: FakePool | None = None
        self._warned = False
        self._episodes: list[list[dict[str, Any]]] = []

    def _init_callback(self) -> None:
        buffer = getattr(self.model, "rollout_buffer", None)
        if not isinstance(buffer, EpisodeRolloutBuffer):
            raise ConfigError(
                f"CriticCallback writes rewards into an EpisodeRolloutBuffer, not {type(buffer).__name__}: pass "
                "rollout_buffer_class=EpisodeRolloutBuffer to the algorithm"
            )
        if unwrap_code_env(self.training_env) is None:
            raise ConfigError("CriticCallback needs an environment from make_sb3_env")
        self._episodes = [[] for _ in range(self.training_env.num_envs)]

    def _on_step(self) -> bool:
        # SB3 averages these dicts after the rollout: keeping them lets the true reward be written in.
        for env in np.flatnonzero(self.locals["dones"]):
            self._episodes[env].append(self.locals["infos"][env].get("episode", {}))
        return True

    def _on_rollout_end(self) -> None:
        buffer: EpisodeRolloutBuffer = self.model.rollout_buffer  # type: ignore[attr-defined]
        now = FakePool(torch.from_numpy(buffer.codes.astype(np.int64)), self.critic.vqvae.grid)
        self._train_critic()
        rewards, figures = self.critic.rewards(now)
        buffer.write_rewards(rewards)
        buffer.compute_returns_and_advantage()
        self._pool = now
        self._report(buffer, rewards, figures)

    def _train_critic(self) -> None:
        config = self.critic.config
        if self.critic.n_updates == 0:
            for done in range(0, config.warmup_steps, WARM_UP_POOL_STEPS):
                self._pool = self._fresh()
                figures = self.critic.train(self._pool, min(WARM_UP_POOL_STEPS, config.warmup_steps - done))
        pool = self._fresh() if config.fakes == "fresh" or self._pool is None else self._pool
        figures = self.critic.train(pool, config.n_critic)
        for name, figure in figures.items():
            self.logger.record(f"critic/{name}", figure)

    def _fresh(self) -> FakePool:
        """As many new samples of the policy as there are environments, started as the environment's episodes are."""
        env: CodeVecEnv = unwrap_code_env(self.training_env)  # type: ignore[assignment]
        policy: PixelCNNPolicy = self.model.policy  # type: ignore[assignment]
        grid = env.world.grid
        prefix, stop, self._pending = env.core.distribution.draw(self.rng, self._pending)
        start = torch.from_numpy(np.where(grid.mask(0, stop), grid.not_drawn, grid.never_drawn))  # (T,)
        codes = start.repeat(env.num_envs, 1)  # (E, T)
        if prefix:
            given = torch.from_numpy(grid.mask(0, prefix))  # (T,)
            images = self.rng.integers(len(self.critic.real_codes), size=env.num_envs)
            codes[:, given] = self.critic.real_codes[images][:, given]
        drawn, _, _ = policy.draw_round(codes.to(policy.device), with_values=False)
        return FakePool(drawn.cpu(), grid)

    def _report(self, buffer: EpisodeRolloutBuffer, rewards: np.ndarray, figures: dict[str, float]) -> None:
        totals = (rewards * buffer.mask).sum(1)  # (n,)
        for env, total in zip(buffer.episode_envs, totals, strict=True):
            if self._episodes[env]:
                self._episodes[env].pop(0)["r"] = float(total)
        self.logger.record("rollout/critic_reward_mean", float(totals.mean()))
        for name, figure in figures.items():
            self.logger.record(f"critic/{name}", figure)
        if figures["heldout_auc"] < LEARNT_NOTHING_AUC and not self._warned:
            self._warned = True
            logger.warning(
                "the critic tells held-out real images from drawn ones with an AUC of only %.2f (0.5 is chance): its "
                "rewards are close to noise; raise critic.warmup_steps or critic.learning_rate",
                figures["heldout_auc"],
            )

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, at the start of a rollout."""
        pool = None if self._pool is None else self._pool.codes
        return {
            "critic": self.critic.state_dict(),
            "rng": self.rng.bit_generator.state,
            "pending": self._pending,
            "pool": pool,
            "warned": self._warned,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.critic.load_state_dict(state["critic"])
        self.rng.bit_generator.state = state["rng"]
        self._pending, self._warned = state["pending"], state["warned"]
        pool = state["pool"]
        self._pool = None if pool is None else FakePool(pool, self.critic.vqvae.grid)
