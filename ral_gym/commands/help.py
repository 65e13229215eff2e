"""What the command line says when it is asked what to type: `train --help` in short, and presets one line each."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ral_gym.config import Config
from ral_gym.errors import ConfigError, Listed
from ral_gym.presets import PRESETS, get_preset
from ral_gym.registry import is_path

COMMON = {
    "the run": ("preset", "data", "algo", "name", "runs", "start_from", "stages", "seed", "device", "dry_run"),
    "images": ("data.image_size", "data.limit"),
    "stage 1, the tokenizer": ("vqvae.training_steps", "vqvae.codebook_size"),
    "stage 2, the prior": ("prior.kind", "prior.training_steps", "prior.hidden_units"),
    "stage 3, RAL": ("ral.n_updates", "ral.n_envs", "ral.learning_rate", "ral.reward_weights"),
    "the table": ("evaluation.n_samples", "evaluation.extractor"),
}
"""What people change first, by what it belongs to; names as in `TrainArguments` and `Config`."""
HELP, HELP_ALL = ("-h", "--help"), "--help-all"


def is_short_help(argv: Sequence[str]) -> bool:
    """Whether these words ask for the short help."""
    return bool(set(HELP) & set(argv)) and HELP_ALL not in argv


def with_full_help(argv: Sequence[str]) -> list[str]:
    """The words with ``--help-all`` as the parser's own ``--help``."""
    return ["--help" if word == HELP_ALL else word for word in argv]


def print_short_help(defaults: Any, console: Console) -> None:
    """What `ral-gym train` does, and its common settings with the values that they have.

    Args:
        defaults: the command's arguments, with the preset's `config`.
        console: where to print.
    """
    say = functools.partial(console.print, highlight=False, markup=False)
    say("usage: ral-gym train [--preset NAME] [--data SOURCE] [OPTIONS]\n")
    say(inspect.getdoc(type(defaults)))
    for title, names in COMMON.items():
        table = Table(box=None, show_header=False, padding=(0, 1, 0, 1), pad_edge=False)
        table.add_column(no_wrap=True, min_width=26)
        table.add_column(overflow="fold")
        for name in names:
            told = f"{_first_sentence(meaning(defaults, name))} [{_shown(_value(defaults, name))}]"
            table.add_row(flag(name), Text(told))
        say(f"\n{title}:")
        console.print(table)
    rest = sum(1 for _ in _leaves(defaults.config)) + len(dataclasses.fields(defaults)) - 1
    say(f"\nIn brackets: the value now. All {rest} settings: ral-gym train {HELP_ALL}")
    say("Presets: ral-gym presets. What a run would cost: --dry-run")


def flag(name: str) -> str:
    """``ral.n_updates`` -> ``--ral.n-updates``."""
    return f"--{name}".replace("_", "-")


def meaning(defaults: Any, name: str) -> str:
    """The text below a setting's field."""
    holder, field = _holder(defaults, name)
    kind: Any = type(holder)
    return _meanings(kind)[field]


def known_preset(name: str) -> Config:
    """A preset; if there is none of that name, the error lists all of them, one a line.

    Raises:
        Listed, ConfigError: there is no such preset, or it cannot be read.
    """
    if name in PRESETS or name.lower().endswith(".json") or is_path(name):
        return get_preset(name)
    try:
        return get_preset(name)
    except ConfigError as error:
        known = "choose one of these, or give module:NAME or a .json file"
        raise Listed(f"{str(error).partition(': choose')[0]}: {known}", preset_lines()) from error


def preset_lines() -> list[str]:
    """Every registered preset in a line: images, codes, prior."""
    return [f"{name:<17}{_described(config)}" for name, config in PRESETS.items() if isinstance(config, Config)]


def _described(config: Config) -> str:
    source, size = config.data.source.partition(":")[0], config.data.image_size
    side, two = config.grid_size, config.vqvae.levels == 2
    codes = f"{side}x{side}" + (f" + {2 * side}x{2 * side}" if two else "")
    prior = config.prior
    return (
        f"{source}, {size}x{size} pixels as {codes} codes of {config.vqvae.codebook_size:,}; {prior.kind}, "
        f"{prior.hidden_units} units x {prior.layers}; {config.ral.algo}"
    )


@functools.cache
def _meanings(cls: Any) -> dict[str, str]:
    """The strings below the fields of a dataclass, which Python itself does not keep."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        told = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and told:
            found[field.target.id] = " ".join(str(text.value.value).split())  # type: ignore[attr-defined]
    return found


def _holder(defaults: Any, name: str) -> tuple[Any, str]:
    """The dataclass that a setting is a field of, and the field."""
    *path, field = name.split(".")
    holder = defaults if not path and hasattr(defaults, field) else defaults.config
    for part in path:
        holder = getattr(holder, part)
    return holder, field


def _value(defaults: Any, name: str) -> Any:
    holder, field = _holder(defaults, name)
    return getattr(holder, field)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name} {one:g}" for name, one in value.items())
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)


def _first_sentence(text: str) -> str:
    """The words before the first full stop that ends a sentence, or before a list in a text of one sentence."""
    return text.partition(". ")[0].rstrip(".") + "."


def _leaves(section: Any) -> Any:
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value)
        else:
            yield field.name
