"""Which knob of stage 3 matters? Variants from one finished run's prior, one change at a time, in one table.

    python examples/sweep.py runs/demo-cifar10-seed1                # images per update, critic, rewards: the list below
    python examples/sweep.py runs/demo --vary "few: --ral.n-envs 64" "long: --critic.warmup-steps 1000"

A variant is what `ral-gym train` is given, settings of `ral` and `critic` only. The run's own RAL and its controls are
lines of the table, as its ``results.json`` has them; variants are measured as those are, at temperature 1 and at the
run's temperatures, and start from the same prior. Images and updates are not equalised unless a variant does it, so
that the processor time stands beside each.

In ``RUN/sweep``: a folder per variant, ``sweep.json``, ``table.md`` and ``sweep.png``. The same command again
continues, and more variants can be added later.
"""

import re
import shlex
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console

from ral_gym.agents.experiment import Experiment
from ral_gym.commands.arguments import parse_train
from ral_gym.commands.ending import run_command
from ral_gym.config import Config
from ral_gym.errors import ConfigError
from ral_gym.report.tables import markdown_table, plain_table
from ral_gym.runs.run import Run, read_config
from ral_gym.runs.storage import load_json, save_json, write_atomic, write_text

VARY = (
    "64 images per update: --ral.n-envs 64 --ral.n-updates 320",
    "1,024 images per update: --ral.n-envs 1024 --ral.n-updates 20",
    "critic on fresh samples, 1,000 steps of 64 first: --critic.fakes fresh --critic.replay 1 --critic.dropout 0.1 "
    "--critic.warmup-steps 1000 --critic.batch-size 64",
    "PatchGAN of 48 units: --critic.kind patch --critic.loss hinge --critic.hidden-units 48 --critic.layers 3 "
    "--critic.learning-rate 2e-4 --critic.adam-beta2 0.999 --critic.warmup-steps 600",
    "critic alone: --ral.reward-weights critic 1",
    "leave-one-out FD alone: --ral.reward-weights loo_fd 1",
)
"""Images per update at equal images in all, a critic that sees more before the first update, one of another kind and
size, and each reward by itself; for runs with the causal critic and 256 images per update, such as `demo-cifar10`."""
CONTROLS = ("mle", "mle_continued", "mle_equal_time", "ral")
"""Lines of the run's own table."""


@dataclass
class Arguments:
    """What to vary."""

    run: Annotated[str, tyro.conf.Positional]
    """A finished run with stage 3."""
    vary: tuple[str, ...] = VARY
    """One string per variant: its name, a colon and the flags of `ral-gym train` that change `ral` or `critic`."""
    samples: int | None = None
    """Images per line. None: the run's."""
    quiet: bool = False
    """No progress bars."""


def main(argv: Sequence[str], console: Console) -> None:
    """Train and measure what is missing, then the table of all that is there."""
    arguments = tyro.cli(Arguments, args=list(argv), description=__doc__)
    run = Run(arguments.run, read_config(arguments.run))
    if not run.has("results.json"):
        raise ConfigError(f"{run.path} has no results.json: finish it first (ral-gym train, the same command again)")
    configs = {name: config_of(run, flags) for name, flags in map(named, arguments.vary)}
    folder = run.file("sweep")
    folder.mkdir(exist_ok=True)
    evaluation = replace(run.config.evaluation, n_samples=arguments.samples or run.config.evaluation.n_samples)
    experiment = Experiment(run, folder, evaluation=evaluation, progress=not arguments.quiet)
    file = folder / "sweep.json"
    for name, config in configs.items():
        found: list[dict[str, Any]] = load_json(file) if file.exists() else []
        if name not in [variant["name"] for variant in found]:
            console.print(f"  {name}", highlight=False, soft_wrap=True)
            save_json(file, [*found, {"name": name, **measured(experiment, folder_of(name), config)}])
    report(run, load_json(file), console)


def named(variant: str) -> tuple[str, str]:
    """A variant's name and its flags.

    Raises:
        ConfigError: it has no name.
    """
    name, colon, flags = variant.partition(": ")
    if not colon or not name.strip():
        raise ConfigError(f"variant '{variant}' has no name: give NAME: FLAGS, such as 'few: --ral.n-envs 64'")
    return name.strip(), flags


def config_of(run: Run, flags: str) -> Config:
    """The run's settings with a variant's.

    Raises:
        ConfigError: an unknown flag, or one of another stage.
    """
    config = parse_train(["--start-from", str(run.path), "--name", "sweep", *shlex.split(flags)]).config
    if replace(config, ral=run.config.ral, critic=run.config.critic) != run.config:
        raise ConfigError(f"variant '{flags}' changes more than `ral` and `critic`: give settings of these two")
    return config


def folder_of(name: str) -> str:
    """A folder's name for a variant."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_")


def measured(experiment: Experiment, name: str, config: Config) -> dict[str, Any]:
    """Train one variant and measure its averaged policy at every temperature."""
    run = experiment.train(name, config)
    policy = experiment.policy(run)
    rows = {
        f"{t:g}": experiment.measure(name, "ral", policy, t)
        for t in (1.0, *experiment.base.config.evaluation.temperatures)
    }
    return {**figures_of(run), "rows": rows}


def figures_of(run: Run) -> dict[str, Any]:
    """What stage 3 of a run drew, took and knew: the AUC is the mean of its updates'."""
    lines, seconds = run.metrics("ral"), run.seconds()
    auc = [line["critic/heldout_auc"] for line in lines if "critic/heldout_auc" in line]
    return {
        "images": run.config.ral.n_envs,
        "updates": run.config.ral.n_updates,
        "seconds": seconds.get("ral_cpu", seconds["ral"]),
        "auc": sum(auc) / len(auc) if auc else None,
    }


def own_lines(run: Run) -> list[dict[str, Any]]:
    """The run's controls and its own RAL, in the form of a variant."""
    results = load_json(run.file("results.json"))
    found = []
    for name in CONTROLS:
        if name not in results["rows"]:
            continue
        rows = {"1": results["rows"][name]}
        rows |= {f"{row['temperature']:g}": row for row in results["sweeps"].get(name, ())}
        found.append({"name": f"`{name}`", **(figures_of(run) if name == "ral" else {}), "rows": rows})
    return found


def report(run: Run, variants: list[dict[str, Any]], console: Console) -> None:
    """The table on the screen and as Markdown, and the picture."""
    lines, folder = own_lines(run) + variants, run.file("sweep")
    temperatures = [f"{t:g}" for t in (1.0, *run.config.evaluation.temperatures)]
    headings = ["variant", "images per update", "updates", "seconds", "AUC"]
    headings += [*(f"FD, T = {t}" for t in temperatures), "recall", "NLL test"]
    cells = [
        [
            line["name"],
            *(
                cell(line.get(key), digits)
                for key, digits in (("images", 0), ("updates", 0), ("seconds", 0), ("auc", 2))
            ),
            *(cell(line["rows"].get(t, {}).get("fd"), 1) for t in temperatures),
            *(cell(line["rows"]["1"].get(key), 3) for key in ("recall", "nll_test")),
        ]
        for line in lines
    ]
    caption = (
        f"Stage 3 from the prior of {run.path.name}, one change at a time; {run.config.evaluation.extractor} features, "
        f"{run.config.evaluation.n_samples:,} samples a line, one seed; AUC of the critic on held-out images, "
        "mean over updates; seconds of stage 3."
    )
    write_text(folder / "table.md", markdown_table(headings, cells, caption))
    picture(folder / "sweep.png", lines, caption)
    shown = [[textwrap.shorten(row[0], 34, placeholder=" .."), *row[4 : 5 + len(temperatures)]] for row in cells]
    short = ["", "AUC", *(f"T {t}" for t in temperatures)]
    console.print(plain_table(short, shown, title="FD by temperature", caption=caption))
    for name in ("table.md", "sweep.png"):
        console.print(f"  {folder / name}", highlight=False)


def picture(path: Path, lines: Sequence[dict[str, Any]], caption: str) -> None:
    """FD of every line at T = 1, with the interval over its samples, and at its best temperature."""
    figure = Figure(figsize=(9, 1.6 + 0.34 * len(lines)), dpi=160, facecolor="white", layout="constrained")
    axes = figure.subplots()
    for height, line in enumerate(lines):
        rows, tone = line["rows"], "#555555" if line["name"].startswith("`mle") else "#1f77b4"
        low, high = rows["1"]["intervals"]["fd"]
        axes.errorbar(rows["1"]["fd"], height, xerr=(high - low) / 2, fmt="o", color=tone, capsize=2)
        best = min(row["fd"] for row in rows.values())
        axes.plot(best, height, "o", color=tone, markerfacecolor="none", markersize=10)
    axes.set_yticks(range(len(lines)), [line["name"].strip("`") for line in lines])
    axes.invert_yaxis()
    axes.set_xlabel("FD to the decoded training codes (lower is better)")
    axes.grid(axis="x", alpha=0.3)
    note = f"Points: T = 1, bars: 95 % interval over its samples; rings: the best temperature. {caption}"
    figure.supxlabel("\n".join(textwrap.wrap(note, 140)), fontsize=8, x=0.01, ha="left")
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", metadata={"Software": None}))


def cell(value: float | None, digits: int) -> str:
    """A figure, or a dash."""
    return "-" if value is None else f"{value:,.{digits}f}"


if __name__ == "__main__":
    torch.set_num_threads(1)  # the networks are small: two processes side by side use two cores better
    sys.exit(run_command(main, sys.argv[1:]))
