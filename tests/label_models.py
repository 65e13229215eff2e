"""A small class-conditional prior and models that train it, for the tests of labels."""

from __future__ import annotations

from typing import Any

import torch

from ral_gym.agents import find_algorithm, make_sb3_env
from ral_gym.agents.defaults import algorithm_defaults, policy_for
from ral_gym.priors.transformer import Transformer

ID = "ral_gym/ToyClasses-v0"
ALGORITHMS = ["reinforce", "grpo", "ppo", "a2c", "trpo", "maskable_ppo"]
CPU = torch.device("cpu")
E, K, T, FIRST = 12, 8, 16, 10


def make_prior(seed: int = 0, **sizes: Any) -> Transformer:
    """A transformer whose logits depend on the label; the one of an untrained network are all 0."""
    torch.manual_seed(seed)
    prior = Transformer(K, 4, 4, **({"hidden_units": 16, "layers": 2, "multiple_of": 16, "classes": 3} | sizes))
    prior.output.weight.data.normal_(std=0.3)
    prior.cls_embedding.embedding_table.weight.data.normal_()
    return prior


def make_model(algo: str, reset_mode: str = "full", n_envs: int = E, lockstep: bool = True, **arguments: Any) -> Any:
    env = make_sb3_env(ID, n_envs, seed=0, reset_mode=reset_mode, lockstep=lockstep)
    prior = arguments.pop("prior", None) or make_prior()
    keywords = algorithm_defaults(algo, env, prior=prior) | {"seed": 0, "device": "cpu"} | arguments
    return find_algorithm(algo).cls(policy_for(algo), env, **keywords)
