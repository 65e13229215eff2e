"""The single Gymnasium environment over the batched core: for teaching, checking and rendering."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from ral_gym.envs.core import GenerationCore
from ral_gym.envs.rendering import RENDER_FPS, RENDER_MODES, check_render_mode, render_codes, render_text
from ral_gym.envs.worlds import World
from ral_gym.grid import CodeGrid


def observation_space(grid: CodeGrid) -> spaces.Box:
    """``Box(0, K + 1, (T,), int16)``: K is "not drawn yet", K + 1 "will not be drawn in this episode".

    With N classes ``Box(0, K + 1 + N, (T + 1,), int16)``: the last entry is K + 2 + class, from the first step on.
    """
    return spaces.Box(0, grid.largest_entry, (grid.length,), np.int16)


def action_space(grid: CodeGrid) -> spaces.Discrete:
    """``Discrete(K)``: the next code."""
    return spaces.Discrete(grid.codebook_size)


class GenerationEnv(gym.Env[np.ndarray, np.int64]):
    """One episode draws one image, code by code. Subclasses choose the world and document it.

    Args:
        world: what to draw in.
        reset_mode: `full`, `continue`, `scratch` or `mixed`.
        render_mode: `rgb_array`, `ansi` or None.
        label_draw: with classes, how an episode's class is drawn: `uniform`, or `data`, as often as among real images.

    Raises:
        ValueError: an unknown mode, or one that is impossible in this world.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": list(RENDER_MODES),
        "render_fps": RENDER_FPS,
    }

    def __init__(
        self,
        world: World,
        *,
        reset_mode: str = "full",
        render_mode: str | None = None,
        label_draw: str = "uniform",
    ) -> None:
        check_render_mode(render_mode)
        self.world = world
        self.render_mode = render_mode
        self.observation_space = observation_space(world.grid)
        self.action_space = action_space(world.grid)
        self.core = GenerationCore(world, 1, reset_mode=reset_mode, label_draw=label_draw)

    @property
    def levels(self) -> tuple[int, ...]:
        """How many codes each level has; `algorithm_defaults` passes it to the policy and the buffer."""
        return self.world.grid.level_sizes

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; see the class page for `options`.

        Returns:
            observation, info: empty, or with classes `label`, the class of the image that will be drawn.

        Raises:
            ValueError: an option that is unknown or out of range; nothing has changed then.
        """
        if options is not None and not isinstance(options, Mapping):
            raise ValueError(f"options are {options!r}: give one mapping, such as {{'prefix_rows': 2}}")
        self.core.check_options(options)
        super().reset(seed=seed)
        self.core.rngs[0] = self.np_random
        self.core.reset(np.zeros(1, np.int64), options)
        labels = self.core.labels_of(np.zeros(1, np.int64))
        return self.core.observations()[0], {} if labels is None else {"label": int(labels[0])}

    def step(self, action: np.int64 | int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Draw one code.

        Args:
            action: an integer in 0..K-1.

        Returns:
            observation, reward (0 until the last code, unless an oracle rewards every code), terminated, truncated
            (always False), info (empty until the last code).

        Raises:
            ValueError: the action is not an integer in 0..K-1; nothing has changed then.
            gymnasium.error.ResetNeeded: there is no running episode.
        """
        if not self.action_space.contains(action):
            raise ValueError(
                f"action {action!r} ({type(action).__name__}) is not a code: give an integer in "
                f"0..{self.world.grid.codebook_size - 1}"
            )
        finished = self.core.step(np.array([action], np.int64))
        observation = self.core.observations()[0]
        reward = float(self.core.rewards[0])
        if finished is None:
            return observation, reward, False, False, {}
        return observation, reward, True, False, finished.info(0)

    def action_masks(self) -> np.ndarray:
        """(K,) bool, the codes that may come next, as `MaskablePPO` needs them."""
        return self.core.action_masks()[0]

    def render(self) -> np.ndarray | str | None:
        """`rgb_array`: the decoded image so far, undrawn cells grey; `ansi`: the codes as text."""
        if self.render_mode is None:
            gym.logger.warn("render() called without a render_mode: pass render_mode='rgb_array' or 'ansi' to make()")
            return None
        if self.render_mode == "ansi":
            return render_text(self.world.grid, self.core.codes, self.world.class_names)[0]
        return render_codes(self.world, self.core.codes)[0]


class RegisteredEnv(GenerationEnv):
    """Base of the registered ids' environments, whose pages list the arguments.

    Args:
        *args: what makes the world, see `make_world`.
        reset_mode: see `GenerationEnv`.
        render_mode: see there.
        label_draw: see there.
        **kwargs: as `args`, such as `reward` and `device`.
    """

    make_world: ClassVar[Callable[..., World]]

    def __init__(
        self,
        *args: Any,
        reset_mode: str = "full",
        render_mode: str | None = None,
        label_draw: str = "uniform",
        **kwargs: Any,
    ) -> None:
        world = self.make_world(*args, **kwargs)
        super().__init__(world, reset_mode=reset_mode, render_mode=render_mode, label_draw=label_draw)
