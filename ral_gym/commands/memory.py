"""Whether a CUDA device has the memory that stages 1 and 2 need, before anything is trained."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from ral_gym.commands.arguments import STAGES
from ral_gym.commands.dry_run import StageCost, dry_run
from ral_gym.commands.stage_files import files_of
from ral_gym.errors import DeviceError
from ral_gym.runs.run import Run
from ral_gym.stages.processes import Compute, process_count

GIB = 2**30
HALVES = "--gradient-accumulation {parts} or --mixed-precision bf16"
REMEDIES = {"vqvae": f"{HALVES}, or a lower --vqvae.batch-size", "prior": f"{HALVES}, or a lower --prior.batch-size"}
logger = logging.getLogger("ral_gym")


def check_memory(run: Run, stages: Sequence[str], device: torch.device, compute: Compute) -> None:
    """Refuse stages 1 and 2 if they are still to be trained and need more than the device's free memory.

    Stage 3 is not asked: its updates may go over their episodes in chunks of any size. The estimate is the dry run's,
    without a framework's own buffers, so that a refused stage cannot fit.

    Args:
        run: the run; finished stages are passed over.
        stages: those asked for.
        device: where they train; only CUDA devices are asked for their memory.
        compute: precision and accumulation parts of stages 1 and 2.

    Raises:
        DeviceError: the stage, what it needs, what there is, and what to change.
    """
    asked = [stage for stage in STAGES[:2] if stage in stages and not all(map(run.has, files_of(stage, run.config)))]
    if device.type != "cuda" or not asked:
        return
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        costs = dry_run(run.config, compute, process_count()).stages
    except Exception as error:  # a part of the user's own may not run without data; training says what is wrong with it
        logger.debug("no estimate of memory: %s", error)
        return
    for cost in costs:
        stage = STAGES[int(cost.stage[0]) - 1]  # such as "2 top prior"
        if stage in asked and cost.memory > free:
            raise _too_little(cost, stage, free, device, compute)


def _too_little(cost: StageCost, stage: str, free: int, device: torch.device, compute: Compute) -> DeviceError:
    remedy = REMEDIES[stage].format(parts=2 * compute.gradient_accumulation)
    return DeviceError(
        f"stage {cost.stage} needs {cost.memory / GIB:.1f} GiB, but device '{device}' has {free / GIB:.1f} GiB free: "
        f"give {remedy}"
    )
