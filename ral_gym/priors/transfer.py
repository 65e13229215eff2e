"""Index arrays of the host on the device, without a wait.

A plain copy to a CUDA device waits until the device has done everything that was started before. These do not: CUDA
takes an array from ordinary memory at once, so that it may change or go as soon as the call returns.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor on a device; on the CPU it shares the array's memory."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def indices_on(device: torch.device, *arrays: np.ndarray) -> tuple[Tensor, ...]:
    """Index arrays (n,) of equal length, as int64 tensors on a device, in one copy."""
    return on_device(np.stack(arrays).astype(np.int64, copy=False), device).unbind()
