"""Reading the checkpoint files of other projects: tensors only, without unpickling code.

``torch.load(weights_only=True, mmap=True)`` builds nothing but tensors and plain containers. Files of a training script
also name classes, such as `argparse.Namespace` or a callback of Lightning as the key of a dict; these packages need not
be installed: every name of `HARMLESS` stands for an empty class here, and any other name is refused. Weights are mapped
from the file, not read, until they are used; only files of torch before 1.6, which are not zip files, are read whole.
"""

from __future__ import annotations

import hashlib
import pickletools
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ral_gym.errors import RunError, printable
from ral_gym.runs.foreign import MOST_TENSORS, check_regular

HARMLESS = ("argparse", "lightning", "lightning_fabric", "main", "numpy", "omegaconf", "pathlib", "pytorch_lightning")
"""Packages whose classes a checkpoint may name; none of them is imported."""
MOST_PICKLE = 64 * 2**20
"""Most bytes of a file's structure, without its tensors."""
WRAPPERS = ("model", "module", "state_dict")
"""Under which name a training script keeps the weights: DDP, DeepSpeed, Lightning; FSDP has them without one."""
PREFIXES = ("module.", "_orig_mod.")
"""What wrappers put before all names."""
REMEDY = "download it again"
HASHED = 2**20


@dataclass(frozen=True)
class Checkpoint:
    """The weights in a file.

    Attributes:
        path: the file.
        tensors: name -> tensor, mapped from the file where possible.
    """

    path: Path
    tensors: dict[str, Tensor]

    def facts(self) -> dict[str, Any]:
        """Name, size and SHA-256 of the file, for the metadata of what is made from it."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while piece := file.read(HASHED):
                digest.update(piece)
        return {"file": self.path.name, "bytes": self.path.stat().st_size, "sha256": digest.hexdigest()}

    def shape(self, name: str, wanted: str, dimensions: int | None = None) -> tuple[int, ...]:
        """A tensor's shape.

        Args:
            name: its name in the file.
            wanted: what the file should hold, for messages.
            dimensions: how many it must have, each of 1 or more; None: any.

        Raises:
            RunError: there is no such tensor, or it has another number of dimensions.
        """
        if name not in self.tensors:
            raise RunError(f"{self.path} has no tensor {name}: give the file with {wanted}")
        shape = tuple(self.tensors[name].shape)
        if dimensions is not None and (len(shape) != dimensions or 0 in shape):
            raise RunError(
                f"{self.path}: tensor {name} has shape {shape}, not {dimensions} dimensions: give the file with "
                f"{wanted}"
            )
        return shape

    def count(self, before: str) -> int:
        """How many numbered modules there are: n for ``{before}.0`` to ``{before}.{n - 1}``."""
        start = f"{before}."
        numbers = {name[len(start) :].partition(".")[0] for name in self.tensors if name.startswith(start)}
        return len(numbers)


def read_checkpoint(path: Path, wanted: str, average: bool = False) -> Checkpoint:
    """The weights of a checkpoint file, whatever it is wrapped in.

    Args:
        path: the file.
        wanted: what it should hold, for messages.
        average: prefer the weights' exponential average ("ema"), if the file has both.

    Raises:
        RunError: missing, not a regular file, damaged, names code, or holds no weights.
    """
    try:
        check_regular(path, MOST_TENSORS, REMEDY)
        found = _load(path, wanted)
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror or error}): give the file with {wanted}") from error
    tensors = _weights_in(found, (("ema",) if average else ()) + WRAPPERS)
    if not tensors:
        raise RunError(f"{path} holds no weights by name: give the file with {wanted}")
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > path.stat().st_size:
        raise RunError(f"{path} is smaller than its tensors together; {REMEDY}")
    return Checkpoint(path, tensors)


def _load(path: Path, wanted: str) -> Any:
    """The content of a file that torch wrote, with empty classes for the names in `HARMLESS`."""
    give = f"give the file with {wanted}"

    def damaged(error: BaseException) -> RunError:
        return RunError(f"{path} is damaged or not a checkpoint of PyTorch ({_line(error)}): {give}")

    def asks(name: str) -> RunError:
        return RunError(f"{path} asks for {name}, which no such checkpoint needs: nothing of it was run; {give}")

    try:
        zipped = zipfile.is_zipfile(path)
        names = _named_in_zip(path) if zipped else _named_in_pickles(path)
    except (zipfile.BadZipFile, ValueError, IndexError, EOFError, NotImplementedError) as error:
        raise damaged(error) from error
    foreign = [name for name in names if not name.startswith(("torch.", "collections.", "__builtin__", "builtins."))]
    strange = [name for name in foreign if name.partition(".")[0] not in HARMLESS]
    if strange:
        raise asks(strange[0])
    stand_ins: list[Any] = [(type("Empty", (_Empty,), {}), name) for name in foreign]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except OSError:
        raise
    except Exception as error:  # whatever a damaged file makes torch raise
        refused = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        raise (asks(refused[1]) if refused else damaged(error)) from error


class _Empty:
    """Stands for a class of a package that need not be installed; keeps nothing."""

    def __new__(cls, *arguments: Any, **keywords: Any) -> _Empty:
        return object.__new__(cls)

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _named_in_zip(path: Path) -> list[str]:
    """The names that the structure of a zip file asks for.

    Raises:
        ValueError: there is no such structure, it is too large, or parts are compressed, which torch's never are.
    """
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        structures = [part for part in parts if part.filename.endswith("/data.pkl") or part.filename == "data.pkl"]
        if len(structures) != 1:
            raise ValueError("no single data.pkl in it")
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise ValueError("compressed parts")
        if structures[0].file_size > MOST_PICKLE:
            raise ValueError(f"a data.pkl of {structures[0].file_size:,} bytes")
        with archive.open(structures[0]) as file:
            return _names(file)


def _named_in_pickles(path: Path) -> list[str]:
    """The names in a file of torch before 1.6: a magic number, a protocol, facts of the system, then the structure."""
    with path.open("rb") as file:
        return sorted({name for _ in range(4) for name in _names(file)})


def _names(file: IO[bytes]) -> list[str]:
    """The classes and functions that one pickle asks for; nothing of it is run."""
    found: set[str] = set()
    for operation, argument, _ in pickletools.genops(file):
        if operation.name == "GLOBAL":
            found.add(str(argument).replace(" ", "."))
        elif operation.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"an operation {operation.name} in its structure, which PyTorch does not write")
    return sorted(found)


def _weights_in(found: Any, wrappers: tuple[str, ...]) -> dict[str, Tensor]:
    """The weights by name, without what wrappers put around them."""
    for name in wrappers:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
            break
    if not isinstance(found, dict):
        return {}
    tensors = {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if len(tensors) < len(found):
        return {}
    for prefix in PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return printable(lines[0] if lines else type(error).__name__, 160)
