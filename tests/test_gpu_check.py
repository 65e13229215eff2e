"""`make gpu-check`, rehearsed: at tiny size on the CPU, and its CUDA lines on a pretended device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_parts import drawing, hardware, training
from gpu_parts.common import Check

from tests.pretend_device import pretend_cuda

SCRIPT = Path(__file__).parents[1] / "benchmarks/gpu_check.py"


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.commands
@pytest.mark.parametrize("part", [drawing.graphs, drawing.sampling, drawing.transformer, training.memory])
def test_the_lines_for_cuda_run_on_a_pretended_device(tmp_path: Path, monkeypatch: Any, part: Any) -> None:
    check = Check(tmp_path, "cuda", tiny=True, limit=1000)
    with pretend_cuda() as device:
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 0)
        part(check)
    found = lines(tmp_path)
    assert found and not [line for line in found if "error" in line or "skipped" in line]
    assert bool(device.counts["replays"]) == (part in (drawing.graphs, drawing.sampling, drawing.transformer))


def test_info_of_a_pretended_card(tmp_path: Path, monkeypatch: Any) -> None:
    check = Check(tmp_path, "cuda", tiny=True, limit=1000)
    with pretend_cuda():
        facts = SimpleNamespace(name="pretended", total_memory=1, multi_processor_count=1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
        hardware.info(check)
    assert not [line for line in lines(tmp_path) if "error" in line]
    assert [line["gpu"] for line in lines(tmp_path) if line["name"] == "device"] == ["pretended"]


def test_a_part_that_fails_or_has_no_time_loses_only_itself(tmp_path: Path) -> None:
    check = Check(tmp_path, "cpu", tiny=True, limit=1000)

    def broken() -> None:
        raise RuntimeError("out of memory")

    assert not check.attempt("broken", broken)
    check.put("next", value=1.0)
    assert [line["name"] for line in lines(tmp_path)] == ["broken", "next"]
    assert lines(tmp_path)[0]["error"] == "RuntimeError: out of memory"
    late = Check(tmp_path, "cpu", tiny=True, limit=0)
    drawing.transformer(late)
    assert all("skipped" in line for line in lines(tmp_path)[2:])


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--out", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


@pytest.mark.commands
def test_the_whole_check_at_tiny_size(tmp_path: Path) -> None:
    done = run(tmp_path, "--tiny", "--budget", "450")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert all(state.startswith("ok") for state in found["parts"].values()) and len(found["parts"]) == 11
    codes = {line["name"]: line["code"] for line in found["results"] if "code" in line}
    assert codes == {"tests": 0, "pipeline train": 0, "pipeline verify": 0, "rollout": 0}
    assert (tmp_path / "table.txt").read_text().count("\n") > 30


@pytest.mark.commands
def test_a_part_that_hangs_is_ended(tmp_path: Path) -> None:
    done = run(tmp_path, "--tiny", "--only", "pipeline", "--budget", "6")
    assert done.returncode == 1 and "pipeline: time out" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 2 and "no CUDA device here; --tiny rehearses on the CPU" in done.stderr
