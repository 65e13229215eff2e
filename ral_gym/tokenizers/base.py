"""Tokenizers, images -> codes -> images: their interface, and how one is built, saved and loaded.

A tokenizer is a `torch.nn.Module` with the members of `Tokenizer`, registered in `ral_gym.registry.TOKENIZERS` or named
as ``module:Class``; ``--vqvae.kind`` chooses it. Stage 1 trains it in one of three ways, the first that applies:

* ``training_loss(images)`` of (B, C, S, S) float in [-1, 1] gives the loss, or the loss and a dict of figures to log
  (name -> number; `codes`, (B, T), become `perplexity` and `code_usage`): this package's loop (Adam,
  `vqvae.batch_size`, checkpoints) minimises it. With the decoded images (B, C, S, S) as `reconstruction` in that dict,
  not detached, the loop can add a perceptual and an adversarial loss (`vqvae.perceptual_weight`,
  `vqvae.adversarial_weight`);
* ``fit(images, ...)``: its own training loop over uint8 images (N, C, S, S); it may also take the arguments `seed`,
  `progress` and the settings of `LOOP`;
* neither: it is trained already, or has nothing to learn.

Everything after stage 1 uses the members of `Tokenizer` only.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ral_gym.config import Config, VQVAEConfig
from ral_gym.errors import ConfigError, RalGymError, RunError
from ral_gym.grid import CodeGrid
from ral_gym.presets import PRESETS
from ral_gym.registry import TOKENIZERS
from ral_gym.runs.storage import differences, load_tensors, rebuild_module, save_module
from ral_gym.settings import part_arguments

if TYPE_CHECKING:
    from ral_gym.metrics.features import EncoderFeatures

KIND = "kind"
MEMBERS = ("grid", "image_size", "channels", "config", "encode", "decode")
LOOP = ("batch_size", "training_steps", "learning_rate", "adam_beta1", "adam_beta2", "augment")
"""Settings of stage 1's loop; a tokenizer's own `fit` gets those that it takes."""
IMAGE_LOSSES = (
    *("perceptual_weight", "perceptual_network", "adversarial_weight", "adversarial_start"),
    *("discriminator_units", "discriminator_layers", "discriminator_learning_rate"),
)
"""Settings of the losses that the loop adds for any tokenizer (`ral_gym.stages.image_losses`)."""
GIVEN = ("image_size", "channels")


class Tokenizer(Protocol):
    """What stages, environments and commands need from a tokenizer; it is also a `torch.nn.Module`."""

    @property
    def grid(self) -> CodeGrid:
        """The shape of one image's codes."""

    @property
    def image_size(self) -> int:
        """Side S of the images."""

    @property
    def channels(self) -> int:
        """C: 1 (grey) or 3."""

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON values."""

    def encode(self, images: Tensor) -> list[Tensor]:
        """Images -> codes; changes nothing in the tokenizer.

        Args:
            images: (B, C, S, S) float in [-1, 1]; or their first rows alone, (B, C, r * S / H, S).

        Returns:
            One (B, h * w) int64 per level, top first, in raster order.
        """

    def decode(self, codes: Tensor) -> Tensor:
        """Codes -> images.

        Args:
            codes: (B, codes_of(r)) int64, the sequence of r (top) rows, 1 <= r <= H.

        Returns:
            (B, C, r * S / H, S) float in [-1, 1].
        """

    def parameters(self, recurse: bool = True) -> Any:
        """As in `torch.nn.Module`, like the members below."""

    def buffers(self, recurse: bool = True) -> Any:
        """See there."""


def device_of(tokenizer: Any) -> torch.device:
    """The device of its weights; the CPU if it has none."""
    tensors = (*tokenizer.parameters(), *tokenizer.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def encoder_features(tokenizer: Any) -> EncoderFeatures | None:
    """The extractor `encoder`: ``encode_features(images) -> (B, num_features, h, w)``; None if it has none."""
    if not hasattr(tokenizer, "encode_features") or not hasattr(tokenizer, "num_features"):
        return None
    from ral_gym.metrics.features import (
        EncoderFeatures,
    )  # takes a second to import, which environments need not wait for

    return EncoderFeatures(tokenizer.encode_features, int(tokenizer.num_features))


def kind_of(tokenizer: Any) -> str:
    """The name of a tokenizer's class; a class that is not registered becomes known in this process."""
    return TOKENIZERS.name_of(type(tokenizer))


def class_of(settings: VQVAEConfig) -> type[nn.Module]:
    """The class that `vqvae.kind` and `vqvae.levels` choose.

    Raises:
        ConfigError: an unknown kind, or code that a file names and whose import was not allowed.
    """
    cls: type[nn.Module] = TOKENIZERS.get(_kind(settings.kind, settings.levels))
    if not (inspect.isclass(cls) and issubclass(cls, nn.Module)):
        raise ConfigError(f"vqvae.kind {settings.kind!r} is not a subclass of torch.nn.Module")
    return cls


def _kind(kind: str, levels: int) -> str:
    if levels not in (1, 2):
        raise ConfigError(f"vqvae.levels is {levels}: give 1 or 2")
    return "vqvae2" if kind == "vqvae" and levels == 2 else kind


def tokenizer_of(config: Config, image_size: int, channels: int) -> Any:
    """The untrained tokenizer of a configuration, for images of this size.

    Its constructor gets `image_size`, `channels`, those settings of the section `vqvae` that it takes, and all of
    `vqvae.options`.

    Raises:
        ConfigError: the kind is unknown or may not be imported, it does not take a changed setting or an option, or it
            does not fit the images.
    """
    cls, kind = class_of(config.vqvae), config.vqvae.kind
    preset = [PRESETS[config.preset].vqvae] if config.preset in PRESETS else []
    untouched = [VQVAEConfig(), *preset]
    arguments = part_arguments(
        cls, config.vqvae, "vqvae", training=(*LOOP, *IMAGE_LOSSES, "levels"), given=GIVEN, untouched=untouched
    )
    _check_loop(cls, config.vqvae, untouched)
    try:
        tokenizer: Any = cls(image_size=image_size, channels=channels, **arguments)
    except RalGymError:
        raise
    except Exception as error:  # third-party code
        reason = (str(error).strip() or "no reason given").splitlines()[-1]
        raise ConfigError(
            f"tokenizer {kind!r} cannot be built ({type(error).__name__}: {reason}); check the settings of vqvae"
        ) from error
    check_tokenizer(tokenizer, kind)
    levels = tokenizer.grid.levels
    if levels != config.vqvae.levels:
        raise ConfigError(f"tokenizer {kind!r} has {levels} levels of codes: give --vqvae.levels {levels}")
    found = {"image_size": tokenizer.image_size, "channels": tokenizer.channels}
    others = differences(found, {"image_size": image_size, "channels": channels})
    if others:
        raise ConfigError(f"tokenizer {kind!r} does not take the run's images ({'; '.join(others)})")
    return tokenizer


def _check_loop(cls: type[nn.Module], settings: VQVAEConfig, untouched: list[VQVAEConfig]) -> None:
    """Refuse changed settings of a loop that a tokenizer does not use."""
    if hasattr(cls, "training_loss"):
        return
    taken = inspect.signature(cls.fit).parameters if hasattr(cls, "fit") else ()
    for name in (*LOOP, *IMAGE_LOSSES):
        value = getattr(settings, name)
        if name not in taken and all(value != getattr(other, name) for other in untouched):
            raise ConfigError(
                f"vqvae.{name} is {value!r}, but {settings.kind} has no training loop with it: leave vqvae.{name} out"
            )


def check_tokenizer(tokenizer: Any, kind: str) -> None:
    """Refuse an object that lacks what `Tokenizer` asks for.

    Raises:
        ConfigError: what is missing.
    """
    missing = [name for name in MEMBERS if not hasattr(tokenizer, name)]
    if missing:
        raise ConfigError(
            f"tokenizer {kind!r} has no {', '.join(missing)}: ral_gym.tokenizers.base.Tokenizer lists what it needs"
        )
    grid = tokenizer.grid
    if not isinstance(grid, CodeGrid) or tokenizer.image_size % grid.height:
        raise ConfigError(
            f"tokenizer {kind!r}: its grid must be a ral_gym.grid.CodeGrid whose rows divide image_size, not {grid}"
        )
    if not 2 <= grid.codebook_size <= 32_766:
        raise ConfigError(f"tokenizer {kind!r} has {grid.codebook_size} codes: 2 to 32766 fit 16 bits")


# Files --------------------------------------------------------------------------------------------------------------


def save_tokenizer(path: Path, tokenizer: Any, **facts: Any) -> None:
    """Write a tokenizer's weights, its kind and its constructor's arguments; see `save_module`."""
    save_module(path, tokenizer, kind=kind_of(tokenizer), **facts)


def load_tokenizer(path: Path, device: torch.device | str = "cpu", config: Mapping[str, Any] | None = None) -> Any:
    """Rebuild a tokenizer from its file, in evaluation mode, without gradients; draws no random numbers.

    Args:
        path: the file; files of versions before 0.2 name no kind: they hold VQ-VAEs of one level or two.
        device: where it goes.
        config: the `config` that it must have; None: any.

    Raises:
        ConfigError: the file names an unknown kind, or code whose import was not allowed.
        RunError: missing, damaged, not a tokenizer's, made with other arguments, or weights that do not fit.
    """
    tensors, metadata = load_tensors(path)
    old = {"VQVAE": "vqvae", "VQVAE2": "vqvae2"}.get(str(metadata.get("class")))
    kind = metadata.get(KIND, old)
    if not isinstance(kind, str):
        raise RunError(
            f"{path} holds {metadata.get('class', 'no weights')}, not a tokenizer; remove it to make it again"
        )
    cls = TOKENIZERS.get(kind)
    tokenizer = rebuild_module(path, tensors, metadata, cls, device, None if config is None else dict(config))
    check_tokenizer(tokenizer, kind)
    return tokenizer
