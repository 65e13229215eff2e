"""Docstrings for the API reference: what is Markdown in them becomes reStructuredText, which autodoc reads.

The classes of the environments show their first line here and link to their own pages.
"""

import re
from typing import Any

from environment_pages import environment_class, registered_ids
from sphinx.application import Sphinx

LINK = re.compile(r"(?<!`)\[([^\]`]+)\]\((https?://[^)\s]+)\)")
NAME = re.compile(r"(?<![`:\w])`([^`]+)`(?![`_])")
BAR = re.compile(r"\|(?=[^`]*(?:`[^`]*`[^`]*)*$)")


def line_to_rst(line: str) -> str:
    r"""Names in single backticks as literals, links as links, bars as bars: ``|score|`` would be a substitution.

    >>> print(line_to_rst("|a| of `b`: see [here](https://c.d)."))
    \|a\| of ``b``: see `here <https://c.d>`__.
    """
    return LINK.sub(r"`\1 <\2>`__", NAME.sub(r"``\1``", BAR.sub(r"\|", line)))


def table_to_rst(rows: list[str]) -> list[str]:
    """The lines of a Markdown table -> a list table.

    >>> table_to_rst(["| a | b |", "|---|---|", "| 1 | 2 |"])
    ['', '.. list-table::', '    :header-rows: 1', '', '    * - a', '      - b', '    * - 1', '      - 2', '']
    """
    cells = [[cell.strip() for cell in row.strip().strip("|").split("|")] for row in rows]
    lines = ["", ".. list-table::", "    :header-rows: 1", ""]
    for row in [cells[0], *cells[2:]]:
        lines += [f"    {'* -' if number == 0 else '  -'} {line_to_rst(cell)}" for number, cell in enumerate(row)]
    return [*lines, ""]


def to_rst(lines: list[str]) -> list[str]:
    """Headings as bold lines, fenced code as code blocks, tables as list tables, the rest by `line_to_rst`.

    >>> to_rst(["## Rewards", "```python", "a = 1", "```", "`b`"])
    ['', '**Rewards**', '', '', '.. code-block:: python', '', '    a = 1', '', '``b``']
    """
    result: list[str] = []
    table: list[str] = []
    in_code, indent = False, ""
    for line in [*lines, ""]:
        fence = re.fullmatch(r"(\s*)```(\w*)\s*", line)
        heading = re.fullmatch(r"\s*#{2,4} (.+)", line)
        if table and not line.startswith("|"):
            result += table_to_rst(table)
            table = []
        if line.startswith("|") and line.endswith("|") and not in_code:
            table.append(line)
        elif fence and not in_code:
            in_code, indent = True, fence[1]
            result += ["", f"{indent}.. code-block:: {fence[2] or 'text'}", ""]
        elif fence:
            in_code = False
            result.append("")
        elif in_code:
            result.append(f"{indent}    {line[len(indent) :]}" if line.strip() else "")
        elif heading:
            result += ["", f"**{heading[1]}**", ""]
        else:
            result.append(line_to_rst(line))
    return result[:-1]


_AS_WRITTEN: dict[str, list[str]] = {}


def keep(app: Sphinx, what: str, name: str, thing: object, options: Any, lines: list[str]) -> None:
    """Remember a setting's docstring: napoleon would take what stands before its first colon for a type."""
    if what == "attribute":
        _AS_WRITTEN[name] = list(lines)


def process(app: Sphinx, what: str, name: str, thing: object, options: Any, lines: list[str]) -> None:
    """Mend a docstring in place, after napoleon has read its sections."""
    lines[:] = _AS_WRITTEN.pop(name, lines)
    environments = {environment_class(one): one for one in registered_ids()}
    if isinstance(thing, type) and thing in environments:
        page = name.rpartition(".")[2].removesuffix("Env")
        page = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", page).lower()
        lines[:] = [lines[0], "", f"Its page: :doc:`{environments[thing]} </environments/{page}>`.", ""]
    else:
        lines[:] = to_rst(lines)


def setup(app: Sphinx) -> dict[str, bool]:
    """Mend docstrings as autodoc finds them."""
    app.connect("autodoc-process-docstring", keep, priority=100)
    app.connect("autodoc-process-docstring", process, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
