"""`ral-gym cache`: list the decoded images that are cached on disk, or remove them."""

from __future__ import annotations

import time

from rich.console import Console
from rich.table import Table

from ral_gym.commands.look_arguments import CacheArguments
from ral_gym.data.cache_folder import CacheFolder
from ral_gym.data.opening import MB
from ral_gym.errors import printable


def show_cache(arguments: CacheArguments, console: Console) -> None:
    """List the sets of decoded images, or remove them all."""
    folder = CacheFolder.of(arguments.cache_dir)
    if arguments.clear:
        removed = folder.clear()
        _say(console, f"{printable(folder.path)}: {removed / MB:,.1f} MiB of decoded images removed")
        return
    entries = folder.entries()
    if not entries:
        _say(console, f"{printable(folder.path)}: no decoded images")
        return
    table = Table("Images", "MiB", "Last used", "Source", "Folder")
    for entry in reversed(entries):
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        row = (f"{entry.images:,}", f"{entry.bytes / MB:,.1f}", used, printable(entry.source), entry.path.name)
        table.add_row(*row)
    console.print(table, markup=False)
    total = sum(entry.bytes for entry in entries)
    _say(console, f"{total / MB:,.1f} MiB in {printable(folder.path)}; ral-gym cache --clear removes them")


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True, markup=False)
