"""Keyword sets that suit T-step episodes with a terminal reward, for algorithms whose defaults do not.

SB3's own defaults (gamma 0.99, gae_lambda 0.95, n_steps 2048, batch_size 64) come from control tasks: here they would
hide the reward from the early codes and cut images apart.
"""

from __future__ import annotations

from typing import Any

from stable_baselines3 import PPO
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from ral_gym.agents.episodes import EpisodeRolloutBuffer
from ral_gym.agents.reinforce import Reinforce
from ral_gym.errors import ConfigError

ALGORITHMS: dict[str, type[OnPolicyAlgorithm]] = {"reinforce": Reinforce, "ppo": PPO}


def algorithm_defaults(algo: str, env: VecEnv) -> dict[str, Any]:
    """Keyword arguments for an algorithm on `env`.

    Args:
        algo: `reinforce` or `ppo`.
        env: from `make_sb3_env`.

    Raises:
        ConfigError: an unknown algorithm.
    """
    check_algorithm(algo)
    n_codes = int(env.observation_space.shape[0])  # type: ignore[index]
    common: dict[str, Any] = {
        "n_steps": n_codes,  # one whole episode per environment and rollout
        "gamma": 1.0,  # the first code sees the terminal reward as well as the last
        "rollout_buffer_class": EpisodeRolloutBuffer,  # one pass per image instead of one per code
        "ent_coef": 0.0,  # the prior starts with the entropy of the data; a bonus would only blur it
    }
    if algo == "reinforce":
        return common
    return common | {
        "gae_lambda": 1.0,  # the value head starts from nothing: bootstrapping on it would be bias only
        "batch_size": n_codes * max(1, env.num_envs // 4),  # four minibatches of whole images
        "n_epochs": 2,  # few: the policy must stay near its pretrained start
        "clip_range": 0.1,  # and small steps, for the same reason
        "target_kl": 0.03,
    }


def check_algorithm(algo: str) -> None:
    """Raise `ConfigError` for an algorithm that stage 3 does not know."""
    if algo not in ALGORITHMS:
        raise ConfigError(f"algorithm '{algo}' is unknown: choose one of {', '.join(ALGORITHMS)}")
