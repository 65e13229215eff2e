"""The learning rate of a stage: constant, or falling to 0 at the end, which may come early once likelihood is flat."""

from __future__ import annotations

import math
from typing import Any

import torch

from ral_gym.runs.checked_state import integer_of


class LearningRate:
    """Sets an optimizer's learning rate before every step, and knows which step is the last.

    The rate stays at the optimizer's until step `decay_from`, then falls to 0 over the steps up to `last`: "warm-up,
    stable, decay" without the warm-up (Hu et al. 2024, https://arxiv.org/abs/2404.06395, section 4). The first of these
    steps still has the full rate, the last one a rate just above 0.

    Args:
        optimizer: its groups' rates are scaled.
        kind: `constant`, `linear` or `cosine`.
        steps: the stage's steps; no more are taken.
        decay_share: share of `steps` over which the rate falls.
        patience: let the end begin after so many measurements in a row without a lower value; None: never early.

    Attributes:
        decay_from: the last step at the full rate.
        last: the last step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        kind: str,
        steps: int,
        decay_share: float = 1.0,
        patience: int | None = None,
    ) -> None:
        self.optimizer, self.kind, self.steps, self.patience = optimizer, kind, steps, patience
        self.base = [group["lr"] for group in optimizer.param_groups]
        self.n_decay = 0 if kind == "constant" else max(1, round(decay_share * steps))
        self.decay_from, self.last = steps - self.n_decay, steps
        self.best, self.waited = math.inf, 0

    def factor(self, step: int) -> float:
        """The share of the full rate at a step, counted from 1."""
        if self.kind == "constant" or step <= self.decay_from:
            return 1.0
        done = (step - 1 - self.decay_from) / (self.last - self.decay_from)
        return 1 - done if self.kind == "linear" else (1 + math.cos(math.pi * done)) / 2

    def set(self, step: int) -> None:
        """Give the optimizer the rate of a step, counted from 1."""
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = base * self.factor(step)

    def flattened(self, value: float) -> bool:
        """Whether a new measurement is one too many without a lower value; never without `patience`."""
        self.waited = 0 if value < self.best else self.waited + 1
        self.best = min(self.best, value)
        return self.patience is not None and self.waited >= self.patience

    def end_early(self, step: int) -> None:
        """Let the rate fall from this step on, unless it falls already."""
        if step < self.decay_from:
            self.decay_from, self.last = step, step + self.n_decay

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"decay_from": self.decay_from, "last": self.last, "best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint.

        Raises:
            ValueError: the steps are not those of a stage of so many steps.
        """
        decay_from, last = integer_of(state["decay_from"], "decay_from"), integer_of(state["last"], "last")
        if not 0 <= decay_from <= last <= self.steps or last - decay_from != self.n_decay:
            raise ValueError(f"the learning rate falls from step {decay_from} to {last} of {self.steps}")
        self.decay_from, self.last = decay_from, last
        self.best, self.waited = float(state["best"]), integer_of(state["waited"], "waited")
