"""Regularisers for algorithms whose loss cannot be changed: callbacks around an unmodified PPO, A2C or TRPO.

* `PriorKLReward`: KL to the prior, as a reward of every code (Ziegler et al., 2019).
* `EntropyReward`: the entropy of whole images, as a reward of every code.
* `EntropyTarget`: an entropy bonus whose coefficient adapts to a target entropy.
* `MLEShare`: maximum-likelihood steps on real codes, between the algorithm's own steps.

`Reinforce` and `GRPO` have these in their loss: `kl_coef`, `ent_coef`, `mle_coef`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sb3_contrib import TRPO
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from ral_gym.agents.episodes import EpisodeRolloutBuffer, Episodes
from ral_gym.agents.policy import PriorPolicy, PriorWeights
from ral_gym.agents.real_codes import real_codes_loss
from ral_gym.agents.shared_passes import shared_pass
from ral_gym.agents.vec_env import real_codes
from ral_gym.errors import ConfigError
from ral_gym.priors.base import Prior
from ral_gym.runs.checked_state import number_of
from ral_gym.stages.common import restore_optimizer


class AdaptiveEntropy:
    """An entropy coefficient that rises exponentially while the entropy is below its target, and falls above it.

    The rule of "Policy-based Tuning of Autoregressive Image Models with Instance- and Distribution-Level Rewards"
    (Baran et al., 2026): coef * exp(gain * error) outside a dead band, inside fixed bounds. Entropies are divided by
    ln K.

    Args:
        codebook_size: K.
        coef: the coefficient on target.
        target: fraction of ln K in 0..1, or `start`: the first measured entropy, that of the pretrained prior.
        schedule: also scale by the training's progress: a linear rise over the first 5 %, a cosine fall to 0 over the
            last 15 %. Needs the true number of steps in `learn`.
        dead_band: errors up to this leave the coefficient unchanged.
        gain: strength of the reaction.
        bounds: lowest and highest coefficient.

    Raises:
        ConfigError: a target outside 0..1, or a coefficient that is not above 0.
    """

    def __init__(
        self,
        codebook_size: int,
        coef: float = 2.2e-3,
        target: float | Literal["start"] = "start",
        *,
        schedule: bool = False,
        dead_band: float = 0.015,
        gain: float = 3.0,
        bounds: tuple[float, float] = (7e-5, 4e-3),
    ) -> None:
        if target != "start" and not 0 <= target <= 1:
            raise ConfigError(f"entropy target {target!r} is not a fraction of ln K: choose 0..1, or 'start'")
        if not coef > 0:
            raise ConfigError(f"entropy coefficient {coef} cannot be adapted: give one above 0, such as 2.2e-3")
        self.codebook_size, self.coef, self.schedule = codebook_size, coef, schedule
        self.target: float | None = None if target == "start" else float(target)
        self.dead_band, self.gain, self.bounds = dead_band, gain, bounds

    def __call__(self, entropy: float, progress: float = 0.5) -> float:
        """The coefficient for a measured entropy.

        Args:
            entropy: mean entropy of a code, in nats.
            progress: fraction of the training that is done, 0..1.
        """
        share = entropy / math.log(self.codebook_size)
        if self.target is None:
            self.target = share
        coef = self.coef * (self._shape(progress) if self.schedule else 1.0)
        error = self.target - share
        if abs(error) > self.dead_band:
            coef *= math.exp(self.gain * error)
        return min(max(coef, self.bounds[0]), self.bounds[1])

    @staticmethod
    def _shape(progress: float) -> float:
        if progress < 0.05:
            return progress / 0.05
        return 1.0 if progress < 0.85 else 0.5 * (1 + math.cos(math.pi * (progress - 0.85) / 0.15))


def _checked_parts(callback: BaseCallback, buffer: bool = True) -> None:
    """Raise `ConfigError` unless the model trains a prior (and an episode buffer)."""
    name, model = type(callback).__name__, callback.model
    if not isinstance(model.policy, PriorPolicy):
        raise ConfigError(f"{name} needs log-probabilities of a PriorPolicy, not {type(model.policy).__name__}")
    found = getattr(model, "rollout_buffer", None)
    if buffer and not isinstance(found, EpisodeRolloutBuffer):
        raise ConfigError(
            f"{name} reads an EpisodeRolloutBuffer, not {type(found).__name__}: pass "
            "rollout_buffer_class=EpisodeRolloutBuffer to the algorithm"
        )


class PriorKLReward(BaseCallback):
    """Subtracts ``coef * (log pi(code) - log prior(code))`` from the reward of every code.

    The expected penalty is KL(policy || prior); unlike a loss it also penalises early codes for the divergence of later
    ones. In a callback list it comes after the critic's callback, which writes the rewards that it adds to.
    `rollout/ep_rew_mean` shows the reward without it. Logs `rollout/kl_to_prior`, per code.

    Args:
        coef: weight, per nat.
        prior: the frozen prior; None: the policy as it is when training starts.

    Raises:
        ConfigError: at the start of training, with another kind of policy or buffer.
    """

    def __init__(self, coef: float, prior: PriorWeights | Prior | Path | str | None = None) -> None:
        super().__init__()
        self.coef = coef
        self._prior = None if prior is None else PriorWeights.of(prior)
        self.reference: Prior | None = None

    def _init_callback(self) -> None:
        _checked_parts(self)
        if self.reference is None:
            policy: PriorPolicy = self.model.policy  # type: ignore[assignment]
            self.reference = (self._prior or PriorWeights.of(policy.prior)).build()
            self.reference.to(self.model.device).eval().requires_grad_(False)

    def _on_step(self) -> bool:
        return True

    @torch.no_grad()
    def _on_rollout_end(self) -> None:
        buffer: EpisodeRolloutBuffer = self.model.rollout_buffer  # type: ignore[attr-defined]
        assert self.reference is not None
        if not len(buffer.codes):  # a rollout after a stop, in which no episode ended
            return
        episodes = buffer.episodes()
        policy: PriorPolicy = self.model.policy  # type: ignore[assignment]
        (reference,) = shared_pass(policy, episodes, self._log_prob)
        divergence = buffer.log_probs - reference.cpu().numpy()
        _penalise(buffer, self.coef * divergence)
        self.logger.record("rollout/kl_to_prior", float(divergence.mean()))

    def _log_prob(self, episodes: Episodes) -> tuple[Tensor]:
        """Log-probabilities (N,) of the drawn codes under the prior."""
        policy: PriorPolicy = self.model.policy  # type: ignore[assignment]
        log_probs = policy.episode_logits(episodes, network=self.reference).log_softmax(1)  # (N, K)
        actions = episodes.codes[episodes.row, episodes.pos]
        return (log_probs.gather(1, actions[:, None]).squeeze(1),)


def _penalise(buffer: EpisodeRolloutBuffer, penalties: np.ndarray) -> None:
    """Subtract penalties (N,) from the reward of every transition."""
    if not len(buffer.mask):  # a rollout after a stop, in which no episode ended
        return
    rewards = np.zeros(buffer.mask.shape, np.float32)  # (n, L)
    rewards[buffer.mask] = -penalties
    buffer.add_rewards(rewards)
    buffer.compute_returns_and_advantage()


class EntropyReward(BaseCallback):
    """Subtracts ``coef * log pi(code)`` from the reward of every code: the entropy of whole images, as a reward.

    On `ral_gym/Oracle-v0`, whose reward is log o(code), with `coef` 1, gamma 1 and no normalised advantages the return
    is log o - log pi: its expectation is -KL(policy || oracle), largest for the oracle itself. `ent_coef` is different:
    a bonus for the entropy at the visited states, which ignores how a code changes later states. `rollout/ep_rew_mean`
    shows the reward without it. Logs `rollout/entropy`, per code.

    Args:
        coef: weight, per nat.

    Raises:
        ConfigError: at the start of training, with another kind of policy or buffer.
    """

    def __init__(self, coef: float = 1.0) -> None:
        super().__init__()
        self.coef = coef

    def _init_callback(self) -> None:
        _checked_parts(self)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer: EpisodeRolloutBuffer = self.model.rollout_buffer  # type: ignore[attr-defined]
        policy: PriorPolicy = self.model.policy  # type: ignore[assignment]
        self.logger.record("rollout/entropy", policy.mean_entropy(buffer))
        _penalise(buffer, self.coef * buffer.log_probs)


class EntropyTarget(BaseCallback):
    """Adapts ``model.ent_coef`` by `AdaptiveEntropy` after every rollout.

    The entropy is the mean of -log pi over the rollout's codes, an unbiased estimate at no cost; with guidance and
    plain log-probabilities it is computed by a pass, since the codes are not drawn from the policy. Logs
    `train/ent_coef` and `rollout/entropy`.

    Args:
        coef: see `AdaptiveEntropy`.
        target: see `AdaptiveEntropy`.
        progress: returns the fraction of the training that is done, 0..1; None: SB3's, which is right if `learn` gets
            the true number of steps.
        **kwargs: other arguments of `AdaptiveEntropy`.

    Raises:
        ConfigError: at the start of training, with an algorithm that has no entropy bonus, such as TRPO.
    """

    def __init__(
        self,
        coef: float = 2.2e-3,
        target: float | Literal["start"] = "start",
        *,
        progress: Callable[[], float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.progress = progress
        AdaptiveEntropy(2, coef, target, **kwargs)  # raises early for wrong arguments
        self._arguments = {"coef": coef, "target": target, **kwargs}
        self.rule: AdaptiveEntropy | None = None

    def _init_callback(self) -> None:
        if isinstance(self.model, TRPO) or not hasattr(self.model, "ent_coef"):
            raise ConfigError(
                f"EntropyTarget sets ent_coef, but {type(self.model).__name__} has no entropy bonus in its loss: use "
                "PriorKLReward, or another algorithm"
            )
        _checked_parts(self)
        if self.rule is None:
            self.rule = AdaptiveEntropy(int(self.model.action_space.n), **self._arguments)  # type: ignore[attr-defined]

    def _on_step(self) -> bool:
        return True

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"target": None if self.rule is None else self.rule.target}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint, after the callback has been given its model."""
        assert self.rule is not None
        self.rule.target = None if state["target"] is None else number_of(state["target"], "the entropy target")

    def _on_rollout_end(self) -> None:
        assert self.rule is not None
        policy: PriorPolicy = self.model.policy  # type: ignore[assignment]
        entropy = policy.mean_entropy(self.model.rollout_buffer)  # type: ignore[attr-defined]
        progress = 1 - self.model._current_progress_remaining if self.progress is None else self.progress()
        coef = self.rule(entropy, progress)
        self.model.ent_coef = coef  # type: ignore[attr-defined]
        self.logger.record("train/ent_coef", coef)
        self.logger.record("rollout/entropy", entropy)


class MLEShare(BaseCallback):
    """One optimizer step of maximum likelihood on real codes before every rollout but the first.

    Adam's steps do not depend on the scale of a loss, so `coef` scales the step: the learning rate is `coef` times the
    algorithm's. The callback has its own optimizer; its steps are outside TRPO's trust region. Logs `train/mle_loss`,
    nats per code.

    Args:
        coef: fraction of the algorithm's learning rate.
        n_images: real images per step; None: as many as environments.
        dropout: with the prior's dropout.

    Raises:
        ConfigError: at the start of training, without real codes or a prior.
    """

    def __init__(self, coef: float = 0.1, n_images: int | None = None, dropout: bool = False) -> None:
        super().__init__()
        self.coef, self.n_images, self.dropout = coef, n_images, dropout
        self.optimizer: torch.optim.Optimizer | None = None
        self._started = False

    def _init_callback(self) -> None:
        _checked_parts(self, buffer=False)
        codes = real_codes(self.training_env)
        if codes is None:
            raise ConfigError("MLEShare needs real codes, but the environment has none: use a run's environment")
        self._codes = codes
        if self.optimizer is None:
            policy: PriorPolicy = self.model.policy  # type: ignore[assignment]
            betas = policy.optimizer.defaults.get("betas", (0.9, 0.999))
            self.optimizer = torch.optim.Adam(policy.prior.parameters(), betas=betas)

    def _on_step(self) -> bool:
        return True

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, at the start of a rollout and after this callback's step there."""
        return {} if self.optimizer is None else {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint, after the callback has been given its model; the next rollout starts without a step."""
        assert self.optimizer is not None
        restore_optimizer(self.optimizer, state["optimizer"])
        self._started = False

    def _on_rollout_start(self) -> None:
        if not self._started:
            self._started = True
            return
        assert self.optimizer is not None
        policy: PriorPolicy = self.model.policy  # type: ignore[assignment]
        rate = self.coef * self.model.lr_schedule(self.model._current_progress_remaining)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        n_images, processes = self.n_images or self.training_env.num_envs, policy.processes
        loss = real_codes_loss(policy, self._codes, n_images, self.dropout)
        self.optimizer.zero_grad()
        loss.backward()
        processes.sum_gradients(policy.prior.parameters())
        self.optimizer.step()
        self.logger.record("train/mle_loss", processes.sum_numbers({"loss": loss.item()})["loss"])
