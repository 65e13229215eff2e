"""`ral-gym report`: a run as one HTML page."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ral_gym.commands.arguments import ReportArguments
from ral_gym.commands.generate import open_run
from ral_gym.errors import printable
from ral_gym.report.report import write_report
from ral_gym.stages.device import resolve_device


def report_run(arguments: ReportArguments, console: Console) -> Path:
    """Write the page; returns its path.

    Raises:
        RunError: not a run folder, a damaged file in it, or the page cannot be written.
    """
    device, run = resolve_device(arguments.device), open_run(arguments.run)
    path = write_report(run, Path(arguments.output or run.file("report.html")), device)
    console.print(
        printable(f"{run.path.name}: one page, {path.stat().st_size / 1e6:.1f} MB"), highlight=False, markup=False
    )
    console.print(printable(f"  {path}"), highlight=False, soft_wrap=True, markup=False)
    return path
