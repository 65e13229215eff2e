"""What a GPU makes of the project, in one command of at most 7 minutes: `make gpu-check`.

    python benchmarks/gpu_check.py                        # on a CUDA device; results in gpu_check/
    python benchmarks/gpu_check.py --only sampling tests
    python benchmarks/gpu_check.py --tiny                 # a rehearsal on the CPU; its figures mean nothing

Each part is a process with a time limit of its own, and each figure is written as soon as it is measured, so a part
that fails or hangs loses only what it has not measured yet. No network is needed. Files: `results.jsonl` (each figure),
`results.json` (all), `table.txt`, and logs. Figures called `floor_by_weight_reads` are computed, not measured: the
seconds that reading the weights once per code takes at 3 TB/s.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PARTS = {
    "info": ("hardware", 25),
    "tests": ("hardware", 60),
    "graphs": ("drawing", 25),
    "sampling": ("drawing", 90),
    "transformer": ("drawing", 40),
    "stages": ("training", 60),
    "rl": ("training", 60),
    "memory": ("training", 30),
    "pipeline": ("training", 75),
    "rollout": ("training", 40),
    "kernels": ("drawing", 25),
}
"""Part -> its module, and seconds at most; the budget ends them earlier."""


def run_part(name: str, limit: float, out: Path, tiny: bool) -> str:
    """One part in a process group of its own, ended when its time is up; says how it went."""
    start = time.time()
    print(f"== {name} (at most {limit:.0f} s)", flush=True)
    command = [sys.executable, __file__, "--part", name, "--out", str(out), "--budget", str(limit)]
    with (out / "parts.log").open("a") as log:
        log.write(f"==== {name}\n")
        log.flush()
        process = subprocess.Popen(
            [*command, "--tiny"] if tiny else command, stderr=log, text=True, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit)
            state = "ok" if code == 0 else f"exit {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            state = "time out"
    state += f", {time.time() - start:.0f} s"
    print(f"-- {name}: {state}", flush=True)
    return state


def table(out: Path, states: dict[str, str]) -> str:
    """All figures as text; also writes them as one JSON file."""
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    (out / "results.json").write_text(json.dumps({"parts": states, "results": rows}, indent=1) + "\n")
    lines = ["", "parts: " + "; ".join(f"{name} {state}" for name, state in states.items())]
    for row in rows:
        name = row.pop("name")
        if name == "rollout":
            lines += [f"rollout  code {row['code']}", *row["lines"]]
            continue
        cells = [
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in row.items()
            if key not in ("top", "where")
        ]
        lines.append(f"{name:52.52} {'  '.join(cells)}"[:220])
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--tiny", action="store_true", help="tiny networks on the CPU: shows that everything runs")
    parser.add_argument("--budget", type=float, default=410, help="seconds for all parts together (default: 410)")
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder of the results")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the parts, or one of them in this process; 0 if all of them ended well."""
    arguments = parse(argv)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    if arguments.part:
        from gpu_parts.common import Check

        check = Check(out.resolve(), "cpu" if arguments.tiny else "cuda", arguments.tiny, arguments.budget)
        getattr(importlib.import_module(f"gpu_parts.{PARTS[arguments.part][0]}"), arguments.part)(check)
        return 0
    if not arguments.tiny:
        import torch

        if not torch.cuda.is_available():
            print("gpu_check: no CUDA device here; --tiny rehearses on the CPU", file=sys.stderr)
            return 2
    for name in ("results.jsonl", "parts.log"):
        (out / name).write_text("")
    end, states = time.time() + arguments.budget, {}
    for name in arguments.only:
        limit = min(PARTS[name][1] * (10 if arguments.tiny else 1), end - time.time())
        states[name] = run_part(name, limit, out, arguments.tiny) if limit > 5 else "no time left"
    text = table(out, states)
    (out / "table.txt").write_text(text + "\n")
    print(text)
    failed = any(not state.startswith("ok") for state in states.values())
    return 1 if failed or any("error" in line for line in (out / "results.jsonl").read_text().splitlines()) else 0


if __name__ == "__main__":
    sys.exit(main())
