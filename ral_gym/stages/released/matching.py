"""From a checkpoint's tensors to a network's: every tensor has a place and every place a tensor, or it is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ral_gym.errors import RunError
from ral_gym.stages.released.torch_files import REMEDY, Checkpoint


def match(
    checkpoint: Checkpoint,
    network: nn.Module,
    sources: Callable[[str], Sequence[str]],
    dropped: Callable[[str], bool],
    what: str,
) -> dict[str, Tensor]:
    """A network's weights from a checkpoint; those that are stored as one tensor stay mapped from the file.

    Args:
        checkpoint: the file.
        network: the network, on the meta device: only its names and shapes are used.
        sources: the network's name of a tensor -> the file's, of one tensor or of several to be stacked by rows.
        dropped: whether a name in the file is known and not needed.
        what: what the file should hold, for messages.

    Raises:
        RunError: a tensor is missing, left over, of another shape, no floating-point numbers, or not finite.
    """
    found: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, place in network.state_dict().items():
        names = sources(name)
        for one in names:
            checkpoint.shape(one, what)
        used |= set(names)
        parts = [checkpoint.tensors[one] for one in names]
        shape = (sum(len(part) for part in parts), *parts[0].shape[1:]) if parts[0].dim() else ()
        if shape != tuple(place.shape):
            raise RunError(
                f"{checkpoint.path}: {' + '.join(names)} has shape {shape}, but {what} of this size has "
                f"{tuple(place.shape)}"
            )
        found[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
        _check_numbers(checkpoint, names[0], found[name])
    left = sorted(name for name in checkpoint.tensors if name not in used and not dropped(name))
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise RunError(f"{checkpoint.path} has tensor {left[0]}{more}, which {what} of this size does not have")
    return found


def _check_numbers(checkpoint: Checkpoint, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
        raise RunError(f"{checkpoint.path}: tensor {name} has numbers that are not finite, or no floats; {REMEDY}")
