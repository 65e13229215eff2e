"""How stages 1 and 2 compute: data parallelism over processes, mixed precision and gradient accumulation.

Stage 3 shares its work in another way, `ral_gym.runs.sharing`.

All processes together take the steps that one process would take: each draws the same rows for the joint batch and
works on its share, gradients are averaged, and the codebook's statistics are summed (`vector-quantize-pytorch` does
that once a process group exists). A batch in N parts is the same batch too: gradients and codebook statistics
accumulate, and only the last part updates anything. So these settings are not part of a run's configuration:
`config.json` does not contain them, and a run may continue with other values. Only noise differs: dropout and
augmentation are drawn per process, sums change their order, and bf16 rounds activations (weights, optimizer and
codebook stay in 32 bits).

Start several processes with ``torchrun --nproc-per-node N`` or ``accelerate launch``. Only process 0 prints, logs and
writes files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from vector_quantize_pytorch import VectorQuantize

from ral_gym.errors import ConfigError, DeviceError, RunError
from ral_gym.priors.transfer import numbers

LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|timed out", re.IGNORECASE)
"""Words in the communication library's error when another process is gone."""


@dataclass(frozen=True)
class Compute:
    """Settings of stages 1 and 2 that affect time and memory only, not what is learned."""

    mixed_precision: Literal["no", "bf16"] = "no"
    """`bf16`: activations and products in 16 bits; weights, optimizer and codebook stay in 32."""
    gradient_accumulation: int = 1
    """Split each step's batch into this many parts: less memory, the same step."""

    def check(self) -> None:
        """Refuse values that are out of range.

        Raises:
            ConfigError: what is allowed.
        """
        if self.gradient_accumulation < 1:
            raise ConfigError(f"gradient_accumulation is {self.gradient_accumulation}: give an integer of 1 or more")


def process_index() -> int:
    """This process's rank, as assigned by torchrun or accelerate."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """How many processes torchrun or accelerate started for the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launcher_note() -> str:
    """What to say of a launcher that did not do what it was asked; "" if there is nothing to say."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "WORLD_SIZE" not in os.environ:
        return "accelerate launch --cpu starts one process, whatever --num_processes says: use torchrun for several"
    return ""


def make_accelerator(device: torch.device, compute: Compute | None = None) -> Accelerator:
    """An `accelerate` front end for the stage's model and backward pass on `device`.

    Optimizers are not given to it: its wrapper does nothing here that they do not do themselves (it scales the
    gradients of 16-bit floats, which no stage has), and looks for a package on the disk at every step.

    Raises:
        ConfigError: a setting of `compute` is out of range.
        DeviceError: one CUDA device for several processes, or a device without bf16.
    """
    compute = compute or Compute()
    compute.check()
    if device.type == "cuda" and device.index is not None:
        if process_count() > 1:
            raise DeviceError(f"device '{device}' for {process_count()} processes: use --device cuda, one each")
        torch.cuda.set_device(device)
    if compute.mixed_precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise DeviceError("this CUDA device has no bf16: leave --mixed-precision out")
    if _made_for_another(device, compute):
        AcceleratorState._reset_state(reset_partial_state=process_count() == 1)
    _join_after_restart(device)
    return Accelerator(cpu=device.type == "cpu", mixed_precision=compute.mixed_precision)


def _join_after_restart(device: torch.device) -> None:
    """Connect the processes that torchrun has restarted, under names of this attempt.

    torchrun keeps one store over its restarts. In it a process finds the address of a partner that is gone, if its new
    partner has not written its own yet, and waits without end or is refused (PyTorch 2.13).
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if process_count() == 1 or attempt == "0" or torch.distributed.is_initialized():
        return
    store, rank, size = next(rendezvous("env://"))
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=torch.distributed.PrefixStore(f"restart_{attempt}", store),
        rank=rank,
        world_size=size,
    )


def _made_for_another(device: torch.device, compute: Compute) -> bool:
    """Whether accelerate's state, one per Python process, was made for another device or precision."""
    if not AcceleratorState._shared_state:
        return False
    state = AcceleratorState()
    return state.mixed_precision != compute.mixed_precision or state.device.type != device.type


@contextmanager
def partners() -> Iterator[None]:
    """If another process is gone, raise one clear line instead of the communication library's error.

    Raises:
        RunError: another process is gone.
    """
    try:
        yield
    except RuntimeError as error:  # torch's; gloo has no error class of its own
        if process_count() == 1 or not (isinstance(error, torch.distributed.DistError) or LOST.search(str(error))):
            raise
        cause = str(error).partition("\n")[0]
        raise RunError(
            f"process {process_index()} of {process_count()} lost another one (it died or was stopped; see its own "
            f"output); saved files are kept: run the same command again to continue [{cause}]"
        ) from error


@contextmanager
def main_process_first(device: torch.device) -> Iterator[None]:
    """Process 0 runs the block first, then the others, which find the files it made.

    Raises:
        RunError: another process is gone.
    """
    if process_count() == 1:
        yield
        return
    with partners(), make_accelerator(device).main_process_first():
        yield


def _in_full_precision(forward: Callable[..., Any], device: str) -> Callable[..., Any]:
    """A forward pass with autocast disabled."""

    def full(x: Tensor, *arguments: Any, **options: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return forward(x.float(), *arguments, **options)

    return full


def end_processes() -> bool:
    """After the last joint stage: wait for all processes, end the group, and continue as a single process.

    Returns:
        whether this is process 0, which alone goes on.
    """
    main = process_index() == 0
    if process_count() > 1:
        with partners():
            PartialState().wait_for_everyone()
        PartialState().destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
    return main


class JointBatches:
    """Draws every step's batch and splits it over processes and accumulation parts.

    Args:
        accelerator: of the stage.
        n_rows: how many images or code grids there are to draw from.
        batch_size: rows per step, over all processes and parts.
        parts: accumulation parts of a process's share.
        setting: name of the batch-size setting, for the message.

    Raises:
        ConfigError: the batch size is not a multiple of processes times parts.
    """

    def __init__(self, accelerator: Accelerator, n_rows: int, batch_size: int, parts: int, setting: str) -> None:
        shares = accelerator.num_processes * parts
        if batch_size % shares:
            raise ConfigError(
                f"{setting} is {batch_size}: it must be a multiple of {shares} "
                f"({accelerator.num_processes} processes x {parts} parts); change one of them"
            )
        self.accelerator, self.n_rows, self.batch_size, self.parts = accelerator, n_rows, batch_size, parts
        # One process draws everything from the global generator. Several need one that stays the same in all of them.
        self.generator = torch.Generator() if accelerator.num_processes > 1 else None
        self.part_of_later = False
        self.load_state_dict({})

    def draw(self) -> list[Tensor]:
        """This process's rows of the next batch, part by part: int64 (batch_size / processes / parts,) each."""
        rows = torch.randint(self.n_rows, (self.batch_size,), generator=self.generator)  # (B,)
        mine = rows.chunk(self.accelerator.num_processes)[self.accelerator.process_index]
        return list(mine.chunk(self.parts))

    def part(self, model: nn.Module, number: int) -> AbstractContextManager[Any]:
        """Context of the forward and backward pass of part `number`: only the last part synchronises gradients."""
        self.part_of_later = number < self.parts - 1
        return self.accelerator.no_sync(model) if self.part_of_later else nullcontext()

    def join_codebooks(self, model: nn.Module) -> None:
        """Let the codebooks of `model` accumulate statistics of all parts, in 32 bits, and update with the last one."""

        def collect(module: nn.Module, arguments: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return arguments, options | {"accum_ema_update": self.part_of_later and module.training}

        for module in model.modules():
            if isinstance(module, VectorQuantize):
                if self.parts > 1:
                    module.register_forward_pre_hook(collect, with_kwargs=True)
                if self.accelerator.mixed_precision != "no":
                    module.forward = _in_full_precision(module.forward, self.accelerator.device.type)

    def mean(self, values: list[Tensor]) -> float:
        """The mean over parts and processes, all of equal size; every process must call it."""
        value = torch.stack([value.detach().float() for value in values]).mean()
        return self.accelerator.reduce(value, "mean").item()

    def means(self, values: dict[str, list[Tensor]]) -> dict[str, float]:
        """`mean` of several, fetched together."""
        found = [torch.stack([value.detach().float() for value in parts]).mean() for parts in values.values()]
        reduced = [self.accelerator.reduce(value, "mean") for value in found]
        return dict(zip(values, numbers(reduced), strict=True))

    def any(self, mine: bool) -> bool:
        """Whether a condition holds in one of the processes; every process must call it."""
        found = torch.tensor(float(mine), device=self.accelerator.device)
        return self.accelerator.reduce(found, "sum").item() > 0

    def gather(self, tensors: list[Tensor]) -> Tensor:
        """The rows of all parts and processes; every process must call it."""
        return self.accelerator.gather(torch.cat(tensors))

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {} if self.generator is None else {"batches": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint, whose random state is process 0's: the others get their own dropout and augmentation."""
        if self.generator is None:
            return
        self.generator.set_state(state.get("batches", torch.get_rng_state()))
        if self.accelerator.process_index:
            fresh = int(torch.randint(2**40, (), generator=self.generator.clone_state()))
            torch.manual_seed(fresh + self.accelerator.process_index)
