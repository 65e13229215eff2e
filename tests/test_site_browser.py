"""The built site in Chromium: on a phone and on a wide window, light and dark; the browser asks for files only."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.site_pages import build_site

PAGES = ["index", "idea", "environments/toy", "algorithms/ppo", "extending/prior", "api/agents", "results", "faq"]
LOOK = """() => {
  const root = document.documentElement, style = getComputedStyle(document.body);
  return {
    width: root.scrollWidth, room: root.clientWidth, article: document.querySelector("article").scrollWidth,
    text: style.color, ground: style.backgroundColor,
    broken: [...document.images].filter((image) => image.complete && !image.naturalWidth).map((image) => image.src),
    headings: document.querySelectorAll("h1").length,
    equations: [...document.querySelectorAll("math")].filter((math) => !math.getBoundingClientRect().width).length,
  };
}"""


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_site(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()


def brightness(colour: str) -> float:
    return sum(float(part) for part in colour.partition("(")[2].strip(")").split(",")[:3])


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_pages_fit_and_ask_for_nothing_elsewhere(html: Path, browser: Any, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    asked: list[str] = []
    complaints: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    for name in PAGES:
        page.goto((html / f"{name}.html").as_uri())
        found = page.evaluate(LOOK)
        assert found["width"] <= found["room"] == width and found["article"] <= width, name
        assert found["headings"] == 1 and found["broken"] == [] and found["equations"] == 0, (name, found)
        dark = brightness(found["ground"]) < brightness(found["text"])
        assert dark == (scheme == "dark") and abs(brightness(found["ground"]) - brightness(found["text"])) > 400, name
    context.close()
    assert complaints == []
    assert len(asked) > len(PAGES) and not [url for url in asked if not url.startswith(("file://", "data:"))]


@pytest.mark.browser
def test_the_search_finds_a_page_without_a_server(html: Path, browser: Any) -> None:
    page = browser.new_page()
    page.goto((html / "search.html").as_uri() + "?q=teacher")
    page.wait_for_selector("#search-results li a")
    assert "exposure_bias" in page.inner_html("#search-results")
    page.close()
