"""Measurements during stage 2: held-out likelihood (the best weights are kept), and samples in TensorBoard."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from ral_gym.data.subsets import subset
from ral_gym.pictures import save_grid
from ral_gym.priors.base import Prior, load_prior
from ral_gym.runs.run import Run
from ral_gym.runs.storage import weights_of
from ral_gym.stages.boards import N_IMAGES, PROGRESS, add_samples
from ral_gym.stages.common import WeightAverage
from ral_gym.stages.levels import LevelCodes, held_out_nll, load_vqvae
from ral_gym.stages.processes import process_index
from ral_gym.tokenizers.base import Tokenizer


@dataclass
class Best:
    """The best held-out NLL of the live and of the averaged weights, and those weights."""

    nll: dict[str, float] = field(default_factory=lambda: {"live": float("inf"), "ema": float("inf")})
    step: dict[str, int] = field(default_factory=lambda: {"live": 0, "ema": 0})
    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def offer(self, which: str, value: float, step: int, model: nn.Module) -> None:
        """Keep the weights if the value is the best so far."""
        if value < self.nll[which]:
            self.nll[which], self.step[which] = value, step
            self.weights[which] = weights_of(model)


@dataclass
class HeldOut:
    """Measures held-out likelihood during training, and keeps the best weights.

    Attributes:
        test: codes of the held-out images that are measured.
        new_people: codes of the held-out people's images, if there are any.
        every: steps between measurements.
        limit: most images of each set that are measured; None: all, as in checkpoints of version 0.1.
        seed: seeds the subset.
        best: the best values so far, and their weights.
    """

    test: LevelCodes
    new_people: LevelCodes | None
    every: int
    limit: int | None = None
    seed: int = 0
    best: Best = field(default_factory=Best)

    def __post_init__(self) -> None:
        self._all = self.test, self.new_people
        self._take()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"best": vars(self.best), "held_out": self.limit}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint, including its `limit`: a run finishes with the number of held-out images it began with."""
        vars(self.best).update(state["best"])
        self.limit = state.get("held_out")
        self._take()

    def _take(self) -> None:
        test, new_people = self._all
        self.test = self._subset(test)
        self.new_people = None if new_people is None else self._subset(new_people)

    def _subset(self, data: LevelCodes) -> LevelCodes:
        return data[torch.from_numpy(subset(len(data.codes), self.limit, self.seed))]

    def measure(self, prior: nn.Module, average: WeightAverage, step: int) -> dict[str, float]:
        """Held-out NLL of the live and the averaged weights, in nats per code."""
        prior.eval()
        metrics = {"nll_test": held_out_nll(prior, self.test)}
        if self.new_people is not None:
            metrics["nll_new_people"] = held_out_nll(prior, self.new_people)
        self.best.offer("live", metrics["nll_test"], step, prior)
        with average.applied(prior):
            metrics["nll_test_ema"] = held_out_nll(prior, self.test)
            self.best.offer("ema", metrics["nll_test_ema"], step, prior)
        prior.train()
        return metrics


@dataclass(frozen=True)
class Board:
    """Shows decoded samples of the prior in TensorBoard and in the run folder; changes no random state."""

    vqvae: Tokenizer
    top: Prior | None
    file: Path

    @classmethod
    def of(cls, run: Run, level: int, device: torch.device) -> Board | None:
        """None without a trained tokenizer, or for the top level, whose codes alone cannot be decoded.

        Call it before seeding: constructing networks draws random weights, even if others are loaded afterwards.
        """
        if not run.has("vqvae.safetensors") or process_index() or level < run.config.vqvae.levels - 1:
            return None
        top = load_prior(run.file("prior.safetensors"), device) if level else None
        return cls(load_vqvae(run, device), top, run.file(PROGRESS))

    def show(self, writer: SummaryWriter, tag: str, prior: Any, step: int) -> None:
        """Add a grid of samples, and write it as the run's picture of its progress."""
        images = add_samples(writer, tag, prior, self.vqvae, step, self.top)
        save_grid(self.file, images, columns=N_IMAGES, title=f"Stage 2, the prior, after {step:,} steps")
