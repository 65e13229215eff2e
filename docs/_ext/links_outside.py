"""Links between the pages and the files outside docs/, which work in the repository, as the site needs them.

CHANGELOG.md, CONTRIBUTING.md, SECURITY.md and examples/README.md are pages: a line ``<!-- file: SECURITY.md -->``
stands for one. A link to a folder becomes its text. A link to another single file needs nothing: the file comes with
the site, for download.
"""

import re
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
MARK = re.compile(r"<!-- file: (\S+) -->")
PAGES = {
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/README.md": "examples.md",
}
"""Files outside docs/, and the pages that show them."""
TO_FILE = re.compile(rf"\]\((?:\.\./)+({'|'.join(map(re.escape, PAGES))})((?:#[^)]*)?)\)")
TO_FOLDER = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(?:[\w-]+/)*[\w-]+/?\)")


def mend(text: str, docname: str) -> str:
    """A page's Markdown with links as the site needs them.

    >>> mend("[a](../SECURITY.md#limits), [b](../examples/extending), [c](../examples/frontier.py)", "reliability")
    '[a](security.md#limits), b, [c](../examples/frontier.py)'
    """
    up = "../" * docname.count("/")
    text = TO_FILE.sub(lambda match: f"]({up}{PAGES[match[1]]}{match[2]})", text)
    return TO_FOLDER.sub(r"\1", text)


def file_outside(match: re.Match[str]) -> str:
    """A file outside docs/, its links seen from docs/.

    >>> "](../examples/pictures/ablation.png)" in file_outside(MARK.match("<!-- file: examples/README.md -->"))
    True
    """
    text, folder = (ROOT / match[1]).read_text(encoding="utf-8"), match[1].rpartition("/")[0]
    if not folder:
        return text.replace("](docs/", "](")
    return re.sub(r"\]\((?!\.\./|#|[a-z]+:)", f"](../{folder}/", text).replace("](../docs/", "](")


def mend_page(app: Sphinx, docname: str, source: list[str]) -> None:
    """Mend a page as it is read."""
    source[0] = mend(MARK.sub(file_outside, source[0]), docname)


def setup(app: Sphinx) -> dict[str, bool]:
    """Mend every page."""
    app.connect("source-read", mend_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
