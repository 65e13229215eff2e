"""Variants of stage 3 start from one base run, change nothing in it, and are made once."""

import dataclasses
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from ral_gym.agents.experiment import Experiment
from ral_gym.agents.train_ral import train_ral
from ral_gym.commands.train import base_run
from ral_gym.config import Config
from ral_gym.errors import ConfigError, RunError
from ral_gym.runs.run import Run, read_config
from ral_gym.runs.storage import load_json, save_json
from ral_gym.stages.fork import fork_run
from ral_gym.stages.levels import load_generator
from ral_gym.tokenizers.code_set import CodeSet


def tuned(run: Run, **changes: object) -> Config:
    """The run's settings with others of stage 3."""
    return dataclasses.replace(run.config, ral=dataclasses.replace(run.config.ral, **changes))  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, smoke_options: list[str]) -> Run:
    """Stages 1 and 2 of a smoke run."""
    runs = tmp_path_factory.mktemp("base")
    console = Console(file=io.StringIO())
    return base_run("smoke", 0, runs, console, quiet=True, flags=smoke_options[2:])


def test_base_run_is_the_run_that_the_training_command_continues(base: Run, smoke_options: list[str]) -> None:
    assert base.path.name == "smoke" and not base.has("policy.safetensors")
    before = contents(base.path)
    again = base_run("smoke", 0, base.path.parent, Console(file=io.StringIO()), True, smoke_options[2:])
    assert again.path == base.path and contents(base.path) == before


def test_a_fork_has_the_stages_and_trains_as_the_run_itself(base: Run, smoke_run: Path, tmp_path: Path) -> None:
    fork = fork_run(base, tmp_path / "fork", base.config)
    experiment = Experiment(fork, tmp_path / "unused", progress=False)
    train_ral(fork, experiment.vqvae, experiment.prior, experiment.codes, torch.device("cpu"), progress=False)
    assert fork.file("policy.safetensors").read_bytes() == (smoke_run / "policy.safetensors").read_bytes()


def test_variants_differ_leave_the_base_alone_and_are_trained_once(base: Run, tmp_path: Path) -> None:
    before = contents(base.path)
    experiment = Experiment(base, tmp_path, progress=False)
    plain = experiment.train("plain", tuned(base, n_updates=2))
    other = experiment.train("other", tuned(base, n_updates=2, learning_rate=1e-4))
    weights = [experiment.policy(run).state_dict() for run in (plain, other)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert contents(base.path) == before
    made = plain.file("policy.safetensors").stat().st_mtime_ns
    experiment.train("plain", tuned(base, n_updates=2))
    assert plain.file("policy.safetensors").stat().st_mtime_ns == made
    with pytest.raises(RunError, match="another configuration"):
        experiment.train("plain", tuned(base, n_updates=3))


def test_the_control_is_the_runs_own(base: Run, smoke_run: Path, tmp_path: Path) -> None:
    control = Experiment(base, tmp_path, progress=False).continue_mle("mle_continued", base.config)
    finished = load_generator(Run(smoke_run, read_config(smoke_run)), "prior_continued")
    assert all(torch.equal(a, b) for a, b in zip(control.parameters(), finished.parameters(), strict=True))


def test_rows_are_those_of_the_run_and_measured_once(base: Run, smoke_run: Path, tmp_path: Path) -> None:
    experiment = Experiment(base, tmp_path, progress=False)
    row = experiment.measure("mle", "prior", experiment.prior)
    assert row["fd"] == load_json(smoke_run / "results.json")["rows"]["mle"]["fd"]
    sharper = experiment.measure("mle", "prior", experiment.prior, 0.5)
    assert sharper["entropy"] < row["entropy"]
    file = tmp_path / "mle" / "rows.json"
    kept = load_json(file)
    kept["rows"]["prior at 1"]["fd"] = -1.0
    save_json(file, kept)
    assert experiment.measure("mle", "prior", experiment.prior)["fd"] == -1.0
    other = Experiment(
        base, tmp_path, evaluation=dataclasses.replace(base.config.evaluation, n_samples=30), progress=False
    )
    with pytest.raises(RunError, match="n_samples: 24 there, 30 here"):
        other.measure("mle", "prior", experiment.prior)


def test_own_codes_take_the_place_of_the_sources(base: Run, tmp_path: Path) -> None:
    own = CodeSet(np.zeros((20, 16), np.int16), np.zeros((4, 16), np.int16), None, 20)
    config = dataclasses.replace(base.config, prior=dataclasses.replace(base.config.prior, hidden_units=8))
    run = fork_run(base, tmp_path / "own", config, codes=own, prior=False)
    loaded = CodeSet.load(run.file("codes.safetensors"))
    assert len(loaded.train) == 20 and not loaded.train.any() and not run.has("prior.safetensors")
    with pytest.raises(ConfigError, match="prior=False"):
        fork_run(base, tmp_path / "both", base.config, codes=own)


def test_what_is_taken_over_must_fit(base: Run, tmp_path: Path) -> None:
    wider = dataclasses.replace(base.config, prior=dataclasses.replace(base.config.prior, hidden_units=8))
    with pytest.raises(ConfigError, match=r"prior\.hidden_units: 16 there, 8 here"):
        fork_run(base, tmp_path / "wider", wider)
    with pytest.raises(ConfigError, match="seed"):
        fork_run(base, tmp_path / "seed", dataclasses.replace(base.config, seed=1))
    assert not (tmp_path / "wider").exists()
    empty = Run(tmp_path / "empty", base.config)
    with pytest.raises(RunError, match="train stages vqvae and prior"):
        fork_run(empty, tmp_path / "fork", base.config)
    fork = fork_run(base, tmp_path / "fork", base.config)
    changed = Run(shutil.copytree(base.path, tmp_path / "changed"), base.config)
    changed.file("prior.safetensors").write_bytes(b"another")
    with pytest.raises(RunError, match=r"a prior\.safetensors that differs"):
        fork_run(changed, fork.path, base.config)
