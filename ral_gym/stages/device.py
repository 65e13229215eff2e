"""The torch device of a setting such as `auto` or `cuda:1`."""

from __future__ import annotations

import re

import torch

from ral_gym.errors import DeviceError


def resolve_device(name: str, auto: bool = True) -> torch.device:
    """`auto`: CUDA if available, else the CPU; `cpu`, `cuda` or `cuda:N`: that device.

    Args:
        name: the name.
        auto: False: refuse `auto`, for a setting that is saved and must mean the same everywhere.

    Raises:
        DeviceError: a device that does not exist here.
    """
    choice = f"choose {'auto, ' if auto else ''}cpu, cuda or cuda:N"
    if auto and name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    if not isinstance(name, str) or not re.fullmatch(r"cuda(:[0-9]+)?", name):
        raise DeviceError(f"unknown device {name!r}: {choice}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(name[5:] or 0) >= count:
        instead = "use --device cpu or auto" if auto else "choose cpu"
        raise DeviceError(f"device '{name}' asked for, but {count} CUDA devices are visible; {instead}")
    return torch.device(name)
