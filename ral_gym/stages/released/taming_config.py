"""What taming's ``model.yaml`` says that the checkpoint does not: heads, classes, the condition."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ral_gym.errors import ConfigError, printable
from ral_gym.runs.foreign import read_bytes

MOST_BYTES = 2**20
UNCONDITIONAL = "__is_unconditional__"


@dataclass(frozen=True)
class TamingConfig:
    """The facts needed.

    Attributes:
        heads: attention heads; None: 64 units each.
        classes: N; 0: not conditional.
        start: the code that an unconditional model starts from.
    """

    heads: int | None = None
    classes: int = 0
    start: int = 0


def read_taming_config(path: Path) -> TamingConfig:
    """Read a ``model.yaml``; it is data, and nothing that it names is imported.

    Raises:
        ConfigError: not such a file, or a model that draws from something else than a class.
    """
    import yaml

    try:
        values = yaml.safe_load(read_bytes(path, MOST_BYTES, "give the model's own"))
        settings = values["model"]["params"]
        transformer = settings["transformer_config"]["params"]
    except (OSError, yaml.YAMLError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not a model.yaml of taming's transformer ({printable(_line(error), 120)}): it has "
            "model.params.transformer_config.params"
        ) from error
    permuter = settings.get("permuter_config")
    if permuter is not None and not str(_in(permuter, "target")).endswith(".Identity"):
        raise ConfigError(f"{path}: the codes are not in raster order (permuter_config): give another model")
    heads = _count(path, transformer, "n_head")
    condition = settings.get("cond_stage_config")
    if settings.get("unconditional") is True or condition == UNCONDITIONAL:
        return TamingConfig(heads, 0, _count(path, settings, "sos_token", least=0) or 0)
    if not str(_in(condition, "target")).endswith(".Labelator"):
        raise ConfigError(
            f"{path}: the model draws from {printable(_in(condition, 'target') or condition, 80)}: give a "
            "class-conditional (Labelator) or an unconditional one"
        )
    return TamingConfig(heads, _count(path, _in(condition, "params"), "n_classes") or 0)


def _in(values: Any, name: str) -> Any:
    return values.get(name) if isinstance(values, dict) else None


def _count(path: Path, values: Any, name: str, least: int = 1) -> int | None:
    value = _in(values, name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 2**24:
        raise ConfigError(f"{path}: {name} is {printable(value, 40)}: a whole number of {least} or more is needed")
    return value


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
