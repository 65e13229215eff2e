"""Scheduled sampling: stage 2 on prefixes in which some codes are the model's own (Bengio et al., 2015).

In maximum likelihood the model reads real prefixes only; in sampling it reads its own. Here every code that the network
*reads* is its own with a probability that rises during training, while the codes it must *predict* stay the real ones.
Two ways to make the prefixes, both with the network in evaluation mode and without gradients:

* `two_pass` (Mihaylova and Martins, 2019): a pass over the real codes, from which a code is drawn at every position at
  once, given the *real* codes before it; then a random mask decides which codes are replaced. One more forward pass.
* `sequential` (as Bengio et al. wrote it): code by code through the cached sampler, each drawn given the *mixed* codes
  before it, and kept or replaced by the real one according to the mask. As slow as drawing the batch.

A bottom prior's condition, the top codes, stays real. Where share s is reached after N steps, the share of own codes
at step i, x = i / N, is (with Bengio et al.'s epsilon for the share of real ones):

* `linear`: s x, or epsilon = 1 - s x;
* `exponential`: s (1 - 0.01**x) / 0.99, their epsilon = k**i with k = 0.01**(1 / N): early, then levelling off;
* `inverse_sigmoid`: s (g(x) - g(0)) / (g(1) - g(0)), g(x) = 1 / (1 + exp(5 - 10 x)): their epsilon
  = k / (k + exp(i / k)) falls along the same curve; here its middle is N / 2, and N sets its slope: late, then fast.

The last two are shifted and scaled to run from 0 to s exactly, whatever N.

Its known flaw (Huszar, 2015): a mixed prefix does not lead to the real code that follows. As the share nears 1, the
best the model can do is to forget the prefix and learn how often each code occurs at its position: the objective is
inconsistent, its optimum is not the data's distribution, even with all the data and capacity there are. Early in
training, and with a small share, it is a regulariser; judge it by held-out likelihood and against an oracle.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args, get_type_hints

import torch
from torch import Tensor, nn

from ral_gym.config import PriorConfig
from ral_gym.errors import ConfigError
from ral_gym.priors.base import Prior, logits_of, maximum_likelihood_loss
from ral_gym.priors.drawing import draw
from ral_gym.priors.sampler import CachedSampler
from ral_gym.stages.levels import LevelCodes

LEAST_REAL = 0.01
"""The share of real codes that `exponential` reaches at the last step, before scaling."""
STEEPNESS = 10.0
"""Slope of `inverse_sigmoid` over the whole training."""


def _logistic(progress: float) -> float:
    return 1 / (1 + math.exp(STEEPNESS * (0.5 - progress)))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: progress,
    "exponential": lambda progress: (1 - LEAST_REAL**progress) / (1 - LEAST_REAL),
    "inverse_sigmoid": lambda progress: (_logistic(progress) - _logistic(0)) / (_logistic(1) - _logistic(0)),
}
"""Maps training progress in 0..1 to a fraction, 0 to 1, of the final share."""


class ScheduledSampling:
    """The loss of stage 2 when prefixes are mixed; with `none`, or at a share of 0, that of maximum likelihood.

    Masks and own codes are drawn from the global generator of the network's device, as dropout is: a checkpoint holds
    its state, and every process has its own. At a share of 0 nothing is drawn.

    Args:
        prior: the network (not wrapped for several processes).
        config: its settings.
        steps: N, the step at which the final share is reached.
        section: name of the settings' section, for messages.

    Raises:
        ConfigError: an unknown method or schedule.
    """

    def __init__(self, prior: Prior, config: PriorConfig, steps: int, section: str = "prior") -> None:
        allowed = get_type_hints(PriorConfig)
        for name in ("scheduled_sampling", "scheduled_sampling_schedule"):
            value, choice = getattr(config, name), get_args(allowed[name])
            if value not in choice:
                raise ConfigError(f"{section}.{name} is {value!r}: choose one of {', '.join(choice)}")
        self.prior, self.steps = prior, steps
        self.way, self.largest = config.scheduled_sampling, config.scheduled_sampling_share
        self.schedule = SCHEDULES[config.scheduled_sampling_schedule]
        self.sampler = CachedSampler(prior) if self.way == "sequential" else None

    @property
    def active(self) -> bool:
        """Whether anything is ever mixed."""
        return self.way != "none"

    def share(self, step: int) -> float:
        """The share of own codes at step 1..N."""
        return self.largest * self.schedule(step / self.steps) if self.active else 0.0

    def metrics(self, step: int) -> dict[str, float]:
        """The share of own codes for the log, `own_codes`; empty if none are ever mixed in."""
        return {"own_codes": self.share(step)} if self.active else {}

    def loss(self, model: nn.Module, batch: LevelCodes, step: int) -> Tensor:
        """Mean negative log-likelihood of the real codes given mixed ones, in nats per code.

        Args:
            model: the network to call, perhaps wrapped for several processes.
            batch: codes (B, T) int64, and their condition if any, on the network's device.
            step: of training, 1..N.
        """
        share = self.share(step)
        if share == 0:
            return maximum_likelihood_loss(model, batch.codes, batch.condition)
        if self.sampler is None:
            mixed = mix_two_pass(self.prior, batch, share)
        else:
            self.sampler.refresh()
            mixed = mix_sequential(self.sampler, batch, share)
        return maximum_likelihood_loss(model, batch.codes, batch.condition, given=mixed)


@torch.no_grad()
def mix_two_pass(prior: Prior, batch: LevelCodes, share: float) -> Tensor:
    """Replace codes by ones drawn given the real codes before them.

    Args:
        prior: the network.
        batch: codes (B, T) int64, and their condition if any.
        share: probability that a code is replaced.

    Returns:
        (B, T) int64.
    """
    training = prior.training
    prior.eval()
    logits = logits_of(prior, batch.codes, batch.condition)  # (B, T, K)
    prior.train(training)
    own, _ = draw(logits.flatten(0, 1), torch.rand(batch.codes.numel(), device=logits.device))  # (B T,)
    coins = torch.rand(batch.codes.shape, device=logits.device) < share  # (B, T)
    return torch.where(coins, own.view_as(batch.codes), batch.codes)


@torch.no_grad()
def mix_sequential(sampler: CachedSampler, batch: LevelCodes, share: float) -> Tensor:
    """Replace codes by ones drawn given the mixed codes before them, in one pass of the sampler.

    Args:
        sampler: of the network, with its current weights.
        batch: codes (B, T) int64, and their condition if any.
        share: probability that a code is replaced.

    Returns:
        (B, T) int64.
    """
    real, device = batch.codes, batch.codes.device
    uniforms = torch.rand(real.shape, device=device)  # (B, T)
    coins = torch.rand(real.shape, device=device) < share  # (B, T)
    mixed = torch.empty_like(real)
    sampler.begin(real, 0, batch.condition)
    for position in range(real.shape[1]):
        own, _ = draw(sampler.logits(), uniforms[:, position])  # (B,)
        mixed[:, position] = torch.where(coins[:, position], own, real[:, position])
        sampler.advance(mixed[:, position])
    return mixed
