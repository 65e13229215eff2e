"""The site as built: every link inside it leads somewhere, nothing comes from elsewhere, one page per environment."""

import doctest
import importlib
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import gymnasium
import pytest

import ral_gym.agents
import ral_gym.envs
from tests.site_pages import ROOT, SitePage, build_site

DOCS = ROOT / "docs"


pytestmark = pytest.mark.commands  # building the site takes as long as a run


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    own = tmp_path_factory.getbasetemp()
    return build_site(own if worker_id == "master" else own.parent)


@pytest.fixture(scope="module")
def pages(html: Path) -> dict[Path, SitePage]:
    return {path: SitePage(path.read_text(encoding="utf-8")) for path in sorted(html.rglob("*.html"))}


def outside(address: str) -> bool:
    """Whether an address needs a network."""
    return bool(urlsplit(address).netloc) or urlsplit(address).scheme not in {"", "data"}


def faults_of(path: Path, page: SitePage, pages: dict[Path, SitePage]) -> list[str]:
    """The links of a page that lead to no file or no place."""
    found = []
    for link in page.links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        there = pages.get(target)
        if not target.is_file() or (parts.fragment and there and unquote(parts.fragment) not in there.places):
            found.append(link)
    return found


def test_every_page_of_docs_is_built_and_linked_from_the_navigation(html: Path) -> None:
    names = {path.relative_to(DOCS).with_suffix(".html").as_posix() for path in DOCS.rglob("*.md")}
    assert {path.relative_to(html).as_posix() for path in html.rglob("*.html")} >= names and len(names) > 20


def test_links_inside_the_site_lead_somewhere(pages: dict[Path, SitePage]) -> None:
    assert not {path.name: bad for path, page in pages.items() if (bad := faults_of(path, page, pages))}
    assert sum(len(page.links) for page in pages.values()) > 1000


def test_a_link_to_nowhere_is_seen(html: Path, pages: dict[Path, SitePage]) -> None:
    text = '<a href="index.html">a</a><a href="none.html">b</a><a href="index.html#none">c</a><a href="#none">d</a>'
    assert faults_of(html / "extending.html", SitePage(text), pages) == ["none.html", "index.html#none", "#none"]


def test_pages_load_nothing_from_elsewhere(pages: dict[Path, SitePage]) -> None:
    for path, page in pages.items():
        assert not [address for address in page.loads if outside(address)], path.name
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", page.styles), path.name
        for address in page.loads:
            if not address.startswith(("data:", "#")):
                assert (path.parent / unquote(urlsplit(address).path)).is_file(), (path.name, address)


def test_an_address_elsewhere_is_seen() -> None:
    text = '<script src="//a.b/c.js"></script><img srcset="https://d.e/f.png 2x"><style>@import "https://g.h"</style>'
    page = SitePage(text)
    assert all(map(outside, page.loads)) and len(page.loads) == 2 and "https://g.h" in page.styles


def test_styles_and_scripts_ask_for_nothing_elsewhere(html: Path) -> None:
    styles = list(html.rglob("*.css"))
    assert styles
    for path in styles:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//|@font-face", text), path.name
    for path in html.rglob("*.js"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(fetch|importScripts|import)\(\s*['\"](https?:)?//", text), path.name


def test_one_page_per_registered_environment(html: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    made = importlib.import_module("environment_pages")
    stubs = {}
    for path in DOCS.glob("environments/*.md"):
        if match := re.search(r"<!-- environment: (\S+) -->", path.read_text(encoding="utf-8")):
            stubs[match[1]] = (html / "environments" / path.name).with_suffix(".html")
    assert set(stubs) == set(made.registered_ids())
    assert set(stubs) == {name for name in gymnasium.registry if name.startswith("ral_gym/")}
    for page in stubs.values():
        assert re.findall(r"<h2>(.*?)<a", page.read_text(encoding="utf-8")) == made.SECTIONS


@pytest.mark.parametrize("package", [ral_gym.envs, ral_gym.agents])
def test_the_reference_has_every_public_name(html: Path, package) -> None:
    text = (html / "api" / f"{package.__name__.rpartition('.')[2]}.html").read_text(encoding="utf-8")
    places = SitePage(text).places
    aliases = {"PixelCNNPolicy", "MaskablePixelCNNPolicy"}  # other names of classes that are there
    shown = {name for name in package.__all__ for place in places if place.endswith(f".{name}")}
    assert set(package.__all__) - shown - aliases == set()


@pytest.mark.parametrize("name", ["docstrings", "links_outside"])
def test_doctests_of_the_extensions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    found = doctest.testmod(importlib.import_module(name))
    assert found.failed == 0 and found.attempted > 0
