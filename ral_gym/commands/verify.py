"""`ral-gym verify`: do the saved weights reproduce ``results.json``? Everything is measured again, nothing is written.

On the machine, device and number of threads that measured the run, every metric is reproduced exactly. Elsewhere sums
round differently, so that now and then another code is drawn, and the rest of its image differs too: the same
measurement with slightly different samples. Metrics then differ by a fraction of their intervals, the unit of
`--tolerance`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ral_gym.commands.arguments import VerifyArguments
from ral_gym.commands.extras import check_source
from ral_gym.commands.generate import open_run
from ral_gym.data.images import load_images
from ral_gym.errors import ConfigError, RunError, printable
from ral_gym.runs.results import load_results
from ral_gym.runs.run import Run
from ral_gym.stages.device import resolve_device
from ral_gym.stages.evaluate import check_measuring, load_priors, measure, results_of
from ral_gym.stages.generator_metrics import MEASUREMENT, GeneratorMetrics
from ral_gym.stages.levels import load_vqvae
from ral_gym.stages.sampling_noise import noise_of
from ral_gym.tokenizers.code_set import CodeSet

ROUNDING = 1e-6
"""Relative difference that counts as rounding."""
WITHOUT_INTERVAL = 0.02
"""Half the interval's width, for a metric without an interval; relative to the metric if that is above 1."""
MOST_SHOWN = 60
"""Most lines of the printed table."""
SETTINGS = ("extractor", "reference", "n_samples", "seed", "preset", "measurement", "held_out", "sampling_seeds")

BEST, BEST_GUIDANCE = "_best_temperature", "_best_guidance"

Rows = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Difference:
    """A metric that differs from results.json.

    Attributes:
        row: name of the row; `settings` for the settings of the whole table.
        metric: name of the metric, or of one end of its interval; empty for a whole row.
        saved: value in ``results.json``; None: missing there.
        again: value measured now; None: missing now.
        interval: half the width of its interval, or None.
    """

    row: str
    metric: str
    saved: Any
    again: Any
    interval: float | None = None

    def cells(self) -> list[str]:
        """Row, metric, saved, again, difference, and the difference in intervals."""
        apart, share = "-", "-"
        if _is_number(self.saved) and _is_number(self.again):
            difference = self.again - self.saved
            apart = f"{difference:+.3g}"
            share = f"{abs(difference) / self.interval:.2f}" if self.interval else "-"
        return [self.row, self.metric, _text(self.saved), _text(self.again), apart, share]


@dataclass
class Comparison:
    """The comparison of saved and measured rows.

    Attributes:
        differences: the metrics that differ, in the rows' order.
        compared: number of metrics compared, without interval ends.
        largest: the largest relative difference of a metric, including accepted ones.
        unknown: metrics that ``results.json`` does not have.
    """

    differences: list[Difference]
    compared: int
    largest: float
    unknown: list[str]


def verify_run(arguments: VerifyArguments, console: Console) -> Comparison:
    """Measure a finished run again, and print the differences from its results.

    Raises:
        ConfigError: the tolerance is out of range, or the extractor is not available.
        DataError: the run's images are not available.
        RunError: a metric differs; or the run is not finished, is damaged, or has no such row.
    """
    if not 0 <= arguments.tolerance < math.inf:
        raise ConfigError(f"--tolerance is {arguments.tolerance}: give 0 or more")
    device, run, results = resolve_device(arguments.device), *_open(arguments.run)
    check_source(run.config.data.source, run.config.evaluation.extractor)
    saved = flat_rows(results, run)
    if unknown := [name for name in arguments.rows if name not in saved]:
        raise RunError(f"{run.path} has no row {', '.join(unknown)}: choose among {', '.join(saved)}")
    check_measuring(run)
    vqvae, priors = load_vqvae(run, device), load_priors(run, device)
    codes = CodeSet.load(run.file("codes.safetensors"), vqvae.grid)
    images = load_images(run.config.data, seed=run.config.seed, progress=not arguments.quiet)
    measurement = results.get("measurement", 1)
    evaluation = GeneratorMetrics(run, vqvae, codes, images, device, measurement)
    if measurement < MEASUREMENT:
        _say(console, f"{run.path.name} was measured by an older rule ({measurement}), which is used again.")
    measured: Rows = {}
    only = {_of_sweep(name) for name in arguments.rows} or None
    measure(evaluation, priors, measured, only=only, progress=not arguments.quiet)
    again = results_of(run, evaluation, measured)
    rows = flat_rows(again, run)
    if only is not None:
        # If a generator was sampled at one temperature only, there is no best of several.
        rows = {name: row for name, row in rows.items() if name in only or not name.endswith((BEST, BEST_GUIDANCE))}
        saved = {name: row for name, row in saved.items() if name in rows or name in arguments.rows}
    settings, settings_again = ({"settings": {key: of.get(key) for key in SETTINGS}} for of in (results, again))
    found = compare({**settings, **saved}, {**settings_again, **rows}, arguments.tolerance)
    _report(run, found, len(saved), arguments.tolerance, console)
    return found


def compare(saved: Rows, again: Rows, tolerance: float = 0.0) -> Comparison:
    """Compare rows by name, metric by metric; if two metrics agree, also the ends of their intervals.

    Args:
        saved: rows of ``results.json``; metrics that they do not have are not compared (an older version wrote them).
        again: rows measured now.
        tolerance: differences up to this fraction of half an interval's width are accepted; 0: only rounding.
    """
    found = Comparison([], 0, 0.0, [])
    for name in [*saved, *(name for name in again if name not in saved)]:
        there, here = saved.get(name), again.get(name)
        if there is None or here is None:
            saved_row, row_again = (None if row is None else "a row" for row in (there, here))
            found.differences.append(Difference(name, "", saved_row, row_again))
            continue
        found.unknown += [key for key in here if key not in there and key not in found.unknown]
        for key in there:
            if key != "intervals":
                found.compared += 1
                found.differences += _compare_metric(found, name, key, there, here, tolerance)
    return found


def _compare_metric(
    found: Comparison, name: str, key: str, there: Mapping[str, Any], here: Mapping[str, Any], tolerance: float
) -> Iterator[Difference]:
    """Yield the metric if it differs, else the interval ends that differ."""
    old, new = there[key], here.get(key)
    ends = [row.get("intervals", {}).get(key) for row in (there, here)]
    shared = [row.get("intervals", {}).get("fd") for row in (there, here)] if noise_of(key) else ends
    width = max(((high - low) / 2 for low, high in filter(None, shared)), default=None)
    if _is_number(old) and _is_number(new):
        one, other = float(old), float(new)  # type: ignore[arg-type]
        found.largest = max(found.largest, abs(one - other) / max(abs(one), abs(other), 1e-12))
    if not _agree(old, new, width, tolerance):
        yield Difference(name, key, old, new, width)
    elif "intervals" in there and ends != [None, None]:
        for end, one_end, other_end in zip(("low", "high"), *((pair or [None, None]) for pair in ends), strict=True):
            if not _agree(one_end, other_end, width, tolerance):
                yield Difference(name, f"{key} ({end})", one_end, other_end, width)


def _agree(old: Any, new: Any, width: float | None, tolerance: float) -> bool:
    """Whether two metrics are the same, up to rounding or the tolerance."""
    if not (_is_number(old) and _is_number(new)) or (isinstance(old, int) and isinstance(new, int)):
        return bool(old == new)
    size = max(abs(float(old)), abs(float(new)))
    allowed = tolerance * (WITHOUT_INTERVAL * max(size, 1) if width is None else width)
    return bool(abs(old - new) <= max(allowed, ROUNDING * size))


def flat_rows(results: Any, run: Run) -> Rows:
    """Every row of the results by a unique name: the table's rows, `mle_at_0.85`, `mle_guided_2`, `ral_after_10`.

    Raises:
        RunError: the results were not written by ral_gym.
    """
    try:
        rows = dict(results["rows"])
        for start, sweep in results["sweeps"].items():
            rows |= {f"{start}_at_{row['temperature']:g}": row for row in sweep if row != rows.get(start)}
        for start, sweep in results.get("guided", {}).items():
            rows |= {f"{start}_guided_{row['guidance']:g}": row for row in sweep if row["guidance"] != 1}
        for row in results["checkpoints"]:
            rows[f"ral_after_{row['updates']}"] = {key: value for key, value in row.items() if key != "updates"}
        for row in rows.values():
            if not isinstance(row["fd"], float | int) or not isinstance(row.get("intervals", {}), dict):
                raise TypeError(f"a metric of {row} is not a number")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{run.file('results.json')} is not a results file; remove it to evaluate again") from error
    return rows


def _open(path: str) -> tuple[Run, Any]:
    """The run and its results.

    Raises:
        RunError: not a run folder, or no results in it.
    """
    folder = Path(path)
    if (folder / "config.json").is_file() and not (folder / "results.json").is_file():
        raise RunError(f"{path} has no results.json to verify: ral-gym evaluate {path} measures a trained run")
    run = open_run(path)
    return run, load_results(run.file("results.json"))


def _of_sweep(name: str) -> str:
    """The name to pass to `measure`: a sweep is measured as a whole."""
    for between, best in (("_at_", BEST), ("_guided_", BEST_GUIDANCE)):
        start, found, _ = name.partition(between)
        if found:
            return start + best
    return name


def _report(run: Run, found: Comparison, n_rows: int, tolerance: float, console: Console) -> None:
    """Print the differences and what was compared; raise an error if something differs."""
    allowed = (
        f"{tolerance:g} of the 95 % interval's half width" if tolerance else f"rounding ({ROUNDING:g} of a metric)"
    )
    if found.differences:
        console.print(_table(found.differences[:MOST_SHOWN]))
        if len(found.differences) > MOST_SHOWN:
            _say(console, f"... and {len(found.differences) - MOST_SHOWN:,} more")
    if found.unknown:
        _say(console, f"Not in results.json, so not compared: {', '.join(found.unknown)}.")
    _say(
        console,
        f"{run.path.name}: {found.compared:,} metrics of {n_rows} rows measured again from the saved weights; "
        f"accepted: {allowed}; largest difference: {found.largest:.2g} of a metric.",
    )
    if found.differences:
        names = list(dict.fromkeys(difference.row for difference in found.differences))
        more = f" and {len(names) - 6} more rows" if len(names) > 6 else ""
        remedy = "" if tolerance else "; on another machine, device or number of threads use --tolerance 0.5"
        raise RunError(
            f"{run.path}: {len(found.differences)} metrics differ from results.json, in {', '.join(names[:6])}{more}"
            f"{remedy}"
        )
    _say(console, "All agree.")


def _table(differences: list[Difference]) -> Table:
    table = Table(title="What differs", box=box.SIMPLE_HEAD, padding=0, show_edge=False, pad_edge=False)
    table.add_column("row", overflow="fold")
    table.add_column("metric", overflow="fold")
    for heading in ("saved", "again", "difference", "in half\nintervals"):
        table.add_column(heading, justify="right", no_wrap=True)
    for difference in differences:
        table.add_row(*difference.cells())
    return table


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}" if _is_number(value) else str(value)


def _say(console: Console, line: str) -> None:
    console.print(printable(line), highlight=False, soft_wrap=True, markup=False)
