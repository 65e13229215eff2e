"""What the parts share: writing figures as they come, timing, memory peaks, errors that cost one figure only."""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Check:
    """One part's surroundings.

    Attributes:
        out: folder of the results.
        device: `cuda`, or `cpu` for a rehearsal.
        tiny: small networks and few repeats: shows that everything runs.
        limit: seconds that this part may take.
    """

    out: Path
    device: str
    tiny: bool
    limit: float
    start: float = field(default_factory=time.time)

    @property
    def on_gpu(self) -> bool:
        """Whether figures are a GPU's."""
        return self.device == "cuda"

    def left(self) -> float:
        """Seconds left to this part."""
        return self.limit - (time.time() - self.start)

    def put(self, name: str, **figures: Any) -> None:
        """Write one line of results, at once, so that nothing measured is lost."""
        with (self.out / "results.jsonl").open("a") as file:
            file.write(json.dumps({"name": name, **figures}) + "\n")
        shown = " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in figures.items())
        print(f"  {name}: {shown}"[:400], flush=True)

    def attempt(self, name: str, work: Callable[..., None], *arguments: Any) -> bool:
        """Do some work; an error becomes a line of results, and the part goes on."""
        try:
            work(*arguments)
        except Exception as error:  # an out-of-memory error, a missing kernel: whatever it is, it is a finding
            traceback.print_exc(file=sys.stderr)
            frames = traceback.extract_tb(error.__traceback__)[-3:]
            where = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
            self.put(name, error=f"{type(error).__name__}: {error}"[:300], where=where)
            if self.on_gpu:
                torch.cuda.empty_cache()
            return False
        return True

    def seconds(self, work: Callable[[], Any], repeats: int = 1) -> float:
        """Median wall clock of a call, the device's work included."""
        times = []
        for _ in range(repeats):
            self._wait()
            start = time.perf_counter()
            work()
            self._wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def fresh_peak(self) -> None:
        """Begin to measure memory anew."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> dict[str, float]:
        """Gigabytes at most allocated and reserved since `fresh_peak`; nothing on a CPU."""
        if not self.on_gpu:
            return {}
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"allocated_gb": allocated / 1e9, "reserved_gb": reserved / 1e9}


def copy_speed() -> float:
    """Bytes per second that weights are read with, for floors: of an H100 unless `GPU_BYTES_PER_SECOND` says other."""
    return float(os.environ.get("GPU_BYTES_PER_SECOND", "3e12"))
