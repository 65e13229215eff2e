"""A released checkpoint as a run folder whose stages 1 and 2 are done.

All files are checked before anything is written. The folder is filled under another name and renamed at the end, so
that it is complete or not there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from ral_gym.config import Config, DataConfig, PriorConfig, RALConfig, VQVAEConfig
from ral_gym.config.models import NO_IMAGES
from ral_gym.data.images import ImageSet, load_images
from ral_gym.errors import ConfigError, RunError
from ral_gym.priors.base import KIND, config_of, kind_of
from ral_gym.runs.run import Run
from ral_gym.runs.storage import cannot_write, metadata_header, write_atomic
from ral_gym.stages.levels import prior_of
from ral_gym.stages.released.networks import Weights
from ral_gym.tokenizers.base import kind_of as tokenizer_kind
from ral_gym.tokenizers.base import load_tokenizer, tokenizer_of
from ral_gym.tokenizers.code_set import encode_set


@dataclass(frozen=True)
class Released:
    """A tokenizer and a prior from checkpoints.

    Attributes:
        project: `llamagen` or `taming`: the name of the run's settings.
        tokenizer: network and weights.
        prior: network and weights.
        tokenizer_source: name, size and hash of the tokenizer's file.
        prior_source: the same of the prior's.
        class_names: one for every class, or none.
    """

    project: str
    tokenizer: Weights
    prior: Weights
    tokenizer_source: dict[str, Any]
    prior_source: dict[str, Any]
    class_names: tuple[str, ...] = ()

    def config(self, data: str | None) -> Config:
        """The settings of a run with these networks: stages 1 and 2 as they are, and GRPO on whole images as stage 3.

        Args:
            data: the source of images; None: the run has none.

        Raises:
            ConfigError: the settings would not build these networks, which is a fault of this package.
        """
        vqgan, prior = self.tokenizer[0], self.prior[0]
        ours = {name: value for name, value in vqgan.config.items() if hasattr(VQVAEConfig(), name)}
        options = {name: value for name, value in vqgan.config.items() if name not in {*ours, *IMAGES}}
        vqvae = VQVAEConfig(kind=tokenizer_kind(vqgan), options=options, **ours)
        given = config_of(prior)
        theirs = {name: value for name, value in given.items() if hasattr(PriorConfig(), name) and name != KIND}
        free = {name: value for name, value in given.items() if name not in {*theirs, *GRID, KIND}}
        config = Config(
            preset=self.project,
            data=DataConfig(source=data or NO_IMAGES, image_size=vqgan.image_size, grey=vqgan.channels == 1),
            vqvae=vqvae,
            prior=PriorConfig(kind=kind_of(prior), options=free, **theirs),
            ral=RALConfig(algo="grpo", reset_mode="full"),
        )
        config.check()
        _check_settings(config, vqgan, prior)
        return config


IMAGES = ("image_size", "channels")
"""Arguments of a tokenizer that the images determine."""
GRID = ("codebook_size", "height", "width", "classes")
"""Arguments of a prior that the sequences determine."""


def import_run(released: Released, path: Path, data: str | None, device: torch.device, progress: bool) -> Run:
    """Write the run folder.

    Args:
        released: the networks.
        path: the folder, which must not exist.
        data: the source of images that are encoded; None: no code file is written.
        device: where images are encoded.
        progress: show progress bars.

    Raises:
        ConfigError, DataError: the images cannot be read, or their classes are not the model's.
        RunError: the folder exists or cannot be written.
    """
    config = released.config(data)
    images = None if data is None else load_images(config.data, seed=config.seed, progress=progress)
    if images is not None:
        images = _labelled(images, released)
    with _made_whole(path) as folder:
        run = Run(folder, config)
        vqgan, weights = released.tokenizer
        facts: dict[str, Any] = {"source": released.tokenizer_source}
        _write(run.file("vqvae.safetensors"), weights, _facts(vqgan, tokenizer_kind(vqgan), facts))
        prior, weights = released.prior
        facts = {"source": released.prior_source}
        if released.class_names:
            facts["class_names"] = list(released.class_names)
        _write(run.file("prior.safetensors"), weights, _facts(prior, kind_of(prior), facts))
        _same(run.file("prior.safetensors"), run.file("prior_ema.safetensors"))
        if images is not None:
            tokenizer = load_tokenizer(run.file("vqvae.safetensors"), device)
            encode_set(tokenizer, images, passes=1, seed=config.seed, progress=progress).save(
                run.file("codes.safetensors")
            )
    return Run(path, config)


def _labelled(images: ImageSet, released: Released) -> ImageSet:
    """The images with the model's classes, or without labels for a model without.

    Raises:
        ConfigError: the images have other classes, or none.
    """
    classes = released.prior[0].classes
    if not classes:
        return replace(images, labels=None)
    found = 0 if images.labels is None else max(len(images.labels.classes), 1 + int(images.labels.train.max()))
    if images.labels is None or found != classes:
        raise ConfigError(
            f"the images have {found or 'no'} classes, but the model draws images of {classes}: give --data a folder "
            "of one folder per class, in the model's order of classes, or leave --data out"
        )
    if released.class_names:
        return replace(images, labels=replace(images.labels, classes=released.class_names))
    return images


def _facts(network: Any, kind: str, facts: dict[str, Any]) -> dict[str, Any]:
    return {"class": type(network).__name__, "config": network.config, KIND: kind, **facts}


def _write(path: Path, weights: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors that may be mapped from another file, without a copy of all of them in memory."""
    ready = {name: tensor.contiguous() for name, tensor in weights.items()}

    def write(temporary: Path) -> None:
        try:
            safetensors.torch.save_file(ready, temporary, metadata=metadata_header(metadata))
        except SafetensorError as error:  # it hides the system's error in its message
            raise OSError(_number_in(str(error)), str(error)) from error

    write_atomic(path, write)


def _number_in(message: str) -> int:
    """The system's error number in a message such as "No space left on device (os error 28)"; 5 if there is none."""
    number = message.rpartition("os error ")[2].partition(")")[0]
    return int(number) if number.isdecimal() else 5


def _same(there: Path, here: Path) -> None:
    """A second name for a file; a copy where the file system has no links. Files are replaced, never changed."""
    try:
        os.link(there, here)
    except OSError:
        write_atomic(here, lambda temporary: shutil.copyfile(there, temporary))


@contextmanager
def _made_whole(path: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name at the end; after an error nothing is left.

    Raises:
        RunError: the name is taken, or the folder cannot be made.
    """
    if path.exists() or path.is_symlink():
        raise RunError(f"{path} exists: choose another --name, or remove it")
    folder = path.with_name(f".{path.name}.{os.getpid()}.import")
    new_parents = [parent for parent in (path.parent, *path.parent.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True)
        yield folder
        os.rename(folder, path)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in new_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise


def _check_settings(config: Config, vqgan: Any, prior: Any) -> None:
    """Hold the settings against the networks that they describe: later stages build them from the settings.

    Raises:
        ConfigError: they differ.
    """
    with torch.device("meta"):
        ours: Any = tokenizer_of(config, vqgan.image_size, vqgan.channels)
        theirs = prior_of(config, replace(vqgan.grid, classes=prior.classes))
    if ours.config != vqgan.config or config_of(theirs) | {"classes": prior.classes} != config_of(prior):
        raise ConfigError("the settings do not describe the networks in these files: report it")
