"""The run folder: everything a run makes, written atomically, read without unpickling.

::

    runs/NAME/
      config.json                 the settings; another configuration is refused
      vqvae.safetensors           stage 1
      codes.safetensors           the images as codes, int16
      prior.safetensors           stage 2: the weights of the best held-out NLL
      prior_ema.safetensors       their exponential average
      prior_continued.safetensors the control: maximum likelihood continued for as many updates as RAL
      policy.safetensors          stage 3: the live policy
      policy_ema.safetensors      its exponential average
      critic.safetensors          stage 3: the critic
      checkpoints/STAGE.safetensors   optimizers, random states, step: where a stage continues
      metrics.jsonl               one line per logged step, all stages
      tensorboard/                the same curves, and sample grids
      samples/*.png               pictures
      results.json                the table

Weights are safetensors with the constructor's arguments as metadata; state that is not a tensor is JSON.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ral_gym.config import Config
from ral_gym.errors import RunError
from ral_gym.storage import (
    cannot_write,
    load_json,
    load_tensors,
    pack_state,
    save_json,
    save_tensors,
    unpack_state,
    write_text,
)


def random_state() -> dict[str, Any]:
    """The state of every global source of randomness."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` took; CUDA states only where the same number of devices is there."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


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

    Raises:
        RunError: the folder holds another configuration, or cannot be written.
    """

    def __init__(self, path: Path | str, config: Config) -> None:
        self.path = Path(path)
        self.config = config
        file = self.path / "config.json"
        if not file.exists():
            if self.path.is_dir() and any(self.path.iterdir()):
                raise RunError(f"{self.path} is not empty and not a run folder; choose another --name")
            write_text(file, config.to_json())
            return
        there = load_json(file)
        differences = _differences(there, json.loads(config.to_json()))
        if differences:
            raise RunError(
                f"{self.path} was made with another configuration ({'; '.join(differences[:3])}"
                f"{'; ...' if len(differences) > 3 else ''}); choose another --name, or remove the folder"
            )

    def file(self, name: str) -> Path:
        """Path of `name` inside the folder."""
        return self.path / name

    def has(self, name: str) -> bool:
        """Whether the file exists: files are complete once they exist."""
        return self.file(name).is_file()

    def save_checkpoint(self, stage: str, state: dict[str, Any]) -> None:
        """Write the state a stage continues from, together with every global random state."""
        tensors, rest = pack_state({**state, "random": random_state()})
        save_tensors(self.file(f"checkpoints/{stage}.safetensors"), tensors, {"state": rest})

    def load_checkpoint(self, stage: str, restore_random: bool = True) -> dict[str, Any] | None:
        """The state to continue `stage` from, or None; restores the global random states on the way."""
        path = self.file(f"checkpoints/{stage}.safetensors")
        if not path.exists():
            return None
        tensors, metadata = load_tensors(path)
        if "state" not in metadata:
            raise RunError(f"{path} is no checkpoint; remove it to start the stage again")
        state = unpack_state(tensors, metadata["state"])
        if restore_random:
            set_random_state(state["random"])
        return state

    def log(self, stage: str, step: int, figures: dict[str, float]) -> None:
        """Append one line to ``metrics.jsonl``."""
        line = json.dumps({"stage": stage, "step": step, **figures})
        try:
            with self.file("metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise cannot_write(self.file("metrics.jsonl"), error) from error

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """The logged lines of one stage."""
        path = self.file("metrics.jsonl")
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [record for record in map(_parse_line, lines) if record.get("stage") == stage]

    def forget_after(self, stage: str, step: int) -> None:
        """Drop lines of `stage` logged after its checkpoint, so that a continued run logs each step once."""
        path = self.file("metrics.jsonl")
        if not path.exists():
            return
        records = [_parse_line(line) for line in path.read_text(encoding="utf-8").splitlines()]
        kept = [r for r in records if r and not (r["stage"] == stage and r["step"] > step)]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        write_text(path, text)

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Add to the time a stage has taken, over all the sittings."""
        times = self.seconds()
        times[stage] = round(times.get(stage, 0.0) + seconds, 1)
        save_json(self.file("seconds.json"), times)

    def seconds(self) -> dict[str, float]:
        """Seconds per stage."""
        return load_json(self.file("seconds.json")) if self.has("seconds.json") else {}


def _parse_line(line: str) -> dict[str, Any]:
    """One line of metrics.jsonl; a line cut short by a crash is {}."""
    try:
        return json.loads(line)
    except ValueError:
        return {}


def _differences(there: Any, here: Any, name: str = "") -> list[str]:
    """``field: value there, value here`` for every setting that differs."""
    if isinstance(there, dict) and isinstance(here, dict):
        found: list[str] = []
        for key in sorted(there.keys() | here.keys()):
            found += _differences(there.get(key), here.get(key), f"{name}.{key}" if name else key)
        return found
    return [] if there == here else [f"{name}: {there} there, {here} here"]


def read_config(path: Path | str) -> Config:
    """The configuration of an existing run folder.

    Raises:
        RunError: no run folder, or written by another version.
    """
    file = Path(path) / "config.json"
    try:
        return Config.from_dict(load_json(file))
    except (KeyError, TypeError) as error:
        raise RunError(f"{file} does not fit this version of ral_gym ({error}); train again in another folder") from error
