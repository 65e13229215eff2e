"""A configuration as a command line: its differences from a preset, as flags of ``ral-gym train``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from ral_gym.config.algorithms import SECTIONS, changed_settings
from ral_gym.config.stages import Config
from ral_gym.registry import SOURCES, is_path
from ral_gym.settings import option_words, weight_words


def flags(config: Config, base: Config | None = None) -> list[str]:
    """The words that turn `base` into `config`, so that parsing them after ``--preset BASE`` gives `config`.

    Works for every field of every section, nested ones too, so new sections need no change here. Sections of other
    algorithms than `config.ral.algo` are left out, since the command line resets them.

    Args:
        config: the settings wanted.
        base: the preset's settings, from which the command line starts; None: unknown, so that every setting is named.
    """
    other = {name for name in SECTIONS if name != config.ral.algo and not changed_settings(getattr(config.ral, name))}
    return list(_words(config, base, "", {"preset", *(f"ral.{name}" for name in other)}))


def parts_named(config: Config) -> list[str]:
    """The ``module:Class`` names of a configuration, which --plugin must name to open its run folder.

    A data source may be followed by an argument: ``module:Class:images.npy``.
    """
    found: dict[str, None] = {}
    for text in _texts(dataclasses.asdict(config)):
        if text.partition(":")[0] not in SOURCES:  # folder:images looks like a module:Class too
            found |= {name: None for name in (text, ":".join(text.split(":")[:2])) if is_path(name)}
    return list(found)


def _words(section: Any, base: Any, path: str, left_out: set[str]) -> Iterator[str]:
    for field in dataclasses.fields(section):
        name, value = f"{path}{field.name}", getattr(section, field.name)
        before = None if base is None else getattr(base, field.name)
        if name in left_out:
            continue
        if dataclasses.is_dataclass(value):
            yield from _words(value, before, f"{name}.", left_out)
        elif base is None or value != before or type(value) is not type(before):
            yield from _flag(name, value)


def _flag(name: str, value: Any) -> list[str]:
    """A flag with its value."""
    flag = f"--{name}".replace("_", "-")
    if isinstance(value, bool):
        section, _, field = flag.rpartition(".")
        return [flag if value else f"{section}.no-{field}"]
    if isinstance(value, dict):
        return [flag, *(weight_words(value) if name.endswith("reward_weights") else option_words(value))]
    if isinstance(value, tuple):
        return [flag, *map(str, value)]
    text = str(value)
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]  # else it would be taken for a flag


def _texts(value: Any) -> Iterator[str]:
    """All texts in nested dicts, lists and tuples."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in [*value.keys(), *value.values()] if isinstance(value, dict) else value:
            yield from _texts(item)


def settings(config: Config) -> dict[str, Any]:
    """Every setting by its name on the command line; those of the bottom prior and of algorithms only if used."""
    unused = {
        f"ral.{name}"
        for name in SECTIONS
        if name != config.ral.algo and not changed_settings(getattr(config.ral, name))
    }
    unused |= {"bottom"} if config.vqvae.levels == 1 else set()
    return _settings(config, "", unused)


def _settings(section: Any, path: str, unused: set[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in dataclasses.fields(section):
        value, name = getattr(section, one.name), f"{path}{one.name}"
        if not dataclasses.is_dataclass(value):
            found[name] = value
        elif name not in unused:
            found |= _settings(value, f"{name}.", unused)
    return found
