"""What of a run leaves to a hub or comes from one: which names, kinds and sizes; texts without this computer's paths.

Only safetensors, JSON and PNG files, and the card README.md. Logs, TensorBoard's files, Stable-Baselines3's zips and
pictures that a user has made, such as the completion of a private photo, stay.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ral_gym.config import Config
from ral_gym.config.stages import REWARD_FILES
from ral_gym.errors import RunError
from ral_gym.runs.foreign import MOST_JSON, check_regular
from ral_gym.runs.storage import load_json, load_metadata, metadata_header, write_atomic

CARD = "README.md"
IGNORED = (".gitattributes",)
"""What the hub itself puts into a repository; it is not taken."""
MOST_FILES = 100
MOST_PICTURE = 32 * 2**20
"""Most bytes of a PNG file or the card."""
MOST_GIB = 8.0
"""Most GiB of a whole repository, unless the user says otherwise."""
PUSHED = re.compile(
    r"(config|results|rewards|seconds|equal_time)\.json"
    r"|(vqvae|codes|critic|(prior|policy)(_ema)?|prior_(continued|equal_time))(_bottom)?\.safetensors"
    r"|checkpoints/ral\.safetensors"
    r"|samples/(real_mle_ral|comparison(_best_temperature)?|classes|nearest|frontier|exposure_given_rows|curve_\w+"
    r"|sample_(prior|policy)\w*)\.png"
)
"""The files of a run that are pushed, where they exist."""
SHOW_IMAGES = re.compile(r"codes\.safetensors|checkpoints/.*|samples/(real_mle_ral|comparison.*|nearest)\.png")
"""Those from which training images can be seen: their codes, a checkpoint's episodes, pictures of real images."""
_NAME = re.compile(r"((samples|checkpoints)/)?[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\.(json|safetensors|png)")
_SEPARATORS = " \\t\\n'\"(=:,;\\[|"
_ABSOLUTE = re.compile(
    rf"(?:^|(?<=[{_SEPARATORS}]))(?:~[\w.-]*/|/(?!/)|[A-Za-z]:[\\/](?!/)|\\\\)[^\s'\",;)\]|]*\w[^\s'\",;)\]|]*"
)
"""An absolute path, or one in a home folder, inside a text; no address such as https://."""


def check_listing(sizes: Mapping[str, int | None], most: int, repo: str) -> dict[str, int]:
    """Refuse a repository that holds anything but a run's files, before any of them is fetched.

    Args:
        sizes: path in the repository -> bytes; None: the hub does not say.
        most: most bytes of all files together.
        repo: its name, for messages.

    Returns:
        the files to take, with their sizes.

    Raises:
        RunError: names the first file that is not taken, and why.
    """
    taken: dict[str, int] = {}
    for name, size in sizes.items():
        if name in IGNORED:
            continue
        if name != CARD and _NAME.fullmatch(name) is None:
            raise RunError(
                f"{repo} holds {name!r:.120}: a run has only .safetensors, .json and .png files, in its folder, "
                "samples/ and checkpoints/; nothing was fetched"
            )
        limit = MOST_JSON if name.endswith(".json") else most if name.endswith(".safetensors") else MOST_PICTURE
        if size is None or not 0 <= size <= limit:
            said = "does not say its size" if size is None else f"has {size:,} bytes, at most {limit:,} are taken"
            raise RunError(f"{repo}: {name} {said}; nothing was fetched (--max-gib is the limit of weights)")
        taken[name] = size
    if len(taken) > MOST_FILES or len({name.lower() for name in taken}) < len(taken):
        raise RunError(f"{repo} holds {len(taken)} files, or names that differ only in their case: nothing was fetched")
    if sum(taken.values()) > most:
        raise RunError(f"{repo} has {sum(taken.values()):,} bytes: at most {most:,} are taken; raise --max-gib")
    if "config.json" not in taken:
        raise RunError(f"{repo} has no config.json: it is not a run that ral-gym push made")
    return taken


def check_fetched(path: Path, size: int) -> None:
    """Refuse a fetched file that is not what the listing said, or not what its name says.

    Raises:
        RunError: a link, another size, or not a PNG, JSON or safetensors file of ral_gym's.
    """
    if path.is_symlink():
        raise RunError(f"{path} is a link; remove it")
    check_regular(path, size)
    if path.stat().st_size != size:
        raise RunError(f"{path} has {path.stat().st_size:,} bytes, and {size:,} in the hub's list; remove it")
    if path.suffix == ".json":
        load_json(path)
    elif path.suffix == ".safetensors":
        load_metadata(path)
    elif path.suffix == ".png":
        with path.open("rb") as file:
            if file.read(8) != b"\x89PNG\r\n\x1a\n":
                raise RunError(f"{path} is not a PNG file; remove it")


def files_to_push(folder: Path, images: bool) -> tuple[dict[str, Path], list[str]]:
    """The files of a run folder that leave, by name, and the names of those that stay.

    Args:
        folder: the run folder.
        images: also those from which training images can be seen.

    Raises:
        RunError: one of them is a link or not a regular file.
    """
    leave, stay = {}, []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or any(part.startswith(".") for part in name.split("/")):
            continue
        if PUSHED.fullmatch(name) is None or (not images and SHOW_IMAGES.fullmatch(name)):
            stay.append(name)
            continue
        if path.is_symlink() or not path.is_file():
            raise RunError(f"{path} is a link or not a regular file: put the file itself there to push it")
        leave[name] = path
    return leave, stay


class Portable:
    """Texts of a run without this computer's paths: of each only the last name is left.

    Args:
        config: the run's settings: what they name is known to be a path, also a relative one or one with spaces.

    Attributes:
        changes: text before -> after, of everything that was changed.
    """

    def __init__(self, config: Config) -> None:
        self.changes: dict[str, str] = {}
        own = [getattr(config.ral, name) for name in REWARD_FILES] + [config.data.class_names]
        for source in (config.data.source, config.data.test):
            kind, _, argument = (source or "").partition(":")
            # The name of a dataset on a hub has a slash too.
            own.append(argument if kind != "hf" or re.match(r"[/~.\\]|[A-Za-z]:[\\/]", argument) else None)
        paths = {path for path in own if path and re.search(r"[\\/]", path)}
        self._known = sorted(((path, _last(path)) for path in paths), key=lambda item: -len(item[0]))
        self._home = str(Path.home())

    def text(self, given: str) -> str:
        """One text."""
        found = given
        for path, name in self._known:
            found = found.replace(path, name)
        found = _ABSOLUTE.sub(lambda match: _last(match[0]), found)
        if len(self._home) > 3:  # not the root
            found = found.replace(self._home, "~")
        if found != given:
            self.changes[given] = found
        return found

    def values(self, given: Any) -> Any:
        """JSON values with all their texts changed; `data.cache_dir`, which says nothing to others, becomes None."""
        if isinstance(given, str):
            return self.text(given)
        if isinstance(given, list):
            return [self.values(value) for value in given]
        if isinstance(given, dict):
            if given.get("cache_dir") is not None:
                self.changes[f"cache_dir {given['cache_dir']}"] = "none"
                given = given | {"cache_dir": None}
            return {self.text(name): self.values(value) for name, value in given.items()}
        return given

    def write(self, path: Path, copy: Path) -> Path:
        """The file itself, or, where it holds a path of this computer, a changed copy; tensors stay as they are.

        Raises:
            RunError: the file is damaged, or the copy cannot be written.
        """
        if path.suffix == ".json":
            values = load_json(path)
            if (found := self.values(values)) != values:
                write_atomic(copy, _writer((json.dumps(found, indent=2) + "\n").encode()))
                return copy
        elif path.suffix == ".safetensors":
            metadata = load_metadata(path)
            if (found := self.values(metadata)) != metadata:
                write_atomic(copy, lambda temporary: _with_metadata(path, temporary, found))
                return copy
        return path


def _last(path: str) -> str:
    """The last name of a path of any system; of a root a tilde."""
    return re.split(r"[\\/]", path.rstrip("/\\"))[-1] or "~"


def _writer(data: bytes) -> Callable[[Path], object]:
    return lambda temporary: temporary.write_bytes(data)


def _with_metadata(path: Path, copy: Path, metadata: dict[str, Any]) -> None:
    """Copy a safetensors file (header's length, header in JSON, tensors) with other metadata."""
    with path.open("rb") as source, copy.open("wb") as target:
        header = json.loads(source.read(int.from_bytes(source.read(8), "little")))
        header["__metadata__"] = metadata_header(metadata)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
        target.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(source, target, 2**20)
