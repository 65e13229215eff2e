"""Stage 3: MLE prior -> RAL, from environment, algorithm and reward callback (Section 4; other rewards by name)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from ral_gym.agents.algorithm import check_stage, find_algorithm
from ral_gym.agents.callbacks import STAGE, RunCallback, RunEventLog, RunWriter, restore_model
from ral_gym.agents.check_processes import CheckProcesses
from ral_gym.agents.policy import PriorPolicy, PriorWeights
from ral_gym.agents.rewards.co_trained_critic import CoTrainedCritic
from ral_gym.agents.rewards.composite import CompositeReward
from ral_gym.agents.rewards.critic_callback import CriticCallback
from ral_gym.agents.rewards.monte_carlo import MonteCarloReturns
from ral_gym.agents.vec_env import CodeVecEnv, make_sb3_env
from ral_gym.config import CriticConfig
from ral_gym.errors import ConfigError, RunError
from ral_gym.metrics import Extractor
from ral_gym.pictures import save_grid
from ral_gym.presets import PRESETS
from ral_gym.priors.base import Prior, config_of, load_prior, save_prior
from ral_gym.priors.guidance import check_guidance
from ral_gym.priors.sampler import make_sampler
from ral_gym.registry import load_plugins
from ral_gym.rewards.making import build_critic, save_critic
from ral_gym.rewards.options import reward_options
from ral_gym.rewards.provenance import check_reward_files, keep_reward_files
from ral_gym.rewards.reference import load_reference
from ral_gym.rewards.scorer import find_features
from ral_gym.runs.hub import local_folder
from ral_gym.runs.run import Run, random_state, read_config, seed_everything, set_random_state
from ral_gym.runs.sharing import Processes
from ral_gym.stages.device import resolve_device
from ral_gym.stages.levels import load_generator, load_vqvae
from ral_gym.stages.processes import partners
from ral_gym.tokenizers.base import Tokenizer, device_of
from ral_gym.tokenizers.code_set import CodeSet, decode_codes

SAMPLE_EVERY = 20
"""Updates between sample grids."""


def make_agent(
    run: Run, env: CodeVecEnv, prior: Prior, device: torch.device, processes: Processes | None = None
) -> OnPolicyAlgorithm:
    """The run's algorithm on `env`, its policy starting from the MLE prior.

    Raises:
        ConfigError: an unknown algorithm, or settings that have no effect on it.
    """
    config = run.config.ral
    check_stage(config, [prior])
    check_guidance(prior, config.guidance)
    algorithm = find_algorithm(config.algo)
    arguments = algorithm.stage_keywords(env, config) | {
        "rollout_buffer_kwargs": {
            "levels": env.levels,
            "per_level_discount": config.per_level_discount,
            "image_gamma": config.image_gamma,
        },
        "policy_kwargs": {
            "prior": PriorWeights.of(prior),
            "levels": env.levels,
            "train_levels": config.train_levels,
            "guidance": config.guidance,
            "guidance_log_probs": config.guidance_log_probs,
            "optimizer_kwargs": {"betas": (config.adam_beta1, config.adam_beta2)},
            "processes": processes,
        },
        "seed": run.config.seed * 1000 + 4,
        "device": device,
    }
    return algorithm.cls(algorithm.policy, env, **arguments)  # type: ignore[return-value]


def reward_features(run: Run, vqvae: Tokenizer) -> Extractor | None:
    """The extractor `ral.reward_features` of critics and terms that see features; None if the tokenizer has none."""
    return find_features(run.config.ral.reward_features, vqvae, device_of(vqvae))


def make_critic(
    run: Run,
    vqvae: Tokenizer,
    codes: CodeSet,
    device: torch.device,
    prior: Prior | None = None,
    extractor: Extractor | None = None,
    processes: Processes | None = None,
) -> CoTrainedCritic:
    """The run's critic, untrained; with classes if the `prior` has them.

    Raises:
        ConfigError: an unknown kind, or settings and options that it does not take.
    """
    config = run.config.critic
    make_prior = None if prior is None else lambda: prior
    preset = PRESETS[run.config.preset].critic if run.config.preset in PRESETS else CriticConfig()
    classes = 0 if prior is None else prior.grid.classes
    grid = replace(vqvae.grid, classes=classes)
    critic = build_critic(
        config, vqvae, extractor=extractor, make_prior=make_prior, untouched=(preset,), classes=classes
    )
    return CoTrainedCritic(
        vqvae,
        critic,
        codes.sequences("train", grid),
        codes.sequences("held_out", grid),
        config,
        reward=run.config.ral.reward,
        normalization=run.config.ral.reward_normalization,
        seed=run.config.seed * 1000 + 5,
        device=device,
        extractor=extractor,
        classes=classes,
        processes=processes,
    )


def make_reward(
    run: Run, critic: CoTrainedCritic | None, extractor: Extractor | None = None
) -> CriticCallback | CompositeReward:
    """The reward callback: the paper's, or a sum of the terms of `ral.reward_weights`, each normalised separately.

    Raises:
        ConfigError: a term that is unknown, or that only a file names.
    """
    config = run.config.ral
    if critic is not None and config.critic_alone:
        return CriticCallback(critic)
    return CompositeReward(
        config.reward_weights,
        critic=critic,
        extractor=extractor,
        evaluation_extractor=run.config.evaluation.extractor,
        statistics=None if config.reward_reference is None else load_reference(config.reward_reference),
        options=reward_options(run.config),
        ema=config.reward_ema,
        seed=run.config.seed * 1000 + 8,
    )


@dataclass
class Stage:
    """The running parts of stage 3.

    Attributes:
        model: the algorithm on its environment; `model.policy.optimizer` is the policy's optimizer.
        critic: the critic and its optimizer; None if there is no critic reward.
        reward_callback: writes the rewards.
        run_callback: the weight average, the log, the checkpoints; `run_callback.updates` counts policy updates.
        regularizers: callbacks for those that the algorithm's loss does not have; first roll-outs, if there are any.
    """

    model: OnPolicyAlgorithm
    critic: CoTrainedCritic | None
    reward_callback: CriticCallback | CompositeReward
    run_callback: RunCallback
    regularizers: list[BaseCallback] = field(default_factory=list)

    @property
    def callbacks(self) -> CallbackList:
        """The callbacks for `model.learn`."""
        own = self.run_callback
        found: list[BaseCallback] = [self.reward_callback, *self.regularizers, own]
        if own.processes.size > 1:
            found.append(CheckProcesses(facts={"settings": own.run.config.to_json()}, state=own.compared))
        return CallbackList(found)


def make_stage(
    run: Run,
    vqvae: Tokenizer,
    prior: Prior,
    codes: CodeSet | None,
    device: torch.device,
    progress: bool = True,
    processes: Processes | None = None,
) -> Stage:
    """Environment, algorithm, rewards and callbacks of a run, before their first step; `codes` None: no images.

    Raises:
        ConfigError: settings without effect, that do not fit the prior, or fewer environments than processes.
    """
    config, processes = run.config.ral, processes or Processes()
    if config.n_envs < processes.size:
        raise ConfigError(
            f"ral.n_envs is {config.n_envs}, but {processes.size} processes share the images of an update: start at "
            f"most {config.n_envs}, or raise ral.n_envs"
        )
    if config.label_draw != "uniform" and not prior.grid.classes:
        raise ConfigError(f"ral.label_draw is {config.label_draw}, but the prior has no classes: leave it out")
    seed_everything(run.config.seed * 1000 + 4)
    env = make_sb3_env(
        "ral_gym/LatentCode-v0",
        config.n_envs,
        run=str(run.path),
        reward="none",  # the callback writes them at the end of a rollout
        reset_mode=config.reset_mode,
        seed=run.config.seed * 1000 + 4,
        device=str(device),
        label_draw=config.label_draw,
    )
    extractor = reward_features(run, vqvae)
    critic = None
    if config.uses_critic:
        if codes is None:
            raise ConfigError(f"{run.path} has no codes of real images to train a critic on: leave the critic out")
        critic = make_critic(run, vqvae, codes, device, prior, extractor, processes)
    model = make_agent(run, env, prior, device, processes)
    reward_callback = make_reward(run, critic, extractor)
    regularizers = find_algorithm(config.algo).callbacks(
        config, PriorWeights.of(prior), lambda: (run_callback.updates + 1) / config.n_updates
    )
    if config.n_rollouts > 1:
        seed = run.config.seed * 1000 + 9
        rollouts = MonteCarloReturns(reward_callback, config.n_rollouts, config.rollout_positions, seed=seed)
        regularizers.insert(0, rollouts)  # right behind the rewards, whose returns it replaces
    run_callback = RunCallback(
        run,
        reward_callback,
        config.n_updates,
        draw_samples=lambda updates: _draw_samples(run, model, vqvae, updates, board),
        keep_average=lambda updates: _save_average(
            run, model, run_callback, f"checkpoints/policy_ema_{updates:05d}.safetensors"
        ),
        progress=progress,
        checkpoint_every=config.checkpoint_every,
        regularizers=regularizers,
        processes=processes,
    )
    board, writer = RunEventLog(run), RunWriter(run, lambda: run_callback.updates)
    model.set_logger(Logger(None, [board, writer] if processes.main else []))
    return Stage(model, critic, reward_callback, run_callback, regularizers)


def train_ral(
    run: Run, vqvae: Tokenizer, prior: Prior, codes: CodeSet | None, device: torch.device, progress: bool = True
) -> tuple[Prior, Prior]:
    """Train, continue or load stage 3; all processes that ``torchrun`` started share the work.

    Returns:
        the policy's network and its exponential average.

    Raises:
        DivergedError: a loss or a weight became NaN or infinite.
        RunError: another process is gone, or is not where this one is.
    """
    live, averaged = run.file("policy.safetensors"), run.file("policy_ema.safetensors")
    if live.exists() and averaged.exists() and (run.has("critic.safetensors") or not run.config.ral.uses_critic):
        done, average = (load_prior(file, device, config_of(prior)) for file in (live, averaged))
        return done, average
    with partners():
        processes = Processes.join(device)
        if processes.main:
            keep_reward_files(run)
        processes.wait()
        stage = make_stage(run, vqvae, prior, codes, device, progress, processes)
        _resume(run, stage)
        # The callback stops after the run's number of updates; rounds of partial generation differ in length.
        stage.model.learn(2**62, stage.callbacks, log_interval=1, reset_num_timesteps=False)  # A2C logs one in 100
        if processes.main:
            stage.model.logger.close()
            stage.run_callback.save()
            _save(run, stage)
        processes.wait()
    return load_prior(live, device), load_prior(averaged, device)


def load_run(path: Path | str, device: str = "auto", restore_random: bool = True, plugins: Sequence[str] = ()) -> Stage:
    """Stage 3 of a run folder from its checkpoint: policy, critic, optimizers, average, environment, random states.

    Reads safetensors and JSON only, and never unpickles. ``stage.model.learn(..., callback=stage.callbacks,
    reset_num_timesteps=False)`` continues training, and returns at once if the run is finished.

    Args:
        path: a run folder with stages 1 and 2, and a checkpoint of stage 3; or ``hf://user/name``, also with
            ``@revision``: a run on the hub, kept in ~/.cache/ral_gym/hub.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        restore_random: also set the global random states of Python, NumPy and torch.
        plugins: modules that register parts, or ``module:Class`` names that the run's files may use.

    Raises:
        ConfigError: a plug-in that cannot be imported, or a file that names code whose import was not allowed.
        RunError: not a run folder, a stage is missing or damaged, or the hub cannot be reached or refuses.
        DeviceError: a device that does not exist here.
    """
    load_plugins(plugins)
    path = local_folder(path)
    run, where = Run(path, read_config(path)), resolve_device(device)
    if not run.has(f"checkpoints/{STAGE}.safetensors"):
        raise RunError(f"{run.path} has no checkpoint of stage 3 (checkpoints/{STAGE}.safetensors): train it first")
    check_reward_files(run)
    vqvae, prior = load_vqvae(run, where), load_generator(run, "prior", where)
    codes = CodeSet.load(run.file("codes.safetensors"), vqvae.grid) if run.config.data.has_images else None
    before = random_state()
    stage = make_stage(run, vqvae, prior, codes, where, progress=False)
    _restore(run, stage)
    if not restore_random:
        set_random_state(before)
    return stage


def _resume(run: Run, stage: Stage) -> None:
    """Continue from the stage's checkpoint, if any."""
    last = stage.run_callback.updates - 1 if _restore(run, stage) else -1
    if stage.run_callback.processes.main:
        run.forget_after(STAGE, last)


def _restore(run: Run, stage: Stage) -> bool:
    """Put everything back to where the stage's checkpoint was taken; False if there is none."""
    stage.callbacks.init_callback(stage.model)  # first: it may draw random numbers, and the checkpoint has their state
    state = run.load_checkpoint(STAGE)
    if state is None:
        return False
    with run.restoring(STAGE):
        restore_model(stage.model, state)
        stage.run_callback.restore(state)
    return True


def _save(run: Run, stage: Stage) -> None:
    """Write the critic if any, the average, and the policy last: its file says that the stage is done."""
    critic, model = stage.critic, stage.model
    if critic is not None:
        save_critic(run.file("critic.safetensors"), critic.scorer, run.config.critic.kind)
    _save_average(run, model, stage.run_callback, "policy_ema.safetensors")
    policy: PriorPolicy = model.policy  # type: ignore[assignment]
    save_prior(run.file("policy.safetensors"), policy.prior, updates=stage.run_callback.updates)


def _save_average(run: Run, model: OnPolicyAlgorithm, run_callback: RunCallback, name: str) -> None:
    """Write the prior of the policy's exponential average."""
    policy: PriorPolicy = model.policy  # type: ignore[assignment]
    average = run_callback.average
    assert average is not None
    start = "prior."
    weights = {name.removeprefix(start): w for name, w in average.weights.items() if name.startswith(start)}
    save_prior(run.file(name), policy.prior, weights, updates=run_callback.updates)


def _draw_samples(run: Run, model: OnPolicyAlgorithm, vqvae: Tokenizer, updates: int, board: RunEventLog) -> None:
    """A grid of the live policy's samples, in the run folder and in TensorBoard, without touching any random state."""
    if updates % SAMPLE_EVERY:
        return
    policy: PriorPolicy = model.policy  # type: ignore[assignment]
    generator = torch.Generator(device=policy.device).manual_seed(run.config.seed)
    grid = policy.prior.grid
    start = torch.full((32, grid.n_codes), grid.not_drawn, device=policy.device)
    if grid.classes:  # the classes in turn
        start = grid.with_labels(start, torch.arange(32, device=policy.device) % grid.classes)
    codes, _ = make_sampler(policy.prior).sample(codes=start, generator=generator)
    images = decode_codes(vqvae, codes)
    path = run.file(f"samples/ral_{updates:05d}.png")
    save_grid(path, images, columns=8, title=f"RAL, live policy, after {updates} updates")
    strip = np.concatenate(list(images[:8].numpy()), axis=2)  # (C, S, 8 S)
    board.add_picture("samples/ral", strip, model.num_timesteps)
