"""Action masks: the policy and the buffer with which an unmodified MaskablePPO (sb3-contrib) trains a prior.

The environment determines the legal codes (`action_masks`; all of them by default). The policy gives other codes
probability zero and renormalises, when drawing and when learning.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from sb3_contrib.common.maskable.buffers import MaskableRolloutBuffer, MaskableRolloutBufferSamples
from sb3_contrib.common.maskable.distributions import MaskableCategorical, MaskableCategoricalDistribution
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor

from ral_gym.agents.episodes import EpisodeRolloutBuffer, Episodes, twice
from ral_gym.agents.policy import PriorPolicy
from ral_gym.agents.shared_passes import shared_pass, shared_step
from ral_gym.priors.sampler import draw
from ral_gym.runs.checked_state import array_of

Masks = np.ndarray | Tensor | None
FORBIDDEN = -1e8
"""The logit of an illegal code, sb3-contrib's."""


def _checked(action_masks: np.ndarray | Tensor, logits: Tensor) -> Tensor:
    """Masks (N, K) or (K,) on the device of the logits (N, K), looked at where they are.

    Raises:
        ValueError: a row forbids every code.
    """
    masks = torch.as_tensor(action_masks, dtype=torch.bool).reshape(-1, logits.shape[1])
    if not bool(masks.any(1).all()):
        raise ValueError("action_masks forbid every code: leave at least one legal")
    return masks.to(logits.device, non_blocking=True)


class MaskablePriorPolicy(PriorPolicy):
    """A `PriorPolicy` whose methods take `action_masks`, (N, K) or (K,) bool, True: legal; None: all are.

    `MaskablePPO` requires a `MaskableActorCriticPolicy`; this class is registered as a virtual subclass, since it has
    the same interface, but it inherits none of its networks.
    """

    def _masked(self, logits: Tensor, action_masks: Masks) -> MaskableCategoricalDistribution:
        distribution = MaskableCategoricalDistribution(self.prior.codebook_size)
        checks = False if logits.is_cuda else None  # a GPU would be waited for
        distribution.distribution = MaskableCategorical(logits=logits, validate_args=checks)
        if action_masks is not None:
            distribution.apply_masking(_checked(action_masks, logits).expand(logits.shape))
        return distribution

    def _masked_logits(self, logits: Tensor, action_masks: Masks) -> Tensor:
        """The logits of `_masked`, number for number, but without a distribution's checks, for which a GPU waits."""
        logits = logits - logits.logsumexp(1, keepdim=True)
        if action_masks is not None:
            logits = logits.masked_fill(~_checked(action_masks, logits), FORBIDDEN)
        return logits - logits.logsumexp(1, keepdim=True)

    def forward(
        self, obs: Tensor, deterministic: bool = False, action_masks: Masks = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Act in a rollout, like `PriorPolicy.forward`, with legal codes only."""
        uniforms = torch.rand(len(obs), device=obs.device, dtype=torch.float32)
        masks = self._rows_of(action_masks)

        def step(own: slice) -> tuple[Tensor, ...]:
            features, logits, position, stop = self._look(obs[own], "rollout")
            legal = masks[own] if masks is not None and len(masks) == len(obs) else masks
            masked = self._masked_logits(logits, legal)
            actions = masked.argmax(1) if deterministic else draw(masked, uniforms[own])[0]
            if self.use_cache and not torch.is_grad_enabled():
                self.cache.draw(actions)
            if self.plain_log_probs:
                masked = self._masked_logits(self.prior.logits(features, position), legal)
            return actions, self._values(features, position, stop), masked.gather(1, actions[:, None])[:, 0]

        actions, values, log_prob = shared_step(self.processes, len(obs), step)
        return actions, values, log_prob

    def _rows_of(self, action_masks: Masks) -> Masks:
        """Masks with a row of their own, or one row for all."""
        return None if action_masks is None else action_masks.reshape(-1, self.prior.codebook_size)

    def _choose(self, logits: Tensor, deterministic: bool) -> Tensor:
        if deterministic:
            return logits.argmax(1)
        return draw(logits, torch.rand(len(logits), device=logits.device, dtype=torch.float32))[0]

    def evaluate_actions(  # type: ignore[override]
        self, obs: Tensor | Episodes, actions: Tensor, action_masks: Masks = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Values (N, 1), log-probabilities (N,) and entropies (N,) among the legal codes."""
        actions, masks = actions.long().flatten(), self._rows_of(action_masks)
        if isinstance(obs, Episodes):
            values, log_prob, entropy = shared_pass(self, obs, self._evaluate_masked, actions, masks)  # type: ignore[arg-type]
            return values, log_prob, entropy
        return self._evaluate_masked(self._episodes(obs), actions, masks)

    def _evaluate_masked(self, episodes: Episodes, actions: Tensor, masks: Masks) -> tuple[Tensor, Tensor, Tensor]:
        features, position, stop = self._features(episodes)
        distribution = self._masked(self.episode_logits(episodes, features), masks)
        return self._values(features, position, stop), distribution.log_prob(actions), distribution.entropy()

    def get_distribution(  # type: ignore[override]
        self, obs: Tensor | Episodes, action_masks: Masks = None
    ) -> MaskableCategoricalDistribution:
        """The distribution over legal codes, of observations (B, T) or of episodes' transitions."""
        if isinstance(obs, Episodes):
            return self._masked(self._shared_logits(obs), action_masks)
        return self._masked(self._look(obs, "predict")[1], action_masks)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: Masks = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Actions for observations, legal ones only; SB3's arguments."""
        self._predict_masks = action_masks
        try:
            return super().predict(observation, state, episode_start, deterministic)
        finally:
            self._predict_masks = None

    _predict_masks: Masks = None

    def _predict(self, observation: Tensor, deterministic: bool = False) -> Tensor:  # type: ignore[override]
        distribution = self.get_distribution(observation, self._predict_masks)
        actions = self._choose(distribution.distribution.logits, deterministic)
        if self.use_cache and not torch.is_grad_enabled():
            self._caches["predict"].draw(actions)
        return actions


# MaskableActorCriticPolicy and ActorCriticPolicy are siblings whose constructors cannot be chained.
MaskableActorCriticPolicy.register(MaskablePriorPolicy)
assert issubclass(MaskablePriorPolicy, (MaskableActorCriticPolicy, ActorCriticPolicy))
MaskablePixelCNNPolicy = MaskablePriorPolicy
"""Its old name, from when a PixelCNN was the only prior; saved models contain it."""


class MaskableEpisodeRolloutBuffer(EpisodeRolloutBuffer, MaskableRolloutBuffer):
    """`EpisodeRolloutBuffer` with action masks: one number per transition and each distinct mask once.

    sb3-contrib's buffer keeps (n_steps, E, K) floats. Here K bits per *distinct* mask are kept, and samples carry no
    masks at all while every code has been legal.
    """

    _columns = (*EpisodeRolloutBuffer._columns, "_mask_ids")
    _mask_ids: np.ndarray
    _mask_rows: list[np.ndarray]

    def reset(self) -> None:
        """Begin a rollout; only the masks of unfinished episodes are kept."""
        n_actions = int(self.action_space.n)  # type: ignore[attr-defined]
        every_code = np.packbits(np.ones(n_actions, bool))  # number 0
        old = getattr(self, "_mask_rows", [every_code])
        self._mask_rows, self._mask_numbers = [every_code], {every_code.tobytes(): 0}
        EpisodeRolloutBuffer.reset(self)
        used, inverse = np.unique(self._mask_ids, return_inverse=True)
        numbers = np.array([self._number_of(old[number]) for number in used], np.int32)
        self._mask_ids = numbers[inverse].reshape(self._mask_ids.shape)

    def _allocate(self) -> None:
        super()._allocate()
        self._mask_ids = np.zeros((self._capacity, self.n_envs), np.int32)

    def add(self, *args: Any, action_masks: np.ndarray | None = None, **kwargs: Any) -> None:
        """One step of all environments.

        Args:
            *args: SB3's.
            action_masks: (E, K) or (K,) bool; None: all legal.
            **kwargs: SB3's.
        """
        numbers: int | np.ndarray = 0
        if action_masks is not None:
            masks = np.asarray(action_masks, bool).reshape(-1, int(self.action_space.n))  # type: ignore[attr-defined]
            numbers = self._number(np.packbits(masks, axis=1))
        EpisodeRolloutBuffer.add(self, *args, **kwargs)
        self._mask_ids[self._fill - 1, np.arange(self.n_envs)] = numbers

    def _number(self, masks: np.ndarray) -> int | np.ndarray:
        """The numbers of packed masks (E, K / 8) uint8; new masks are stored."""
        if (masks == masks[0]).all():
            return self._number_of(masks[0])
        return np.array([self._number_of(mask) for mask in masks], np.int32)

    def _number_of(self, mask: np.ndarray) -> int:
        key = mask.tobytes()
        if key not in self._mask_numbers:
            self._mask_numbers[key] = len(self._mask_rows)
            self._mask_rows.append(mask.copy())
        return self._mask_numbers[key]

    def get(  # type: ignore[override]
        self, batch_size: int | None = None
    ) -> Generator[MaskableRolloutBufferSamples, None, None]:
        """Like `EpisodeRolloutBuffer.get`; `action_masks` is (N, K) bool, or None if everything is legal.

        A minibatch of one transition, which an episode of one code can be, is given as two that are alike:
        `MaskablePPO` divides by the standard deviation of its advantages.
        """
        for samples in EpisodeRolloutBuffer.get(self, batch_size):
            yield twice(samples) if len(samples.actions) == 1 else samples  # type: ignore[misc]

    def _samples(self, episodes: Episodes, flat: np.ndarray) -> MaskableRolloutBufferSamples:  # type: ignore[override]
        slots, envs = self._slots()
        numbers = self._mask_ids[slots[flat], envs[flat]]  # (N,)
        masks: Tensor | None = None
        if numbers.any():
            packed, n_actions = np.stack(self._mask_rows)[numbers], int(self.action_space.n)  # type: ignore[attr-defined]
            masks = self.to_torch(np.unpackbits(packed, axis=1, count=n_actions).astype(bool))
        samples = EpisodeRolloutBuffer._samples(self, episodes, flat)
        return MaskableRolloutBufferSamples(*samples[:6], action_masks=masks)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """The unfinished episodes at the beginning of a rollout, for a checkpoint, with their masks."""
        return {**EpisodeRolloutBuffer.state_dict(self), "masks": np.stack(self._mask_rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`; the next `reset` keeps it."""
        EpisodeRolloutBuffer.load_state_dict(self, state)
        masks = array_of(state["masks"], "masks", (None, *self._mask_rows[0].shape), np.uint8, 0, 255)
        if int(self._mask_ids.max(initial=0)) >= len(masks):
            raise ValueError("the buffer has no mask for some of its steps")
        self._mask_rows = list(masks)
        self._mask_numbers = {mask.tobytes(): number for number, mask in enumerate(self._mask_rows)}
