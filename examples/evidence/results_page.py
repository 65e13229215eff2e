"""Put measured tables into a document, between markers, and say what they were measured on.

Text between the lines ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` is replaced; everything else is prose and is
kept, to the byte.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from ral_gym.errors import RunError
from ral_gym.runs.storage import write_atomic, write_text

_MARKER = re.compile(r"<!-- (begin|end) ([\w-]+) -->")


def fill_blocks(text: str, blocks: Mapping[str, str], source: str = "the document") -> str:
    r"""A document with new contents between its markers.

    >>> fill_blocks("a\n<!-- begin b -->\nold\n<!-- end b -->\nc\n", {"b": "new"})
    'a\n<!-- begin b -->\nnew\n<!-- end b -->\nc\n'

    Args:
        text: the document.
        blocks: name -> what shall stand there. Blocks of the document that are not named stay as they are.
        source: what the document is called in errors.

    Raises:
        RunError: a marker without its partner, twice, or inside another block; no markers for a block.
    """
    result: list[str] = []
    found: set[str] = set()
    inside: str | None = None
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        match = _MARKER.fullmatch(line.strip())
        kind, name = match.groups() if match else ("", "")
        if kind == "begin" and (inside is not None or name in found):
            what = f"inside the block {inside}" if inside is not None else "for the second time"
            raise RunError(f"{source}, line {number}: begin {name} appears {what}; fix the markers")
        if kind == "end" and name != inside:
            raise RunError(f"{source}, line {number}: end {name} without its begin; fix the markers")
        if kind == "begin":
            result.append(line)
            found.add(name)
            inside = name
            if name in blocks:
                result.append(blocks[name].strip("\n") + "\n")
        elif kind == "end" or inside not in blocks:
            result.append(line)
            inside = None if kind == "end" else inside
    if inside is not None:
        raise RunError(f"{source}: begin {inside} without its end; fix the markers")
    if missing := [name for name in blocks if name not in found]:
        raise RunError(
            f"{source} has no place for {', '.join(missing)}: add <!-- begin {missing[0]} --> and "
            f"<!-- end {missing[0]} --> on lines of their own"
        )
    return "".join(result)


def fill_document(path: Path, blocks: Mapping[str, str]) -> None:
    """`fill_blocks` of a file.

    Raises:
        RunError: the file is missing, cannot be written, or its markers are damaged; it has not changed then.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}): give --docs the folder of results.md") from error
    write_text(path, fill_blocks(text, blocks, str(path)))


def fenced(command: str, output: str) -> str:
    """A command and what it printed, as Markdown."""
    lines = "\n".join(line.rstrip() for line in output.strip("\n").splitlines())
    return f"`{command}`:\n\n```\n{lines}\n```"


def table_with_figures(folder: Path, figures: Mapping[Path, str], docs: Path) -> str:
    """A part's ``table.md``, and its figures copied to the documents' folder and shown below.

    Args:
        folder: the part's.
        figures: file -> name in the documents' folder, without ending.
        docs: that folder.
    """
    parts = [(folder / "table.md").read_text(encoding="utf-8").strip("\n")]
    for file, name in figures.items():
        picture = file.read_bytes()
        write_atomic(docs / f"{name}.png", lambda temporary, picture=picture: temporary.write_bytes(picture))  # type: ignore[misc]
        parts.append(f"![{name.replace('_', ' ')}]({name}.png)")
    return "\n\n".join(parts)


def describe_machine() -> dict[str, Any]:
    """What figures are measured on, now."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": _memory_gib(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "load": round(os.getloadavg()[0], 1),
    }


def machine_line(machine: Mapping[str, Any]) -> str:
    """`describe_machine` in a sentence."""
    memory = f", {machine['memory']} GiB" if machine["memory"] else ""
    return (
        f"Begun {machine['date']} at a load average of {machine['load']}: {machine['cores']} cores of "
        f"{machine['cpu']}{memory}; Python {machine['python']}, PyTorch {machine['torch']}."
    )


def times_table(times: Mapping[str, Mapping[str, Any]], elapsed: float) -> str:
    """What each part has taken, as Markdown; jobs are called PART or PART-something."""
    parts: dict[str, list[Mapping[str, Any]]] = {}
    for name, entry in times.items():
        parts.setdefault(name.partition("-")[0], []).append(entry)
    lines = ["| part | commands | seconds | CPU seconds |", "|---|---:|---:|---:|"]
    for part, entries in parts.items():
        wall, cpu = (sum(entry[key] for entry in entries) for key in ("wall", "cpu"))
        lines.append(f"| {part} | {len(entries)} | {wall:,.0f} | {cpu:,.0f} |")
    wall, cpu = (sum(entry[key] for entry in times.values()) for key in ("wall", "cpu"))
    lines.append(f"| all | {len(times)} | {wall:,.0f} | {cpu:,.0f} |")
    note = (
        f"Sums over commands and sittings, of what was not there before. Wall clock of the whole, with two commands "
        f"side by side: {elapsed / 60:.0f} minutes."
    )
    return "\n".join(lines) + f"\n\n{note}"


def _cpu_model() -> str:
    """The processor's name where the system tells it."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _memory_gib() -> int | None:
    """Memory of the machine, where the system tells it."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (ValueError, OSError, AttributeError):
        return None
