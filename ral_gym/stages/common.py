"""What the training loops share: stopping at NaN, checkpoints by the clock, the exponential moving average.

For training in several processes see `ral_gym.stages.processes`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ral_gym.errors import DivergedError
from ral_gym.priors.transfer import numbers
from ral_gym.runs.checked_state import integer_of, tensor_like
from ral_gym.runs.run import Run
from ral_gym.runs.storage import weights_of

CHECKPOINT_SECONDS = 30.0
"""Time between two checkpoints of a running stage."""


def check_finite(loss: Tensor | float, stage: str, step: int, remedy: str) -> float:
    """The loss as a float.

    Raises:
        DivergedError: it is NaN or infinite; saved files are kept.
    """
    value = loss.item() if isinstance(loss, Tensor) else float(loss)
    if not math.isfinite(value):
        raise DivergedError(
            f"stage {stage}: the loss is {value} at step {step}; the last good checkpoint is kept; {remedy}"
        )
    return value


class UnseenLosses:
    """Losses of a training loop until `check_finite` has seen them.

    On the CPU that is at once. On CUDA looking at a number waits for the device, which then has nothing to do while the
    host makes the next batch: there the losses of some steps are fetched together.

    Args:
        every: on CUDA, how many steps are looked at together.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._waiting: list[tuple[Tensor, int]] = []

    def add(self, loss: Tensor, step: int, last: bool = False) -> list[tuple[float, int]]:
        """Add a step's loss; returns the losses to be looked at now, each with its step.

        Args:
            loss: a scalar.
            step: of training, from 1.
            last: whether there is none after it, so that nothing may wait.
        """
        self._waiting.append((loss.detach(), step))
        if loss.is_cuda and step % self.every and not last:
            return []
        waiting, self._waiting = self._waiting, []
        return list(zip(numbers([one for one, _ in waiting]), [at for _, at in waiting], strict=True))


def check_weights(module: nn.Module, stage: str, step: int, remedy: str) -> None:
    """Stop before broken weights are saved: a step taken from a finite loss can still break them.

    Raises:
        DivergedError: a weight or a statistic is NaN or infinite; saved files are kept.
    """
    floats = [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]
    # One answer for all of them: on a GPU each would be waited for.
    if floats and not bool(torch.stack([torch.isfinite(tensor).all() for tensor in floats]).all()):
        raise DivergedError(
            f"stage {stage}: weights are NaN or infinite after step {step}; the last good checkpoint is kept; {remedy}"
        )


def step_of(state: dict[str, Any], steps: int) -> int:
    """The step at which a checkpoint was taken.

    Raises:
        ValueError: it is not a step of a stage of `steps` steps.
    """
    step = state["step"]
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= steps:
        raise ValueError(f"step {step!r:.20} of {steps}")
    return step


def make_adam(
    module: nn.Module, learning_rate: float, betas: tuple[float, float], weight_decay: float = 0.0
) -> torch.optim.Adam:
    """Adam; with weight decay AdamW (Loshchilov & Hutter, 2019), which decays weights of two dimensions or more."""
    if not weight_decay:
        return torch.optim.Adam(module.parameters(), lr=learning_rate, betas=betas)
    weights = list(module.parameters())
    groups = [
        {"params": [weight for weight in weights if weight.ndim >= 2], "weight_decay": weight_decay},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate, betas=betas)


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state from a checkpoint, with this run's settings and tensors of the parameters' shapes.

    Raises:
        ValueError: the state is another optimizer's.
    """
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        for name, value in own.items():
            if type(group.get(name)) is not type(value) or (name != "lr" and group[name] != value):
                raise ValueError(f"{name} of the optimizer is {group.get(name)!r:.40}, and {value!r:.40} here")
        for parameter in group["params"]:
            for name, value in optimizer.state.get(parameter, {}).items():
                shape = torch.Size([]) if name == "step" else parameter.shape
                if not isinstance(value, Tensor) or value.shape != shape:
                    raise ValueError(f"{name} of the optimizer does not fit its parameter")
            held = set(optimizer.state.get(parameter, {}))
            if isinstance(optimizer, torch.optim.Adam) and held not in (set(), {"step", "exp_avg", "exp_avg_sq"}):
                raise ValueError(f"the optimizer's state of a parameter is {sorted(map(str, held))}")


class Clock:
    """Decides when a checkpoint is due, and adds the stage's run time to the run's record.

    Args:
        run: the run folder.
        stage: its name there.
    """

    def __init__(self, run: Run, stage: str) -> None:
        self.run, self.stage = run, stage
        self._booked = self._saved = time.monotonic()

    def due(self) -> bool:
        """True if `CHECKPOINT_SECONDS` have passed since the last checkpoint."""
        return time.monotonic() - self._saved >= CHECKPOINT_SECONDS

    def book(self) -> None:
        """Add the time since the last call to the run's record, and start a new interval."""
        now = time.monotonic()
        self.run.add_seconds(self.stage, now - self._booked)
        self._booked = self._saved = now


class WeightAverage:
    """Exponential moving average of a module's floating-point weights.

    The decay is warmed up as ``min(decay, (1 + n) / (10 + n))`` after n updates, so that the average forgets the
    starting weights in a short run too.

    Args:
        module: the module to follow; the average starts at its weights.
        decay: share of the average kept at each update.
        warm_up: use the warm-up above.
    """

    def __init__(self, module: nn.Module, decay: float, warm_up: bool = False) -> None:
        self.weights = weights_of(module)
        self.decay = decay
        self.warm_up = warm_up
        self.n_updates = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the module's weights."""
        self.n_updates += 1
        decay = min(self.decay, (1 + self.n_updates) / (10 + self.n_updates)) if self.warm_up else self.decay
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                self.weights[name].lerp_(tensor.to(self.weights[name].device), 1 - decay)
            else:
                self.weights[name].copy_(tensor)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Inside the block the module has the averaged weights, afterwards its own again."""
        own = weights_of(module)
        module.load_state_dict(self.weights)
        try:
            yield
        finally:
            module.load_state_dict(own)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"weights": self.weights, "n_updates": self.n_updates}

    def load_state_dict(self, state: dict[str, Any], module: nn.Module) -> None:
        """From a checkpoint; `module` determines the device and the names and shapes of the averaged weights.

        Raises:
            ValueError: the weights are another module's.
        """
        device, wanted = next(module.parameters()).device, module.state_dict()
        weights = {name: tensor.to(device) for name, tensor in state["weights"].items()}
        if weights.keys() != wanted.keys():
            raise ValueError("the average is that of another module")
        self.weights = {name: tensor_like(one, f"the average's {name}", wanted[name]) for name, one in weights.items()}
        self.n_updates = integer_of(state["n_updates"], "n_updates")
