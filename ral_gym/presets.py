"""Named configurations: the paper's tables, other projects' tokenizers, small ones for a CPU, and your own.

Your own are registered, in a module or in a file.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ral_gym.config import SECTIONS, Config
from ral_gym.config.modern import LLAMAGEN_B, LLAMAGEN_GRPO, LLAMAGEN_L, LLAMAGEN_L_384, LLAMAGEN_XL_384
from ral_gym.config.modern import VQ_8_RUN as VQ_8
from ral_gym.config.modern import VQ_16_RUN as VQ_16
from ral_gym.config.modern import VQGAN_F16_RUN as VQGAN_F16
from ral_gym.config.paper import (
    CELEBA64,
    CELEBA64_ORACLE,
    CELEBA128,
    CELEBA128_16X16,
    CELEBA256,
    CELEBAHQ512,
    LSUN64_8X8,
    LSUN64_16X16,
    LSUN128,
    LSUN128_16X16,
)
from ral_gym.config.small import (
    DEMO,
    DEMO_2LEVEL,
    DEMO_ATTENTION,
    DEMO_CELEBA,
    DEMO_CIFAR10,
    DEMO_CLASSES,
    DEMO_CONVERGED,
    DEMO_PATCHGAN,
    SMOKE,
)
from ral_gym.errors import ConfigError
from ral_gym.registry import PRESETS, is_path
from ral_gym.schema import config_from, shown

__all__ = [
    "CELEBA64",
    "CELEBA64_ORACLE",
    "CELEBA128",
    "CELEBA128_16X16",
    "CELEBA256",
    "CELEBAHQ512",
    "DEMO",
    "DEMO_2LEVEL",
    "DEMO_ATTENTION",
    "DEMO_CELEBA",
    "DEMO_CIFAR10",
    "DEMO_CLASSES",
    "DEMO_CONVERGED",
    "DEMO_PATCHGAN",
    "LLAMAGEN_B",
    "LLAMAGEN_GRPO",
    "LLAMAGEN_L",
    "LLAMAGEN_L_384",
    "LLAMAGEN_XL_384",
    "LSUN64_8X8",
    "LSUN64_16X16",
    "LSUN128",
    "LSUN128_16X16",
    "SMOKE",
    "VQGAN_F16",
    "VQ_8",
    "VQ_16",
    "get_preset",
    "read_preset",
]

MOST_BYTES = 2**20
"""Largest size of a JSON file with settings."""


def get_preset(name: str) -> Config:
    """The settings called `name`; their `preset` field is its last part.

    Args:
        name: a registered preset, ``module:NAME`` of a `Config` in a module, or a ``.json`` file (see `read_preset`).

    Raises:
        ConfigError: there is no such preset, or it may not be imported or cannot be read.
    """
    if name.lower().endswith(".json"):
        return read_preset(Path(name))
    if name not in PRESETS and not is_path(name):
        near = difflib.get_close_matches(name, list(PRESETS), n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        known = ", ".join(PRESETS)
        raise ConfigError(
            f"preset {name!r} is unknown{meant}: choose one of {known}, or give module:NAME or a .json file"
        )
    config = PRESETS.get(name)
    if not isinstance(config, Config):
        raise ConfigError(f"preset {name!r} is a {type(config).__name__}: give a ral_gym.config.Config")
    return replace(config, preset=name.rpartition(":")[2])


def read_preset(path: Path) -> Config:
    """Settings from a JSON file: all of them, as in a run's config.json, or some on top of a preset.

    ::

        {"base": "demo", "seed": 3, "ral": {"algo": "grpo", "grpo": {"group_size": 4}}}

    The file is treated as data: code that it names (``module:Class``) is imported only if the user names it too.

    Args:
        path: the file. `base` is the name of a preset to change; without it the file must be complete. `preset`, the
            name in logs and of the run folder, is the file's own name by default.

    Raises:
        ConfigError: no such file, not JSON, an unknown setting, or a value of another type.
    """
    values = _json(path)
    base = values.pop("base", None)
    values = {"preset": path.stem} | values
    name = values["preset"]
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
        raise ConfigError(f"{path}: preset is {shown(name)}: give a name of letters, digits, dots, - and _")
    if base is None:
        try:
            return Config.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f'{path}: {error}; or name a preset to change, such as "base": "demo"') from error
    if not isinstance(base, str) or base.lower().endswith(".json"):
        raise ConfigError(f"{path}: base is {shown(base)}: give a preset's name")
    if isinstance(values.get("ral"), dict) and "baseline" in values["ral"]:
        raise ConfigError(f"{path}: ral.baseline is ral.reinforce.baseline in this version")
    start = get_preset(base)
    config = config_from(Config, values, str(path), defaults=start)
    own = start.ral.algo
    if config.ral.algo != own and own in SECTIONS and own not in values["ral"]:  # it goes with its algorithm
        config = replace(config, ral=replace(config.ral, **{own: SECTIONS[own]()}))
    return config


def _json(path: Path) -> dict[str, Any]:
    """The names and values of a JSON file."""
    if not path.is_file():
        raise ConfigError(f"preset {path} is not a file: give a .json file, or the name of a preset")
    if path.stat().st_size > MOST_BYTES:
        raise ConfigError(f"{path} has {path.stat().st_size:,} bytes: a preset has at most {MOST_BYTES:,}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path} is not a JSON file ({shown(str(error), bare=True)})") from error
    if not isinstance(values, dict):
        raise ConfigError(f'{path} is not a preset: give names and values, such as {{"base": "demo", "seed": 3}}')
    return values
