"""Critics of your own: for stage 3, the environment and the report; start it in this folder.

ral-gym train --preset smoke --name global --critic.kind own_critic:OneScore --critic.options width 16
ral-gym train --preset smoke --name codes --critic.kind own_critic:CodeCritic --ral.reward intermediate
"""

from torch import Generator, Tensor, nn
from torch.nn import functional as F


class OneScore(nn.Module):
    """Images (B, C, h, S) in [-1, 1] -> one score each, (B,); trained by `critic.loss`."""

    def __init__(self, channels: int, width: int = 8) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(channels, width, 4, 4), nn.LeakyReLU(0.2), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(width, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Higher is more real."""
        return self.head(self.net(images).flatten(1)).squeeze(1)  # (B,)


class CodeCritic(nn.Module):
    """Codes (B, T) -> a score for each, (B, T): does it follow the one before in real images? Nothing is decoded."""

    sees = "codes"

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        self.score, self.codebook_size = nn.Embedding(codebook_size**2, 1), codebook_size

    def forward(self, codes: Tensor) -> Tensor:
        """An intermediate reward pays them code by code."""
        return self.score(F.pad(codes[:, :-1], (1, 0)) * self.codebook_size + codes).squeeze(2)

    def loss(self, real: Tensor, fake: Tensor, generator: Generator) -> tuple[Tensor, dict[str, float]]:
        """Its own loss, logistic, and numbers for the log."""
        a, b = self(real), self(fake)
        return F.softplus(-a).mean() + F.softplus(b).mean(), {"gap": (a.mean() - b.mean()).item()}
