"""Writing and reading files: atomic writes, safetensors with JSON metadata, nested state without pickle."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ral_gym.errors import RunError
from ral_gym.runs.foreign import MOST_TENSORS, check_finite_tensors, check_regular, parse_json, read_bytes
from ral_gym.runs.rebuild import build, check_arguments

_KEY = "ral_gym"


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary)`` next to `path`, then rename: a reader sees the old file or the whole new one.

    Raises:
        RunError: the folder is not writable or the disk is full; `path` is then unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # renamed, or never made
            temporary.unlink()


def cannot_write(path: Path | str, error: OSError) -> RunError:
    """The error that says why `path` could not be written and what to do."""
    remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose a folder you can write to"
    return RunError(f"cannot write {path}: {error.strerror or error}; {remedy} and run the same command again")


def save_json(path: Path, values: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    _write_bytes(path, text.encode())


def load_json(path: Path) -> Any:
    """Read JSON from a regular file within the limits of `ral_gym.runs.foreign`.

    Raises:
        RunError: missing, damaged, too large or too deep.
    """
    try:
        return parse_json(read_bytes(path).decode("utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing: not a run folder, or an earlier stage has not run yet") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RunError(f"{path} cannot be read ({reason}); remove it, or choose another run folder") from error


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors and JSON-able metadata atomically as one safetensors file."""
    ready = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    data = safetensors.torch.save(ready, metadata=metadata_header(metadata))
    _write_bytes(path, data)


def metadata_header(metadata: dict[str, Any]) -> dict[str, str]:
    """JSON-able metadata in the form that `load_tensors` reads."""
    return {_KEY: json.dumps(metadata)}


def _write_bytes(path: Path, data: bytes) -> None:
    write_atomic(path, lambda temporary: temporary.write_bytes(data))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises:
        RunError: the file is missing, not a regular file, too large, truncated, or was not written by ral_gym.
    """
    with _opened(path) as (file, metadata):
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (not a dict)


def load_metadata(path: Path) -> dict[str, Any]:
    """The metadata alone.

    Raises:
        RunError: see `load_tensors`.
    """
    with _opened(path) as (_, metadata):
        return metadata


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """An open safetensors file and its metadata."""
    try:
        if not path.exists() or path.is_dir():
            raise RunError(f"{path} is missing: train that stage first, or check the run folder's name")
        check_regular(path, MOST_TENSORS, "remove it to make it again")
        with safetensors.safe_open(path, "pt") as file:
            yield file, _metadata(path, file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} is damaged or not a safetensors file ({error}); remove it to make it again") from error


def _metadata(path: Path, header: dict[str, str]) -> dict[str, Any]:
    """The metadata that `save_tensors` wrote."""
    try:
        values = parse_json(header[_KEY])
    except (KeyError, ValueError) as error:
        raise RunError(f"{path} was not written by ral_gym (no metadata of its); remove it to make it again") from error
    if not isinstance(values, dict):
        raise RunError(f"{path} was not written by ral_gym (no metadata of its); remove it to make it again")
    return values


def save_module(path: Path, module: nn.Module, weights: dict[str, Tensor] | None = None, **metadata: Any) -> None:
    """Write a module's weights with its ``config`` (constructor arguments).

    Args:
        path: the file.
        module: a module with a JSON-able ``config``.
        weights: other weights for the same module, e.g. an exponential average; None: its own.
        **metadata: further JSON-able facts.
    """
    state = module.state_dict() if weights is None else weights
    save_tensors(path, state, {"class": type(module).__name__, "config": module.config, **metadata})


def load_module(
    path: Path, cls: type[nn.Module], device: torch.device | str = "cpu", config: dict[str, Any] | None = None
) -> Any:
    """Rebuild a module from its file, in evaluation mode, without gradients; draws no random numbers.

    Args:
        path: the file.
        cls: the module's class.
        device: where it goes.
        config: the constructor's arguments that it must have been made with; None: any.

    Raises:
        RunError: missing, damaged, of another class or made with other arguments, weights that do not fit them (shapes
            are compared before any memory is taken), or ones that are NaN or infinite.
    """
    return rebuild_module(path, *load_tensors(path), cls, device, config)


def rebuild_module(
    path: Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, Any],
    cls: type[nn.Module],
    device: torch.device | str = "cpu",
    config: dict[str, Any] | None = None,
    left_out: Collection[str] = (),
) -> Any:
    """Like `load_module`, from the result of `load_tensors`, for parts whose class the metadata names.

    Args:
        path: the file, for messages.
        tensors: the weights.
        metadata: with `class` and `config`.
        cls: as in `load_module`.
        device: as in `load_module`.
        config: as in `load_module`.
        left_out: names in `config` that are not arguments of the constructor.

    Raises:
        RunError: as in `load_module`.
    """
    if metadata.get("class") != cls.__name__:
        raise RunError(
            f"{path} holds {str(metadata.get('class', 'no weights'))[:60]}, not {cls.__name__}; remove it to make it "
            "again"
        )
    found = metadata.get("config")
    others = [] if config is None else differences(found, config)
    if others:
        raise RunError(f"{path} belongs to another model ({'; '.join(others[:3])}); remove it to make it again")
    try:
        tensors = getattr(cls, "present_names", dict)(tensors)  # files of older versions
        arguments = {name: value for name, value in check_arguments(found).items() if name not in left_out}
        with torch.random.fork_rng(devices=[]):  # reading a file must not change later random numbers
            module = build(cls, arguments, {name: tensor.shape for name, tensor in tensors.items()})
        module.load_state_dict(tensors)
    except Exception as error:  # third-party code may raise anything
        reason = (str(error).strip() or "no reason given").splitlines()[-1].strip()
        raise RunError(f"{path} does not fit this version of ral_gym ({reason}); remove it to make it again") from error
    check_finite_tensors(path, tensors)
    return module.to(device).eval().requires_grad_(False)


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """``field: value there, value here`` for every field in which two nested JSON-able dicts differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        found: list[str] = []
        for key in sorted(there.keys() | here.keys()):
            found += differences(there.get(key), here.get(key), f"{name}.{key}" if name else key)
        return found
    return [] if there == here else [f"{name or 'all'}: {there} there, {here} here"]


def pack_state(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Nested dicts, lists and tuples with tensors and arrays inside -> (flat tensors, JSON-able rest)."""
    tensors: dict[str, Tensor] = {}

    def pack(value: Any) -> Any:
        if isinstance(value, np.ndarray | Tensor):
            tensors[str(len(tensors))] = (
                torch.tensor(value) if isinstance(value, np.ndarray) else value.detach().to("cpu", copy=True)
            )
            return {"tensor": str(len(tensors) - 1), "numpy": isinstance(value, np.ndarray)}
        if isinstance(value, dict):
            return {"items": [[pack(key), pack(item)] for key, item in value.items()]}
        if isinstance(value, tuple | list):
            return {type(value).__name__: [pack(item) for item in value]}
        if isinstance(value, np.generic):
            return value.item()
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"cannot save a {type(value).__name__} in a checkpoint")

    rest = pack(state)
    return tensors, rest


def unpack_state(tensors: dict[str, Tensor], rest: Any) -> Any:
    """Inverse of `pack_state`."""
    if not isinstance(rest, dict):
        return rest
    if "tensor" in rest:
        tensor = tensors[rest["tensor"]]
        return tensor.numpy() if rest["numpy"] else tensor
    if "items" in rest:
        return {unpack_state(tensors, key): unpack_state(tensors, item) for key, item in rest["items"]}
    ((kind, items),) = rest.items()
    values = [unpack_state(tensors, item) for item in items]
    return tuple(values) if kind == "tuple" else values


def tensors_in(state: Any, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all tensors under the keys `names` of a nested state."""
    for name in names:
        if isinstance(state, dict) and name in state:
            yield from _tensors(state[name], name)


def _tensors(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(item, f"{path}.{key}")


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A detached copy of a module's weights."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def config_arguments(settings: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """The named fields of a configuration dataclass, as constructor arguments."""
    values = dataclasses.asdict(settings)
    return {name: values[name] for name in names}
