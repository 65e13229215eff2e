"""Hyperparameters for rl_zoo3: its training command, logs, checkpoints and evaluation, on our environments.

    python -m rl_zoo3.train --algo ppo --env ral_gym/Faces-v0 --gym-packages ral_gym -conf examples/rl_zoo3_conf.py -P

    ... --algo a2c | trpo | dqn | qrdqn | ppo_lstm         # the others of rl_zoo3 that draw discrete codes
    ... --env ral_gym/Toy-v0                               # from random weights; PPO solves it in under a minute
    ... --env ral_gym/LatentCode-v0 --env-kwargs run:"'runs/demo'"        # a run of your own and its prior
    python -m rl_zoo3.enjoy --algo ppo --env ral_gym/Toy-v0 --gym-packages ral_gym -f logs --no-render --stochastic

(``pip install "ral-gym[zoo]"``; `enjoy` of rl_zoo3 2.9.2 also needs `requests`.) Prints the hyperparameters, then SB3's
table after every rollout; ``rollout/ep_rew_mean`` is the reward of whole images. Models and logs go to
``logs/ALGO/ENV_1``.

rl_zoo3 makes single environments in a `DummyVecEnv`, not ours from `make_sb3_env`: the same episodes, but every image
is decoded and scored alone, so that it is for rl_zoo3's tools and not for speed. Its evaluation during training
(``--eval-freq``) takes the likeliest code each time, that is one image; ``--eval-freq -1`` turns it off.

The format is rl_zoo3's: a dict `hyperparams` from environment ids (or "default") to keyword arguments. A YAML file
cannot say `rollout_buffer_class`, therefore this is Python. rl_zoo3 tells it neither the algorithm nor the environment,
so both are read from the command line.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from rl_zoo3.utils import StoreDict

from ral_gym.agents import CodeFeatures, PriorWeights, algorithm_defaults, make_sb3_env, policy_for
from ral_gym.errors import ConfigError
from ral_gym.priors.pixelcnn import PixelCNN

N_ENVS = 32

# What differs from `algorithm_defaults`. From random weights there is no pretrained start to stay near: larger steps,
# and an entropy bonus, without which policy gradients often settle on one flawed image of the toy. "lin_": falls to 0.
FROM_SCRATCH: dict[str, dict[str, Any]] = {
    "ppo": {"learning_rate": "lin_3e-3", "ent_coef": 0.05, "clip_range": 0.2, "target_kl": None, "n_epochs": 4},
    "a2c": {"learning_rate": "lin_3e-3", "ent_coef": 0.1},
    "trpo": {"learning_rate": "lin_3e-3", "target_kl": 0.05, "cg_max_steps": 5, "n_critic_updates": 1},
    "dqn": {"learning_rate": 1e-3},
    "qrdqn": {"learning_rate": 1e-3},
    "ppo_lstm": {"learning_rate": 1e-3},
}
PRETRAINED: dict[str, dict[str, Any]] = {
    "ppo": {"learning_rate": 1e-4},
    "a2c": {"learning_rate": 1e-4},  # SB3's 7e-4 is RMSProp's
    "trpo": {},  # its learning rate is the value head's
    "dqn": {},  # no sequence model, so no pretrained start
    "qrdqn": {},
    "ppo_lstm": {},
}
IMAGES = {"ral_gym/Toy-v0": 8_192, "default": 16_384}
"""Images to draw by environment."""
BUNDLED_PRIORS = {"ral_gym/Faces-v0": "faces/prior.safetensors", "ral_gym/Oracle-v0": "oracle/prior.safetensors"}
"""Priors inside the package, by environment."""


def starting_prior(env_id: str, env_kwargs: dict[str, Any], codebook_size: int) -> PriorWeights:
    """The run's prior, the bundled one, or random weights; without the weights once it is saved in a model."""
    if "run" in env_kwargs:
        return PriorWeights.of(Path(env_kwargs["run"]))
    if env_id in BUNDLED_PRIORS:
        from ral_gym.assets import asset_path

        return PriorWeights.of(asset_path(BUNDLED_PRIORS[env_id]))
    if env_id != "ral_gym/Toy-v0":
        raise ConfigError(f"{env_id} has no prior to start from: give --env-kwargs run:\"'runs/NAME'\"")
    torch.manual_seed(0)
    small: dict[str, Any] = {"hidden_units": 24, "residual_units": 24, "layers": 1, "conv_filter_size": 3}
    return PriorWeights.of(PixelCNN(codebook_size, height=4, width=4, **small))


def entry(algo: str, env_id: str, env_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The hyperparameters of one algorithm on one environment.

    Raises:
        ConfigError: an algorithm that cannot draw codes; the message says why.
    """
    env = make_sb3_env(env_id, N_ENVS, **env_kwargs)  # for its spaces; rl_zoo3 makes its own
    n_codes, codebook_size = int(env.observation_space.shape[0]), int(env.action_space.n)  # type: ignore[index, attr-defined]
    values: dict[str, Any] = {
        "n_envs": N_ENVS,
        "n_timesteps": n_codes * IMAGES.get(env_id, IMAGES["default"]),
        "env_kwargs": env_kwargs,
    }
    if algo == "ppo_lstm":  # the LSTM reads one code after another, as any recurrent policy would
        values |= {
            "policy": "MlpLstmPolicy",
            "n_steps": n_codes,
            "batch_size": n_codes * N_ENVS // 4,
            "gamma": 1.0,
            "gae_lambda": 1.0,
            "policy_kwargs": {"features_extractor_class": CodeFeatures},
        }
    else:
        values |= algorithm_defaults(algo, env)
        policy = policy_for(algo)
        if isinstance(policy, str):
            values["policy"] = policy
        else:
            # rl_zoo3 imports the class by its dotted name.
            values["policy"] = f"{policy.__module__}.{policy.__name__}"
            prior = starting_prior(env_id, env_kwargs, codebook_size)
            values["policy_kwargs"] = values.get("policy_kwargs", {}) | {"prior": prior}
    return values | (FROM_SCRATCH if env_id == "ral_gym/Toy-v0" else PRETRAINED)[algo]


def asked() -> argparse.Namespace:
    """The part of rl_zoo3's command line that decides."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--algo", default="ppo")
    parser.add_argument("--env", default="ral_gym/Toy-v0")
    parser.add_argument("--env-kwargs", nargs="+", action=StoreDict, default={})
    return parser.parse_known_args()[0]


arguments = asked()
hyperparams = {arguments.env: entry(arguments.algo, arguments.env, arguments.env_kwargs)}
hyperparams["default"] = hyperparams[arguments.env]
