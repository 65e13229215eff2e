"""The native Gymnasium vector environment: E episodes, one batched decode and critic call when they end."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from ral_gym.envs.core import GenerationCore
from ral_gym.envs.finished import Finished
from ral_gym.envs.generation import action_space, observation_space
from ral_gym.envs.rendering import RENDER_FPS, RENDER_MODES, check_render_mode, render_codes, render_text
from ral_gym.envs.worlds import World

StepReturn = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]


class GenerationVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """E generation episodes; `gymnasium.make_vec` makes subclasses of this for the registered ids.

    Seeded with s, row i does exactly what a single environment seeded with s + i does (unless `lockstep` or `paired`).
    Episodes may differ in length unless the reset mode is `full`.

    ## Autoreset

    * ``"SameStep"`` (the default): a finished row shows the next episode's first observation at once; its last one is
      in ``infos["final_obs"]``, its info in ``infos["final_info"]``, with the masks ``_final_obs``, ``_final_info``.
    * ``"NextStep"``: a finished row keeps its last observation for one step, whose action is ignored; its info is in
      ``infos`` itself, each key with its mask.
    * ``"Disabled"``: as ``"NextStep"``, but the row has to be reset with ``options={"reset_mask": ...}``.

    Gymnasium's vector wrappers that change observations refuse ``"SameStep"`` (`NormalizeObservation` takes
    ``"NextStep"`` only): ``gymnasium.make_vec(id, num_envs=E, autoreset_mode="NextStep")``.

    ## Options of ``reset``

    Those of the single environment, the same for all rows that are reset, and `reset_mask`, (E,) bool: reset these rows
    only. They apply to that one reset.

    Args:
        world: what to draw in.
        num_envs: E.
        reset_mode: `full`, `continue`, `scratch` or `mixed`.
        render_mode: `rgb_array`, `ansi` or None.
        autoreset_mode: a `gymnasium.vector.AutoresetMode` or its value.
        lockstep: one mode and row count per round for all rows (the paper's "during each roll-out"); False: each row
            draws its own, as single environments do; the default of `make_sb3_env` is True, for its fast path.
        paired: for `mixed`, complementary pairs of episodes: continue after n rows, then n rows from scratch.
        label_draw: with classes, how an episode's class is drawn: `uniform`, or `data`, as often as among real images.

    Raises:
        ValueError: an unknown mode, or one that is impossible in this world.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": list(RENDER_MODES),
        "render_fps": RENDER_FPS,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        world: World,
        num_envs: int = 1,
        *,
        reset_mode: str = "full",
        render_mode: str | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        lockstep: bool = False,
        paired: bool = False,
        label_draw: str = "uniform",
    ) -> None:
        check_render_mode(render_mode)
        self.core = GenerationCore(
            world, num_envs, reset_mode=reset_mode, lockstep=lockstep, paired=paired, label_draw=label_draw
        )
        self.world, self.num_envs, self.render_mode = world, num_envs, render_mode
        self.autoreset_mode = _autoreset_mode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}  # type: ignore[misc]
        self.single_observation_space = observation_space(world.grid)
        self.single_action_space = action_space(world.grid)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._ended = np.zeros(num_envs, bool)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start the episodes of all rows, or of those in ``options["reset_mask"]``.

        Args:
            seed: row i is seeded with seed + i, or with the i-th entry of a list.
            options: see the class.

        Returns:
            observations (E, T) int16, or with classes (E, T + 1); infos: empty, or with classes `label` (E,) int64 and
            its mask `_label`.

        Raises:
            ValueError: an option or a list of seeds that does not fit; nothing has changed then.
            TypeError: a `reset_mask` that is not a boolean array; nothing has changed then.
        """
        if options is not None and not isinstance(options, Mapping):
            raise ValueError(
                f"options are {options!r}: give one mapping for all rows; for different options reset the "
                "rows one after another with a reset_mask"
            )
        single = dict(options or {})
        rows = self._masked_rows(single.pop("reset_mask", None))
        seeds = _row_seeds(seed, self.num_envs)
        self.core.reset(rows, single, None if seeds is None else [seeds[row] for row in rows])
        self._ended[rows] = False
        return self.core.observations(), self._label_infos(rows)

    def _label_infos(self, rows: np.ndarray) -> dict[str, Any]:
        """The infos of rows (n,) that have just been reset."""
        labels = self.core.labels_of(rows)
        return {} if labels is None else self._gathered({"label": labels}, rows)

    def _gathered(self, values: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, Any]:
        """Infos of rows (n,) by name, and the mask of the rows that have them, as `SyncVectorEnv` gathers them."""
        mask = np.zeros(self.num_envs, bool)
        mask[rows] = True
        infos: dict[str, Any] = {}
        for name, value in values.items():
            infos[name] = np.zeros((self.num_envs, *value.shape[1:]), value.dtype)
            infos[name][rows] = value
            infos[f"_{name}"] = mask.copy()
        return infos

    def _masked_rows(self, mask: Any) -> np.ndarray:
        """The rows that a `reset_mask` names; all without one."""
        if mask is None:
            return np.arange(self.num_envs)
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
            given = f"dtype {mask.dtype}" if isinstance(mask, np.ndarray) else f"a {type(mask).__name__}"
            raise TypeError(f"option reset_mask is {given}: give a numpy array of dtype bool")
        if mask.shape != (self.num_envs,) or not mask.any():
            raise ValueError(
                f"option reset_mask has shape {mask.shape} and {int(mask.sum())} True: give shape {(self.num_envs,)} "
                "with at least one"
            )
        return np.flatnonzero(mask)

    def step(self, actions: np.ndarray) -> StepReturn:
        """Draw one code in every row.

        Args:
            actions: (E,) integers in 0..K-1.

        Returns:
            observations (E, T) int16, rewards (E,) float64, terminations (E,) bool, truncations (E,) bool (all False),
            infos (empty where no episode ended; with classes `label` where one began).

        Raises:
            ValueError: wrong actions; nothing has changed then.
            gymnasium.error.ResetNeeded: a row has no running episode; nothing has changed then.
        """
        waiting, infos = self._ended, {}
        if self.autoreset_mode == AutoresetMode.NEXT_STEP and waiting.any():
            finished = self.core.step(actions, np.flatnonzero(~waiting))
            self.core.reset(np.flatnonzero(waiting))
            infos = self._label_infos(np.flatnonzero(waiting))
        else:
            finished = self.core.step(actions)
        rewards = self.core.rewards.astype(np.float64)
        self._ended = np.zeros(self.num_envs, bool)
        if finished is not None:
            self._ended[finished.rows] = True
            infos = _merged(infos, self._infos(finished))
            if self.autoreset_mode == AutoresetMode.SAME_STEP:
                self.core.reset(finished.rows)
                infos |= self._label_infos(finished.rows)
        return self.core.observations(), rewards, self._ended.copy(), np.zeros(self.num_envs, bool), infos

    def _infos(self, finished: Finished) -> dict[str, Any]:
        """The infos that `SyncVectorEnv` would gather from single environments."""
        infos = self._gathered(finished.infos(), finished.rows)
        if self.autoreset_mode != AutoresetMode.SAME_STEP:
            return infos
        final_obs = np.full(self.num_envs, None, object)
        for row, observation in zip(finished.rows, finished.codes, strict=True):
            final_obs[row] = observation
        mask = infos["_codes"]
        return {"final_obs": final_obs, "_final_obs": mask.copy(), "final_info": infos, "_final_info": mask.copy()}

    def action_masks(self) -> np.ndarray:
        """(E, K) bool, the codes that may come next in each row."""
        return self.core.action_masks()

    def render(self) -> tuple[Any, ...] | None:
        """One picture (`rgb_array`) or text (`ansi`) per row, or None without a render mode."""
        if self.render_mode is None:
            return None
        if self.render_mode == "ansi":
            return tuple(render_text(self.world.grid, self.core.codes, self.world.class_names))
        return tuple(render_codes(self.world, self.core.codes))

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """The rows' random generators."""
        return tuple(self.core.rngs)


class RegisteredVectorEnv(GenerationVectorEnv):
    """Base of the registered ids' vector environments: the world comes from the single environment's arguments.

    Args:
        num_envs: E.
        **kwargs: arguments of `GenerationVectorEnv`, and of the single environment, such as `reward` and `device`.
    """

    make_world: ClassVar[Callable[..., World]]

    def __init__(self, num_envs: int = 1, **kwargs: Any) -> None:
        names = inspect.signature(GenerationVectorEnv).parameters
        episodes = {name: kwargs.pop(name) for name in [*kwargs] if name in names}
        super().__init__(self.make_world(**kwargs), num_envs, **episodes)


def _merged(began: dict[str, Any], ended: dict[str, Any]) -> dict[str, Any]:
    """The infos of rows that began and of others that ended in the same step; both may have a label."""
    both = began.keys() & ended.keys()
    return began | ended | {name: began[name] + ended[name] for name in both}  # 0 or False where a row has none


def _row_seeds(seed: Any, num_envs: int) -> list[int | None] | None:
    """One seed per row, None for rows without.

    Raises:
        ValueError: another number of seeds, or one that is not an integer of 0 or more.
    """
    if seed is None:
        return None
    whole = isinstance(seed, int | np.integer)
    if not whole and not isinstance(seed, Sequence | np.ndarray):
        raise ValueError(f"seed={seed!r}: give an integer of 0 or more, or one for each environment")
    seeds = [int(seed) + i for i in range(num_envs)] if whole else list(seed)
    if len(seeds) != num_envs:
        raise ValueError(f"seed has {len(seeds)} entries: give one for each of the {num_envs} environments")
    for one in seeds:
        if one is not None and (not isinstance(one, int | np.integer) or one < 0):
            raise ValueError(f"seed={one!r} is not an integer of 0 or more")
    return seeds


def _autoreset_mode(mode: AutoresetMode | str) -> AutoresetMode:
    try:
        return AutoresetMode(mode)
    except ValueError as error:
        allowed = ", ".join(repr(m.value) for m in AutoresetMode)
        raise ValueError(f"autoreset_mode {mode!r} is unknown: choose one of {allowed}") from error
