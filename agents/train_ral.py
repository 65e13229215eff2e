"""Stage 3: MLE prior -> RAL, environment + algorithm + critic callback (Section 4)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.logger import Image, Logger, TensorBoardOutputFormat
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from ral_gym.agents.callbacks import STAGE, RunCallback, RunWriter, restore_model
from ral_gym.agents.co_trained_critic import CoTrainedCritic
from ral_gym.agents.critic_callback import CriticCallback
from ral_gym.agents.defaults import ALGORITHMS, algorithm_defaults, check_algorithm, policy_for
from ral_gym.agents.policy import PixelCNNPolicy, PriorWeights
from ral_gym.agents.vec_env import CodeVecEnv, make_sb3_env
from ral_gym.codes import CodeSet, decode_codes
from ral_gym.critic import PatchCritic
from ral_gym.figures import save_grid
from ral_gym.pixelcnn import PixelCNN
from ral_gym.run import Run, seed_everything
from ral_gym.sampler import CachedSampler
from ral_gym.storage import load_module, save_module
from ral_gym.vqvae import VQVAE

SAMPLE_EVERY = 20
"""Updates between sample grids."""


def make_agent(run: Run, env: CodeVecEnv, prior: PixelCNN, device: torch.device) -> OnPolicyAlgorithm:
    """The run's algorithm on `env`, its policy starting from the MLE prior.

    Raises:
        ConfigError: an unknown algorithm.
    """
    config = run.config.ral
    check_algorithm(config.algo)
    arguments = algorithm_defaults(config.algo, env)
    arguments |= {
        "learning_rate": config.learning_rate,
        "gamma": config.gamma,
        "max_grad_norm": config.max_grad_norm,
        "policy_kwargs": {
            "prior": PriorWeights.of(prior),
            "optimizer_kwargs": {"betas": (config.adam_beta1, config.adam_beta2)},
        },
        "seed": run.config.seed * 1000 + 4,
        "device": device,
    }
    if config.algo == "reinforce":
        arguments |= {
            "baseline": config.baseline,
            "normalize_advantage": config.normalize_advantage,
            "mle_coef": config.mle_coef,
            "kl_coef": config.kl_coef,
        }
    elif config.algo == "grpo":
        arguments |= {"mle_coef": config.mle_coef, "kl_coef": config.kl_coef}
    elif config.algo == "trpo":
        del arguments["max_grad_norm"]  # its trust region does that
    return ALGORITHMS[config.algo](policy_for(config.algo), env, **arguments)  # type: ignore[return-value]


def make_critic(run: Run, vqvae: VQVAE, codes: CodeSet, device: torch.device) -> CoTrainedCritic:
    """The run's critic, untrained."""
    config = run.config.critic
    critic = PatchCritic(vqvae.image_size, vqvae.channels, hidden_units=config.hidden_units, layers=config.layers)
    return CoTrainedCritic(
        vqvae,
        critic,
        codes.train,
        codes.test,
        config,
        reward=run.config.ral.reward,
        normalization=run.config.ral.reward_normalization,
        seed=run.config.seed * 1000 + 5,
        device=device,
    )


def train_ral(
    run: Run, vqvae: VQVAE, prior: PixelCNN, codes: CodeSet, device: torch.device, progress: bool = True
) -> tuple[PixelCNN, PixelCNN]:
    """Train, or continue, or load what is there.

    Returns:
        the policy's PixelCNN and its exponential average.

    Raises:
        DivergedError: a loss or a weight became NaN or infinite.
    """
    live, averaged = run.file("policy.safetensors"), run.file("policy_ema.safetensors")
    if live.exists() and averaged.exists() and run.has("critic.safetensors"):
        return load_module(live, PixelCNN, device, prior.config), load_module(averaged, PixelCNN, device, prior.config)
    config = run.config.ral
    seed_everything(run.config.seed * 1000 + 4)
    env = make_sb3_env(
        "ral_gym/LatentCode-v0",
        config.n_envs,
        run=str(run.path),
        reward="none",  # the callback writes the rewards of the critic it trains
        reset_mode=config.reset_mode,
        seed=run.config.seed * 1000 + 4,
        device=str(device),
    )
    critic = make_critic(run, vqvae, codes, device)
    model = make_agent(run, env, prior, device)
    critic_callback = CriticCallback(critic)
    run_callback = RunCallback(
        run,
        critic_callback,
        config.n_updates,
        draw_samples=lambda updates: _draw_samples(run, model, vqvae, updates),
        keep_average=lambda updates: _save_average(
            run, model, run_callback, f"checkpoints/policy_ema_{updates:05d}.safetensors"
        ),
        progress=progress,
        checkpoint_every=config.checkpoint_every,
    )
    callbacks = CallbackList([critic_callback, run_callback])
    writer = RunWriter(run, lambda: run_callback.updates)
    tensorboard = TensorBoardOutputFormat(str(run.file("tensorboard")))
    model.set_logger(Logger(None, [tensorboard, writer]))
    _resume(run, model, callbacks, run_callback)
    # The callback stops after the run's number of updates; rounds of partial generation differ in length.
    model.learn(total_timesteps=2**62, callback=callbacks, reset_num_timesteps=False)
    model.logger.close()
    _save(run, model, run_callback, critic)
    return load_module(live, PixelCNN, device), load_module(averaged, PixelCNN, device)


def _resume(run: Run, model: OnPolicyAlgorithm, callbacks: CallbackList, run_callback: RunCallback) -> None:
    """Continue from the stage's checkpoint, if any."""
    state = run.load_checkpoint(STAGE)
    callbacks.init_callback(model)
    if state is None:
        run.forget_after(STAGE, -1)
        return
    restore_model(model, state)
    run_callback.restore(state)
    run.forget_after(STAGE, run_callback.updates - 1)


def _save(run: Run, model: OnPolicyAlgorithm, run_callback: RunCallback, critic: CoTrainedCritic) -> None:
    """Write the critic, the average and the policy, in this order: the policy's file says that the stage is done."""
    facts: dict[str, Any] = {
        "normalization": critic.normalization,
        "shift": critic.normalizer.shift,
        "scale": critic.normalizer.scale,
    }
    save_module(run.file("critic.safetensors"), critic.critic, **facts)
    _save_average(run, model, run_callback, "policy_ema.safetensors")
    policy: PixelCNNPolicy = model.policy  # type: ignore[assignment]
    save_module(run.file("policy.safetensors"), policy.prior, updates=run_callback.updates)


def _save_average(run: Run, model: OnPolicyAlgorithm, run_callback: RunCallback, name: str) -> None:
    """Write the PixelCNN of the policy's exponential average."""
    policy: PixelCNNPolicy = model.policy  # type: ignore[assignment]
    average = run_callback.average
    assert average is not None
    start = "prior."
    weights = {name.removeprefix(start): w for name, w in average.weights.items() if name.startswith(start)}
    save_module(run.file(name), policy.prior, weights, updates=run_callback.updates)


def _draw_samples(run: Run, model: OnPolicyAlgorithm, vqvae: VQVAE, updates: int) -> None:
    """A grid of the live policy's samples, in the run folder and in TensorBoard, without touching any random state."""
    if updates % SAMPLE_EVERY:
        return
    policy: PixelCNNPolicy = model.policy  # type: ignore[assignment]
    generator = torch.Generator(device=policy.device).manual_seed(run.config.seed)
    codes, _ = CachedSampler(policy.prior).sample(32, generator=generator)
    images = decode_codes(vqvae, codes)
    path = run.file(f"samples/ral_{updates:05d}.png")
    save_grid(path, images, columns=8, title=f"RAL, live policy, after {updates} updates")
    strip = np.concatenate(list(images[:8].numpy()), axis=2)  # (C, S, 8 S)
    model.logger.record("samples/ral", Image(strip, "CHW"), exclude=("stdout", "log", "json", "csv"))
