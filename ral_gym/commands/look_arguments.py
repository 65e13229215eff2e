"""The arguments of the commands that begin a run, or look at runs and compare them; nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro


@dataclass
class DemoArguments:
    """Train on the 400 bundled face photos, as `make demo` does: the place to begin. In any folder, minutes on a CPU.

    The same as `ral-gym train`, which has all settings. Run it again to continue a stopped run, or to see the table.
    """

    preset: str = "demo"
    """The preset, see `ral-gym presets`."""
    algo: str | None = None
    """Algorithm of stage 3: reinforce, ppo, a2c, trpo, grpo, maskable_ppo. None: the preset's."""
    seed: int = 0
    """Seeds every source of randomness."""
    runs: str = "runs"
    """Folder that holds the run folders."""
    device: str = "auto"
    """`auto` (CUDA when present), `cpu`, `cuda` or `cuda:N`."""
    quiet: bool = False
    """No progress bars."""


def training_words(demo: DemoArguments) -> list[str]:
    """The words after `ral-gym train` that do what `ral-gym demo` was asked for."""
    words = ["--preset", demo.preset, "--seed", str(demo.seed), "--runs", demo.runs, "--device", demo.device]
    return words + (["--algo", demo.algo] if demo.algo else []) + (["--quiet"] if demo.quiet else [])


@dataclass
class RunsArguments:
    """List the runs of a folder, the newest first: preset, stage reached, age, size and FD."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = "runs"
    """The folder that holds the run folders."""


@dataclass
class CompletionArguments:
    """Print a script that completes commands, flags and names in a shell."""

    shell: Annotated[Literal["bash", "zsh"], tyro.conf.Positional]
    """The shell. bash: `source <(ral-gym completion bash)`, also as a line in ~/.bashrc. zsh: write it as _ral-gym
    into a folder of $fpath."""
