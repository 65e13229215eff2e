"""Does RL help? The demo with several seeds, every control beside RAL, means over the seeds.

    python examples/does_rl_help.py --seeds 0 1 2        # three demo runs, then one table and a figure per seed

Each seed trains everything anew (VQ-VAE, prior, RAL, controls), so the distances of different seeds have different
references. In ``runs/does_rl_help``: every seed's figures (``results.json``), the table (``table.md``) and the
frontiers. Run it again to continue, or to see the table.
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
from ral_gym.metrics.table import MEANINGS, ROWS
from ral_gym.pictures import save_frontier
from ral_gym.report.tables import markdown_table, mean_and_interval, plain_table
from ral_gym.runs.storage import save_json, write_text

GENERATED_ROWS = [row for row in ROWS if row not in ("reconstruction", "floor")]
FIGURES = {
    "fd": ("FD", 1),
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
ON_SCREEN = ("fd", "recall", "nll_test", "entropy", "temperature")
"""What 80 columns hold; ``table.md`` has all."""


@dataclass
class Arguments:
    """Seeds and settings."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds to average over; those the settings were tuned on are not among them."""
    preset: str = "demo"
    """Preset of every run."""
    data: str = "faces"
    """Images, as `examples/train_celeba.py` takes them."""
    algo: str = "reinforce"
    """Algorithm of stage 3."""
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
    folder = Path(arguments.runs) / "does_rl_help"
    settings = {"preset": arguments.preset, "data": arguments.data, "algo": arguments.algo}
    kept = {"extractor": every[0]["extractor"], "n_samples": every[0]["n_samples"], "settings": settings}
    intervals = {
        str(seed): {name: row.get("intervals") for name, row in r["rows"].items()} for seed, r in results.items()
    }
    save_json(folder / "results.json", {"seeds": list(results), **kept, "rows": rows, "intervals": intervals})
    known = [figure for figure in FIGURES if any(value is not None for row in rows.values() for value in row[figure])]
    headings, cells = table_of(rows, known)
    marked = [[f"`{row[0]}`", *row[1:], *seeds_of(row[0], rows)] for row in cells]
    headings += ["FD, per seed", "FD minus control's"]
    control = " Control: MLE continued, at its best temperature for rows at theirs; differences are paired by seed."
    write_text(folder / "table.md", markdown_table(headings, marked, caption_of(every, arguments) + control))
    title = f"Means over seeds {', '.join(map(str, arguments.seeds))}"
    shown = table_of(rows, [figure for figure in known if figure in ON_SCREEN])
    console.print(plain_table(*shown, title=title, caption=caption_of(every, arguments)))
    for seed, result in results.items():
        save_frontier_of(folder / f"frontier_seed{seed}.png", seed, result)
    for file in ("table.md", "results.json", *(f"frontier_seed{seed}.png" for seed in results)):
        console.print(f"  {folder / file}", highlight=False)


def train_seed(seed: int, arguments: Arguments, console: Console) -> dict[str, Any]:
    """The results of one run; an existing file is read."""
    flags = ["--preset", arguments.preset, "--data", arguments.data, "--algo", arguments.algo]
    flags += ["--seed", str(seed), "--runs", arguments.runs, *(["--quiet"] if arguments.quiet else [])]
    return train(parse_train(flags), console)


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
    differences = [a - b for a, b in zip(fds, rows[control]["fd"], strict=True) if a is not None and b is not None]
    against = "-" if name == control else mean_and_interval(differences, 1)
    return " / ".join("-" if fd is None else f"{fd:.1f}" for fd in fds), against


def caption_of(results: Sequence[dict[str, Any]], arguments: Arguments) -> str:
    """What the figures are."""
    measured = {figure for row in results[0]["rows"].values() for figure in row}
    several = "; means ± half the 95 % interval over them (Student t)" if len(results) > 1 else ""
    return (
        f"Preset {arguments.preset}, {arguments.algo}, seeds {', '.join(map(str, arguments.seeds))}{several}. "
        f"{results[0]['extractor']} features, n = {results[0]['n_samples']:,} per row and seed; distances to the "
        "decoded training codes; NLL and entropy in nats per code."
        + "".join(f" {MEANINGS[figure]}." for figure in ("memorisation", "memorisation_near") if figure in measured)
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
