"""The models that the lesson on exposure bias compares (`examples/exposure_bias.py`): the same start, different cures.

The bundled light prior of `ral_gym/Oracle-v0` is continued for equally many updates of equally many images at the same
learning rate, by maximum likelihood (`mle`), scheduled sampling, RAL with a critic (`ral`), and REINFORCE with the
reward log o - log p (`true_reward`), which only an oracle can give. Two more PixelCNNs are poor on purpose.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from evidence.exposure_lesson import draw
from ral_gym.agents.algorithms.reinforce import Reinforce
from ral_gym.agents.defaults import algorithm_defaults
from ral_gym.agents.policy import PriorPolicy
from ral_gym.agents.regularizers import EntropyReward
from ral_gym.agents.rewards.co_trained_critic import CoTrainedCritic
from ral_gym.agents.rewards.critic_callback import CriticCallback
from ral_gym.agents.vec_env import make_sb3_env
from ral_gym.assets import asset_path
from ral_gym.config import PriorConfig
from ral_gym.envs.oracle import load_light_prior, load_oracle
from ral_gym.metrics import auc
from ral_gym.presets import DEMO
from ral_gym.priors.base import maximum_likelihood_loss
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.rewards.critic import PatchCritic
from ral_gym.runs.run import seed_everything
from ral_gym.runs.storage import load_module
from ral_gym.stages.levels import LevelCodes
from ral_gym.stages.scheduled_sampling import ScheduledSampling
from ral_gym.tokenizers.code_set import CodeSet
from ral_gym.tokenizers.vqvae import VQVAE

HELD_OUT = 256
"""Images of the finished policy that the critic is to tell from as many of the oracle's."""


@dataclass(frozen=True)
class Recipe:
    """How the models are trained; `examples/exposure_bias.py` describes the fields."""

    updates: int
    batch: int
    learning_rate: float
    way: Literal["none", "two_pass", "sequential"]
    share: float
    critic_warmup: int
    critic_steps: int
    mle_coef: float
    weak_steps: int


def make_model(name: str, seed: int, recipe: Recipe) -> tuple[PixelCNN, dict[str, Any]]:
    """Train one of the models.

    Args:
        name: `light` (nothing is trained), `mle`, `scheduled_sampling`, `ral`, `true_reward`, `small` or `memoriser`.
        seed: of everything.
        recipe: the settings.

    Returns:
        the model, frozen, and figures of its training: of `ral`, the AUC with which its critic tells held-out samples
        of the oracle from the finished policy's (`critic_auc`; 0.5 is chance).
    """
    seed_everything(1000 * seed + 4)
    facts: dict[str, Any] = {}
    if name == "light":
        model: PixelCNN = load_module(load_light_prior(), PixelCNN)
    elif name in ("mle", "scheduled_sampling"):
        model = continue_light("none" if name == "mle" else recipe.way, seed, recipe)
    elif name in ("ral", "true_reward"):
        model, facts = tune(name == "ral", seed, recipe)
    else:
        model = fit_poor(name, recipe)
    return model.eval().requires_grad_(False), facts


def oracle_samples() -> CodeSet:
    """The bundled samples of the oracle: 1,024 for training, 256 held out."""
    return CodeSet.load(asset_path("oracle/codes.safetensors"))


def continue_light(way: Literal["none", "two_pass", "sequential"], seed: int, recipe: Recipe) -> PixelCNN:
    """Maximum likelihood on fresh samples of the oracle, with or without scheduled sampling; no sample twice."""
    size, steps = recipe.batch, recipe.updates
    codes = draw(load_oracle(), steps * size, 1000 * seed + 5)  # (N, T)
    model: PixelCNN = load_module(load_light_prior(), PixelCNN).requires_grad_(True).train()
    config = replace(PriorConfig(), scheduled_sampling=way, scheduled_sampling_share=recipe.share)
    sampling = ScheduledSampling(model, config, steps)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    for step in range(1, steps + 1):
        loss = sampling.loss(model, LevelCodes(codes[(step - 1) * size : step * size]), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def tune(with_critic: bool, seed: int, recipe: Recipe) -> tuple[PixelCNN, dict[str, Any]]:
    """REINFORCE on the oracle's environment, with a critic's scores for a reward or with log o - log p."""
    critic = make_critic(seed, recipe) if with_critic else None
    env = make_sb3_env("ral_gym/Oracle-v0", recipe.batch, seed=seed, reward="step" if critic is None else "none")
    settings = algorithm_defaults("reinforce", env, prior=load_light_prior())
    settings |= {"learning_rate": recipe.learning_rate, "seed": 1000 * seed + 4, "device": "cpu"}
    if critic is not None:
        settings |= {"gamma": DEMO.ral.gamma, "mle_coef": recipe.mle_coef}  # scores lie near the codes they judge
    model = Reinforce(PriorPolicy, env, **settings)
    callback = EntropyReward() if critic is None else CriticCallback(critic)
    model.learn(load_oracle().grid.n_codes * recipe.batch * recipe.updates, callback=callback)
    env.close()
    policy = cast(PixelCNN, model.policy.prior)
    if critic is None:
        return policy, {}
    own = draw(policy, HELD_OUT, 1000 * seed + 6)
    real, fake = (critic.score_map(codes).flatten(1).mean(1) for codes in (critic.held_out_codes, own))
    return policy, {"critic_auc": auc(real, fake)}


def make_critic(seed: int, recipe: Recipe) -> CoTrainedCritic:
    """A critic of decoded samples of the oracle: that of the preset `demo`, with other numbers of steps."""
    vqvae, codes = load_module(asset_path("faces/vqvae.safetensors"), VQVAE), oracle_samples()
    config = replace(DEMO.critic, warmup_steps=recipe.critic_warmup, n_critic=recipe.critic_steps)
    network = PatchCritic(vqvae.image_size, vqvae.channels, hidden_units=config.hidden_units, layers=config.layers)
    return CoTrainedCritic(vqvae, network, codes.train, codes.test, config, reward=DEMO.ral.reward, seed=seed)


def fit_poor(name: str, recipe: Recipe) -> PixelCNN:
    """Maximum likelihood from scratch, with too few units (`small`) or too few images (`memoriser`)."""
    grid, units, layers, n = load_oracle().grid, *((8, 1, 1024) if name == "small" else (32, 2, 64))
    codes: Tensor = torch.from_numpy(oracle_samples().train[:n]).long()  # (N, T)
    model = PixelCNN(
        grid.codebook_size,
        grid.height,
        grid.width,
        hidden_units=units,
        residual_units=units,
        layers=layers,
        dropout=0.0,
        output_stack_layers=1,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.weak_steps)
    for _ in range(recipe.weak_steps):
        loss = maximum_likelihood_loss(model, codes[torch.randint(len(codes), (64,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model
