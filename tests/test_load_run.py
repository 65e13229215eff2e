"""`load_run`: a run folder gives back everything stage 3 consists of, and never unpickles."""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ral_gym.agents import load_run
from ral_gym.agents.train_ral import Stage, train_ral
from ral_gym.errors import RunError
from ral_gym.presets import SMOKE
from ral_gym.runs.run import Run, random_state, read_config
from ral_gym.runs.storage import load_tensors, save_json
from ral_gym.stages.levels import load_generator, load_vqvae
from ral_gym.tokenizers.code_set import CodeSet
from tests.tiny import make_tiny_run

CPU = torch.device("cpu")


def stage_2(path: Path, levels: int, **ral: object) -> Run:
    """A run of tiny, untrained models with stages 1 and 2."""
    make_tiny_run(path, levels=levels)
    config = replace(read_config(path), ral=replace(SMOKE.ral, n_envs=4, checkpoint_every=2, **ral))
    (path / "critic.safetensors").unlink()
    (path / "config.json").write_text(config.to_json())
    return Run(path, config)


def train(run: Run) -> None:
    vqvae, prior = load_vqvae(run), load_generator(run, "prior")
    train_ral(run, vqvae, prior, CodeSet.load(run.file("codes.safetensors")), CPU, progress=False)


def weights(stage: Stage) -> dict[str, torch.Tensor]:
    found = {f"policy.{k}": v for k, v in stage.model.policy.state_dict().items()}
    found |= {f"critic.{k}": v for k, v in stage.critic.critic.state_dict().items()}
    for name, optimizer in (("policy", stage.model.policy.optimizer), ("critic", stage.critic.optimizer)):
        for key, state in optimizer.state_dict()["state"].items():
            found |= {f"{name}.adam.{key}.{k}": torch.as_tensor(v) for k, v in state.items()}
    assert stage.run_callback.average is not None
    return found | {f"average.{k}": v for k, v in stage.run_callback.average.weights.items()}


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("algo", ["reinforce", "ppo"])
def test_a_run_loaded_in_the_middle_goes_on_as_if_it_had_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, levels: int, algo: str
) -> None:
    run = stage_2(tmp_path / "run", levels, algo=algo, reset_mode="mixed", n_updates=4)
    monkeypatch.setattr(pickle, "loads", None)
    monkeypatch.setattr(pickle, "load", None)
    from ral_gym.agents.callbacks import RunCallback

    save = RunCallback.save

    def keep(self: RunCallback) -> None:
        save(self)
        if self.updates == 2:
            shutil.copytree(run.path, tmp_path / "half")

    monkeypatch.setattr(RunCallback, "save", keep)
    train(run)
    half, whole = load_run(tmp_path / "half"), load_run(run.path, restore_random=False)
    assert half.run_callback.updates == 2 and whole.run_callback.updates == 4
    half = load_run(tmp_path / "half")  # its random state, too
    half.model.learn(2**62, callback=half.callbacks, reset_num_timesteps=False)
    assert half.run_callback.updates == 4 and half.model.num_timesteps == whole.model.num_timesteps
    expected, found = weights(whole), weights(half)
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert torch.equal(weight, found[name]), name
    final, _ = load_tensors(run.file("policy.safetensors"))
    for name, weight in final.items():
        assert torch.equal(weight, expected[f"policy.prior.{name}"])


def test_the_random_state_comes_back_where_wanted(tmp_path: Path) -> None:
    run = stage_2(tmp_path / "run", 1, n_updates=2)
    train(run)
    np.random.seed(7)
    before = random_state()["numpy"]["state"]["key"].copy()
    load_run(run.path, restore_random=False)
    assert (random_state()["numpy"]["state"]["key"] == before).all()
    load_run(run.path)
    assert (random_state()["numpy"]["state"]["key"] != before).any()


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    run = stage_2(tmp_path / "run", 1, n_updates=2)
    train(run)
    stage = load_run(run.path)
    before = {name: weight.clone() for name, weight in weights(stage).items()}
    stage.model.learn(2**62, callback=stage.callbacks, reset_num_timesteps=False)
    for name, weight in weights(stage).items():
        assert torch.equal(weight, before[name])


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"config.json is missing: not a run folder"):
        load_run(tmp_path)
    run = stage_2(tmp_path / "run", 1)
    with pytest.raises(RunError, match=r"has no checkpoint of stage 3 .*: train it first"):
        load_run(run.path)
    save_json(tmp_path / "odd" / "config.json", {"preset": "smoke"})
    with pytest.raises(RunError, match="does not fit this version of ral_gym"):
        load_run(tmp_path / "odd")
