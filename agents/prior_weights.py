"""What a policy starts from: a prior's constructor arguments and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ral_gym.errors import ConfigError
from ral_gym.grid import CodeGrid
from ral_gym.priors.base import Prior, build_prior, config_of, load_prior
from ral_gym.priors.check import check_prior
from ral_gym.priors.two_level import load_levels
from ral_gym.runs.storage import weights_of


class PriorWeights:
    """A prior to start from, of one level or two, as a policy argument that is small when pickled.

    Pickling keeps the constructor's arguments and drops the weights: a saved SB3 model carries the policy's own
    weights, so loading it must not need the run folder it started from.

    Args:
        config: the network's `ral_gym.priors.base.config_of`, from which `build_prior` makes it.
        weights: its weights; None: keep the initialisation.
    """

    def __init__(self, config: dict[str, Any], weights: dict[str, Tensor] | None = None) -> None:
        self.config, self.weights = config, weights

    @classmethod
    def of(cls, prior: PriorWeights | Prior | Path | str) -> PriorWeights:
        """From a network, a file such as ``runs/demo/prior.safetensors``, or a run folder.

        Raises:
            ConfigError: a network that breaks the `Prior` protocol, or a file that names code whose import was not
                allowed.
            RunError: the file is missing or damaged.
        """
        if isinstance(prior, PriorWeights):
            return prior
        if isinstance(prior, Path | str):
            path = Path(prior)
            if path.is_dir():
                return cls.of(load_levels(path, "prior", 1 + (path / "prior_bottom.safetensors").exists()))
            return cls.of(load_prior(path))
        check_prior(prior)
        return cls(config_of(prior), weights_of(prior))  # type: ignore[arg-type]

    @property
    def grid(self) -> CodeGrid:
        """The codes that it draws."""
        parts = (self.config, self.config.get("top", {}), self.config.get("bottom", {}))
        own = any("kind" in part for part in parts)  # such a constructor may need real tensors
        with torch.random.fork_rng(devices=[], enabled=own), torch.device("cpu" if own else "meta"):
            return build_prior(self.config).grid

    def build(self) -> Prior:
        """The network."""
        network = build_prior(self.config)
        if self.weights is not None:
            network.load_state_dict(self.weights)
        return network

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "weights": None}


def check_for_trpo(prior: Prior) -> None:
    """Refuse a prior that TRPO would train only in part: it skips all weights with "value" in their names.

    Raises:
        ConfigError: names such a weight.
    """
    skipped = [name for name, _ in prior.named_parameters() if "value" in name]
    if skipped:
        raise ConfigError(
            f"TRPO takes weights with 'value' in their name for a value function's and would not train {skipped[0]} of "
            f"{type(prior).__name__}: rename it (content, say), or choose another algorithm"
        )
