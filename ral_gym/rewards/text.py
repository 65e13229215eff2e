"""The rewards `clip` and `hps`: how well an image fits the text of its class.

``--ral.reward-weights loo_fd 1 clip 0.5 hps 0.5 --ral.clip-path FOLDER --ral.hps-path FILE``. Both are the cosine of an
image's and its text's vectors (`ral_gym.rewards.image_text`). The text is `ral.prompt` with the name of the image's
class in place of {name}; the vectors of all classes are computed once, then the text tower is dropped. Spreads between
images are small, about 0.02, so `CompositeReward` normalises each term over the batch before it is weighed. Checkpoints
do not keep the networks; `ral_gym.rewards.provenance` keeps the sizes and digests of their files.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ral_gym.errors import ConfigError
from ral_gym.rewards.image_text import ImageText, check_image_text
from ral_gym.settings import check_prompt


class TextReward(nn.Module):
    """Cosine of images and the prompts of their classes.

    Args:
        network: makes both vectors; its text tower is dropped.
        prompt: a text; {name} in it stands for the name of a class.
        class_names: names by class; empty: there are no classes.
        device: where the network goes; None: it stays where it is.

    Raises:
        ConfigError: the prompt needs names, and there are none.
    """

    sees = "pixels"
    texts: Tensor

    def __init__(
        self,
        network: ImageText,
        prompt: str = "a photo of a {name}",
        class_names: Sequence[str] = (),
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_prompt(prompt, class_names)
        self.network = network if device is None else network.to(device)
        self.prompts = prompts_of(prompt, class_names)
        self.register_buffer("texts", self.network.texts(self.prompts), persistent=False)  # (N, P)
        self.network.drop_texts()

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Cosines (B,) float32 in -1..1.

        Args:
            images: (B, 1 or 3, h, S) uint8.
            labels: (B,) integer classes; None only with one prompt for all.

        Raises:
            ConfigError: there are no labels, but a prompt for each class.
        """
        vectors = self.network.images(images)  # (B, P)
        texts = self.texts.to(vectors.device)
        if len(self.prompts) == 1:
            return vectors @ texts[0]
        if labels is None:
            raise ConfigError("the images have no labels, but ral.prompt names their class: give one without {name}")
        return (vectors * texts[labels.to(vectors.device).long()]).sum(1)


class ClipReward(TextReward):
    """The term `clip`: cosine similarity by a local CLIP (Radford et al., 2021); arguments as `TextReward`.

    Args:
        clip_path: its folder, see `ral_gym.rewards.clip_files`.
        prompt: see `TextReward`.
        class_names: see `TextReward`.
        device: see `TextReward`.
    """

    network_name = "clip"

    def __init__(
        self,
        clip_path: str | None,
        prompt: str = "a photo of a {name}",
        class_names: Sequence[str] = (),
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(ImageText(_given(clip_path, "clip", "clip_path")), prompt, class_names, device)

    @staticmethod
    def check(clip_path: str | None) -> None:
        """Refuse before stage 1 what the constructor would refuse; reads no weights."""
        check_image_text(_given(clip_path, "clip", "clip_path"))


class HPSReward(TextReward):
    """The term `hps`: the human preference score v2.1 (Wu et al., 2023), without its logit scale.

    Args:
        clip_path: a CLIP folder, for its vocabulary.
        hps_path: HPS_v2.1_compressed.pt.
        prompt: see `TextReward`.
        class_names: see `TextReward`.
        device: see `TextReward`.
        heads: see `HPSWeights`.
    """

    network_name = "hps"

    def __init__(
        self,
        clip_path: str | None,
        hps_path: str | None,
        prompt: str = "a photo of a {name}",
        class_names: Sequence[str] = (),
        device: torch.device | str | None = None,
        heads: tuple[int, int] | None = None,
    ) -> None:
        network = ImageText(_given(clip_path, "hps", "clip_path"), _given(hps_path, "hps", "hps_path"), heads)
        super().__init__(network, prompt, class_names, device)

    @staticmethod
    def check(clip_path: str | None, hps_path: str | None) -> None:
        """Refuse before stage 1 what the constructor would refuse; reads no weights."""
        check_image_text(_given(clip_path, "hps", "clip_path"), _given(hps_path, "hps", "hps_path"))


def prompts_of(prompt: str, class_names: Sequence[str]) -> list[str]:
    """The prompt of every class, or the one for all: of a name its first alias, before a comma, with spaces for _."""
    if "{name}" not in prompt:
        return [prompt.format()]
    return [prompt.format(name=name.partition(",")[0].replace("_", " ").strip()) for name in class_names]


def _given(path: str | None, reward: str, setting: str) -> str:
    """The path of a setting.

    Raises:
        ConfigError: it was not given.
    """
    if path is None:
        what = "the folder of a CLIP model" if setting == "clip_path" else "the file HPS_v2.1_compressed.pt"
        raise ConfigError(f"the reward {reward} needs {what}: give --ral.{setting.replace('_', '-')}")
    return path
