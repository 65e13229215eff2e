"""Replaying a sampling cache's work as CUDA graphs: one launch in place of some hundred."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch

CALLS_BEFORE_RECORDING = 3
"""A recording waits for the device and costs some ten ordinary runs: work done once or twice is not recorded."""


class CudaGraphs:
    """The graphs of one cache, by key; all share one memory pool, since results lie in the cache's own tensors.

    Args:
        device: the device of the cache's tensors, and so of the graphs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._calls: Counter[Hashable] = Counter()
        self._pool: Any = None

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Do the work, from its third call on by replaying it; only the contents of its tensors may change."""
        with torch.cuda.device(self.device):  # graphs are recorded and replayed on the current device
            if key in self._graphs:
                self._graphs[key].replay()
                return
            work()
            self._calls[key] += 1
            if self._calls[key] >= CALLS_BEFORE_RECORDING:
                self._graphs[key] = self._record(work)

    def _record(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """The graph of some work that has just been done; recording does not do it again."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate memory meanwhile, as a TensorBoard writer does.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        return graph
