"""The arguments of the commands that draw images with a finished run; nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

Generator = Literal["prior", "prior_ema", "prior_continued", "prior_equal_time", "policy", "policy_ema"]
RunFolder = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Plugins = Annotated[tuple[str, ...], tyro.conf.arg(name="plugin", metavar="MODULE[:CLASS] ..")]
ImageFile = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]


@dataclass
class SampleArguments:
    """Draw images from a trained generator: a picture, and optionally their codes."""

    run: RunFolder
    """The run folder, for instance runs/demo."""
    n: int = 64
    """Number of images."""
    label: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CLASS ..")] = ()
    """Classes to draw, by name or number, in turn; none: all classes in turn, if the run has some."""
    generator: Generator | None = None
    """Which generator. None: policy_ema, or prior if RAL has not been trained."""
    temperature: float = 1.0
    """Divides the logits; below 1 sharper and less diverse."""
    guidance: float = 1.0
    """Scale of classifier-free guidance, for a generator with classes; 1: none."""
    guidance_cutoff: int | None = None
    """Draw this many codes with guidance and the rest without; None: all with it."""
    top_k: int = 0
    """Draw among the k likeliest codes; 0: among all."""
    top_p: float = 1.0
    """Draw among the fewest likeliest codes whose probabilities reach this share; 1: among all."""
    seed: int = 0
    """Seed of the random numbers; with equal seeds, all generators draw from the same uniforms."""
    output: str | None = None
    """PNG file. None: RUN/samples/sample_GENERATOR.png."""
    codes: str | None = None
    """Also write the codes, int16 (n, T), to this .npz file; with classes also labels (n,) and class_names."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    plugins: Plugins = ()
    """Your own parts: modules that register some, or `module:Class` names that the run's files may ask for."""


@dataclass
class CompleteArguments:
    """Hide the lower rows of an image and let MLE and RAL draw them (Section 5.5, Figure 7)."""

    run: RunFolder
    """The run folder, for instance runs/demo."""
    image: ImageFile
    """An image file; it is cropped and resized like the run's images."""
    visible_rows: float = 0.5
    """Share of the image's rows that stays visible, above 0 and below 1; rounded to whole rows of codes."""
    label: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CLASS ..")] = ()
    """The image's class, by name or number, if the run has classes; several: in turn; none: all of them in turn."""
    seeds: int = 4
    """Number of completions by each generator."""
    temperature: float = 1.0
    """Divides the logits; below 1 sharper and less diverse."""
    guidance: float = 1.0
    """Scale of classifier-free guidance, for a generator with classes; 1: none."""
    guidance_cutoff: int | None = None
    """Draw this many codes with guidance and the rest without; None: all with it."""
    top_k: int = 0
    """Draw among the k likeliest codes; 0: among all."""
    top_p: float = 1.0
    """Draw among the fewest likeliest codes whose probabilities reach this share; 1: among all."""
    seed: int = 0
    """Seed of the first completion; the others use the following seeds."""
    output: str | None = None
    """PNG file. None: RUN/samples/complete_IMAGE.png."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    plugins: Plugins = ()
    """Your own parts: modules that register some, or `module:Class` names that the run's files may ask for."""


@dataclass
class PlayArguments:
    """Open a page on which an image is drawn code by code: next codes, wrong codes, MLE and RAL side by side."""

    run: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = None
    """A run folder with stages 1 and 2, for instance runs/demo. None: the face photos that come with the package."""
    host: str = "127.0.0.1"
    """The address that the page is served at; with another one, such as 0.0.0.0, everyone who reaches it may draw."""
    port: int = 7860
    """The port; 0: any that is free."""
    browser: bool = True
    """Open the page in the browser of this computer."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    plugins: Plugins = ()
    """Your own parts: modules that register some, or `module:Class` names that the run's files may ask for."""
