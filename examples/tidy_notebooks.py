"""Keep the notebooks of examples/notebooks clean, after one has been edited or run.

    python examples/tidy_notebooks.py            # rewrite those that are not tidy
    python examples/tidy_notebooks.py --check    # only say which those are; ends with 1 if there are some

Tidy means: no outputs and no counts of runs, an id for every cell, no settings of one person's editor, and the two
cells that all notebooks share as this file has them: the link to Colab, and the installation where the package is
missing. The repository's address in both is `Repository` of `[project.urls]` in pyproject.toml. As long as there is
none, the notebooks say so.
"""

import argparse
import hashlib
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples" / "notebooks"
BRANCH = "main"
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
INSTALL = """\
# For Colab: install the package where it is missing. Elsewhere this does nothing.
import importlib.util
import subprocess
import sys

REPOSITORY = "{repository}"{remark}

if importlib.util.find_spec("ral_gym") is None:
    if not REPOSITORY:
        raise ModuleNotFoundError("ral_gym is not installed: in a checkout, pip install .")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", f"ral-gym @ git+{{REPOSITORY}}"], check=True)"""


def repository() -> str:
    """The address of the repository, without a slash at its end; empty while it has none."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        urls: dict[str, str] = tomllib.load(file)["project"].get("urls", {})
    return urls.get("Repository", "").rstrip("/").removesuffix(".git")


def colab(address: str, name: str) -> str:
    """The line that opens the notebook `name` in Colab, which reads public repositories of GitHub."""
    if not address.startswith("https://github.com/"):
        return "*A link that opens this notebook in Colab stands here once the repository is public.*"
    place = address.removeprefix("https://github.com/")
    url = f"https://colab.research.google.com/github/{place}/blob/{BRANCH}/examples/notebooks/{name}"
    return f"[![Open in Colab]({BADGE})]({url})"


def install(address: str) -> str:
    """The cell that installs the package where it is missing."""
    remark = "" if address else "  # empty until the repository is public"
    return INSTALL.format(repository=address, remark=remark)


def tidy(notebook: dict[str, Any], name: str, address: str) -> dict[str, Any]:
    """A clean copy of a notebook.

    Args:
        notebook: as nbformat 4 has it.
        name: of its file.
        address: of the repository; empty: it has none.
    """
    shared = {"colab": colab(address, name), "install": install(address)}
    cells: list[dict[str, Any]] = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"]).strip("\n")
        label = cell.get("id", "")
        if not re.fullmatch(r"[\w-]{1,64}", label, re.ASCII) or label in {one["id"] for one in cells}:
            label = hashlib.sha256(f"{len(cells)} {source}".encode()).hexdigest()[:8]
        tags = cell.get("metadata", {}).get("tags", [])
        clean: dict[str, Any] = {
            "cell_type": cell["cell_type"],
            "id": label,
            "metadata": {"tags": tags} if tags else {},
        }
        clean["source"] = shared.get(label, source).splitlines(keepends=True)
        if cell["cell_type"] == "code":
            clean |= {"execution_count": None, "outputs": []}
        cells.append(dict(sorted(clean.items())))
    return {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}


def written(notebook: dict[str, Any]) -> str:
    """The text of a notebook's file."""
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def main(argv: list[str]) -> int:
    """Tidy all notebooks, or say which are not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    only_check = parser.parse_args(argv).check
    address, changed = repository(), 0
    for path in sorted(FOLDER.glob("*.ipynb")):
        text = path.read_text(encoding="utf-8")
        clean = written(tidy(json.loads(text), path.name, address))
        if clean != text:
            changed += 1
            print(f"{path.relative_to(ROOT)}: {'not tidy' if only_check else 'tidied'}")
            if not only_check:
                path.write_text(clean, encoding="utf-8")
    return int(only_check and changed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
