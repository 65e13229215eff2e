"""The PatchGAN critic: an image in, a map of scores out (Sections 4.2 and 5.1), trained by WGAN-GP (Eq. 5).

Each strided layer halves the side, so n layers turn S x S pixels into a score map of side S / 2^n: 5 layers give the
paper's 4 x 4 map of a 128 x 128 image. Fully convolutional: images of fewer rows (partial generation) give maps of
fewer rows. There is no normalisation layer, since the gradient penalty is per image.

`spectral_norm` divides every convolution's weight by its largest singular value (Miyato et al., 2018, "Spectral
Normalization for Generative Adversarial Networks"), as one power iteration per training pass estimates it. The vectors
of classes below are left as they are, since they start at 0.

With classes a patch's score is D(x, y) = head(f) + <E_y, f>, f its features and E_y a vector of class y: the projection
of "cGANs with Projection Discriminator" (Miyato and Koyama, 2018), patch by patch. E is 0 at first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from ral_gym.errors import ConfigError
from ral_gym.priors.transfer import numbers

CriticLoss = Literal["wgan_gp", "hinge"]


class PatchCritic(nn.Module):
    """Scores image patches; higher is more real.

    Args:
        image_size: side S of whole images.
        channels: 1 or 3.
        hidden_units: channels after the first layer, doubled by each further one up to eight times.
        layers: strided convolutions.
        classes: N, labels that scores depend on; 0: none.
        spectral_norm: divide the convolutions' weights by their largest singular values.

    Raises:
        ConfigError: the layers leave no score map.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        *,
        hidden_units: int = 64,
        layers: int = 4,
        classes: int = 0,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        if layers < 1 or image_size % 2**layers:
            raise ConfigError(
                f"{layers} strided critic layers do not fit images of side {image_size}: the side must be a multiple "
                f"of {2 ** max(layers, 1)}; change critic.layers"
            )
        self.config: dict[str, Any] = {
            "image_size": image_size,
            "channels": channels,
            "hidden_units": hidden_units,
            "layers": layers,
        }
        self.map_size = image_size // 2**layers
        body: list[nn.Module] = []
        width = channels
        for layer in range(layers):
            out = hidden_units * min(2**layer, 8)
            body += [nn.Conv2d(width, out, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            width = out
        self.body = nn.Sequential(*body)
        self.head = nn.Conv2d(width, 1, 3, padding=1)
        self.class_embedding: nn.Embedding | None = None
        if classes:
            self.config["classes"] = classes
            self.class_embedding = nn.Embedding(classes, width)
            nn.init.zeros_(self.class_embedding.weight)
        if spectral_norm:
            self.config["spectral_norm"] = True
            for part in [*self.body, self.head]:
                if isinstance(part, nn.Conv2d):
                    parametrizations.spectral_norm(part)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images (B, C, h, S) in [-1, 1] -> score map (B, h / 2^n, S / 2^n).

        Args:
            images: as above.
            labels: (B,) int64, the images' classes; None: scores without a class's share.
        """
        features = self.body(images)  # (B, C', h', w')
        scores = self.head(features).squeeze(1)  # (B, h', w')
        if labels is None or self.class_embedding is None:
            return scores
        return scores + torch.einsum("bc,bchw->bhw", self.class_embedding(labels), features)

    def row_multiple(self, code_rows: int) -> int:
        """Partial images must have a multiple of this many code rows, so that score-map rows are whole.

        Args:
            code_rows: rows H of the whole code grid.
        """
        return max(1, code_rows // self.map_size)


def gradient_penalty(
    critic: nn.Module,
    real: Tensor,
    fake: Tensor,
    generator: torch.Generator | None = None,
    labels: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Mean of ``(||grad D(x)||_2 - 1)^2`` at points x drawn uniformly between real and fake images (Eq. 5).

    The norm is over all pixels of one image; D(x) is the mean of the score map.

    Args:
        critic: images (B, C, h, S), or features (B, F) -> score map (B, ...).
        real: (B, C, h, S), or (B, F).
        fake: of the same shape.
        generator: draws the mixing weights, one per image.
        labels: (B,) classes of the real images and of the fake ones, for a critic that takes them.
        weights: (B,) in [0, 1], the mixing weights, in place of the generator's.
    """
    weight = (torch.rand(len(real), generator=generator) if weights is None else weights).to(real.device)
    weight = weight.reshape(-1, *[1] * (real.dim() - 1))  # (B, 1, ..)
    gradient = _slopes(critic, weight * real + (1 - weight) * fake, labels)
    return (gradient.norm(dim=1) - 1).square().mean()


def r1_penalty(critic: nn.Module, real: Tensor, labels: Tensor | None = None) -> Tensor:
    """Mean of ``||grad D(x)||_2^2`` at real images x: how steep the critic is where it should be flat in the end.

    R1 of "Which Training Methods for GANs do actually Converge?" (Mescheder et al., 2018).

    Args:
        critic: as in `gradient_penalty`; D(x) is the mean of the score map.
        real: (B, C, h, S), or (B, F).
        labels: (B,) their classes, for a critic that takes them.
    """
    return _slopes(critic, real, labels).square().sum(1).mean()


def _slopes(critic: nn.Module, seen: Tensor, labels: Tensor | None) -> Tensor:
    """Gradients of the mean scores to what the critic sees (B, ...), flat (B, D), with a graph."""
    seen = seen.detach().requires_grad_(True)
    scores = _scores(critic, seen, labels).reshape(len(seen), -1).mean(1)  # (B,)
    (gradient,) = torch.autograd.grad(scores.sum(), seen, create_graph=True)
    return gradient.flatten(1)


def _scores(critic: nn.Module, seen: Tensor, labels: Tensor | None) -> Tensor:
    """The critic's scores of what it sees (B, ...), given their classes (B,) if there are any."""
    return critic(seen) if labels is None else critic(seen, labels=labels)


def critic_loss(
    critic: nn.Module,
    real: Tensor,
    fake: Tensor,
    penalty_weight: float,
    generator: torch.Generator | None = None,
    loss: CriticLoss = "wgan_gp",
    labels: Tensor | None = None,
    weights: Tensor | None = None,
    r1: float = 0.0,
) -> tuple[Tensor, dict[str, float]]:
    """What the critic minimises.

    `wgan_gp` is Eq. 5: mean fake score - mean real score + `penalty_weight` * gradient penalty. `hinge` is
    mean max(0, 1 - real score) + mean max(0, 1 + fake score) over all patches, with no penalty: no second derivatives,
    and it learns much faster on small sets.

    Args:
        critic: images (B, C, h, S) -> score map.
        real: decoded real codes (B, C, h, S), decoded from equally many rows as the fakes.
        fake: decoded drawn codes (B, C, h, S).
        penalty_weight: lambda_gp; `wgan_gp` only.
        generator: draws the mixing weights of the penalty.
        loss: `wgan_gp` or `hinge`.
        labels: (B,) classes of the real images and of the fake ones, for a critic that takes them.
        weights: (B,) the penalty's mixing weights, in place of the generator's.
        r1: gamma, `hinge` only: half of it times `r1_penalty` is added.

    Returns:
        the loss (scalar) and the metrics for the log: `loss`, `gap` (mean real - mean fake score) and, for `wgan_gp`,
        `gradient_penalty`, or with `r1` `r1_penalty`, what it adds to the loss.
    """
    both = None if labels is None else labels.repeat(2)  # (2 B,)
    real_map, fake_map = _scores(critic, torch.cat([real, fake]), both).chunk(2)  # (B, h', w'), (B, h', w')
    gap = real_map.mean() - fake_map.mean()
    if loss == "hinge":
        total = F.relu(1 - real_map).mean() + F.relu(1 + fake_map).mean()
        if not r1:
            return total, fetched({"loss": total, "gap": gap})
        added = r1 / 2 * r1_penalty(critic, real, labels)
        return total + added, fetched({"loss": total + added, "gap": gap, "r1_penalty": added})
    penalty = gradient_penalty(critic, real, fake, generator, labels, weights)
    total = -gap + penalty_weight * penalty
    return total, fetched({"loss": total, "gap": gap, "gradient_penalty": penalty})


def fetched(metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Numbers for the log, in one transfer."""
    return dict(zip(metrics, numbers(list(metrics.values())), strict=True))
