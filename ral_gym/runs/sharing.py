"""Several processes that run one program and share the work of its networks.

Started by ``torchrun``, all W processes run the same program on all rows: the same environment, buffer, callbacks and
algorithm, with the same random state. Only passes of networks are shared: each process computes some rows of a batch
and hands them to the others, and gradients are summed inside the backward pass. So between two passes all processes
hold the same numbers, W processes compute what one computes, up to rounding, and an algorithm that knows nothing of
processes, such as those of Stable-Baselines3, trains on all of them.

`Processes` does the sharing; one process is a special case, in which nothing is sent. `ral_gym.runs.alike` checks that
the processes are alike. Stages 1 and 2 have a design of their own, `ral_gym.stages.processes`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ral_gym.errors import ConfigError

PATIENCE = timedelta(minutes=5)
"""How long a process waits for the others between two passes, before it says which one is missing."""


class Processes:
    """The processes that share the passes of networks; without arguments: this one alone.

    It is given to those that have passes to share, such as ``PPO(PriorPolicy, env, policy_kwargs={"processes":
    Processes.join(), ...})``. Pickled or saved with a model, it is one process.

    Args:
        rank: this process, 0..size - 1.
        size: W.
        device: where tensors that are sent must be: `cuda` for NCCL.
        checks: the group by which processes check on one another, on the CPU; None: the default group.
        patience: see `check_in`.

    Attributes:
        rank: see above.
        size: see above.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        device: torch.device | str = "cpu",
        checks: dist.ProcessGroup | None = None,
        patience: timedelta = PATIENCE,
    ) -> None:
        self.rank, self.size, self.device = rank, size, torch.device(device)
        self._checks, self._patience = checks, patience

    @classmethod
    def join(cls, device: torch.device | str = "auto", patience: timedelta = PATIENCE) -> Processes:
        """The processes that ``torchrun`` started with this one; without it, this one alone.

        Args:
            device: `cuda`: each process uses the GPU of its local rank, and they talk by NCCL; `cpu`: gloo; `auto`:
                `cuda` if there is one.
            patience: see `check_in`.

        Raises:
            ConfigError: fewer GPUs than processes on this machine.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        kind = (
            torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
        )
        if kind.type == "cuda":
            local = int(os.environ.get("LOCAL_RANK", "0"))
            if local >= torch.cuda.device_count():
                raise ConfigError(
                    f"process {local} of this machine has no GPU: {torch.cuda.device_count()} are visible; start as "
                    "many processes as there are GPUs (--nproc-per-node)"
                )
            torch.cuda.set_device(local)
            kind = torch.device("cuda", local)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if kind.type == "cuda" else "gloo")
        checks = dist.new_group(backend="gloo")
        return cls(dist.get_rank(), dist.get_world_size(), kind, checks, patience)

    @classmethod
    def of(cls, policy: Any) -> Processes:
        """Those that share a policy's passes; with a policy that knows of none this one alone."""
        found: Processes | None = getattr(policy, "processes", None)
        return found or cls()

    def __reduce__(self) -> tuple[Any, ...]:
        return (Processes, ())

    def __deepcopy__(self, memo: dict[int, Any]) -> Processes:
        return self

    @property
    def main(self) -> bool:
        """Whether this is the process that prints, logs and writes files."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """This process's rows of n: contiguous; sizes differ by one at most, and with n < W some are empty."""
        return self.share_of(n, self.rank)

    def share_of(self, n: int, rank: int) -> slice:
        """A process's rows of n, see `share`."""
        return slice(n * rank // self.size, n * (rank + 1) // self.size)

    def rows(self, n: int) -> slice:
        """The rows of n > 0 that this process computes: its share; if that is empty row 0, which it does not hand on.

        A pass over no rows would leave out gradients, and with them sums in which all processes must take part.
        """
        mine = self.share(n)
        return mine if mine.stop > mine.start else slice(0, 1)

    def sizes(self, n: int) -> list[int]:
        """How many rows of n each process has."""
        shares = [self.share_of(n, rank) for rank in range(self.size)]
        return [share.stop - share.start for share in shares]

    def gather(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """The rows of all processes, in order; with gradients: those of the joint rows flow back to their processes.

        Args:
            rows: (n, ...) what this process computed; if its size is 0, its rows are left out.
            sizes: how many rows each process has.
        """
        if self.size == 1:
            return rows
        return _Gather.apply(self, tuple(sizes), rows[: sizes[self.rank]])

    def gather_columns(self, columns: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """As `gather`, of several tensors (n, ...) in one call; floating-point ones may differ in their precision."""
        if self.size == 1:
            return list(columns)
        kind = torch.float64 if any(column.dtype == torch.float64 for column in columns) else torch.float32
        shapes = [column.shape[1:] for column in columns]
        flat = torch.cat([column.to(kind).reshape(len(column), -1) for column in columns], 1)
        parts = self.gather(flat, sizes).split([shape.numel() for shape in shapes], 1)
        return [part.reshape(-1, *shape).to(own.dtype) for part, shape, own in zip(parts, shapes, columns, strict=True)]

    def split(self, n: int, compute: Callable[[slice], Tensor]) -> Tensor:
        """What `compute` gives for n rows (n, ...), of which each process computes its own."""
        return compute(slice(0, n)) if self.size == 1 or not n else self.gather(compute(self.rows(n)), self.sizes(n))

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Sum tensors over all processes, in place, in one call for each kind of number."""
        if self.size > 1:
            found = list(tensors)
            for kind in dict.fromkeys(tensor.dtype for tensor in found):
                same = [tensor for tensor in found if tensor.dtype == kind]
                for tensor, total in zip(same, self._summed(same), strict=True):
                    tensor.copy_(total)

    def _summed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums over all processes of tensors of one kind."""
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum the gradients of parameters over all processes; those without one have none in any process."""
        self.sum_(weight.grad for weight in parameters if weight.grad is not None)

    def sum_numbers(self, numbers: dict[str, float]) -> dict[str, float]:
        """Sum numbers over all processes, which must have the same names."""
        if self.size == 1 or not numbers:
            return numbers
        values = torch.tensor([numbers[name] for name in sorted(numbers)], dtype=torch.float64, device=self.device)
        dist.all_reduce(values)
        found = dict(zip(sorted(numbers), values.tolist(), strict=True))
        return {name: found[name] for name in numbers}

    def from_main(self, array: np.ndarray) -> np.ndarray:
        """Process 0's array, for all: where a computation on the same numbers may round differently elsewhere."""
        if self.size == 1:
            return array
        sent = torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
        dist.broadcast(sent, 0)
        found: np.ndarray = sent.cpu().numpy()
        return found

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier(self._checks)

    def check_in(self) -> None:
        """Wait for all processes, and name those that do not come within the patience of `join`.

        Raises:
            RuntimeError: torch's, with the missing ranks.
        """
        if self.size > 1:
            dist.monitored_barrier(self._checks, self._patience, wait_all_ranks=True)

    def tell(self, message: Any) -> list[Any]:
        """Every process's message: numbers, texts, and lists and dicts of these."""
        if self.size == 1:
            return [message]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, message, self._checks)
        return found


class _Enter(torch.autograd.Function):
    """Weights go to the processes' own passes; backward: the sum of what the processes' passes say of them.

    `_Enter` and `_Leave`, `_Gather` and `_Split` are each other's derivatives: those of any order are right.
    """

    @staticmethod
    def forward(ctx: Any, processes: Processes, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.processes = processes
        ctx.set_materialize_grads(False)
        return tuple(None if tensor is None else tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        return (None, *_Leave.apply(ctx.processes, *gradients))


class _Leave(torch.autograd.Function):
    """Sums over all processes of what each computed; None where a tensor has none in any process."""

    @staticmethod
    def forward(ctx: Any, processes: Processes, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.processes = processes
        ctx.set_materialize_grads(False)
        there = [tensor for tensor in tensors if tensor is not None]
        sums = iter(processes._summed(there) if there else [])
        return tuple(None if tensor is None else next(sums) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        return (None, *_Enter.apply(ctx.processes, *gradients))


class _Gather(torch.autograd.Function):
    """The rows of all processes, in order."""

    @staticmethod
    def forward(ctx: Any, processes: Processes, sizes: tuple[int, ...], rows: Tensor) -> Tensor:
        ctx.processes, ctx.sizes = processes, sizes
        most = max(sizes)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded)
        return torch.cat([part[:size] for part, size in zip(found, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return None, None, _Split.apply(ctx.processes, ctx.sizes, gradient)


class _Split(torch.autograd.Function):
    """This process's rows of a tensor that all have."""

    @staticmethod
    def forward(ctx: Any, processes: Processes, sizes: tuple[int, ...], rows: Tensor) -> Tensor:
        ctx.processes, ctx.sizes = processes, sizes
        first = sum(sizes[: processes.rank])
        return rows[first : first + sizes[processes.rank]].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return None, None, _Gather.apply(ctx.processes, ctx.sizes, gradient)


class _Pass(nn.Module):
    """A function that uses a network, as a module, so that the network can be given other weights for one call."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, function: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        return function()


def with_shared_weights(
    processes: Processes, network: nn.Module, function: Callable[[], tuple[Tensor, ...]], one_by_one: bool
) -> tuple[Tensor, ...]:
    """Call a function that uses a network on this process's rows, so that gradients are sums over all processes.

    Args:
        processes: those that call it.
        network: its weights that need gradients enter through `_Enter`.
        function: computes what this process then gives to `Processes.gather`.
        one_by_one: one sum per weight, for callers that ask for the gradient of one weight at a time, as TRPO does;
            False: one for all weights.
    """
    names, weights = zip(*((n, w) for n, w in network.named_parameters() if w.requires_grad), strict=True)
    entered = [_Enter.apply(processes, w)[0] for w in weights] if one_by_one else _Enter.apply(processes, *weights)
    inside = {f"network.{name}": weight for name, weight in zip(names, entered, strict=True)}
    return torch.func.functional_call(_Pass(network), inside, (function,))
