"""Stable-Baselines3's `VecEnv` over the batched generation core."""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec, load_env_creator
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, unwrap_vec_normalize
from torch import Tensor

from ral_gym.agents.spaces import sequence_shape
from ral_gym.envs.core import GenerationCore
from ral_gym.envs.finished import Finished
from ral_gym.envs.generation import action_space, observation_space
from ral_gym.envs.rendering import RENDER_FPS, check_render_mode, render_codes
from ral_gym.envs.worlds import World
from ral_gym.errors import ConfigError

StepReturn = tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]


class CodeVecEnv(VecEnv):
    """E generation episodes for SB3: one batched decode and critic call when they end, infos for finished rows only.

    Finished rows are reset at once (SB3's semantics) and carry `terminal_observation` and a Monitor's `episode`
    entry, so no `VecMonitor` is needed around it: SB3 warns that one would write over those entries.

    Args:
        world: the environment's world.
        num_envs: E.
        reset_mode: `full`, `continue`, `scratch` or `mixed`.
        lockstep: one mode and row count per round for all rows; False: each row draws its own.
        paired: for `mixed`, complementary pairs of episodes (see `StartDistribution`).
        render_mode: `rgb_array` or None.
        label_draw: with classes, how an episode's class is drawn: `uniform`, or `data`, as often as among real images.

    Raises:
        ValueError: an unknown mode, or one that is impossible in this world.
    """

    spec: EnvSpec | None = None

    def __init__(
        self,
        world: World,
        num_envs: int,
        *,
        reset_mode: str = "full",
        lockstep: bool = True,
        paired: bool = False,
        render_mode: str | None = None,
        label_draw: str = "uniform",
    ) -> None:
        check_render_mode(render_mode)
        self.world, self.render_mode = world, render_mode
        self.core = GenerationCore(
            world, num_envs, reset_mode=reset_mode, lockstep=lockstep, paired=paired, label_draw=label_draw
        )
        self._actions: np.ndarray | None = None
        self._options_for_all: dict | None = None
        self._started = time.time()
        super().__init__(num_envs, observation_space(world.grid), action_space(world.grid))
        self.metadata: dict[str, Any] = {**self.metadata, "render_fps": RENDER_FPS}

    @property
    def levels(self) -> tuple[int, ...]:
        """How many codes each level has."""
        return self.world.grid.level_sizes

    def set_options(self, options: list[dict] | dict | None = None) -> None:
        """Options of the next `reset`: one dict for all rows, or one per row.

        Raises:
            ValueError: an option that is unknown or out of range; nothing has changed then.
        """
        self.core.check_options(options)
        super().set_options(options)
        self._options_for_all = deepcopy(options) if isinstance(options, dict) else None

    def _reset_options(self) -> None:
        super()._reset_options()
        self._options_for_all = None

    def reset(self) -> np.ndarray:
        """Start all episodes; honours `seed` and `set_options`, once."""
        own = self._options if any(self._options) else None
        self.core.reset(np.arange(self.num_envs), self._options_for_all or own, self._seeds)
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = [{} for _ in range(self.num_envs)]
        self._show_labels(np.arange(self.num_envs))
        return self.core.observations()

    def _show_labels(self, rows: np.ndarray) -> None:
        """With classes, write those of rows (n,) that have just been reset into `reset_infos`."""
        labels = self.core.labels_of(rows)
        if labels is not None:
            for row, label in zip(rows.tolist(), labels.tolist(), strict=True):
                self.reset_infos[row] = {"label": label}

    def step_async(self, actions: np.ndarray) -> None:
        """Store the codes (E,) to draw; `step_wait` draws them."""
        self._actions = np.asarray(actions)

    def step_wait(self) -> StepReturn:
        """Draw the codes.

        Returns:
            observations (E, T) int16, with classes (E, T + 1), rewards (E,) float32, dones (E,) bool, infos ({} if no
            episode ended).

        Raises:
            ValueError: not E integers in 0..K-1; nothing has changed then.
            gymnasium.error.ResetNeeded: `reset` was not called yet.
        """
        if self._actions is None:
            raise ValueError("step_wait() without actions: call step_async() first")
        actions, self._actions = self._actions, None
        finished = self.core.step(actions)
        if finished is None:
            infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
            return self.core.observations(), self.core.rewards.copy(), np.zeros(self.num_envs, bool), infos
        return self._after(finished)

    def step_round(self, codes: np.ndarray | Tensor) -> StepReturn:
        """Finish every running episode at once with the codes of whole images; returns as `step_wait`.

        Args:
            codes: (E, T) integer, with classes (E, T + 1); only positions still to be drawn are used.

        Raises:
            ValueError: another shape, or no code at a position to draw; nothing has changed then.
            gymnasium.error.ResetNeeded: there was no `reset` yet.
        """
        return self._after(self.core.draw_round(codes))

    def _after(self, finished: Finished) -> StepReturn:
        """Reset the finished rows and return their results."""
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        rewards, dones = self.core.rewards.copy(), np.zeros(self.num_envs, bool)
        dones[finished.rows] = True
        seconds = round(time.time() - self._started, 6)
        lengths = finished.lengths.tolist()
        for number, row in enumerate(finished.rows.tolist()):
            infos[row] = {
                **finished.info(number),
                "terminal_observation": finished.codes[number],
                "TimeLimit.truncated": False,
                "episode": {"r": float(finished.returns[number]), "l": lengths[number], "t": seconds},
            }
        self.core.reset(finished.rows)
        self._show_labels(finished.rows)
        return self.core.observations(), rewards, dones, infos

    def action_masks(self) -> np.ndarray:
        """(E, K) bool, the codes that may come next in each row; `env_method` gives `MaskablePPO` one row each."""
        return self.core.action_masks()

    def close(self) -> None:
        """Nothing to close."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The adapter's attribute, once per environment."""
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set the adapter's attribute; it is shared by all environments."""
        setattr(self, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Call the adapter's method once; its result stands for every environment (masks: one row each)."""
        result = getattr(self, method_name)(*method_args, **method_kwargs)
        return [result[row] if method_name == "action_masks" else result for row in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: Any = None) -> list[bool]:
        """True for `Monitor`: the adapter writes the same `episode` entries."""
        return [issubclass(wrapper_class, Monitor) for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[np.ndarray | None]:
        """The images so far, one per environment, decoded in one batch."""
        return list(render_codes(self.world, self.core.codes))


def make_sb3_env(
    id: str,
    n_envs: int = 1,
    *,
    reset_mode: str | None = None,
    lockstep: bool = True,
    paired: bool | None = None,
    seed: int | None = None,
    render_mode: str | None = None,
    label_draw: str | None = None,
    **kwargs: Any,
) -> CodeVecEnv:
    """A registered environment as an SB3 `VecEnv`.

    Args:
        id: such as ``ral_gym/Toy-v0``.
        n_envs: E.
        reset_mode: `full`, `continue`, `scratch` or `mixed`; None: what the id was registered with, `full` by default.
        lockstep: one mode and row count per round for all rows, which the fast path and `n_steps = T` need and which is
            thus the default here; `gym.make_vec` has False, so that row i equals a single environment.
        paired: complementary pairs for `mixed`, so that ``n_steps = T`` always ends with an episode; None: True for
            lockstep `mixed`.
        seed: row i is seeded with seed + i.
        render_mode: `rgb_array` or None.
        label_draw: with classes, `uniform` or `data`; None: what the id was registered with, `uniform` by default.
        **kwargs: the environment's own arguments, such as `run`, `reward`, `device`.

    Raises:
        ConfigError: the id is not one of ral_gym's.
        ValueError: see the environment's page.
    """
    spec = gym.spec(id)
    creator: Any = load_env_creator(spec.entry_point) if isinstance(spec.entry_point, str) else spec.entry_point
    if not hasattr(creator, "make_world"):
        raise ConfigError(f"{id} is not a ral_gym environment: make_sb3_env takes ral_gym/... ids")
    arguments = {**spec.kwargs, **kwargs}
    registered_mode, registered_render_mode = arguments.pop("reset_mode", "full"), arguments.pop("render_mode", None)
    registered_draw = arguments.pop("label_draw", "uniform")
    mode: str = registered_mode if reset_mode is None else reset_mode
    env = CodeVecEnv(
        creator.make_world(**arguments),
        n_envs,
        reset_mode=mode,
        lockstep=lockstep,
        paired=(lockstep and mode == "mixed") if paired is None else paired,
        render_mode=registered_render_mode if render_mode is None else render_mode,
        label_draw=registered_draw if label_draw is None else label_draw,
    )
    env.spec = spec
    if seed is not None:
        env.seed(seed)
    return env


def unwrap_code_env(env: VecEnv) -> CodeVecEnv | None:
    """The `CodeVecEnv` under any wrappers, or None."""
    while isinstance(env, VecEnvWrapper):
        env = env.venv
    return env if isinstance(env, CodeVecEnv) else None


def check_code_env(env: Any) -> None:
    """Refuse an environment that cannot show whole images to an on-policy algorithm.

    Args:
        env: a `VecEnv`, with or without wrappers.

    Raises:
        ConfigError: not a `VecEnv` of ral_gym's codes, or episodes that a time limit ends before their last code.
    """
    if not isinstance(env, VecEnv):
        raise ConfigError(f"{type(env).__name__} is not a Stable-Baselines3 VecEnv: use make_sb3_env")
    shape = sequence_shape(env.observation_space, env.action_space)
    if shape is None or not env.has_attr("levels") or sum(env.get_attr("levels", 0)[0]) != shape.n_codes:
        raise ConfigError(
            f"observations {env.observation_space} are not the codes of a ral_gym environment: make it by "
            "make_sb3_env, and remove wrappers that change observations, such as VecFrameStack"
        )
    normalised = unwrap_vec_normalize(env)
    if normalised is not None and normalised.norm_obs:
        raise ConfigError("VecNormalize changes the codes: make it with norm_obs=False, or leave it out")
    limit = env.get_attr("_max_episode_steps", 0)[0] if env.has_attr("_max_episode_steps") else None
    if limit is not None and limit < shape.n_codes:
        raise ConfigError(
            f"a time limit of {limit} steps ends episodes of {shape.n_codes} codes before there is an image: leave "
            "max_episode_steps and TimeLimit out"
        )


def real_codes(env: VecEnv) -> np.ndarray | None:
    """The codes of real images behind an environment, (N, T), with classes (N, T + 1) with their labels; or None."""
    found = unwrap_code_env(env)
    return None if found is None else found.world.real_codes


__all__: list[str] = ["CodeVecEnv", "check_code_env", "make_sb3_env", "real_codes", "unwrap_code_env"]
