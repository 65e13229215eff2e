"""Every agent learns what a class means: from a prior that draws fine images of a random class, by reward alone."""

from __future__ import annotations

import functools
import time
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback

from ral_gym.agents import find_algorithm, make_sb3_env
from ral_gym.agents.defaults import algorithm_defaults, policy_for
from ral_gym.envs.toy_classes import GRID, toy_classes_score_map, toy_classes_sequences
from ral_gym.priors.base import maximum_likelihood_loss
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.sampler import make_sampler
from ral_gym.priors.transformer import Transformer
from tests.label_models import ALGORITHMS, ID, K

SECONDS = 30
THRESHOLD: Any = gym.spec(ID).reward_threshold
QUICKER: dict[str, dict[str, Any]] = {"trpo": {"target_kl": 0.05, "cg_max_steps": 5, "n_critic_updates": 1}}


NETWORKS: dict[str, Any] = {
    "transformer": lambda: Transformer(K, 4, 4, hidden_units=32, layers=2, multiple_of=32, classes=GRID.classes),
    "pixelcnn": lambda: PixelCNN(
        *(K, 4, 4),
        hidden_units=24,
        residual_units=24,
        layers=2,
        conv_filter_size=3,
        output_stack_layers=1,
        classes=GRID.classes,
    ),
}


@functools.cache
def ignorant_prior(kind: str) -> Any:
    """Maximum likelihood on the perfect images, with labels that say nothing about them: mean reward 0.4."""
    torch.manual_seed(0)
    network = NETWORKS[kind]()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    codes = torch.as_tensor(toy_classes_sequences()[:, :-1].astype(np.int64))
    for _ in range(250):
        batch = GRID.with_labels(codes[torch.randint(len(codes), (64,))], torch.randint(GRID.classes, (64,)))
        loss = maximum_likelihood_loss(network, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def reward_of(prior: Any) -> float:
    """The mean score of 300 images, 100 of each class."""
    labels = torch.arange(300) % GRID.classes
    start = GRID.with_labels(torch.full((300, GRID.n_codes), K), labels)
    codes, _ = make_sampler(prior).sample(codes=start, generator=torch.Generator().manual_seed(0))
    return toy_classes_score_map(codes, labels).mean().item()


class UntilSolved(BaseCallback):
    """Stops once the last 256 images beat the threshold with a margin, or when time is up."""

    def _on_training_start(self) -> None:
        self.began = time.process_time()

    def _on_step(self) -> bool:
        shown = [episode["r"] for episode in self.model.ep_info_buffer or ()]
        solved = len(shown) == 256 and np.mean(shown) > THRESHOLD + 0.03
        return not solved and time.process_time() - self.began < SECONDS


CASES = [("transformer", algo) for algo in ALGORITHMS] + [("pixelcnn", "ppo"), ("pixelcnn", "trpo")]


@pytest.mark.parametrize(
    ("kind", "algo"), [pytest.param(*case, marks=[pytest.mark.slow] * (case[1] == "trpo")) for case in CASES]
)
def test_the_meaning_of_the_classes_is_learnt_from_the_reward(kind: str, algo: str) -> None:
    prior = ignorant_prior(kind)
    assert 0.3 < reward_of(prior) < 0.5
    env = make_sb3_env(ID, 64, seed=0)
    arguments = algorithm_defaults(algo, env, prior=prior) | {"learning_rate": 1e-3} | QUICKER.get(algo, {})
    model: Any = find_algorithm(algo).cls(
        policy_for(algo), env, seed=0, device="cpu", stats_window_size=256, **arguments
    )
    model.learn(10**7, UntilSolved())
    assert reward_of(model.policy.prior) > THRESHOLD
