"""The arguments of the commands that begin a run, or look at runs and compare them; nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from ral_gym.commands.draw_arguments import Plugins


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
class CacheArguments:
    """List the decoded images that are cached on disk, or remove them."""

    clear: bool = False
    """Remove all of them."""
    cache_dir: str | None = None
    """The cache folder, as data.cache_dir of a run. None: ~/.cache/ral_gym."""


@dataclass
class CompareArguments:
    """Put the tables and samples of several runs side by side, here and on one HTML page.

    Runs that differ in their seed only are one line: mean and 95 % interval by Student's t. With two seeds or more,
    differences are paired by seed.
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ..")]
    """Two or more measured run folders; differences are to the first one's settings."""
    output: str | None = None
    """HTML file; the picture of the samples is a PNG file of the same name beside it. With a name that ends with .png
    only the picture. None: comparison.html beside the first run."""
    n: int = 16
    """Number of images of each run."""
    seed: int = 0
    """Seed of the images: the same random numbers for every run."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    plugins: Plugins = ()
    """Your own parts: modules that register some, or `module:Class` names that the runs' files may ask for."""


@dataclass
class WatchArguments:
    """Watch a generator draw, code by code: in a window, in the terminal, or as a GIF file."""

    run: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = None
    """A run folder with stages 1 and 2, for instance runs/demo. None: the face photos that come with the package."""
    n: int = 4
    """Number of images."""
    generator: Literal["MLE", "RAL"] | None = None
    """Who draws: the prior before (MLE) or after (RAL) reinforcement learning. None: RAL if the run has it."""
    label: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CLASS ..")] = ()
    """Classes to draw, by name or number, in turn; none: all classes in turn, if the run has some."""
    temperature: float = 1.0
    """Divides the logits; below 1 sharper and less diverse."""
    guidance: float = 1.0
    """Scale of classifier-free guidance, for a generator with classes; 1: none."""
    seed: int = 0
    """Seed of the first image; the others have the next seeds. As in `ral-gym play`."""
    speed: float = 1.0
    """2: twice as fast."""
    gif: str | None = None
    """Write this GIF file and open no window."""
    terminal: bool = False
    """Draw in the terminal, even where a window could be opened."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    plugins: Plugins = ()
    """Your own parts: modules that register some, or `module:Class` names that the run's files may ask for."""


@dataclass
class CompletionArguments:
    """Print a script that completes commands, flags and names in a shell."""

    shell: Annotated[Literal["bash", "zsh"], tyro.conf.Positional]
    """The shell. bash: `source <(ral-gym completion bash)`, also as a line in ~/.bashrc. zsh: write it as _ral-gym
    into a folder of $fpath."""
