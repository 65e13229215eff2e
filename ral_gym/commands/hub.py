"""`ral-gym push` and `ral-gym pull`: runs to and from a hub."""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from ral_gym.commands.generate import need, open_run
from ral_gym.commands.hub_arguments import PullArguments, PushArguments
from ral_gym.commands.results import say
from ral_gym.config import Config
from ral_gym.errors import ConfigError, RunError
from ral_gym.report.card import model_card
from ral_gym.runs.hub import Repository, check_hub, look, parse_address, pull, push
from ral_gym.runs.results import load_results
from ral_gym.runs.run import Run, read_config
from ral_gym.runs.shared_files import CARD, Portable, files_to_push
from ral_gym.runs.storage import load_metadata

CHECKPOINT = "checkpoints/ral.safetensors"


def push_run(arguments: PushArguments, console: Console) -> str | None:
    """Say what leaves, ask, and push; returns the commit's page, or None if the answer is no.

    Raises:
        ConfigError: a repository's name that is none, the client is not installed, or nobody can be asked.
        RunError: not a run folder, a file of it is damaged, the repository has files already, or the hub refuses.
    """
    check_hub()
    address = parse_address(arguments.repo)
    if address.revision is not None:
        raise ConfigError(
            f"{arguments.repo}: a push makes a new commit of the main branch; leave @ and what follows out"
        )
    run = open_run(arguments.run)
    need(run, ["vqvae.safetensors", "prior.safetensors"], "train stages vqvae and prior before it is pushed")
    with tempfile.TemporaryDirectory(prefix="ral_gym_push_") as copies:
        leave, stay = files_to_push(run.path, arguments.images)
        portable = Portable(run.config)
        files = {name: portable.write(path, Path(copies) / name) for name, path in leave.items()}
        card = _card(address.repo, files, run)
        there = look(address.repo)
        _check_place(address.repo, there, arguments)
        _say_what(console, address.repo, arguments, files, stay, portable.changes)
        if not _agreed(arguments.yes):
            say(console, ["Nothing was pushed."])
            return None
        page = push(address.repo, files, card, arguments.public, there)
    say(console, [f"Pushed: {page}", f'  load_run("hf://{address.repo}"), or ral-gym pull {address.repo}'])
    return page


def _card(repo: str, files: dict[str, Path], run: Run) -> str:
    """The model card, from the files that leave."""
    folder = files["config.json"].parent
    config: Config = read_config(folder)
    results: dict[str, Any] | None = load_results(files["results.json"]) if "results.json" in files else None
    images = load_metadata(files["vqvae.safetensors"]).get("images", "")
    continues = CHECKPOINT in files and not any(getattr(config.ral, name) for name in _OTHERS_FILES)
    picture = next((name for name in SHOWN if name in files), "")
    return model_card(repo, config, results, str(images), continues, picture)


SHOWN = ("samples/real_mle_ral.png", "samples/classes.png", "samples/sample_policy_ema.png", "samples/sample_prior.png")
"""Pictures for the card; the first that leaves is shown."""
_OTHERS_FILES = ("reward_reference", "clip_path", "hps_path")
"""Settings that name files which do not leave, and without which stage 3 cannot be loaded."""


def _check_place(repo: str, there: Repository, arguments: PushArguments) -> None:
    """Refuse to change a repository that was not asked for, or to show a private push to everyone.

    Raises:
        RunError: what there is, and the flag that permits it.
    """
    held = [name for name in there.files or () if name != ".gitattributes"]
    if held and not arguments.update:
        raise RunError(
            f"{repo} has {len(held)} file(s) already, such as {held[0]}: nothing was pushed; --update adds a commit "
            "to it, or give another name"
        )
    if there.public and not arguments.public:
        raise RunError(f"{repo} is public: nothing was pushed; --public permits that everyone reads the run")


def _say_what(
    console: Console,
    repo: str,
    arguments: PushArguments,
    files: dict[str, Path],
    stay: list[str],
    changes: dict[str, str],
) -> None:
    """List what leaves, what stays, and what was changed on the way."""
    lines = [f"To {repo}, {'public' if arguments.public else 'private'}:"]
    lines += [f"  {path.stat().st_size:>14,}  {name}" for name, path in files.items()]
    lines += [f"  {'a model card':>14}  {CARD}"]
    if "codes.safetensors" in files:
        lines += [
            "  Training images can be seen from their codes, the checkpoint and the pictures; --no-images keeps these."
        ]
    lines += [f"  In the copies: {before} -> {after}" for before, after in changes.items()]
    lines += (
        [f"Stays here: {', '.join(stay[:8])}{f' and {len(stay) - 8} more' if len(stay) > 8 else ''}"] if stay else []
    )
    say(console, lines)


def _agreed(yes: bool) -> bool:
    """Whether the user wants it.

    Raises:
        ConfigError: nobody can be asked.
    """
    if yes:
        return True
    if not sys.stdin.isatty():
        raise ConfigError("nothing was pushed: nobody can be asked here; --yes pushes what is listed")
    return input("Push this? [y/N] ").strip().lower() in ("y", "yes")


def pull_run(arguments: PullArguments, console: Console) -> Path:
    """Pull a run; returns its folder.

    Raises:
        ConfigError: an address that is none, a size out of range, or the client is not installed.
        RunError: see `ral_gym.runs.hub.pull`.
    """
    check_hub()
    address = parse_address(arguments.repo)
    if not 0 < arguments.max_gib < math.inf:
        raise ConfigError(f"--max-gib is {arguments.max_gib}: give a size above 0")
    folder = Path(arguments.folder or f"runs/{address.repo.partition('/')[2]}")
    commit = pull(address, folder, arguments.max_gib)
    config = read_config(folder)
    say(console, [f"{address} ({commit[:12]}): {folder}", f"  preset {config.preset}, {config.ral.algo}"])
    if ":" in config.data.source:
        say(console, [f"  Its images are {config.data.source}: look at that before you evaluate or verify it here"])
    return folder
