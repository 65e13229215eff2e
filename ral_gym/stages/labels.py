"""Classes by name: what a command's labels mean in a run."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ral_gym.data.labels import listed
from ral_gym.errors import ConfigError, printable
from ral_gym.runs.run import Run
from ral_gym.runs.storage import load_metadata


def class_names(run: Run, prior: Any) -> tuple[str, ...]:
    """The names of a generator's classes, from the prior's file; numbers where it holds none; () without classes."""
    classes: int = prior.grid.classes
    return names_in(run.file("prior.safetensors"), classes) or tuple(map(str, range(classes)))


def names_in(file: Path, classes: int) -> tuple[str, ...]:
    """The names of this many classes in a prior's file; () where it holds none, or another number of them."""
    names = load_metadata(file).get("class_names") if classes else None
    if isinstance(names, list) and len(names) == classes and all(isinstance(name, str) for name in names):
        return tuple(names)
    return ()


def labels_asked(asked: Sequence[str], names: Sequence[str], n: int) -> Tensor | None:
    """The classes (n,) int64 of n images to draw, the asked ones in turn; None if none were asked for.

    Args:
        asked: names or numbers of classes. A name may be shortened as far as it fits one class only; case is ignored.
        names: of all classes.
        n: how many images.

    Raises:
        ConfigError: there are no classes, no such class, or several that fit.
    """
    if not asked:
        return None
    if not names:
        raise ConfigError(f"--label {printable(asked[0])}: this run has no classes, leave --label out")
    numbers = torch.tensor([_number(one, names) for one in asked])
    return numbers[torch.arange(n) % len(numbers)]


def _number(asked: str, names: Sequence[str]) -> int:
    """The number of the class called `asked`."""
    folded, wanted = [name.casefold() for name in names], asked.strip().casefold()
    exact = [number for number, name in enumerate(folded) if name == wanted]
    if not exact and wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    fits = exact or [number for number, name in enumerate(folded) if wanted and wanted in name]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise ConfigError(
            f"--label {printable(asked)} fits {len(fits)} classes ({listed([names[n] for n in fits])}): give one in "
            f"full, or its number ({', '.join(map(str, fits[:12]))})"
        )
    near = difflib.get_close_matches(wanted, folded, n=1)
    meant = f" (did you mean {printable(names[folded.index(near[0])])}?)" if near else ""
    raise ConfigError(f"--label {printable(asked)} is no class{meant}: choose one of {listed(names)}")
