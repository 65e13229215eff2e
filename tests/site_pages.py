"""The built site, for tests: built once per session, and what its pages ask for."""

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).parents[1]
ADDRESSES = {
    "script": "src",
    "link": "href",
    "img": "src",
    "source": "src",
    "iframe": "src",
    "video": "src",
    "audio": "src",
    "embed": "src",
    "object": "data",
}
"""What a browser loads by itself, by tag. (A link of the kind `canonical`, `prev` or `next` is not loaded.)"""


def build_site(base: Path) -> Path:
    """The folder of the built pages, built at most once in `base` by any number of test processes.

    Raises:
        AssertionError: the build fails or warns.
    """
    html = base / "site" / "html"
    with FileLock(base / "site.lock"):
        if not html.exists():
            build = [sys.executable, "-m", "sphinx", "--fresh-env", "--fail-on-warning", "--quiet", "-b", "html"]
            folders = ["-d", str(base / "site" / "doctrees"), str(ROOT / "docs"), str(html)]
            done = subprocess.run([*build, *folders], capture_output=True, text=True, timeout=280, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
    return html


class SitePage(HTMLParser):
    """One page: what it loads, where it links, and the places in it that can be linked."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.places: set[str] = set()
        self.styles = ""
        self._in_style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self._in_style = tag == "style"
        if "id" in values:
            self.places.add(values["id"])
        self.styles += values.get("style", "")
        loaded = ADDRESSES.get(tag)
        if loaded in values and not (tag == "link" and values.get("rel") in {"canonical", "prev", "next", "index"}):
            self.loads.append(values[loaded])
        if "srcset" in values:
            self.loads += [part.split()[0] for part in values["srcset"].split(",")]
        if tag == "a" and "href" in values:
            self.links.append(values["href"])

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.styles += data
