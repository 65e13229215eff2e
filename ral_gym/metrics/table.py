"""The results table: one row per generator, for the terminal and for the README."""

from __future__ import annotations

from collections.abc import Mapping
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
    "nll_test": ("NLL\ntest", ".3f"),
    "nll_new_people": ("NLL\nnew", ".3f"),
    "entropy": ("en-\ntropy", ".3f"),
    "diversity": ("diver-\nsity", ".3f"),
    "samples_per_kept": ("cost", ".1f"),
    "n": ("n", ",d"),
    "temperature": ("T", ".2f"),
}


def results_table(results: Mapping[str, Any]) -> Table:
    """The results as a table for the terminal.

    Args:
        results: what `results.json` holds: `rows` (name -> figures), `extractor`, `n_samples`, `seed`, `seconds`.
            Figures that are missing or None are shown as "-".
    """
    style: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": 0, "show_edge": False, "pad_edge": False}
    table = Table(title="Results", caption=results_caption(results), **style)
    table.add_column("row", justify="left", no_wrap=True)
    for name, (heading, _) in COLUMNS.items():
        if name != "n":  # 80 columns hold no more; the caption says it
            table.add_column(heading, justify="right", no_wrap=True)
    for name in _row_names(results):
        table.add_row(name, *_cells(results["rows"][name], skip="n"))
    return table


def results_markdown(results: Mapping[str, Any]) -> str:
    """The same table as Markdown, with its caption below."""
    headings = [heading.replace("-\n", "").replace("\n", " ") for heading, _ in COLUMNS.values()]
    lines = [
        "| row | " + " | ".join(headings) + " |",
        "|---|" + "---:|" * len(COLUMNS),
        *(f"| `{name}` | " + " | ".join(_cells(results["rows"][name])) + " |" for name in _row_names(results)),
    ]
    return "\n".join(lines) + f"\n\n{results_caption(results)}\n"


def results_caption(results: Mapping[str, Any]) -> str:
    """What the figures were measured with: extractor, sample count, seed, time."""
    others = {
        name: row["n"] for name, row in results["rows"].items() if row.get("n") not in (None, results.get("n_samples"))
    }
    fewer = ", ".join(f"{name} {_number(n, ',d')}" for name, n in others.items())
    parts = [
        f"FD and KID on {results.get('extractor', '-')} features",
        f"{_number(results.get('n_samples'), ',d')} samples per generator{f' ({fewer})' if fewer else ''}",
        "NLL (held-out images, new people) and entropy in nats per code",
        "diversity: share of codes in which two samples differ",
        "cost: samples drawn per sample kept",
        f"seed {_number(results.get('seed'), 'd')}",
    ]
    if results.get("seconds"):
        parts.append(f"{sum(results['seconds'].values()):,.0f} s in all")
    return "; ".join(parts) + "."


def _row_names(results: Mapping[str, Any]) -> list[str]:
    """Rows in the table's order; unknown ones last."""
    rows = results["rows"]
    return [name for name in ROWS if name in rows] + [name for name in rows if name not in ROWS]


def _cells(row: Mapping[str, Any], skip: str = "") -> list[str]:
    return [_number(row.get(key), spec) for key, (_, spec) in COLUMNS.items() if key != skip]


def _number(value: float | None, spec: str) -> str:
    """A figure as text; "-" where there is none. Without a format: KID, whose scale depends on the extractor."""
    if value is None:
        return "-"
    if not spec:
        spec = ".4f" if abs(value) < 1 else ".2f" if abs(value) < 100 else ",.0f"
    return format(value, spec)
