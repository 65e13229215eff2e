"""The report's HTML: figures, tables, sections and the page around them, made from the templates beside this file.

The page is one file that loads nothing else: pictures are data URIs, plots are inline SVG, fonts are the system's. It
needs no script, and its content security policy allows none. jinja2 escapes all text, whatever its source: only what
these functions return is `Markup`. Widths are relative, so that it reads on a phone; whatever is wider (tables,
commands) scrolls in its own box. Colours are custom properties, with a second set for readers who prefer a dark page.
"""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from ral_gym.metrics.table import Text

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""What the page may load: pictures inside it, and its own style sheet and those of the plots. No script, no address."""
_VARIABLES = {
    "#000000": "currentColor",
    "#ffffff": "var(--paper)",
    "#dddddd": "var(--rule)",
    "#7f7f7f": "var(--grey)",
    "#0072b2": "var(--blue)",
    "#56b4e9": "var(--sky)",
    "#009e73": "var(--green)",
    "#d55e00": "var(--vermilion)",
    "#e69f00": "var(--orange)",
    "#cc79a7": "var(--pink)",
}
"""Colours of `ral_gym.pictures` -> their names in the style sheet."""


class Section(NamedTuple):
    """A part of the page: its anchor, its heading, and its HTML."""

    name: str
    heading: str
    content: Markup


@functools.cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("ral_gym.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@functools.cache
def _parts() -> Any:
    """The macros of parts.html, as functions that give `Markup`."""
    return _templates().get_template("parts.html").module


def image(png: bytes, alt: str, width: int, height: int) -> Markup:
    """An ``<img>`` that holds its picture."""
    return _parts().image(base64.b64encode(png).decode(), alt, width, height)


def inline_svg(svg: str, alt: str, name: str) -> Markup:
    """Matplotlib's SVG as an element of the page, in the page's colours and font.

    Args:
        svg: the file's text; matplotlib has escaped labels in it.
        alt: what a screen reader says.
        name: makes the ids unique on the page.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", svg.replace("xlink:href", "href"))
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda found: _VARIABLES.get(found[0], found[0]), svg)
    head, _, body = svg.partition(">")
    box = re.search(r'viewBox="([^"]*)"', head)
    assert box is not None
    return _parts().svg(box[1], alt, Markup(body))


def figure(name: str, content: Markup, title: str, caption: str) -> Markup:
    """A figure with its caption, which begins with its title in bold."""
    return _parts().figure(name, content, title, caption)


def grid(figures: Sequence[Markup], kind: str = "") -> Markup:
    """Figures in a grid: `tiles` (small), `plots`, `maps` or `wide`; without a kind one per row."""
    return _parts().grid(figures, kind)


def strips(parts: Iterable[tuple[str, Markup]]) -> Markup:
    """Labelled pictures side by side."""
    return _parts().strips(list(parts))


def paragraph(text: str) -> Markup:
    """A paragraph."""
    return _parts().paragraph(text)


def command(*lines: str) -> Markup:
    """Commands, to be copied."""
    return _parts().command(lines)


def missing(text: str, *lines: str) -> Markup:
    """A note on what is missing, with the commands that make it."""
    return _parts().missing(text, lines)


def definitions(pairs: Sequence[tuple[str, str]], code: bool = False) -> Markup:
    """A list of names and their descriptions; the names as code if `code`."""
    return _parts().definitions(pairs, code)


def setting_list(lines: Sequence[tuple[str, str, str | None]]) -> Markup:
    """Settings: name, value, and the preset's value if it differs."""
    return _parts().settings(lines)


def collapsed(summary: str, content: Markup) -> Markup:
    """Content that opens with a click on its summary."""
    return _parts().collapsed(summary, content)


def table(label: str, headings: Sequence[str], rows: Sequence[tuple[str, Sequence[Text]]]) -> Markup:
    """A table that scrolls in its own box: names, which may be broken after underscores, and their numbers."""
    return _parts().table(label, headings, rows)


def colour_scale(colours: Sequence[str], ends: tuple[str, str, str], alt: str) -> Markup:
    """A bar of colours with labels below its left end, its middle and its right end."""
    return _parts().scale(colours, ends, alt)


def page(title: str, header: Markup, sections: Sequence[Section], footer: str) -> str:
    """The whole document."""
    return (
        _templates()
        .get_template("page.html")
        .render(title=title, header=header, sections=sections, footer=footer, policy=POLICY)
    )
