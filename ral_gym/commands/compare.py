"""`ral-gym compare`: tables and samples of runs side by side; over seeds, with intervals of paired differences."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text as Styled
from torch import Tensor

from ral_gym.commands.generate import generator_files, need, open_run
from ral_gym.commands.look_arguments import CompareArguments
from ral_gym.commands.results import say
from ral_gym.config.flags import settings
from ral_gym.errors import ConfigError, RunError
from ral_gym.metrics.intervals import Estimate, mean_estimate
from ral_gym.metrics.seeds import ON_EVERY_SEED, SeedDifference
from ral_gym.metrics.table import Text
from ral_gym.pictures import save_comparison
from ral_gym.runs.results import load_results
from ral_gym.runs.run import Run
from ral_gym.runs.storage import write_text
from ral_gym.stages.device import resolve_device
from ral_gym.stages.levels import GENERATORS, load_generator, load_vqvae
from ral_gym.stages.pictures import balanced_labels, sample_codes
from ral_gym.tokenizers.code_set import decode_codes

ROWS = {"mle": "prior", "ral": "RAL"}
"""The rows of a run's table that are compared, and what they are called here."""
METRICS = {
    "fd": "FD",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "nll_test": "NLL",
    "entropy": "entropy",
}
_SEED = re.compile(r"[-_. ]?seed[-_. ]?\d+")
"""The part of a run's name that tells its seed."""
MOST_RUNS = 24
Cell = Estimate | SeedDifference | float | None
SAME = ("extractor", "n_samples", "reference")
"""What tables must share for their distances to compare."""


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only.

    Attributes:
        name: a short name.
        runs: seed -> run.
        results: seed -> results.
    """

    name: str
    runs: dict[int, Run]
    results: dict[int, dict[str, Any]]

    def values(self, row: str, metric: str) -> dict[int, float]:
        """A metric of a row of the table, by seed; seeds that lack it are left out."""
        found = {seed: results["rows"].get(row, {}).get(metric) for seed, results in self.results.items()}
        return {seed: float(value) for seed, value in found.items() if value is not None}


@dataclass(frozen=True)
class Line:
    """A row of the comparison: what it is of, and every metric; None where there is none."""

    name: str
    cells: dict[str, Cell]


def compare_runs(arguments: CompareArguments, console: Console) -> list[Path]:
    """Print the tables, and write the page and the picture; returns their paths.

    Raises:
        ConfigError: fewer than two runs, or too many.
        RunError: not a run folder, or one that has not been measured.
    """
    paths = [Path(path) for path in arguments.runs]
    if not 2 <= len({path.resolve() for path in paths}) == len(paths) <= MOST_RUNS:
        raise ConfigError(f"compare got {len(paths)} run(s): give 2 to {MOST_RUNS} different run folders")
    groups = grouped([open_run(str(path)) for path in paths])
    lines, differences = values_of(groups), paired(groups)
    notes = [*findings(differences), *notes_of(groups)]
    console.print(terminal_table("Runs", lines))
    if differences:
        console.print(terminal_table("Differences, paired by seed", differences))
    say(console, notes)
    output = Path(arguments.output or paths[0].parent / "comparison.html")
    if output.suffix not in (".html", ".png"):
        raise ConfigError(f"--output is {output}: give a name that ends with .html or .png")
    drawn = {name: images for name, images in draw(groups, arguments).items() if images is not None}
    picture = output.with_suffix(".png")
    written = []
    if drawn:
        caption = f"{arguments.n} images each, not selected; seed {arguments.seed}: equal random numbers"
        save_comparison(picture, drawn, title="Samples of the runs", caption=caption)
        written.append(picture)
    if output.suffix == ".html":
        write_text(output, html(groups, lines, differences, notes, drawn, arguments.seed))
        written.insert(0, output)
    say(console, [f"  {path}" for path in written])
    return written


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs of equal settings but for their seeds together, in the order of the first of each.

    Raises:
        RunError: a run has not been measured, or two have the same settings and the same seed.
    """
    found: dict[str, Group] = {}
    for run in runs:
        need(run, ["results.json"], f"measure it with ral-gym evaluate {run.path}")
        results = load_results(run.file("results.json"))
        same = dataclasses.asdict(dataclasses.replace(run.config, seed=0, preset=""))
        key = json.dumps(same, sort_keys=True, default=str)
        group = found.setdefault(key, Group(run.path.name, {}, {}))
        if run.config.seed in group.runs:
            other = group.runs[run.config.seed].path
            raise RunError(f"{other} and {run.path} have equal settings and seeds: leave one of them out")
        group.runs[run.config.seed], group.results[run.config.seed] = run, results
    groups = list(found.values())
    several = [
        dataclasses.replace(group, name=f"{_SEED.sub('', group.name)} ({len(group.runs)} seeds)")
        if len(group.runs) > 1
        else group
        for group in groups
    ]
    if len({group.name for group in several}) < len(several):
        return [dataclasses.replace(group, name=str(next(iter(group.runs.values())).path)) for group in several]
    return several


def values_of(groups: Sequence[Group]) -> list[Line]:
    """Every metric of the prior and of RAL; of several seeds their mean."""
    lines = []
    for group, (row, called) in itertools.product(groups, ROWS.items()):
        cells: dict[str, Cell] = {}
        for metric in METRICS:
            values = list(group.values(row, metric).values())
            several = len(values) > 1
            cells[metric] = mean_estimate(values, method="over seeds") if several else values[0] if values else None
        if any(cell is not None for cell in cells.values()):
            lines.append(Line(f"{group.name}: {called}", cells))
    return lines


def paired(groups: Sequence[Group]) -> list[Line]:
    """RAL minus the prior of the same run, and RAL minus the first group's RAL of the same seed; two seeds or more."""
    first = groups[0]
    lines = [_difference(f"{group.name}: RAL - prior", group, "mle", group, "ral") for group in groups]
    lines += [_difference(f"RAL, {group.name} - {first.name}", first, "ral", group, "ral") for group in groups[1:]]
    return [line for line in lines if any(cell is not None for cell in line.cells.values())]


def _difference(name: str, one: Group, before: str, other: Group, after: str) -> Line:
    cells: dict[str, Cell] = {}
    for metric in METRICS:
        first, second = one.values(before, metric), other.values(after, metric)
        shared = first.keys() & second.keys()
        cells[metric] = SeedDifference.of(first, second) if len(shared) > 1 else None
    return Line(name, cells)


def findings(differences: Sequence[Line]) -> list[str]:
    """Which differences are beyond their intervals, and which have the same sign on every seed only."""
    beyond: list[str] = []
    same: list[str] = []
    for line in differences:
        known = {METRICS[metric]: cell for metric, cell in line.cells.items() if isinstance(cell, SeedDifference)}
        for found, told in (
            (beyond, [metric for metric, cell in known.items() if cell.beyond]),
            (same, [metric for metric, cell in known.items() if cell.on_every_seed and not cell.beyond]),
        ):
            if told:
                found.append(f"{line.name} ({', '.join(told)})")
    if not differences:
        return []
    notes = [f"Intervals that exclude 0: {'; '.join(beyond) or 'none'}."]
    return notes + ([f"Same sign {ON_EVERY_SEED}: {'; '.join(same)}."] if same else [])


def notes_of(groups: Sequence[Group]) -> list[str]:
    """What to know of the tables."""
    notes = []
    for name in SAME:
        there = {str(results.get(name)) for group in groups for results in group.results.values()}
        if len(there) > 1:
            notes.append(f"Distances do not compare: {name} differs ({', '.join(sorted(there))}).")
    if len({group_images(group) for group in groups}) > 1:
        notes.append("Distances do not compare: the runs have different images or tokenizers, and so other references.")
    if any(len(group.runs) > 1 for group in groups):
        notes.append("Several seeds: mean and 95 % interval by Student's t over seeds; differences are paired by seed.")
    if any(len(group.runs) == 1 for group in groups):
        notes.append("One seed: nothing is known of how much another seed would change.")
    return notes


def group_images(group: Group) -> str:
    """What the references of a group's distances depend on: the images and the tokenizer's settings."""
    config = next(iter(group.runs.values())).config
    return repr((config.data.source, config.data.image_size, config.data.limit, config.vqvae))


def draw(groups: Sequence[Group], arguments: CompareArguments) -> dict[str, Tensor | None]:
    """Images (n, C, S, S) uint8 of each group's first run, all from the same random numbers; None without weights.

    Raises:
        ConfigError: n is out of range.
    """
    if not 1 <= arguments.n <= 256:
        raise ConfigError(f"--n is {arguments.n}: give 1 to 256 images")
    device = resolve_device(arguments.device)
    return {group.name: _drawn(next(iter(group.runs.values())), arguments, device) for group in groups}


def _drawn(run: Run, arguments: CompareArguments, device: torch.device) -> Tensor | None:
    name = "policy_ema" if run.has("policy_ema.safetensors") else "prior"
    if not all(map(run.has, ["vqvae.safetensors", *generator_files(run, name)])):
        return None
    prior: Any = load_generator(run, name, device)
    labels = balanced_labels(arguments.n, prior.grid.classes) if prior.grid.classes else None
    codes = sample_codes(prior, arguments.n, arguments.seed, 1.0, labels=labels)
    return decode_codes(load_vqvae(run, device), codes)


def terminal_table(title: str, lines: Sequence[Line]) -> Table:
    """The lines as a table; metrics that no line has are left out."""
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    shown = shown_metrics(lines)
    for metric in shown:
        table.add_column(METRICS[metric], justify="right")
    for line in lines:
        table.add_row(line.name, *(_marked(line.cells[metric]) for metric in shown))
    return table


def shown_metrics(lines: Sequence[Line]) -> list[str]:
    """The metrics that some line has."""
    return [metric for metric in METRICS if any(line.cells[metric] is not None for line in lines)]


def _marked(cell: Cell) -> Styled:
    """A cell's words: a difference is bold if its interval excludes 0."""
    bold = isinstance(cell, SeedDifference) and cell.beyond
    return Styled("\n".join(_words(cell)), style="bold" if bold else "")


def _words(cell: Cell) -> list[str]:
    """A cell's value and, below it, half of its interval."""
    if isinstance(cell, SeedDifference):
        cell = cell.value if cell.interval is None else cell.interval
    if cell is None:
        return ["-"]
    if isinstance(cell, Estimate):
        return [_figure(cell.value), f"± {_figure((cell.high - cell.low) / 2)}"]
    return [_figure(cell)]


def _figure(value: float) -> str:
    """Four significant digits, without an exponent where that is short."""
    if not math.isfinite(value):
        return str(value)
    digits = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{digits}f}" if digits <= 5 else f"{value:.3g}"


def html(
    groups: Sequence[Group],
    lines: Sequence[Line],
    differences: Sequence[Line],
    notes: Sequence[str],
    drawn: Mapping[str, Tensor],
    seed: int,
) -> str:
    """The page: one file that loads nothing else."""
    from ral_gym.report import page
    from ral_gym.report.figures import strip

    tables = [_page_table("Runs", lines)]
    if differences:
        tables += [page.paragraph("Differences, paired by seed:")]
        tables += [_page_table("Differences, paired by seed", differences)]
    figures = [
        page.figure(f"run-{number}", strip(images, f"samples of {name}", 4), name, _caption(groups, name, seed))
        for number, (name, images) in enumerate(drawn.items())
    ]
    sections = [
        page.Section("table", "Tables", Markup("").join([*tables, *map(page.paragraph, notes)])),
        page.Section("samples", "Samples", page.grid(figures, "maps")),
        page.Section("settings", "Settings that differ", page.definitions(differing(groups), code=True)),
    ]
    title = " and ".join(group.name for group in groups) if len(groups) < 4 else f"{len(groups)} runs"
    return page.page(f"{title}, compared", page.paragraph("Lower FD and KID are better."), sections, "ral-gym compare")


def _page_table(label: str, lines: Sequence[Line]) -> Markup:
    from ral_gym.report import page

    def text(cell: Cell) -> Text:
        if isinstance(cell, SeedDifference):
            cell = cell.interval
        if isinstance(cell, Estimate):
            return Text(_figure(cell.value), _figure(cell.low), _figure(cell.high))
        return Text(_words(cell)[0])

    shown = shown_metrics(lines)
    rows = [(line.name, [text(line.cells[metric]) for metric in shown]) for line in lines]
    return page.table(label, ["", *(METRICS[metric] for metric in shown)], rows)


def _caption(groups: Sequence[Group], name: str, seed: int) -> str:
    run = next(next(iter(group.runs.values())) for group in groups if group.name == name)
    which = "policy_ema" if run.has("policy_ema.safetensors") else "prior"
    return f"{GENERATORS[which]} of {run.path}; not selected; seed {seed}, equal random numbers for all runs."


def differing(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """The settings in which the groups differ: name, and its value in every group."""
    told = [settings(next(iter(group.runs.values())).config) for group in groups]
    names = list(dict.fromkeys(name for one in told for name in one if name not in ("seed", "preset")))
    found = []
    for name in names:
        values = [str(one.get(name, "-")) for one in told]
        if len(set(values)) > 1:
            found.append((name, "; ".join(values)))
    return found or [("none", "the runs differ in their seeds only" if len(groups) == 1 else "no setting differs")]
