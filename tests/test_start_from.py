"""`ral-gym train --start-from RUN`: another stage 3 from the same prior."""

from pathlib import Path

import pytest
import torch

from ral_gym.commands.arguments import parse_train
from ral_gym.commands.cli import main, train_main
from ral_gym.presets import DEMO
from ral_gym.runs.run import read_config
from ral_gym.runs.storage import load_tensors


def test_a_run_starts_from_anothers_prior(smoke_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--start-from", str(smoke_run), "--runs", str(tmp_path), "--name", "other", "--quiet"]
    assert train_main([*flags, "--ral.n-updates", "2", "--stages", "ral"]) == 0
    other = tmp_path / "other"
    config = read_config(other)
    assert config.ral.n_updates == 2 and config.prior == read_config(smoke_run).prior
    assert (other / "prior.safetensors").read_bytes() == (smoke_run / "prior.safetensors").read_bytes()
    ours, theirs = (load_tensors(run / "policy.safetensors")[0] for run in (other, smoke_run))
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_preset_beside_it_gives_stage_3(smoke_run: Path, tmp_path: Path) -> None:
    flags = ["--start-from", str(smoke_run), "--preset", "demo", "--runs", str(tmp_path), "--name", "x", "--seed", "0"]
    config, theirs = parse_train(flags).config, read_config(smoke_run)
    assert (config.critic, config.ral) == (DEMO.critic, DEMO.ral)
    assert (config.prior, config.vqvae, config.data, config.preset) == (
        *(theirs.prior, theirs.vqvae, theirs.data),
        theirs.preset,
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--name", "x", "--preset", "nothing"], "preset 'nothing' is unknown"),
        ([], "name it with --name"),
        (["--name", "x", "--prior.layers", "3"], r"prior.layers: 2 there, 3 here"),
        (["--name", "x", "--seed", "5"], "seed: 0 there, 5 here"),
    ],
)
def test_what_cannot_be_is_said(
    smoke_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert main(["train", "--start-from", str(smoke_run), "--runs", str(tmp_path / "runs"), *flags]) != 0
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "runs").exists()


def test_no_run_folder_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--start-from", str(tmp_path / "none"), "--name", "x", "--runs", str(tmp_path)]) != 0
    assert "none" in capsys.readouterr().err
