"""What every test starts from: one thread, fixed seeds, no display."""

import os
import random
import shutil
import signal
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")

# The tests are for a CPU, bit for bit; those that need a GPU are run by `make test-cuda`.
if not os.environ.get("RAL_GYM_TEST_CUDA"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import hypothesis
import numpy as np
import pytest
import torch

# A shell's background jobs ignore Ctrl-C, and so would the scripts that the tests start and stop.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Several workers share the cores, and one thread sums in one order.
torch.set_num_threads(1)

# The same examples every time, however slow the machine: a failure seen once is seen again.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Start every test from the same global random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smoke_options() -> list[str]:
    """Arguments of the training command for a run of a few seconds."""
    evaluation = ["--evaluation.n-samples", "24", "--evaluation.temperatures", "0.3"]
    return ["--preset", "smoke", "--data.workers", "1", "--quiet", *evaluation]


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory, smoke_options: list[str]) -> Path:
    """The folder of a finished run with `smoke_options`; one per worker, so copy it before changing anything."""
    from ral_gym.commands.cli import train_main

    runs = tmp_path_factory.mktemp("runs")
    assert train_main([*smoke_options, "--runs", str(runs)]) == 0
    return runs / "smoke"


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser; without one the test is skipped, or fails where one is required."""
    found = shutil.which("chromium") or shutil.which("/usr/bin/chromium")
    if found is None:
        reason = "no chromium: install it (Debian: apt-get install chromium) to open pages in a browser"
        if os.environ.get("RAL_GYM_REQUIRE_CHROMIUM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return found
