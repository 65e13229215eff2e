"""Make everything that docs/results.md reports again, by one command: ``make results``.

    python examples/make_results.py                      # all parts, about 75 minutes on 2 cores
    python examples/make_results.py --parts oracle swap  # some of them
    python examples/make_results.py --parts cifar10 classes celeba --images FOLDER   # real data, for hours: below
    python examples/make_results.py --dry-run            # which commands that is, to run them one by one
    python examples/make_results.py --assemble-only      # only put what is there into the document

Two commands run side by side, a thread each; benchmarks come first and alone, since they need a quiet machine. Ctrl-C
stops all of it cleanly, and the same command continues; a command that failed is named with its log's last lines, and
what does not need it is made all the same. Logs and times are in ``runs/results``. What is finished is not made again:
to measure a part anew, remove its folder in ``runs`` (a benchmark: its log in ``runs/results/logs``).

Real data sets are made only if they are named. FOLDER holds ``cifar10/train`` and ``cifar10/test``, a folder per class
in each; ``tiny_imagenet10``, a folder per class; and ``celeba_half.zip``, CelebA's aligned images at half size.

At the end tables, figures and times go into the document between markers (``<!-- begin NAME -->``); the prose around
them is never touched, and a part that is not finished leaves what stands there.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from evidence.results_page import (
    describe_machine,
    fenced,
    fill_document,
    machine_line,
    table_with_figures,
    times_table,
)
from evidence.schedule import Job, Schedule
from rich.console import Console

from ral_gym.commands.ending import run_command
from ral_gym.errors import ConfigError, RunError
from ral_gym.runs.storage import load_json, save_json

ROOT = Path(__file__).resolve().parents[1]
PartName = Literal[
    "benchmarks",
    "demo",
    "ablation",
    "frontier",
    "oracle",
    "swap",
    "exposure",
    "gradient",
    "cifar10",
    "classes",
    "celeba",
]
REAL_PARTS: tuple[PartName, ...] = ("cifar10", "classes", "celeba")
ALL_PARTS: tuple[PartName, ...] = (
    "benchmarks",
    "demo",
    "ablation",
    "frontier",
    "oracle",
    "swap",
    "exposure",
    "gradient",
)


@dataclass(frozen=True)
class Experiment:
    """A script with a command per seed, or per group of its grid, and one for the table over all of them.

    Attributes:
        script: in ``examples``, and the name of its folder in ``runs``.
        figures: which of its figures the document shows, as glob patterns.
        flags: of every command.
        from_base: it starts from stages 1 and 2 of the run of `demo-patchgan` of its seed.
        groups: values of its flag `--groups`, a command each.
        seeds: its own seeds, whatever the others have; None: theirs.
        at_once: one command for all seeds: by itself, a seed would do what only the first one has to.
        home: its folder in ``runs``; "": the script's name.
        images: flags that name images, and the source, in which ``{}`` is the folder of the real data sets.
    """

    script: str
    figures: tuple[str, ...] = ("*.png",)
    flags: tuple[str, ...] = ()
    from_base: bool = True
    groups: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None
    at_once: bool = False
    home: str = ""
    images: tuple[tuple[str, str], ...] = ()

    @property
    def folder(self) -> str:
        """Its folder in ``runs``."""
        return self.home or self.script


def real(preset: str, *images: tuple[str, str]) -> Experiment:
    """`does_rl_help.py` with a preset for a real data set."""
    home, flags = f"does_rl_help_{preset}", ("--preset", preset)
    return Experiment("does_rl_help", ("frontier_seed0.png",), flags, from_base=False, home=home, images=images)


GRID = ("levels", "maps", "generation", "baseline", "gamma")
EXPERIMENTS: dict[str, Experiment] = {
    "demo": Experiment("does_rl_help", ("frontier_seed0.png",), from_base=False),
    "ablation": Experiment("ablation", ("ablation.png",), flags=("--quick",), groups=GRID, seeds=(0,)),
    "frontier": Experiment("frontier", ("frontier.png",)),
    "oracle": Experiment("oracle_experiment", ("nll_curve.png",)),
    "swap": Experiment("swap_algorithm", ("*/learning_curves.png",), from_base=False),
    "exposure": Experiment("exposure_bias", ("exposure_comparison.png",), from_base=False, at_once=True),
    "cifar10": real("demo-cifar10", ("--data", "folder:{}/cifar10/train"), ("--test", "folder:{}/cifar10/test")),
    "classes": real("demo-classes", ("--data", "folder:{}/tiny_imagenet10")),
    "celeba": real("demo-celeba", ("--data", "celeba:{}/celeba_half.zip")),
}
BENCHMARKS: dict[str, tuple[str, ...]] = {
    "sampling": ("--quick", "--threads", "1"),
    "rollout": ("--rounds", "3", "--threads", "1"),
    "partial_generation": ("--rounds", "1", "--threads", "1"),
    "distribution_rewards": (),
}
GRADIENT = ("--repeats", "1000")
"""Its figures do not depend on the machine, so that it may have company."""


@dataclass
class Arguments:
    """What to make, and where it goes."""

    parts: tuple[PartName, ...] = ALL_PARTS
    """Which parts."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of every experiment."""
    jobs: int = 2
    """Commands side by side, a thread each."""
    runs: str = "runs"
    """Folder of the runs; logs and times go to its `results`."""
    docs: str = "docs"
    """Folder of results.md, where the figures go too."""
    images: str = "."
    """Folder of the real data sets."""
    assemble_only: bool = False
    """Run nothing; put existing results into the document."""
    dry_run: bool = False
    """Print the commands."""

    def check(self) -> None:
        """Raise `ConfigError` for what cannot be run."""
        if not self.parts or not self.seeds or self.jobs < 1:
            raise ConfigError("at least one part, one seed and one job are needed")


def main(argv: Sequence[str], console: Console) -> None:
    """Run what is not finished, then fill the document."""
    arguments = tyro.cli(Arguments, args=list(argv), description=__doc__)
    arguments.check()
    folder = Path(arguments.runs) / "results"
    jobs = plan(arguments)
    if arguments.dry_run:
        for job in jobs:
            console.print(str(job), highlight=False, markup=False, soft_wrap=True)
        return
    failed: list[str] = []
    if not arguments.assemble_only:
        failed = run(jobs, folder, arguments, console)
    assemble(arguments, [name.removesuffix("-summary") for name in failed], console)
    if failed:
        raise RunError(f"{', '.join(failed)} failed: see above; the same command tries them again")


def plan(arguments: Arguments) -> list[Job]:
    """The jobs of all parts, in the order in which they are preferred."""
    runs, parts = Path(arguments.runs), arguments.parts
    jobs = [
        Job(name, (script("benchmarks", name), *flags), alone=True, makes=runs / f"results/logs/{name}.log")
        for name, flags in (BENCHMARKS.items() if "benchmarks" in parts else ())
    ]
    order = [*ALL_PARTS, *REAL_PARTS]
    experiments = [(name, EXPERIMENTS[name]) for name in order if name in EXPERIMENTS and name in parts]
    needed = {seed for _, one in experiments if one.from_base for seed in one.seeds or arguments.seeds}
    # One after the other would make the same base run; side by side they would be refused.
    flags = ("--preset", "demo-patchgan", "--stages", "vqvae", "prior", "--runs", arguments.runs, "--quiet")
    jobs += [
        Job(f"base-seed{seed}", (script("examples", "train_celeba"), "--seed", str(seed), *flags))
        for seed in sorted(needed)
    ]
    for name, experiment in experiments:
        jobs += experiment_jobs(name, experiment, arguments)
    if "gradient" in parts:
        log = runs / "results/logs/gradient.log"
        jobs.append(Job("gradient", (script("benchmarks", "gradient"), *GRADIENT), makes=log))
    return jobs


def experiment_jobs(name: str, experiment: Experiment, arguments: Arguments) -> list[Job]:
    """The jobs of one experiment: its pieces, then the one that finds all of them done and makes the table.

    Args:
        name: of the part.
        experiment: the part.
        arguments: the command's.
    """
    images = [word.format(arguments.images) for pair in experiment.images for word in pair]
    command = (script("examples", experiment.script), *experiment.flags, *images)
    common = ("--runs", arguments.runs, "--quiet")
    seeds = experiment.seeds or arguments.seeds
    all_seeds = ("--seeds", *map(str, seeds))
    pieces: dict[str, tuple[str, ...]] = {f"seed{seed}": ("--seeds", str(seed)) for seed in seeds}
    if experiment.groups:
        pieces = {group: (*all_seeds, "--groups", group) for group in experiment.groups}
    pieces = {} if experiment.at_once else pieces
    table = Path(arguments.runs) / experiment.folder / "table.md"
    jobs = []
    for piece, flags in pieces.items():
        starts = [seed for seed in seeds if experiment.from_base and (experiment.groups or piece == f"seed{seed}")]
        needs = tuple(f"base-seed{seed}" for seed in starts)
        jobs.append(Job(f"{name}-{piece}", (*command, *flags, *common), needs, makes=table))
    needs, makes = tuple(job.name for job in jobs), table if experiment.at_once else None
    return [*jobs, Job(f"{name}-summary", (*command, *all_seeds, *common), needs, makes=makes)]


def script(folder: str, name: str) -> str:
    """The path of a script, as one would type it here."""
    return os.path.relpath(ROOT / folder / f"{name}.py")


def run(jobs: Sequence[Job], folder: Path, arguments: Arguments, console: Console) -> list[str]:
    """Run the jobs; the names of those that failed or were left out."""
    # Summaries are short, and wait for others anyway: as soon as one can be had, it is.
    preferred = sorted(jobs, key=lambda job: not job.name.endswith("-summary"))
    schedule = Schedule(preferred, folder, console, arguments.jobs)
    if schedule.unfinished:
        save_json(folder / "machine.json", describe_machine())
    states = schedule.run()
    return [job.name for job in jobs if states[job.name] in ("failed", "left out")]


def assemble(arguments: Arguments, failed: Sequence[str], console: Console) -> None:
    """Put what is finished into the document."""
    runs, docs = Path(arguments.runs), Path(arguments.docs)
    folder = runs / "results"
    blocks: dict[str, str] = {}
    for name, experiment in EXPERIMENTS.items():
        home = runs / experiment.folder
        if name in arguments.parts and name not in failed and (home / "table.md").exists():
            found = sorted({file for pattern in experiment.figures for file in home.glob(pattern)})
            figures = {file: figure_name(name, file.relative_to(home)) for file in found}
            blocks[name] = table_with_figures(home, figures, docs)
    kept = load_json(folder / "times.json") if (folder / "times.json").exists() else {}
    times = kept.get("jobs", {})
    for name, flags in {**BENCHMARKS, "gradient": GRADIENT}.items():
        part = "gradient" if name == "gradient" else "benchmarks"
        log = folder / "logs" / f"{name}.log"
        if part in arguments.parts and times.get(name, {}).get("done") and log.exists():
            job = Job(name, (f"benchmarks/{name}.py", *flags))
            blocks[name] = fenced(str(job), log.read_text(encoding="utf-8"))
    if times:
        blocks["times"] = times_table(times, kept["elapsed"])
    if (folder / "machine.json").exists():
        blocks["machine"] = machine_line(load_json(folder / "machine.json"))
    fill_document(docs / "results.md", blocks)
    console.print(f"  {docs / 'results.md'}: {', '.join(blocks) or 'nothing new'}", highlight=False, soft_wrap=True)


def figure_name(part: str, file: Path) -> str:
    """The name of a part's figure among the documents: results, the part, the folder if any, its own name."""
    words = [word.replace("-", "_") for word in file.with_suffix("").parts]
    return "_".join(["results", *([] if words[0].startswith(part) else [part]), *words])


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
