"""The settings of each algorithm of stage 3 alone: one documented dataclass per algorithm.

What several algorithms share (discount, learning rate, ties to the data, ...) stands in `RALConfig`,
which holds one of each of these as a section: ``--ral.ppo.clip-range 0.2``. A field has the name and the meaning of the
algorithm's keyword argument; its default is the one that `ral_gym.agents.algorithm_defaults` gives.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from ral_gym.errors import ConfigError

EntropyTarget = float | Literal["start"] | None


@dataclass(frozen=True)
class EntropyConfig:
    """The entropy bonus of an algorithm that has one in its loss."""

    ent_coef: float = 0.0
    """Weight of the entropy bonus, per nat. 0: the prior starts with the data's entropy, and a bonus would blur it."""
    entropy_target: EntropyTarget = None
    """Steer ent_coef (such as 2.2e-3) towards this share of ln K, or towards `start`, the prior's; None: fixed."""
    entropy_schedule: bool = False
    """With a target: ent_coef also rises over the first 5 % of the updates and falls over the last 15 %."""


@dataclass(frozen=True)
class ReinforceConfig(EntropyConfig):
    """REINFORCE (ral_gym.agents.Reinforce)."""

    baseline: Literal["none", "mean", "leave_one_out", "value"] = "leave_one_out"
    """What is subtracted from the returns. The paper mentions none: its presets have `none`."""
    vf_coef: float = 0.5
    """Weight of the value head's loss; baseline `value` only."""
    batch_size: int | None = None
    """Codes per forward and backward pass, in whole images; gradients are summed over passes. None: all at once."""


@dataclass(frozen=True)
class GRPOConfig(EntropyConfig):
    """GRPO (ral_gym.agents.GRPO)."""

    group_size: int | None = None
    """Images that continue the same real one from the same row. None: the largest divisor of n_envs up to 8."""
    ratio: Literal["sequence", "token"] = "sequence"
    """Importance ratio: of whole images (GSPO-token), or of each code."""
    clip_range: float = 0.2
    """Ratios are clipped to 1 - this .. 1 + this."""
    n_epochs: int = 2
    """Optimizer steps per update."""
    target_kl: float | None = None
    """No further epoch once the KL per code exceeds 1.5 times this; None: no such limit."""
    scale_advantage: Literal["batch", "none"] | None = None
    """Divide advantages by their standard deviation over the batch. None: as ral.normalize_advantage says."""
    batch_size: int | None = None
    """Codes per forward and backward pass, in whole images; gradients are summed over passes. None: all at once."""


@dataclass(frozen=True)
class PPOConfig(EntropyConfig):
    """PPO (Stable-Baselines3, unmodified)."""

    n_epochs: int = 2
    """Passes over a rollout. Few: the policy must stay near its pretrained start."""
    batch_size: int | None = None
    """Codes per minibatch. None: at least four minibatches of whole images."""
    clip_range: float = 0.1
    """Ratios are clipped to 1 - this .. 1 + this. Small steps, for the same reason."""
    target_kl: float | None = 0.03
    """No further minibatch once the KL per code exceeds 1.5 times this; None: no such limit."""
    gae_lambda: float = 1.0
    """GAE's lambda. 1: the value head starts from nothing, and bootstrapping on it would only be bias."""
    vf_coef: float = 0.5
    """Weight of the value head's loss."""


@dataclass(frozen=True)
class MaskablePPOConfig(PPOConfig):
    """MaskablePPO (sb3-contrib, unmodified)."""


@dataclass(frozen=True)
class A2CConfig(EntropyConfig):
    """A2C (Stable-Baselines3, unmodified)."""

    gae_lambda: float = 1.0
    """GAE's lambda. 1: the value head starts from nothing, and bootstrapping on it would only be bias."""
    vf_coef: float = 0.5
    """Weight of the value head's loss."""


@dataclass(frozen=True)
class TRPOConfig:
    """TRPO (sb3-contrib, unmodified). ral.learning_rate is its value head's; target_kl bounds the policy's step."""

    target_kl: float = 0.01
    """Mean KL per code and update; T codes add up."""
    n_critic_updates: int = 4
    """Passes of the value head over a rollout."""
    batch_size: int | None = None
    """Codes per minibatch of the value head. None: at least four minibatches of whole images."""
    gae_lambda: float = 1.0
    """GAE's lambda. 1: the value head starts from nothing, and bootstrapping on it would only be bias."""
    cg_max_steps: int = 10
    """Steps of the conjugate gradient; each costs one pass forward and two back."""
    cg_damping: float = 0.1
    """Added to the Fisher matrix's diagonal."""
    line_search_max_iter: int = 10
    """Shorter and shorter steps that are tried."""
    sub_sampling_factor: int = 1
    """The policy's step uses one in so many codes."""


SECTIONS = {
    "reinforce": ReinforceConfig,
    "grpo": GRPOConfig,
    "ppo": PPOConfig,
    "a2c": A2CConfig,
    "trpo": TRPOConfig,
    "maskable_ppo": MaskablePPOConfig,
}
"""The section of `RALConfig` -> its dataclass; built-in algorithms have the section of their name."""


def changed_settings(section: Any) -> dict[str, Any]:
    """The fields of a section that are not at their defaults, with their values."""
    pairs = ((field, getattr(section, field.name)) for field in fields(section))
    return {field.name: value for field, value in pairs if value != field.default}


def check_section(name: str, section: Any) -> None:
    """Refuse settings of one algorithm that would reach nothing.

    Raises:
        ConfigError: an entropy target without a coefficient to steer, a schedule without a target, or the weight of a
            value head that is not trained.
    """
    if isinstance(section, EntropyConfig):
        target = section.entropy_target
        if target is not None and not section.ent_coef:
            raise ConfigError(
                f"ral.{name}.entropy_target is {target}, but ral.{name}.ent_coef, which it steers, is 0: give that "
                "too, for instance 2.2e-3"
            )
        if section.entropy_schedule and target is None:
            raise ConfigError(f"ral.{name}.entropy_schedule needs ral.{name}.entropy_target: give a target, or `start`")
    if isinstance(section, ReinforceConfig) and section.baseline != "value" and "vf_coef" in changed_settings(section):
        raise ConfigError(
            f"ral.{name}.vf_coef is {section.vf_coef}, but only ral.{name}.baseline value trains a value head"
        )


def upgraded(ral: Any) -> Any:
    """Section `ral` of a config.json from before the algorithms had sections, as what it did.

    REINFORCE's baseline stood among the shared settings. Other algorithms ignored it, and all but REINFORCE and GRPO
    ignored mle_coef, kl_coef and normalize_advantage too: they always normalised and had no ties. So a run of then goes
    on as it began.
    """
    if not isinstance(ral, dict) or "baseline" not in ral:
        return ral
    kept = {name: value for name, value in ral.items() if name != "baseline"}
    algo = kept.get("algo")
    if algo == "reinforce":
        return kept | {"reinforce": {"baseline": ral["baseline"]}}
    ignored = {} if algo == "grpo" else {"mle_coef": 0.0, "kl_coef": 0.0, "normalize_advantage": True}
    return kept | ignored
