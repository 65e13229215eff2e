"""The transformer as a run's prior: from the command line, under every algorithm, and with which settings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ral_gym.agents import ALGORITHMS, algorithm_defaults, make_sb3_env, policy_for
from ral_gym.commands.cli import main
from ral_gym.config import Config
from ral_gym.errors import ConfigError
from ral_gym.grid import CodeGrid
from ral_gym.presets import SMOKE
from ral_gym.priors.kv_cache import KVCache
from ral_gym.priors.transformer import Transformer
from ral_gym.runs.run import Run, read_config
from ral_gym.stages.levels import check_prior_settings, load_generator, prior_of

E = 8
GRID = CodeGrid(4, 4, 16)


def config(**settings: Any) -> Config:
    prior = {"kind": "transformer", "attention_heads": 2, **settings}
    return dataclasses.replace(SMOKE, prior=dataclasses.replace(SMOKE.prior, **prior))


# ------------------------------------------------------------------------------------------- settings


def test_settings_and_options_reach_the_network() -> None:
    settings = {"hidden_units": 24, "layers": 3, "attention_heads": 3, "dropout": 0.25}
    options = {"multiple_of": 16, "attention": "fused"}
    prior = prior_of(config(**settings, options=options), GRID)
    assert type(prior) is Transformer and prior.grid == GRID
    assert {**settings, **options}.items() <= prior.config.items()
    assert prior.config["classes"] == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"attention_heads": 8}, "hidden_units=16 does not fit attention_heads=8: give a multiple of 32"),
        ({"residual_units": 32}, "prior.residual_units is 32, but transformer takes no residual_units"),
        ({"conv_filter_size": 7}, "prior.conv_filter_size is 7, but transformer"),
        ({"output_stack_layers": 2}, "prior.output_stack_layers is 2, but transformer"),
        ({"attention_layers": 1}, "prior.attention_layers is 1, but transformer"),
        ({"position_embedding": True}, "prior.position_embedding is True, but transformer"),
        ({"options": {"layers": 3}}, "prior.options names layers, which is a setting: give prior.layers"),
        ({"options": {"height": 3}}, "prior.options names height, which the run fills in"),
        ({"options": {"heads": 3}}, "transformer takes no heads: choose among attention, multiple_of"),
        ({"options": {"attention": "flash"}}, "attention='flash' is unknown: choose math or fused"),
    ],
)
def test_what_it_does_not_take_is_refused_in_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        check_prior_settings(config(**settings))
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------- algorithms


def make_model(algo: str, dropout: float) -> Any:
    torch.manual_seed(0)
    prior = Transformer(8, 4, 4, hidden_units=16, layers=2, attention_heads=2, multiple_of=8, dropout=dropout)
    torch.nn.init.normal_(prior.output.weight, std=0.3)  # zeros would give the same ratio whatever stands before
    env = make_sb3_env("ral_gym/Toy-v0", E, seed=0)
    arguments = algorithm_defaults(algo, env, prior=prior) | {"seed": 0, "device": "cpu"}
    return ALGORITHMS[algo](policy_for(algo), env, **arguments)


@pytest.mark.parametrize("algo", ["reinforce", "grpo", "ppo", "a2c", "trpo", "maskable_ppo"])
def test_every_algorithm_trains_it_with_ratio_1_on_the_first_pass(algo: str) -> None:
    model = make_model(algo, dropout=0.2)
    before = {name: weight.detach().clone() for name, weight in model.policy.prior.named_parameters()}
    differences: list[float] = []
    train = model.train

    def look() -> None:
        model.policy.set_training_mode(True)
        for sample in model.rollout_buffer.get(None):
            _, log_prob, _ = model.policy.evaluate_actions(sample.observations, sample.actions)
            differences.append(float((log_prob - sample.old_log_prob).detach().abs().max()))
        train()

    model.train = look
    model.learn(2 * E * 16)
    assert len(differences) >= 2 and max(differences) < 1e-5
    moved = {name for name, weight in model.policy.prior.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == before.keys() and type(model.policy.prior) is Transformer


# --------------------------------------------------------------------------------------- command line


@pytest.mark.commands
def test_all_stages_and_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--preset", "smoke", "--quiet", "--runs", str(tmp_path), "--name", "r", "--prior.kind", "transformer"]
    flags += ["--prior.attention-heads", "2", "--prior.options", "multiple_of", "8", "--vqvae.training-steps", "4"]
    flags += ["--prior.training-steps", "4", "--ral.n-updates", "1", "--critic.warmup-steps", "1"]
    flags += ["--evaluation.n-samples", "12"]
    assert main(["train", "--dry-run", *flags]) == 0 and "Transformer" in capsys.readouterr().out
    assert main(["train", *flags]) == 0
    run = tmp_path / "r"
    assert {"mle", "ral"} <= json.loads((run / "results.json").read_text())["rows"].keys()
    for name in ("prior", "policy_ema"):
        prior = load_generator(Run(run, read_config(run)), name)
        assert type(prior) is Transformer and isinstance(prior.pack().make_cache(1), KVCache)
        assert (prior.config["hidden_units"], prior.config["multiple_of"]) == (SMOKE.prior.hidden_units, 8)
    assert main(["sample", str(run), "--n", "4"]) == 0
    assert main(["verify", str(run)]) == 0
