"""What every test starts from: one thread, fixed seeds, no display."""

import os
import random

os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import numpy as np
import pytest
import torch

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
