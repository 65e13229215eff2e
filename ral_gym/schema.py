"""Checking of untrusted settings: every value is checked against its dataclass's annotations before it is used.

One checker for config.json, for presets in JSON files, and for a `Config` that a program has built.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from ral_gym.errors import ConfigError

Settings = TypeVar("Settings")

LONGEST_TEXT = 4096
"""Most characters of a text setting, such as a path; the longest path on Linux."""
LARGEST_INTEGER = 2**53
"""Integers up to this are exact as floating-point numbers too."""
MOST_ITEMS = 10_000
"""Most entries of a setting that is a list or a dict."""
_SHOWN = 60


def config_from(
    cls: type[Settings], values: Any, where: str = "", *, defaults: Settings | None = None, path: str = ""
) -> Settings:
    """A settings dataclass from a dict of JSON values, nested sections included.

    Args:
        cls: the dataclass; its fields may be numbers, truth values, text, `Literal`, optional ones, tuples, dicts with
            text as keys, and further dataclasses.
        values: name -> value; missing ones get their defaults.
        where: the file's name or another source, for the messages.
        defaults: an instance that supplies missing values; None: the dataclass's own defaults.
        path: name of this section, such as ``prior``; empty for the whole.

    Raises:
        ConfigError: an unknown name, a value of another type, or one that is missing and has no default.
    """
    start = f"{where}: " if where else ""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{start}{path or 'the settings'} is {shown(values)}: give names and values")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    prefix = f"{path}." if path else ""
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(str(name)[:LONGEST_TEXT], fields, n=1)
            meant = f" (did you mean {prefix}{near[0]}?)" if near else ""
            raise ConfigError(f"{start}{prefix}{shown(name, bare=True)} is an unknown setting{meant}")
    hints = type_hints(cls)  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for name, field in fields.items():
        if name in values:
            default = getattr(defaults, name) if defaults is not None else None
            given[name] = _value(hints[name], values[name], start, prefix + name, default)
        elif defaults is None and field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{start}{prefix}{name} is missing")
    return dataclasses.replace(defaults, **given) if defaults is not None else cls(**given)  # type: ignore[type-var]


def check_types(settings: Any, path: str = "") -> None:
    """Refuse a settings object, such as one built by a program, with a value of another type than its annotation's.

    Raises:
        ConfigError: which setting, its value and what is allowed.
    """
    for name, hint in type_hints(settings.__class__).items():
        value, full = getattr(settings, name), f"{path}.{name}" if path else name
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            if not isinstance(value, hint):
                raise ConfigError(f"{full} is {shown(value)}: give a {hint.__name__}")
            check_types(value, full)
        else:
            _value(hint, value, "", full, None)


@functools.cache
def type_hints(cls: Any) -> dict[str, Any]:
    """Field of a dataclass -> type, without annotations for the command line."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def shown(value: Any, bare: bool = False) -> str:
    """An untrusted value for a message: on one line, shortened."""
    text = str(value) if bare and isinstance(value, str) else _short_repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _short_repr(value: Any) -> str:
    """`repr` of a scalar; only the kind of a list or a dict, since it may be deep or endless."""
    if isinstance(value, str):
        return repr(value[: _SHOWN + 1])
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST_INTEGER:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, list | tuple):
        return "a list"
    return "a dict" if isinstance(value, Mapping) else repr(value)


def _value(hint: Any, value: Any, start: str, name: str, default: Any) -> Any:
    """The value, converted to its type: lists become tuples, and integers floats where needed."""
    if dataclasses.is_dataclass(hint):
        return config_from(hint, value, start.removesuffix(": "), defaults=default, path=name)  # type: ignore[arg-type]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [option for option in arguments if option is not type(None)]
        for option in options[:-1]:
            try:
                return _value(option, value, start, name, default)
            except ConfigError:
                continue
        return _value(options[-1], value, start, name, default)
    wrong = ConfigError(f"{start}{name} is {shown(value)}: give {_in_words(hint)}")
    if origin is Literal:
        if not isinstance(value, bool | int | str) or value not in arguments:
            raise wrong
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) > MOST_ITEMS:
            raise wrong
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise wrong
        hints = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_value(one, item, start, name, None) for one, item in zip(hints, value, strict=True))
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping) or len(value) > MOST_ITEMS:
            raise wrong
        return {
            _value(str, key, start, f"a name in {name}", None): _value(
                arguments[1] if arguments else Any, item, start, f"{name}.{shown(key, bare=True)}", None
            )
            for key, item in value.items()
        }
    scalar = _scalar(hint, value)
    if scalar is None and not (hint is Any and value is None):
        raise wrong
    return scalar


def _scalar(hint: Any, value: Any) -> Any:
    """The value if it is of this type (an integer counts as a number), else None."""
    if isinstance(value, bool):
        return value if hint in (bool, Any) else None
    if isinstance(value, int):
        if abs(value) > LARGEST_INTEGER or hint not in (int, float, Any):
            return None
        return float(value) if hint is float else value
    if isinstance(value, float):
        return value if hint in (float, Any) else None
    if isinstance(value, str):
        return value if hint in (str, Any) and len(value) <= LONGEST_TEXT and "\0" not in value else None
    return None


def _in_words(hint: Any) -> str:
    """What a value must be, in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin is tuple:
        return f"a list; each entry {_in_words(arguments[0])}"
    if origin is dict or hint is dict:
        return "names and values"
    words = {bool: "true or false", int: "an integer", float: "a number", Any: "a number, true, false, null or text"}
    return words.get(hint, f"text of at most {LONGEST_TEXT:,} characters")
