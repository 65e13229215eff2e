"""What stage 2 looks at as it trains: held-out likelihood (the best weights are kept), and samples in TensorBoard."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.runs.run import Run
from ral_gym.runs.storage import load_module, weights_of
from ral_gym.stages.boards import add_samples
from ral_gym.stages.common import WeightAverage
from ral_gym.stages.levels import LevelCodes, held_out_nll, load_vqvae
from ral_gym.stages.processes import process_index
from ral_gym.tokenizers.vqvae import VQVAE


@dataclass
class Best:
    """The best held-out NLL of the live and of the averaged weights, and those weights."""

    nll: dict[str, float] = field(default_factory=lambda: {"live": float("inf"), "ema": float("inf")})
    step: dict[str, int] = field(default_factory=lambda: {"live": 0, "ema": 0})
    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def offer(self, which: str, value: float, step: int, model: PixelCNN) -> None:
        """Keep the weights if the value is the best so far."""
        if value < self.nll[which]:
            self.nll[which], self.step[which] = value, step
            self.weights[which] = weights_of(model)


@dataclass
class HeldOut:
    """Measures while training, and remembers the best weights."""

    test: LevelCodes
    new_people: LevelCodes | None
    every: int
    best: Best = field(default_factory=Best)

    def measure(self, prior: PixelCNN, average: WeightAverage, step: int) -> dict[str, float]:
        """Held-out figures of the live and the averaged weights."""
        prior.eval()
        figures = {"nll_test": held_out_nll(prior, self.test)}
        if self.new_people is not None:
            figures["nll_new_people"] = held_out_nll(prior, self.new_people)
        self.best.offer("live", figures["nll_test"], step, prior)
        with average.applied(prior):
            figures["nll_test_ema"] = held_out_nll(prior, self.test)
            self.best.offer("ema", figures["nll_test_ema"], step, prior)
        prior.train()
        return figures


@dataclass(frozen=True)
class Board:
    """Shows in TensorBoard what the prior draws, decoded; no random state is touched."""

    vqvae: VQVAE
    top: PixelCNN | None

    @classmethod
    def of(cls, run: Run, level: int, device: torch.device) -> Board | None:
        """Where there is a VQ-VAE, and all codes: not of the top ones alone.

        To be called before seeding: networks draw their first weights, loaded or not.
        """
        if not run.has("vqvae.safetensors") or process_index() or level < run.config.vqvae.levels - 1:
            return None
        top = load_module(run.file("prior.safetensors"), PixelCNN, device) if level else None
        return cls(load_vqvae(run, device), top)

    def show(self, writer: SummaryWriter, tag: str, prior: PixelCNN, step: int) -> None:
        """Add a grid of samples."""
        add_samples(writer, tag, prior, self.vqvae, step, self.top)
