"""The state of generation episodes as a checkpoint has it, checked before it is put back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ral_gym.grid import CodeGrid
from ral_gym.runs.checked_state import array_of


def checked_arrays(state: Mapping[str, Any], grid: CodeGrid, num_envs: int) -> dict[str, np.ndarray]:
    """The arrays of `GenerationCore.state_dict`.

    Args:
        state: what the checkpoint has.
        grid: the shape of the codes, and how many classes there are.
        num_envs: E.

    Returns:
        fresh arrays by the names of the state.

    Raises:
        ValueError: they come from another number of environments or another grid, or do not fit together.
    """
    shape, rows = (num_envs, grid.length), (num_envs,)
    if np.shape(state["codes"]) != shape or len(state["rngs"]) != num_envs:
        found = np.shape(state["codes"])
        raise ValueError(f"the state has {found} codes (environments, entries), these environments {shape}")
    largest = {"start": grid.n_codes, "position": grid.n_codes, "stop": grid.n_codes}
    largest |= {"image_rows": grid.height, "pending": grid.height}
    arrays = {name: array_of(state[name], name, rows, np.int64, 0, most) for name, most in largest.items()}
    arrays["codes"] = array_of(state["codes"], "codes", shape, np.int16, 0, grid.largest_entry)
    arrays["to_draw"] = array_of(state["to_draw"], "to_draw", shape, bool)
    arrays["paid"] = array_of(state["paid"], "paid", (num_envs, grid.n_codes), np.float32)
    codes, labels = grid.without_labels(arrays["codes"]), grid.labels_of(arrays["codes"])
    misplaced = labels is not None and bool(((labels < 0) & (arrays["stop"] > 0)).any())
    if misplaced or codes.max() > grid.never_drawn:
        raise ValueError("an observation of the state has a code in the place of its label, or a label among its codes")
    left = codes == grid.not_drawn  # (E, T)
    position, stop = left.argmax(1), grid.n_codes - left[:, ::-1].argmax(1)
    to_draw = grid.without_labels(arrays["to_draw"])
    agree = (arrays["position"] == position) & (arrays["stop"] == stop) & (left <= to_draw).all(1)
    ended = arrays["position"] >= arrays["stop"]  # or not reset yet: 0 and 0
    if not np.where(left.any(1) & (arrays["stop"] > 0), agree, ended).all():
        raise ValueError("the positions of the episodes are not those of the codes that are left to draw")
    return arrays
