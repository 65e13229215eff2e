"""Whether processes that share work (`ral_gym.runs.sharing`) still hold the same numbers.

Sharing rests on it: with other weights or another random state in one process everything would run on without an error
and learn nonsense. So the numbers of each process are boiled down to one per part, and compared now and then.
"""

from __future__ import annotations

import json
import re
import zlib
from typing import Any

import torch
from torch import Tensor

from ral_gym.errors import RunError
from ral_gym.runs.sharing import Processes
from ral_gym.runs.storage import pack_state

MISSING = re.compile(r"[Rr]anks? ([\d, ]+) failed to pass monitoredBarrier")
"""What torch says of processes that do not come."""


def digest(state: Any) -> int:
    """A number for tensors, arrays, numbers, texts, and lists and dicts of these: equal for equal bits.

    Raises:
        TypeError: something else.
    """
    tensors, rest = pack_state({"state": state})
    sums = [_bits(tensor) for tensor in tensors.values()]
    found = zlib.crc32(json.dumps(rest, sort_keys=True).encode())
    for number in torch.stack([total.cpu() for total in sums]).tolist() if sums else []:
        found = (found * 1_000_003 + number) % 2**63
    return found


def _bits(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits, read as whole numbers of 32 bits, modulo 2^64."""
    flat = tensor.detach().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)
    whole = len(flat) - len(flat) % 4
    return flat[:whole].view(torch.int32).sum(dtype=torch.int64) + flat[whole:].sum(dtype=torch.int64)


def check_alike(processes: Processes, state: dict[str, Any], when: str) -> None:
    """Compare the parts of a state.

    Args:
        processes: all of them call it.
        state: part -> what `digest` takes.
        when: such as `after update 40`, for the message.

    Raises:
        RunError: names the first process and part that differ from process 0's.
    """
    if processes.size == 1:
        return
    found = processes.tell({name: digest(part) for name, part in state.items()})
    for rank, parts in enumerate(found):
        other = [name for name, value in found[0].items() if parts.get(name) != value]
        if other or parts.keys() != found[0].keys():
            name = next(iter(other), "what is compared")
            raise RunError(
                f"process {rank} is not where process 0 is ({name}, {when}): all must run the same program with the "
                "same seed, versions and kind of device; start again from the last checkpoint"
            )


def check_same_kind(processes: Processes, facts: dict[str, Any]) -> None:
    """Refuse processes that would compute other numbers than process 0 does.

    Args:
        processes: all of them call it.
        facts: name -> text or number, besides torch's version, the device's name and the number of threads.

    Raises:
        RunError: names the first process and fact that differ from process 0's.
    """
    if processes.size == 1:
        return
    on_gpu = processes.device.type == "cuda"
    own = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(processes.device) if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        **facts,
    }
    found = processes.tell(own)
    for rank, theirs in enumerate(found):
        for name, value in found[0].items():
            if theirs.get(name) != value:
                raise RunError(
                    f"process {rank} is of another kind than process 0: {name} is {theirs.get(name)!r:.60}, not "
                    f"{value!r:.60}; start all on machines that are alike"
                )


def check_in(processes: Processes, when: str) -> None:
    """Wait for all processes.

    Raises:
        RunError: names those that did not come in time.
    """
    try:
        processes.check_in()
    except RuntimeError as error:
        missing = MISSING.search(str(error))
        if missing is None:
            raise
        raise RunError(
            f"process {missing[1].strip()} of {processes.size} did not answer ({when}): it died, hangs or was "
            "stopped; saved files are kept: end all, and run the same command again to continue"
        ) from error
