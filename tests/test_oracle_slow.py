"""On `ral_gym/Oracle-v0` the optimum is known: with the reward log o - log pi agents must come closer to the oracle."""

from typing import Any

import pytest
import torch

from ral_gym.agents import ALGORITHMS, EntropyReward, PixelCNNPolicy, algorithm_defaults, make_sb3_env
from ral_gym.envs.oracle import load_light_prior, load_oracle
from ral_gym.metrics import sequence_kl
from ral_gym.priors.sampler import CachedSampler

# gae_lambda 0.5: PPO's value head starts from nothing, and over 64 codes Monte Carlo returns bury it in noise.
SETTINGS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "reinforce": (128, 40, {"learning_rate": 3e-4}),
    "ppo": (
        256,
        25,
        {
            "learning_rate": 1e-4,
            "normalize_advantage": False,
            "batch_size": 64 * 256,
            "target_kl": None,
            "clip_range": 0.2,
            "gae_lambda": 0.5,
            "vf_coef": 1.0,
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("algo", SETTINGS)
@pytest.mark.parametrize("seed", [0, 1])
def test_agents_approach_the_oracle(algo: str, seed: int) -> None:
    """KL(policy || oracle), exact over K and Monte Carlo over prefixes, falls by at least 7 % of its start."""
    n_envs, updates, settings = SETTINGS[algo]
    oracle = load_oracle()
    env = make_sb3_env("ral_gym/Oracle-v0", n_envs, seed=seed)
    arguments = algorithm_defaults(algo, env, prior=load_light_prior()) | settings | {"seed": seed, "device": "cpu"}
    model = ALGORITHMS[algo](PixelCNNPolicy, env, **arguments)

    def divergence() -> float:
        generator = torch.Generator().manual_seed(100 + seed)
        codes, _ = CachedSampler(model.policy.prior).sample(1000, generator=generator)
        return sequence_kl(model.policy.prior, oracle, codes)

    before = divergence()
    model.learn(64 * n_envs * updates, callback=EntropyReward())
    after = divergence()
    print(f"{algo}, seed {seed}: KL(policy || oracle) {before:.4f} -> {after:.4f} nats per code")
    assert after < 0.93 * before
