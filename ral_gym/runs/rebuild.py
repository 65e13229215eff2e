"""Building a module from the arguments in an untrusted file: its size is checked before memory is allocated.

The arguments come from a file's metadata and could be anything. So the module is first built on PyTorch's `meta`
device, where tensors have shapes but no content, and building stops once it has more parameters than the file.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as registration

LARGEST_ARGUMENT = 2**24
"""Largest integer among a module's arguments: sizes, numbers of layers and codes."""
MOST_BUFFERS = 2**30
"""Most bytes of buffers that are not saved, such as masks."""


def check_arguments(arguments: Any) -> dict[str, Any]:
    """Check constructor arguments from a file.

    Raises:
        ValueError: they are not a dict, or an integer among them is too large.
    """
    if not isinstance(arguments, dict):
        raise ValueError("no arguments of a module")
    pending: list[Any] = [arguments]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list | tuple):
            pending += value
        elif isinstance(value, int | float) and not abs(value) <= LARGEST_ARGUMENT:
            raise ValueError(f"an argument above {LARGEST_ARGUMENT:,}")
    return arguments


def build(cls: type[nn.Module], arguments: dict[str, Any], shapes: Mapping[str, Sequence[int]]) -> nn.Module:
    """Build the module, with its initial weights, after comparing names and shapes with those of a file.

    Args:
        cls: the module's class.
        arguments: its constructor's, see `check_arguments`.
        shapes: tensor -> shape in the file.

    Raises:
        ValueError: names or shapes differ; the message names the first such tensor.
        TypeError, RuntimeError: the arguments do not fit the class.
    """
    with _at_most(len(shapes)):
        try:
            with torch.device("meta"):
                module = cls(**arguments)
        except (NotImplementedError, RuntimeError) as error:
            if "meta" not in str(error).lower():
                raise
            # A class that reads tensors in its constructor cannot be built on `meta`; `load_state_dict` compares.
            return cls(**arguments)
        _compare(module, shapes)
        return cls(**arguments)


def _compare(module: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse weights of other names or shapes, and too large buffers.

    Raises:
        ValueError: names the first tensor that differs.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for name in [*wanted, *(name for name in shapes if name not in wanted)]:
        there, here = shapes.get(name), wanted.get(name)
        if there is None or here is None:
            raise ValueError(f"tensor {name} is {'missing' if there is None else 'not expected'}")
        if tuple(there) != here:
            raise ValueError(f"tensor {name} has shape {tuple(there)}, but {here} is expected")
    unsaved = [buffer for name, buffer in module.named_buffers() if name not in wanted]
    if sum(buffer.numel() * buffer.element_size() for buffer in unsaved) > MOST_BUFFERS:
        raise ValueError(f"more than {MOST_BUFFERS:,} bytes beside the weights")


@contextmanager
def _at_most(tensors: int) -> Iterator[None]:
    """Stop building a module, in this thread, that has more parts than a file with this many tensors can fill.

    Raises:
        ValueError: it has more.
    """
    me, counted = threading.get_ident(), {"tensors": 0, "modules": 0}
    most = {"tensors": 4 * tensors + 32, "modules": 128 * tensors + 2048}

    def count(kind: str) -> None:
        if threading.get_ident() == me:
            counted[kind] += 1
            if counted[kind] > most[kind]:
                raise ValueError(f"the arguments ask for more than the {tensors} tensors in the file")

    hooks = [
        registration.register_module_parameter_registration_hook(lambda *given: count("tensors")),
        registration.register_module_module_registration_hook(lambda *given: count("modules")),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
