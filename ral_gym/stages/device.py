"""The torch device of a setting such as `auto` or `cuda:1`, and the precision of its products.

On CUDA cuDNN rounds the inputs of float32 convolutions to TF32 by default, which has 10 bits: the sampler's products,
which are matrix products, and a full pass's would then differ, probability ratios of an unchanged policy would not be
1, and an evaluation would depend on what ran before it in the same process. So there is one rule: everything computes
in float32 with repeatable algorithms (`resolve_device`), except the training of stages 1 and 2 (`fast_products`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ral_gym.errors import DeviceError


def resolve_device(name: str, auto: bool = True) -> torch.device:
    """`auto`: CUDA if available, else the CPU; `cpu`, `cuda` or `cuda:N`: that device.

    For a CUDA device it also sets, for the whole process, what this module's page says: no TF32, and cuDNN's repeatable
    algorithms.

    Args:
        name: the name.
        auto: False: refuse `auto`, for a setting that is saved and must mean the same everywhere.

    Raises:
        DeviceError: a device that does not exist here.
    """
    choice = f"choose {'auto, ' if auto else ''}cpu, cuda or cuda:N"
    if auto and name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not isinstance(name, str) or not re.fullmatch(r"cuda(:[0-9]+)?", name):
        raise DeviceError(f"unknown device {name!r}: {choice}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(name[5:] or 0) >= count:
        instead = "use --device cpu or auto" if auto else "choose cpu"
        raise DeviceError(f"device '{name}' asked for, but {count} CUDA devices are visible; {instead}")
    _compute_exactly()
    return torch.device(name)


def _compute_exactly() -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Let float32 products on a CUDA device round their inputs to TF32, as the training of stages 1 and 2 does."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
