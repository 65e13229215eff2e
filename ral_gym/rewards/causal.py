"""A causal critic: how much likelier real images are than drawn ones, code by code, by the prior's own network.

A head f with K outputs stands on a copy of the prior's network. It sees the codes before position t and gives every
code k a number f_t(k). Their sum D_t = f_1(c_1) + .. + f_t(c_t) is trained, by the logistic loss averaged over all
prefixes, to tell prefixes of real images from prefixes of drawn ones: at its optimum it is the log-ratio
log p(c_1..c_t) - log q(c_1..c_t) of the two distributions (Sugiyama et al., 2012, "Density Ratio Estimation"), so that
f_t(c_t) is the log-ratio of the conditionals. Each code is paid f_t(c_t): a dense reward whose sum is the whole image's
log-ratio, the reward under which the policy's gradient is that of -KL(q || p). Nothing is decoded.

It starts from what the prior knows of images, which a PatchGAN must learn from scratch, and at D = 0.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ral_gym.config import CriticConfig
from ral_gym.errors import ConfigError
from ral_gym.priors.linear import Linear


class CausalCritic(nn.Module):
    """Scores codes (B, codes_of(r)) of any number of rows; `--critic.kind causal`.

    Args:
        prior: a copy of the maximum-likelihood prior: one level or two, with classes or without.
        dropout: replaces the prior's; without it the critic soon tells its training images apart by heart.
        weight_decay: AdamW's.
        max_grad_norm: largest gradient norm of a step.
        classes: how many classes the images have, if the critic is to be given them; 0: the prior's "no class".

    Raises:
        ConfigError: no prior, or one without the width of its features.
    """

    sees = "codes"
    loss_is_mean = True

    def __init__(
        self,
        prior: Any = None,
        *,
        dropout: float = 0.4,
        weight_decay: float = 0.01,
        max_grad_norm: float = 1.0,
        classes: int = 0,
    ) -> None:
        super().__init__()
        if prior is None or not hasattr(prior, "hidden_units"):
            raise ConfigError("critic.kind causal stands on the run's prior, and there is none with `hidden_units`")
        self.trunk, self.classes = prior, classes
        self.grid = replace(prior.grid, classes=0)
        heads = [Linear(prior.hidden_units, self.grid.codebook_size) for _ in range(self.grid.levels)]
        for head in heads:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.heads = nn.ModuleList(heads)
        self.max_grad_norm, self.weight_decay = max_grad_norm, weight_decay
        self.config = {
            "dropout": dropout,
            "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm,
            "classes": classes,
        }
        _set_dropout(prior, dropout)

    def all_codes(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """f_t(k) of every code k that could stand at t, given those before it.

        Args:
            codes: (B, codes_of(r)) int64.
            labels: (B,) int64 classes, or None.

        Returns:
            (B, codes_of(r), K).
        """
        features = self.trunk.features(self._sequence(codes, labels))  # (B, T', C)
        sizes = [level.shape[1] for level in self.grid.split(codes)]
        parts = zip(features.split(sizes, dim=1), self.heads, strict=True)
        return torch.cat([head(part) for part, head in parts], 1)

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """f_t(c_t) of the codes (B, codes_of(r)), of images of these classes (B,) if any."""
        return self.all_codes(codes, labels).gather(2, codes[..., None]).squeeze(2)

    def _sequence(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        grid = self.trunk.grid
        if not grid.classes:
            return codes
        given = labels if labels is not None and self.classes else torch.full_like(codes[:, 0], grid.classes)
        sequence: Tensor = grid.with_labels(codes, given.to(codes.device))
        return sequence

    def loss(
        self, real: Tensor, fake: Tensor, generator: Generator, labels: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The logistic loss, averaged over all prefixes of real and of drawn images.

        Args:
            real: (B, codes_of(r)) int64.
            fake: as many drawn ones.
            generator: not used; dropout is torch's.
            labels: (B,) classes of the real images and of the fake ones.

        Returns:
            the loss; `gap`, mean D of whole real images minus that of drawn ones, and `accuracy` on whole images.
        """
        both = None if labels is None else labels.repeat(2)
        ratio = self(torch.cat([real, fake]), both).cumsum(1)  # (2 B, T')
        of_real, of_fake = ratio.chunk(2)
        loss = (F.softplus(-of_real).mean() + F.softplus(of_fake).mean()) / 2
        right = torch.cat([of_real[:, -1] > 0, of_fake[:, -1] < 0]).float().mean()
        gap = of_real[:, -1].mean() - of_fake[:, -1].mean()
        return loss, {"gap": gap.detach(), "accuracy": right}

    def make_optimizer(self, settings: CriticConfig) -> torch.optim.Optimizer:
        """AdamW that clips gradients before each step."""
        optimizer = torch.optim.AdamW(
            self.parameters(),
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            weight_decay=self.weight_decay,
        )
        optimizer.register_step_pre_hook(lambda *_: self._clip())
        return optimizer

    def _clip(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), self.max_grad_norm)

    @staticmethod
    def scores_to_rewards(scores: Tensor, rows: int, kind: str) -> Tensor:
        """The scores (B, T') are the rewards of the codes."""
        return scores

    @staticmethod
    def image_scores(scores: Tensor) -> Tensor:
        """D of whole images (B,), in nats."""
        return scores.sum(1)

    @staticmethod
    def comparison(real: Tensor, fake: Tensor) -> dict[str, float]:
        """Numbers for the log from scores D of held-out real images (M,) and of drawn ones (n,).

        `heldout_dv_bound`: a lower bound of KL(real || drawn) in nats per image, mean D of real images minus
        log mean exp D of drawn ones (Donsker and Varadhan, 1983); with few images it is itself an estimate.
        """
        bound = real.double().mean() - (fake.double().logsumexp(0) - math.log(len(fake)))
        return {"heldout_dv_bound": bound.item()}


def _set_dropout(network: nn.Module, dropout: float) -> None:
    """Give all of a prior's parts this dropout, and let none leave out classes."""
    parts: list[Any] = list(network.modules())
    for part in parts:
        if isinstance(part, nn.Dropout):
            part.p = dropout
        elif isinstance(getattr(part, "dropout", None), float):
            part.dropout = dropout
        if isinstance(getattr(part, "class_dropout", None), float):
            part.class_dropout = 0.0
