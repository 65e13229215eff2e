"""The passes of a policy that several processes share: each computes some of the episodes (`ral_gym.runs.sharing`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ral_gym.agents.episodes import Episodes
from ral_gym.runs.sharing import Processes, with_shared_weights


def shared_pass(
    policy: Any,
    episodes: Episodes,
    function: Callable[..., tuple[Tensor, ...]],
    *given: Tensor | None,
    one_by_one: bool = False,
) -> tuple[Tensor, ...]:
    """What a function gives for transitions, of which each process computes those of its episodes.

    Args:
        policy: a `PriorPolicy`, whose weights the function uses.
        episodes: N transitions, in the order of their grids.
        function: takes `Episodes` and the same transitions of `given`; returns tensors (n, ...), one row each.
        *given: (N, ...), (K,) or None.
        one_by_one: see `with_shared_weights`.

    Returns:
        the function's tensors (N, ...).
    """
    processes = policy.processes
    if processes.size == 1:
        return function(episodes, *given)
    bounds = _bounds(processes, episodes)
    sizes = np.diff(bounds).tolist()
    first, last = bounds[processes.rank], bounds[processes.rank + 1]
    own = slice(first, last) if last > first else slice(0, 1)  # see `Processes.rows`
    arguments = [_part(episodes, own), *(_rows(value, own, len(episodes)) for value in given)]
    if torch.is_grad_enabled():
        found = with_shared_weights(processes, policy, lambda: function(*arguments), one_by_one)
    else:
        found = function(*arguments)
    return tuple(processes.gather_columns(found, sizes))


def _bounds(processes: Processes, episodes: Episodes) -> np.ndarray:
    """(W + 1,) the transitions at which the processes' shares begin, and N."""
    grids = [processes.share_of(len(episodes.codes), rank).start for rank in range(processes.size)]
    found: np.ndarray = np.searchsorted(episodes.row.cpu().numpy(), [*grids, len(episodes.codes)])
    return found


def _part(episodes: Episodes, own: slice) -> Episodes:
    """Some consecutive transitions, with only their grids."""
    row = episodes.row[own]
    ends = row[[0, -1]].tolist()
    return Episodes(episodes.codes[ends[0] : ends[1] + 1], row - ends[0], episodes.pos[own], episodes.length)


def _rows(value: Any, own: slice, n: int) -> Any:
    return value[own] if isinstance(value, Tensor | np.ndarray) and value.ndim and len(value) == n else value


def shared_step(processes: Processes, n: int, step: Callable[[slice], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What a step of a rollout gives for n environments, of which each process computes its own."""
    if processes.size == 1 or torch.is_grad_enabled():
        return step(slice(0, n))
    return tuple(processes.gather_columns(step(processes.rows(n)), processes.sizes(n)))


def joint_uniforms(to_draw: Tensor, device: torch.device) -> Tensor:
    """Uniforms (E, L) as drawing all E rows takes them from the global generator: E at a time, position by position.

    Args:
        to_draw: (E, L) bool, on the host, equal in all rows.
        device: whose generator.
    """
    uniforms = torch.zeros(to_draw.shape, device=device)
    for position in to_draw[0].nonzero().squeeze(1).tolist():
        uniforms[:, position] = torch.rand(len(to_draw), device=device, dtype=torch.float32)
    return uniforms
