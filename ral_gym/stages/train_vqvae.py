"""Stage 1: images -> tokenizer, by default a VQ-VAE or VQ-VAE-2 (Section 3; the supplement's Tables 4c to 10c)."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ral_gym.data.images import ImageSet, augment, float_batch
from ral_gym.grid import CodeGrid
from ral_gym.metrics import perplexity
from ral_gym.runs.event_log import open_event_log
from ral_gym.runs.progress import progress_bar
from ral_gym.runs.run import Run, seed_everything
from ral_gym.runs.storage import config_arguments
from ral_gym.stages.boards import PROGRESS, FirstImages, add_reconstructions, due
from ral_gym.stages.common import (
    Clock,
    UnseenLosses,
    check_finite,
    check_weights,
    make_adam,
    restore_optimizer,
    step_of,
)
from ral_gym.stages.image_losses import ImageLosses, TrainingStep
from ral_gym.stages.processes import Compute, JointBatches, make_accelerator, partners
from ral_gym.tokenizers.base import LOOP, load_tokenizer, save_tokenizer, tokenizer_of

STAGE = "vqvae"
LOG_EVERY = 10
SHOWN = ("reconstruction_error", "perplexity", "loss")
"""What the progress bar shows."""
REMEDY = "lower vqvae.learning_rate"


def build_vqvae(run: Run, images: ImageSet) -> Any:
    """The untrained tokenizer of the run's configuration."""
    return tokenizer_of(run.config, images.image_size, images.channels)


@partners()
def train_vqvae(
    run: Run, images: ImageSet, device: torch.device, progress: bool = True, compute: Compute | None = None
) -> Any:
    """Train, continue or load the run's tokenizer; several processes share the work.

    A VQ-VAE's loss is the mean squared error plus the commitment loss (weight beta); the codebook moves by its own
    exponential average. `vqvae.perceptual_weight` and `vqvae.adversarial_weight` add to any tokenizer's loss
    (`ral_gym.stages.image_losses`). Logged every 10 steps: `loss`, `reconstruction_error` (mean squared error),
    `perplexity` and `code_usage` (share of the codebook used; of both, with two levels) of the batch, `perceptual`,
    `adversarial` and `discriminator_loss`, `_real` and `_fake` (mean scores). TensorBoard also has held-out images
    above their reconstructions. A tokenizer without `training_loss` is trained by its own `fit`, or used as it is.

    Raises:
        ConfigError: the batch cannot be divided evenly.
        DivergedError: the loss became NaN or infinite.
        RunError: another process is gone.
    """
    file, config, compute = run.file("vqvae.safetensors"), run.config.vqvae, compute or Compute()
    if file.exists():
        return load_tokenizer(file, device, build_vqvae(run, images).config)
    seed_everything(run.config.seed * 1000 + 1)
    accelerator = make_accelerator(device, compute)  # before the model: a new codebook checks for a process group
    main = accelerator.is_main_process
    vqvae = build_vqvae(run, images)
    if not hasattr(vqvae, "training_loss"):
        return _fit(run, vqvae, images, accelerator, progress)
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = make_adam(vqvae, config.learning_rate, betas)
    losses = ImageLosses(config, vqvae, accelerator)
    model = accelerator.prepare(TrainingStep(vqvae, losses))  # not the optimizer, see `make_accelerator`
    n_parts = compute.gradient_accumulation
    batches = JointBatches(accelerator, len(images.train), config.batch_size, n_parts, "vqvae.batch_size")
    batches.join_codebooks(vqvae)
    start = _resume(run, vqvae, optimizer, losses, batches)
    clock = Clock(run, STAGE)
    shown = images.test if len(images.test) else images.train
    writer = None
    if main:
        run.forget_after(STAGE, start)
        writer = open_event_log(run.path, STAGE, start)
    first = FirstImages(run.file(PROGRESS), vqvae, images.train, config.training_steps, quiet=not progress)
    steps = progress_bar(
        range(start + 1, config.training_steps + 1),
        desc="1 VQ-VAE",
        initial=start,
        total=config.training_steps,
        disable=not (progress and main),
        unit="step",
    )
    vqvae.train()
    unseen = UnseenLosses(LOG_EVERY)
    for step in steps:
        optimizer.zero_grad()
        parts: list[tuple[Tensor, dict[str, Tensor]]] = []
        for number, rows in enumerate(batches.draw()):
            batch = float_batch(images.train[rows.numpy()], accelerator.device)  # (B, C, S, S)
            if config.augment:
                batch = augment(batch, torch.default_generator)
            with batches.part(model, number):
                loss, logged, painted = model(batch, step)
                for value, at in unseen.add(loss, step, last=step == config.training_steps):
                    check_finite(value, STAGE, at, REMEDY)
                accelerator.backward(loss / n_parts)
            logged |= losses.learn(batch, painted, step, batches, number)
            parts.append((loss.detach(), logged))
        optimizer.step()
        losses.update(step)
        if step % LOG_EVERY == 0:
            metrics = _metrics(batches, parts, vqvae.grid)
            if writer is not None:
                run.log(STAGE, step, metrics)
                for name, value in metrics.items():
                    writer.add_scalar(f"vqvae/{name}", value, step)
                steps.set_postfix({name: f"{metrics[name]:.4g}" for name in SHOWN if name in metrics})
        if writer is not None and due(step, config.training_steps):
            add_reconstructions(writer, "vqvae/real_and_reconstruction", vqvae, shown, step)
        if writer is not None:
            first.show(step)
        if main and clock.due():
            if writer is not None:
                writer.flush()  # a checkpoint must not be ahead of the log
            _save(run, step, vqvae, optimizer, losses, batches)
            clock.book()
    if writer is not None:
        writer.close()
        check_weights(vqvae, STAGE, config.training_steps, REMEDY)
        save_tokenizer(file, vqvae, images=images.description)
        clock.book()
    accelerator.wait_for_everyone()
    return load_tokenizer(file, device)


def _fit(run: Run, tokenizer: Any, images: ImageSet, accelerator: Accelerator, progress: bool) -> Any:
    """Train a tokenizer by its own `fit`, in process 0 only; one without `fit` is used as it is."""
    file, clock = run.file("vqvae.safetensors"), Clock(run, STAGE)
    if accelerator.is_main_process:
        tokenizer.to(accelerator.device)
        if hasattr(tokenizer, "fit"):
            given = {"seed": run.config.seed, "progress": progress}
            given |= config_arguments(run.config.vqvae, LOOP)
            taken = inspect.signature(tokenizer.fit).parameters
            tokenizer.fit(images.train, **{name: value for name, value in given.items() if name in taken})
        check_weights(tokenizer, STAGE, 1, "check the tokenizer's own training")
        save_tokenizer(file, tokenizer, images=images.description)
        clock.book()
    accelerator.wait_for_everyone()
    return load_tokenizer(file, accelerator.device)


def _metrics(batches: JointBatches, parts: list[tuple[Tensor, dict[str, Tensor]]], grid: CodeGrid) -> dict[str, float]:
    """Metrics of a step for the log: means over all parts and processes, and usage of the codes (B, T)."""
    values = {name: [logged[name] for _, logged in parts] for name in parts[0][1]}
    codes = values.pop("codes", None)
    found = batches.means({"loss": [loss for loss, _ in parts], **values})
    if codes is not None:
        levels, size, n = grid.split(batches.gather(codes).cpu()), grid.codebook_size, grid.levels
        found["perplexity"] = sum(perplexity(level, size) for level in levels) / n
        found["code_usage"] = sum(level.unique().numel() for level in levels) / (n * size)
    return found


def _save(
    run: Run, step: int, vqvae: nn.Module, optimizer: torch.optim.Optimizer, losses: ImageLosses, batches: JointBatches
) -> None:
    check_weights(vqvae, STAGE, step, REMEDY)
    state = {"step": step, "model": vqvae.state_dict(), "optimizer": optimizer.state_dict()}
    run.save_checkpoint(STAGE, state | losses.state_dict(step) | batches.state_dict())


def _resume(
    run: Run, vqvae: nn.Module, optimizer: torch.optim.Optimizer, losses: ImageLosses, batches: JointBatches
) -> int:
    """Load the stage's checkpoint, if any; returns its step, or 0."""
    state = run.load_checkpoint(STAGE)
    if state is None:
        return 0
    with run.restoring(STAGE):
        vqvae.load_state_dict(state["model"])
        restore_optimizer(optimizer, state["optimizer"])
        losses.load_state_dict(state)
        batches.load_state_dict(state)
        return step_of(state, run.config.vqvae.training_steps)
