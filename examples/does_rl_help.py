"""Does RL help? The demo with several seeds, every control beside RAL, means over the seeds.

    python examples/does_rl_help.py --seeds 0 1 2        # three demo runs, then one table and one figure

Each seed trains everything anew (VQ-VAE, prior, RAL, controls), so the distances of different seeds have different
references. Every seed's figures stand in ``runs/does_rl_help.json``. Run it again to continue, or to see the table.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from ral_gym.cli import parse_train, run_command, train
from ral_gym.figures import save_frontier
from ral_gym.metrics.table import ROWS
from ral_gym.storage import save_json

GENERATORS = [row for row in ROWS if row not in ("reconstruction", "floor")]
FIGURES = ("fd", "kid", "nll_test", "nll_new_people", "entropy", "temperature")


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
    results = []
    for seed in arguments.seeds:
        flags = ["--preset", arguments.preset, "--data", arguments.data, "--algo", arguments.algo]
        flags += ["--seed", str(seed), "--runs", arguments.runs, *(["--quiet"] if arguments.quiet else [])]
        results.append(train(parse_train(flags), console))
    summary = {
        row: {figure: [r["rows"][row].get(figure) for r in results] for figure in FIGURES}
        for row in GENERATORS
        if all(row in r["rows"] for r in results)
    }
    console.print(_table(summary, arguments, results))
    folder = Path(arguments.runs)
    save_json(folder / "does_rl_help.json", {"seeds": list(arguments.seeds), "rows": summary})
    for seed, result in zip(arguments.seeds, results, strict=True):
        sweeps = {
            name: [(row["temperature"], row["entropy"], row["fd"]) for row in rows]
            for name, rows in result["sweeps"].items()
        }
        path = folder / f"does_rl_help_seed{seed}.png"
        title = f"FD against entropy, seed {seed}, n = {result['n_samples']}"
        save_frontier(path, sweeps.pop("mle"), {}, title=title, sweeps=sweeps)
        console.print(f"  {path}", highlight=False)


def _table(summary: dict[str, dict[str, list[float]]], arguments: Arguments, results: list[dict[str, Any]]) -> Table:
    """Means over the seeds, of the FD also the standard deviation."""
    caption = f"{results[0]['extractor']} features, n = {results[0]['n_samples']} per row and seed, nats per code"
    style: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "show_edge": False, "pad_edge": False}
    table = Table(title=f"Means over seeds {', '.join(map(str, arguments.seeds))}", caption=caption, **style)
    for heading in ("row", "FD ± sd", "KID", "NLL\ntest", "NLL\nnew", "entropy", "T"):
        table.add_column(heading, justify="left" if heading == "row" else "right", no_wrap=True)
    for row, figures in summary.items():
        spread = f" ± {np.std(figures['fd'], ddof=1):.1f}" if len(figures["fd"]) > 1 else ""
        cells = [f"{np.mean(figures['fd']):.1f}{spread}", _mean(figures["kid"], 1)]
        cells += [_mean(figures[name], 3) for name in ("nll_test", "nll_new_people", "entropy")]
        table.add_row(row, *cells, _mean(figures["temperature"], 2))
    return table


def _mean(values: Sequence[float | None], digits: int) -> str:
    """The mean as text; "-" where a seed has no such figure."""
    return "-" if None in values else f"{np.mean(np.array(values, float)):.{digits}f}"


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
