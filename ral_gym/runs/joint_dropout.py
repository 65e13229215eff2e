"""Dropout that several processes share: of the rows of a batch that each computes, as one process draws it for all.

A mask that every process drew for its own rows would differ from the one that a single process draws for the whole
batch, and the processes' generators would no longer agree. So all of them draw the whole mask and use their rows of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode


class JointDropout(TorchFunctionMode):
    """While it is entered, `torch.nn.functional.dropout`, and with it `nn.Dropout`, acts as on the whole batch.

    On a CPU the numbers are those that torch draws for the whole batch, bit for bit; on a GPU others, the same in all
    processes.

    Args:
        n: rows of the whole batch.
        own: those that are computed here, m of them. A tensor of several batches one behind the other, (r m, ...), such
            as real and drawn images, has the same rows of each.
    """

    def __init__(self, n: int, own: slice) -> None:
        super().__init__()
        self.n, self.own = n, own

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.dropout:
            return self._dropout(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return x
        mine = len(range(self.n)[self.own])
        batches = len(x) // mine
        order = sorted(range(x.dim()), key=lambda dimension: -x.stride()[dimension])  # numbers are drawn in this order
        shape = (batches * self.n, *x.shape[1:])
        mask = torch.empty_permuted(shape, order, dtype=x.dtype, device=x.device).bernoulli_(1 - p)
        kept = mask.unflatten(0, (batches, self.n))[:, self.own].flatten(0, 1)  # (r m, ...)
        return x * kept.div(1 - p) if not inplace else x.mul_(kept.div(1 - p))


def draws_in_rows(network: nn.Module) -> bool:
    """Whether all of a network's dropout layers are of the kind that `JointDropout` shares."""
    return all(type(part) is nn.Dropout for part in network.modules() if isinstance(part, _DropoutNd))
