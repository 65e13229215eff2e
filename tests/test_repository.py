"""The repository itself: who may import whom, what a wheel holds, doctests, versions, documents.

The folders envs/ and agents/ are installed as ral_gym.envs and ral_gym.agents (``package-dir`` in
pyproject.toml); those two names at the top level belong to other projects.
"""

import ast
import doctest
import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"ral_gym": ROOT / "ral_gym", "ral_gym.envs": ROOT / "envs", "ral_gym.agents": ROOT / "agents"}
SCRIPT_FOLDERS = [ROOT / "examples", ROOT / "benchmarks", ROOT / "tests"]
# The commands, and the page of one of them, may put all three parts together.
COMPOSITION_ROOT = ("ral_gym.commands", "ral_gym.__main__", "ral_gym.play")
RL_LIBRARIES = {"stable_baselines3", "sb3_contrib"}
MAX_LINES = 400


def module_name(path: Path, folder: Path, package: str) -> str:
    """The dotted name a file is imported under."""
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])


MODULES = {
    module_name(path, folder, package): path
    for package, folder in FOLDERS.items()
    for path in sorted(folder.rglob("*.py"))
}
# ``__main__`` runs the command line when it is imported.
IMPORTABLE = [name for name in MODULES if not name.endswith("__main__")]


def imported_names(source: str, name: str, is_package: bool) -> set[str]:
    """Every module that a module's source asks for, by dotted name, wherever in the file it does.

    ``from a import b`` counts as ``a`` and as ``a.b``, since b may be a module.
    """
    package = name if is_package else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in {"import_module", "__import__"}:
                found.add(str(node.args[0].value))
    return found


def forbidden_to(name: str) -> set[str]:
    """The modules (and all below them) that the module `name` may not import."""
    if name.startswith((*COMPOSITION_ROOT, "ral_gym.agents")):
        return {"envs", "agents"}
    if name.startswith("ral_gym.envs"):
        return {"envs", "agents", "ral_gym.agents", *RL_LIBRARIES}
    forbidden = {"envs", "agents", "ral_gym.envs", "ral_gym.agents", *RL_LIBRARIES, "gymnasium"}
    # The package registers its environment ids, as strings.
    return forbidden - {"gymnasium"} if name == "ral_gym" else forbidden


def violations(source: str, name: str, is_package: bool) -> set[str]:
    """The imports of a module's source that point against the arrows agents -> envs -> ral_gym."""
    forbidden = forbidden_to(name)
    return {
        imported
        for imported in imported_names(source, name, is_package)
        if any(imported == module or imported.startswith(module + ".") for module in forbidden)
    }


def test_imports_point_one_way() -> None:
    found = {
        name: bad
        for name, path in MODULES.items()
        if (bad := violations(path.read_text(encoding="utf-8"), name, path.name == "__init__.py"))
    }
    assert not found, f"imports against the arrows agents -> envs -> ral_gym: {found}"


@pytest.mark.parametrize(
    ("name", "is_package", "source"),
    [
        ("ral_gym.rewards.critic", False, "import ral_gym.agents.policy"),
        ("ral_gym.rewards.critic", False, "from ral_gym import envs"),
        ("ral_gym.grid", False, "from .agents import policy"),
        ("ral_gym.rewards.critic", False, "def f():\n    from gymnasium import spaces"),
        ("ral_gym.stages.rl", False, "from ..envs.core import GenerationCore"),
        ("ral_gym.stages", True, "from .. import agents"),
        ("ral_gym", True, "import stable_baselines3 as sb3"),
        ("ral_gym.priors.sampler", False, "import importlib\nimportlib.import_module('ral_gym.envs')"),
        ("ral_gym.envs.core", False, "from sb3_contrib.trpo import TRPO"),
        ("ral_gym.envs.core", False, "from ..agents import policy"),
        ("ral_gym.agents.policy", False, "from envs import core"),
    ],
)
def test_an_import_against_the_arrows_is_seen(name: str, is_package: bool, source: str) -> None:
    assert violations(source, name, is_package)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("ral_gym", "import gymnasium"),
        ("ral_gym.commands.cli", "from ral_gym.agents import policy\nfrom ral_gym.envs import core"),
        ("ral_gym.envs.core", "import gymnasium\nfrom ral_gym import vqvae\nfrom . import render"),
        ("ral_gym.agents.policy", "from stable_baselines3 import PPO\nfrom ral_gym.envs import core"),
    ],
)
def test_an_import_along_the_arrows_is_let_through(name: str, source: str) -> None:
    assert not violations(source, name, is_package=False)


def import_graph() -> dict[str, set[str]]:
    """Module -> the package's modules that it imports, anywhere in its file, for type checking too."""
    graph = {}
    for name, path in MODULES.items():
        found = imported_names(path.read_text(encoding="utf-8"), name, path.name == "__init__.py")
        # ``from a.b import c`` gives a.b and a.b.c: where c is a module, the package around it is not what is meant.
        found &= MODULES.keys()
        graph[name] = {one for one in found if not any(other.startswith(f"{one}.") for other in found)} - {name}
    return graph


def room_of(name: str) -> str:
    """The folder of a module, or the module itself where it lies at the top; envs and agents are one room each."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else name


def circles(graph: dict[str, set[str]]) -> set[str]:
    """What is left of a graph when whatever imports nothing that is left is taken away, again and again."""
    left = dict(graph)
    while leaves := {name for name, imported in left.items() if not imported & left.keys()}:
        left = {name: imported for name, imported in left.items() if name not in leaves}
    return set(left)


def test_no_module_imports_itself_through_others() -> None:
    assert not circles(import_graph())


def test_no_room_of_the_house_imports_itself_through_others() -> None:
    rooms: dict[str, set[str]] = {}
    for name, imported in import_graph().items():
        here = rooms.setdefault(room_of(name), set())
        here |= {room_of(other) for other in imported} - {room_of(name)}
    assert not circles(rooms)
    assert len(rooms) <= 23, "the folder list is to be read as the data path"


def test_only_its_own_file_asks_whether_a_prior_is_a_pixelcnn() -> None:
    asked = re.compile(r"isinstance\([^\n]*\b(PixelCNN|TwoLevelPrior)\b")
    files = [
        path for name in ("ral_gym", "envs", "agents", "examples", "benchmarks") for path in (ROOT / name).rglob("*.py")
    ]
    found = {path.name for path in files if asked.search(path.read_text(encoding="utf-8"))}
    assert found <= {"pixelcnn.py", "two_level.py"}, "use the protocols of ral_gym.priors.base"


def test_a_circle_is_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == {"a", "b", "c", "d"}


def run_python(code: str, *options: str, cwd: Path) -> str:
    """Run code in a fresh interpreter with warnings as errors; its standard output."""
    command = [sys.executable, "-W", "error", *options, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=240)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_no_module_is_called_envs_or_agents() -> None:
    # The working directory is on sys.path here, so that a stray ``import envs`` would succeed.
    code = f"""
        import importlib, sys
        for name in {IMPORTABLE!r}:
            importlib.import_module(name)
        print([name for name in sys.modules if name.split(".")[0] in ("envs", "agents")])
    """
    assert run_python(code, cwd=ROOT).strip() == "[]"


def test_importing_the_generative_half_loads_no_rl_library() -> None:
    half = [name for name in IMPORTABLE if not name.startswith(("ral_gym.envs", "ral_gym.agents", *COMPOSITION_ROOT))]
    code = f"""
        import importlib, sys
        for name in {half!r}:
            importlib.import_module(name)
        print(sorted({RL_LIBRARIES!r} & set(sys.modules)))
    """
    assert run_python(code, cwd=ROOT).strip() == "[]"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline from a copy, since a build writes into the tree it builds from."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", str(folder), str(folder / "source")]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=240)
    assert result.returncode == 0, result.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    info = f"ral_gym-{project()['version']}.dist-info"
    assert {name.split("/")[0] for name in names} == {"ral_gym", info}
    templates = {f"ral_gym/report/templates/{path.name}" for path in (ROOT / "ral_gym/report/templates").iterdir()}
    assert {"ral_gym/py.typed", "ral_gym/play/style.css", *templates} <= set(names) and len(templates) == 3
    assert {name for name in names if name.endswith(".py")} == {
        f"{package.replace('.', '/')}/{path.relative_to(folder).as_posix()}"
        for package, folder in FOLDERS.items()
        for path in folder.rglob("*.py")
    }
    assert any(name.startswith(info) and name.endswith("LICENSE") for name in names)


def test_the_installed_wheel_imports_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True, stdin=subprocess.DEVNULL, timeout=240)
    assert not {"envs", "agents"} & {path.name for path in target.iterdir()}
    # -I and -S: no working directory, no variables, and no .pth files, so that the editable install cannot help.
    dependencies = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    code = f"""
        import sys
        sys.path[:0] = [{str(target)!r}, *{dependencies!r}]
        import ral_gym, ral_gym.envs, ral_gym.agents
        print(ral_gym.__file__, ral_gym.envs.__file__, ral_gym.agents.__file__, sep="\\n")
    """
    files = [Path(line).relative_to(target).as_posix() for line in run_python(code, "-I", "-S", cwd=elsewhere).split()]
    assert files == ["ral_gym/__init__.py", "ral_gym/envs/__init__.py", "ral_gym/agents/__init__.py"]


def test_the_root_of_a_checkout_works_after_a_plain_installation(wheel: Path, tmp_path: Path) -> None:
    # There the folder ral_gym shadows the installed package, and has no envs and no agents in it.
    target = tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True, stdin=subprocess.DEVNULL, timeout=240)
    dependencies = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    code = f"""
        import sys
        sys.path[:0] = ["", {str(target)!r}, *{dependencies!r}]
        import ral_gym, gymnasium
        gymnasium.make("ral_gym/Toy-v0").reset(seed=0)
        import ral_gym.agents
        print(ral_gym.__file__)
    """
    assert Path(run_python(code, "-I", "-S", cwd=ROOT).strip()) == ROOT / "ral_gym" / "__init__.py"


@pytest.mark.parametrize("name", IMPORTABLE)
def test_doctests(name: str) -> None:
    # By import, never by path: collecting envs/core.py by path would load a second copy of it.
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_files_stay_short() -> None:
    paths = [*MODULES.values(), *(path for folder in SCRIPT_FOLDERS for path in folder.rglob("*.py"))]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert not {name: lines for name, lines in lengths.items() if lines > MAX_LINES}


def python_blocks(text: str) -> list[str]:
    """The fenced python blocks of a Markdown text, without those right below ``<!-- no-test -->``."""
    fence = re.compile(r"^(<!-- no-test -->\s*)?^([ ]*)```python[^\n]*\n(.*?)^\2```\s*$", re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(match[3]) for match in fence.finditer(text) if not match[1]]


def test_python_blocks_in_the_documents_compile() -> None:
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for number, block in enumerate(python_blocks(path.read_text(encoding="utf-8")), start=1):
            compile(block, f"{path.name}, python block {number}", "exec")


def test_python_blocks_are_found() -> None:
    text = (
        "```python\na\n```\n<!-- no-test -->\n```python\nb(\n```\n```bash\nc\n```\n* d\n  ```python\n  d\n  e\n  ```\n"
    )
    assert python_blocks(text) == ["a\n", "d\ne\n"]


def project() -> dict[str, Any]:
    """The ``[project]`` table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def first_match(pattern: str, file: str) -> str:
    """The first group of the first match of `pattern` in a file of the repository."""
    match = re.search(pattern, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    assert match, f"{file} has no line like {pattern}"
    return match[1]


def test_one_version_everywhere() -> None:
    versions = {
        "pyproject.toml": project()["version"],
        "ral_gym.__version__": importlib.import_module("ral_gym").__version__,
        "CITATION.cff": first_match(r"^version: \"?([^\s\"]+)", "CITATION.cff"),
        "CHANGELOG.md": first_match(r"^## \[?(\d[^\s\]]*)", "CHANGELOG.md"),
    }
    assert len(set(versions.values())) == 1, versions


def test_every_dependency_has_a_tested_version() -> None:
    def names(requirements: list[str]) -> set[str]:
        bare = {re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-") for requirement in requirements}
        return bare - {"ral-gym"}

    extras = {key: value for key, value in project()["optional-dependencies"].items() if key != "fid"}
    declared = names([*project()["dependencies"], *(name for group in extras.values() for name in group)])
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = names([line for line in lines if re.fullmatch(r"[\w.-]+==[\w.]+", line)])
    assert declared <= pinned, declared - pinned


def test_the_lowest_versions_are_the_bounds() -> None:
    extras = project()["optional-dependencies"]
    installed = [*project()["dependencies"], *extras["demo"], *extras["lsun"], *extras["hf"]]
    installed += [name for name in extras["test"] if name.startswith(("pytest", "hypothesis", "pygame"))]
    bounds = dict(re.fullmatch(r"([\w.-]+)>=([\d.]+)", requirement).groups() for requirement in installed)  # type: ignore[union-attr]
    assert bounds.pop("torch"), "its lowest version is tried by hand"
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: Version(bound) for name, bound in bounds.items()} == {name: Version(v) for name, v in pins.items()}


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_help_lists_every_target() -> None:
    # Under `make test` this would be a sub-make, which prints more.
    outside = {key: value for key, value in os.environ.items() if key not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
    result = subprocess.run(
        ["make", "help"], cwd=ROOT, env=outside, capture_output=True, text=True, check=True, timeout=60
    )
    phony = first_match(r"^\.PHONY: (.*)", "Makefile").split()
    assert [line.split()[1] for line in result.stdout.splitlines()] == phony


def test_the_ci_script_runs_check_then_every_kind_of_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = re.findall(r"^timed make (\S+)$", script.read_text(encoding="utf-8"), re.MULTILINE)
    assert commands == [
        "venv",
        "check",
        "docs",
        "test",
        "test-commands",
        "test-processes",
        "test-browser",
        "test-parity",
    ]
