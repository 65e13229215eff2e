"""An experiment's folder belongs to one set of settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ral_gym.errors import RunError
from ral_gym.runs.storage import differences, load_json, save_json


def keep_settings(folder: Path, settings: dict[str, Any]) -> Path:
    """Write the settings into a new folder, or check that those of an old one are the same.

    Args:
        folder: the experiment's.
        settings: JSON-able, lists instead of tuples.

    Returns:
        the folder.

    Raises:
        RunError: it was made with other settings.
    """
    file = folder / "settings.json"
    if not file.exists():
        save_json(file, settings)
    if found := differences(load_json(file), settings):
        raise RunError(
            f"{folder} was made with other settings ({'; '.join(found)}): remove it, or choose another --name"
        )
    return folder
