"""What to type next: after each command, and for `ral-gym` alone."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from ral_gym.commands.run_list import RunFacts, age, find_runs, read_facts
from ral_gym.config.flags import flags, parts_named
from ral_gym.errors import ConfigError, printable
from ral_gym.presets import PRESETS

PICTURE = "samples/real_mle_ral.png"
BEGIN = [
    "ral-gym demo                       400 faces, all stages, a table and pictures: minutes on a CPU",
    "ral-gym train --data folder:PATH   your images; --dry-run first tells what it costs",
    "ral-gym presets                    the paper's settings and small ones",
    "ral-gym play                       draw on the bundled faces, nothing to train (extra play)",
]
MORE = "ral-gym --help lists all commands; ral-gym COMMAND --help says what one takes."


def welcome(console: Console, runs: str | Path = "runs") -> None:
    """`ral-gym` alone: what to begin with or, if there are runs, how to go on with the newest."""
    lines = ["ral_gym: drawing an image is an episode; a prior draws, a critic scores, RL improves it.", ""]
    found = find_runs(runs)
    if found:
        newest = found[0]
        done = "nothing finished yet" if newest.stage == "-" else f"done: {newest.stage}"
        lines += [f"Newest of {len(found)} run(s) in {runs}: {newest.path} ({done}, {age(newest.changed)} ago)"]
        lines += [f"  {line}" for line in steps_of(newest)] + ["", "Or begin:"]
    else:
        lines += ["Begin:"]
    _say(console, [*lines, *(f"  {line}" for line in BEGIN), "", MORE])


def steps_of(facts: RunFacts) -> list[str]:
    """What one does with a run that has come as far as this one."""
    path = _word(facts.path)
    if facts.stage in ("-", "tokenizer"):
        return [f"{_continuing(facts)}   continues it"]
    if facts.stage == "prior":
        return [f"{_continuing(facts)}   continues it", f"ral-gym sample {path}   images of its prior"]
    if facts.stage == "RAL":
        return [f"ral-gym evaluate {path}   the table and the pictures", f"ral-gym sample {path}   new images"]
    name = _word(Path(f"{facts.path.name}-ppo"))
    return [
        f"open {_word(facts.path / PICTURE)}   real images, MLE, RAL",
        f"ral-gym report {path}   one HTML page of it all",
        f"ral-gym sample {path} --n 64   new images",
        f"ral-gym play {path}   a page to draw on",
        f"ral-gym train --start-from {path} --name {name} --ral.algo ppo   another stage 3",
    ]


def say_next(arguments: Any, console: Console) -> None:
    """Print what to try after a command that has done its work; not into a pipe or a file, which a program reads."""
    lines = next_lines(arguments) if is_for_people(console) else []
    if lines:
        _say(console, ["Next:", *(f"  {line}" for line in lines)])


def is_for_people(console: Console) -> bool:
    """Whether the output is a terminal."""
    return console.is_terminal


def next_lines(arguments: Any) -> list[str]:
    """What to try after a command, by its arguments."""
    kind, run = type(arguments).__name__.removesuffix("Arguments"), getattr(arguments, "run", None)
    path = _word(Path(run)) if isinstance(run, str) else ""
    match kind:
        case "Train" | "Demo":
            if getattr(arguments, "dry_run", False):
                return ["the same command without --dry-run trains it; --ral.n-envs, batch sizes and layers cost most"]
            folder = Path(arguments.runs) / str(arguments.name)
            return steps_of(read_facts(folder)) if (folder / "config.json").is_file() else []
        case "Import":
            given = arguments.source
            return steps_of(read_facts(Path(given.runs) / given.name))
        case "Evaluate":
            return steps_of(read_facts(Path(run or "")))
        case "Sample":
            return [f"ral-gym sample {path} --temperature 0.8 --seed 1   others, sharper", f"ral-gym play {path}"]
        case "Complete":
            return [f"ral-gym complete {path} IMAGE --visible-rows 0.25   less to go by", f"ral-gym report {path}"]
        case "Watch":
            of = f" {path}" if path else ""
            return [f"ral-gym watch{of} --gif episode.gif --n 1   a file of it", f"ral-gym play{of}   draw yourself"]
        case "Compare":
            first = _word(Path(arguments.runs[0]))
            return [f"ral-gym report {first}   all of one run on a page"]
        case "Verify":
            return [f"ral-gym report {path}   one HTML page of the run"]
        case "Report":
            return ["open the page in a browser; it needs nothing else and can be sent as it is"]
        case "Reference":
            reward = "--ral.reward-reference FILE --ral.reward-weights loo_fd 1"
            return [f"ral-gym train --start-from {path} --name NEW {reward}   a Frechet distance as the reward"]
        case "Pull":
            pulled = arguments.folder or f"runs/{arguments.repo.partition('@')[0].rpartition('/')[2]}"
            return steps_of(read_facts(Path(pulled)))
        case "Presets":
            name = arguments.name
            return [f"ral-gym train --preset {_word(Path(name or 'demo'))} --dry-run   what it costs, without training"]
        case "Runs":
            newest = find_runs(arguments.folder)[0]
            return steps_of(newest)
    return []


def _continuing(facts: RunFacts) -> str:
    """The command that continues a run."""
    config, words = facts.config, ["ral-gym", "train"]
    if config is None:
        return "the command that began it"
    if config.preset in PRESETS.builtin:
        words += ["--preset", config.preset]
        base: Any = PRESETS[config.preset]
    else:
        base = None
    try:
        words += flags(config, base)
    except (ConfigError, AttributeError, TypeError):
        return "the command that began it"
    if parts := parts_named(config):
        words += ["--plugin", *parts]
    plain = words == ["ral-gym", "train", "--preset", facts.path.name]  # else its name would say what differs
    name = [] if plain else ["--name", facts.path.name]
    place = [] if facts.path.parent == Path("runs") else ["--runs", str(facts.path.parent)]
    return shlex.join([*words, *name, *place])


def _word(path: Path) -> str:
    """A path as one word of a shell."""
    return shlex.quote(str(path)) if sys.platform != "win32" else f'"{path}"' if " " in str(path) else str(path)


def _say(console: Console, lines: list[str]) -> None:
    for line in lines:
        console.print(printable(line), highlight=False, soft_wrap=True, markup=False)
