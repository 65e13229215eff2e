"""What several GPUs would gain, on paper: the seconds of a step on one and on W of them.

    seconds = max(products / W, reading weights) + sums of gradients + bookkeeping

* Products are the dry run's FLOPs at `FLOPS`.
* Drawing reads all weights once per code, however few images a GPU draws: its time does not fall below that, so that
  stage 3 gains from several GPUs only with images to go with them.
* Sums of gradients: an all-reduce moves 2 (W - 1) / W times their bytes.
* Bookkeeping, the environment and the buffer, is repeated by every process (stage 3 only).

The speeds are of an H100 and its NVLink, read or assumed and not measured here; with other hardware times change, and
shares less so.
"""

from __future__ import annotations

from dataclasses import dataclass

from ral_gym.commands.counting import StageCost

FLOPS = 40e12
"""Products per second of one GPU in 32 bits (assumed: two thirds of an H100's peak)."""
READ = 2e12
"""Bytes of weights per second (assumed: 60 % of an H100's memory bandwidth)."""
LINK = 400e9
"""Bytes per second of an all-reduce (read: 471e9 between 8 H200, 371e9 between 4 nodes of 8 B200)."""
BOOKKEEPING = 7e-7
"""Seconds of a CPU per drawn code (measured, to 512 environments)."""


@dataclass(frozen=True)
class Sharing:
    """A stage's step on W GPUs."""

    seconds_alone: float
    """On one."""
    seconds: float
    """On W."""
    sending: float
    """Of these, the part of sums of gradients, 0..1."""
    efficiency: float
    """seconds_alone / (W seconds): 1 is W times as fast as one."""


def sharing_of(cost: StageCost, processes: int) -> Sharing:
    """A stage on so many GPUs; its batch stays the same."""
    alone, _ = _seconds(cost, 1)
    joint, sending = _seconds(cost, processes)
    return Sharing(alone, joint, sending / joint, alone / (processes * joint))


def _seconds(cost: StageCost, processes: int) -> tuple[float, float]:
    """Seconds of a step, and those of its sums of gradients."""
    drawing = max(cost.drawing_flops / processes / FLOPS, cost.read / READ)
    other = (cost.flops_per_step - cost.drawing_flops) / processes / FLOPS
    sending = 2 * (processes - 1) / processes * cost.sent / LINK
    seconds = drawing + other + sending + BOOKKEEPING * cost.codes
    return max(seconds, 1e-9), sending
