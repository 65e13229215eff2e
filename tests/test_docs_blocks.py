"""Every Python block of the pages runs, in a folder of its own from which examples/extending can be imported.

The blocks of docs/exposure_bias.md are run by test_exposure_lesson.py, those of README by test_examples.py.
"""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ELSEWHERE = {"exposure_bias.md"}
FENCE = re.compile(r"^(<!-- no-test -->\n)?^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
RUNNER = """
import pathlib, sys
for number, path in enumerate(sys.argv[1:], start=1):
    print(f"block {number}", file=sys.stderr)
    exec(compile(pathlib.Path(path).read_text(encoding="utf-8"), path, "exec"), {"__name__": "__block__"})
"""


def blocks(page: Path) -> list[str]:
    """The Python blocks of a page that are to run."""
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [textwrap.dedent(match[2]) for match in found if not match[1]]


PAGES = [page for page in sorted(DOCS.rglob("*.md")) if page.name not in ELSEWHERE and blocks(page)]


def test_the_pages_have_blocks() -> None:
    names = {page.relative_to(DOCS).as_posix() for page in PAGES}
    doors = {f"extending/{path.name}" for path in (DOCS / "extending").iterdir()}
    algorithms = {f"algorithms/{path.name}" for path in (DOCS / "algorithms").iterdir()} - {"algorithms/index.md"}
    assert names >= {"index.md", "quickstart.md", "environments/index.md", *doors, *algorithms}


@pytest.mark.commands
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path) -> None:
    files = []
    for number, block in enumerate(blocks(page), start=1):
        files.append(tmp_path / f"block_{number}.py")
        files[-1].write_text(block, encoding="utf-8")
    command = [sys.executable, "-W", "error", "-c", RUNNER, *map(str, files)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "examples" / "extending")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_door_has_a_page_and_every_page_a_door() -> None:
    from ral_gym import registry

    texts = [path.read_text(encoding="utf-8") for path in DOCS.glob("extending/*.md")]
    pages = {name for text in texts for name in re.findall(r"`ral_gym\.registry\.([A-Z]+)`", text)}
    doors = {name for name in vars(registry) if isinstance(getattr(registry, name), registry.Registry)}
    assert pages == doors


def test_every_built_in_algorithm_with_a_prior_has_a_page() -> None:
    from ral_gym.config.algorithms import SECTIONS

    assert {path.stem for path in DOCS.glob("algorithms/*.md")} - {"index"} == set(SECTIONS)
