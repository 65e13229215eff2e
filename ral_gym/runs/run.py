"""The run folder: all files of a run, written atomically, read without unpickling.

::

    runs/NAME/
      config.json                 the settings; another configuration is refused
      vqvae.safetensors           stage 1
      codes.safetensors           the codes of the images, int16
      prior.safetensors           stage 2: the weights of the best held-out NLL
      prior_ema.safetensors       their exponential average
      prior_continued.safetensors the control: maximum likelihood continued for as many updates as RAL
      prior_equal_time.safetensors the control of equal time: maximum likelihood for as long as RAL, annealed
      equal_time.json             how many updates that are, and the seconds they were computed from
      policy.safetensors          stage 3: the live policy
      policy_ema.safetensors      its exponential average
      critic.safetensors          stage 3: the critic
      checkpoints/STAGE.safetensors   optimizers, random states, step: for continuing a stage
      checkpoints/evaluation.json     rows of the table measured so far
      metrics.jsonl               one line per logged step, all stages
      trackers.json               with --track: the ids of the trackers' runs, and what was sent to them
      seconds.json                run time of each stage, over all sessions
      tensorboard/                the same curves, and sample grids
      samples/*.png               pictures
      results.json                the table

Weights are safetensors with the constructor's arguments as metadata; state that is not a tensor is JSON.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ral_gym.config import Config
from ral_gym.config.stages import REWARD_FILES, has_no_labels, limits_training_only
from ral_gym.errors import ConfigError, RunError, printable
from ral_gym.runs.foreign import is_number
from ral_gym.runs.lock import LOCK, locked
from ral_gym.runs.records import append_record, read_records
from ral_gym.runs.storage import (
    differences,
    load_json,
    load_tensors,
    pack_state,
    save_json,
    save_tensors,
    tensors_in,
    unpack_state,
    write_text,
)

RESOURCES = ("workers", "memory_budget_mb", "cache_dir", "cache_mb")
"""Settings of `data` that do not change the result: a run may continue with other values."""
WEIGHTS_IN_CHECKPOINTS = ("model", "policy", "average", "optimizer", "critic", "best")
"""The parts of a checkpoint that must be finite."""


def random_state() -> dict[str, Any]:
    """The state of every global source of randomness; of CUDA's generators that of the current device."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the result of `random_state`; a CUDA state only if there is a device now and there was one then."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0])


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Run:
    """One run folder.

    Args:
        path: the folder; made if it does not exist.
        config: the settings. They must equal those the folder was made with.

    Attributes:
        listeners: called with stage, step and metrics of every logged line.

    Raises:
        ConfigError: a setting is out of range.
        RunError: the folder holds another configuration or something else, or cannot be written.
    """

    def __init__(self, path: Path | str, config: Config) -> None:
        config.check()
        self.path = Path(path)
        self.config = config
        self.listeners: list[Callable[[str, int, dict[str, float]], None]] = []
        file = self.path / "config.json"
        try:
            contents = [found.name for found in _visible(self.path) if found != file]
            there = file.is_file()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RunError(f"{self.path} cannot be read ({reason}); choose another --name or --runs") from error
        if not there:
            if contents or self.path.is_file():
                has = f"has no config.json, but {', '.join(sorted(contents)[:3])}" if contents else "is a file"
                raise RunError(f"{self.path} is not a run folder: it {has}; choose another --name")
        elif contents:  # else nothing has been made with the old settings yet, so they may be replaced
            if config.data.test_limit is None and limits_training_only(load_json(file)):
                self.config = replace(config, data=replace(config.data, test_limit=0))  # it continues as it began
            if has_no_labels(load_json(file)):
                self.config = replace(self.config, data=replace(self.config.data, labels="none"))
            self._check_same(file)
            return
        write_text(file, config.to_json())

    def _check_same(self, file: Path) -> None:
        """Refuse to continue with other settings than those the folder was made with."""
        there = load_json(file)
        if not isinstance(there, dict) or "preset" not in there:
            raise RunError(f"{self.path} is not a run folder (its config.json is not ral_gym's); choose another --name")
        found = differences(_what(_filled(there)), self._what())
        if found:
            more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
            raise RunError(
                f"{self.path} was made with another configuration ({'; '.join(found[:3])}{more}); choose another "
                "--name, or remove the folder"
            )

    def _what(self) -> dict[str, Any]:
        """The configuration as JSON values, without settings that do not change the result."""
        return _what(json.loads(self.config.to_json()))

    def locked(self) -> AbstractContextManager[None]:
        """Lock this folder against other processes; the system releases a killed process's lock.

        Raises:
            RunError: another process has the lock.
        """
        return locked(self.path)

    def file(self, name: str) -> Path:
        """Path of `name` inside the folder."""
        return self.path / name

    def has(self, name: str) -> bool:
        """Whether the file exists: files are complete once they exist."""
        return self.file(name).is_file()

    def save_checkpoint(self, stage: str, state: dict[str, Any]) -> None:
        """Write the state a stage continues from, together with every global random state."""
        tensors, rest = pack_state({**state, "random": random_state()})
        metadata = {"stage": stage, "config": self._what(), "state": rest}
        save_tensors(self.file(f"checkpoints/{stage}.safetensors"), tensors, metadata)

    def load_checkpoint(self, stage: str, restore_random: bool = True) -> dict[str, Any] | None:
        """The state from which `stage` continues, or None; also restores the global random states.

        Raises:
            RunError: the file is damaged, or another stage's or another run's checkpoint.
        """
        path = self.file(f"checkpoints/{stage}.safetensors")
        if not path.exists():
            return None
        tensors, metadata = load_tensors(path)
        if metadata.get("stage") != stage or "state" not in metadata:
            raise RunError(f"{path} is not a checkpoint of stage {stage}; remove it to start the stage again")
        found = differences(_what(_filled(metadata.get("config"))), self._what())
        if found:
            raise RunError(
                f"{path} is a checkpoint of another configuration ({'; '.join(found[:3])}); remove it to start the "
                "stage again"
            )
        with self.restoring(stage):
            state = unpack_state(tensors, metadata["state"])
            if restore_random:
                set_random_state(state["random"])
        for name, tensor in tensors_in(state, WEIGHTS_IN_CHECKPOINTS):
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise RunError(
                    f"{path}: tensor {name} has NaN or infinite numbers; remove the file to start the stage again"
                )
        return state

    @contextmanager
    def restoring(self, stage: str) -> Iterator[None]:
        """Context for restoring a checkpoint's state: an error there means that the file does not fit.

        Raises:
            RunError: names the file that does not fit.
        """
        try:
            yield
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            path = self.file(f"checkpoints/{stage}.safetensors")
            reason = printable((str(error).splitlines() or [""])[-1].strip() or type(error).__name__, 300)
            raise RunError(
                f"{path} is not a checkpoint from which stage {stage} can continue ({reason}); remove it to start the "
                "stage again"
            ) from error

    def log(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Append one line to ``metrics.jsonl``, and tell the `listeners`."""
        append_record(self.file("metrics.jsonl"), {"stage": stage, "step": step, **metrics})
        for listener in tuple(self.listeners):
            listener(stage, step, metrics)

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """The logged lines of one stage."""
        return [record for record in read_records(self.file("metrics.jsonl")) if record["stage"] == stage]

    def forget_after(self, stage: str, step: int) -> None:
        """Drop lines of `stage` logged after its checkpoint, so that a continued run logs each step once."""
        if not self.has("metrics.jsonl"):
            return
        kept = [
            record
            for record in read_records(self.file("metrics.jsonl"))
            if record["stage"] != stage or record["step"] <= step
        ]
        write_text(self.file("metrics.jsonl"), "".join(json.dumps(record) + "\n" for record in kept))

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Add to the run time of a stage, over all sessions."""
        times = self.seconds()
        times[stage] = round(times.get(stage, 0.0) + seconds, 1)
        save_json(self.file("seconds.json"), times)

    def seconds(self) -> dict[str, float]:
        """Seconds per stage.

        Raises:
            RunError: the file is damaged.
        """
        path = self.file("seconds.json")
        times = load_json(path) if path.exists() else {}
        if not isinstance(times, dict) or not all(is_number(value) and 0 <= value < 1e12 for value in times.values()):
            raise RunError(f"{path} does not hold the seconds of each stage; remove it")
        return times


def _what(config: Any) -> Any:
    """A configuration without the preset's name and the settings that do not change the result."""
    if not isinstance(config, dict):
        return config
    left = {}
    for section, names in (("data", RESOURCES), ("ral", REWARD_FILES)):  # of these files rewards.json has the digests
        values = config.get(section)
        left[section] = {n: v for n, v in values.items() if n not in names} if isinstance(values, dict) else values
    return {name: value for name, value in config.items() if name != "preset"} | left


def _filled(config: Any) -> Any:
    """A configuration with defaults for settings that older versions did not write; anything else unchanged."""
    try:
        given = {"preset": "", **config} if isinstance(config, dict) else config  # a checkpoint does not name it
        return json.loads(Config.from_dict(given).to_json())
    except ConfigError:
        return config


def _visible(path: Path) -> list[Path]:
    """A folder's contents, without hidden files (such as a killed process's temporary ones) and empty folders."""
    found = [item for item in path.iterdir() if not item.name.startswith(".")] if path.is_dir() else []
    return [item for item in found if not item.is_dir() or any(item.iterdir())]


def discard_start(path: Path, also: Collection[str] = ()) -> None:
    """After a failed start, remove a run folder that holds nothing but its settings.

    Args:
        path: the folder.
        also: names of other files that this start may have put there; a folder with any other file stays.
    """
    held = list(path.iterdir()) if path.is_dir() and not path.is_symlink() else []
    if held and {item.name for item in held} <= {"config.json", LOCK, *also}:
        with contextlib.suppress(OSError):
            for item in held:
                item.unlink()
            path.rmdir()


def read_config(path: Path | str) -> Config:
    """The configuration of an existing run folder.

    Raises:
        RunError: not a run folder, a setting that is unknown or out of range, or written by another version.
    """
    file = Path(path) / "config.json"
    try:
        config = Config.from_dict(load_json(file))
        config.check()
    except ConfigError as error:
        raise RunError(f"{file} does not fit this version of ral_gym ({error}); train in another folder") from error
    return config
