"""What a checkpoint holds, checked before it is put back: its numbers, arrays and tensors may be anything.

The callers are inside `ral_gym.runs.run.Run.restoring`, which makes one line of a `ValueError`, with the file's name.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor


def integer_of(value: Any, name: str, low: int = 0, high: int = 2**53) -> int:
    """An integer in low..high.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r:.40}: an integer in {low}..{high} is needed")
    return value


def number_of(value: Any, name: str) -> float:
    """A finite number.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r:.40}: a finite number is needed")
    return float(value)


def array_of(
    value: Any, name: str, shape: tuple[int | None, ...], dtype: DTypeLike, low: int = 0, high: int = 2**53
) -> np.ndarray:
    """A fresh array of this shape and dtype.

    Args:
        value: what the checkpoint has.
        name: for the message.
        shape: None: any length.
        dtype: integer, boolean or floating point; the value must be of the same kind.
        low: smallest integer.
        high: largest integer.

    Raises:
        ValueError: another shape or kind, or an integer out of range.
    """
    array, wanted = np.asarray(value), np.dtype(dtype)
    fits = array.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, array.shape, strict=True))
    if not fits or (array.dtype.kind != wanted.kind and array.size):
        raise ValueError(f"{name} has shape {array.shape} and dtype {array.dtype}: {shape} and {wanted} are needed")
    if wanted.kind in "iu" and array.size and not low <= array.min() <= array.max() <= high:
        raise ValueError(f"{name} lies in {array.min()}..{array.max()}: {low}..{high} is needed")
    return np.array(array, wanted)


def tensor_like(value: Any, name: str, like: Tensor) -> Tensor:
    """A tensor of the shape, dtype and device of `like`, with finite numbers.

    Raises:
        ValueError: it is another one.
    """
    if not isinstance(value, Tensor) or value.shape != like.shape or value.dtype != like.dtype:
        found = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else f"{value!r:.40}"
        raise ValueError(f"{name} is {found}: {tuple(like.shape)} {like.dtype} is needed")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} has NaN or infinite numbers")
    return value.to(like.device)
