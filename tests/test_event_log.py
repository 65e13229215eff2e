"""TensorBoard: one log of a run, every stage's curves whole for standard readers, each step once also when resumed."""

import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ral_gym.agents.train_ral import train_ral
from ral_gym.config import Config
from ral_gym.errors import RunError
from ral_gym.presets import SMOKE
from ral_gym.runs.event_log import events_of, open_event_log
from ral_gym.runs.run import Run, read_config
from ral_gym.stages.levels import load_generator, load_vqvae
from ral_gym.tokenizers.code_set import CodeSet
from tests.kills import Killed
from tests.tiny import make_tiny_run

CPU = torch.device("cpu")


def steps_of(folder: Path) -> dict[str, list[int]]:
    """What TensorBoard's own reader keeps."""
    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    reader.Reload()
    found = {tag: [event.step for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
    return found | {tag: [event.step for event in reader.Images(tag)] for tag in reader.Tags()["images"]}


def test_a_later_stage_hides_no_earlier_one(smoke_run) -> None:
    shown, logged = steps_of(smoke_run), Counter()
    for line in (smoke_run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["stage"] != "ral":
            logged.update(f"{record['stage']}/{name}" for name in record if name not in ("stage", "step"))
    assert len(logged) >= 8 and {tag: len(shown[tag]) for tag in logged} == dict(logged)
    assert shown["vqvae/real_and_reconstruction"] and shown["prior/samples"]


def write(folder: Path, stage: str, start: int, steps: range) -> None:
    with open_event_log(folder, stage, start) as writer:
        for step in steps:
            writer.add_scalar(f"{stage}/loss", float(step), step)


def test_what_was_logged_after_the_checkpoint_is_logged_once(tmp_path) -> None:
    write(tmp_path, "vqvae", 0, range(1, 11))
    write(tmp_path, "prior", 0, range(1, 8))  # killed at 7, its checkpoint is of step 4
    write(tmp_path, "prior_bottom", 0, range(1, 4))
    write(tmp_path, "prior", 4, range(5, 11))
    write(tmp_path, "prior", 10, range(0))
    expected = {"vqvae/loss": [*range(1, 11)], "prior/loss": [*range(1, 11)], "prior_bottom/loss": [1, 2, 3]}
    assert steps_of(tmp_path) == expected
    assert Counter(events_of(tmp_path)) == Counter((tag, step) for tag, steps in expected.items() for step in steps)
    write(tmp_path, "prior", 0, range(1, 3))  # from scratch
    assert steps_of(tmp_path) == expected | {"prior/loss": [1, 2]}


@pytest.mark.parametrize("cut", [1, 7, 20])
def test_a_log_that_was_cut_short_goes_on_with_what_is_whole(tmp_path, cut) -> None:
    write(tmp_path, "prior", 0, range(1, 8))
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:-cut])
    write(tmp_path, "prior", 6, range(7, 9))
    assert steps_of(tmp_path) == {"prior/loss": [*range(1, 9)]}


def test_an_event_file_that_is_none_is_named(tmp_path) -> None:
    (tmp_path / "tensorboard").mkdir()
    os.mkfifo(tmp_path / "tensorboard" / "events.out.tfevents.1.host.1.0.prior")
    with pytest.raises(RunError, match="is not a regular file"):
        open_event_log(tmp_path, "prior", 0)


@pytest.mark.parametrize("settings", [{"reward_weights": {"loo_fd": 1.0}}, {"algo": "ppo"}], ids=["loo_fd", "ppo"])
def test_stage_3_shows_every_step_once_after_a_kill(tmp_path, monkeypatch, settings) -> None:
    """Also what an update logs, which SB3 writes with the next rollout's numbers, and the sample grids.

    SB3's own algorithms log things that they hide from TensorBoard.
    """
    monkeypatch.setattr("ral_gym.agents.train_ral.SAMPLE_EVERY", 2)
    ral = replace(SMOKE.ral, n_updates=6, checkpoint_every=2, **settings)

    def prepared(name: str) -> tuple[Run, Config]:
        path = make_tiny_run(tmp_path / name)
        config = replace(read_config(path), ral=ral)
        (path / "config.json").write_text(config.to_json())
        return Run(path, config), config

    def train(run: Run) -> None:
        codes = CodeSet.load(run.file("codes.safetensors"))
        train_ral(run, load_vqvae(run), load_generator(run, "prior"), codes, CPU, progress=False)

    whole, _ = prepared("whole")
    train(whole)
    killed, _ = prepared("killed")
    log = Run.log

    def kill(run: Run, stage: str, step: int, figures: dict[str, float]) -> None:
        log(run, stage, step, figures)
        if step == 5:
            raise Killed

    monkeypatch.setattr(Run, "log", kill)
    with pytest.raises(Killed):
        train(killed)
    monkeypatch.setattr(Run, "log", log)
    shutil.rmtree(killed.path / "samples", ignore_errors=True)
    train(killed)
    once = steps_of(whole.path)
    assert {"samples/ral", "train/loss"} <= set(once) and len(once["samples/ral"]) == 2
    assert steps_of(killed.path) == once
    assert [sorted(record) for record in killed.metrics("ral")] == [sorted(record) for record in whole.metrics("ral")]
