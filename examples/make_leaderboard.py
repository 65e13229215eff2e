"""Add finished runs to the leaderboard, and make its page again: docs/leaderboard.md from docs/leaderboard/*.json.

    python examples/make_leaderboard.py                       # the page again, after a file was changed
    python examples/make_leaderboard.py runs/demo-seed0 runs/demo-seed1 runs/demo-seed2 \
        --name demo-mine --hardware "RTX 4090" --who "a name"  # from runs that differ in their seed only

The runs must be measured (``results.json``) and must have a control, likelihood training continued for as long
(`mle_equal_time`) or for as many updates (`mle_continued`). How to send them: CONTRIBUTING.md.
"""

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from evidence.leaderboard import Entry, load_entries, page, save_entry
from rich.console import Console

from ral_gym import __version__
from ral_gym.commands.compare import Group, grouped
from ral_gym.commands.ending import run_command
from ral_gym.commands.generate import open_run
from ral_gym.config import Config
from ral_gym.config.flags import flags
from ral_gym.errors import ConfigError, RunError
from ral_gym.presets import PRESETS, get_preset
from ral_gym.runs.shared_files import Portable
from ral_gym.runs.storage import write_text

CONTROLS = ("mle_equal_time", "mle_continued")
"""The strongest first."""


@dataclass
class Arguments:
    """Which runs, and what to say of them."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Run folders of one recipe, a seed each. None: only the page is made again."""
    name: str = ""
    """Of the file in docs/leaderboard, without .json."""
    hardware: str = ""
    """What the runs ran on."""
    who: str = ""
    """Who measured them."""
    data: str = ""
    """The data set's name. Needed if the runs name a folder or a file of yours."""
    note: str = ""
    """What else a reader should know."""
    docs: str = str(Path(__file__).parents[1] / "docs")
    """Folder of the documents."""


def main(argv: Sequence[str], console: Console) -> None:
    """Write the file, if there are runs, and the page."""
    arguments = tyro.cli(Arguments, args=list(argv), description=__doc__)
    folder = Path(arguments.docs) / "leaderboard"
    if arguments.runs:
        path = folder / f"{check_name(arguments)}.json"
        save_entry(path, entry_of(arguments))
        console.print(f"  {path}", highlight=False)
    write_text(folder.with_suffix(".md"), page(load_entries(folder)))
    console.print(f"  {folder.with_suffix('.md')}", highlight=False)


def check_name(arguments: Arguments) -> str:
    """The file's name.

    Raises:
        ConfigError: what a file of runs needs is missing.
    """
    for flag in ("name", "hardware", "who"):
        if not getattr(arguments, flag).strip():
            raise ConfigError(f"--{flag} is missing: runs need --name, --hardware and --who")
    return arguments.name


def entry_of(arguments: Arguments) -> Entry:
    """A file's contents from finished runs.

    Raises:
        ConfigError: the runs differ in more than their seed, or the data set needs a name.
        RunError: a run has not been measured, or has no control.
    """
    groups = grouped([open_run(path) for path in arguments.runs])
    if len(groups) > 1:
        names = ", ".join(group.name for group in groups)
        raise ConfigError(f"the runs differ in more than their seed ({names}): give those of one recipe")
    (group,) = groups
    config, first = next(iter(group.runs.values())).config, next(iter(group.results.values()))
    found = [name for name in CONTROLS if all(name in one["rows"] for one in group.results.values())]
    if not found or not all("ral" in one["rows"] for one in group.results.values()):
        raise RunError(f"{group.name} has no row ral, or none of {', '.join(CONTROLS)}: finish it with ral-gym train")
    recipe, command = recipe_of(config)
    return Entry(
        recipe=recipe,
        algorithm=f"{config.ral.algo}, {' and '.join(config.ral.reward_weights)}",
        data=data_of(config, arguments.data),
        control=found[0],
        extractor=str(first["extractor"]),
        command=command,
        hardware=arguments.hardware,
        version=__version__,
        who=arguments.who,
        note=arguments.note,
        n_samples=int(first["n_samples"]),
        seeds=[seed_of(group, seed, found[0]) for seed in sorted(group.runs)],
        means={},
    )


def recipe_of(config: Config) -> tuple[str, str]:
    """What the settings are called, and the command that trains them, without this computer's paths."""
    name = config.preset if config.preset in PRESETS else "demo"
    base = get_preset(name)
    changed = flags(dataclasses.replace(config, seed=base.seed, data=base.data), base)
    words = ["ral-gym", "train", "--preset", name, *flags(dataclasses.replace(config, seed=base.seed), base)]
    return name + (", changed" if changed else ""), Portable(config).text(shlex.join(words))


def data_of(config: Config, name: str) -> str:
    """The data set's name and the images' side; a path of this computer is never taken.

    Raises:
        ConfigError: the source is a path and no name was given.
    """
    if not name and ":" in config.data.source:
        raise ConfigError(f"the runs' images are {config.data.source}: give --data NAME, what others call the data set")
    side = config.data.image_size
    return f"{name or config.data.source}, {side}x{side}"


def seed_of(group: Group, seed: int, control: str) -> dict[str, Any]:
    """The figures of one seed."""
    results = group.results[seed]
    rows: Mapping[str, Any] = results["rows"]
    best = rows.get("ral_best_temperature", {})
    spread = rows["ral"].get("fd_spread")
    return {
        "seed": seed,
        "fd": rows["ral"]["fd"],
        "control_fd": rows[control]["fd"],
        "best_fd": best.get("fd"),
        "control_best_fd": rows.get(f"{control}_best_temperature", {}).get("fd"),
        "best_temperature": best.get("temperature"),
        "recall": rows["ral"].get("recall"),
        "nll_test": rows["ral"].get("nll_test"),
        "seconds": results.get("seconds", {}).get("ral"),
    } | ({} if spread is None else {"fd_spread": spread})


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
