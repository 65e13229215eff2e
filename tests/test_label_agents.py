"""Agents with classes: drawing, buffers, groups, rewards and the critic, all given the label."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from torch import Tensor

from ral_gym.agents import PriorPolicy, Reinforce, make_sb3_env
from ral_gym.agents.algorithm import check_stage
from ral_gym.agents.algorithms.grpo import start_groups
from ral_gym.agents.features import CodeFeatures
from ral_gym.agents.regularizers import MLEShare, PriorKLReward
from ral_gym.envs.toy_classes import toy_classes_sequences
from ral_gym.errors import ConfigError
from ral_gym.presets import SMOKE
from ral_gym.priors.base import maximum_likelihood_loss
from tests.label_models import ALGORITHMS, FIRST, ID, E, K, T, make_model, make_prior


def test_cached_steps_are_full_passes_whatever_label_and_position() -> None:
    env = make_sb3_env(ID, E, seed=0, reset_mode="mixed", lockstep=False)
    cached, full = (
        PriorPolicy(env.observation_space, env.action_space, lambda _: 1e-3, prior=make_prior(), use_cache=use)
        for use in (True, False)
    )
    full.load_state_dict(cached.state_dict())
    observations, labels = env.reset(), set()
    for network in (cached.double(), full.double()):
        network.prior.double()
    for step in range(50):
        labels |= set(observations[:, -1].tolist())
        results = []
        for network in (cached, full):
            torch.manual_seed(step)
            with torch.no_grad():
                results.append(network(torch.as_tensor(observations)))
        assert torch.equal(results[0][0], results[1][0])
        for one, other in zip(results[0][1:], results[1][1:], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        observations = env.step(results[0][0].numpy())[0]
    assert labels == {10, 11, 12} and cached.cache.hits > 300


@pytest.mark.parametrize("reset_mode", ["full", "mixed", "continue"])
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_the_ratio_is_one_before_the_first_step_and_the_weights_move(algo: str, reset_mode: str) -> None:
    model = make_model(algo, reset_mode)
    before = model.policy.prior.cls_embedding.embedding_table.weight.clone()
    seen = []
    train = model.train

    def look() -> None:
        for batch in model.rollout_buffer.get():
            with torch.no_grad():
                log_prob = model.policy.evaluate_actions(batch.observations, batch.actions)[1]
            seen.append(float((log_prob - batch.old_log_prob).abs().max()))
        train()

    model.train = look
    model.learn(E * T)
    assert seen[0] < 1e-5
    moved = (model.policy.prior.cls_embedding.embedding_table.weight - before).abs().amax(1)  # (4,)
    assert moved[:3].max() > 0
    # Nothing is drawn for "no class"; TRPO's conjugate gradients start from random numbers of size 1e-4.
    assert moved[3] < 1e-3 if algo == "trpo" else moved[3] == 0


def test_trpo_has_second_derivatives_through_fused_attention() -> None:
    model = make_model("trpo", prior=make_prior(attention="fused"))
    start = model.policy.prior.tok_embeddings.weight.clone()
    model.learn(E * T)
    assert not torch.equal(start, model.policy.prior.tok_embeddings.weight)
    assert model.logger.name_to_value["train/is_line_search_success"] == 1


@pytest.mark.parametrize("algo", ["reinforce", "grpo"])
def test_a_round_at_once_is_a_round_step_by_step(algo: str) -> None:
    results = []
    for fast_path in (True, False):
        model = make_model(algo, "mixed", fast_path=fast_path)
        model.learn(3 * E * T)
        results.append([*model.policy.parameters(), torch.as_tensor(model.rollout_buffer.codes)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert model.rollout_buffer.codes.shape[1] == T + 1 and not model.rollout_buffer.mask[:, -1].any()


def test_unfinished_episodes_come_back_with_their_labels() -> None:
    model = make_model("ppo", "mixed", lockstep=False, n_steps=20, batch_size=48)
    model.learn(3 * E * 20)
    buffer = model.rollout_buffer
    buffer.reset()
    state = buffer.state_dict()
    assert len(state["grids"]) and state["grids"][:, -1].min() >= FIRST
    again = make_model("ppo", "mixed", lockstep=False, n_steps=20, batch_size=48).rollout_buffer
    again.load_state_dict(state)
    assert (again.state_dict()["grids"] == state["grids"]).all()
    state["grids"][0, -1] = FIRST + 3
    with pytest.raises(ValueError):
        again.load_state_dict(state)


def test_a_saved_model_draws_the_same_codes(tmp_path: Path) -> None:
    model = make_model("ppo")
    model.learn(E * T)
    model.save(tmp_path / "model")
    again = PPO.load(tmp_path / "model", env=make_sb3_env(ID, E, seed=0), device="cpu")
    observations = make_sb3_env(ID, E, seed=5).reset()
    for _ in range(2):
        assert (
            model.predict(observations, deterministic=True)[0] == again.predict(observations, deterministic=True)[0]
        ).all()
    again.learn(E * T)


def test_a_prior_of_other_classes_is_refused() -> None:
    for classes, found in [(0, "no"), (4, "4")]:
        with pytest.raises(ConfigError, match=f"the prior knows {found} classes, but the environment has 3"):
            make_model("ppo", prior=make_prior(classes=classes))
    with pytest.raises(ConfigError, match="the prior knows 3 classes, but the environment has none"):
        Reinforce(PriorPolicy, make_sb3_env("ral_gym/Toy-v0", 2), policy_kwargs={"prior": make_prior()})


def test_code_features_find_the_position_and_see_the_label() -> None:
    env = make_sb3_env(ID, 4, seed=0)
    model = make_model("dqn", n_envs=4)
    features = model.policy.q_net.features_extractor
    assert isinstance(features, CodeFeatures) and features.not_drawn == K and features.n_codes == T
    observations = torch.as_tensor(env.reset())
    observations[:, :3] = 1
    observations[:, -1] = FIRST
    other = observations.clone()
    other[:, -1] = FIRST + 1
    assert not torch.equal(features(observations), features(other))
    found: list[Tensor] = []
    features.position.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    features(observations)
    assert found[0].tolist() == [3] * 4
    model.learn(200)


# Groups ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset_mode", ["full", "scratch", "mixed"])
def test_rows_of_a_group_share_their_label(reset_mode: str) -> None:
    model, labels = make_model("grpo", reset_mode, group_size=3), set()
    for _ in range(6):
        model.learn(E, reset_num_timesteps=False)
        buffer = model.rollout_buffer
        found = buffer.codes[np.argsort(buffer.episode_envs), -1].reshape(-1, 3)
        assert (found == found[:, :1]).all()
        assert np.bincount(start_groups(buffer)).min() >= 3
        assert model.logger.name_to_value["train/advantage_std"] > 0.5
        labels |= set(found[:, 0].tolist())
    assert labels == {10, 11, 12}


def test_groups_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"group_size=5 does not divide 12 environments into .* that start alike"):
        make_model("grpo", group_size=5)
    ral = replace(SMOKE.ral, algo="grpo", reset_mode="full", n_envs=9, grpo=replace(SMOKE.ral.grpo, group_size=2))
    check_stage(ral, [make_prior(classes=0)])
    with pytest.raises(ConfigError, match=r"ral.grpo.group_size is 2, but ral.n_envs is 9: give a multiple"):
        check_stage(ral, [make_prior()])


def test_rows_may_ask_for_labels_of_their_own() -> None:
    model = make_model("grpo", group_size=6)
    model.env.set_options([{"label": row % 3} for row in range(E)])
    model.learn(E)
    labels = model.rollout_buffer.codes[np.argsort(model.rollout_buffer.episode_envs), -1]
    assert (labels - FIRST).tolist() == [0, 1, 2] * 4


# Regularisers ------------------------------------------------------------------------------------------------------


def test_maximum_likelihood_reads_the_label_and_does_not_predict_it() -> None:
    prior, sequences = make_prior().eval(), torch.as_tensor(toy_classes_sequences().astype(np.int64))
    log_probs = prior(sequences).log_softmax(-1).gather(2, sequences[:, :-1, None])
    torch.testing.assert_close(maximum_likelihood_loss(prior, sequences), -log_probs.mean())
    wrong = sequences.clone()
    wrong[:, -1] = FIRST + (wrong[:, -1] - FIRST + 1) % 3
    assert maximum_likelihood_loss(prior, wrong) != maximum_likelihood_loss(prior, sequences)
    for algo, callback in [("reinforce", None), ("ppo", MLEShare(0.5, n_images=24))]:
        own = {"mle_coef": 20.0, "learning_rate": 1e-2} if algo == "reinforce" else {"learning_rate": 1e-2}
        model = make_model(algo, **own)
        start = maximum_likelihood_loss(model.policy.prior, sequences).item()
        model.learn(8 * E * T, callback)
        assert maximum_likelihood_loss(model.policy.prior, sequences).item() < start - 0.1


def test_the_divergence_from_the_start_is_zero_at_the_start_and_given_the_label() -> None:
    model = make_model("ppo", learning_rate=0.0)
    model.learn(E * T, PriorKLReward(0.1), log_interval=9)
    assert 0 < abs(model.logger.name_to_value["rollout/kl_to_prior"]) < 1e-6
    model = make_model("ppo", learning_rate=0.0)
    model.learn(E * T, PriorKLReward(0.1, make_prior(seed=1)), log_interval=9)
    assert abs(model.logger.name_to_value["rollout/kl_to_prior"]) > 0.01
