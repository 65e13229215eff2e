"""Arrays of the host on the device, without a wait, and the device's numbers on the host, in one wait.

A plain copy to a CUDA device waits until the device has done everything that was started before. These do not: CUDA
takes a small array from ordinary memory at once, so that it may change or go as soon as the call returns; a large one
it takes from page-locked memory, where `sent` puts it. So the host goes on to gather and send the next batch while the
device works on this one, as long as nothing between the two waits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor on a device; on the CPU it shares the array's memory."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def indices_on(device: torch.device, *arrays: np.ndarray) -> tuple[Tensor, ...]:
    """Index arrays (n,) of equal length, as int64 tensors on a device, in one copy."""
    return on_device(np.stack(arrays).astype(np.int64, copy=False), device).unbind()


def sent(array: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """An array of any size as a tensor on a device; on the CPU it may share the array's memory."""
    tensor = torch.from_numpy(array) if isinstance(array, np.ndarray) else array
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def numbers(values: Sequence[Tensor | float]) -> list[float]:
    """Scalars as Python's floats, all of a device in one transfer; each is exactly what its own `item` would give."""
    tensors = [value.detach().double() for value in values if isinstance(value, Tensor)]
    fetched = iter(torch.stack(tensors).tolist() if tensors else [])
    return [next(fetched) if isinstance(value, Tensor) else float(value) for value in values]
