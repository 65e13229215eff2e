"""`python -m ral_gym demo` in any folder, from an installed wheel, without the checkout."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("ral_gym", "envs", "agents", "pyproject.toml", "README.md", "LICENSE")


@pytest.mark.commands
def test_the_demo_runs_in_any_folder_from_a_wheel(tmp_path: Path) -> None:
    source, target, elsewhere = (tmp_path / name for name in ("source", "target", "elsewhere"))
    source.mkdir()
    elsewhere.mkdir()
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, source / part)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    install = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)]
    subprocess.run(install, check=True, stdin=subprocess.DEVNULL, timeout=240)
    shutil.rmtree(source)
    dependencies = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path[1:]} - {str(ROOT)})
    dependencies = [path for path in dependencies if path.endswith("site-packages")]
    # -I and -S: no working directory, no variables, no .pth files, so that the editable install cannot help.
    code = f"""if True:
        import runpy, sys
        sys.path[:0] = [{str(target)!r}, *{dependencies!r}]
        sys.argv = ["ral_gym", "demo", "--preset", "smoke", "--device", "cpu"]
        runpy.run_module("ral_gym", run_name="__main__", alter_sys=True)
    """
    command = [sys.executable, "-I", "-S", "-c", code]
    result = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, timeout=540)
    assert result.returncode == 0, result.stderr
    run = elsewhere / "runs" / "smoke"
    assert (run / "results.json").is_file() and (run / "samples" / "real_mle_ral.png").is_file()
    assert "First images: runs/smoke/samples/progress.png" in result.stderr
    # A log file gets whole lines: a start, a line per stage and minute, and no bar that is drawn again and again.
    assert "\\r" not in result.stderr and len(result.stderr.splitlines()) < 15
    assert "4 evaluation: " in result.stderr and "FD" in result.stdout
