"""The built-in algorithms, with default arguments for T-step episodes with a terminal reward.

They are registered like any other algorithm: `ral_gym.registry.ALGORITHMS` names the entries of this file. An
algorithm's own defaults (clip range, epochs, ...) are in its section of `ral_gym.config.algorithms`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sb3_contrib import QRDQN, TRPO, MaskablePPO
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import VecEnv

from ral_gym.agents.algorithm import Algorithm, find_algorithm, whole_episodes
from ral_gym.agents.algorithms.grpo import GRPO
from ral_gym.agents.algorithms.reinforce import Reinforce
from ral_gym.agents.features import CodeFeatures
from ral_gym.agents.maskable import MaskableEpisodeRolloutBuffer, MaskablePriorPolicy
from ral_gym.agents.policy import PriorWeights
from ral_gym.agents.vec_env import check_code_env
from ral_gym.config import RALConfig
from ral_gym.priors.base import Prior
from ral_gym.registry import ALGORITHMS as REGISTRY


def group_size(n_envs: int, most: int = 8) -> int:
    """GRPO's group size: the largest divisor of `n_envs` up to `most`; if that is 1, `n_envs`."""
    return next((size for size in range(min(most, n_envs), 1, -1) if n_envs % size == 0), n_envs)


def _grouped(env: VecEnv) -> dict[str, Any]:
    return whole_episodes(env) | {"group_size": group_size(env.num_envs), "scale_advantage": "batch"}


def _scale(config: RALConfig) -> dict[str, Any]:
    """GRPO's argument for `normalize_advantage`; its own section may override it."""
    shared = "batch" if config.normalize_advantage else "none"
    return {"scale_advantage": config.grpo.scale_advantage or shared}


def _minibatches(env: VecEnv) -> dict[str, Any]:
    """At least four minibatches, each the whole images of equally many environments."""
    n_codes, n_envs = sum(env.get_attr("levels", 0)[0]), env.num_envs
    images = max(n for n in range(1, max(1, n_envs // 4) + 1) if n_envs % n == 0)
    if n_codes * images == 1:  # PPO's minibatches have two codes or more, also of a grid of one code
        images = next((n for n in range(2, n_envs + 1) if n_envs % n == 0), 2)
    return whole_episodes(env) | {"batch_size": n_codes * images}


def _masked(env: VecEnv) -> dict[str, Any]:
    return _minibatches(env) | {"rollout_buffer_class": MaskableEpisodeRolloutBuffer}  # masks too, in next to no memory


def _a2c(env: VecEnv) -> dict[str, Any]:
    return whole_episodes(env) | {
        "use_rms_prop": False,  # Adam, as the prior was trained with; RMSProp has no bias correction
        "normalize_advantage": True,  # the critic's scores have no fixed scale; needs more than one environment
    }


def _value_based(env: VecEnv) -> dict[str, Any]:
    """DQN and QR-DQN: one network pass per transition, rewards of each step or terminal ones."""
    n_codes, n_envs = sum(env.get_attr("levels", 0)[0]), env.num_envs
    codebook_size = int(env.action_space.n)  # type: ignore[attr-defined]
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
        "exploration_final_eps": 1 / (4 * n_codes),  # 0.05 would randomise T / 20 codes of every image
        "policy_kwargs": {
            "features_extractor_class": CodeFeatures,  # embeds codes; raw indices would be read as magnitudes
            "features_extractor_kwargs": {"codebook_size": codebook_size},
            "net_arch": [128],
        },
    }


def _quantiles(env: VecEnv) -> dict[str, Any]:
    arguments = _value_based(env)
    return arguments | {"policy_kwargs": arguments["policy_kwargs"] | {"n_quantiles": 25}}  # 200 means K x 200 outputs


REINFORCE = Algorithm(Reinforce, section="reinforce")
GROUPED = Algorithm(GRPO, defaults=_grouped, section="grpo", renamed=_scale, renames=("normalize_advantage",))
PROXIMAL = Algorithm(PPO, defaults=_minibatches, section="ppo")
ACTOR_CRITIC = Algorithm(A2C, defaults=_a2c, section="a2c")
TRUST_REGION = Algorithm(TRPO, defaults=_minibatches, section="trpo")
MASKABLE = Algorithm(MaskablePPO, MaskablePriorPolicy, _masked, "maskable_ppo")
DEEP_Q = Algorithm(DQN, "MlpPolicy", _value_based)
QUANTILE_DEEP_Q = Algorithm(QRDQN, "MlpPolicy", _quantiles)


class _Classes(Mapping[str, type[BaseAlgorithm]]):
    """Name -> class of every registered algorithm."""

    def __getitem__(self, name: str) -> type[BaseAlgorithm]:
        if name not in REGISTRY:
            raise KeyError(name)
        return find_algorithm(name).cls

    def __iter__(self) -> Iterator[str]:
        return iter(REGISTRY)

    def __len__(self) -> int:
        return len(REGISTRY)


ALGORITHMS = _Classes()
"""Name -> class of every registered algorithm; they are registered in `ral_gym.registry.ALGORITHMS`."""


def algorithm_defaults(
    algo: str, env: VecEnv, prior: PriorWeights | Prior | Path | str | None = None
) -> dict[str, Any]:
    """Keyword arguments for an algorithm on `env`; `policy_for` gives the policy to go with them.

    Args:
        algo: a name in `ALGORITHMS`, or ``module:Class``.
        env: from `make_sb3_env`.
        prior: the network that the policy starts from (see `PriorPolicy`), put into `policy_kwargs`; None: the caller
            adds it. `dqn` and `qrdqn` train no prior and ignore it.

    Raises:
        ConfigError: an algorithm that is unknown, or that cannot draw codes.
    """
    algorithm = find_algorithm(algo)
    check_code_env(env)
    arguments = algorithm.keywords(env)
    if prior is not None and algorithm.trains_prior:
        arguments["policy_kwargs"] = arguments["policy_kwargs"] | {"prior": PriorWeights.of(prior)}
    return arguments


def policy_for(algo: str) -> str | type[BasePolicy]:
    """The policy that goes with `algorithm_defaults`.

    Raises:
        ConfigError: an algorithm that is unknown, or that cannot draw codes.
    """
    return find_algorithm(algo).policy
