"""A weighted sum of named rewards: the critic's, distribution rewards of the image set, and functions of images.

    model.learn(100_000, callback=CompositeReward({"loo_fd": 1.0}))
    model.learn(100_000, callback=CompositeReward({"critic": 1.0, "kid": 0.5, "warm": 0.1}, critic=critic,
                                                  functions={"warm": redness}))

Like `CriticCallback`, which it contains if there is a critic, it writes into an on-policy rollout at its end. Every
term is normalised separately before it is weighted, as in Baran et al. (2026, arXiv 2603.23086), who normalise
instance-level and distribution-level rewards separately. Unlike there, the whole batch is used, since dividing by the
deviation of smaller groups does not give the gradient of any objective. Distribution rewards and their source are in
`ral_gym.rewards.distribution`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ral_gym.agents.episodes import EpisodeRolloutBuffer
from ral_gym.agents.rewards.co_trained_critic import CoTrainedCritic
from ral_gym.agents.rewards.critic_callback import CriticCallback
from ral_gym.agents.rewards.rollout_reward import RolloutReward
from ral_gym.envs.worlds import World
from ral_gym.errors import ConfigError, DivergedError
from ral_gym.metrics import Extractor
from ral_gym.registry import REWARDS
from ral_gym.rewards.moments import Moments
from ral_gym.rewards.scorer import require_encoder_features
from ral_gym.rewards.terms import RewardTerm
from ral_gym.rewards.view import FinishedImages, View

logger = logging.getLogger("ral_gym")

TermNormalization = Literal["standard", "centre", "none"]
TERM_NORMALIZATIONS = ("standard", "centre", "none")


class CompositeReward(RolloutReward):
    """Write a weighted sum of named rewards into every rollout.

    Terms: `critic`, the co-trained critic's, trained and logged as by `CriticCallback`; `loo_fd`,
    `loo_fd_first_order`, `loo_fd_diagonal` and `kid`, see `ral_gym.rewards.distribution`, on features of the decoded
    images against those of decoded real codes; every other name of `ral_gym.registry.REWARDS`; and those of
    `functions`. `ral_gym.rewards.terms` documents the interface of a reward. Rewards of images are given with the last
    code; those of codes (of an intermediate critic, or of a reward that sees codes) per code. Episodes that stop early
    are compared only with each other and with real images of as many rows; fewer than 3 of them in a rollout get no
    reward from distribution terms. All terms share the same images: each is decoded, and its features computed, once.

    Logs `reward/NAME_mean` and `reward/NAME_std` of every term before normalisation, `reward/NAME_distance` of
    distribution terms, and `reward/std` of the sum; `rollout/ep_rew_mean` shows the sum.

    Args:
        weights: term -> weight.
        critic: for the term `critic`.
        functions: name -> reward that is not registered.
        extractor: for terms that see features; None: the run's encoder, averaged over space. It should differ from the
            evaluation's, or the policy optimises the evaluation metric directly.
        evaluation_extractor: name of the evaluation's extractor, to warn if they are the same.
        statistics: of real images' features, to which the Frechet terms compare; None: the environment's real images.
            They describe whole images, so all episodes must end with one.
        options: more arguments that classes of rewards may name, such as `clip_path`.
        ema: b of the Frechet terms' moments, see `FrechetReward`: an average over about 1 / (1 - b) rollouts. A larger
            b means less noise, but the average lags behind a moving policy, which then overshoots.
        components: see `FrechetReward`.
        n_reference: number of real images in the reference, drawn once; fewer if there are fewer.
        normalization: for all terms or by name. `standard`: subtract the batch's mean, divide by its standard
            deviation; `centre`: subtract the mean only, so that ``{"loo_fd": 1.0}`` keeps the scale of FD's gradient;
            `none`. Means are over images of the same number of rows. Rewards of codes are only divided, by the standard
            deviation of their sums: a constant per code would reward or punish length. seed: seeds the choice of the
            reference. verbose: as in SB3.

    Raises:
        ConfigError: an unknown term or normalisation, a term without what it needs; at the start of training, a model
            without an `EpisodeRolloutBuffer`, another environment, or no available features.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        critic: CoTrainedCritic | None = None,
        functions: Mapping[str, Callable[..., Any]] | None = None,
        extractor: Extractor | None = None,
        evaluation_extractor: str = "lite0",
        statistics: Moments | None = None,
        options: Mapping[str, Any] | None = None,
        ema: float = 0.5,
        components: int | None = None,
        n_reference: int = 2000,
        normalization: TermNormalization | Mapping[str, TermNormalization] = "standard",
        seed: int = 0,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        functions = dict(functions or {})
        self.weights = _checked_weights(weights, functions, critic is not None)
        self.normalization = _checked_normalization(normalization, list(self.weights))
        self.critic = CriticCallback(critic) if critic is not None else None
        self.extractor, self.evaluation_extractor = extractor, evaluation_extractor
        self.ema, self.components, self.n_reference, self.seed = ema, components, n_reference, seed
        self._warned = False
        self.statistics = statistics
        self.options = {**(options or {}), "ema": ema, "components": components}
        self.terms = [
            RewardTerm(name, functions[name] if name in functions else REWARDS.get(name), options=self.options)
            for name in self.weights
            if name != "critic"
        ]
        self._references: dict[int, View] = {}
        self._critic_factor = 1.0  # of the last rollout, by which the critic's rewards of codes were multiplied
        self._scales: dict[str, tuple[dict[int, float], float]] = {}  # of the last rollout: shift by rows, and divisor

    def _init_callback(self) -> None:
        super()._init_callback()
        if self.critic is not None:
            self.critic.init_callback(self.model)
            self.offer(self.action_rewards)
        self.options |= {"class_names": getattr(self.world, "class_names", ()), "device": self.world.device}
        for term in self.terms:
            if self.statistics is not None and term.takes_moments:
                term.reference = self._moments
            elif term.needs_reference and self.world.real_codes is None:
                also = ", or give statistics of real images (ral.reward_reference)" if term.takes_moments else ""
                raise ConfigError(
                    f"{term.name} compares with real images, but the environment has no real codes: use a run's "
                    f"environment{also}"
                )
            else:
                term.reference = self._reference
        if seeing := [term for term in self.terms if term.sees == "features"]:
            self._find_features(seeing)
        for term in self.terms:
            if term.is_network:  # one for all heights: what it lacks is said now, not after the first rollout
                term.function(self.world.grid.height)

    def _find_features(self, terms: list[RewardTerm]) -> None:
        """Find the extractor, and warn if it is the evaluation's."""
        if self.extractor is None:
            vqvae = vqvae_of(self.world)
            if vqvae is None:
                raise ConfigError(
                    f"{terms[0].name} needs features, but the environment has no tokenizer to take them from: give "
                    "extractor, such as EncoderFeatures"
                )
            self.extractor = require_encoder_features(vqvae)
        for term in terms:
            term.extractor = self.extractor
        if self.statistics is not None:
            self.statistics.check(self.extractor)
        if self.extractor.name == self.evaluation_extractor and not self._warned:
            self._warned = True
            logger.warning(
                "the reward's features (%s) are the evaluation's: the policy optimises the evaluation metric directly, "
                "so its FD will say little; give CompositeReward another extractor",
                self.extractor.name,
            )

    def write(self, buffer: EpisodeRolloutBuffer, codes: Tensor) -> np.ndarray:
        """Normalise, weight, sum and write every term's rewards; returns (n,) the sums."""
        images, mask = self._finished(codes), buffer.mask  # n images, (n, L)
        rows = images.image_rows.numpy()
        whole, per_code = np.zeros(len(mask)), np.zeros(mask.shape)  # (n,), (n, L)
        for name, earned in self._earned(images, mask):
            totals = earned if earned.ndim == 1 else earned.sum(1)  # (n,)
            self._record(name, totals)
            if earned.ndim == 1:
                whole += self.weights[name] * self._normalise(name, totals, rows)
            else:
                scale = _spread(totals) if self.normalization[name] == "standard" else 1.0
                factor = self.weights[name] / scale
                per_code += factor * earned
                if name == "critic":
                    self._critic_factor = float(factor)
                    self.say_paid(factor * earned)
        terminal = np.zeros(mask.shape, np.float32)
        terminal[np.arange(len(mask)), buffer.stop - 1] = whole
        buffer.write_rewards(terminal)  # rewards of whole images, which end both of two levels
        buffer.add_rewards(per_code.astype(np.float32))
        totals = whole + per_code.sum(1)
        self.logger.record("reward/std", float(totals.std()))
        self._references.clear()  # terms have computed what they need from these images
        return totals

    def action_rewards(self, codes: Tensor) -> Tensor:
        """See `CoTrainedCritic.action_rewards`; weighted and divided as in the last rollout."""
        assert self.critic is not None
        return self._critic_factor * self.critic.critic.action_rewards(codes)

    def _finished(self, codes: Tensor) -> FinishedImages:
        """The rollout's images, from codes (n, L), shared by all terms."""
        if self.critic is not None:
            return self.critic.critic.finished(codes)
        return FinishedImages(codes, self.world.grid, self._decode, batch_size=256, processes=self.processes)

    def _decode(self, codes: Tensor) -> Tensor:
        """Codes of r rows (B, codes_of(r)) -> images (B, C, h, S) uint8."""
        return self.world.decode(codes.to(self.world.device))

    def _earned(self, images: FinishedImages, mask: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Every term's name and rewards: of images (n,), or of the drawn codes (n, L)."""
        if self.critic is not None:
            rewards = self.critic.earn(images, mask).astype(np.float64)
            yield "critic", rewards if self.critic.critic.scorer.dense else rewards.sum(1)
        for term in self.terms:
            parts, distance = [], 0.0
            for height in images.heights:
                view, function = images.view(height), term.function(height)
                parts.append(
                    (images.rows(height).numpy(), images.positions(height).numpy(), term(view, height).numpy())
                )
                if len(view) >= getattr(function, "minimum_batch", 1):
                    distance += getattr(function, "distance", 0.0) * len(view) / len(mask)
            if hasattr(term.part, "distance"):
                self.logger.record(f"reward/{term.name}_distance", distance)
            yield term.name, self.processes.from_main(_joined(parts, mask))

    def _reference(self, height: int) -> View:
        """Decoded real codes of `height` rows; always of the same images."""
        if height not in self._references:
            world = self.world
            assert world.real_codes is not None
            rng = np.random.default_rng(self.seed)
            rows = rng.permutation(len(world.real_codes))[: self.n_reference]
            grid = world.grid
            codes = grid.crop(torch.from_numpy(world.real_codes[rows].astype(np.int64)), height)
            images = grid.without_labels(codes)
            self._references[height] = View(
                images, self._decode, grid.labels_of(codes), batch_size=256, processes=self.processes
            )
        return self._references[height]

    def _moments(self, height: int) -> Moments:
        """The real images' statistics.

        Raises:
            ConfigError: for images that stopped early, since the statistics are of whole ones.
        """
        if height != self.world.grid.height:
            raise ConfigError(
                f"the statistics of real images (ral.reward_reference) are of whole images, but an episode stopped "
                f"after {height} of {self.world.grid.height} rows: use the reset mode full or continue"
            )
        assert self.statistics is not None
        return self.statistics

    def _normalise(self, name: str, rewards: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Normalised rewards (n,); keeps the scale for `score`."""
        kind = self.normalization[name]
        heights, group = np.unique(rows, return_inverse=True)
        means = np.zeros(len(heights)) if kind == "none" else np.bincount(group, rewards) / np.bincount(group)
        centred = rewards - means[group]
        scale = _spread(centred) if kind == "standard" else 1.0
        self._scales[name] = (dict(zip(heights.tolist(), means.tolist(), strict=True)), scale)
        return centred / scale

    def check_alone(self) -> None:
        """See `RolloutReward.check_alone`.

        Raises:
            ConfigError: a term compares the images of a rollout, or the critic rewards codes.
        """
        if self.critic is not None:
            self.critic.check_alone()
        for term in self.terms:
            if term.compares:
                raise ConfigError(
                    f"roll-outs need rewards of single images, but {term.name} compares sets of them: leave it out of "
                    "ral.reward_weights, or give ral.n_rollouts 1"
                )

    def score(self, codes: Tensor) -> np.ndarray:
        """See `RolloutReward.score`: every term with the last rollout's normalisation.

        Raises:
            ConfigError: a term gives rewards to codes.
        """
        images, totals = self._finished(codes), np.zeros(len(codes))
        for name, weight in self.weights.items():
            earned = self._earned_alone(name, images)
            means, scale = self._scales[name]
            shift = np.vectorize(means.__getitem__, otypes=[float])(images.image_rows.numpy())
            totals += weight * (earned - shift) / scale
        return totals

    def _earned_alone(self, name: str, images: FinishedImages) -> np.ndarray:
        """One term's rewards (m,) of images that are not compared with any others."""
        if name == "critic" and self.critic is not None:
            return self.critic.score_images(images)
        earned, term = np.zeros(len(images)), next(term for term in self.terms if term.name == name)
        for height in images.heights:
            given = term(images.view(height), height).numpy()
            if given.ndim != 1:
                raise ConfigError(f"{name} rewards every code, roll-outs need one per image: give ral.n_rollouts 1")
            earned[images.rows(height).numpy()] = given
        return earned

    def _record(self, name: str, rewards: np.ndarray) -> None:
        if not np.isfinite(rewards).all():
            raise DivergedError(f"stage ral: the reward {name} is NaN or infinite; the last good checkpoint is kept")
        self.logger.record(f"reward/{name}_mean", float(rewards.mean()))
        self.logger.record(f"reward/{name}_std", float(rewards.std()))

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, at the start of a rollout: the state of the terms and of the critic."""
        terms = {key: state for term in self.terms for key, state in term.state_dict().items()}
        return {"critic": None if self.critic is None else self.critic.state_dict(), "terms": terms}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
        for term in self.terms:
            term.load_state_dict(state["terms"])


def _joined(parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]], mask: np.ndarray) -> np.ndarray:
    """Join rewards by height into those of all images (n,), or of all drawn codes (n, L) if one of them is per code.

    Args:
        parts: indices of the images (m,), positions of their codes (T',), and their rewards, (m,) or (m, T').
        mask: (n, L) bool, the codes that were drawn.
    """
    if all(rewards.ndim == 1 for _, _, rewards in parts):
        whole = np.zeros(len(mask))
        for rows, _, rewards in parts:
            whole[rows] = rewards
        return whole
    by_code = np.zeros(mask.shape)
    for rows, positions, rewards in parts:
        if rewards.ndim == 1:  # too few images: nothing
            by_code[rows, positions[-1]] = rewards
        else:
            by_code[rows[:, None], positions] = rewards
    return by_code * mask


def vqvae_of(world: World) -> nn.Module | None:
    """The tokenizer that a world decodes with, or None."""
    parts = (*getattr(world.decode, "args", ()), getattr(world.decode, "__self__", None))
    return next((part for part in parts if isinstance(part, nn.Module) and hasattr(part, "encode_features")), None)


def _spread(values: np.ndarray) -> float:
    """Standard deviation, or 1 if all values are equal up to rounding."""
    spread = float(values.std())
    return spread if spread > 1e-12 * float(np.abs(values).max(initial=0.0)) else 1.0


def _checked_weights(
    weights: Mapping[str, float], functions: Mapping[str, Callable[..., Any]], has_critic: bool
) -> dict[str, float]:
    """The weights; raises if a term is unknown or lacks something."""
    taken = sorted(set(functions) & set(REWARDS))
    if taken:
        raise ConfigError(f"the function {taken[0]!r} has the name of a registered reward: call it something else")
    allowed = [*REWARDS, *functions]
    for name, weight in weights.items():
        if name not in functions:
            REWARDS.check(name)
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
