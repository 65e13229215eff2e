"""REINFORCE whose critic's rewards are summed over all codes: what a run's causal critic pays, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ral_gym.agents import PriorPolicy, Reinforce, make_sb3_env
from ral_gym.agents.train_ral import Stage, make_stage
from ral_gym.commands.cli import main
from ral_gym.errors import ConfigError
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.runs.run import Run, read_config
from ral_gym.stages.levels import load_generator, load_vqvae
from ral_gym.tokenizers.code_set import CodeSet
from tests.class_runs import make_class_run
from tests.tiny import make_tiny_run

CPU = torch.device("cpu")
RUNS = {"one level": make_tiny_run, "two levels": lambda path: make_tiny_run(path, levels=2), "classes": make_class_run}


def stage_of(path: Path, kind: str = "causal", **ral: Any) -> Stage:
    """Stage 3 of a tiny run, before its first step."""
    config = read_config(path)
    settings = {"algo": "reinforce", "reset_mode": "mixed", "n_envs": 12, "n_updates": 3} | ral
    reinforce = dataclasses.replace(config.ral.reinforce, all_actions=True)
    config = dataclasses.replace(
        config,
        critic=dataclasses.replace(config.critic, kind=kind, warmup_steps=5, learning_rate=1e-2),
        ral=dataclasses.replace(config.ral, reinforce=reinforce, **settings),
    )
    run = Run.__new__(Run)  # config.json is the tiny run's
    run.path, run.config, run.listeners = path, config, []
    vqvae: Any = load_vqvae(run, CPU)
    prior: Any = load_generator(run, "prior", CPU)
    return make_stage(run, vqvae, prior, CodeSet.load(path / "codes.safetensors", vqvae.grid), CPU, progress=False)


def collected(stage: Stage) -> Any:
    """The algorithm after a rollout whose rewards are written."""
    model: Any = stage.model
    _, callback = model._setup_learn(1, stage.callbacks)
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model


@pytest.mark.parametrize("normalization", ["none", "max_abs", "standard"])
@pytest.mark.parametrize("weights", [{"critic": 1.0}, {"critic": 0.5, "kid": 1.0}], ids=lambda found: " ".join(found))
@pytest.mark.parametrize("name", RUNS)
def test_what_is_summed_is_what_the_drawn_code_was_paid(
    tmp_path: Path, name: str, weights: dict[str, float], normalization: Any
) -> None:
    """But for a constant, and for what the whole image was paid at its end."""
    stage = stage_of(RUNS[name](tmp_path / "run"), reward_weights=weights, reward_normalization=normalization)
    model = collected(stage)
    buffer = model.rollout_buffer
    paid, rewards = model.paid, np.zeros(buffer.mask.shape, np.float32)
    rewards[buffer.mask] = buffer.rewards
    before_the_last = buffer.mask & (np.arange(paid.shape[1]) < buffer.stop[:, None] - 1)
    if name == "two levels":  # the reward of a whole image ends both of them
        before_the_last[:, 15] = False
    assert before_the_last.sum() > 20 and paid[before_the_last].std() > 1e-3
    np.testing.assert_allclose(rewards[before_the_last], paid[before_the_last], atol=1e-5)
    assert not paid[~buffer.mask].any()
    codes = torch.from_numpy(buffer.codes.astype(np.int64))
    summed = model.action_rewards(codes).gather(2, codes.clamp(max=15)[..., None]).squeeze(2).numpy()
    constant = (paid - summed)[buffer.mask]
    np.testing.assert_allclose(constant, constant[0], atol=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_the_loss_has_the_expectation_over_all_codes(tmp_path: Path, name: str) -> None:
    """Its gradient to the logits of a position, by hand: pi (f - E f) over the scale."""
    stage = stage_of(RUNS[name](tmp_path / "run"), reward_weights={"critic": 1.0})
    model = collected(stage)
    model.advantages()
    buffer = model.rollout_buffer
    rows = np.arange(len(buffer.lengths))
    episodes = buffer.episodes(rows)
    log_probs = torch.randn(len(buffer.returns), 16).log_softmax(1).requires_grad_()
    model._expected_loss(rows, episodes, log_probs).sum().backward()
    codes = torch.from_numpy(buffer.codes.astype(np.int64))
    rewards = model.action_rewards(codes)[torch.from_numpy(np.argwhere(buffer.mask)).unbind(1)]  # (N, K)
    torch.testing.assert_close(log_probs.grad, -log_probs.detach().exp() * rewards / float(model._scale))
    assert float(model._scale) != 1.0


def test_a_saved_model_leaves_the_critic_behind(tmp_path: Path) -> None:
    model = collected(stage_of(make_tiny_run(tmp_path / "run"), reward_weights={"critic": 1.0}))
    model.save(tmp_path / "model.zip")
    loaded = Reinforce.load(tmp_path / "model.zip", device="cpu")
    assert loaded.all_actions and loaded.action_rewards is None and model.action_rewards is not None
    assert loaded.paid is None and model.paid is not None
    assert (tmp_path / "model.zip").stat().st_size < 2**20


@pytest.mark.commands
def test_a_run_trains_with_it(smoke_options: list[str], tmp_path: Path) -> None:
    flags = [*smoke_options, "--critic.kind", "causal", "--stages", "vqvae", "prior", "ral", "--runs", str(tmp_path)]
    for name, more in (("sampled", []), ("summed", ["--ral.reinforce.all-actions"])):
        assert main(["train", *flags, *more, "--name", name]) == 0
    sampled, summed = ((tmp_path / name / "policy.safetensors").read_bytes() for name in ("sampled", "summed"))
    assert sampled != summed


def test_it_is_refused_where_no_critic_scores_all_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, found in (
        (["--preset", "demo-patchgan"], "critic.kind is patch"),
        (["--preset", "demo", "--ral.reward-weights", "loo_fd", "1"], r"ral.reward_weights has none (loo_fd)"),
    ):
        assert main(["train", *flags, "--ral.reinforce.all-actions", "--runs", str(tmp_path / "runs")]) == 2
        error = capsys.readouterr().err
        assert found in error and "give critic.kind causal" in error
    assert not (tmp_path / "runs").exists()
    env = make_sb3_env("ral_gym/Toy-v0", 4, seed=0, reset_mode="full", lockstep=True)
    model = Reinforce(PriorPolicy, env, all_actions=True, policy_kwargs={"prior": PixelCNN(8, 4, 4, hidden_units=4)})
    with pytest.raises(ConfigError, match=r"such as that of critic\.kind causal: give its callback to learn"):
        model.learn(4 * 16)
    stage = stage_of(make_tiny_run(tmp_path / "tiny"), kind="patch", reward="intermediate")
    with pytest.raises(ConfigError, match="PatchCritic has no all_codes"):
        stage.model.learn(10**4, stage.callbacks)
