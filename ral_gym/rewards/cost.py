"""What the networks of the rewards `clip` and `hps` cost: for a dry run, without weights and without the library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ral_gym.rewards.clip_files import HPSWeights, Sizes, check_folder, folder_sizes
from ral_gym.rewards.image_text import IMAGES_AT_ONCE

if TYPE_CHECKING:
    from ral_gym.config import Config

_TEXT_L = {"width": 768, "inner": 3072, "layers": 12, "heads": 12, "tokens": 77, "vocabulary": 49_408}
_TEXT_H = {"width": 1024, "inner": 4096, "layers": 24, "heads": 16, "tokens": 77, "vocabulary": 49_408}
VIT_L_14 = Sizes(
    _TEXT_L, {"width": 1024, "inner": 4096, "layers": 24, "heads": 16, "image_size": 224, "patch_size": 14}, 768
)
"""openai/clip-vit-large-patch14, assumed for `clip` where no folder is given."""
VIT_H_14 = Sizes(
    _TEXT_H, {"width": 1280, "inner": 5120, "layers": 32, "heads": 16, "image_size": 224, "patch_size": 14}, 1024
)
"""HPSv2.1, assumed for `hps` where no file is given."""


@dataclass(frozen=True)
class RewardCost:
    """One reward network's cost.

    Attributes:
        reward: the term's name.
        parameters: weights of the image tower, which stays, in float32.
        flops: of one image; a multiply-add counts as two.
        memory: bytes while images are scored: the image tower, and the activations of one pass over
            `IMAGES_AT_ONCE` images.
        loading: bytes while the texts are computed, before the text tower is dropped: all weights.
        assumed: whether the sizes are those of the published network, because none was given.
    """

    reward: str
    parameters: int
    flops: int
    memory: int
    loading: int
    assumed: bool


def reward_cost(config: Config) -> list[RewardCost]:
    """The cost of each reward network among `ral.reward_weights`; images per update times `flops` is its work.

    Raises:
        ConfigError: a given file is not the network's.
    """
    ral, costs = config.ral, []
    if "clip" in ral.reward_weights:
        costs.append(_cost("clip", VIT_L_14 if ral.clip_path is None else _of_folder(ral.clip_path), ral.clip_path))
    if "hps" in ral.reward_weights:
        sizes = VIT_H_14 if ral.hps_path is None else HPSWeights(Path(ral.hps_path)).sizes
        costs.append(_cost("hps", sizes, ral.hps_path))
    return costs


def _of_folder(path: str) -> Sizes:
    check_folder(Path(path))
    return folder_sizes(Path(path))


def _cost(reward: str, sizes: Sizes, path: str | None) -> RewardCost:
    vision, text = sizes.vision, sizes.text
    width, inner, patch = vision["width"], vision["inner"], vision["patch_size"]
    patches = (vision["image_size"] // patch) ** 2
    length = patches + 1  # and the class token
    kept = _tower(width, inner, vision["layers"]) + width * (3 * patch**2 + length + 1 + 4 + sizes.projection)
    written = _tower(text["width"], text["inner"], text["layers"])
    written += text["width"] * (text["vocabulary"] + text["tokens"] + 2 + sizes.projection) + 1
    layer = 2 * length * (4 * width**2 + 2 * width * inner) + 4 * length**2 * width
    flops = vision["layers"] * layer + 2 * patches * 3 * patch**2 * width + 2 * width * sizes.projection
    # Without gradients a block holds its input, its normed input, q, k, v or the inner layer, and its output.
    active = 4 * IMAGES_AT_ONCE * length * (3 * width + max(4 * width, 2 * inner))
    return RewardCost(reward, kept, flops, 4 * kept + active, 4 * (kept + written), path is None)


def _tower(width: int, inner: int, layers: int) -> int:
    """Weights of the blocks: attention, two norms, two layers, with biases."""
    return layers * (4 * width * (width + 1) + 4 * width + width * inner + inner + inner * width + width)
