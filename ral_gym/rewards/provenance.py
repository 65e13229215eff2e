"""Which files of others a run's rewards come from: their sizes and digests, in the run's rewards.json.

The networks of `clip` and `hps` and the statistics of `ral.reward_reference` are not copied into the run. A run that
goes on with other files than it began with would have two rewards, so it is refused; the files may move.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

from ral_gym.config import Config
from ral_gym.config.stages import REWARD_FILES
from ral_gym.errors import ConfigError, RunError
from ral_gym.rewards.clip_files import FOLDER, PREPROCESSING
from ral_gym.runs.run import Run
from ral_gym.runs.storage import load_json, save_json

FILE = "rewards.json"


def file_digests(config: Config) -> dict[str, dict[str, Any]]:
    """Setting -> name of a file in the folder, or "the file" -> its `bytes` and `sha256`, of all that `ral` names.

    Raises:
        ConfigError: a file is missing or cannot be read.
    """
    found = {}
    for setting in REWARD_FILES:
        value = getattr(config.ral, setting)
        if value is not None:
            path = Path(value)
            folder = [name for name in (*FOLDER, PREPROCESSING) if name in FOLDER or (path / name).exists()]
            files = {name: path / name for name in folder} if path.is_dir() else {"the file": path}
            found[setting] = {name: _facts(f"ral.{setting}", file) for name, file in files.items()}
    return found


def check_reward_files(run: Run) -> None:
    """Refuse other files than those that stage 3 of the run began with.

    Raises:
        ConfigError: a file is missing or cannot be read.
        RunError: names the first that differs, or rewards.json is damaged.
    """
    if not run.has(FILE):
        return
    there, here = load_json(run.file(FILE)), file_digests(run.config)
    if not isinstance(there, dict):
        raise RunError(f"{run.file(FILE)} is damaged; remove it to begin stage 3 with the files given now")
    for setting in REWARD_FILES:
        before, now = there.get(setting), here.get(setting)
        if before != now:
            name = _first(before, now)
            raise RunError(
                f"{run.path} was rewarded with another file as ral.{setting} ({name} is not that of {FILE}): give "
                "the one it began with, or choose another --name"
            )


def keep_reward_files(run: Run) -> None:
    """`check_reward_files`, and write rewards.json at the first start of stage 3, if there are such files.

    Raises:
        ConfigError: see there.
        RunError: see there.
    """
    check_reward_files(run)
    if not run.has(FILE) and (found := file_digests(run.config)):
        save_json(run.file(FILE), found)


def _first(before: Any, now: Any) -> str:
    """The first file that is not the same."""
    before, now = (value if isinstance(value, dict) else {} for value in (before, now))
    return next(
        (name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)), "the setting"
    )


def _facts(setting: str, path: Path) -> dict[str, Any]:
    try:
        found = path.stat()
        return {"bytes": found.st_size, "sha256": _digest(str(path.absolute()), found.st_size, found.st_mtime_ns)}
    except OSError as error:
        raise ConfigError(f"{setting}: {path} cannot be read ({error.strerror or error})") from error


@functools.lru_cache(maxsize=32)
def _digest(path: str, size: int, modified: int) -> str:
    """SHA-256, once per process and version of the file: gigabytes take seconds."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
