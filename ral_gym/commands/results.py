"""What a measured run prints: its table, whether guidance is still needed, and the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ral_gym.errors import RunError, printable

if TYPE_CHECKING:
    from ral_gym.runs.run import Run


def report(run: Run, results: dict[str, Any], console: Console) -> dict[str, Any]:
    """Print the table and the pictures' paths.

    Raises:
        RunError: the results were not written by ral_gym.
    """
    from ral_gym.pictures import results_table

    try:
        table = results_table(results)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{run.file('results.json')} is not a results file; remove it to evaluate again") from error
    console.print(table)
    if verdict := guidance_verdict(results):
        say(console, [verdict])
    say(console, [f"  {picture}" for picture in sorted(run.file("samples").glob("*.png"))])
    return results


def guidance_verdict(results: dict[str, Any]) -> str:
    """Whether RAL without guidance is as good as its start at the start's best scale, by FD and the judge's accuracy.

    Returns:
        one sentence; "" if it was not measured.
    """
    rows = results["rows"]
    start, tuned = rows.get("mle_best_guidance"), rows.get("ral")
    if start is None or tuned is None:
        return ""
    scale = f"s = {start.get('guidance', 1.0):g}"
    figures = f"FD {tuned['fd']:.4g} at s = 1 after RAL, {start['fd']:.4g} at {scale}, the best one, before"
    as_good = tuned["fd"] <= start["fd"]
    if tuned.get("accuracy") is not None and start.get("accuracy") is not None:
        figures += f"; accuracy {tuned['accuracy']:.3f} and {start['accuracy']:.3f}"
        as_good = as_good and tuned["accuracy"] >= start["accuracy"]
    if as_good:
        return f"No guidance needed: {figures}."
    helps = start.get("guidance", 1.0) != 1
    return f"{'Guidance still helps' if helps else 'RAL is not better than its start'}: {figures}."


def say(console: Console, lines: Sequence[str]) -> None:
    """Print lines as they are, without colour, line ends and control characters of a file."""
    for line in lines:
        console.print(printable(line), highlight=False, soft_wrap=True, markup=False)
