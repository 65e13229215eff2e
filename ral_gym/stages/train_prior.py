"""Stage 2: codes -> prior by maximum likelihood (Section 3; the supplement's Tables 4b to 10b).

A small set is memorised within minutes, so the weights with the best held-out NLL are kept, and a warning is logged if
that NLL does not beat the unigram's. With two levels there are two priors, trained one after the other: of the top
codes, and of the bottom codes given the top codes; the files of the second end in ``_bottom``. Scheduled sampling is an
option (`ral_gym.stages.scheduled_sampling`). The controls of stage 3 run the same loop (`ral_gym.stages.controls`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ral_gym.config import PriorConfig
from ral_gym.errors import ConfigError, DivergedError
from ral_gym.grid import CodeGrid
from ral_gym.metrics import unigram_nll
from ral_gym.priors.base import Prior, config_of, load_prior, save_prior
from ral_gym.priors.two_level import SUFFIXES, join_priors
from ral_gym.runs.event_log import open_event_log
from ral_gym.runs.progress import progress_bar
from ral_gym.runs.run import Run, seed_everything
from ral_gym.stages.boards import due
from ral_gym.stages.common import (
    Clock,
    UnseenLosses,
    WeightAverage,
    check_finite,
    check_weights,
    make_adam,
    restore_optimizer,
    step_of,
)
from ral_gym.stages.learning_rate import LearningRate
from ral_gym.stages.levels import SECTIONS, LevelCodes, label_nlls, prior_of
from ral_gym.stages.prior_measurements import Board, HeldOut
from ral_gym.stages.processes import Compute, JointBatches, make_accelerator, partners
from ral_gym.stages.scheduled_sampling import ScheduledSampling
from ral_gym.tokenizers.code_set import CodeSet

STAGE = "prior"
LOG_EVERY = 10
logger = logging.getLogger("ral_gym")


@dataclass(frozen=True)
class Task:
    """The loop's task: maximum likelihood from scratch, or a control."""

    stage: str
    label: str
    remedy: str
    batch_size: int
    batch_setting: str
    max_grad_norm: float
    rate: LearningRate
    sampling: ScheduledSampling
    board: Board | None = None


def train_prior(
    run: Run,
    codes: CodeSet,
    grid: CodeGrid,
    device: torch.device,
    progress: bool = True,
    compute: Compute | None = None,
) -> Prior:
    """Train, continue or load the run's priors; several processes share the work.

    Logged: `nll_train` (of the batch, dropout on), and every `evaluate_every` steps `nll_test`, `nll_new_people` and
    `nll_test_ema`, all in nats per code; with two levels, of each level's own codes. With scheduled sampling
    `nll_train` is the NLL of real codes given mixed prefixes, and `own_codes` the share of own codes; held-out codes
    are never mixed, so the best weights are chosen as without it, and their file records the share. TensorBoard also
    has images that the prior draws, if the run has a trained tokenizer.

    Raises:
        ConfigError: the batch cannot be divided evenly, or an unknown kind of scheduled sampling.
        DivergedError: the loss became NaN or infinite.
        RunError: another process is gone.
    """
    levels = range(grid.levels)
    return join_priors([_train_level(run, codes, grid, level, device, progress, compute) for level in levels])


@partners()
def _train_level(
    run: Run, codes: CodeSet, grid: CodeGrid, level: int, device: torch.device, progress: bool, compute: Compute | None
) -> Any:
    """Train, or continue, or load one level's prior."""
    suffix, section = SUFFIXES[level], SECTIONS[level]
    file = run.file(f"prior{suffix}.safetensors")
    if file.exists() and run.has(f"prior_ema{suffix}.safetensors"):
        return load_prior(file, device, config_of(prior_of(run.config, grid, level)))
    config = getattr(run.config, section)
    if not grid.classes and config.class_dropout != PriorConfig().class_dropout:
        raise ConfigError(
            f"{section}.class_dropout is {config.class_dropout}, but there are no classes: leave it out, or give "
            "images with classes (one folder per class) and a network that takes them"
        )
    board = Board.of(run, level, device)
    seed_everything(run.config.seed * 1000 + 2 + 20 * level)
    accelerator = make_accelerator(device, compute)
    prior = prior_of(run.config, grid, level).to(accelerator.device)
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = make_adam(prior, config.learning_rate, betas, config.weight_decay)
    average = WeightAverage(prior, config.ema_decay, warm_up=True)
    new_people = None if codes.new_people is None or grid.classes else LevelCodes.of(codes.new_people, grid, level)
    held_out = HeldOut(
        LevelCodes.of(codes.sequences("test", grid), grid, level),
        new_people,
        config.evaluate_every,
        limit=config.held_out,
        seed=run.config.seed * 1000 + 2,
    )
    task = Task(
        stage=STAGE + suffix,
        label=f"2 {type(prior).__name__}" + suffix.replace("_", " "),
        remedy=f"lower {section}.learning_rate",
        batch_size=config.batch_size,
        batch_setting=f"{section}.batch_size",
        max_grad_norm=1.0,
        rate=LearningRate(
            optimizer,
            config.learning_rate_schedule,
            config.training_steps,
            config.decay_share,
            config.patience,
        ),
        sampling=ScheduledSampling(prior, config, config.training_steps, section),
        board=board,
    )
    data = LevelCodes.of(codes.sequences("train", grid), grid, level)
    n_parts = compute.gradient_accumulation if compute else 1
    clock = fit(run, task, prior, optimizer, average, data, held_out, accelerator, n_parts, progress)
    if accelerator.is_main_process:
        _finish(run, task, prior, data, held_out, codes.classes if grid.classes else ())
        clock.book()
    accelerator.wait_for_everyone()
    return load_prior(file, device)


def fit(
    run: Run,
    task: Task,
    prior: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage,
    data: LevelCodes,
    held_out: HeldOut | None,
    accelerator: Accelerator,
    n_parts: int,
    progress: bool,
) -> Clock:
    """The loop of all tasks, from its checkpoint if there is one; without `held_out` nothing is measured or logged."""
    main = accelerator.is_main_process
    model = accelerator.prepare(prior)  # not the optimizer, see `make_accelerator`
    batches = JointBatches(accelerator, len(data.codes), task.batch_size, n_parts, task.batch_setting)
    start = _resume(run, task, prior, optimizer, average, batches, held_out)
    clock, rate, writer = Clock(run, task.stage), task.rate, None
    if main and held_out is not None:
        run.forget_after(task.stage, start)
        writer = open_event_log(run.path, task.stage, start)
    planned = rate.last
    steps = progress_bar(
        range(start + 1, rate.last + 1),
        desc=task.label,
        initial=start,
        total=rate.last,
        disable=not (progress and main),
        unit="step",
    )
    prior.train()
    unseen = UnseenLosses(LOG_EVERY)
    for step in steps:
        rate.set(step)
        optimizer.zero_grad()
        losses = []
        for number, rows in enumerate(batches.draw()):
            batch = data[rows].to(accelerator.device)  # (B, T')
            with batches.part(model, number):
                loss = task.sampling.loss(model, batch, step)
                for value, at in unseen.add(loss, step, last=step == rate.last):
                    check_finite(value, task.stage, at, task.remedy)
                accelerator.backward(loss / n_parts)
            losses.append(loss.detach())
        accelerator.clip_grad_norm_(model.parameters(), task.max_grad_norm)
        optimizer.step()
        average.update(prior)
        if held_out is not None:
            metrics = {}
            if step % LOG_EVERY == 0:
                metrics = {"nll_train": batches.mean(losses)} | task.sampling.metrics(step)
            measured = step % held_out.every == 0 or step == rate.last
            if main and measured:
                metrics |= held_out.measure(prior, average, step)
                steps.set_postfix(train=f"{loss.item():.2f}", test=f"{metrics['nll_test']:.2f}")
            if measured and rate.patience is not None:
                flat = main and rate.flattened(min(metrics["nll_test"], metrics["nll_test_ema"]))
                if batches.any(flat):
                    rate.end_early(step)
                    steps.total = rate.last
            if writer is not None and metrics:
                run.log(task.stage, step, metrics)
                for name, value in metrics.items():
                    writer.add_scalar(f"{task.stage}/{name}", value, step)
            if writer is not None and task.board is not None and due(step, rate.last):
                task.board.show(writer, f"{task.stage}/samples", prior, step)
        if main and clock.due():
            if writer is not None:
                writer.flush()  # a checkpoint must not be ahead of the log
            _save(run, task, step, prior, optimizer, average, batches, held_out)
            clock.book()
        if step == rate.last < planned:  # it has come closer since the loop began
            steps.n = step
            steps.close()
            break
    if writer is not None:
        writer.close()
    return clock


def _finish(
    run: Run,
    task: Task,
    prior: Any,
    data: LevelCodes,
    held_out: HeldOut,
    class_names: tuple[str, ...],
) -> None:
    """Write the best weights, and warn if they are no better than code frequencies; no names without classes."""
    best, suffix = held_out.best, task.stage.removeprefix(STAGE)
    if len(best.weights) < len(best.nll):
        raise DivergedError(
            f"stage {task.stage}: no held-out NLL was finite; the last good checkpoint is kept; {task.remedy}"
        )
    unigram = unigram_nll(data.codes, held_out.test.codes, prior.codebook_size)
    if best.nll["live"] >= unigram:
        logger.warning(
            "the%s prior's held-out NLL %.3f does not beat the unigram's %.3f nats per code: it has memorised, or not "
            "learnt; use more images, more augmented passes or fewer steps",
            suffix.replace("_", " "),
            best.nll["live"],
            unigram,
        )
    facts: dict[str, Any] = {"unigram_nll": unigram} | _with_other_labels(run, prior, held_out, len(class_names))
    if class_names:
        facts["class_names"] = list(class_names)
    for which, name in (("ema", "prior_ema"), ("live", "prior")):
        facts |= {"nll_test": best.nll[which], "step": best.step[which]} | task.sampling.metrics(best.step[which])
        save_prior(run.file(f"{name}{suffix}.safetensors"), prior, best.weights[which], **facts)


def _with_other_labels(run: Run, prior: Any, held_out: HeldOut, classes: int) -> dict[str, float]:
    """With classes: the best weights' held-out NLL with wrong labels and with none; warns if right ones do not help."""
    if not classes:
        return {}
    right = held_out.best.nll["live"]
    prior.load_state_dict(held_out.best.weights["live"])
    others = label_nlls(prior.eval(), held_out.test, classes, run.config.seed * 1000 + 2)
    worst = min(others.values(), default=float("inf"))
    if right >= worst:
        logger.warning(
            "labels do not help the prior: held-out NLL %.3f with right labels, %.3f without or with wrong ones; train "
            "longer, or turn labels off with --data.labels none",
            right,
            worst,
        )
    return others


def _save(
    run: Run,
    task: Task,
    step: int,
    prior: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage,
    batches: JointBatches,
    held_out: HeldOut | None,
) -> None:
    """Write the stage's checkpoint."""
    check_weights(prior, task.stage, step, task.remedy)
    state = {"step": step, "model": prior.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"average": average.state_dict(), "learning_rate": task.rate.state_dict()}
    state |= {"best": {}} if held_out is None else held_out.state_dict()
    run.save_checkpoint(task.stage, state | batches.state_dict())


def _resume(
    run: Run,
    task: Task,
    prior: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage,
    batches: JointBatches,
    held_out: HeldOut | None,
) -> int:
    """Load the stage's checkpoint, if any; returns its step, or 0."""
    state = run.load_checkpoint(task.stage)
    if state is None:
        return 0
    with run.restoring(task.stage):
        prior.load_state_dict(state["model"])
        restore_optimizer(optimizer, state["optimizer"])
        average.load_state_dict(state["average"], prior)
        batches.load_state_dict(state)
        if "learning_rate" in state:  # else it is of version 0.1, whose rates are constant
            task.rate.load_state_dict(state["learning_rate"])
        if held_out is not None:
            held_out.load_state_dict(state)
        return step_of(state, task.rate.last)
