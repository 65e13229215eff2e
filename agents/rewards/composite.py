"""Several named rewards in one: what the critic says, what the set of images lacks, and anything about an image.

    model.learn(100_000, callback=CompositeReward({"loo_fd": 1.0}))
    model.learn(100_000, callback=CompositeReward({"critic": 1.0, "kid": 0.5, "warm": 0.1}, critic=critic,
                                                  functions={"warm": redness}))

Like `CriticCallback`, which it holds where there is a critic, it writes into an on-policy rollout at its end. Every
term is brought to its own scale before it is weighed, as in Baran et al. (2026, arXiv 2603.23086), who normalise
instance-level and distribution-level rewards separately. What differs: by the whole batch, since dividing by the
spread of smaller groups is no gradient of any one objective. The distribution rewards and their source are in
`ral_gym.rewards.distribution`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor, nn

from ral_gym.agents.episodes import EpisodeRolloutBuffer
from ral_gym.agents.rewards.co_trained_critic import CoTrainedCritic, FakePool
from ral_gym.agents.rewards.critic_callback import CriticCallback
from ral_gym.agents.vec_env import CodeVecEnv, unwrap_code_env
from ral_gym.envs.worlds import World
from ral_gym.errors import ConfigError, DivergedError
from ral_gym.metrics import EncoderFeatures, Extractor, extract
from ral_gym.rewards.distribution import (
    DISTRIBUTION_TERMS,
    MINIMUM_BATCH,
    DistributionReward,
    make_distribution_reward,
)

logger = logging.getLogger("ral_gym")

TermNormalization = Literal["standard", "centre", "none"]
TERM_NORMALIZATIONS = ("standard", "centre", "none")
ImageReward = Callable[[Tensor], Tensor | np.ndarray]
"""Images uint8 (B, C, h, S) -> the reward of each, (B,)."""


class CompositeReward(BaseCallback):
    """Write a weighted sum of named rewards into every rollout.

    Terms: `critic`, the co-trained critic's, single or intermediate, trained and logged as by `CriticCallback`;
    `loo_fd`, `loo_fd_first_order`, `loo_fd_diagonal` and `kid`, see `ral_gym.rewards.distribution`, on features of the
    decoded images against those of decoded real codes; and those of `functions`. All but an intermediate critic's are
    paid with an image's last code. Episodes that stop early are compared with each other and with real images of as
    many rows only; fewer than 3 of them in a rollout earn nothing from distribution terms.

    Logs `reward/NAME_mean` and `reward/NAME_std` of every term before normalisation, `reward/NAME_distance` of
    distribution terms, and `reward/std` of the sum; `rollout/ep_rew_mean` shows the sum.

    Args:
        weights: term -> weight.
        critic: for the term `critic`.
        functions: name -> reward of images.
        extractor: features for the distribution terms; None: the run's VQ-VAE encoder, averaged over space. It should
            not be the evaluation's, or the policy learns to please the yardstick.
        evaluation_extractor: name of the evaluation's extractor, only to warn of that.
        ema: b of the Frechet terms' moments, see `FrechetReward`: an average over about 1 / (1 - b) rollouts. More is
            less noise, but the average lags behind a policy that moves, which is then pushed past its goal.
        components: see `FrechetReward`.
        n_reference: real images for the reference, drawn once; fewer where there are fewer.
        normalization: for all terms or by name. `standard`: subtract the batch's mean, divide by its standard
            deviation; `centre`: subtract the mean only, so that ``{"loo_fd": 1.0}`` keeps the scale of FD's gradient;
            `none`. Means are over images of the same number of rows. An intermediate critic is only divided: a
            constant per code would reward or punish length.
        seed: draws the reference.
        verbose: SB3's.

    Raises:
        ConfigError: an unknown term or normalisation, a term without what it needs; at the start of training, a model
            without an `EpisodeRolloutBuffer`, another environment, or no features to be had.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        critic: CoTrainedCritic | None = None,
        functions: Mapping[str, ImageReward] | None = None,
        extractor: Extractor | None = None,
        evaluation_extractor: str = "lite0",
        ema: float = 0.5,
        components: int | None = None,
        n_reference: int = 2000,
        normalization: TermNormalization | Mapping[str, TermNormalization] = "standard",
        seed: int = 0,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        self.functions = dict(functions or {})
        self.weights = _checked_weights(weights, self.functions, critic is not None)
        self.normalization = _checked_normalization(normalization, list(self.weights))
        self.critic = CriticCallback(critic) if critic is not None else None
        self.extractor, self.evaluation_extractor = extractor, evaluation_extractor
        self.ema, self.components, self.n_reference, self.seed = ema, components, n_reference, seed
        self._warned = False
        self._terms: dict[str, DistributionReward] = {}
        self._restored: dict[str, dict[str, Any]] = {}
        self._references: dict[int, Tensor] = {}
        self._episodes: list[list[dict[str, Any]]] = []

    @property
    def _distribution_terms(self) -> list[str]:
        return [name for name in self.weights if name in DISTRIBUTION_TERMS]

    def _init_callback(self) -> None:
        buffer = getattr(self.model, "rollout_buffer", None)
        if not isinstance(buffer, EpisodeRolloutBuffer):
            raise ConfigError(
                f"CompositeReward writes rewards into an EpisodeRolloutBuffer, not {type(buffer).__name__}: pass "
                "rollout_buffer_class=EpisodeRolloutBuffer to the algorithm"
            )
        env = unwrap_code_env(self.training_env)
        if env is None:
            raise ConfigError("CompositeReward needs an environment from make_sb3_env")
        self._episodes = [[] for _ in range(self.training_env.num_envs)]
        if self.critic is not None:
            self.critic.init_callback(self.model)
        if self._distribution_terms:
            self._check_features(env.world)

    def _check_features(self, world: World) -> None:
        """Find the extractor, and warn where it is the one that judges in the end."""
        if world.real_codes is None:
            raise ConfigError(
                f"{self._distribution_terms[0]} compares with real images, but the environment has no real codes: use "
                "a run's environment"
            )
        if self.extractor is None:
            vqvae = vqvae_of(world)
            if vqvae is None:
                raise ConfigError(
                    f"{self._distribution_terms[0]} needs features, and the environment has no VQ-VAE to take them "
                    "from: give extractor, such as EncoderFeatures"
                )
            self.extractor = EncoderFeatures(vqvae.encode_features, int(vqvae.num_features))  # type: ignore[arg-type]
        if self.extractor.name == self.evaluation_extractor and not self._warned:
            self._warned = True
            logger.warning(
                "the reward's features (%s) are the evaluation's: the policy learns to please the yardstick, and its "
                "FD will say little; give CompositeReward another extractor",
                self.extractor.name,
            )

    def _on_step(self) -> bool:
        # SB3 averages these dicts after the rollout: keeping them lets the true reward be written in.
        for env in np.flatnonzero(self.locals["dones"]):
            self._episodes[env].append(self.locals["infos"][env].get("episode", {}))
        return True

    def _on_rollout_end(self) -> None:
        buffer: EpisodeRolloutBuffer = self.model.rollout_buffer  # type: ignore[attr-defined]
        env: CodeVecEnv = unwrap_code_env(self.training_env)  # type: ignore[assignment]
        mask, last = buffer.mask, buffer.stop - 1  # (n, T), (n,)
        pool = FakePool(torch.from_numpy(buffer.codes.astype(np.int64)), env.world.grid)
        rows = pool.image_rows.numpy()
        whole, per_code = self._critic_rewards(buffer, rows)  # (n,), (n, T)
        for name, earned in self._image_rewards(pool, env.world).items():
            self._record(name, earned)
            whole = whole + self.weights[name] * self._normalise(name, earned, rows)
        terminal = np.zeros(mask.shape, np.float32)
        terminal[np.arange(len(mask)), last] = whole
        buffer.write_rewards(terminal)  # these are whole images', and end both of two levels
        buffer.add_rewards(per_code.astype(np.float32))
        buffer.compute_returns_and_advantage()
        self._report(buffer, whole + per_code.sum(1))

    def _critic_rewards(self, buffer: EpisodeRolloutBuffer, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Let the critic learn and score; its weighted rewards of whole images (n,) and of codes (n, T)."""
        rewards = np.zeros(buffer.mask.shape)
        if self.critic is None:
            return rewards[:, 0], rewards
        self.critic._on_rollout_end()
        rewards[buffer.mask] = buffer.rewards
        totals, weight = rewards.sum(1), self.weights["critic"]  # (n,)
        self._record("critic", totals)
        if self.critic.critic.reward == "intermediate":
            scale = _spread(totals) if self.normalization["critic"] == "standard" else 1.0
            return np.zeros(len(rewards)), weight / scale * rewards
        return weight * self._normalise("critic", totals, rows), np.zeros_like(rewards)

    def _image_rewards(self, pool: FakePool, world: World) -> dict[str, np.ndarray]:
        """Rewards (n,) of every term but the critic's, by images of equally many rows."""
        names = [name for name in self.weights if name != "critic"]
        earned = {name: np.zeros(len(pool.codes)) for name in names}
        distances = {name: 0.0 for name in self._distribution_terms}
        for height in pool.image_rows.unique().tolist() if names else []:
            same = pool.image_rows == height
            images = world.decode(world.grid.crop(pool.codes[same], height).to(world.device))  # (m, C, h, S) uint8
            features = extract(self.extractor, images) if distances else None  # type: ignore[arg-type]
            for name in names:
                if name in self.functions:
                    earned[name][same.numpy()] = _call(name, self.functions[name], images)
                elif features is not None and len(features) >= MINIMUM_BATCH:
                    term = self._term(name, height, world)
                    earned[name][same.numpy()] = term(features).cpu().numpy()
                    distances[name] += term.distance * len(features) / len(pool.codes)
        for name, distance in distances.items():
            self.logger.record(f"reward/{name}_distance", distance)
        return earned

    def _term(self, name: str, height: int, world: World) -> DistributionReward:
        """A distribution term for images of `height` rows, made when they first come."""
        key = f"{name}/{height}"
        if key not in self._terms:
            self._terms[key] = make_distribution_reward(name, self._reference(height, world), self.ema, self.components)
            if key in self._restored:
                self._terms[key].load_state_dict(self._restored.pop(key))
        return self._terms[key]

    def _reference(self, height: int, world: World) -> Tensor:
        """Features of decoded real codes of `height` rows; always of the same images."""
        if height not in self._references:
            assert world.real_codes is not None and self.extractor is not None
            rng = np.random.default_rng(self.seed)
            rows = rng.permutation(len(world.real_codes))[: self.n_reference]
            codes = torch.from_numpy(world.real_codes[rows].astype(np.int64))
            images = world.decode(world.grid.crop(codes, height).to(world.device))
            self._references[height] = extract(self.extractor, images)
        return self._references[height]

    def _normalise(self, name: str, rewards: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Rewards (n,) on their own scale."""
        kind = self.normalization[name]
        if kind == "none":
            return rewards
        _, group = np.unique(rows, return_inverse=True)
        centred = rewards - (np.bincount(group, rewards) / np.bincount(group))[group]
        return centred / _spread(centred) if kind == "standard" else centred

    def _record(self, name: str, rewards: np.ndarray) -> None:
        if not np.isfinite(rewards).all():
            raise DivergedError(f"stage ral: the reward {name} is NaN or infinite; the last good checkpoint is kept")
        self.logger.record(f"reward/{name}_mean", float(rewards.mean()))
        self.logger.record(f"reward/{name}_std", float(rewards.std()))

    def _report(self, buffer: EpisodeRolloutBuffer, totals: np.ndarray) -> None:
        self.logger.record("reward/std", float(totals.std()))
        for env, total in zip(buffer.episode_envs, totals, strict=True):
            if self._episodes[env]:
                self._episodes[env].pop(0)["r"] = float(total)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, at the start of a rollout: the averaged moments and the critic's part."""
        terms = self._restored | {key: term.state_dict() for key, term in self._terms.items()}
        return {"critic": None if self.critic is None else self.critic.state_dict(), "terms": terms}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
        self._terms, self._restored = {}, dict(state["terms"])


def vqvae_of(world: World) -> nn.Module | None:
    """The VQ-VAE that a world decodes with, or None where it has none."""
    parts = (*getattr(world.decode, "args", ()), getattr(world.decode, "__self__", None))
    return next((part for part in parts if isinstance(part, nn.Module) and hasattr(part, "encode_features")), None)


def _spread(values: np.ndarray) -> float:
    """Standard deviation, or 1 where all are alike up to rounding."""
    spread = float(values.std())
    return spread if spread > 1e-12 * float(np.abs(values).max(initial=0.0)) else 1.0


def _call(name: str, function: ImageReward, images: Tensor) -> np.ndarray:
    """A function's rewards (m,) of images.

    Raises:
        ConfigError: it gives something else.
    """
    with torch.no_grad():
        rewards = torch.as_tensor(function(images)).detach().cpu().double().numpy()
    if rewards.shape != (len(images),):
        raise ConfigError(
            f"the reward {name!r} gave shape {rewards.shape} for {len(images)} images: one number per image is needed"
        )
    return rewards


def _checked_weights(
    weights: Mapping[str, float], functions: Mapping[str, ImageReward], has_critic: bool
) -> dict[str, float]:
    """The weights, refused where a term is unknown or lacks something."""
    taken = sorted(set(functions) & {"critic", *DISTRIBUTION_TERMS})
    if taken:
        raise ConfigError(f"the function {taken[0]!r} has the name of a built-in reward: call it something else")
    allowed = ["critic", *DISTRIBUTION_TERMS, *functions]
    for name, weight in weights.items():
        if name not in allowed:
            raise ConfigError(f"reward {name!r} is unknown: choose among {', '.join(allowed)}, or give it in functions")
        if not math.isfinite(weight):
            raise ConfigError(f"the weight of reward {name!r} is {weight}: give a number")
    if not weights:
        raise ConfigError(f"no rewards: give weights for some of {', '.join(allowed)}")
    if ("critic" in weights) != has_critic:
        problem = "needs a CoTrainedCritic: give critic" if "critic" in weights else "is given, but has no weight"
        raise ConfigError(f"the reward 'critic' {problem}")
    unused = sorted(set(functions) - set(weights))
    if unused:
        raise ConfigError(f"the function {unused[0]!r} has no weight: add it to weights")
    return {name: float(weight) for name, weight in weights.items()}


def _checked_normalization(
    normalization: TermNormalization | Mapping[str, TermNormalization], names: list[str]
) -> dict[str, TermNormalization]:
    """Each term's normalisation."""
    given = dict.fromkeys(names, normalization) if isinstance(normalization, str) else dict(normalization)
    for name, kind in given.items():
        if name not in names or kind not in TERM_NORMALIZATIONS:
            raise ConfigError(
                f"normalization {kind!r} of reward {name!r}: choose {', '.join(TERM_NORMALIZATIONS)} for some of "
                f"{', '.join(names)}"
            )
    return {name: given.get(name, "standard") for name in names}
