"""Stage 1: images -> VQ-VAE, or VQ-VAE-2 of two levels (Section 3; the supplement's Tables 4c to 10c)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ral_gym.config import Config
from ral_gym.data.images import ImageSet, augment, to_float
from ral_gym.grid import CodeGrid
from ral_gym.metrics import perplexity
from ral_gym.runs.event_log import open_event_log
from ral_gym.runs.run import Run, seed_everything
from ral_gym.runs.storage import config_arguments, load_module, save_module
from ral_gym.stages.boards import add_reconstructions, due
from ral_gym.stages.common import Clock, check_finite, check_weights, restore_optimizer, step_of
from ral_gym.stages.processes import Compute, JointBatches, make_accelerator, partners
from ral_gym.tokenizers.vqvae import VQVAE
from ral_gym.tokenizers.vqvae2 import vqvae_class

STAGE = "vqvae"
LOG_EVERY = 10
REMEDY = "lower vqvae.learning_rate"


def build_vqvae(run: Run, images: ImageSet) -> VQVAE:
    """The untrained model of the run's configuration."""
    return vqvae_of(run.config, images.image_size, images.channels)


def vqvae_of(config: Config, image_size: int, channels: int) -> VQVAE:
    """The untrained model of a configuration, for such images."""
    names = (
        "codebook_size",
        "codebook_dim",
        "hidden_units",
        "residual_units",
        "residual_blocks",
        "layers",
        "beta",
        "encoder_filter_size",
        "decoder_filter_size",
        "decay",
        "threshold_ema_dead_code",
    )
    cls = vqvae_class(config.vqvae.levels)
    return cls(image_size, channels, **config_arguments(config.vqvae, names))


@partners()
def train_vqvae(
    run: Run, images: ImageSet, device: torch.device, progress: bool = True, compute: Compute | None = None
) -> VQVAE:
    """Train, or continue, or load what is there; all processes together where there are several.

    The loss is the mean squared error plus the commitment loss (weight beta); the codebook moves by its own
    exponential average. Logged every 10 steps: `loss`, `reconstruction_error` (mean squared error), `perplexity` and
    `code_usage` (share of the codebook used; of both, with two levels) of the batch. TensorBoard also has held-out
    images above their reconstructions.

    Raises:
        ConfigError: the batch cannot be shared out evenly.
        DivergedError: the loss became NaN or infinite.
        RunError: another process is gone.
    """
    file, config, compute = run.file("vqvae.safetensors"), run.config.vqvae, compute or Compute()
    cls = vqvae_class(config.levels)
    if file.exists():
        return load_module(file, cls, device, build_vqvae(run, images).config)
    seed_everything(run.config.seed * 1000 + 1)
    accelerator = make_accelerator(device, compute)  # before the model: a codebook asks whether there are processes
    main = accelerator.is_main_process
    vqvae = build_vqvae(run, images)
    optimizer = torch.optim.Adam(vqvae.parameters(), lr=config.learning_rate)
    model, optimizer = accelerator.prepare(vqvae, optimizer)
    n_parts = compute.gradient_accumulation
    batches = JointBatches(accelerator, len(images.train), config.batch_size, n_parts, "vqvae.batch_size")
    batches.join_codebooks(vqvae)
    start = _resume(run, vqvae, optimizer, batches)
    clock = Clock(run, STAGE)
    shown = images.test if len(images.test) else images.train
    writer = None
    if main:
        run.forget_after(STAGE, start)
        writer = open_event_log(run.path, STAGE, start)
    steps = tqdm(
        range(start + 1, config.training_steps + 1),
        desc="1 VQ-VAE",
        initial=start,
        total=config.training_steps,
        disable=not (progress and main),
        unit="step",
    )
    vqvae.train()
    for step in steps:
        optimizer.zero_grad()
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for number, rows in enumerate(batches.draw()):
            batch = to_float(torch.from_numpy(images.train[rows.numpy()]))  # (B, C, S, S)
            if config.augment:
                batch = augment(batch, torch.default_generator)
            batch = batch.to(accelerator.device)
            with batches.part(model, number):
                reconstruction, codes, commitment = model(batch)
                error = F.mse_loss(reconstruction, batch)
                loss = error + commitment
                check_finite(loss, STAGE, step, REMEDY)
                accelerator.backward(loss / n_parts)
            parts.append((loss.detach(), error.detach(), codes))
        optimizer.step()
        if step % LOG_EVERY == 0:
            figures = _figures(batches, parts, vqvae.grid)
            if writer is not None:
                run.log(STAGE, step, figures)
                for name, figure in figures.items():
                    writer.add_scalar(f"vqvae/{name}", figure, step)
                error_text = f"{figures['reconstruction_error']:.4f}"
                steps.set_postfix(error=error_text, perplexity=f"{figures['perplexity']:.0f}")
        if writer is not None and due(step, config.training_steps):
            add_reconstructions(writer, "vqvae/real_and_reconstruction", vqvae, shown, step)
        if main and clock.due():
            if writer is not None:
                writer.flush()  # a checkpoint must not be ahead of the log
            _save(run, step, vqvae, optimizer, batches)
            clock.book()
    if writer is not None:
        writer.close()
        check_weights(vqvae, STAGE, config.training_steps, REMEDY)
        save_module(file, vqvae, images=images.description)
        clock.book()
    accelerator.wait_for_everyone()
    return load_module(file, cls, device)


def _figures(batches: JointBatches, parts: list[tuple[Tensor, Tensor, Tensor]], grid: CodeGrid) -> dict[str, float]:
    """What is logged of a step: the means of (loss, reconstruction error, codes (B, T)), of all parts and processes."""
    losses, errors, codes = zip(*parts, strict=True)
    levels = grid.split(batches.gather(list(codes)))
    size, n = grid.codebook_size, grid.levels
    return {
        "loss": batches.mean(list(losses)),
        "reconstruction_error": batches.mean(list(errors)),
        "perplexity": sum(perplexity(level, size) for level in levels) / n,
        "code_usage": sum(level.unique().numel() for level in levels) / (n * size),
    }


def _save(run: Run, step: int, vqvae: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: JointBatches) -> None:
    check_weights(vqvae, STAGE, step, REMEDY)
    state = {"step": step, "model": vqvae.state_dict(), "optimizer": optimizer.state_dict()}
    run.save_checkpoint(STAGE, state | batches.state_dict())


def _resume(run: Run, vqvae: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: JointBatches) -> int:
    """Load the stage's checkpoint, if any; the step it was taken at."""
    state = run.load_checkpoint(STAGE)
    if state is None:
        return 0
    with run.restoring(STAGE):
        vqvae.load_state_dict(state["model"])
        restore_optimizer(optimizer, state["optimizer"])
        batches.load_state_dict(state)
        return step_of(state, run.config.vqvae.training_steps)
