"""Tables for examples and benchmarks, in the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from ral_gym.metrics.intervals import mean_estimate


def plain_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]] = (),
    *,
    title: str | None = None,
    caption: str | None = None,
    min_width: int | None = None,
) -> Table:
    """A table that fits 80 characters: the first column is left-aligned, numbers are right-aligned.

    Args:
        headings: of the columns; may contain line breaks.
        rows: cells as text.
        title: above the table.
        caption: below the table, left-aligned.
        min_width: least width in characters.
    """
    table = Table(
        title=title,
        caption=caption,
        caption_justify="left",
        min_width=min_width,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        pad_edge=False,
    )
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    r"""The same as Markdown, its caption below as a paragraph.

    >>> print(markdown_table(["row", "FD\n± 95 %", "en-\ntropy"], [["mle", "3.1", "2.0"]], "One seed."), end="")
    | row | FD ± 95 % | entropy |
    |---|---:|---:|
    | mle | 3.1 | 2.0 |
    <BLANKLINE>
    One seed.
    """
    names = [heading.replace("-\n", "").replace("\n", " ") for heading in headings]
    lines = ["| " + " | ".join(cells) + " |" for cells in (names, *rows)]
    lines.insert(1, "|---|" + "---:|" * (len(names) - 1))
    return "\n".join(lines) + f"\n\n{caption}\n"


def mean_and_interval(values: Sequence[float | None], digits: int) -> str:
    """Mean over seeds with half its 95 % interval by Student's t; the value alone for one seed, "-" if one is missing.

    >>> mean_and_interval([1.0, 2.0, 3.0], 2), mean_and_interval([0.5], 3), mean_and_interval([1.0, None], 1)
    ('2.00 ± 2.48', '0.500', '-')
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"
    if len(known) == 1:
        return f"{known[0]:.{digits}f}"
    estimate = mean_estimate(known)
    return f"{estimate.value:.{digits}f} ± {estimate.high - estimate.value:.{digits}f}"
