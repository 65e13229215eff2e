"""A reward by a small head on CLIP's features, such as an aesthetic predictor of your own; start it in this folder.

ral-gym train --plugin own_aesthetic:Aesthetic --ral.reward-weights own_aesthetic:Aesthetic 1 --ral.clip-path FOLDER
--ral.reward-options head_path head.safetensors
"""

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ral_gym.errors import ConfigError
from ral_gym.rewards.image_text import ImageText


class Aesthetic(nn.Module):
    """Images uint8 (B, C, h, S) -> (B,): a head on the unit vectors (B, P) of a local CLIP.

    Its file has tensors 0.weight (1, P) and 0.bias (1,), or more layers 1.weight, .. with a ReLU between them.
    """

    def __init__(self, clip_path: str, head_path: str, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.clip = ImageText(clip_path)
        self.clip.drop_texts()
        state = load_file(head_path)
        sizes = [state[f"{i}.weight"].shape for i in range(len(state)) if f"{i}.weight" in state]
        self.layers = nn.ModuleList(nn.Linear(size[1], size[0]) for size in sizes)
        if not sizes or sizes[0][1] != self.clip.num_features or sizes[-1][0] != 1:
            raise ConfigError(f"{head_path} is no head from {self.clip.num_features} features to one number")
        self.layers.load_state_dict(state)
        self.to(device).eval().requires_grad_(False)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Whatever the class: `labels` (B,) would give it."""
        x = self.layers[0](self.clip.images(images.to(self.clip.device)))
        for layer in self.layers[1:]:
            x = layer(x.relu())
        return x.squeeze(1)
