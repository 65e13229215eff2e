"""The results table: one row per generator, for the terminal and for the README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

ROWS = (
    "mle",
    "mle_ema",
    "mle_continued",
    "mle_temperature",
    "mle_best_temperature",
    "mle_continued_best_temperature",
    "mle_rejection",
    "ral",
    "ral_live",
    "ral_best_temperature",
    "reconstruction",
    "floor",
)
COLUMNS = {
    "fd": ("FD", ".1f"),
    "kid": ("KID", ""),
    "precision": ("preci-\nsion", ".3f"),
    "recall": ("re-\ncall", ".3f"),
    "density": ("den-\nsity", ".3f"),
    "coverage": ("cover-\nage", ".3f"),
    "memorisation": ("mem-\nory", ".2f"),
    "memorisation_near": ("near\ncopies", ".3f"),
    "memorisation_new_people": ("memory\nnew", ".2f"),
    "nll_test": ("NLL\ntest", ".3f"),
    "nll_new_people": ("NLL\nnew", ".3f"),
    "entropy": ("en-\ntropy", ".3f"),
    "diversity": ("diver-\nsity", ".3f"),
    "samples_per_kept": ("cost", ".1f"),
    "n": ("n", ",d"),
    "temperature": ("T", ".2f"),
}
"""Figure -> its heading, which may be broken, and its format."""
MEANINGS = {
    "memorisation": (
        "memory: how often a sample is nearer to a training image than a held-out image is, 0.5 where they are alike, "
        "1 for copies"
    ),
    "memorisation_near": "near copies: samples as near as the nearest 5 % of held-out images",
    "memorisation_new_people": "memory new: the same against new people",
    "nll_test": "NLL (held-out images, new people) and entropy in nats per code",
    "diversity": "diversity: share of codes in which two samples differ",
    "samples_per_kept": "cost: samples drawn per sample kept",
}
"""Column -> what the caption says of it."""
WIDTH = 80
"""Columns of the narrowest terminal that the table fits."""
FIRST = ("fd", "recall", "memorisation", "nll_test", "entropy", "temperature")
"""What the terminal always shows; FD with its interval."""
THEN = ("nll_new_people", "kid", "precision", "diversity", "samples_per_kept", "coverage", "density")
"""What it shows as well while there is room, the most wanted first."""


def results_table(results: Mapping[str, Any]) -> Table:
    """The results as a table for the terminal: as many of the columns as 80 characters hold.

    Args:
        results: what `results.json` holds: `rows` (name -> figures), `extractor`, `n_samples`, `seed`, `seconds`.
            Figures that are missing or None are shown as "-", a column without any is left out.
    """
    names, known = row_names(results), columns_of(results)
    cells = {key: [_cell(results["rows"][name], key, with_interval=key == "fd") for name in names] for key in known}
    widths = {key: max(map(len, [*COLUMNS[key][0].split("\n"), *column])) + 1 for key, column in cells.items()}
    room = WIDTH - max(map(len, [*names, "row"]))
    shown = []
    for key in (*FIRST, *THEN):
        if key in known and (key in FIRST or widths[key] <= room):
            shown.append(key)
            room -= widths[key]
    style: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": 0, "show_edge": False, "pad_edge": False}
    table = Table(title="Results", caption=results_caption(results, shown), **style)
    table.add_column("row", justify="left", no_wrap=True)
    shown = [key for key in known if key in shown]
    for key in shown:
        table.add_column(COLUMNS[key][0], justify="right", no_wrap=True)
    for number, name in enumerate(names):
        table.add_row(name, *(cells[key][number] for key in shown))
    return table


def results_markdown(results: Mapping[str, Any]) -> str:
    """All columns that have a figure as Markdown, each figure with its interval, and the caption below."""
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
    """What the figures were measured with: extractor, sample count, seed, time; what they and the intervals are.

    Args:
        results: as for `results_table`.
        keys: the columns that are shown; None: all that have a figure.
    """
    keys, rows = columns_of(results) if keys is None else keys, results["rows"]
    others = {name: row["n"] for name, row in rows.items() if row.get("n") not in (None, results.get("n_samples"))}
    fewer = ", ".join(f"{name} {number_text(n, ',d')}" for name, n in others.items())
    kinds = " and ".join(COLUMNS[key][0] for key in ("fd", "kid") if key in keys)
    parts = [
        f"{kinds or 'Figures'} on {results.get('extractor', '-')} features",
        f"{number_text(results.get('n_samples'), ',d')} samples per generator{f' ({fewer})' if fewer else ''}",
        *(words for key, words in MEANINGS.items() if key in keys),
    ]
    if any(interval(row, key) for row in rows.values() for key in keys):
        parts.append("intervals 95 %, over samples or held-out images, not over seeds")
    parts.append(f"seed {number_text(results.get('seed'), 'd')}")
    if results.get("seconds"):
        parts.append(f"{sum(results['seconds'].values()):,.0f} s in all")
    return "; ".join(parts) + "."


def heading(key: str) -> str:
    """A column's heading on one line."""
    return COLUMNS[key][0].replace("-\n", "").replace("\n", " ")


def columns_of(results: Mapping[str, Any]) -> list[str]:
    """The columns in which some row has a figure."""
    rows = results["rows"].values()
    return [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]


def row_names(results: Mapping[str, Any]) -> list[str]:
    """Rows in the table's order; unknown ones last."""
    rows = results["rows"]
    return [name for name in ROWS if name in rows] + [name for name in rows if name not in ROWS]


def interval(row: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    """The 95 % interval of a figure: in `intervals`, or beside the value as an estimate's `low` and `high`."""
    value = row.get(key)
    ends = (value["low"], value["high"]) if isinstance(value, Mapping) else row.get("intervals", {}).get(key)
    return None if ends is None else (float(ends[0]), float(ends[1]))


def number_text(value: float | None, spec: str) -> str:
    """A figure as text; "-" where there is none. Without a format: KID, whose scale depends on the extractor."""
    if value is None:
        return "-"
    if not spec:
        spec = ".4f" if abs(value) < 1 else ".2f" if abs(value) < 100 else ",.0f"
    return format(value, spec)


def figure_text(row: Mapping[str, Any], key: str) -> str:
    """A figure without its interval."""
    value = row.get(key)
    return number_text(value["value"] if isinstance(value, Mapping) else value, COLUMNS[key][1])


def _cell(row: Mapping[str, Any], key: str, with_interval: bool) -> str:
    """A figure, and with its interval where it has one: 17.4 ±1.2, from the farther end."""
    text, ends = figure_text(row, key), interval(row, key)
    if not with_interval or ends is None:
        return text
    value = row[key]["value"] if isinstance(row[key], Mapping) else row[key]
    return f"{text} ±{number_text(max(value - ends[0], ends[1] - value), COLUMNS[key][1])}"
