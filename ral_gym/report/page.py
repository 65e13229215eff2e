"""The report's HTML: figures, tables, sections and the page around them, made from the templates beside this file.

The page is one file that asks for nothing else: pictures are data URIs, plots are inline SVG, fonts are the reader's.
It needs no script, and its content security policy allows none. Text is escaped by jinja2 wherever it comes from: only
what these functions return is `Markup`. Widths are relative, so that it reads on a phone; whatever is wider (tables,
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
"""Colours of `ral_gym.pictures`, and what the style sheet calls them."""


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
        svg: the file's text, in which matplotlib has escaped what it was given.
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
    """Figures beside and below one another: `tiles` (small), `plots`, `maps` or `wide`; one per row without a kind."""
    return _parts().grid(figures, kind)


def strips(parts: Iterable[tuple[str, Markup]]) -> Markup:
    """Labelled pictures beside one another."""
    return _parts().strips(list(parts))


def paragraph(text: str) -> Markup:
    """A paragraph."""
    return _parts().paragraph(text)


def command(*lines: str) -> Markup:
    """Commands, to be copied."""
    return _parts().command(lines)


def missing(text: str, *lines: str) -> Markup:
    """What is not there, and the commands that make it."""
    return _parts().missing(text, lines)


def definitions(pairs: Sequence[tuple[str, str]], code: bool = False) -> Markup:
    """Names and what they are; the names as code."""
    return _parts().definitions(pairs, code)


def setting_list(lines: Sequence[tuple[str, str, str | None]]) -> Markup:
    """Settings: name, value, and the preset's value where it is another one."""
    return _parts().settings(lines)


def collapsed(summary: str, content: Markup) -> Markup:
    """What opens when its summary is pressed."""
    return _parts().collapsed(summary, content)


def table(label: str, headings: Sequence[str], rows: Sequence[tuple[str, Sequence[Text]]]) -> Markup:
    """A table that scrolls in its own box: names, which may be broken after underscores, and their numbers."""
    return _parts().table(label, headings, rows)


def colour_scale(colours: Sequence[str], ends: tuple[str, str, str], alt: str) -> Markup:
    """A bar of colours with words below its left end, its middle and its right end."""
    return _parts().scale(colours, ends, alt)


def page(title: str, header: Markup, sections: Sequence[Section], footer: str) -> str:
    """The whole document."""
    return (
        _templates()
        .get_template("page.html")
        .render(title=title, header=header, sections=sections, footer=footer, policy=POLICY)
    )
