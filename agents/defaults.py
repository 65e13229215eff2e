"""The algorithms that run here, and keyword sets that suit T-step episodes with a terminal reward.

SB3's own defaults (gamma 0.99, gae_lambda 0.95, n_steps 2048 or 5, batch_size 64) come from control tasks: here they
would hide the reward from the early codes and cut images apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sb3_contrib import QRDQN, TRPO, MaskablePPO
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import VecEnv

from ral_gym.agents.algorithms.grpo import GRPO
from ral_gym.agents.algorithms.reinforce import Reinforce
from ral_gym.agents.episodes import EpisodeRolloutBuffer
from ral_gym.agents.features import CodeFeatures
from ral_gym.agents.maskable import MaskableEpisodeRolloutBuffer, MaskablePixelCNNPolicy
from ral_gym.agents.policy import PixelCNNPolicy, PriorWeights
from ral_gym.errors import ConfigError
from ral_gym.priors.base import Prior

PIXELCNN_ALGORITHMS: dict[str, Any] = {
    "reinforce": Reinforce,
    "ppo": PPO,
    "a2c": A2C,
    "trpo": TRPO,
    "grpo": GRPO,
    "maskable_ppo": MaskablePPO,
}
"""On-policy: they train a PixelCNN, one pass per image. Stage 3 runs any of them."""
ALGORITHMS: dict[str, type[BaseAlgorithm]] = PIXELCNN_ALGORITHMS | {"dqn": DQN, "qrdqn": QRDQN}
CONTINUOUS_ONLY = ("sac", "td3", "ddpg", "tqc", "crossq")


def algorithm_defaults(
    algo: str, env: VecEnv, prior: PriorWeights | Prior | Path | str | None = None
) -> dict[str, Any]:
    """Keyword arguments for an algorithm on `env`; `policy_for` gives the policy to go with them.

    Args:
        algo: a name in `ALGORITHMS`.
        env: from `make_sb3_env`.
        prior: the network that the policy starts from (see `PixelCNNPolicy`), put into `policy_kwargs`; None: the
            caller puts it there. `dqn` and `qrdqn` have no PixelCNN and leave it out.

    Raises:
        ConfigError: an algorithm that is unknown, or that cannot draw codes.
    """
    check_algorithm(algo, pixelcnn=False)
    n_codes = int(env.observation_space.shape[0])  # type: ignore[index]
    if algo in ("dqn", "qrdqn"):
        return _value_based(algo, n_codes, env.num_envs)
    levels = tuple(env.get_attr("levels", 0)[0])
    start = {} if prior is None else {"prior": PriorWeights.of(prior)}
    common: dict[str, Any] = {
        "policy_kwargs": {"levels": levels, **start},  # checked against the prior's; the policy sees only spaces
        "rollout_buffer_kwargs": {"levels": levels},  # two levels: each is discounted as an episode of its own
        "n_steps": n_codes,  # one whole episode per environment and rollout
        "gamma": 1.0,  # the first code sees the terminal reward as well as the last
        "rollout_buffer_class": EpisodeRolloutBuffer,  # one pass per image instead of one per code
    }
    # The prior starts with the entropy of the data; a bonus would only blur it. TRPO has none.
    entropy: dict[str, Any] = {"ent_coef": 0.0}
    if algo in ("reinforce", "grpo"):
        return common | entropy
    common["gae_lambda"] = 1.0  # the value head starts from nothing: bootstrapping on it would be bias only
    # At least four minibatches, each the whole images of equally many environments.
    minibatch = n_codes * max(n for n in range(1, max(1, env.num_envs // 4) + 1) if env.num_envs % n == 0)
    if algo == "a2c":
        return (
            common
            | entropy
            | {
                "use_rms_prop": False,  # Adam, as the prior was trained with; RMSProp has no bias correction
                "normalize_advantage": True,  # the critic's scores have no fixed scale; needs more than one environment
            }
        )
    if algo == "trpo":
        return common | {
            "batch_size": minibatch,  # of the value head's updates; the policy step takes the whole rollout
            "n_critic_updates": 4,  # the value head alone: the trunk's features are detached
            "target_kl": 0.01,  # mean KL per code and update; T codes add up
            "cg_max_steps": 10,  # each costs a pass forward and two back; more did not matter on Toy-v0
        }
    common |= entropy | {
        "batch_size": minibatch,
        "n_epochs": 2,  # few: the policy must stay near its pretrained start
        "clip_range": 0.1,  # and small steps, for the same reason
        "target_kl": 0.03,
    }
    if algo == "maskable_ppo":
        common["rollout_buffer_class"] = MaskableEpisodeRolloutBuffer  # masks too, in next to no memory
    return common


def _value_based(algo: str, n_codes: int, n_envs: int) -> dict[str, Any]:
    """DQN and QR-DQN: one network pass per transition, rewards of each step or terminal ones."""
    features: dict[str, Any] = {
        "features_extractor_class": CodeFeatures,  # embeds codes; raw indices would be read as magnitudes
        "net_arch": [128],
    }
    if algo == "qrdqn":
        features["n_quantiles"] = 25  # 200, the default, means K x 200 outputs
    return {
        "gamma": 1.0,  # episodes are finite, and the reward comes at their end
        "buffer_size": 100_000,  # transitions of 4 T bytes; the default million takes 1 GB at T = 256
        "learning_starts": 10 * n_codes * n_envs,  # ten images of every environment before the first update
        "batch_size": 128,
        "train_freq": 1,
        "gradient_steps": max(1, n_envs // 4),  # a step of the environments brings E transitions
        "target_update_interval": max(n_envs, 500),
        "n_steps": min(4, n_codes),  # a terminal reward reaches the early codes in T / 4 target updates
        "exploration_fraction": 0.5,
        "exploration_final_eps": 1 / (4 * n_codes),  # 0.05 would spoil T / 20 codes of every image
        "policy_kwargs": features,
    }


def policy_for(algo: str) -> str | type[BasePolicy]:
    """The policy that goes with `algorithm_defaults`.

    Raises:
        ConfigError: an algorithm that is unknown, or that cannot draw codes.
    """
    check_algorithm(algo, pixelcnn=False)
    if algo == "maskable_ppo":
        return MaskablePixelCNNPolicy
    return PixelCNNPolicy if algo in PIXELCNN_ALGORITHMS else "MlpPolicy"


def check_algorithm(algo: str, pixelcnn: bool = True) -> None:
    """Raise `ConfigError` for an algorithm that does not run here.

    Args:
        algo: its name.
        pixelcnn: it must also train a PixelCNN, as stage 3 does.
    """
    known = PIXELCNN_ALGORITHMS if pixelcnn else ALGORITHMS
    if algo in known:
        return
    choice = f"choose one of {', '.join(known)}"
    if algo in ALGORITHMS:
        raise ConfigError(f"algorithm '{algo}' learns a value per code and has no PixelCNN policy to train: {choice}")
    if algo.replace("_", "") in CONTINUOUS_ONLY:
        raise ConfigError(
            f"algorithm '{algo}' acts in continuous spaces only (its actor outputs real vectors), but an action "
            f"here is one of K discrete codes: {choice}"
        )
    raise ConfigError(f"algorithm '{algo}' is unknown: {choice}")
