"""`ral-gym runs`: the runs of a folder; and what is known of a run without loading any of its weights."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ral_gym.commands.look_arguments import RunsArguments
from ral_gym.commands.stage_files import files_of
from ral_gym.config import Config
from ral_gym.errors import ConfigError, RunError, printable

LARGEST_JSON = 64 * 2**20
"""Bytes; no config.json or results.json is as large."""
STAGES = {"vqvae": "tokenizer", "prior": "prior", "ral": "RAL"}


@dataclass(frozen=True)
class RunFacts:
    """A run as its folder tells it.

    Attributes:
        path: the folder.
        config: its settings; None: another version's.
        stage: the last finished stage: `-`, `tokenizer`, `prior`, `RAL` or `measured`.
        changed: when one of its files was last written, in seconds of `time.time`.
        size: bytes of all files.
        fd: FD of the averaged RAL policy, or None.
        fd_before: FD of the prior before it, or None.
        seed: the seed.
        preset: the preset's name.
    """

    path: Path
    config: Config | None
    stage: str
    changed: float
    size: int
    fd: float | None
    fd_before: float | None
    seed: int | None
    preset: str


def find_runs(folder: str | Path) -> list[RunFacts]:
    """The runs directly inside a folder, the newest first; () if there is no such folder."""
    try:
        inside = [path for path in Path(folder).iterdir() if (path / "config.json").is_file()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise RunError(f"{folder} cannot be read ({error.strerror or error}): give another folder") from error
    return sorted(map(read_facts, inside), key=lambda facts: (-facts.changed, facts.path.name))


def read_facts(path: Path) -> RunFacts:
    """What the files of a run folder say; what is damaged counts as missing."""
    files = [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
    states = [file.stat() for file in files]
    config = read_settings(path)
    stage = "-"
    for name, words in STAGES.items() if config is not None else ():
        assert config is not None
        if all((path / file).is_file() for file in files_of(name, config)):
            stage = words
    rows = _dict(_dict(_json(path / "results.json")).get("rows"))
    stage = "measured" if rows and stage == "RAL" else stage
    return RunFacts(
        path,
        config,
        stage,
        max((state.st_mtime for state in states), default=0.0),
        sum(state.st_size for state in states),
        _number(_dict(rows.get("ral")).get("fd")),
        _number(_dict(rows.get("mle")).get("fd")),
        None if config is None else config.seed,
        "?" if config is None else config.preset,
    )


def read_settings(path: Path) -> Config | None:
    """A run's settings, or None if they are not this version's; code that they name is not imported."""
    try:
        return Config.from_dict(_dict(_json(path / "config.json")))
    except (ConfigError, KeyError, TypeError, ValueError):
        return None


def list_runs(arguments: RunsArguments, console: Console) -> list[RunFacts]:
    """Print one row per run.

    Raises:
        RunError: there are none.
    """
    found = find_runs(arguments.folder)
    if not found:
        raise RunError(
            f"{arguments.folder} holds no runs: give the folder that holds them, or begin one with ral-gym demo"
        )
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("run", overflow="fold")
    table.add_column("preset", overflow="fold")
    table.add_column("algorithm", overflow="fold")
    table.add_column("done")
    for heading in ("age", "size", "FD before", "FD"):
        table.add_column(heading, justify="right", no_wrap=True)
    for facts in found:
        algo = "?" if facts.config is None else facts.config.ral.algo.rpartition(":")[2]
        figures = [_figure(facts.fd_before), _figure(facts.fd)]
        row = [facts.path.name, facts.preset, algo, facts.stage, age(facts.changed), _size(facts.size), *figures]
        table.add_row(*map(printable, row))
    console.print(table)
    console.print(
        "done: the last finished stage; FD: of RAL's averaged policy, lower is better; before: of the prior it began "
        "from. FDs of different presets or extractors do not compare.",
        highlight=False,
        markup=False,
    )
    return found


def age(changed: float) -> str:
    """How long ago: 40 s, 5 min, 3 h, 12 d."""
    seconds = max(0.0, time.time() - changed)
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length or (unit == "min" and seconds >= length):
            return f"{int(seconds // length)} {unit}"
    return f"{int(seconds)} s"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes()) if path.stat().st_size <= LARGEST_JSON else None
    except (OSError, ValueError, RecursionError):
        return None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None
