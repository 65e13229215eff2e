"""One documented dataclass per stage, and all of them as one `Config`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from ral_gym.config.algorithms import (
    SECTIONS,
    A2CConfig,
    GRPOConfig,
    MaskablePPOConfig,
    PPOConfig,
    ReinforceConfig,
    TRPOConfig,
    check_section,
    upgraded,
)
from ral_gym.config.fits import check_fits, check_reward_files
from ral_gym.config.models import DataConfig, PriorConfig, VQVAEConfig
from ral_gym.config.ranges import check_ranges, check_sizes
from ral_gym.errors import ConfigError
from ral_gym.schema import check_types, config_from
from ral_gym.settings import CRITIC_ALONE, Options, RewardWeights, check_prompt, check_reward_weights

REWARD_FILES = ("clip_path", "hps_path", "reward_reference")
"""Settings of `ral` that are paths of files whose content decides the rewards (`ral_gym.rewards.provenance`)."""


@dataclass(frozen=True)
class CriticConfig:
    """The critic, a PatchGAN by default (Sections 4.2 and 5.1), and its training in stage 3."""

    kind: str = "patch"
    """The critic: `patch` (PatchGAN), `causal` (the prior's network with a head, on codes: docs/rewards.md), a
    registered name, or your own `module:Class`."""
    options: Options = field(default_factory=dict)
    """Arguments of your own critic that are not settings of this section: `--critic.options NAME VALUE ..`."""
    hidden_units: int = 64
    """Channels after the first strided layer; doubled by each further layer, up to 8 times this."""
    layers: int = 4
    """Strided convolutions: the score map's side is image_size / 2**layers."""
    learning_rate: float = 1e-4
    """Adam's learning rate (Section 4.4)."""
    adam_beta1: float = 0.5
    """Adam's first moment decay (Section 4.4)."""
    adam_beta2: float = 0.999
    """Adam's second moment decay (Section 4.4)."""
    loss: Literal["wgan_gp", "hinge"] = "wgan_gp"
    """`wgan_gp` (Eq. 5) or `hinge` (no gradient penalty: a fifth of the time per step, and it learns on small sets)."""
    gradient_penalty: float = 10.0
    """Weight of the gradient penalty, lambda_gp of Eq. 5; `wgan_gp` only."""
    augment: tuple[Literal["colour", "translation", "cutout"], ...] = ()
    """Random changes of the images that the critic is trained on, real and fake alike, never of those that it scores
    (DiffAugment, Zhao et al., 2020). Usual: all three. Empty: none."""
    r1: float = 0.0
    """Weight gamma of the penalty gamma / 2 ||grad D||^2 on real images (R1, Mescheder et al., 2018); `hinge` only."""
    r1_every: int = 1
    """With r1: only every so many critic steps, weighted by as much (lazy regularisation, Karras et al., 2020)."""
    spectral_norm: bool = False
    """Divide the weights of the critic's convolutions by their largest singular values (Miyato et al., 2018)."""
    batch_size: int = 16
    """Real and as many fake images per critic step."""
    warmup_steps: int = 100
    """Critic steps before the first policy update (Section 4.4)."""
    n_critic: int = 5
    """Critic steps per policy update (Section 4.4)."""
    fakes: Literal["previous", "fresh"] = "previous"
    """Fake images that the critic is trained on: those of the previous rollout, or fresh samples. Never the images that
    it scores next."""
    replay: int = 1
    """With fakes `previous`: how many rollouts the critic is trained on, the last ones."""
    held_out: int = 256
    """Held-out images scored at every update (for AUC, gap and the scores' scale): a seeded random subset. 0: all."""
    dropout: float = 0.4
    """Of the critic `causal`, in place of the prior's."""
    weight_decay: float = 0.01
    """AdamW's, of the critic `causal`."""
    max_grad_norm: float = 1.0
    """Largest gradient norm of a step of the critic `causal`."""
    class_conditional: bool = True
    """With classes: score an image given its class (the projection of Miyato and Koyama, 2018). False: whatever its
    class. Real and fake images that it is trained on have the same classes in both cases."""


@dataclass(frozen=True)
class RALConfig:
    """Stage 3, reinforced adversarial learning (Section 4)."""

    algo: str = "reinforce"
    """`reinforce`, `grpo`, or unmodified `ppo`, `a2c` (Stable-Baselines3), `trpo`, `maskable_ppo` (sb3-contrib); a
    registered name, or your own `module:Class`."""
    options: Options = field(default_factory=dict)
    """Keyword arguments of the algorithm that are not settings here, such as those of your own algorithm."""
    reward: Literal["single", "intermediate"] = "single"
    """Eq. 6 (mean score at the end) or the score map upsampled to the code grid (Section 4.2)."""
    reward_normalization: Literal["max_abs", "standard", "none"] = "max_abs"
    """Normalise scores by max |score| over real and fake images (Section 4.4), as (score - mean real) / std, or not."""
    reward_weights: RewardWeights = field(default_factory=CRITIC_ALONE.copy)
    """Reward terms and their weights: critic, loo_fd, loo_fd_first_order, loo_fd_diagonal, kid, clip, hps, a registered
    name, or your own `module:function`. Without the term critic none is trained. Unless the only term is a critic of
    weight 1, every term is normalised over the batch before it is weighted."""
    reward_features: str = "encoder"
    """Features for terms and critics that see features: `encoder` (the tokenizer's), `pyramid` (magnitudes of a
    Laplacian pyramid), or what evaluation.extractor may be, which should be another one."""
    reward_ema: float = 0.5
    """Decay of the Frechet terms' moving averages over rollouts; 0: each rollout by itself."""
    reward_reference: str | None = None
    """Mean and covariance of real images' features (stats.npz, `ral_gym.rewards.reference`), to which the Frechet terms
    compare; None: the run's own images."""
    reward_options: Options = field(default_factory=dict)
    """Arguments that your own rewards' constructors name: `--ral.reward-options NAME VALUE ..`."""
    clip_path: str | None = None
    """Folder of a CLIP model (config.json, model.safetensors, vocab.json, merges.txt), for the rewards clip and hps."""
    hps_path: str | None = None
    """HPS_v2.1_compressed.pt, for the reward hps."""
    prompt: str = "a photo of a {name}"
    """The text of an image for the rewards clip and hps; {name} is the name of its class."""
    n_rollouts: int = 1
    """Monte-Carlo roll-outs N behind a code, whose mean reward is its action value, as in SeqGAN (Yu et al., 2017,
    Eq. 4): the episode's own end and N - 1 more completions by the policy. 1: the own end alone, as in the paper."""
    rollout_positions: int = 8
    """With n_rollouts above 1: codes per image, evenly spread from a random place on, behind which completions are
    drawn. A code between two of them has the value of the next, whose expectation is the same."""
    reset_mode: Literal["full", "continue", "scratch", "mixed"] = "mixed"
    """Partial generation (Section 4.3): full grids, continue real rows, stop early, or a random mix of both."""
    label_draw: Literal["uniform", "data"] = "uniform"
    """With classes: the class of an image that continues no real one: every class equally often, or as often as in the
    data."""
    n_envs: int = 16
    """Images drawn in parallel; the images per update."""
    n_updates: int = 1000
    """Policy updates."""
    learning_rate: float = 4e-6
    """Adam's learning rate of the policy (Section 4.4)."""
    adam_beta1: float = 0.5
    """Adam's first moment decay (Section 4.4)."""
    adam_beta2: float = 0.999
    """Adam's second moment decay (Section 4.4)."""
    gamma: float = 1.0
    """Discount. With 1 a terminal reward reaches the first code undiminished; the paper uses 0.99."""
    image_gamma: float | None = None
    """Discount of rewards of whole images where codes have rewards of their own, which gamma discounts; None: gamma."""
    normalize_advantage: bool = True
    """Divide the advantages by their standard deviation over the batch."""
    mle_coef: float = 0.0
    """Maximum likelihood on real codes: its weight in the loss of reinforce and grpo; for other algorithms, separate
    steps between updates with this fraction of the learning rate (`MLEShare`)."""
    mle_dropout: bool = False
    """With mle_coef: the prior's dropout in that term, as in stage 2; never in what the reward trains."""
    kl_coef: float = 0.0
    """Weight of KL(policy || MLE prior): in the loss of reinforce and grpo, in the rewards of other algorithms
    (`PriorKLReward`)."""
    guidance: float = 1.0
    """Scale of classifier-free guidance when images are drawn in training; 1: none. Needs a prior with classes."""
    guidance_log_probs: Literal["guided", "plain"] = "guided"
    """With guidance: updates use the log-probabilities of the guided draws (exact, two passes), or `plain` ones
    without guidance, as in Baran et al. (2026) (biased)."""
    train_levels: Literal["both", "top", "bottom"] = "both"
    """Two levels: which priors RAL tunes; the other one stays the MLE prior."""
    per_level_discount: bool = True
    """Two levels: discount the top codes by top steps only. False: one discount over the episode, as in the paper."""
    max_grad_norm: float = 1.0
    """Largest gradient norm; not for trpo."""
    ema_decay: float = 0.95
    """Decay of the exponential average of the policy's weights (row `ral`; `ral_live` is the policy itself)."""
    checkpoint_every: int = 10
    """Updates between checkpoints."""
    equal_time_control: bool = False
    """Also train the control `mle_equal_time`: maximum likelihood for as much time as RAL took, annealed."""
    reinforce: ReinforceConfig = field(default_factory=ReinforceConfig)
    """Settings of REINFORCE only."""
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    """Settings of GRPO only."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """Settings of PPO only."""
    a2c: A2CConfig = field(default_factory=A2CConfig)
    """Settings of A2C only."""
    trpo: TRPOConfig = field(default_factory=TRPOConfig)
    """Settings of TRPO only."""
    maskable_ppo: MaskablePPOConfig = field(default_factory=MaskablePPOConfig)
    """Settings of MaskablePPO only."""

    @property
    def uses_critic(self) -> bool:
        """Whether a critic is trained."""
        return "critic" in self.reward_weights

    @property
    def critic_alone(self) -> bool:
        """Whether the critic's rewards are the only rewards, as in the paper."""
        return self.reward_weights == CRITIC_ALONE


@dataclass(frozen=True)
class EvaluationConfig:
    """The results table: number of samples, features, metrics."""

    n_samples: int = 3000
    """Generated images per row of the table."""
    extractor: str = "lite0"
    """Features of FD and KID: `lite0` (EfficientNet-Lite0's block 10, offline), `inception` (Inception-v3), `encoder`
    (the tokenizer's own), a registered name, or your own `module:Class`."""
    metrics: tuple[str, ...] = ()
    """More columns of the table, by registered name or `module:function`."""
    temperatures: tuple[float, ...] = (0.8, 0.85, 0.9, 0.95)
    """Temperatures of the MLE sweep (1 is always included)."""
    guidance: tuple[float, ...] = (1.5, 2.0, 3.0)
    """Scales of classifier-free guidance at which generators of classes are sampled too (1, none, is included)."""
    held_out: int = 2000
    """Held-out images for each NLL: a seeded random subset, or all if there are fewer."""
    sampling_seeds: int = 1
    """Seeds from which each generated row is sampled. Above 1, the spread of its FD stands beside it; each further seed
    takes the time of drawing the samples and of their features."""


@dataclass(frozen=True)
class Config:
    """One run: the stages' settings, a seed and a device."""

    preset: str = "demo"
    """The preset that these settings start from: a name, `module:NAME` of your own, or a .json file."""
    data: DataConfig = field(default_factory=DataConfig)
    """Stage 0, the images."""
    vqvae: VQVAEConfig = field(default_factory=VQVAEConfig)
    """Stage 1, the tokenizer."""
    prior: PriorConfig = field(default_factory=PriorConfig)
    """Stage 2, the prior; with two levels the prior of the top codes."""
    bottom: PriorConfig = field(default_factory=PriorConfig)
    """Stage 2 of two levels: the prior of the bottom codes given the top codes. Ignored with one level."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """Stage 3, the critic and its training."""
    ral: RALConfig = field(default_factory=RALConfig)
    """Stage 3, the agent: algorithm, rewards, partial generation."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Stage 4, the results table."""
    seed: int = 0
    """Seeds every source of randomness."""

    @property
    def grid_size(self) -> int:
        """Side of the code grid, the top one if there are two."""
        return self.data.image_size // 2**self.strided_layers

    @property
    def strided_layers(self) -> int:
        """Halvings between an image and the (top) code grid."""
        if self.vqvae.kind == "vqgan":
            return str(self.vqvae.options.get("multipliers", "1,1,2,2,4")).count(",")
        return self.vqvae.layers + self.vqvae.levels - 1

    def check(self, files: bool = True) -> None:
        """Refuse settings that would only fail later, perhaps after hours; `load_images` checks the rest of `data`.

        Args:
            files: also refuse rewards without the files that they need; False for a dry run.

        Raises:
            ConfigError: a setting is of another type or out of range, or does not fit another one.
        """
        check_types(self)
        check_ranges(self)
        check_sizes(self)
        check_reward_weights(self.ral.reward_weights)
        check_prompt(self.ral.prompt)
        for name in SECTIONS:
            check_section(name, getattr(self.ral, name))
        check_fits(self)
        if files:
            check_reward_files(self.ral)

    def to_json(self) -> str:
        """The configuration as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """Rebuild a configuration from the dict that `to_json` wrote.

        Settings that older versions did not write get their defaults; those that every version wrote are required.

        Raises:
            ConfigError: a setting is unknown, missing or of another type.
        """
        if isinstance(values, dict):
            if missing := [name for name in _ALWAYS_WRITTEN if name not in values]:
                raise ConfigError(f"{missing[0]} is missing")
            values = values | {"ral": upgraded(values["ral"])}
            if limits_training_only(values):
                values = values | {"data": values["data"] | {"test_limit": 0}}
            if has_no_labels(values):
                values = values | {"data": values["data"] | {"labels": "none"}}
        return config_from(cls, values)


def limits_training_only(values: Any) -> bool:
    """Whether these are settings of a version before 0.2, whose `data.limit` applied to training images only."""
    data = values.get("data") if isinstance(values, dict) else None
    return isinstance(data, dict) and data.get("limit") is not None and "test_limit" not in data


def has_no_labels(values: Any) -> bool:
    """Whether these are settings of a version before 0.2, whose priors had no classes."""
    data = values.get("data") if isinstance(values, dict) else None
    return isinstance(data, dict) and "labels" not in data


_ALWAYS_WRITTEN = ("preset", "data", "vqvae", "prior", "critic", "ral", "evaluation", "seed")
