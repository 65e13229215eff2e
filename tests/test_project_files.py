"""Files for those who carry on: workflows and templates fit their schemas, hooks and archives name what is there."""

import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


def check(schema: str, *files: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_workflows_fit_their_schema(tmp_path) -> None:
    assert len(WORKFLOWS) == 3
    done = check("vendor.github-workflows", *WORKFLOWS)
    assert done.returncode == 0, done.stdout + done.stderr
    broken = tmp_path / "broken.yml"
    broken.write_text(WORKFLOWS[0].read_text().replace("runs-on:", "run-on:"))
    assert check("vendor.github-workflows", broken).returncode


def test_what_workflows_and_hooks_run_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lines = [hook["entry"] for hook in hooks]
    for file in WORKFLOWS:
        for job in yaml.safe_load(file.read_text())["jobs"].values():
            lines += [step["run"] for step in job["steps"] if "run" in step]
    made = {target for line in lines for target in re.findall(r"^make ([a-z-]+)", line)}
    assert made and made <= targets
    assert (ROOT / ".ci/run").is_file() and ".ci/run" in lines
    named = set(re.findall(r"`make ([a-z-]+)`", (ROOT / "CONTRIBUTING.md").read_text()))
    assert named <= targets, named - targets


def test_forms_have_a_name_and_fields() -> None:
    for file in FORMS:
        form = yaml.safe_load(file.read_text())
        if file.name == "config.yml":
            continue
        assert form["name"] and form["description"]
        assert {part["type"] for part in form["body"]} <= {"textarea", "checkboxes", "input", "dropdown", "markdown"}
        assert all(part["attributes"].get("label") for part in form["body"])


def test_the_gallery_names_every_example_and_its_pictures_are_there() -> None:
    folder, page = ROOT / "examples", (ROOT / "examples/README.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)
    pictures = {path.relative_to(folder).as_posix() for path in (folder / "pictures").iterdir()}
    assert set(shown) == pictures and len(shown) == len(pictures)
    assert all((folder / name).stat().st_size <= 60_000 for name in shown)
    named = {link for link in re.findall(r"(?<!!)\[[^\]]+\]\(([^)]+)\)", page) if not link.startswith("../")}
    parts = [*folder.glob("*.py"), *folder.glob("notebooks/*.ipynb"), *folder.glob("extending/own_*")]
    assert named == {path.relative_to(folder).as_posix() for path in parts}
    commands = set(re.findall(r"`python examples/(\w+\.py)", page))
    assert commands == {path.name for path in folder.glob("*.py")} - {"rl_zoo3_conf.py"}
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ") and "`](" in line]
    assert all(cells[-1].strip(" |") for cells in rows)


@pytest.mark.commands
def test_the_archives_hold_what_a_reader_needs(tmp_path) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (source,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", str(source), str(wheel)], check=True, timeout=120
    )
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CHANGELOG.md", "examples/train_celeba.py", "docs/results.md", "envs/core.py"} <= names
    shown = [*(ROOT / "examples").rglob("*.ipynb"), *(ROOT / "examples/pictures").iterdir()]
    assert {path.relative_to(ROOT).as_posix() for path in shown} <= names
    assert not any(name.startswith(("runs", ".venv", "docs/_build", ".git")) for name in names)
