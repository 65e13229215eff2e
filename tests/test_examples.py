"""Every example runs, at the smallest scale, and every Python block of the README."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ral_gym.metrics import SeedDifference

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)


def run_script(*arguments: str, cwd: Path) -> str:
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_the_readme_has_blocks() -> None:
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_readme_block_runs(number: int, tmp_path: Path) -> None:
    script = tmp_path / "block.py"
    script.write_text(BLOCKS[number], encoding="utf-8")
    run_script("-W", "error", script, cwd=tmp_path)


@pytest.mark.commands
def test_does_rl_help(tmp_path: Path) -> None:
    example = ROOT / "examples" / "does_rl_help.py"
    flags = ["--preset", "smoke", "--seeds", "1", "2", "--sampling-seeds", "2", "--quiet"]
    text = run_script(example, *flags, cwd=tmp_path)
    assert "Means over seeds 1, 2" in text
    folder = tmp_path / "runs" / "does_rl_help_smoke"
    summary = json.loads((folder / "results.json").read_text())
    table = [json.loads((tmp_path / "runs" / f"smoke-seed{s}" / "results.json").read_text())["rows"] for s in (1, 2)]
    assert summary["rows"]["ral"]["fd"] == [rows["ral"]["fd"] for rows in table]
    (ral,) = (line for line in (folder / "table.md").read_text().splitlines() if line.startswith("| `ral` |"))
    assert re.match(r"\| `ral` \| -?[\d.]+ ± [\d.]+ \|", ral)
    assert f"| {table[0]['ral']['fd']:.1f} / {table[1]['ral']['fd']:.1f} |" in ral
    differences = [rows["ral"]["fd"] - rows["mle_continued"]["fd"] for rows in table]
    assert ral.endswith(f"| {SeedDifference.from_values(dict(enumerate(differences))).markdown()} |")
    assert "| FD spread |" in (folder / "table.md").read_text()
    assert (folder / "frontier_seed1.png").stat().st_size > 1000
    each = f"{differences[0]:+.1f} / {differences[1]:+.1f}; mean {sum(differences) / 2:+.1f} ["
    said = "* At temperature 1, RAL's FD minus that of `mle_continued`: " + each
    assert said in (folder / "table.md").read_text() and said[2:60] in text
