"""An algorithm of stage 3: a Stable-Baselines3 class, its policy, its default arguments, and how settings apply to it.

Algorithms are registered in `ral_gym.registry.ALGORITHMS`, as an `Algorithm` or as a bare class, which inherits the
entry of its nearest registered base class. Settings become constructor arguments if the class takes them; regularisers
that it does not take become callbacks (`ral_gym.agents.regularizers`); settings without effect are refused.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sb3_contrib import TRPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import VecEnv

from ral_gym.agents.algorithms.base import EpisodeAlgorithm
from ral_gym.agents.episodes import EpisodeRolloutBuffer
from ral_gym.agents.policy import PriorPolicy, PriorWeights, check_for_trpo
from ral_gym.agents.regularizers import EntropyTarget, MLEShare, PriorKLReward
from ral_gym.config import SECTIONS, RALConfig, changed_settings
from ral_gym.errors import ConfigError
from ral_gym.registry import ALGORITHMS as REGISTRY
from ral_gym.registry import is_path

SHARED = ("learning_rate", "gamma", "max_grad_norm", "normalize_advantage", "mle_coef", "mle_dropout", "kl_coef")
"""Settings of `RALConfig` that become the algorithm's arguments of the same name, if it has them."""
CALLBACKS = ("mle_coef", "kl_coef")
"""Settings that become callbacks for algorithms without such arguments."""
STEERED = ("entropy_target", "entropy_schedule")
"""Settings that stage 3 gives to `EntropyTarget`, for every algorithm: only the run knows the number of updates."""
RESERVED = (
    *("policy", "env", "n_steps", "seed", "device", "verbose", "tensorboard_log", "policy_kwargs", "use_sde"),
    *("rollout_buffer_class", "rollout_buffer_kwargs", "_init_setup_model", "sde_sample_freq", "stats_window_size"),
)
"""Arguments that stage 3 sets itself, or that have no effect there."""
CONTINUOUS_ONLY = ("sac", "td3", "ddpg", "tqc", "crossq")


def whole_episodes(env: VecEnv) -> dict[str, Any]:
    """Keyword arguments that suit T-step episodes with a terminal reward, for every on-policy algorithm.

    SB3's own defaults (gamma 0.99, gae_lambda 0.95, n_steps 2048 or 5) come from control tasks: here they would hide
    the reward from the early codes and cut images apart.
    """
    levels = tuple(env.get_attr("levels", 0)[0])  # codes without a label
    return {
        "policy_kwargs": {"levels": levels},  # checked against the prior's; the policy sees only spaces
        "rollout_buffer_kwargs": {"levels": levels},  # two levels: each is discounted as an episode of its own
        "n_steps": sum(levels),  # one whole episode per rollout
        "gamma": 1.0,  # the first code sees the terminal reward as well as the last
        "rollout_buffer_class": EpisodeRolloutBuffer,  # one pass per image instead of one per code
    }


@dataclass(frozen=True)
class Algorithm:
    """An algorithm's entry in the registry, used by stage 3, `algorithm_defaults` and `policy_for`.

    Attributes:
        cls: a Stable-Baselines3 class.
        policy: its policy: `PriorPolicy` or a subclass if it trains a prior, else the name of an SB3 policy.
        defaults: keyword arguments for an environment, before the settings.
        section: the section of `RALConfig` that holds its own settings, or None.
        renamed: returns keyword arguments for shared settings that it has under other names.
        renames: the names of these settings.
    """

    cls: type[BaseAlgorithm]
    policy: str | type[BasePolicy] = PriorPolicy
    defaults: Callable[[VecEnv], dict[str, Any]] = whole_episodes
    section: str | None = None
    renamed: Callable[[RALConfig], dict[str, Any]] = lambda config: {}
    renames: tuple[str, ...] = ()

    @property
    def trains_prior(self) -> bool:
        """Whether it trains a prior on whole images, as stage 3 requires."""
        policy = self.policy
        own = isinstance(policy, type) and issubclass(policy, PriorPolicy)
        return own and issubclass(self.cls, OnPolicyAlgorithm)

    @functools.cached_property
    def parameters(self) -> frozenset[str]:
        """The names of its constructor's arguments, including those that it passes to its base class."""
        names: set[str] = set()
        for cls in self.cls.__mro__:
            if "__init__" in vars(cls):
                taken = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
                kinds = {parameter.kind for parameter in taken.values()}
                names |= {name for name, p in taken.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
                if inspect.Parameter.VAR_KEYWORD not in kinds:
                    break
        return frozenset(names - {"self"})

    def own_settings(self, config: RALConfig | None = None) -> dict[str, Any]:
        """Its section's values; those of the dataclass without a configuration."""
        if self.section is None:
            return {}
        return vars(SECTIONS[self.section]() if config is None else getattr(config, self.section))

    def keywords(self, env: VecEnv, config: RALConfig | None = None) -> dict[str, Any]:
        """The defaults on `env` and its section; None in the section leaves a default as it is."""
        defaults = self.defaults(env)
        own = {
            name: value
            for name, value in self.own_settings(config).items()
            if name in self.parameters and (value is not None or name not in defaults)
        }
        return defaults | own

    def stage_keywords(self, env: VecEnv, config: RALConfig) -> dict[str, Any]:
        """As `keywords`, with the shared settings and the free options of stage 3."""
        shared = {name: getattr(config, name) for name in SHARED if name in self.parameters}
        arguments = self.keywords(env, config) | shared | self.renamed(config) | config.options
        return {name: value for name, value in arguments.items() if name not in STEERED}

    def callbacks(self, config: RALConfig, prior: PriorWeights, progress: Callable[[], float]) -> list[BaseCallback]:
        """Callbacks for the regularisers that its loss does not have, in their order after the reward callback.

        Args:
            config: stage 3's settings.
            prior: the MLE prior.
            progress: returns the fraction of the updates that are done.
        """
        own = self.own_settings(config)
        found: list[BaseCallback] = []
        if config.kl_coef and "kl_coef" not in self.parameters:
            found.append(PriorKLReward(config.kl_coef, prior))
        if (target := own.get("entropy_target")) is not None:
            schedule = own["entropy_schedule"]
            found.append(EntropyTarget(own["ent_coef"], target, schedule=schedule, progress=progress))
        if config.mle_coef and "mle_coef" not in self.parameters:
            found.append(MLEShare(config.mle_coef, dropout=config.mle_dropout))
        return found

    def notes(self, config: RALConfig) -> list[str]:
        """Short notes on shared settings that work differently for this algorithm, or not at all."""
        own = {name for name in CALLBACKS if getattr(config, name) and name not in self.parameters}
        ways = {"mle_coef": "separate steps between the updates", "kl_coef": "subtracted from the rewards"}
        notes = [f"ral.{name} {getattr(config, name):g}: {ways[name]}" for name in CALLBACKS if name in own]
        return notes + [f"no ral.{name}" for name in SHARED if not self._takes(name)]

    def _takes(self, name: str) -> bool:
        return name in (*CALLBACKS, "mle_dropout") or name in self.parameters or name in self.renames

    def check(self, config: RALConfig) -> None:
        """Refuse settings of stage 3 that would have no effect.

        Raises:
            ConfigError: another algorithm's section is set, a shared setting does not apply here, or an option is not
                an argument of the class or has its own setting.
        """
        for section in SECTIONS:
            changed = changed_settings(getattr(config, section))
            if section != self.section and changed:
                name, value = next(iter(changed.items()))
                own = f"set ral.{self.section} instead" if self.section else "it has no section"
                raise ConfigError(
                    f"ral.{section}.{name} is {value}, but ral.algo is {config.algo}: leave ral.{section} out; {own}"
                )
        for name in SHARED:
            default = getattr(RALConfig(), name)
            if not self._takes(name) and getattr(config, name) != default and name != "learning_rate":
                raise ConfigError(
                    f"ral.{name} is {getattr(config, name)}, but {config.algo} has no such argument: give {default}"
                )
        if config.mle_dropout and not config.mle_coef:
            raise ConfigError(
                "ral.mle_dropout is on, but ral.mle_coef is 0, so that it has no effect: give ral.mle_coef, or leave "
                "ral.mle_dropout out"
            )
        if config.n_rollouts > 1 and not issubclass(self.cls, EpisodeAlgorithm):
            raise ConfigError(
                f"ral.n_rollouts is {config.n_rollouts}, but {config.algo} takes its action values from a value "
                "function: give ral.algo reinforce or grpo, or ral.n_rollouts 1"
            )
        if self.section == "grpo" and config.reset_mode in ("continue", "mixed"):
            _check_groups(config, "continue the same real one")
        self._check_options(config)

    def _check_options(self, config: RALConfig) -> None:
        own = self.own_settings(config)
        for name in config.options:
            if name in own or (name in SHARED and (name in self.parameters or name in CALLBACKS)):
                where = f"ral.{self.section}.{name}" if name in own else f"ral.{name}"
                raise ConfigError(f"ral.options names {name}, which is a setting: give {where}")
            if name not in self.parameters or name in RESERVED:
                free = sorted(self.parameters - set(RESERVED) - set(SHARED) - own.keys())
                raise ConfigError(f"ral.options: {config.algo} takes no {name} here; choose among {', '.join(free)}")


def _check_groups(config: RALConfig, alike: str) -> None:
    """Refuse environments that cannot be grouped by what their images have in common.

    Raises:
        ConfigError: the group size and the number of environments.
    """
    size, n_envs = config.grpo.group_size, config.n_envs
    if n_envs > 1 and n_envs % (size or n_envs) == 0:
        return
    what = f"ral.grpo.group_size is {size}" if size else f"ral.grpo compares images that {alike}"
    instead = "" if config.reset_mode == "full" else ", or ral.reset_mode full"
    raise ConfigError(f"{what}, but ral.n_envs is {n_envs}: give a multiple of the group size, 2 or more{instead}")


def find_algorithm(name: str) -> Algorithm:
    """The entry of an algorithm by its name or ``module:Class``.

    Raises:
        ConfigError: it is unknown, may not be imported, cannot draw codes, or is not a Stable-Baselines3 class.
    """
    if name not in REGISTRY and name.replace("_", "") in CONTINUOUS_ONLY:
        raise ConfigError(
            f"algorithm '{name}' acts in continuous spaces only (its actor outputs real vectors), but an action "
            f"here is one of K discrete codes: choose one of {', '.join(REGISTRY)}"
        )
    part = REGISTRY.get(name)
    if isinstance(part, Algorithm):
        return part
    if not (isinstance(part, type) and issubclass(part, BaseAlgorithm)):
        raise ConfigError(f"algorithm {name!r} is neither a Stable-Baselines3 class nor a ral_gym.agents.Algorithm")
    return _derived(part)


@functools.cache
def _derived(cls: type[BaseAlgorithm]) -> Algorithm:
    """The entry of a bare class: that of its nearest registered base class, with this class in its place."""
    entries: dict[type, Algorithm] = {entry.cls: entry for entry in map(REGISTRY.get, REGISTRY.builtin)}
    for base in cls.__mro__:
        if base in entries:
            return dataclasses.replace(entries[base], cls=cls)
    if not issubclass(cls, OnPolicyAlgorithm):
        return Algorithm(cls, policy="MlpPolicy", defaults=lambda env: {"gamma": 1.0})
    return Algorithm(cls)


def check_algorithm(name: str, pixelcnn: bool = True) -> None:
    """Raise `ConfigError` for an algorithm that does not run here.

    Args:
        name: its name.
        pixelcnn: it must also train a prior, as stage 3 does.
    """
    if find_algorithm(name).trains_prior or not pixelcnn:
        return
    raise ConfigError(
        f"algorithm '{name}' learns a value per code and trains no prior: choose one of "
        f"{', '.join(trainable_algorithms())}"
    )


def check_stage(config: RALConfig, priors: Sequence[Any] = ()) -> None:
    """Refuse an unsuitable algorithm, or settings that have no effect on it, before anything is trained.

    Args:
        config: stage 3's settings.
        priors: networks that the algorithm is to train.

    Raises:
        ConfigError: says what is wrong and what to do.
    """
    check_algorithm(config.algo)
    algorithm = find_algorithm(config.algo)
    algorithm.check(config)
    for prior in priors if issubclass(algorithm.cls, TRPO) else ():
        check_for_trpo(prior)
    if algorithm.section == "grpo" and any(prior.grid.classes for prior in priors):
        _check_groups(config, "share their label")


def trainable_algorithms() -> list[str]:
    """The names of built-in and registered algorithms that stage 3 accepts."""
    return [name for name in REGISTRY if not is_path(name) and find_algorithm(name).trains_prior]
