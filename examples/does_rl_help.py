"""Does RL help? The long demo with several seeds, every control beside RAL, means over the seeds.

    python examples/does_rl_help.py --seeds 0 1 2        # three runs, then one table and a figure per seed
    python examples/does_rl_help.py --preset demo-cifar10 --data folder:PATH/train --test folder:PATH/test

Each seed trains everything anew (VQ-VAE, prior, RAL, controls), so the distances of different seeds have different
references. In ``runs/does_rl_help`` (with another preset its name is appended): every seed's figures
(``results.json``), the table and RAL's differences from every control (``table.md``), and the frontiers. Run it again
to continue, or to see the table.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from ral_gym.commands.arguments import parse_train
from ral_gym.commands.ending import run_command
from ral_gym.commands.train import train
from ral_gym.metrics.seeds import SeedDifference
from ral_gym.metrics.table import MEANINGS, ROWS
from ral_gym.pictures import save_frontier
from ral_gym.report.tables import markdown_table, mean_and_interval, plain_table
from ral_gym.runs.storage import save_json, write_text

GENERATED_ROWS = [row for row in ROWS if row not in ("reconstruction", "floor")]
FIGURES = {
    "fd": ("FD", 1),
    "fd_spread": ("FD\nspread", 1),
    "kid": ("KID", 1),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "nll_test": ("NLL test", 3),
    "nll_new_people": ("NLL new", 3),
    "entropy": ("entropy", 3),
    "memorisation": ("mem-\nory", 2),
    "memorisation_near": ("near\ncopies", 3),
    "temperature": ("T", 2),
}
"""Figure -> heading, digits. Those that no row has are left out."""
EXPLAINED = ("fd_spread", "memorisation", "memorisation_near")
"""Those that the caption explains."""
ON_SCREEN = ("fd", "recall", "nll_test", "entropy", "temperature")
"""What 80 columns hold; ``table.md`` has all."""


@dataclass
class Arguments:
    """Seeds and settings."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds to average over; those the settings were tuned on are not among them."""
    preset: str = "demo-converged"
    """Preset of every run."""
    data: str | None = None
    """Images, as `examples/train_celeba.py` takes them; None: the preset's."""
    test: str | None = None
    """Held-out images from a source of their own, `--data.test`; None: the preset's."""
    algo: str | None = None
    """Algorithm of stage 3; None: the preset's."""
    sampling_seeds: int | None = None
    """Seeds from which each row is sampled, `--evaluation.sampling-seeds`: 2 shows how much of an FD is noise of the
    evaluation. None: the preset's."""
    runs: str = "runs"
    """Folder that holds the run folders."""
    quiet: bool = False
    """No progress bars."""


def main(argv: Sequence[str], console: Console) -> None:
    """Train every seed, then print and save the means."""
    arguments = tyro.cli(Arguments, args=list(argv), description=__doc__)
    results = {seed: train_seed(seed, arguments, console) for seed in arguments.seeds}
    every = list(results.values())
    # figure -> one value per seed, of the rows that every seed has
    rows = {
        name: {figure: [figure_of(result["rows"][name], figure) for result in every] for figure in FIGURES}
        for name in GENERATED_ROWS
        if all(name in result["rows"] for result in every)
    }
    folder = folder_of(arguments)
    config = parse_train(flags_of(arguments)).config
    settings = {"preset": arguments.preset, "data": config.data.source, "algo": config.ral.algo}
    kept = {"extractor": every[0]["extractor"], "n_samples": every[0]["n_samples"], "settings": settings}
    intervals = {
        str(seed): {name: row.get("intervals") for name, row in r["rows"].items()} for seed, r in results.items()
    }
    save_json(folder / "results.json", {"seeds": list(results), **kept, "rows": rows, "intervals": intervals})
    known = [figure for figure in FIGURES if any(value is not None for row in rows.values() for value in row[figure])]
    headings, cells = table_of(rows, known)
    marked = [[f"`{row[0]}`", *row[1:], *seeds_of(row[0], rows)] for row in cells]
    headings += ["FD, per seed", "FD minus control's"]
    control = (
        " Control: MLE continued, at its best temperature for rows at theirs; differences are paired by seed, in bold "
        "where the interval excludes 0."
    )
    caption = caption_of(every, arguments, config.ral.algo)
    text = markdown_table(headings, marked, caption + control)
    write_text(folder / "table.md", "\n".join([text.rstrip(), "", *differences_of(rows, arguments.seeds)]) + "\n")
    title = f"Means over seeds {', '.join(map(str, arguments.seeds))}"
    shown = table_of(rows, [figure for figure in known if figure in ON_SCREEN])
    console.print(plain_table(*shown, title=title, caption=caption))
    for line in differences_of(rows, arguments.seeds):
        console.print(line, highlight=False, markup=False)
    for seed, result in results.items():
        save_frontier_of(folder / f"frontier_seed{seed}.png", seed, result)
    for file in ("table.md", "results.json", *(f"frontier_seed{seed}.png" for seed in results)):
        console.print(f"  {folder / file}", highlight=False)


def train_seed(seed: int, arguments: Arguments, console: Console) -> dict[str, Any]:
    """The results of one run; an existing file is read."""
    return train(parse_train([*flags_of(arguments), "--seed", str(seed)]), console)


def flags_of(arguments: Arguments) -> list[str]:
    """The training command's flags, but for the seed."""
    given: dict[str, Any] = {"--data": arguments.data, "--data.test": arguments.test, "--algo": arguments.algo}
    given["--evaluation.sampling-seeds"] = arguments.sampling_seeds
    flags = [word for flag, value in given.items() if value is not None for word in (flag, str(value))]
    quiet = ["--quiet"] if arguments.quiet else []
    return ["--preset", arguments.preset, *flags, "--runs", arguments.runs, *quiet]


def folder_of(arguments: Arguments) -> Path:
    """Where the table goes."""
    return Path(arguments.runs) / (
        "does_rl_help" + ("" if arguments.preset == "demo-converged" else f"_{arguments.preset}")
    )


def figure_of(row: dict[str, Any], figure: str) -> float | None:
    """A figure of a row; None where it has none."""
    value = row.get(figure)
    return None if value is None else float(value)


def table_of(
    rows: dict[str, dict[str, list[float | None]]], figures: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: means over the seeds with their intervals; of the temperature the mean alone."""
    cells = []
    for name, row in rows.items():
        line = [mean_and_interval(row[figure], FIGURES[figure][1]) for figure in figures]
        cells.append(
            [
                name,
                *(
                    cell.partition(" ")[0] if f == "temperature" else cell
                    for f, cell in zip(figures, line, strict=True)
                ),
            ]
        )
    return ["row", *(FIGURES[figure][0] for figure in figures)], cells


def seeds_of(name: str, rows: dict[str, dict[str, list[float | None]]]) -> tuple[str, str]:
    """The FD of each seed, and how far it is from that of MLE continued: seeds differ by more than rows do."""
    fds = rows[name]["fd"]
    control = "mle_continued_best_temperature" if name.endswith("best_temperature") else "mle_continued"
    one, other = (values_by_seed(row, range(len(fds))) for row in (rows[control], rows[name]))
    known = name != control and one.keys() & other.keys()
    against = SeedDifference.of(one, other).markdown() if known else "-"
    return " / ".join("-" if fd is None else f"{fd:.1f}" for fd in fds), against


def differences_of(rows: dict[str, dict[str, list[float | None]]], seeds: Sequence[int]) -> list[str]:
    """RAL's FD minus every control's, paired by seed: at temperature 1, and each at its best temperature."""
    lines = []
    for end, when in (("", "At temperature 1"), ("_best_temperature", "Each at its best temperature")):
        controls = [name + end for name in ("mle", "mle_continued", "mle_equal_time") if name + end in rows]
        ral = values_by_seed(rows.get("ral" + end), seeds)
        for control in controls if ral else ():
            other = values_by_seed(rows[control], seeds)
            lines.append(f"* {when}, RAL's FD minus that of `{control}`: {said_of(SeedDifference.of(other, ral))}.")
    return lines


def values_by_seed(row: dict[str, list[float | None]] | None, seeds: Sequence[int]) -> dict[int, float]:
    """Seed -> FD of a row; empty without the row."""
    return {} if row is None else {seed: fd for seed, fd in zip(seeds, row["fd"], strict=True) if fd is not None}


def said_of(found: SeedDifference) -> str:
    """Every seed's difference and, of several, their mean, its interval and what that says."""
    return found.each() + (f"; mean {found.ends()}, {found.verdict()}" if found.n > 1 else "")


def caption_of(results: Sequence[dict[str, Any]], arguments: Arguments, algo: str) -> str:
    """What the figures are."""
    measured = {figure for row in results[0]["rows"].values() for figure in row}
    several = "; means ± half the 95 % interval over them (Student t)" if len(results) > 1 else ""
    return (
        f"Preset {arguments.preset}, {algo}, seeds {', '.join(map(str, arguments.seeds))}{several}. "
        f"{results[0]['extractor']} features, n = {results[0]['n_samples']:,} per row and seed; distances to the "
        "decoded training codes; NLL and entropy in nats per code."
        + "".join(f" {MEANINGS[figure]}." for figure in EXPLAINED if figure in measured)
    )


def save_frontier_of(path: Path, seed: int, result: dict[str, Any]) -> None:
    """FD against entropy of one seed: the temperature sweeps of MLE, MLE continued and RAL."""
    sweeps = {
        name: [(row["temperature"], row["entropy"], row["fd"]) for row in rows]
        for name, rows in result["sweeps"].items()
    }
    title = f"FD against entropy, seed {seed}, n = {result['n_samples']}"
    save_frontier(path, sweeps.pop("mle"), {}, title=title, sweeps=sweeps)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
