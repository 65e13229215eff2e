"""A prior as a Stable-Baselines3 policy: its conditional distribution is the action distribution (Section 4.1).

In a rollout the policy sees ordinary observations, one step at a time, and the sampling cache makes a step cost one
position. In an update it sees `Episodes`, and one teacher-forced pass gives all log-probabilities. Dropout is off in
both: with it on, the probability ratio of an unchanged policy would not be 1. On CUDA the same holds for TF32, which
cuDNN's convolutions use by default: set ``torch.backends.cudnn.allow_tf32 = False``, as `resolve_device` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor
from torch.distributions import Categorical
from torch.nn.attention import SDPBackend, sdpa_kernel

from ral_gym.agents.episodes import EpisodeRolloutBuffer, Episodes, episode_features, episode_logits
from ral_gym.agents.policy_checks import OF_OTHERS, NoSuchNetwork, check_spaces, refuse_drawing
from ral_gym.agents.prior_weights import PriorWeights, check_for_trpo
from ral_gym.agents.shared_passes import joint_uniforms, shared_pass, shared_step
from ral_gym.agents.step_cache import StepCache, first_not_drawn
from ral_gym.agents.value_head import ValueHead
from ral_gym.errors import ConfigError
from ral_gym.priors.base import Prior
from ral_gym.priors.guidance import Sampling, check_guidance
from ral_gym.priors.sampler import draw
from ral_gym.priors.transfer import indices_on, on_device
from ral_gym.runs.sharing import Processes

__all__ = ["PixelCNNPolicy", "PriorPolicy", "PriorWeights", "ValueHead", "check_for_trpo"]


class PriorPolicy(ActorCriticPolicy):
    """A prior that acts: for `Reinforce`, and unmodified `PPO`, `A2C` and `TRPO` with `EpisodeRolloutBuffer`.

    Args:
        observation_space: ``Box(0, K + 1, (T,), int16)``; for a prior with N classes
            ``Box(0, K + 1 + N, (T + 1,), int16)``.
        action_space: ``Discrete(K)``.
        lr_schedule: learning rate as a function of the remaining progress.
        prior: the network to start from: `PriorWeights`, any `ral_gym.priors.base.Prior` such as a `PixelCNN`, a run
            folder or a file.
        levels: how many codes each level of the environment's images has; None: the prior's.
        train_levels: with two levels, `both`, or the level whose network learns: `top` or `bottom`.
        value_units: width of the value head.
        detach_features: the value head reads detached features, so that its loss stays out of the pretrained trunk.
        use_cache: use the sampling cache in rollouts; False: a full pass per step, for tests.
        guidance: scale s of classifier-free guidance in drawing; 1: none.
        guidance_log_probs: `guided`: the policy is what is drawn from, p_c^s p_u^(1-s) normalised, and updates take
            two passes with gradients through both. `plain`: updates use p_c alone, log-probabilities of the draw
            included, so that the ratio starts at 1; biased, since the codes are not p_c's (Baran et al., 2026).
        processes: those that share its passes, from `Processes.join()`; None: this one alone. Every process must then
            call the same methods with the same arguments, but for `predict`, which is not shared.
        use_sde: must be False; passed by SB3.
        optimizer_class: Adam by default.
        optimizer_kwargs: its arguments, such as ``{"betas": (0.5, 0.999)}``.
        **drawing: must be empty: `temperature`, `top_k` and `top_p` are refused with the reason.

    Raises:
        ConfigError: no prior, one that cannot be guided, its K or T differs from the environment's, or an algorithm
            that trains other networks.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        *,
        prior: PriorWeights | Prior | Path | str | None = None,
        levels: Sequence[int] | None = None,
        train_levels: Literal["both", "top", "bottom"] = "both",
        value_units: int = 64,
        detach_features: bool = True,
        use_cache: bool = True,
        guidance: float = 1.0,
        guidance_log_probs: Literal["guided", "plain"] = "guided",
        processes: Processes | None = None,
        use_sde: bool = False,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        **drawing: Any,
    ) -> None:
        if drawing:
            refuse_drawing(type(self).__name__, drawing)
        if prior is None:
            raise ConfigError(
                f"{type(self).__name__} needs a network to start from: give policy_kwargs={{'prior': ...}}, a prior, "
                "its file or a run folder, as algorithm_defaults(algo, env, prior=...) does"
            )
        self._start = PriorWeights.of(prior)
        self.processes = processes or Processes()
        self.levels, self.train_levels = None if levels is None else tuple(levels), train_levels
        self._value_units, self._detach_features = value_units, detach_features
        self.use_cache = use_cache
        if guidance_log_probs not in ("guided", "plain"):
            raise ConfigError(f"guidance_log_probs {guidance_log_probs!r} is unknown: choose guided or plain")
        self.sampling, self.guidance_log_probs = Sampling(guidance=guidance), guidance_log_probs
        check_spaces(self._start.grid, self.levels, train_levels, observation_space, action_space)
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            normalize_images=False,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )

    def __getattr__(self, name: str) -> Any:
        if name in OF_OTHERS:
            raise NoSuchNetwork(
                f"{OF_OTHERS[name]} trains networks that {type(self).__name__} does not have: choose Reinforce, GRPO, "
                "PPO, A2C or TRPO, or a policy of the algorithm's own"
            )
        return super().__getattr__(name)

    def _build(self, lr_schedule: Schedule) -> None:
        """Called by the base class: networks and optimizer."""
        self.prior = self._start.build()
        self._start = PriorWeights(self._start.config)
        self.value_net = ValueHead(self.prior.hidden_units, self._value_units, self._detach_features)  # type: ignore[assignment]
        self.n_codes = self.prior.grid.n_codes
        if self.train_levels != "both":
            self.prior.frozen = "bottom" if self.train_levels == "top" else "top"  # type: ignore[attr-defined]
        check_guidance(self.prior, self.sampling.guidance)
        self._caches = {name: StepCache(self.prior, self.sampling) for name in ("rollout", "predict")}
        frozen = f"prior.{getattr(self.prior, 'frozen', None)}."
        trained = [weight for name, weight in self.named_parameters() if not name.startswith(frozen)]
        self.optimizer = self.optimizer_class(trained, lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]
        # A fused optimizer does not raise its parameters' versions, by which the caches notice new weights.
        self.optimizer.register_step_post_hook(lambda *_: self._forget())
        self.set_training_mode(False)

    def _forget(self) -> None:
        for cache in self._caches.values():
            cache.forget()

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "prior": self._start,
            "levels": self.levels,
            "train_levels": self.train_levels,
            "value_units": self._value_units,
            "detach_features": self._detach_features,
            "use_cache": self.use_cache,
            "guidance": self.sampling.guidance,
            "guidance_log_probs": self.guidance_log_probs,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
        }

    def set_training_mode(self, mode: bool) -> None:
        """SB3's switch; the prior itself always stays in evaluation mode (dropout off)."""
        super().set_training_mode(mode)
        self.prior.eval()
        if mode:
            self._forget()

    @property
    def cache(self) -> StepCache:
        """The sampling cache for rollouts."""
        return self._caches["rollout"]

    @property
    def plain_log_probs(self) -> bool:
        """Whether log-probabilities are of another distribution than the one drawn from."""
        return self.sampling.guided and self.guidance_log_probs == "plain"

    def episode_logits(
        self, episodes: Episodes, features: Tensor | None = None, network: Prior | None = None
    ) -> Tensor:
        """Logits (N, K) of transitions in an update, guided or plain as `guidance_log_probs` says.

        Args:
            episodes: the transitions.
            features: (N, C) the prior's, if known.
            network: another network, such as the frozen start, in the prior's place.
        """
        scale = 1.0 if self.plain_log_probs else self.sampling.guidance
        return episode_logits(self.prior if network is None else network, episodes, scale, features)

    def mean_entropy(self, buffer: EpisodeRolloutBuffer) -> float:
        """Entropy per code of a round, in nats: mean -log pi, or exact where the draws are not the policy's."""
        if not self.plain_log_probs or not len(buffer.codes):
            return -float(buffer.log_probs.mean())
        with torch.no_grad():
            (found,) = shared_pass(self, buffer.episodes(), self._entropies)
        return found.mean().item()

    def _entropies(self, episodes: Episodes) -> tuple[Tensor]:
        return (self._distribution(self.episode_logits(episodes)).entropy(),)

    def _episodes(self, obs: Tensor | Episodes) -> Episodes:
        """Ordinary observations (B, L) as the transitions that come next; others as they are."""
        if isinstance(obs, Episodes):
            return obs
        codes = obs.long()  # (B, L)
        row = torch.arange(len(codes), device=codes.device)
        return Episodes(codes, row, first_not_drawn(codes, self.prior.codebook_size), self.n_codes)

    def _features(self, obs: Tensor | Episodes) -> tuple[Tensor, Tensor, Tensor]:
        """Features (N, C), position (N,) and stop (N,) of transitions, by one teacher-forced pass."""
        obs = self._episodes(obs)
        return episode_features(self.prior, obs), obs.pos, self._stop(obs.codes)[obs.row]

    def _stop(self, codes: Tensor) -> Tensor:
        """The final number of codes of the images, given ones included: observations (B, L) -> (B,)."""
        return (codes <= self.prior.codebook_size).sum(1)

    def _values(self, features: Tensor, position: Tensor, stop: Tensor) -> Tensor:
        return self.value_net(features, position, stop, self.n_codes)

    def _distribution(self, logits: Tensor) -> CategoricalDistribution:
        distribution = CategoricalDistribution(self.prior.codebook_size)
        # torch's checks of its arguments would make the host wait for a GPU twice.
        distribution.distribution = Categorical(logits=logits, validate_args=False if logits.is_cuda else None)
        return distribution

    def _look(self, obs: Tensor, cache: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features, logits, position and stop of ordinary observations, through a cache if it is enabled."""
        codes = obs.long()
        if not self.use_cache or torch.is_grad_enabled():
            episodes = self._episodes(codes)
            features, position, stop = self._features(episodes)
            return features, episode_logits(self.prior, episodes, self.sampling.guidance, features), position, stop
        features, logits = self._caches[cache].look(codes)
        return features, logits, first_not_drawn(codes, self.prior.codebook_size), self._stop(codes)

    def forward(self, obs: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Act in a rollout.

        Args:
            obs: (E, T) observations.
            deterministic: take the likeliest code.

        Returns:
            actions (E,) int64, values (E, 1), log-probabilities (E,).
        """
        uniforms = torch.rand(len(obs), device=obs.device, dtype=torch.float32)

        def step(own: slice) -> tuple[Tensor, ...]:
            features, logits, position, stop = self._look(obs[own], "rollout")
            actions, log_prob = draw(logits, uniforms[own])
            if deterministic:
                actions = logits.argmax(1)
                log_prob = _log_prob(logits, actions)
            if self.plain_log_probs:
                log_prob = _log_prob(self.prior.logits(features, position), actions)
            if self.use_cache and not torch.is_grad_enabled():
                self.cache.draw(actions)
            return actions, self._values(features, position, stop), log_prob

        actions, values, log_prob = shared_step(self.processes, len(obs), step)
        return actions, values, log_prob

    @torch.no_grad()
    def draw_round(self, obs: Tensor, with_values: bool) -> tuple[Tensor, Tensor, Tensor]:
        """All codes of lockstep episodes at once, as `forward` would draw them step by step from the same random state.

        Args:
            obs: (E, L) observations that share start and stop, but may differ in their labels; best on the host, where
                they are looked at.
            with_values: also compute values (one pass more).

        Returns:
            sequences (E, L) int64 with the tokens K + 1 where nothing is drawn, values (E, L), log-probabilities
            (E, L); both are 0 at given and never drawn positions, and at the label.
        """
        seen, uniforms = obs.cpu().long(), None
        if self.processes.size > 1:
            uniforms = joint_uniforms(seen == self.prior.codebook_size, self.device)

        def round_of(own: slice) -> tuple[Tensor, ...]:
            return self._draw_round(seen[own], with_values, None if uniforms is None else uniforms[own])

        codes, values, log_probs = shared_step(self.processes, len(seen), round_of)
        return codes, values, log_probs

    def _draw_round(self, seen: Tensor, with_values: bool, uniforms: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """As `draw_round`, in this process, of observations (E, L) int64 on the host, with uniforms (E, L) if given."""
        grid = self.prior.grid
        given, length = int(first_not_drawn(seen[:1], self.prior.codebook_size)), int(self._stop(seen[:1]))
        rows = grid.rows_of(length)
        image = on_device(np.flatnonzero(grid.mask(0, rows)), self.device)  # (T',)
        to_draw = seen == self.prior.codebook_size  # (E, L), on the host
        codes = seen.to(self.device, non_blocking=True)
        sampler: Any = self.cache.sampler()
        given_uniforms = None if uniforms is None else uniforms[:, image]
        if grid.levels == 1:  # episodes may begin inside a row
            drawn, drawn_log_probs = sampler.sample(codes=codes, start=given, stop=length, uniforms=given_uniforms)
        else:
            given_rows = given // grid.width
            if not np.array_equal(to_draw[0].numpy(), grid.mask(given_rows, rows)):
                raise ConfigError("draw_round draws whole rows: episodes that begin inside one need fast_path=False")
            drawn, drawn_log_probs = sampler.sample(
                codes=codes, prefix_rows=given_rows, stop_rows=rows, uniforms=given_uniforms
            )
        self.cache.forget()
        grids, log_probs = codes.clone(), torch.zeros(codes.shape, dtype=torch.float32, device=codes.device)
        grids[:, image], log_probs[:, image] = drawn, drawn_log_probs.float()
        values = torch.zeros(codes.shape, dtype=torch.float32, device=codes.device)
        if with_values or self.plain_log_probs:
            row, position = indices_on(self.device, *np.nonzero(to_draw.numpy()))
            episodes = Episodes(grids, row, position, length)
            features, position, stops = self._features(episodes)
            if with_values:
                values[row, position] = self._values(features, position, stops).flatten().float()
            if self.plain_log_probs:
                logits = self.episode_logits(episodes, features)
                log_probs[row, position] = _log_prob(logits, grids[row, position]).float()
        return grids, values, log_probs

    def evaluate_actions(self, obs: Tensor | Episodes, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Values (N, 1), log-probabilities (N,) and entropies (N,) of transitions; one pass for whole episodes."""
        actions = actions.long().flatten()
        if isinstance(obs, Episodes):
            values, log_prob, entropy = shared_pass(self, obs, self._evaluate, actions)
            return values, log_prob, entropy
        return self._evaluate(self._episodes(obs), actions)

    def _evaluate(self, episodes: Episodes, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features, position, stop = self._features(episodes)
        distribution = self._distribution(self.episode_logits(episodes, features))
        return self._values(features, position, stop), distribution.log_prob(actions), distribution.entropy()

    def get_distribution(self, obs: Tensor | Episodes) -> CategoricalDistribution:  # type: ignore[override]
        """The action distribution of observations (B, T) or of episodes' transitions.

        Raises:
            ConfigError: with gradients, which only TRPO needs, if TRPO would skip weights of the prior.
        """
        if isinstance(obs, Episodes):
            return self._distribution(self._shared_logits(obs))
        return self._distribution(self._look(obs, "predict")[1])

    def _shared_logits(self, episodes: Episodes) -> Tensor:
        """Logits (N, K) of transitions; TRPO, which needs their gradients, asks for those of one weight at a time."""
        return shared_pass(self, episodes, lambda own: (self._twice_differentiable_logits(own),), one_by_one=True)[0]

    def _twice_differentiable_logits(self, episodes: Episodes) -> Tensor:
        """Logits (N, K) for TRPO, which differentiates them twice: torch's fused attention can do it only once."""
        if not torch.is_grad_enabled():
            return self.episode_logits(episodes)
        check_for_trpo(self.prior)
        with sdpa_kernel(SDPBackend.MATH):
            return self.episode_logits(episodes)

    def predict_values(self, obs: Tensor | Episodes) -> Tensor:  # type: ignore[override]
        """Values (N, 1) of observations (B, T) or of episodes' transitions."""
        if isinstance(obs, Episodes):
            return shared_pass(self, obs, lambda own: (self._values(*self._features(own)),))[0]

        def step(own: slice) -> tuple[Tensor]:
            features, _, position, stop = self._look(obs[own], "rollout")
            return (self._values(features, position, stop),)

        return shared_step(self.processes, len(obs), step)[0]

    def _predict(self, observation: Tensor, deterministic: bool = False) -> Tensor:  # type: ignore[override]
        """Actions for `predict`, through a separate cache so that evaluation does not disturb a rollout."""
        distribution = self.get_distribution(observation)
        if deterministic:
            actions = distribution.mode()
        else:
            logits = distribution.distribution.logits
            actions = draw(logits, torch.rand(len(logits), device=logits.device, dtype=torch.float32))[0]
        if self.use_cache and not torch.is_grad_enabled():
            self._caches["predict"].draw(actions)
        return actions


def _log_prob(logits: Tensor, actions: Tensor) -> Tensor:
    """Logits (N, K), codes (N,) -> log-probabilities (N,)."""
    return logits.log_softmax(1).gather(1, actions[:, None]).squeeze(1)


PixelCNNPolicy = PriorPolicy
"""Its old name, from when a PixelCNN was the only prior; saved models contain it."""
