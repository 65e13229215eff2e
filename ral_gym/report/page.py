"""The report's HTML: figures, tables, sections and the page around them, with its style sheet.

The page is one file that asks for nothing else: pictures are data URIs, plots are inline SVG, fonts are the reader's.
It needs no script. Widths are relative, so that it reads on a phone; whatever is wider (tables, commands) scrolls in
its own box. Colours are custom properties, with a second set for readers who prefer a dark page.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfc; --ink: #1d1f23; --muted: #5b616b; --rule: #dfe1e5; --soft: #f3f4f5; --link: #0a5aa5;
  --blue: #0072b2; --sky: #56b4e9; --green: #009e73; --vermilion: #d55e00; --orange: #e69f00; --pink: #cc79a7;
  --grey: #7f7f7f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16181b; --ink: #e4e5e7; --muted: #a0a6b0; --rule: #34383e; --soft: #1f2226; --link: #7db8f0;
    --blue: #4aa3df; --sky: #8fcdf2; --green: #2fbf95; --vermilion: #f0803c; --orange: #f0b83c; --pink: #dc98bd;
    --grey: #9a9a9a;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 70rem; padding: 2rem clamp(1rem, 4vw, 3rem) 4rem;
  background: var(--paper); color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere;
}
h1 { font-size: 1.75rem; font-weight: 600; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; font-weight: 600; margin: 0 0 .6rem; }
h3 { font-size: 1rem; font-weight: 600; margin: 1.6rem 0 .4rem; }
p { margin: 0 0 .8rem; max-width: 44rem; }
a { color: var(--link); text-underline-offset: .15em; }
code, pre { font: .875em/1.5 ui-monospace, "SFMono-Regular", Menlo, Consolas, monospace; }
section, footer { border-top: 1px solid var(--rule); margin-top: 2.4rem; padding-top: 1.6rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; margin: 1.2rem 0 0; padding: 0; }
nav a { display: inline-block; padding: .25rem 0; }
.muted, figcaption { color: var(--muted); }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .85rem; line-height: 1.45; margin-top: .45rem; max-width: 44rem; }
figcaption b, .label { color: var(--ink); font-weight: 600; }
img, svg { display: block; height: auto; max-width: 100%; width: 100%; }
.grid { display: grid; gap: 1.5rem 1.25rem; margin: 1rem 0; }
.tiles { grid-template-columns: repeat(auto-fill, minmax(min(100%, 9.4rem), 1fr)); }
.tiles > figure { max-width: 26rem; }
.plots { grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr)); }
.wide { grid-template-columns: minmax(0, 33rem); }
.maps { grid-template-columns: repeat(auto-fill, minmax(min(100%, 16rem), 1fr)); }
.maps > figure { max-width: 26rem; }
.strips { display: grid; gap: .6rem 1.25rem; }
.strips .label { display: block; font-size: .85rem; margin-bottom: .2rem; }
@media (min-width: 44rem) {
  .strips { grid-template-columns: 2fr 4fr 4fr; }
  .tiles { grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); }
}
.plot text { fill: currentColor !important; font-family: system-ui, sans-serif !important; }
.scroll { overflow-x: auto; max-width: 100%; }
.scroll:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { border-bottom: 1px solid var(--rule); padding: .35rem .75rem; text-align: right; white-space: nowrap; }
thead th { border-bottom-color: var(--muted); font-weight: 600; vertical-align: bottom; }
tr > :first-child { background: var(--paper); left: 0; padding-left: 0; position: sticky; text-align: left; }
tbody th { font-weight: 400; }
@media (max-width: 44rem) { tr > :first-child { max-width: 9.5rem; white-space: normal; } }
td small { color: var(--muted); display: block; font-size: .8em; }
details + details { border-top: 1px solid var(--rule); }
summary { cursor: pointer; padding: .5rem 0; }
dl { display: grid; gap: .15rem 1.25rem; grid-template-columns: minmax(0, max-content) minmax(0, 1fr); }
dl { margin: 0 0 1rem; }
dt { color: var(--muted); }
dd { margin: 0; }
pre { background: var(--soft); border-radius: .4rem; margin: 0 0 1rem; padding: .7rem .9rem; white-space: pre-wrap; }
figure + p { margin-top: 1rem; }
.missing { border-left: 3px solid var(--orange); margin: 1rem 0; padding: .1rem 0 .1rem 1rem; }
.missing pre { margin-bottom: .3rem; }
.scale { max-width: 26rem; }
.scale div { border-radius: .2rem; height: .8rem; }
.scale p { display: flex; font-size: .85rem; justify-content: space-between; margin: .25rem 0 0; }
"""
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
    content: str


def image(png: bytes, alt: str, width: int, height: int) -> str:
    """An ``<img>`` that holds its picture."""
    data = base64.b64encode(png).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}" width="{width}" height="{height}">'


def inline_svg(svg: str, alt: str, name: str) -> str:
    """Matplotlib's SVG as an element of the page, in the page's colours and font.

    Args:
        svg: the file's text.
        alt: what a screen reader says.
        name: makes the ids unique on the page.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", svg.replace("xlink:href", "href"))
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda found: _VARIABLES.get(found[0], found[0]), svg)
    head, _, body = svg.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    return f'<svg class="plot" {box[0]} role="img" aria-label="{escape(alt)}">{body}'


def figure(name: str, content: str, caption: str) -> str:
    """A figure with its caption; both are HTML."""
    return f'<figure id="fig-{name}">\n{content}\n<figcaption>{caption}</figcaption>\n</figure>'


def grid(figures: Sequence[str], kind: str) -> str:
    """Figures beside and below one another: `tiles` (small), `plots` or `wide`."""
    return f'<div class="grid {kind}">\n' + "\n".join(figures) + "\n</div>"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def command(*lines: str) -> str:
    """Commands, to be copied."""
    return "<pre>" + escape("\n".join(lines)) + "</pre>"


def missing(text: str, *lines: str) -> str:
    """What is not there, and the commands that make it."""
    return f'<div class="missing">{paragraph(text)}{command(*lines) if lines else ""}</div>'


def definitions(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and what they are, plain text."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n" for name, value in pairs)
    return f"<dl>\n{items}</dl>"


def collapsed(summary: str, content: str) -> str:
    """HTML that opens when its summary is pressed."""
    return f"<details><summary>{escape(summary)}</summary>\n{content}\n</details>"


def table(label: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls in its own box; cells are HTML, the first of each row is its heading."""
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "\n".join(
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def colour_scale(colours: Sequence[str], ends: tuple[str, str, str], alt: str) -> str:
    """A bar of colours with words below its left end, its middle and its right end."""
    words = "".join(f"<span>{escape(end)}</span>" for end in ends)
    bar = f'<div role="img" aria-label="{escape(alt)}" style="background: linear-gradient(to right, '
    return f'<div class="scale">{bar}{", ".join(colours)})"></div><p>{words}</p></div>'


def page(title: str, header: str, sections: Sequence[Section], footer: str) -> str:
    """The whole document; `header` and the sections' contents are HTML."""
    links = "".join(f'<li><a href="#{part.name}">{escape(part.heading)}</a></li>' for part in sections)
    body = "\n".join(
        f'<section id="{part.name}" aria-labelledby="{part.name}-h">\n'
        f'<h2 id="{part.name}-h">{escape(part.heading)}</h2>\n{part.content}\n</section>'
        for part in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{header}
<nav aria-label="Contents"><ul>{links}</ul></nav>
</header>
<main>
{body}
</main>
<footer class="muted">{paragraph(footer)}</footer>
</body>
</html>
"""
