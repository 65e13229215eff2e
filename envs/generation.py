"""The single Gymnasium environment over the batched core: for teaching, checking and rendering."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from ral_gym.codes import CodeGrid
from ral_gym.envs.core import Finished, GenerationCore
from ral_gym.envs.worlds import World

GREY = 128
MINIMUM_RENDER_SIZE = 256


def observation_space(grid: CodeGrid) -> spaces.Box:
    """``Box(0, K + 1, (T,), int16)``: K is "not drawn yet", K + 1 "will not be drawn in this episode"."""
    return spaces.Box(0, grid.never_drawn, (grid.n_codes,), np.int16)


def action_space(grid: CodeGrid) -> spaces.Discrete:
    """``Discrete(K)``: the next code."""
    return spaces.Discrete(grid.codebook_size)


def finished_info(finished: Finished, number: int) -> dict[str, Any]:
    """What the last step of an episode tells: `codes` (T,), `score_map` (h, w) and `step_rewards` (T,)."""
    info: dict[str, Any] = {"codes": finished.codes[number].astype(np.int16)}
    if finished.score_map:
        info["score_map"] = finished.score_map[number]
        info["step_rewards"] = finished.step_rewards[number]
    return info


def render_codes(world: World, codes: Tensor) -> np.ndarray:
    """The image so far: drawn codes decoded, every other cell grey.

    Args:
        world: decodes.
        codes: (T,) int64 with the tokens K and K + 1.

    Returns:
        (side, side, 3) uint8, at least 256 pixels a side.
    """
    grid = world.grid
    drawn = codes < grid.codebook_size  # (T,)
    image = world.decode(torch.where(drawn, codes, 0)[None])[0]  # (C, S, S)
    scale = image.shape[-1] // grid.width
    mask = drawn.cpu().reshape(grid.height, grid.width).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    pixels = torch.where(mask, image.cpu(), torch.tensor(GREY, dtype=torch.uint8)).expand(3, -1, -1)
    factor = max(1, -(-MINIMUM_RENDER_SIZE // image.shape[-1]))
    return pixels.permute(1, 2, 0).numpy().repeat(factor, 0).repeat(factor, 1)


def render_text(grid: CodeGrid, codes: Tensor) -> str:
    """The codes as a table: ``.`` not drawn yet, ``x`` not drawn in this episode."""
    width = len(str(grid.codebook_size - 1))
    marks = {grid.not_drawn: ".", grid.never_drawn: "x"}
    cells = [marks.get(code, str(code)).rjust(width) for code in codes.tolist()]
    rows = [cells[i : i + grid.width] for i in range(0, len(cells), grid.width)]
    return "\n".join(" ".join(row) for row in rows) + "\n"


class GenerationEnv(gym.Env[np.ndarray, np.int64]):
    """One episode draws one image, code by code. Subclasses choose the world and carry its documentation.

    Args:
        world: what to draw in.
        reset_mode: `full`, `continue`, `scratch` or `mixed`.
        render_mode: `rgb_array`, `ansi` or None.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array", "ansi"], "render_fps": 8}  # type: ignore[misc]

    def __init__(self, world: World, *, reset_mode: str = "full", render_mode: str | None = None) -> None:
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"render_mode {render_mode!r} is unknown: choose from {self.metadata['render_modes']}")
        self.world = world
        self.render_mode = render_mode
        self.observation_space = observation_space(world.grid)
        self.action_space = action_space(world.grid)
        self.core = GenerationCore(
            world.grid,
            1,
            scorer=world.scorer,
            real_codes=world.real_codes,
            reset_mode=reset_mode,
            row_multiple=world.row_multiple,
            device=world.device,
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; see the class page for `options`.

        Raises:
            ValueError: an option that is unknown or out of range.
        """
        super().reset(seed=seed)
        if seed is not None:
            self.core.seed([seed])
        self.core.rngs[0] = self.np_random
        self.core.reset(np.zeros(1, np.int64), options)
        return self.core.observations()[0], {}

    def step(self, action: np.int64 | int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Draw one code.

        Args:
            action: an integer in 0..K-1.

        Returns:
            observation, reward (0 until the last code), terminated, truncated (always False), info (empty until the
            last code).

        Raises:
            ValueError: the action is no integer in 0..K-1; the state is unchanged.
            gymnasium.error.ResetNeeded: there is no running episode.
        """
        if not self.action_space.contains(action):
            raise ValueError(
                f"action {action!r} ({type(action).__name__}) is not a code: give an integer in "
                f"0..{self.world.grid.codebook_size - 1}"
            )
        if int(self.core.position[0]) >= int(self.core.stop[0]):
            raise gym.error.ResetNeeded("the episode has ended or not begun: call reset() before step()")
        finished = self.core.step(torch.as_tensor([int(action)], device=self.core.device))
        observation = self.core.observations()[0]
        if finished is None:
            return observation, 0.0, False, False, {}
        return observation, float(finished.rewards[0]), True, False, finished_info(finished, 0)

    def render(self) -> np.ndarray | str | None:  # type: ignore[override]
        """`rgb_array`: the decoded image so far, undrawn cells grey; `ansi`: the codes as text."""
        if self.render_mode is None:
            gym.logger.warn("render() called without a render_mode: pass render_mode='rgb_array' or 'ansi' to make()")
            return None
        if self.render_mode == "ansi":
            return render_text(self.world.grid, self.core.codes[0])
        return render_codes(self.world, self.core.codes[0])
