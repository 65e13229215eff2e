"""The results table: one row per generator, for the terminal and for the README."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

ROWS = (
    "mle",
    "mle_ema",
    "mle_continued",
    "mle_equal_time",
    "mle_temperature",
    "mle_best_temperature",
    "mle_best_guidance",
    "mle_continued_best_temperature",
    "mle_equal_time_best_temperature",
    "mle_rejection",
    "ral",
    "ral_live",
    "ral_best_temperature",
    "ral_best_guidance",
    "reconstruction",
    "floor",
)


class Column(NamedTuple):
    """A column of the table.

    Attributes:
        heading: may be broken by line breaks.
        decimals: at least this many; None: whole numbers.
        significant: show three significant digits: for metrics whose scale depends on the extractor.
    """

    heading: str
    decimals: int | None = 0
    significant: bool = False


COLUMNS = {
    "fd": Column("FD", 1, significant=True),
    "fd_spread": Column("FD\nspread", 1, significant=True),
    "kid": Column("KID", 0, significant=True),
    "accuracy": Column("accu-\nracy", 3),
    "class_fd": Column("class\nFD", 1, significant=True),
    "class_kid": Column("class\nKID", 0, significant=True),
    "precision": Column("preci-\nsion", 3),
    "recall": Column("re-\ncall", 3),
    "density": Column("den-\nsity", 3),
    "coverage": Column("cover-\nage", 3),
    "memorisation": Column("mem-\nory", 2),
    "memorisation_near": Column("near\ncopies", 3),
    "memorisation_new_people": Column("memory\nnew", 2),
    "nll_test": Column("NLL\ntest", 3),
    "nll_new_people": Column("NLL\nnew", 3),
    "nll_no_label": Column("NLL no\nlabel", 3),
    "nll_wrong_label": Column("NLL\nwrong", 3),
    "entropy": Column("en-\ntropy", 3),
    "diversity": Column("diver-\nsity", 3),
    "samples_per_kept": Column("cost", 1),
    "n": Column("n", None),
    "temperature": Column("T", 2),
    "guidance": Column("s", 2),
}
"""Metric -> its column; columns of your own (`evaluation.metrics`) follow these."""
MEANINGS = {
    "fd_spread": (
        "FD spread: the largest FD of the row minus the smallest, of samples from several seeds, which is noise of the "
        "evaluation"
    ),
    "accuracy": "accuracy: samples that a small classifier, which is no reward, takes for the class asked for",
    "class_fd": "class FD: that of each class, averaged over classes",
    "class_kid": "class KID: that of each class, averaged over classes",
    "memorisation": (
        "memory: how often a sample is nearer to a training image than a held-out image is, 0.5 where they are alike, "
        "1 for copies"
    ),
    "memorisation_near": "near copies: samples as near as the nearest 5 % of held-out images",
    "memorisation_new_people": "memory new: the same against new people",
    "nll_test": "NLL (held-out images, new people) and entropy in nats per code",
    "nll_no_label": "NLL no label, NLL wrong: the same without labels, and with wrong ones",
    "guidance": "s: scale of classifier-free guidance",
    "diversity": "diversity: share of codes in which two samples differ",
    "samples_per_kept": "cost: samples drawn per sample kept",
}
"""Column -> its explanation in the caption."""
OWN = Column("", 0, significant=True)
"""Every column of your own; its heading is its name."""
MOST_DECIMALS = 6
"""Numbers that need more are written as 1.23e-07."""
WIDTH = 80
"""Width of the narrowest terminal that the table fits, in characters."""
FIRST = "fd"
"""The columns that the terminal always shows, with intervals; columns of your own follow."""
THEN = (
    *("fd_spread", "guidance", "accuracy", "recall", "memorisation", "nll_test", "entropy", "temperature"),
    *("nll_new_people", "kid", "precision", "diversity", "samples_per_kept", "coverage", "density"),
)
"""The columns that it shows while there is room, most important first."""


def results_table(results: Mapping[str, Any]) -> Table:
    """The results as a table for the terminal: as many of the columns as 80 characters hold.

    Args:
        results: what `results.json` holds: `rows` (name -> metrics), `extractor`, `n_samples`, `seed`, `seconds`.
            Metrics that are missing or None are shown as "-", a column without any is left out.
    """
    names, known = row_names(results), columns_of(results)
    own = [key for key in known if key not in COLUMNS]
    cells = {key: [_cell(results["rows"][name], key, with_interval=key == "fd") for name in names] for key in known}
    headings = {key: _heading(key) if key in COLUMNS else _heading(key).replace(" ", "\n") for key in known}
    widths = {key: max(map(len, [*headings[key].split("\n"), *column])) + 1 for key, column in cells.items()}
    room = WIDTH - max(map(len, [*names, "row"]))
    shown = []
    for key in (FIRST, *own, *THEN):
        if key in known and (key == FIRST or widths[key] <= room):
            shown.append(key)
            room -= widths[key]
    style: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": 0, "show_edge": False, "pad_edge": False}
    table = Table(title="Results", caption=results_caption(results, shown), **style)
    table.add_column("row", justify="left", no_wrap=True)
    shown = [key for key in known if key in shown]
    for key in shown:
        table.add_column(headings[key], justify="right", no_wrap=True)
    for number, name in enumerate(names):
        table.add_row(name, *(cells[key][number] for key in shown))
    return table


def results_markdown(results: Mapping[str, Any]) -> str:
    """All columns that have a number as Markdown, each with its interval, and the caption below."""
    keys = columns_of(results)
    lines = [
        "| row | " + " | ".join(map(heading, keys)) + " |",
        "|---|" + "---:|" * len(keys),
        *(
            f"| `{name}` | " + " | ".join(_cell(results["rows"][name], key, with_interval=True) for key in keys) + " |"
            for name in row_names(results)
        ),
    ]
    return "\n".join(lines) + f"\n\n{results_caption(results)}\n"


def results_caption(results: Mapping[str, Any], keys: Sequence[str] | None = None) -> str:
    """How the metrics were measured (extractor, sample count, seed, time), and what they and the intervals mean.

    Args:
        results: as for `results_table`.
        keys: the columns that are shown; None: all that have a number.
    """
    keys, rows = columns_of(results) if keys is None else keys, results["rows"]
    others = {name: row["n"] for name, row in rows.items() if row.get("n") not in (None, results.get("n_samples"))}
    fewer = ", ".join(f"{name} {number_text(n)}" for name, n in others.items())
    kinds = " and ".join(COLUMNS[key].heading for key in ("fd", "kid") if key in keys)
    own = {key: words for key, words in results.get("metrics", {}).items() if key in keys}
    parts = [
        f"{kinds or 'Metrics'} on {results.get('extractor', '-')} features",
        f"{number_text(results.get('n_samples'))} samples per generator{f' ({fewer})' if fewer else ''}",
        *(words for key, words in MEANINGS.items() if key in keys),
        *(f"{key}: {words}" for key, words in own.items() if words),
    ]
    counts = {"nll_test": "test", "nll_new_people": "new_people"}
    n_held_out = [number_text(results.get("held_out", {}).get(of)) for key, of in counts.items() if key in keys]
    if n_held_out and "held_out" in results:
        parts.append(f"NLL of {' and '.join(n_held_out)} images")
    if any(interval(row, key) for row in rows.values() for key in keys):
        parts.append("intervals 95 %, over samples or held-out images, not over seeds")
    if "fd_spread" in keys:
        parts.append(f"{number_text(results.get('sampling_seeds'))} sampling seeds per row")
    parts.append(f"seed {'-' if results.get('seed') is None else format(results['seed'], 'd')}")
    if results.get("seconds"):
        parts.append(f"{sum(results['seconds'].values()):,.0f} s in all")
    return "; ".join(parts) + "."


def heading(key: str) -> str:
    """A column's heading on one line."""
    return _heading(key).replace("-\n", "").replace("\n", " ")


def _heading(key: str) -> str:
    return COLUMNS[key].heading if key in COLUMNS else key.replace("_", " ")


def columns_of(results: Mapping[str, Any]) -> list[str]:
    """The columns in which some row has a number: the table's own, and those of `evaluation.metrics`."""
    rows = results["rows"].values()
    return [key for key in (*COLUMNS, *results.get("metrics", {})) if any(row.get(key) is not None for row in rows)]


def row_names(results: Mapping[str, Any]) -> list[str]:
    """Rows in the table's order; unknown ones last."""
    rows = results["rows"]
    return [name for name in ROWS if name in rows] + [name for name in rows if name not in ROWS]


def interval(row: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    """The 95 % interval of a metric."""
    ends = row.get("intervals", {}).get(key)
    return None if ends is None else (float(ends[0]), float(ends[1]))


class Text(NamedTuple):
    """A metric as text: its value ("-" where there is none), the ends and half the width of its interval."""

    value: str
    low: str = ""
    high: str = ""
    half: str = ""


def metric_text(row: Mapping[str, Any], key: str) -> Text:
    """A metric as every table (terminal, Markdown, report) writes it.

    Value and interval have equally many decimals. In columns of significant digits these are three of the value and at
    least one of the interval, so that features of a small scale do not read 0.0. `half` is to the farther end.
    """
    value, ends = row.get(key), interval(row, key)
    if value is None:
        return Text("-")
    column, decimals = COLUMNS.get(key, OWN), COLUMNS.get(key, OWN).decimals
    numbers = [value] if ends is None else [value, *ends, max(value - ends[0], ends[1] - value)]
    if decimals is not None and column.significant:
        decimals = max(decimals, _decimals(value, 3), _decimals(numbers[-1], 1))
    return Text(*(number_text(number, decimals) for number in numbers))


def number_text(value: float | None, decimals: int | None = None) -> str:
    """A number with this many decimals (None: a whole number); "-" if there is none."""
    if value is None:
        return "-"
    if decimals is None:
        return f"{value:,d}"
    if decimals > MOST_DECIMALS:
        return f"{value:.2e}" if value else "0"
    return f"{value:.{decimals}f}" if decimals else f"{value:,.0f}"


def _decimals(value: float, digits: int) -> int:
    """Decimals that show this many significant digits."""
    return digits - 1 - math.floor(math.log10(abs(value))) if value and math.isfinite(value) else 0


def _cell(row: Mapping[str, Any], key: str, with_interval: bool) -> str:
    """A metric, with its interval if it has one: 17.4 ±1.2."""
    text = metric_text(row, key)
    return f"{text.value} ±{text.half}" if with_interval and text.half else text.value
