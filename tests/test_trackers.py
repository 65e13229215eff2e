"""Experiment trackers get what metrics.jsonl gets, once; they cannot stop or change the training. No network."""

import importlib.util
import itertools
import json
import random
import socket
import sqlite3
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ral_gym.agents.train_ral import train_ral
from ral_gym.commands.cli import main
from ral_gym.errors import RunError
from ral_gym.presets import SMOKE
from ral_gym.runs import trackers
from ral_gym.runs.run import Run, read_config
from ral_gym.runs.storage import load_json, load_tensors, save_json
from ral_gym.runs.trackers import FILE, INSTALL, tracked
from ral_gym.stages.levels import load_generator, load_vqvae
from ral_gym.tokenizers.code_set import CodeSet
from tests.tiny import make_tiny_run

Lines = list[tuple[str, int, float]]
"""Name, step and value of everything a tracker has, in its order."""


def records_in(data: bytes) -> Iterator[bytes]:
    """The records of wandb's file: 7 bytes, then LevelDB's log format, blocks of 32 KiB."""
    place, whole = 7, b""
    while place < len(data):
        if 2**15 - place % 2**15 < 7:  # no room for a header
            place += 2**15 - place % 2**15
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""


def read_wandb(folder: Path) -> tuple[Lines, set[str]]:
    """What the offline files of all sessions have, and the ids of their runs."""
    from wandb.proto import wandb_internal_pb2

    lines, ids = [], set()
    for path in sorted(folder.glob("session*/wandb/offline-run-*/run-*.wandb")):
        ids.add(path.stem.removeprefix("run-"))
        for data in records_in(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            values = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            stages = {name.partition("/")[0] for name in values if name.endswith("/step")}
            for stage in stages:
                step = json.loads(values[f"{stage}/step"])
                lines += [
                    (k, step, json.loads(v)) for k, v in values.items() if k.startswith(stage) and "/step" not in k
                ]
    return lines, ids


def read_trackio(folder: Path) -> tuple[Lines, set[str]]:
    lines, ids = [], set()
    (path,) = (folder / "trackio").glob("*.db")
    with sqlite3.connect(path) as database:
        for name, step, metrics in database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id"):
            ids.add(name)
            lines += [(key, step, value) for key, value in json.loads(metrics).items() if "/" in key]
    database.close()
    return lines, ids


def read_mlflow(folder: Path) -> tuple[Lines, set[str]]:
    import mlflow

    client, lines, ids = mlflow.MlflowClient(), [], set()
    (experiment,) = client.search_experiments(filter_string="name = 'ral_gym'")
    for found in client.search_runs([experiment.experiment_id]):
        ids.add(found.info.run_id)
        for key in found.data.metrics:
            lines += [(key, one.step, one.value) for one in client.get_metric_history(found.info.run_id, key)]
    return lines, ids


READ: dict[str, Callable[[Path], tuple[Lines, set[str]]]] = {
    "wandb": read_wandb,
    "trackio": read_trackio,
    "mlflow": read_mlflow,
}


@pytest.fixture(params=INSTALL)
def name(request: Any, offline: Path) -> str:
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed; make installs wandb and trackio")
    return str(request.param)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder, in which trackers keep everything; no connection leaves this computer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("WANDB_PROJECT", "TRACKIO_PROJECT", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    make, sessions = trackers._make, itertools.count()

    def apart(*arguments: Any) -> Any:  # wandb's folders are named by the second, and these sessions are shorter
        folder = tmp_path / f"session{next(sessions)}"
        folder.mkdir()
        made = make(*arguments)
        made.init_kwargs |= {"dir": str(folder)} if made.name == "wandb" else {}
        return made

    monkeypatch.setattr(trackers, "_make", apart)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    if "trackio.utils" in sys.modules:  # it has read the variable
        monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio")
        for module in [m for n, m in sys.modules.items() if n.startswith("trackio.") and hasattr(m, "TRACKIO_DIR")]:
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    connect = socket.socket.connect

    def only_here(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost"), address
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_here)
    yield tmp_path
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # else the next test has this one's folder


def log(run: Run, stage: str, *steps: int) -> None:
    for step in steps:
        run.log(stage, step, {"loss": step / 8, "a/b": -step})


def expected(stage: str, *steps: int) -> Lines:
    return [(f"{stage}/{key}", step, value) for step in steps for key, value in (("loss", step / 8), ("a/b", -step))]


def test_a_run_goes_on_in_the_same_run_and_no_step_is_sent_twice(name, offline) -> None:
    config = replace(SMOKE, data=replace(SMOKE.data, source=f"folder:{offline}/private photos"))
    run = Run(offline / "runs" / "mine", config)
    log(run, "vqvae", 10)  # before there was a tracker
    with tracked(run, [name, name]):
        log(run, "vqvae", 20, 30)
        log(run, "prior", 10, 20)  # steps begin again
    run.forget_after("prior", 10)
    log(run, "prior", 20, 30)  # a session without it, from a checkpoint
    with pytest.raises(KeyboardInterrupt), tracked(run, [name]):
        log(run, "prior", 40)
        raise KeyboardInterrupt
    run.forget_after("prior", 20)
    with tracked(Run(run.path, config), [name]):
        pass
    run = Run(run.path, config)
    with tracked(run, [name]):
        log(run, "prior", 30, 40, 50)
        log(run, "ral", 0)
    lines, ids = READ[name](offline)
    wanted = expected("vqvae", 10, 20, 30) + expected("prior", 10, 20, 30, 40, 50) + expected("ral", 0)
    assert sorted(lines) == sorted(wanted)
    assert len(ids) == 1 and load_json(run.file(FILE))[name]["id"] in ids and run.listeners == []
    kept = b"".join(path.read_bytes() for path in offline.rglob("*") if path.is_file() and "runs" not in path.parts)
    assert b"reward_normalization" in kept, "the settings are its hyperparameters"
    assert b"folder:private photos" in kept and b"/private photos" not in kept


def test_after_a_kill_what_was_logged_counts_as_sent(name, offline) -> None:
    run = Run(offline / "runs" / "mine", SMOKE)
    with tracked(run, [name]):
        log(run, "vqvae", 10, 20)
        killed = load_json(run.file(FILE))
    save_json(run.file(FILE), killed)
    assert killed[name]["open"] and killed[name]["sent"] == {}
    with tracked(run, [name]):
        log(run, "vqvae", 20, 30)
    assert sorted(READ[name](offline)[0]) == sorted(expected("vqvae", 10, 20, 30))


def test_training_is_the_same_to_the_bit_and_every_figure_arrives(offline) -> None:
    weights = []
    for number, names in enumerate(((), ("trackio",))):
        folder = make_tiny_run(offline / f"run{number}")
        (folder / "critic.safetensors").unlink()
        config = replace(read_config(folder), ral=replace(SMOKE.ral, n_envs=4, n_updates=3))
        (folder / "config.json").write_text(config.to_json())
        run = Run(folder, config)
        vqvae, prior = load_vqvae(run), load_generator(run, "prior")
        with tracked(run, names):
            codes = CodeSet.load(run.file("codes.safetensors"))
            train_ral(run, vqvae, prior, codes, torch.device("cpu"), progress=False)
        weights.append(load_tensors(folder / "policy.safetensors")[0])
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    lines, _ = read_trackio(offline)
    records = run.metrics("ral")
    assert len(records) > 1
    wanted = [(f"ral/{k}", one["step"], v) for one in records for k, v in one.items() if k not in ("stage", "step")]
    assert sorted(lines) == sorted(wanted)


class Fake:
    """A tracker that fails, draws random numbers and prints."""

    def __init__(self, fails_at: int = 10**9, starts: bool = True) -> None:
        self.fails_at, self.starts, self.logged, self.init_kwargs = fails_at, starts, 0, {"name": "fake"}

    def start(self) -> None:
        if not self.starts:
            raise OSError("no account\nmore")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        assert all(value is None or isinstance(value, bool | int | float | str) for value in values.values())

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.logged += 1
        random.random()
        np.random.rand()
        print("noise")
        if self.logged >= self.fails_at:
            raise ConnectionError("the server is gone\nfor ever")

    def finish(self) -> None:
        raise ValueError("not even that")


def test_a_tracker_that_fails_is_left_out_after_one_warning(tmp_path, monkeypatch, caplog, capsys) -> None:
    made = {"trackio": Fake(fails_at=2), "wandb": Fake()}
    made["wandb"].tracker = type("Run", (), {"define_metric": lambda *arguments, **given: None})  # type: ignore[attr-defined]
    made["wandb"].init_kwargs = {"id": "fake"}  # type: ignore[dict-item]
    monkeypatch.setattr(trackers, "_make", lambda run, name, run_id: made[name])
    run = Run(tmp_path / "run", SMOKE)
    states = random.getstate(), np.random.get_state(legacy=False)
    with tracked(run, ["trackio", "wandb"]):
        log(run, "vqvae", 10, 20, 30, 40)
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings[0] == "trackio failed (the server is gone): this session goes on without it"
    assert len(warnings) == 2 and warnings[1].startswith("wandb failed (not even that)")  # as it ended
    assert (made["trackio"].logged, made["wandb"].logged) == (2, 4) and len(run.metrics("vqvae")) == 4
    assert load_json(run.file(FILE))["trackio"] == {"id": "fake", "open": False, "sent": {"vqvae": 10}}
    assert capsys.readouterr().out == ""
    np.testing.assert_equal((random.getstate(), np.random.get_state(legacy=False)), states)
    with tracked(run, ["trackio"]):  # later it has what it missed
        pass
    assert made["trackio"].logged == 3


def error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_tracker_that_is_missing_or_does_not_start_leaves_no_folder(tmp_path, monkeypatch, capsys) -> None:
    argv = ["train", "--preset", "smoke", "--quiet", "--runs", str(tmp_path / "runs"), "--track"]
    monkeypatch.chdir(tmp_path)
    for name, package in INSTALL.items():
        (tmp_path / name).mkdir()  # where it would keep files: not the package
        monkeypatch.syspath_prepend(str(tmp_path))
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            assert error(capsys, *argv, name).endswith(
                f"--track {name} needs {name}, not installed: pip install {package}"
            )
    monkeypatch.setattr(trackers, "_make", lambda run, name, run_id: Fake(starts=False))
    monkeypatch.setattr("ral_gym.runs.trackers.check_trackers", lambda names: None)
    assert "--track trackio: it does not start (no account); log in" in error(capsys, *argv, "trackio")
    assert not list((tmp_path / "runs").glob("*"))


@pytest.mark.parametrize("text", ["[]", '{"wandb": 1}', '{"wandb": {"id": "../x", "open": true, "sent": {}}}', "{"])
def test_a_damaged_file_is_named(tmp_path, text) -> None:
    run = Run(tmp_path / "run", SMOKE)
    run.file(FILE).write_text(text)
    with pytest.raises(RunError, match=r"trackers\.json .*; remove it"), tracked(run, ["wandb"]):
        pass
