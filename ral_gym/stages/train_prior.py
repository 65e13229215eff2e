"""Stage 2: codes -> PixelCNN by maximum likelihood (Section 3; the supplement's Table 4b), and the control.

A small set is memorised within minutes, so the weights kept are those of the best held-out NLL, and a prior that
does not beat the unigram there is said to be bad.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ral_gym.codes import CodeGrid, CodeSet
from ral_gym.errors import DivergedError
from ral_gym.metrics import nll, unigram_nll
from ral_gym.pixelcnn import PixelCNN
from ral_gym.run import Run, seed_everything
from ral_gym.stages.common import Clock, WeightAverage, check_finite, check_weights, make_accelerator
from ral_gym.storage import config_arguments, load_module, save_module, weights_of

STAGE = "prior"
CONTROL = "prior_continued"
CONTROL_REMEDY = "lower ral.learning_rate"
LOG_EVERY = 10
REMEDY = "lower prior.learning_rate"
logger = logging.getLogger("ral_gym")


def build_prior(run: Run, grid: CodeGrid) -> PixelCNN:
    """The untrained model of the run's configuration."""
    names = (
        "hidden_units",
        "residual_units",
        "layers",
        "conv_filter_size",
        "dropout",
        "output_stack_layers",
        "position_embedding",
    )
    arguments = config_arguments(run.config.prior, names)
    return PixelCNN(grid.codebook_size, grid.height, grid.width, **arguments)


@dataclass
class _Best:
    """The best held-out NLL of the live and of the averaged weights, and those weights."""

    nll: dict[str, float] = field(default_factory=lambda: {"live": float("inf"), "ema": float("inf")})
    step: dict[str, int] = field(default_factory=lambda: {"live": 0, "ema": 0})
    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def offer(self, which: str, value: float, step: int, model: PixelCNN) -> None:
        if value < self.nll[which]:
            self.nll[which], self.step[which] = value, step
            self.weights[which] = weights_of(model)


def maximum_likelihood_loss(prior: torch.nn.Module, codes: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats per code of code grids (B, T)."""
    return F.cross_entropy(prior(codes).flatten(0, 1), codes.flatten())


def train_prior(run: Run, codes: CodeSet, grid: CodeGrid, device: torch.device, progress: bool = True) -> PixelCNN:
    """Train, or continue, or load what is there.

    Logged: `nll_train` (of the batch, dropout on), and every `evaluate_every` steps `nll_test`, `nll_new_people` and
    `nll_test_ema`, all in nats per code.

    Raises:
        DivergedError: the loss became NaN or infinite.
    """
    file = run.file("prior.safetensors")
    if file.exists() and run.has("prior_ema.safetensors"):
        return load_module(file, PixelCNN, device, build_prior(run, grid).config)
    config = run.config.prior
    seed_everything(run.config.seed * 1000 + 2)
    accelerator = make_accelerator(device)
    prior = build_prior(run, grid)
    optimizer = torch.optim.Adam(prior.parameters(), lr=config.learning_rate)
    prior, optimizer = accelerator.prepare(prior, optimizer)
    average = WeightAverage(prior, config.ema_decay, warm_up=True)
    best = _Best()
    start = _resume(run, STAGE, prior, optimizer, average, best)
    run.forget_after(STAGE, start)
    train = torch.from_numpy(codes.train)
    clock = Clock(run, STAGE)
    writer = SummaryWriter(str(run.file("tensorboard")), purge_step=start)
    steps = tqdm(
        range(start + 1, config.training_steps + 1),
        desc="2 PixelCNN",
        initial=start,
        total=config.training_steps,
        disable=not progress,
        unit="step",
    )
    prior.train()
    for step in steps:
        batch = train[torch.randint(len(train), (config.batch_size,))].long().to(accelerator.device)  # (B, T)
        loss = maximum_likelihood_loss(prior, batch)
        check_finite(loss, STAGE, step, REMEDY)
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(prior.parameters(), 1.0)
        optimizer.step()
        average.update(prior)
        figures = {"nll_train": loss.item()} if step % LOG_EVERY == 0 else {}
        if step % config.evaluate_every == 0 or step == config.training_steps:
            figures |= _evaluate(prior, average, codes, best, step)
            steps.set_postfix(train=f"{loss.item():.2f}", test=f"{figures['nll_test']:.2f}")
        if figures:
            run.log(STAGE, step, figures)
            for name, figure in figures.items():
                writer.add_scalar(f"prior/{name}", figure, step)
        if clock.due():
            _save(run, STAGE, step, prior, optimizer, average, best)
            clock.book()
    writer.close()
    _finish(run, prior, codes, grid, best)
    clock.book()
    return load_module(file, PixelCNN, device)


def _evaluate(prior: PixelCNN, average: WeightAverage, codes: CodeSet, best: _Best, step: int) -> dict[str, float]:
    """Held-out figures of the live and the averaged weights; remembers the best of each."""
    prior.eval()
    figures = {"nll_test": nll(prior, torch.from_numpy(codes.test))}
    if codes.new_people is not None:
        figures["nll_new_people"] = nll(prior, torch.from_numpy(codes.new_people))
    best.offer("live", figures["nll_test"], step, prior)
    with average.applied(prior):
        figures["nll_test_ema"] = nll(prior, torch.from_numpy(codes.test))
        best.offer("ema", figures["nll_test_ema"], step, prior)
    prior.train()
    return figures


def _finish(run: Run, prior: PixelCNN, codes: CodeSet, grid: CodeGrid, best: _Best) -> None:
    """Write the best weights, and say so if they are no better than code frequencies."""
    if len(best.weights) < len(best.nll):
        raise DivergedError(f"stage {STAGE}: no held-out NLL was finite; the last good checkpoint is kept; {REMEDY}")
    unigram = unigram_nll(torch.from_numpy(codes.train), torch.from_numpy(codes.test), grid.codebook_size)
    if best.nll["live"] >= unigram:
        logger.warning(
            "the prior's held-out NLL %.3f does not beat the unigram's %.3f nats per code: it has memorised or not "
            "learnt; use more images, more augmented passes or fewer steps",
            best.nll["live"],
            unigram,
        )
    facts = {"unigram_nll": unigram}
    for which, name in (("ema", "prior_ema"), ("live", "prior")):
        facts |= {"nll_test": best.nll[which], "step": best.step[which]}
        save_module(run.file(f"{name}.safetensors"), prior, best.weights[which], **facts)


def _save(
    run: Run,
    stage: str,
    step: int,
    prior: PixelCNN,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage,
    best: _Best | None = None,
) -> None:
    """Write the stage's checkpoint."""
    check_weights(prior, stage, step, REMEDY if stage == STAGE else CONTROL_REMEDY)
    state = {"step": step, "model": prior.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"average": average.state_dict(), "best": {} if best is None else vars(best)}
    run.save_checkpoint(stage, state)


def _resume(
    run: Run,
    stage: str,
    prior: PixelCNN,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage,
    best: _Best | None = None,
) -> int:
    """Load the stage's checkpoint, if any; the step it was taken at."""
    state = run.load_checkpoint(stage)
    if state is None:
        return 0
    prior.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    average.load_state_dict(state["average"], prior)
    if best is not None:
        vars(best).update(state["best"])
    return state["step"]


def continue_prior(run: Run, prior: PixelCNN, codes: CodeSet, device: torch.device, progress: bool = True) -> PixelCNN:
    """The control `mle_continued`: maximum likelihood for as many updates as RAL, everything else alike.

    Same starting weights, batch size (`ral.n_envs`), learning rate, Adam moments, gradient clipping, number of
    updates and decay of the average; the averaged weights are kept, as RAL's are (supplement, section 1).

    Raises:
        DivergedError: the loss became NaN or infinite.
    """
    file = run.file("prior_continued.safetensors")
    if file.exists():
        return load_module(file, PixelCNN, device, prior.config)
    config = run.config.ral
    seed_everything(run.config.seed * 1000 + 3)
    model = PixelCNN(**prior.config).to(device)
    model.load_state_dict(prior.state_dict())
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, betas=betas)
    average = WeightAverage(model, config.ema_decay)
    start = _resume(run, CONTROL, model, optimizer, average)
    train = torch.from_numpy(codes.train)
    clock = Clock(run, CONTROL)
    model.train()
    steps = tqdm(
        range(start + 1, config.n_updates + 1),
        desc="  MLE continued",
        initial=start,
        total=config.n_updates,
        disable=not progress,
        unit="step",
    )
    for step in steps:
        batch = train[torch.randint(len(train), (config.n_envs,))].long().to(device)  # (B, T)
        loss = maximum_likelihood_loss(model, batch)
        check_finite(loss, CONTROL, step, CONTROL_REMEDY)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        average.update(model)
        if clock.due():
            _save(run, CONTROL, step, model, optimizer, average)
            clock.book()
    check_weights(model, CONTROL, config.n_updates, CONTROL_REMEDY)
    save_module(file, model, average.weights)
    clock.book()
    return load_module(file, PixelCNN, device)
