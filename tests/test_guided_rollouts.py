"""Guidance in rollouts: what is drawn, whose log-probabilities are trained, and that the ratio starts at 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from ral_gym.agents.policy import PriorPolicy
from ral_gym.agents.train_ral import make_agent
from ral_gym.agents.vec_env import make_sb3_env
from ral_gym.envs.toy_classes import GRID
from ral_gym.errors import ConfigError
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.runs.run import Run, read_config
from ral_gym.stages.levels import load_generator
from tests.test_label_agents import ALGORITHMS, E, K, make_model, make_prior
from tests.test_label_rewards import make_stage_3

CPU = torch.device("cpu")
SCALE = 2.5
MODES = ["guided", "plain"]


def model(algo: str, mode: str, policy: dict[str, Any] | None = None, **arguments: Any) -> Any:
    guided = {"guidance": SCALE, "guidance_log_probs": mode}
    built = make_model(algo, **arguments)
    keywords = {"policy_kwargs": built.policy_kwargs | guided | (policy or {})}
    return make_model(algo, **(arguments | keywords))


def definition(prior: Any, sequences: Tensor, scale: float) -> Tensor:
    """Log-probabilities (B, T, K) of p_c^s p_u^(1-s), normalised."""
    unlabelled = torch.cat([sequences[:, :-1], torch.full((len(sequences), 1), GRID.no_class)], 1)
    of_class, of_none = prior(sequences).log_softmax(-1), prior(unlabelled).log_softmax(-1)
    return (scale * of_class + (1 - scale) * of_none).log_softmax(-1)


def collect(agent: Any) -> Any:
    """One rollout; returns the buffer."""
    _, callback = agent._setup_learn(10**9, None)
    agent.collect_rollouts(agent.env, callback, agent.rollout_buffer, getattr(agent, "n_steps", 0))
    return agent.rollout_buffer


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_ratio_is_1_before_the_first_step(algo: str, mode: str) -> None:
    agent = model(algo, mode)
    buffer = collect(agent)
    episodes = buffer.episodes()
    sequences = episodes.codes
    actions = sequences[episodes.row, episodes.pos]
    scale = SCALE if mode == "guided" else 1.0
    with torch.no_grad():
        expected = definition(agent.policy.prior, sequences, scale)[episodes.row, episodes.pos]
        _, log_prob, entropy = agent.policy.evaluate_actions(episodes, actions)
    old = torch.as_tensor(buffer.log_probs)
    torch.testing.assert_close(old, expected.gather(1, actions[:, None])[:, 0], rtol=0, atol=2e-5)
    torch.testing.assert_close(log_prob, old, rtol=0, atol=2e-5)
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(1), rtol=0, atol=2e-5)
    with torch.no_grad():
        again = agent.policy.get_distribution(episodes).log_prob(actions)
    torch.testing.assert_close(again, old, rtol=0, atol=2e-5)


@pytest.mark.parametrize("algo", ["reinforce", "grpo"])
@pytest.mark.parametrize("mode", MODES)
def test_the_fast_path_equals_the_steps(algo: str, mode: str) -> None:
    rounds = []
    for fast in (True, False):
        agent = model(algo, mode, fast_path=fast)
        torch.manual_seed(5)
        buffer = collect(agent)
        rounds.append((torch.as_tensor(buffer.codes), torch.as_tensor(buffer.log_probs)))
    assert torch.equal(rounds[0][0], rounds[1][0])
    torch.testing.assert_close(rounds[0][1], rounds[1][1], rtol=0, atol=2e-5)


def test_both_modes_draw_the_same_guided_codes() -> None:
    drawn = []
    for mode in MODES:
        agent = model("reinforce", mode)
        torch.manual_seed(5)
        drawn.append(torch.as_tensor(collect(agent).codes))
    plain = make_model("reinforce")
    torch.manual_seed(5)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], torch.as_tensor(collect(plain).codes))


def test_gradients_flow_through_both_passes_or_through_one() -> None:
    null_rows = {}
    for mode in MODES:
        agent = model("grpo", mode)
        episodes = collect(agent).episodes()
        actions = episodes.codes[episodes.row, episodes.pos]
        agent.policy.evaluate_actions(episodes, actions)[1].sum().backward()
        null_rows[mode] = agent.policy.prior.cls_embedding.embedding_table.weight.grad[-1]
    assert null_rows["guided"].abs().max() > 0
    assert null_rows["plain"].abs().max() == 0


@pytest.mark.parametrize("mode", MODES)
def test_entropy_is_that_of_the_trained_distribution(mode: str) -> None:
    agent = model("grpo", mode, n_envs=240)
    buffer = collect(agent)
    episodes = buffer.episodes()
    with torch.no_grad():
        log_probs = definition(agent.policy.prior, episodes.codes, SCALE if mode == "guided" else 1.0)
    exact = -(log_probs.exp() * log_probs).sum(-1).mean().item()
    assert agent.policy.mean_entropy(buffer) == pytest.approx(exact, abs=0.02 if mode == "guided" else 1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_kl_to_the_start_is_0_at_the_start(mode: str) -> None:
    agent = model("grpo", mode, kl_coef=0.1, n_epochs=1)
    agent.learn(1)
    assert agent.logger.name_to_value["train/kl_to_prior"] == pytest.approx(0, abs=1e-6)
    assert agent.logger.name_to_value["train/approx_kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_an_update_moves_the_weights(algo: str, mode: str) -> None:
    agent = model(algo, mode)
    before = agent.policy.prior.output.weight.detach().clone()
    agent.learn(2 * E * GRID.n_codes)
    after = agent.policy.prior.output.weight
    assert after.isfinite().all() and not torch.equal(before, after)


def test_no_guidance_is_the_default_and_changes_no_bit() -> None:
    drawn = []
    for policy in ({}, {"guidance": 1.0, "guidance_log_probs": "plain"}):
        built = make_model("ppo")
        agent = make_model("ppo", policy_kwargs=built.policy_kwargs | policy)
        torch.manual_seed(5)
        buffer = collect(agent)
        drawn.append((torch.as_tensor(buffer.codes), torch.as_tensor(buffer.log_probs)))
    assert torch.equal(drawn[0][0], drawn[1][0]) and torch.equal(drawn[0][1], drawn[1][1])


def test_a_saved_model_keeps_its_guidance(tmp_path: Path) -> None:
    agent = model("ppo", "plain")
    agent.save(tmp_path / "model.zip")
    loaded = type(agent).load(tmp_path / "model.zip")
    assert loaded.policy.sampling.guidance == SCALE and loaded.policy.plain_log_probs


def test_what_rollouts_refuse_is_one_line() -> None:
    env = make_model("ppo").env
    arguments = (env.observation_space, env.action_space, lambda _: 1e-3)
    for name in ("temperature", "top_k", "top_p"):
        with pytest.raises(ConfigError, match=f"{name}=2 in rollouts: the codes would not be drawn from the policy"):
            PriorPolicy(*arguments, prior=make_prior(), **{name: 2})
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        PriorPolicy(*arguments, prior=make_prior(), colour=2)
    with pytest.raises(ConfigError, match="choose guided or plain"):
        PriorPolicy(*arguments, prior=make_prior(), guidance_log_probs="both")  # type: ignore[arg-type]
    prior = PixelCNN(K, 4, 4, hidden_units=8, residual_units=8, layers=1)
    box, codes = spaces.Box(0, K + 1, (16,), np.int16), spaces.Discrete(K)
    with pytest.raises(ConfigError, match="needs a prior with classes, this PixelCNN has none"):
        PriorPolicy(box, codes, lambda _: 1e-3, prior=prior, guidance=2.0)


def test_settings_of_a_run_reach_the_policy(tmp_path: Path) -> None:
    make_stage_3(tmp_path, algo="grpo", reward_weights={"loo_fd": 1.0}, guidance=2.0, guidance_log_probs="plain")
    run = Run(tmp_path, read_config(tmp_path))
    env = make_sb3_env("ral_gym/LatentCode-v0", 6, run=str(tmp_path), reward="none", reset_mode="full", lockstep=True)
    policy: Any = make_agent(run, env, load_generator(run, "prior", CPU), CPU).policy
    assert policy.sampling.guidance == 2.0 and policy.plain_log_probs
    with pytest.raises(ConfigError, match="needs a prior with classes"):
        make_agent(run, env, PixelCNN(16, 4, 4, hidden_units=8, residual_units=8, layers=1), CPU)
