"""The prior of a two-level model (VQ-VAE-2): a network over the top codes, and one over the bottom codes given them.

Follows "Generating Diverse High-Fidelity Images with VQ-VAE-2" (Razavi et al., 2019), p(top) p(bottom | top), with the
sizes of the supplement's Tables 8 to 10. Everything after it sees one sequence per image, top codes and then bottom
codes, so `TwoLevelPrior` is a `Prior` like each of its networks, and `TwoLevelSampler` a `Sampler`. One difference: the
codes that an episode draws need not be the end of the sequence (rows are given in both grids), so K marks them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ral_gym.errors import ConfigError
from ral_gym.grid import CodeGrid
from ral_gym.priors.base import Prior, build_prior, config_of, load_prior, split_label
from ral_gym.priors.guidance import PLAIN, Sampling
from ral_gym.priors.two_level_sampler import TwoLevelSampler, above


class TwoLevelPrior(nn.Module):
    """p(top codes) p(bottom codes | top codes).

    Args:
        top: the prior of the H x W top codes, such as a PixelCNN, or what `build_prior` makes it from.
        bottom: that of the 2H x 2W bottom codes, with condition=(H, W, K), or what `build_prior` makes it from.

    Attributes:
        frozen: `top` or `bottom`: that network runs without gradients, so that only the other one learns; None: both.

    Raises:
        ConfigError: the two do not fit together.
    """

    levels = 2

    def __init__(self, top: Prior | dict[str, Any], bottom: Prior | dict[str, Any]):
        super().__init__()
        self.top: Any = build_prior(top) if isinstance(top, dict) else top
        self.bottom: Any = build_prior(bottom) if isinstance(bottom, dict) else bottom
        self.codebook_size, self.height, self.width = self.top.codebook_size, self.top.height, self.top.width
        self.hidden_units = max(self.top.hidden_units, self.bottom.hidden_units)
        self.classes: int = getattr(self.top, "classes", 0)
        self.frozen: str | None = None
        self._check_levels()

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as the two networks' own; `TwoLevelPrior(**config)` builds the same networks."""
        return {"top": config_of(self.top), "bottom": config_of(self.bottom)}

    @property
    def grid(self) -> CodeGrid:
        """The shape of the codes."""
        return CodeGrid(self.height, self.width, self.codebook_size, levels=2, classes=self.classes)

    @property
    def null_class(self) -> bool:
        """Whether both networks know "no class"."""
        return getattr(self.top, "null_class", True) and getattr(self.bottom, "null_class", True)

    def features(self, codes: Tensor, condition: Tensor | None = None) -> Tensor:
        """The two networks' features, those of the narrower one padded with zeros.

        Args:
            codes: (B, T') int64, sequences of the first r top rows, T' = codes_of(r); entries of K and more stand for
                codes not drawn. Among the top codes the bottom network reads them as absent. With classes and without
                `condition`: sequences (B, T' + 1), see `split`.
            condition: (B, 1) int64, labels 0..N, where N is "no class".

        Returns:
            (B, T', C), C the larger of the networks' channels.

        Raises:
            ConfigError: T' is not that of 1..H rows.
        """
        top, bottom, of_top_only, of_both = self._parts(codes, condition)
        with self._gradients("top"):
            of_top = self._pad(self.top.features(top, *of_top_only))
        with self._gradients("bottom"):
            of_bottom = self._pad(self.bottom.features(bottom, of_both))
        return torch.cat([of_top, of_bottom], dim=1)

    def logits(self, features: Tensor, position: Tensor | None = None) -> Tensor:
        """Features to logits, each by the network of its level.

        Args:
            features: (..., C) of `features`.
            position: (...) int64, where in the whole sequence (0..T-1) each one is from, also if the codes were fewer.

        Returns:
            (..., K).

        Raises:
            ConfigError: no position is given.
        """
        if position is None:
            raise ConfigError("TwoLevelPrior.logits needs the position of each feature: its level depends on it")
        flat, in_top = features.reshape(-1, features.shape[-1]), (position < self.height * self.width).flatten()
        top, bottom = in_top.nonzero()[:, 0], (~in_top).nonzero()[:, 0]
        with self._gradients("top"):
            of_top = self.top.logits(flat[top, : self.top.hidden_units])
        with self._gradients("bottom"):
            of_bottom = self.bottom.logits(flat[bottom, : self.bottom.hidden_units])
        logits = torch.cat([of_top, of_bottom])  # (N, K)
        return logits[torch.cat([top, bottom]).argsort()].view(*features.shape[:-1], -1)

    def forward(self, codes: Tensor, condition: Tensor | None = None) -> Tensor:
        """Logits (B, T', K) of every code given those before it; see `features` for the arguments."""
        top, bottom, of_top_only, of_both = self._parts(codes, condition)
        with self._gradients("top"):
            of_top = self.top(top, *of_top_only)
        with self._gradients("bottom"):
            of_bottom = self.bottom(bottom, of_both)
        return torch.cat([of_top, of_bottom], dim=1)

    def _parts(self, codes: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor]:
        """Top and bottom codes (B, r W) and (B, 4 r W), and what each network is given beside them."""
        if condition is None:
            codes, condition = self.split(codes)
        top, bottom = self._levels(codes)
        return top, bottom, () if condition is None else (condition,), above(top, condition)

    def _levels(self, codes: Tensor) -> list[Tensor]:
        """Codes (B, T') without a label -> top and bottom codes."""
        return replace(self.grid, classes=0).split(codes)

    def split(self, sequence: Tensor) -> tuple[Tensor, Tensor | None]:
        """Sequences -> codes (B, T') of both levels and labels (B, 1), 0..N; without classes: the codes and None.

        Raises:
            ConfigError: there are classes, and a last entry is no label.
        """
        return split_label(sequence, self.codebook_size, self.classes) if self.classes else (sequence, None)

    def make_sampler(self, sampling: Sampling = PLAIN) -> TwoLevelSampler:
        """The sampler of both levels; it uses one cache per level."""
        return TwoLevelSampler(self, sampling)

    def _gradients(self, level: str) -> torch.set_grad_enabled:
        return torch.set_grad_enabled(torch.is_grad_enabled() and level != self.frozen)

    def _pad(self, features: Tensor) -> Tensor:
        return F.pad(features, (0, self.hidden_units - features.shape[-1]))

    def _check_levels(self) -> None:
        top, bottom = self.top, self.bottom
        if getattr(top, "condition", None) is not None:
            raise ConfigError(f"TwoLevelPrior: the top prior has condition={top.condition}; it takes none")
        classes = [getattr(prior, "classes", 0) for prior in (top, bottom)]
        if classes[0] != classes[1]:
            raise ConfigError(f"TwoLevelPrior: the top prior has {classes[0]} classes, the bottom one {classes[1]}")
        wanted = (2 * top.height, 2 * top.width, top.codebook_size, (top.height, top.width, top.codebook_size))
        condition = getattr(bottom, "condition", None)
        condition = None if condition is None else tuple(condition)
        found = (bottom.height, bottom.width, bottom.codebook_size, condition)
        if found != wanted:
            raise ConfigError(
                "TwoLevelPrior: the bottom prior's (height, width, codebook_size, condition) are "
                f"{found}, where the top prior needs {wanted}"
            )


def join_priors(priors: Sequence[Prior]) -> Any:
    """The generator of whole images: the only prior, or top and bottom ones as one."""
    return priors[0] if len(priors) == 1 else TwoLevelPrior(*priors)


def split_prior(prior: Any) -> list[Any]:
    """The inverse of `join_priors`."""
    return [prior] if prior.levels == 1 else [prior.top, prior.bottom]


SUFFIXES = ("", "_bottom")
"""The suffix of the file name of each level's prior."""


def load_levels(
    folder: Path,
    name: str,
    levels: int,
    device: torch.device | str = "cpu",
    load: Callable[[Path, Any], Any] = load_prior,
) -> Any:
    """A generator of whole images from its files, ``NAME.safetensors`` and with two levels ``NAME_bottom.safetensors``.

    Args:
        folder: the run folder.
        name: such as `prior`.
        levels: the number of files: 1 also for two levels in one file, as stage 3 writes them.
        device: where it goes.
        load: reads one file: `load_prior`, or a function that caches its results.

    Returns:
        the prior, in evaluation mode, without gradients.

    Raises:
        ConfigError: see `load_prior`.
        RunError: see `load_prior`.
    """
    return join_priors([load(folder / f"{name}{suffix}.safetensors", device) for suffix in SUFFIXES[:levels]]).eval()
