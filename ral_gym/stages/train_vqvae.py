"""Stage 1: images -> VQ-VAE (Section 3; the supplement's Table 4c)."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ral_gym.data import ImageSet, augment, to_float
from ral_gym.metrics import perplexity
from ral_gym.run import Run, seed_everything
from ral_gym.stages.common import Clock, check_finite, check_weights, make_accelerator
from ral_gym.storage import config_arguments, load_module, save_module
from ral_gym.vqvae import VQVAE

STAGE = "vqvae"
LOG_EVERY = 10
REMEDY = "lower vqvae.learning_rate"


def build_vqvae(run: Run, images: ImageSet) -> VQVAE:
    """The untrained model of the run's configuration."""
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
    return VQVAE(images.image_size, images.channels, **config_arguments(run.config.vqvae, names))


def train_vqvae(run: Run, images: ImageSet, device: torch.device, progress: bool = True) -> VQVAE:
    """Train, or continue, or load what is there.

    The loss is the mean squared error plus the commitment loss (weight beta); the codebook moves by its own
    exponential average. Logged every 10 steps: `loss`, `reconstruction_error` (mean squared error), `perplexity` and
    `code_usage` (share of the codebook used) of the batch.

    Raises:
        DivergedError: the loss became NaN or infinite.
    """
    file = run.file("vqvae.safetensors")
    if file.exists():
        return load_module(file, VQVAE, device, build_vqvae(run, images).config)
    config = run.config.vqvae
    seed_everything(run.config.seed * 1000 + 1)
    accelerator = make_accelerator(device)
    vqvae = build_vqvae(run, images)
    optimizer = torch.optim.Adam(vqvae.parameters(), lr=config.learning_rate)
    vqvae, optimizer = accelerator.prepare(vqvae, optimizer)
    start = _resume(run, vqvae, optimizer)
    run.forget_after(STAGE, start)
    clock = Clock(run, STAGE)
    writer = SummaryWriter(str(run.file("tensorboard")), purge_step=start)
    steps = tqdm(
        range(start + 1, config.training_steps + 1),
        desc="1 VQ-VAE",
        initial=start,
        total=config.training_steps,
        disable=not progress,
        unit="step",
    )
    vqvae.train()
    for step in steps:
        rows = torch.randint(len(images.train), (config.batch_size,))  # (B,)
        batch = to_float(torch.from_numpy(images.train[rows.numpy()]))  # (B, C, S, S)
        if config.augment:
            batch = augment(batch, torch.default_generator)
        batch = batch.to(accelerator.device)
        reconstruction, codes, commitment = vqvae(batch)
        error = F.mse_loss(reconstruction, batch)
        loss = error + commitment
        check_finite(loss, STAGE, step, REMEDY)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        if step % LOG_EVERY == 0:
            figures = {"loss": loss.item(), "reconstruction_error": error.item()}
            figures["perplexity"] = perplexity(codes, config.codebook_size)
            figures["code_usage"] = codes.unique().numel() / config.codebook_size
            run.log(STAGE, step, figures)
            for name, figure in figures.items():
                writer.add_scalar(f"vqvae/{name}", figure, step)
            steps.set_postfix(error=f"{error.item():.4f}", perplexity=f"{figures['perplexity']:.0f}")
        if clock.due():
            _save(run, step, vqvae, optimizer)
            clock.book()
    writer.close()
    check_weights(vqvae, STAGE, config.training_steps, REMEDY)
    save_module(file, accelerator.unwrap_model(vqvae), images=images.description)
    clock.book()
    return load_module(file, VQVAE, device)


def _save(run: Run, step: int, vqvae: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    check_weights(vqvae, STAGE, step, REMEDY)
    run.save_checkpoint(STAGE, {"step": step, "model": vqvae.state_dict(), "optimizer": optimizer.state_dict()})


def _resume(run: Run, vqvae: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the stage's checkpoint, if any; the step it was taken at."""
    state = run.load_checkpoint(STAGE)
    if state is None:
        return 0
    vqvae.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]
