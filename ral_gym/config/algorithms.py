"""Settings of single algorithms of stage 3: one documented dataclass per algorithm.

Settings that several algorithms share (discount, learning rate, regularisers, ...) are in `RALConfig`, which holds one
of each of these as a section: ``--ral.ppo.clip-range 0.2``. A field has the name and the meaning of the algorithm's
keyword argument; its default is the one that `ral_gym.agents.algorithm_defaults` gives.
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
    """Weight of the entropy bonus, per nat. 0, since the prior starts with the data's entropy, which a bonus would
    exceed."""
    entropy_target: EntropyTarget = None
    """Steer ent_coef (such as 2.2e-3) towards this share of ln K, or towards `start`, the prior's; None: fixed."""
    entropy_schedule: bool = False
    """With a target: ent_coef also rises over the first 5 % of the updates and falls over the last 15 %."""


@dataclass(frozen=True)
class ReinforceConfig(EntropyConfig):
    """REINFORCE (ral_gym.agents.Reinforce)."""

    baseline: Literal["none", "mean", "leave_one_out", "value"] = "leave_one_out"
    """The baseline subtracted from the returns. The paper mentions none, so its presets use `none`."""
    vf_coef: float = 0.5
    """Weight of the value head's loss; baseline `value` only."""
    all_actions: bool = False
    """Sum the causal critic's reward of a code over all codes that could have been drawn: the same gradient on average,
    with less noise."""
    batch_size: int | None = None
    """Codes per forward and backward pass, in whole images; gradients are summed over passes. None: all at once."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """`bf16`: the passes of updates compute in 16 bits where autocast does; weights and drawing stay in 32."""


@dataclass(frozen=True)
class GRPOConfig(EntropyConfig):
    """GRPO (ral_gym.agents.GRPO)."""

    group_size: int | None = None
    """Images per group; a group starts from the same real rows, and with classes shares its label. None: the largest
    divisor of n_envs up to 8."""
    ratio: Literal["sequence", "token"] = "sequence"
    """Importance ratio: of whole images (GSPO-token), or of each code."""
    clip_range: float = 0.2
    """Ratios are clipped to 1 - clip_range .. 1 + clip_range."""
    n_epochs: int = 2
    """Optimizer steps per update."""
    target_kl: float | None = None
    """No further epoch once the KL per code exceeds 1.5 times this; None: no such limit."""
    scale_advantage: Literal["batch", "none"] | None = None
    """Divide advantages by their standard deviation over the batch. None: the value of ral.normalize_advantage."""
    batch_size: int | None = None
    """Codes per forward and backward pass, in whole images; gradients are summed over passes. None: all at once."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """`bf16`: the passes of updates compute in 16 bits where autocast does; weights and drawing stay in 32."""


@dataclass(frozen=True)
class PPOConfig(EntropyConfig):
    """PPO (Stable-Baselines3, unmodified)."""

    n_epochs: int = 2
    """Passes over a rollout; few, so that the policy stays near its pretrained weights."""
    batch_size: int | None = None
    """Codes per minibatch. None: at least four minibatches of whole images."""
    clip_range: float = 0.1
    """Ratios are clipped to 1 - clip_range .. 1 + clip_range; small, for the same reason."""
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
    """TRPO (sb3-contrib, unmodified). ral.learning_rate is for its value head; target_kl bounds the policy's step."""

    target_kl: float = 0.01
    """Bound on the mean KL per code and update; the KL of an image is T times as large."""
    n_critic_updates: int = 4
    """Passes of the value head over a rollout."""
    batch_size: int | None = None
    """Codes per minibatch of the value head. None: at least four minibatches of whole images."""
    gae_lambda: float = 1.0
    """GAE's lambda. 1: the value head starts from nothing, and bootstrapping on it would only be bias."""
    cg_max_steps: int = 10
    """Conjugate gradient steps; each costs one forward and two backward passes."""
    cg_damping: float = 0.1
    """Damping added to the Fisher matrix's diagonal."""
    line_search_max_iter: int = 10
    """Most step sizes that the line search tries."""
    sub_sampling_factor: int = 1
    """The policy's step uses one in this many codes."""


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
    """The fields of a section that differ from their defaults, with their values."""
    pairs = ((field, getattr(section, field.name)) for field in fields(section))
    return {field.name: value for field, value in pairs if value != field.default}


def check_section(name: str, section: Any) -> None:
    """Refuse settings of one algorithm that would have no effect.

    Raises:
        ConfigError: an entropy target without a coefficient to steer, a schedule without a target, or the weight of a
            value head that is not trained.
    """
    if isinstance(section, EntropyConfig):
        target = section.entropy_target
        if target is not None and not section.ent_coef:
            raise ConfigError(
                f"ral.{name}.entropy_target is {target}, but ral.{name}.ent_coef, which it adapts, is 0: set that "
                "too, for instance to 2.2e-3"
            )
        if section.entropy_schedule and target is None:
            raise ConfigError(f"ral.{name}.entropy_schedule needs ral.{name}.entropy_target: give a target, or `start`")
    if isinstance(section, ReinforceConfig) and section.baseline != "value" and "vf_coef" in changed_settings(section):
        raise ConfigError(
            f"ral.{name}.vf_coef is {section.vf_coef}, but only ral.{name}.baseline value trains a value head"
        )


def upgraded(ral: Any) -> Any:
    """Convert section `ral` of a config.json from before algorithms had sections, with the same effect.

    REINFORCE's baseline was a shared setting, which other algorithms ignored. All but REINFORCE and GRPO also ignored
    mle_coef, kl_coef and normalize_advantage: they always normalised and used no regularisers. An old run therefore
    continues as it began.
    """
    if not isinstance(ral, dict) or "baseline" not in ral:
        return ral
    kept = {name: value for name, value in ral.items() if name != "baseline"}
    algo = kept.get("algo")
    if algo == "reinforce":
        return kept | {"reinforce": {"baseline": ral["baseline"]}}
    ignored = {} if algo == "grpo" else {"mle_coef": 0.0, "kl_coef": 0.0, "normalize_advantage": True}
    return kept | ignored
