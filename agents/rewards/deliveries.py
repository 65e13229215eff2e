"""Two other ways to give the co-trained critic's rewards to an agent, for algorithms without an on-policy rollout.

`CriticCallback` writes rewards at a rollout's end; that is the default and needs an on-policy algorithm. Here:

* `StepCriticCallback` writes into the step's reward array before SB3 stores it, so it works for DQN as well;
* `CriticRewardWrapper` is a `VecEnvWrapper`: everything outside it, such as evaluation, sees the critic's rewards.

Both give terminal rewards only: an intermediate reward belongs to codes whose steps were stored long before the image
was finished. Replayed rewards become stale as the critic changes; a small replay buffer drops them sooner.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from ral_gym.agents.rewards.co_trained_critic import CoTrainedCritic
from ral_gym.agents.rewards.critic_callback import WARM_UP_POOL_STEPS
from ral_gym.agents.vec_env import unwrap_code_env
from ral_gym.errors import ConfigError
from ral_gym.rewards.view import FinishedImages


class CriticFeed:
    """Scores finished episodes and trains the critic on those before, in rounds of a fixed number of episodes.

    At the start the critic warms up on uniformly random codes, like those of an untrained agent. The episodes of a
    round are scored with the current critic and normalisation; after the round the critic is trained on them for
    `n_critic` steps, and the normalisation is fitted to them and to held-out real images. So no image is scored by a
    critic that was trained on it.

    Args:
        critic: the critic and its training; its reward is `single`.
        env: an environment that wraps a `CodeVecEnv`.
        episodes_per_update: episodes in a round; None: as many as environments, but at least the critic's batch size.
        train: False: only score, with the current critic.

    Attributes:
        metrics: of the last update: `loss`, `gap`, `gradient_penalty`, `heldout_gap`, `heldout_auc`, `score_mean`.

    Raises:
        ConfigError: intermediate rewards, or an environment of another kind.
    """

    def __init__(
        self, critic: CoTrainedCritic, env: VecEnv, episodes_per_update: int | None = None, train: bool = True
    ) -> None:
        if critic.reward != "single":
            raise ConfigError(
                f"reward '{critic.reward}' cannot be delivered step by step: the rewards of early codes are known only "
                "with the finished image, after their steps are stored; use reward 'single', or CriticCallback"
            )
        found = unwrap_code_env(env)
        if found is None:
            raise ConfigError("the critic scores codes of an environment from make_sb3_env, which is not inside")
        self.critic, self.train = critic, train
        self.episodes_per_update = episodes_per_update or max(env.num_envs, critic.config.batch_size)
        self.metrics: dict[str, float] = {}
        self._codes: list[torch.Tensor] = []
        if train and critic.n_updates == 0:
            self._warm_up()

    def _warm_up(self) -> None:
        steps = self.critic.config.warmup_steps
        pool = self._random_pool()
        for done in range(0, steps, WARM_UP_POOL_STEPS):
            pool = self._random_pool()
            self.metrics = self.critic.train(pool, min(WARM_UP_POOL_STEPS, steps - done))
        self.metrics |= self.critic.rewards(pool)[1]

    def _random_pool(self) -> FinishedImages:
        """Random codes, with classes given the labels of random real images."""
        grid, generator, n = self.critic.grid, self.critic.generator, self.episodes_per_update
        codes = torch.randint(grid.codebook_size, (n, grid.n_codes), generator=generator)
        if grid.classes:
            rows = torch.randint(len(self.critic.real_codes), (n,), generator=generator)
            codes = torch.cat([codes, self.critic.real_codes[rows, -1:].long()], 1)
        return self.critic.finished(codes)

    def score(self, codes: np.ndarray) -> np.ndarray:
        """Rewards (n,) float32 of last observations (n, L), K + 1 where nothing was drawn."""
        grids = torch.from_numpy(codes.astype(np.int64))
        rewards = self.critic.image_rewards(self.critic.finished(grids))
        if not self.train:
            return rewards
        self._codes.append(grids)
        if sum(map(len, self._codes)) >= self.episodes_per_update:
            self._learn()
        return rewards

    def _learn(self) -> None:
        """Train at the end of a round."""
        pool = self.critic.finished(torch.cat(self._codes))
        self._codes = []
        self.metrics = self.critic.rewards(pool)[1]  # of a critic that has not seen these images
        self.metrics |= self.critic.train(pool, self.critic.config.n_critic)
        self.critic.rewards(pool)  # fits the normalisation to the updated critic


def _deliver(feed: CriticFeed, rewards: np.ndarray, dones: np.ndarray, infos: list[dict[str, Any]]) -> None:
    """Write the critic's rewards of the episodes that have just ended into a step, in place."""
    ended = np.flatnonzero(dones)
    if not len(ended):
        return
    scores = feed.score(np.stack([infos[row]["terminal_observation"] for row in ended]))
    for row, score in zip(ended, scores, strict=True):
        infos[row]["original_env_reward"] = float(rewards[row])
        rewards[row] = score
        if "episode" in infos[row]:  # averaged as rollout/ep_rew_mean
            infos[row]["episode"]["r"] = float(score)


class StepCriticCallback(BaseCallback):
    """Writes the critic's rewards into every step's reward array, on- or off-policy, and trains the critic.

    Logs `critic/...` as `CriticCallback` does. `info["original_env_reward"]` keeps the environment's own.

    Args:
        critic: the critic and its training; its reward is `single`.
        episodes_per_update: see `CriticFeed`.

    Raises:
        ConfigError: at the start of training, with intermediate rewards, an environment of another kind, or
            `VecNormalize`.
    """

    def __init__(self, critic: CoTrainedCritic, episodes_per_update: int | None = None) -> None:
        super().__init__()
        self.critic, self.episodes_per_update = critic, episodes_per_update

    def _init_callback(self) -> None:
        if self.model.get_vec_normalize_env() is not None:
            raise ConfigError(
                "StepCriticCallback writes rewards, but VecNormalize stores its own copy: use CriticRewardWrapper "
                "inside it"
            )
        self.feed = CriticFeed(self.critic, self.training_env, self.episodes_per_update)

    def _on_step(self) -> bool:
        _deliver(self.feed, self.locals["rewards"], self.locals["dones"], self.locals["infos"])
        for name, value in self.feed.metrics.items():
            self.logger.record(f"critic/{name}", value)
        return True


class CriticRewardWrapper(VecEnvWrapper):
    """A `VecEnv` whose rewards are the co-trained critic's, whatever algorithm trains in it.

    `info["original_env_reward"]` keeps the environment's own. For evaluation wrap another environment with
    `train_critic=False` and the same critic object, which is then not trained on evaluated images.

    Args:
        venv: from `make_sb3_env`, best with ``reward="none"``.
        critic: the critic and its training; its reward is `single`.
        episodes_per_update: see `CriticFeed`.
        train_critic: train it on this environment's episodes.

    Raises:
        ConfigError: intermediate rewards, or an environment of another kind.
    """

    def __init__(
        self,
        venv: VecEnv,
        critic: CoTrainedCritic,
        episodes_per_update: int | None = None,
        train_critic: bool = True,
    ) -> None:
        super().__init__(venv)
        self.feed = CriticFeed(critic, venv, episodes_per_update, train_critic)

    def reset(self) -> np.ndarray:
        """Like the environment's `reset`."""
        return self.venv.reset()  # type: ignore[return-value]

    def step_wait(self) -> VecEnvStepReturn:
        """Like the environment's `step_wait`, with the critic's rewards for episodes that have just ended."""
        observations, rewards, dones, infos = self.venv.step_wait()
        _deliver(self.feed, rewards, dones, infos)
        return observations, rewards, dones, infos
