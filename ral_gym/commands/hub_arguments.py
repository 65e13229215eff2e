"""The arguments of `ral-gym push` and `ral-gym pull`; nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from ral_gym.commands.draw_arguments import RunFolder

Repo = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="USER/NAME")]


@dataclass
class PushArguments:
    """Push a run to the hub (huggingface.co, or HF_ENDPOINT), with a model card made from its results.json.

    Only weights (safetensors), JSON and sample grids leave, without this computer's paths; what leaves is listed first.
    """

    run: RunFolder
    """The run folder, for instance runs/demo."""
    repo: Repo
    """The repository; it is made if there is none."""
    public: bool = False
    """Everyone may read a new repository. Default: only you."""
    images: bool = True
    """Push files from which training images can be seen: their codes, stage 3's checkpoint (which `load_run` needs),
    and pictures with real images."""
    update: bool = False
    """Push to a repository that has files: a new commit there; earlier ones stay in its history."""
    yes: bool = False
    """Do not ask; needed where nobody can answer."""


@dataclass
class PullArguments:
    """Pull a run from the hub into a new run folder; nothing in it is unpickled or executed."""

    repo: Repo
    """The repository: user/name, or user/name@revision with a branch, tag or commit."""
    folder: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = None
    """The new folder. None: runs/NAME."""
    max_gib: float = 8.0
    """Largest size of all files together, in GiB."""
