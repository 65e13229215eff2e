"""Rewards of your own for stage 3, each with its own weight, scale and curve; start it in this folder.

ral-gym train --preset smoke --plugin own_reward --ral.reward-weights critic 1 bright 0.5 own_reward:Novelty 1
"""

from torch import Tensor, nn

from ral_gym.rewards.terms import reward


@reward("bright")
def bright(images: Tensor, labels: Tensor | None = None) -> Tensor:
    """Images uint8 (B, C, h, S) -> (B,)."""
    return images.float().mean((1, 2, 3))


@reward("calm", sees="codes")
def calm(codes: Tensor) -> Tensor:
    """Codes (B, T) -> a reward for every code, (B, T): 1 where it repeats the one before. Nothing is decoded."""
    return nn.functional.pad((codes[:, 1:] == codes[:, :-1]).float(), (1, 0))


class Novelty:
    """Features (B, F) -> (B,): the distance from what has been drawn so far, on average."""

    sees = "features"
    centre: Tensor | float = 0.0

    def __call__(self, features: Tensor) -> Tensor:
        """The whole batch at once."""
        self.centre = 0.9 * self.centre + 0.1 * features.mean(0)
        return (features - self.centre).norm(dim=1)

    def state_dict(self) -> dict:
        """For a checkpoint."""
        return {"centre": self.centre}

    def load_state_dict(self, state: dict) -> None:
        """From a checkpoint."""
        self.centre = state["centre"]
