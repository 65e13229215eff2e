"""Classes with two levels: the label stays at the end, behind the bottom codes, and both networks know it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ral_gym.agents import PriorPolicy, find_algorithm
from ral_gym.agents.defaults import algorithm_defaults, policy_for
from ral_gym.agents.vec_env import CodeVecEnv
from ral_gym.envs.core import GenerationCore
from ral_gym.envs.worlds import World
from ral_gym.grid import CodeGrid
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.two_level import TwoLevelPrior
from ral_gym.rewards.score_map import step_rewards

K, CLASSES, E = 5, 3, 6
GRID = CodeGrid(4, 2, K, levels=2, classes=CLASSES)
CODES = replace(GRID, classes=0)
T = GRID.n_codes
RNG = np.random.default_rng(0)
REAL = GRID.with_labels(RNG.integers(K, size=(9, T)).astype(np.int16), np.arange(9) % CLASSES)


def score(codes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The share of each top cell's bottom codes that are its class."""
    bottom, rows = CODES.split(codes)[1], CODES.rows_of(codes.shape[1])
    right = (bottom.view(len(codes), 1, 2 * rows, 4) == labels[:, None, None, None]).float()
    score_map = torch.nn.functional.avg_pool2d(right, 2)[:, 0]  # (B, r, 2)
    return score_map, step_rewards(score_map, rows, 2, "single", 2)


def decode(codes: Tensor) -> Tensor:
    return (CODES.split(codes)[1].view(len(codes), 1, -1, 4) * 50).to(torch.uint8)


WORLD = World(GRID, decode, score, REAL, 1, torch.device("cpu"))


def make_prior() -> TwoLevelPrior:
    torch.manual_seed(0)
    small: dict[str, Any] = {"hidden_units": 8, "residual_units": 8, "layers": 2, "conv_filter_size": 3}
    small |= {"output_stack_layers": 1, "classes": CLASSES}
    top = PixelCNN(K, 4, 2, **small)
    prior = TwoLevelPrior(top, PixelCNN(K, 8, 4, **small, condition=(4, 2, K), conditioning_stack_layers=1))
    for weights in prior.parameters():
        weights.data += 0.1 * torch.randn_like(weights)  # what is 0 at first must matter, too
    return prior


@pytest.mark.parametrize("mode", ["full", "continue", "scratch", "mixed"])
def test_a_round_at_once_is_the_round_step_by_step(mode: str) -> None:
    cores = [GenerationCore(WORLD, E, reset_mode=mode) for _ in range(2)]
    for core in cores:
        core.reset(np.arange(E), seeds=list(range(E)))
    codes = RNG.integers(K, size=(E, T + 1))
    rewards = np.zeros(E)
    while (running := np.flatnonzero(cores[0].position < cores[0].stop)).size:
        finished = cores[0].step(codes[np.arange(E), cores[0].position.clip(max=T - 1)], running)
        if finished is not None:
            rewards[finished.rows] = finished.rewards
    at_once = cores[1].draw_round(codes)
    np.testing.assert_allclose(rewards, at_once.rewards)
    assert (cores[0].codes == cores[1].codes).all() and rewards.any()
    assert (at_once.labels == cores[1].codes[:, -1] - K - 2).all()  # type: ignore[union-attr]


def test_cached_steps_are_full_passes() -> None:
    env = CodeVecEnv(WORLD, E, reset_mode="mixed", lockstep=False)
    env.seed(0)
    policies = [
        PriorPolicy(env.observation_space, env.action_space, lambda _: 1e-3, prior=make_prior(), use_cache=use).double()
        for use in (True, False)
    ]
    policies[1].load_state_dict(policies[0].state_dict())
    observations, other_label = env.reset(), 0.0
    for step in range(60):
        results = []
        for policy in policies:
            torch.manual_seed(step)
            with torch.no_grad():
                results.append(policy(torch.as_tensor(observations)))
        assert torch.equal(results[0][0], results[1][0])
        for one, other in zip(results[0][1:], results[1][1:], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        changed = torch.as_tensor(observations.copy())
        changed[:, -1] = K + 2 + (changed[:, -1] - K - 1) % CLASSES
        both = [
            policies[1].get_distribution(obs).distribution.probs for obs in (torch.as_tensor(observations), changed)
        ]
        other_label += float((both[0] - both[1]).abs().max().detach())
        observations = env.step(results[0][0].numpy())[0]
    assert other_label > 0.1


@pytest.mark.parametrize("algo", ["reinforce", "grpo", "ppo", "trpo"])
def test_agents_train_both_levels_given_the_label(algo: str) -> None:
    env = CodeVecEnv(WORLD, E, reset_mode="mixed", paired=True)
    env.seed(0)
    model: Any = find_algorithm(algo).cls(
        policy_for(algo), env, seed=0, device="cpu", **algorithm_defaults(algo, env, prior=make_prior())
    )
    before, seen = [weight.clone() for weight in model.policy.prior.parameters()], []
    train = model.train

    def look() -> None:
        for batch in model.rollout_buffer.get():
            with torch.no_grad():
                log_prob = model.policy.evaluate_actions(batch.observations, batch.actions)[1]
            seen.append(float((log_prob - batch.old_log_prob).abs().max()))
        train()

    model.train = look
    model.learn(E * T)
    assert seen[0] < 1e-4
    labels = [
        bool((one != other).any())
        for (name, one), other in zip(model.policy.prior.named_parameters(), before, strict=True)
        if name.endswith("conditioning.embedding.weight")
    ]
    assert labels == [True, True]
