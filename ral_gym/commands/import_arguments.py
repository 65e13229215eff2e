"""The arguments of `ral-gym import`; nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Union

import tyro


@dataclass
class LlamaGenArguments:
    """LlamaGen's class-conditional models: a GPT (such as c2i_L_256.pt) and a tokenizer (vq_ds16_c2i.pt).

    Text-to-image models (t2i) are refused. Classes are numbers in the order of the model's training set; for ImageNet
    that is the order of the sorted synset ids.
    """

    gpt: str
    """The GPT's file."""
    vq: str
    """The tokenizer's file."""
    image_size: int
    """Side of the images in pixels, such as 256 or 384: the file does not tell it, its name does."""
    name: str
    """Name of the run folder."""
    heads: int | None = None
    """Attention heads. None: 64 units each (100 in the 3B model)."""
    class_names: str | None = None
    """A text file with the name of every class, one a line, or a JSON list, in the model's order."""
    data: str | None = None
    """Images, as in `ral-gym train`: one folder per class, in the model's order. They are encoded, so that stage 3 can
    train a critic and the evaluation can compare. None: the run has no images."""
    runs: str = "runs"
    """Folder that holds the run folders."""
    device: str = "auto"
    """`auto` (CUDA when present), `cpu`, `cuda` or `cuda:N`: where images are encoded."""
    quiet: bool = False
    """No progress bars."""


@dataclass
class TamingArguments:
    """Transformer of taming-transformers with its VQGAN (last.ckpt): class-conditional or unconditional models.

    Models that draw from a depth map, a segmentation or another image are refused. Nothing in the file is run, and
    Lightning need not be installed.
    """

    checkpoint: str
    """The checkpoint: transformer and VQGAN in one file."""
    image_size: int
    """Side of the images in pixels, such as 256."""
    name: str
    """Name of the run folder."""
    config: str | None = None
    """The model's configuration (model.yaml), which tells heads and classes. None: give --classes."""
    classes: int | None = None
    """How many classes; 0: not conditional. None: as the configuration says."""
    heads: int | None = None
    """Attention heads. None: as the configuration says, or 64 units each."""
    class_names: str | None = None
    """A text file with the name of every class, one a line, or a JSON list, in the model's order."""
    data: str | None = None
    """Images, as in `ral-gym train`; with classes: one folder per class, in the model's order. They are encoded, so
    that stage 3 can train a critic and the evaluation can compare. None: the run has no images."""
    runs: str = "runs"
    """Folder that holds the run folders."""
    device: str = "auto"
    """`auto` (CUDA when present), `cpu`, `cuda` or `cuda:N`: where images are encoded."""
    quiet: bool = False
    """No progress bars."""


Source = Union[  # noqa: UP007 (made at run time)
    Annotated[LlamaGenArguments, tyro.conf.subcommand("llamagen")],
    Annotated[TamingArguments, tyro.conf.subcommand("taming")],
]


@dataclass
class ImportArguments:
    """Make a run folder from a released checkpoint: stages 1 and 2 are done, and `sample` and `train` go on from it."""

    source: Source
    """Whose checkpoint."""
