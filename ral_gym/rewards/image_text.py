"""The network of the rewards `clip` and `hps`: images and texts in one space, where their cosine is the score.

Both are a CLIP (Radford et al., 2021): CLIP itself, and HPSv2.1 (Wu et al., 2023), a ViT-H-14 tuned on which of two
images people prefer. The network is `transformers`' `CLIPModel`, frozen, in float32. `ral_gym.rewards.clip_files` reads
the files. B images of C channels, P dimensions of the common space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ral_gym.errors import ConfigError
from ral_gym.rewards.clip_files import (
    END,
    VOCABULARY,
    FolderWeights,
    HPSWeights,
    Sizes,
    check_folder,
    check_installed,
    check_shapes,
    folder_colours,
    folder_sizes,
    folder_vocabulary,
)

IMAGES_AT_ONCE = 32
"""Images of one pass; at ViT-H/14's 257 x 1280 activations a few hundred MB."""
TEXTS_AT_ONCE = 64


class ImageText(nn.Module):
    """A frozen CLIP.

    Args:
        clip_path: the CLIP folder; with `hps_path` only its vocabulary and its colours are used.
        hps_path: an HPSv2.1 file; None: the folder's own weights.
        heads: of the text and the image tower of an HPS file, see `HPSWeights`.

    Raises:
        ConfigError: the library is not installed, a file is missing or damaged, or they do not belong together.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, clip_path: str | Path, hps_path: str | Path | None = None, heads: Any = None) -> None:
        super().__init__()
        weights, sizes, vocabulary = _checked(Path(clip_path), None if hps_path is None else Path(hps_path), heads)
        self.image_size, self.num_features = sizes.vision["image_size"], sizes.projection
        self.tokens, self.end = sizes.text["tokens"], vocabulary[0][END]
        self._vocabulary: Any = vocabulary
        mean, std = folder_colours(Path(clip_path))
        self.network = _empty(sizes, self.end)
        _fill(self.network, weights)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.mean.device

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (N, P) float32 of texts; longer ones are cut at the network's number of tokens."""
        from transformers import CLIPTokenizer

        tokens, merges = self._vocabulary
        tokenizer = CLIPTokenizer(vocab=tokens, merges=merges)
        vectors = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            batch = list(texts[start : start + TEXTS_AT_ONCE])
            ids = tokenizer(batch, padding="max_length", truncation=True, max_length=self.tokens)["input_ids"]
            pooled = self.network.text_model(torch.tensor(ids, device=self.device)).pooler_output  # (N, width)
            vectors.append(F.normalize(self.network.text_projection(pooled), dim=1))
        return torch.cat(vectors)  # (N, P)

    def drop_texts(self) -> None:
        """Free the text tower, once all texts are known."""
        self.network.text_model, self.network.text_projection, self._vocabulary = None, None, None

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        """Unit vectors (B, P) float32 of images (B, 1 or 3, h, w) uint8, on the images' device."""
        return torch.cat([self._images(batch) for batch in images.split(IMAGES_AT_ONCE)])

    def _images(self, images: Tensor) -> Tensor:
        pixels = self.pixels(images.to(self.device))  # (B, 3, image_size, image_size)
        pooled = self.network.vision_model(pixels).pooler_output  # (B, width)
        return F.normalize(self.network.visual_projection(pooled), dim=1).to(images.device)

    def pixels(self, images: Tensor) -> Tensor:
        """The network's input (B, 3, S', S'): bicubic with antialiasing, as uint8, then on the network's scale.

        An image that is not square (an episode that stopped early) is shown whole, its longer side enlarged to S'; the
        rest has the mean colour.
        """
        height, width = images.shape[-2:]
        scale = self.image_size / max(height, width)
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        large = F.interpolate(images.float(), size, mode="bicubic", antialias=True).clamp(0, 255).round()
        normal = (large.expand(-1, 3, -1, -1) / 255 - self.mean) / self.std  # (B, 3, *size)
        return F.pad(normal, (0, self.image_size - size[1], 0, self.image_size - size[0]))


def check_image_text(clip_path: str | None, hps_path: str | None = None) -> None:
    """Refuse files that `ImageText` could not be made from; reads no weights, only their names and shapes.

    Raises:
        ConfigError: see `ImageText`.
    """
    _checked(Path(str(clip_path)), None if hps_path is None else Path(hps_path), None)


def _checked(
    folder: Path, hps: Path | None, heads: Any
) -> tuple[Mapping[str, Tensor], Sizes, tuple[dict[str, int], list[tuple[str, str]]]]:
    """Weights, sizes and vocabulary that fit together."""
    check_installed()
    check_folder(folder)
    weights = FolderWeights(folder) if hps is None else HPSWeights(hps, heads)
    sizes = weights.sizes if isinstance(weights, HPSWeights) else folder_sizes(folder)
    vocabulary = folder_vocabulary(folder)
    known, needed = len(vocabulary[0]), sizes.text["vocabulary"]
    if known != needed:
        raise ConfigError(f"{folder / VOCABULARY} has {known} tokens, but {weights.path} has {needed}: give its own")
    network = _empty(sizes, vocabulary[0][END])
    check_shapes(weights.path, weights.shapes, {n: tuple(t.shape) for n, t in network.state_dict().items()})
    return weights, sizes, vocabulary


def _empty(sizes: Sizes, end: int) -> Any:
    """The network on the meta device: shapes without memory."""
    from transformers import CLIPModel

    with torch.device("meta"):
        return CLIPModel(sizes.library_config(end))


def _fill(network: Any, weights: Mapping[str, Tensor]) -> None:
    """Put the weights into an empty network."""
    network.load_state_dict({name: weights[name] for name in weights}, assign=True)
    for tower in (network.text_model, network.vision_model):
        places = tower.embeddings
        count = places.position_embedding.weight.shape[0]
        places.position_ids = torch.arange(count)[None]  # (1, count): a buffer that no file holds
