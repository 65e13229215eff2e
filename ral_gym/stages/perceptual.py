"""Perceptual distances of images: squared differences of a fixed network's features of unit length.

"The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (Zhang et al., 2018), eq. 1: at every position
of several layers the features of both images are scaled to length 1 over the channels; the squared difference, channel
by channel, is weighted, summed over channels, averaged over positions and summed over layers. LPIPS has VGG16 and
weights learned from people's judgements, which have to be brought along. `lite0` has EfficientNet-Lite0, which the
extra `demo` installs, and all weights 1, as the paper's baseline without learned weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ral_gym.config.fits import lpips_files
from ral_gym.errors import ConfigError, RunError
from ral_gym.metrics.features import lite0_network
from ral_gym.stages.released.torch_files import Checkpoint, read_checkpoint

EPS = 1e-10


class Perceptual(nn.Module):
    """The distance in a fixed network's features; a subclass gives the features, in `features`.

    Args:
        widths: channels of every layer's features.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        for number, width in enumerate(widths):
            self.register_buffer(f"weight{number}", torch.ones(width))
        self.layers = len(widths)

    def features(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, S, S) in [-1, 1] -> maps (B, C, h, w), one per layer."""
        raise NotImplementedError

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """The mean distance of images from targets.

        Args:
            images: (B, 1 or 3, S, S) in [-1, 1]; gradients go here alone.
            targets: the same shape.

        Returns:
            a scalar, 0 or more.
        """
        found = self.features(images.expand(-1, 3, -1, -1))
        with torch.no_grad():
            wanted = self.features(targets.expand(-1, 3, -1, -1))
        total = images.new_zeros(())
        for number, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
            weight = getattr(self, f"weight{number}")[:, None, None]  # (C, 1, 1)
            total = total + ((_unit(ours) - _unit(theirs)).square() * weight).sum(1).mean()
        return total


def _unit(features: Tensor) -> Tensor:
    """(B, C, h, w) scaled to length 1 over the channels, in float32 at least."""
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    return features / (features.square().sum(1, keepdim=True) + EPS).sqrt()


class Lite0Perceptual(Perceptual):
    """EfficientNet-Lite0's stem and its blocks 0, 2 and 4: 2, 2, 4 and 8 pixels to a position.

    Args:
        weights: read the pretrained weights; False: the network's shape alone.

    Raises:
        ConfigError: the packages with the network and its weights are missing or damaged.
    """

    taken = (0, 2, 4)

    def __init__(self, weights: bool = True) -> None:
        super().__init__((32, 16, 24, 40))
        network = lite0_network("the perceptual network lite0", weights)
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        self.trunk = nn.ModuleList(network._blocks[: self.taken[-1] + 1])

    def features(self, images: Tensor) -> list[Tensor]:
        """See `Perceptual.features`."""
        x = (images * 127.5 + 0.5) / 128  # the input range this network was trained on: (grey level - 127) / 128
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        found = [x]
        for number, block in enumerate(self.trunk):
            x = block(x)
            if number in self.taken:
                found.append(x)
        return found


VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of its 3x3 convolutions between the poolings."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""ImageNet's mean and standard deviation for images in [-1, 1], as LPIPS rounds them."""


class Lpips(Perceptual):
    """LPIPS, version 0.1, on VGG16: the last ReLU before every pooling and the last one of all."""

    def __init__(self) -> None:
        super().__init__([widths[-1] for widths in VGG16])
        widths = [3, *(width for block in VGG16 for width in block)]
        convs = iter([nn.Conv2d(width, out, 3, padding=1) for width, out in pairwise(widths)])
        self.blocks = nn.ModuleList(nn.Sequential(*islice(convs, len(block))) for block in VGG16)

    def features(self, images: Tensor) -> list[Tensor]:
        """See `Perceptual.features`."""
        shift, scale = (images.new_tensor(numbers)[:, None, None] for numbers in (SHIFT, SCALE))
        x, found = (images - shift) / scale, list[Tensor]()
        for number, block in enumerate(self.blocks):
            x = F.max_pool2d(x, 2) if number else x
            for conv in block.children():
                x = F.relu(conv(x))
            found.append(x)
        return found


def make_perceptual(network: str, weights: bool = True) -> Perceptual:
    """The network that `vqvae.perceptual_network` names, in evaluation mode and without gradients of its weights.

    Args:
        network: `lite0`, or ``lpips:`` and one file or two; a bad name is refused by `Config.check`.
        weights: read its weights; False: the network's shape alone, for which no file is opened.

    Raises:
        ConfigError: packages or files are missing, damaged or hold something else.
    """
    files = [Path(file) for file in lpips_files(network)]
    with nullcontext() if weights else torch.device("meta"):
        found: Perceptual = Lpips() if files else Lite0Perceptual(weights)
    if files and weights:
        try:
            found.load_state_dict(_lpips_weights(found, files))
        except RunError as error:
            raise ConfigError(f"vqvae.perceptual_network: {error}") from error
    return found.requires_grad_(False).eval()


def network_facts(network: str) -> dict[str, Any]:
    """Name, size and SHA-256 of the user's files, by which a stopped run knows them again."""
    return {str(number): Checkpoint(Path(file), {}).facts() for number, file in enumerate(lpips_files(network))}


def _lpips_weights(lpips: nn.Module, files: list[Path]) -> dict[str, Tensor]:
    """The tensors of LPIPS by our names, from the files in which they are published.

    Torchvision's VGG16 has ``features.N.weight``, N counting ReLU and pooling too; the whole LPIPS
    ``net.sliceM.N.weight`` with the same N; the linear layers are ``linL.model.1.weight`` (1, C, 1, 1).

    Raises:
        RunError: a tensor is missing, of another shape or not finite, or a file cannot be read.
    """
    what = ("VGG16 and LPIPS' linear weights",) if len(files) == 1 else ("VGG16", "LPIPS' linear weights")
    given = [read_checkpoint(file, wanted) for file, wanted in zip(files, what, strict=True)]
    vgg, linear = given[0], given[-1]
    found, place = lpips.state_dict(), 0
    for number, block in enumerate(VGG16):
        for layer in range(len(block)):
            for end in ("weight", "bias"):
                theirs = (f"features.{place}.{end}", f"net.slice{number + 1}.{place}.{end}")
                _fill(found, f"blocks.{number}.{layer}.{end}", vgg, theirs, what[0])
            place += 2  # a convolution and its ReLU
        place += 1  # the pooling
        _fill(found, f"weight{number}", linear, (f"lin{number}.model.1.weight",), what[-1])
    return found


def _fill(found: dict[str, Tensor], name: str, file: Checkpoint, names: Sequence[str], what: str) -> None:
    """Put the first of these tensors of a file in its place."""
    theirs = next((one for one in names if one in file.tensors), None)
    if theirs is None:
        raise RunError(f"{file.path} has no tensor {names[0]}: give the file with {what}")
    tensor, shape = file.tensors[theirs], found[name].shape
    fits = tensor.is_floating_point() and tensor.numel() == shape.numel() and tensor.shape[-len(shape) :] == shape
    if name.startswith("weight"):
        fits = tensor.is_floating_point() and tuple(tensor.shape) == (1, *shape, 1, 1)
    if not fits or not bool(torch.isfinite(tensor).all()):
        raise RunError(
            f"{file.path}: tensor {theirs} has shape {tuple(tensor.shape)}, other numbers than floats or infinite "
            f"ones: give the file with {what}"
        )
    found[name] = tensor.float().reshape(shape)
