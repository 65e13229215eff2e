"""Mean and covariance of the features of real images, and which features they are of."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ral_gym.errors import ConfigError, DivergedError

if TYPE_CHECKING:
    from ral_gym.metrics import Extractor

MINIMUM_BATCH = 3
"""The smallest batch for which leave-one-out rewards exist."""
MOST_FEATURES = 16_384
"""Most features of a reference; the covariance of as many has 2 GiB."""


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of the features of real images.

    Attributes:
        mean: (F,) float64.
        covariance: (F, F) float64, divided by the number of images, or its diagonal (F,).
        n: number of images, 3 or more.
        extractor: the name of the features.
        weights: digest of the weights of features that a tokenizer gives; empty: the name says all.
    """

    mean: Tensor
    covariance: Tensor
    n: int
    extractor: str
    weights: str = ""

    @classmethod
    def of(cls, features: Tensor, extractor: Extractor) -> Moments:
        """The moments of features (N, F) that `extractor` gave.

        Raises:
            ConfigError: not (N, F) with N >= 3, or more than `MOST_FEATURES`.
            DivergedError: one is NaN or infinite.
        """
        features = checked_features(features)  # (N, F)
        if features.shape[1] > MOST_FEATURES:
            raise ConfigError(f"{features.shape[1]} features: a reference has at most {MOST_FEATURES}")
        mean = features.mean(0)
        centred = features - mean
        return cls(mean, centred.T @ centred / len(centred), len(features), extractor.name, weights_of(extractor))

    def check(self, extractor: Extractor) -> None:
        """Refuse features that are not those of this reference.

        Raises:
            ConfigError: another name, another number of them, or another tokenizer's.
        """
        if extractor.name != self.extractor:
            raise ConfigError(
                f"ral.reward_reference has statistics of {self.extractor} features, but the rewards see "
                f"{extractor.name} features: give a reference of these, or another ral.reward_features"
            )
        if extractor.num_features != len(self.mean):
            raise ConfigError(
                f"ral.reward_reference has statistics of {len(self.mean)} features, but {extractor.name} gives "
                f"{extractor.num_features} here: give a reference made with these"
            )
        if self.weights != weights_of(extractor):
            raise ConfigError(
                f"ral.reward_reference has statistics of another tokenizer's {self.extractor} features: make it again "
                "with this run's"
            )


def weights_of(extractor: Extractor) -> str:
    """The digest of the weights behind a tokenizer's features (`encoder`); empty for features that the name tells."""
    if extractor.name != "encoder":
        return ""
    encode = getattr(extractor, "encode", None)
    owner = encode if isinstance(encode, nn.Module) else getattr(encode, "__self__", None)
    digest = hashlib.sha256()
    for name, tensor in owner.state_dict().items() if isinstance(owner, nn.Module) else ():
        digest.update(
            name.encode() + tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def checked_features(features: Tensor, width: int | None = None) -> Tensor:
    """Features as float64; raises if no reward can be computed from them.

    Raises:
        ConfigError: not (N, F) with N >= 3, or F is not `width`.
        DivergedError: one is NaN or infinite.
    """
    if features.dim() != 2 or len(features) < MINIMUM_BATCH or width not in (None, features.shape[1]):
        raise ConfigError(
            f"features of shape {tuple(features.shape)}: give (N, {width or 'F'}) with N >= {MINIMUM_BATCH} images"
        )
    if not features.isfinite().all():
        raise DivergedError("a feature is NaN or infinite: the extractor's weights, or the images, are damaged")
    return features.detach().double()
