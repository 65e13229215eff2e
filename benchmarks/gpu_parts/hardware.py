"""Parts `info` and `tests`: versions, the card, what small and large operations cost, the CUDA tests."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import ral_gym
from gpu_parts.common import Check

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    *("torch", "triton", "numpy", "accelerate", "torchmetrics", "safetensors", "gymnasium", "stable-baselines3"),
    *("sb3-contrib", "vector-quantize-pytorch", "einx", "tyro", "pytest"),
)


def info(check: Check) -> None:
    """Versions and the card; copies, products and the price of a kernel."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "missing"
    found = {"python": platform.python_version(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    check.put("versions", **found, **versions)
    check.put("package", version=getattr(ral_gym, "__version__", "unknown"))
    if not check.on_gpu:
        return
    card = torch.cuda.get_device_properties(0)
    cudnn = torch.backends.cudnn.version()
    facts = {"memory_gb": card.total_memory / 1e9, "multiprocessors": card.multi_processor_count}
    check.put("device", gpu=card.name, **facts, cuda=torch.version.cuda, cudnn=cudnn)
    check.attempt("copy", _copy, check)
    check.attempt("matmul", _matmul, check)
    check.attempt("kernels", _kernels, check)


def _copy(check: Check) -> None:
    x = torch.randn(2**12 if check.tiny else 2**28, device=check.device)
    y = torch.empty_like(x)
    y.copy_(x)
    check.put("copy", tb_per_s=2 * x.numel() * 4 / check.seconds(lambda: y.copy_(x), 10) / 1e12)


def _matmul(check: Check) -> None:
    n, before = (64 if check.tiny else 8192), torch.backends.cuda.matmul.allow_tf32
    for dtype, tf32 in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
        a, b = (torch.randn(n, n, device=check.device, dtype=dtype) for _ in range(2))
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.mm(a, b)
        work = check.seconds(lambda a=a, b=b: torch.mm(a, b), 5)  # type: ignore[misc]
        check.put(f"matmul {str(dtype)[6:]}{' tf32' * tf32}", tflops=2 * n**3 / work / 1e12)
    torch.backends.cuda.matmul.allow_tf32 = before


def _kernels(check: Check) -> None:
    """What one small operation costs, started one by one and as a node of a graph."""
    z, length = torch.zeros(1024, device=check.device), 200

    def chain() -> None:
        for _ in range(length):
            z.add_(1)

    chain()
    check.put("kernel, started one by one", us=check.seconds(chain, 20) / length * 1e6)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(0), torch.cuda.graph(graph):
        chain()
    graph.replay()
    check.put("kernel, node of a graph", us=check.seconds(graph.replay, 20) / length * 1e6)


def call(check: Check, command: list[str], log: Path, environment: dict[str, str] | None = None) -> int | str:
    """Run a command with its output in a file; "time out" if the part's time was too short for it."""
    with log.open("w") as file:
        try:
            where: dict[str, Any] = {"cwd": ROOT, "env": environment, "stdout": file, "stderr": subprocess.STDOUT}
            return subprocess.call(command, timeout=max(5, check.left() - 3), **where)
        except subprocess.TimeoutExpired:
            return "time out"


def tests(check: Check) -> None:
    """The tests that need a CUDA device; on a CPU two that do not."""
    log, files = check.out / "pytest.log", ["tests/test_cuda.py", "tests/test_core.py", "tests/test_data.py"]
    select = ["-m", "cuda", *files] if check.on_gpu else ["-k", "graphs and cpu", files[0]]
    environment = {**os.environ, "RAL_GYM_TEST_CUDA": "1"}
    environment.pop("PYTHONWARNINGS", None)
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-v", "--durations=8"]
    command += ["-W", "default", *select]  # other versions of the libraries warn of other things
    code = call(check, command, log, environment)
    lines = log.read_text().splitlines()
    failed = [line[:200] for line in lines if line.startswith(("FAILED", "ERROR"))]
    passed = sum(" PASSED" in line for line in lines)
    check.put("tests", code=code, passed=passed, summary=lines[-1][:160] if lines else "", failed=failed)
