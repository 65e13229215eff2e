"""Stage 3 with something wrong in one process: a program for ``torchrun``.

``joint_faults.py FAULT FLAG ARGUMENTS ..`` runs ``ral-gym ARGUMENTS ..``; process 1 dies (`die`), hangs (`hang`) or
changes a weight (`drift`) after its fifth update, unless the file FLAG exists, which it makes then; `threads`: process
1 uses another number of threads. With `sound` nothing is wrong.
"""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from ral_gym.agents import train_ral
from ral_gym.agents.callbacks import RunCallback
from ral_gym.commands.cli import main
from ral_gym.runs.sharing import Processes

UPDATE, PATIENCE = 5, timedelta(seconds=4)


def go_wrong(fault: str, flag: Path) -> None:
    """Let process 1 do so after `UPDATE` updates, once."""
    usual = RunCallback._after_update

    def after_update(self: Any) -> None:
        usual(self)
        if self.updates != UPDATE or self.processes.rank != 1 or flag.exists():
            return
        flag.touch()
        if fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hang":
            time.sleep(60)
        if fault == "drift":
            next(self.model.policy.parameters()).data[0] += 1e-3

    RunCallback._after_update = after_update  # type: ignore[method-assign]


if __name__ == "__main__":
    fault, flag, *arguments = sys.argv[1:]
    torch.set_num_threads(2 if fault == "threads" and os.environ.get("RANK") == "1" else 1)
    join = Processes.join
    train_ral.Processes.join = lambda device: join(device, PATIENCE)  # type: ignore[method-assign, assignment]
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and os.environ["RANK"] == "1":
        time.sleep(3)  # the other one must not take the address of this one's predecessor for its own
    go_wrong(fault, Path(flag))
    sys.exit(main(arguments))
