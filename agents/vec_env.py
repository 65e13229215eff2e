"""Stable-Baselines3's `VecEnv` over the batched generation core."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.registration import load_env_creator
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from torch import Tensor

from ral_gym.envs.core import Finished, GenerationCore
from ral_gym.envs.generation import action_space, finished_info, observation_space, render_codes
from ral_gym.envs.worlds import World
from ral_gym.errors import ConfigError


class CodeVecEnv(VecEnv):
    """E generation episodes for SB3: one batched decode and critic call when they end, infos for finished rows only.

    Finished rows are reset at once (SB3's semantics) and carry `terminal_observation` and a Monitor's `episode`
    entry, so no `VecMonitor` is needed around it.

    Args:
        world: what to draw in.
        num_envs: E.
        reset_mode: `full`, `continue`, `scratch` or `mixed`.
        lockstep: one mode and row count per round for all rows alike; False: each row draws its own.
        paired: for `mixed`, complementary pairs of episodes (see `StartDistribution`).
        render_mode: `rgb_array` or None.
    """

    def __init__(
        self,
        world: World,
        num_envs: int,
        *,
        reset_mode: str = "full",
        lockstep: bool = True,
        paired: bool = False,
        render_mode: str | None = None,
    ) -> None:
        self.world, self.render_mode = world, render_mode
        self.core = GenerationCore(
            world.grid,
            num_envs,
            scorer=world.scorer,
            real_codes=world.real_codes,
            reset_mode=reset_mode,
            row_multiple=world.row_multiple,
            lockstep=lockstep,
            paired=paired,
            device=world.device,
        )
        self._actions = torch.zeros(num_envs, dtype=torch.int64)
        self._started = time.time()
        super().__init__(num_envs, observation_space(world.grid), action_space(world.grid))

    def reset(self) -> np.ndarray:
        """Start all episodes; honours `seed` and `set_options` (row 0's options, for all rows)."""
        self.core.seed(list(self._seeds))
        options = self._options[0] if self._options else None
        self.core.reset(np.arange(self.num_envs), options or None)
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = [{} for _ in range(self.num_envs)]
        return self.core.observations()

    def step_async(self, actions: np.ndarray) -> None:
        """Take the codes (E,) to draw.

        Raises:
            ValueError: not E integers in 0..K-1.
        """
        actions = np.asarray(actions).reshape(-1)
        size = self.world.grid.codebook_size
        if actions.shape != (self.num_envs,) or not np.issubdtype(actions.dtype, np.integer):
            raise ValueError(f"actions {actions.shape} {actions.dtype}: give {self.num_envs} integers in 0..{size - 1}")
        if actions.min() < 0 or actions.max() >= size:
            raise ValueError(f"actions in {actions.min()}..{actions.max()}: codes lie in 0..{size - 1}")
        self._actions = torch.from_numpy(actions.astype(np.int64)).to(self.core.device)

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:  # type: ignore[override]
        """Observations (E, T) int16, rewards (E,) float32, dones (E,) bool, infos."""
        finished = self.core.step(self._actions)
        if finished is None:
            infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
            return self.core.observations(), np.zeros(self.num_envs, np.float32), np.zeros(self.num_envs, bool), infos
        return self._after(finished)

    def step_round(self, codes: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Finish every running episode at once with the codes of whole images; returns as `step_wait`.

        Args:
            codes: (E, T) int64; only positions still to be drawn are taken.
        """
        return self._after(self.core.draw_round(codes))

    def _after(self, finished: Finished) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Reset the finished rows and tell what they did."""
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        rewards, dones = np.zeros(self.num_envs, np.float32), np.zeros(self.num_envs, bool)
        rewards[finished.rows], dones[finished.rows] = finished.rewards, True
        seconds = round(time.time() - self._started, 6)
        for number, row in enumerate(finished.rows):
            length = int(finished.stop[number] - finished.start[number])
            episode = {"r": float(finished.rewards[number]), "l": length, "t": seconds}
            infos[row] = {
                **finished_info(finished, number),
                "terminal_observation": finished.codes[number].astype(np.int16),
                "TimeLimit.truncated": False,
                "episode": episode,
            }
        self.core.reset(finished.rows)
        return self.core.observations(), rewards, dones, infos

    def close(self) -> None:
        """Nothing to close."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The adapter's attribute, once per environment."""
        return [getattr(self, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set the adapter's attribute; it is shared by all environments."""
        setattr(self, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Call the adapter's method once; its result stands for every environment."""
        result = getattr(self, method_name)(*method_args, **method_kwargs)
        return [result] * len(list(self._get_indices(indices)))

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: Any = None) -> list[bool]:
        """True for `Monitor`: the adapter writes the same `episode` entries."""
        return [issubclass(wrapper_class, Monitor)] * len(list(self._get_indices(indices)))

    def get_images(self) -> Sequence[np.ndarray | None]:
        """The images so far, one per environment."""
        return [render_codes(self.world, codes) for codes in self.core.codes]


def make_sb3_env(
    id: str,
    n_envs: int = 1,
    *,
    reset_mode: str = "full",
    lockstep: bool = True,
    paired: bool | None = None,
    seed: int | None = None,
    render_mode: str | None = None,
    **kwargs: Any,
) -> CodeVecEnv:
    """A registered environment as an SB3 `VecEnv`.

    Args:
        id: such as ``ral_gym/Toy-v0``.
        n_envs: E.
        reset_mode: `full`, `continue`, `scratch` or `mixed`.
        lockstep: one mode and row count per round for all rows alike (needed for the fast path and for `n_steps = T`).
        paired: complementary pairs for `mixed`, so that ``n_steps = T`` always ends on an episode's end; None: yes for
            lockstep `mixed`.
        seed: row i is seeded with seed + i.
        render_mode: `rgb_array` or None.
        **kwargs: the environment's own arguments, such as `run`, `reward`, `device`.

    Raises:
        ConfigError: the id is not one of ral_gym's.
        ValueError: see the environment's page.
    """
    spec = gym.spec(id)
    creator: Any = load_env_creator(spec.entry_point) if isinstance(spec.entry_point, str) else spec.entry_point
    if not hasattr(creator, "make_world"):
        raise ConfigError(f"{id} is not a ral_gym environment: make_sb3_env takes ral_gym/... ids")
    world = creator.make_world(**{**spec.kwargs, **kwargs})
    paired = (lockstep and reset_mode == "mixed") if paired is None else paired
    env = CodeVecEnv(
        world, n_envs, reset_mode=reset_mode, lockstep=lockstep, paired=paired, render_mode=render_mode
    )
    if seed is not None:
        env.seed(seed)
    return env


def unwrap_code_env(env: VecEnv) -> CodeVecEnv | None:
    """The `CodeVecEnv` under any wrappers, or None."""
    while isinstance(env, VecEnvWrapper):
        env = env.venv
    return env if isinstance(env, CodeVecEnv) else None


def real_codes(env: VecEnv) -> np.ndarray | None:
    """The codes of real images behind an environment, (N, T), or None."""
    found = unwrap_code_env(env)
    return None if found is None else found.world.real_codes


__all__: Iterable[str] = ["CodeVecEnv", "make_sb3_env", "real_codes", "unwrap_code_env"]
