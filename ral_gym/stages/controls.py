"""The controls of stage 3: what more maximum likelihood does to the prior that reinforcement learning starts from.

| control | its budget | its learning rate |
|---|---|---|
| `continue_prior` | as many updates as RAL | RAL's, constant |
| `train_equal_time` | as much time as RAL | RAL's, falling to 0 |

Both take RAL's batch size, Adam moments, gradient clipping and decay of the average, whose weights are kept, as RAL's
are (supplement, section 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ral_gym.config import PriorConfig
from ral_gym.errors import RunError
from ral_gym.priors.base import Prior, build_prior, config_of, load_prior, save_prior
from ral_gym.priors.two_level import SUFFIXES, join_priors, split_prior
from ral_gym.runs.run import Run, seed_everything
from ral_gym.runs.storage import load_json, save_json
from ral_gym.stages.common import WeightAverage, check_weights, make_adam
from ral_gym.stages.learning_rate import LearningRate
from ral_gym.stages.levels import LevelCodes
from ral_gym.stages.processes import main_process_first, make_accelerator
from ral_gym.stages.scheduled_sampling import ScheduledSampling
from ral_gym.stages.train_prior import Task, fit
from ral_gym.tokenizers.code_set import CodeSet

CONTINUED = "prior_continued"
EQUAL_TIME = "prior_equal_time"
BUDGET = "equal_time.json"
"""How many updates take RAL's time, and the seconds from which that was computed."""


@dataclass(frozen=True)
class _Control:
    """What tells the controls apart."""

    name: str
    """Of its files and of its stage in the log."""
    label: str
    seed: int
    updates: int
    schedule: str


def continue_prior(run: Run, prior: Prior, codes: CodeSet, device: torch.device, progress: bool = True) -> Prior:
    """The control `mle_continued`: maximum likelihood for as many updates as RAL, with everything else the same.

    Raises:
        DivergedError: the loss became NaN or infinite.
    """
    control = _Control(CONTINUED, "  MLE continued", 3, run.config.ral.n_updates, "constant")
    return _train(run, control, prior, codes, device, progress)


def train_equal_time(run: Run, prior: Prior, codes: CodeSet, device: torch.device, progress: bool = True) -> Prior:
    """The control `mle_equal_time`: maximum likelihood for as much time as RAL took, annealed to a learning rate of 0.

    RAL and `continue_prior` must be finished: the latter's time per update is this control's. The number of updates is
    computed once and kept in ``equal_time.json``, so that a run that is stopped goes on with it.

    Raises:
        DivergedError: the loss became NaN or infinite.
        RunError: the run has no times of RAL and of `continue_prior`, or ``equal_time.json`` is damaged.
    """
    with main_process_first(device):  # which keeps the number for the others
        updates = equal_time_updates(run)
    control = _Control(EQUAL_TIME, "  MLE, equal time", 5, updates, "linear")
    return _train(run, control, prior, codes, device, progress)


def equal_time_updates(run: Run) -> int:
    """How many updates of maximum likelihood take the time of RAL: read from the run, or computed and kept there.

    Raises:
        RunError: see `train_equal_time`.
    """
    file = run.file(BUDGET)
    if file.exists():
        kept = load_json(file)
        updates = kept.get("updates") if isinstance(kept, dict) else None
        if isinstance(updates, bool) or not isinstance(updates, int) or updates < 1:
            raise RunError(f"{file} holds no number of updates; remove it to compute it again")
        return updates
    seconds = run.seconds()
    ral, continued = seconds.get("ral"), sum(seconds.get(CONTINUED + suffix, 0.0) for suffix in SUFFIXES)
    if ral is None or not any(CONTINUED + suffix in seconds for suffix in SUFFIXES):
        raise RunError(
            f"{run.path} has no times of RAL and of its control, which mle_equal_time needs: remove "
            f"{CONTINUED}.safetensors to train the control again, or give --ral.no-equal-time-control"
        )
    updates = max(1, round(run.config.ral.n_updates * ral / max(continued, 0.1)))  # times are kept to 0.1 s
    save_json(file, {"updates": updates, "ral_seconds": ral, "mle_continued_seconds": continued})
    return updates


def _train(run: Run, control: _Control, prior: Prior, codes: CodeSet, device: torch.device, progress: bool) -> Prior:
    """Train, or load, every level."""
    sequences = codes.sequences("train", prior.grid)
    data = [LevelCodes.of(sequences, prior.grid, level) for level in range(prior.grid.levels)]
    both = enumerate(zip(split_prior(prior), data, strict=True))
    return join_priors([_train_level(run, control, level, *pair, device, progress) for level, pair in both])


def _train_level(
    run: Run, control: _Control, level: int, prior: Any, data: LevelCodes, device: torch.device, progress: bool
) -> Any:
    """Continue one level's prior, or load it if it is finished."""
    suffix = SUFFIXES[level]
    file = run.file(f"{control.name}{suffix}.safetensors")
    if file.exists():
        return load_prior(file, device, config_of(prior))
    config = run.config.ral
    seed_everything(run.config.seed * 1000 + control.seed + 20 * level)
    accelerator = make_accelerator(device)
    model = build_prior(config_of(prior)).to(accelerator.device)
    model.load_state_dict(prior.state_dict())
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = make_adam(model, config.learning_rate, betas)
    average = WeightAverage(model, config.ema_decay)
    task = Task(
        stage=control.name + suffix,
        label=control.label + suffix.replace("_", " "),
        remedy="lower ral.learning_rate",
        batch_size=config.n_envs,
        batch_setting="ral.n_envs",
        max_grad_norm=config.max_grad_norm,
        rate=LearningRate(optimizer, control.schedule, control.updates),
        sampling=ScheduledSampling(model, PriorConfig(), control.updates),  # none
    )
    clock = fit(run, task, model, optimizer, average, data, None, accelerator, 1, progress)
    check_weights(model, task.stage, control.updates, task.remedy)
    if accelerator.is_main_process:
        save_prior(file, model, average.weights)
        clock.book()
    accelerator.wait_for_everyone()
    return load_prior(file, device)
