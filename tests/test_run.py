"""The run folder: which ones are refused, and what a checkpoint and the log give back."""

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ral_gym.config import Config
from ral_gym.errors import ConfigError, RunError
from ral_gym.presets import SMOKE, get_preset
from ral_gym.runs.run import Run, read_config, seed_everything
from ral_gym.runs.storage import load_tensors, save_tensors


def changed(**values: object) -> Config:
    return dataclasses.replace(SMOKE, **values)


def message_of(path: Path, config: Config = SMOKE) -> str:
    with pytest.raises(RunError) as caught:
        Run(path, config)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run folder in which something has been made."""
    run = Run(tmp_path / "run", SMOKE)
    run.log("vqvae", 10, {"loss": 1.0})
    return run


# The folder ---------------------------------------------------------------------------------------------------------


def test_a_new_folder_holds_its_configuration(tmp_path) -> None:
    run = Run(tmp_path / "a" / "b", SMOKE)
    assert read_config(run.path) == SMOKE == Run(run.path, SMOKE).config
    assert read_config(Run(tmp_path / "c", get_preset("celeba64")).path) == get_preset("celeba64")


def test_another_configuration_is_refused_and_the_fields_named(run) -> None:
    other = changed(seed=3, vqvae=dataclasses.replace(SMOKE.vqvae, beta=0.5))
    message = message_of(run.path, other)
    assert "seed: 0 there, 3 here" in message and "vqvae.beta: 0.25 there, 0.5 here" in message
    assert "choose another --name" in message
    assert read_config(run.path) == SMOKE
    many = message_of(run.path, get_preset("demo"))
    assert many.count(" there, ") == 3 and " more); choose another --name" in many


def test_settings_may_change_until_something_has_been_made(tmp_path) -> None:
    # Otherwise a mistyped --data, refused a moment later, would block the corrected command.
    Run(tmp_path / "run", changed(seed=1))
    (tmp_path / "run" / "samples").mkdir()
    (tmp_path / "run" / ".config.json.1.tmp").write_text("left by a killed process")
    assert read_config(Run(tmp_path / "run", SMOKE).path) == SMOKE


def test_a_run_may_continue_with_other_resources(run) -> None:
    run.save_checkpoint("prior", {"step": 3})
    data = dataclasses.replace(SMOKE.data, workers=7, memory_budget_mb=1, cache_dir="/elsewhere")
    state = Run(run.path, changed(data=data)).load_checkpoint("prior")
    assert state is not None and state["step"] == 3
    message_of(run.path, changed(data=dataclasses.replace(SMOKE.data, limit=7)))


def test_what_is_no_run_folder_is_refused_and_left_alone(tmp_path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_bytes(b"1")
    assert "it has no config.json, but me.jpg" in message_of(tmp_path / "photos")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["me.jpg"]
    (tmp_path / "file").write_text("text")
    assert "it is a file" in message_of(tmp_path / "file")
    (tmp_path / "photos" / "config.json").write_text('{"theme": "dark"}')
    assert "its config.json is not ral_gym's" in message_of(tmp_path / "photos")
    (tmp_path / "photos" / "config.json").write_text("{")
    assert "config.json cannot be read" in message_of(tmp_path / "photos")


def test_a_wrong_setting_is_refused_before_anything_is_written(tmp_path) -> None:
    with pytest.raises(ConfigError, match="seed is -1"):
        Run(tmp_path / "run", changed(seed=-1))
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_of_another_version_is_named(tmp_path) -> None:
    with pytest.raises(RunError, match=r"config\.json is missing"):
        read_config(tmp_path)
    values = dataclasses.asdict(SMOKE)
    for broken in ({}, [], {**values, "ral": {"colour": 1}}, {**values, "evaluation": 3}):
        (tmp_path / "config.json").write_text(json.dumps(broken))
        with pytest.raises(RunError, match=r"config\.json does not fit this version of ral_gym"):
            read_config(tmp_path)


# Checkpoints --------------------------------------------------------------------------------------------------------


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def test_a_checkpoint_brings_back_the_state_and_all_randomness(run) -> None:
    seed_everything(5)
    draws()
    run.save_checkpoint("prior", {"step": 7, "weights": {"a": torch.arange(3)}})
    expected = draws()
    seed_everything(6)
    state = run.load_checkpoint("prior")
    assert state["step"] == 7 and torch.equal(state["weights"]["a"], torch.arange(3))
    assert draws() == expected
    seed_everything(6)
    expected = draws()
    seed_everything(6)
    run.load_checkpoint("prior", restore_random=False)
    assert draws() == expected


def test_seeds_differ_and_repeat() -> None:
    seed_everything(1)
    one = draws()
    seed_everything(2)
    assert not set(one) & set(draws())
    seed_everything(1)
    assert draws() == one


def test_no_checkpoint_is_none_and_damaged_or_foreign_ones_are_refused(run, tmp_path) -> None:
    assert run.load_checkpoint("prior") is None
    path = run.file("checkpoints/prior.safetensors")
    run.save_checkpoint("prior", {"step": 1})
    whole = path.read_bytes()

    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match=r"prior\.safetensors is damaged .*; remove it"):
        run.load_checkpoint("prior")
    run.file("checkpoints/vqvae.safetensors").write_bytes(whole)
    with pytest.raises(RunError, match=r"is not a checkpoint of stage vqvae; remove it"):
        run.load_checkpoint("vqvae")
    save_tensors(path, {"a": torch.ones(1)}, {"class": "PatchCritic"})
    with pytest.raises(RunError, match=r"is not a checkpoint of stage prior"):
        run.load_checkpoint("prior")
    Run(tmp_path / "other", changed(seed=1)).file("checkpoints").mkdir()
    (tmp_path / "other" / "checkpoints" / "prior.safetensors").write_bytes(whole)
    with pytest.raises(RunError, match=r"of another configuration \(seed: 0 there, 1 here\); remove it"):
        Run(tmp_path / "other", changed(seed=1)).load_checkpoint("prior")


def test_a_checkpoint_from_before_a_setting_existed_goes_on(run) -> None:
    """Its configuration lacks the setting; the default stands for what was done then."""
    run.save_checkpoint("prior", {"step": 1})
    path = run.file("checkpoints/prior.safetensors")
    tensors, metadata = load_tensors(path)
    for section, name in (("ral", "prompt"), ("ral", "reward_options"), ("prior", "held_out")):
        del metadata["config"][section][name]
    save_tensors(path, tensors, metadata)
    assert run.load_checkpoint("prior")["step"] == 1
    other = changed(ral=dataclasses.replace(SMOKE.ral, prompt="a cat"))
    (run.path / "config.json").write_text(other.to_json())
    with pytest.raises(RunError, match=r"ral\.prompt: a photo of a \{name\} there, a cat here"):
        Run(run.path, other).load_checkpoint("prior")


# The log ------------------------------------------------------------------------------------------------------------


def test_the_log_gives_back_each_stage_in_order(run) -> None:
    run.log("prior", 5, {"nll": 2.0})
    run.log("vqvae", 20, {"loss": float("nan")})
    assert [record["step"] for record in run.metrics("vqvae")] == [10, 20]
    assert run.metrics("prior") == [{"stage": "prior", "step": 5, "nll": 2.0}]
    assert run.metrics("ral") == []


@pytest.mark.parametrize("damage", [b'{"stage": "vqvae", "st', b"\xff\xfe\x00", b"3\n", b'{"a": 1}\n', b"null\n\n"])
def test_a_damaged_end_of_the_log_is_left_out_and_mended(run, damage) -> None:
    path = run.file("metrics.jsonl")
    path.write_bytes(path.read_bytes() + damage)
    assert [record["step"] for record in run.metrics("vqvae")] == [10]
    run.forget_after("vqvae", 10)
    run.log("vqvae", 20, {"loss": 0.5})
    assert [record["step"] for record in run.metrics("vqvae")] == [10, 20]
    assert len(path.read_text().splitlines()) == 2


def test_a_continued_stage_logs_no_step_twice(run) -> None:
    run.log("vqvae", 20, {"loss": 0.5})
    run.log("prior", 30, {"nll": 1.0})
    run.forget_after("vqvae", 15)
    assert [record["step"] for record in run.metrics("vqvae")] == [10]
    assert [record["step"] for record in run.metrics("prior")] == [30]
    Run(run.path.parent / "new", SMOKE).forget_after("vqvae", 0)  # no log yet


def test_a_log_that_cannot_be_written_is_named(tmp_path) -> None:
    run = Run(tmp_path / "run", SMOKE)
    run.file("metrics.jsonl").mkdir()
    with pytest.raises(RunError, match=r"cannot write .*metrics\.jsonl: Is a directory"):
        run.log("vqvae", 1, {})


def test_seconds_add_up_over_sittings(run) -> None:
    assert run.seconds() == {}
    run.add_seconds("vqvae", 1.25)
    run.add_seconds("prior", 2.0)
    Run(run.path, SMOKE).add_seconds("vqvae", 3.0)
    assert run.seconds() == {"vqvae": pytest.approx(4.25, abs=0.051), "prior": 2.0}


def test_two_processes_cannot_train_in_one_folder(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", SMOKE)
    command = (
        f"from ral_gym.runs.run import Run, read_config; p = {str(run.path)!r}; lock = Run(p, read_config(p)).locked()"
    )
    other = [sys.executable, "-c", f"{command}; lock.__enter__(); print('in')"]
    with run.locked():
        result = subprocess.run(other, capture_output=True, text=True, timeout=60)
        assert "another process is at work in" in result.stderr and "in" not in result.stdout.split()
    assert subprocess.run(other, capture_output=True, text=True, timeout=60).stdout.split() == ["in"]
    with run.locked():  # the other one has let go of it by ending
        pass
