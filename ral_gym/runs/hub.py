"""Runs on a hub (huggingface_hub): push a run folder, pull one, the folder of an address ``hf://user/name@revision``.

What may leave and come is decided in `ral_gym.runs.shared_files`; a pulled run is then a foreign run folder like any
other. The endpoint and the token are huggingface_hub's own (``HF_ENDPOINT``, ``HF_TOKEN``, ``hf auth login``).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ral_gym.errors import ConfigError, RalGymError, RunError
from ral_gym.runs.results import load_results
from ral_gym.runs.run import read_config
from ral_gym.runs.shared_files import CARD, MOST_GIB, PUSHED, check_fetched, check_listing
from ral_gym.runs.storage import cannot_write

CACHE = "~/.cache/ral_gym/hub"
"""Where runs lie that were loaded by their address: one folder per commit."""
_PART = r"\w(?:[\w.-]{0,94}\w)?"
_ADDRESS = re.compile(rf"(hf:/{{1,2}})?(?P<repo>{_PART}/{_PART})(@(?P<revision>[\w./-]{{1,200}}))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Address(NamedTuple):
    """A repository on the hub and a branch, tag or commit of it; None: its main branch."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def is_address(path: Path | str) -> bool:
    """Whether a path means a run on the hub."""
    return str(path).startswith(("hf://", "hf:/"))


def parse_address(text: str) -> Address:
    """``hf://user/name``, ``user/name`` or either with ``@revision``.

    Raises:
        ConfigError: it is none of these.
    """
    found = _ADDRESS.fullmatch(text)
    if found is None or ".." in text or "--" in found["repo"] or found["repo"].endswith(".git"):
        raise ConfigError(f"{text[:120]!r} is no run on the hub: give user/name or user/name@revision")
    return Address(found["repo"], found["revision"])


def check_hub() -> None:
    """Refuse to go on without the client.

    Raises:
        ConfigError: names the command that installs it.
    """
    with contextlib.suppress(ValueError):  # partly imported by other code
        if importlib.util.find_spec("huggingface_hub") is not None:
            return
    raise ConfigError('the hub needs huggingface_hub, not installed: pip install "ral-gym[hub]"')


def local_folder(path: Path | str) -> Path:
    """The folder of a run: an address's is fetched into `CACHE` first, unless its commit is there; others are as given.

    Raises:
        ConfigError: not an address of a run, or the client is not installed.
        RunError: see `pull`.
    """
    if not is_address(path):
        return Path(path)
    address = parse_address(str(path))
    kept = Path(CACHE).expanduser() / address.repo.replace("/", "--")
    if address.revision and _COMMIT.fullmatch(address.revision) and (kept / address.revision).is_dir():
        return kept / address.revision
    check_hub()
    commit, sizes = _listing(address)
    folder = kept / commit
    if not folder.is_dir():
        files = check_listing(sizes, int(MOST_GIB * 2**30), str(address))
        try:
            _fetch(address, commit, files, folder)
        except RunError:
            if not folder.is_dir():  # else another process has fetched it meanwhile
                raise
    return folder


def pull(address: Address, folder: Path, max_gib: float = MOST_GIB) -> str:
    """Fetch a run into a new folder: all its files, or none; nothing is unpickled or executed.

    Returns:
        the commit that it is.

    Raises:
        ConfigError: the client is not installed.
        RunError: the folder exists, the hub cannot be reached or refuses, or the repository is not a run: another kind
            of file, a name that leaves the folder, a link, too large, damaged or not ral_gym's.
    """
    check_hub()
    if folder.exists() or folder.is_symlink():
        raise RunError(f"{folder} exists: nothing was fetched; give another folder, or remove it")
    commit, sizes = _listing(address)
    _fetch(address, commit, check_listing(sizes, int(max_gib * 2**30), str(address)), folder)
    return commit


def _listing(address: Address) -> tuple[str, dict[str, int | None]]:
    """The commit of an address, and the size of each of its files."""
    with _asking("fetch", address):
        info = _api().model_info(address.repo, revision=address.revision, files_metadata=True)
        commit = str(info.sha)
        if _COMMIT.fullmatch(commit) is None:
            raise RunError(f"{address}: the hub names no commit of it")
        return commit, {str(file.rfilename): file.size for file in info.siblings or []}


def _fetch(address: Address, commit: str, sizes: Mapping[str, int], folder: Path) -> None:
    """Fetch files beside `folder`, check them all, and only then give the folder its name."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        with _asking("fetch", address):
            import huggingface_hub

            for name in sizes:
                huggingface_hub.hf_hub_download(address.repo, name, revision=commit, local_dir=temporary)
        shutil.rmtree(temporary / ".cache", ignore_errors=True)  # the client's notes
        _check(temporary, sizes, address)
        os.rename(temporary, folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check(folder: Path, sizes: Mapping[str, int], address: Address) -> None:
    """Refuse files that are not what they seem, impossible settings and results, and a cache folder of a stranger's."""
    try:
        for name, size in sizes.items():
            check_fetched(folder / name, size)
        config = read_config(folder)
        if (folder / "results.json").exists():
            load_results(folder / "results.json")
        if config.data.cache_dir is not None:
            raise RunError(f"config.json asks for the cache folder {config.data.cache_dir} on this computer; remove it")
    except RunError as error:
        words = str(error).replace(f"{folder}{os.sep}", "")
        raise RunError(f"{address}: {words.rpartition(';')[0]}; nothing was kept") from error


class Repository(NamedTuple):
    """What there is where a run is to be pushed.

    Attributes:
        files: its files; None: there is no repository yet.
        public: whether everyone may read it.
    """

    files: Sequence[str] | None
    public: bool


def look(repo: str) -> Repository:
    """What there is at an address.

    Raises:
        RunError: the hub cannot be reached.
    """
    with _asking("look at", Address(repo)):
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        try:
            info = _api().model_info(repo)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return Repository(None, public=False)
        return Repository([str(file.rfilename) for file in info.siblings or []], public=not info.private)


def push(repo: str, files: Mapping[str, Path], card: str, public: bool, there: Repository) -> str:
    """Make the repository if there is none, and add everything in one commit; what an earlier push left goes.

    Args:
        repo: ``user/name``.
        files: name in the repository -> file.
        card: README.md.
        public: whether everyone may read a new repository.
        there: what `look` found.

    Returns:
        the address of the commit on the web.

    Raises:
        RunError: the hub cannot be reached or refuses.
    """
    with _asking("push to", Address(repo)):
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        api, known = _api(), there.files or ()
        if there.files is None:
            api.create_repo(repo, private=not public, repo_type="model")
        changes: list[Any] = [CommitOperationAdd(CARD, card.encode())]
        changes += [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        changes += [CommitOperationDelete(name) for name in known if PUSHED.fullmatch(name) and name not in files]
        return str(api.create_commit(repo, changes, commit_message="Push a run of ral_gym").commit_url)


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="ral-gym")


@contextlib.contextmanager
def _asking(doing: str, address: Address) -> Iterator[None]:
    """Context for talking to the hub: whatever goes wrong there is one line; no bars where nobody sees them."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    quiet = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        yield
    except RalGymError:
        raise
    except Exception as error:  # third-party code may raise anything
        raise RunError(_reason(doing, address, error)) from error
    finally:
        if quiet:
            enable_progress_bars()


def _reason(doing: str, address: Address, error: BaseException) -> str:
    """What went wrong, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub import errors as kinds

    at, status = constants.ENDPOINT, getattr(getattr(error, "response", None), "status_code", None)
    chain = [error, *filter(None, (error.__cause__, error.__context__))]
    bases = {cls.__name__ for one in chain for cls in type(one).__mro__}
    if "OfflineModeIsEnabled" in bases:
        return f"cannot {doing} {address}: HF_HUB_OFFLINE is set; unset it"
    if isinstance(error, kinds.GatedRepoError):
        return f"cannot {doing} {address}: it is gated; ask for access on its page at {at}, then hf auth login"
    if isinstance(error, kinds.RevisionNotFoundError):
        return f"cannot {doing} {address}: it has no such revision; give a branch, tag or commit of it"
    if isinstance(error, kinds.RepositoryNotFoundError):
        return (
            f"cannot {doing} {address}: {at} has no such repository, or it is private and this computer has no access; "
            "check the name, or log in with hf auth login"
        )
    if status in (401, 403):
        return (
            f"cannot {doing} {address}: {at} does not permit it ({status}); hf auth login with a token that may write"
        )
    if {"TransportError", "ConnectionError", "TimeoutError"} & bases and status is None:
        return f"cannot {doing} {address}: {at} cannot be reached; check the network, and run the same command again"
    words = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"cannot {doing} {address}: {(words or [type(error).__name__])[0]}; run the same command again"
