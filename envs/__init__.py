"""The generation MDP; knows Gymnasium, not Stable-Baselines3.

The names below are imported at first use, so that ``gymnasium.make`` loads one environment's modules.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ral_gym.envs.core import GenerationCore
    from ral_gym.envs.faces import FacesEnv, FacesVectorEnv
    from ral_gym.envs.finished import Finished
    from ral_gym.envs.from_run import run_world
    from ral_gym.envs.generation import GenerationEnv
    from ral_gym.envs.latent_code import LatentCodeEnv, LatentCodeVectorEnv
    from ral_gym.envs.oracle import OracleEnv, OracleVectorEnv
    from ral_gym.envs.resets import StartDistribution
    from ral_gym.envs.toy import ToyEnv, ToyVectorEnv
    from ral_gym.envs.toy_classes import ToyClassesEnv, ToyClassesVectorEnv
    from ral_gym.envs.vector import GenerationVectorEnv, RegisteredVectorEnv
    from ral_gym.envs.worlds import Masks, World, toy_world

_MODULES = {
    "core": ("GenerationCore",),
    "faces": ("FacesEnv", "FacesVectorEnv"),
    "finished": ("Finished",),
    "generation": ("GenerationEnv",),
    "latent_code": ("LatentCodeEnv", "LatentCodeVectorEnv"),
    "oracle": ("OracleEnv", "OracleVectorEnv"),
    "resets": ("StartDistribution",),
    "from_run": ("run_world",),
    "toy": ("ToyEnv", "ToyVectorEnv"),
    "toy_classes": ("ToyClassesEnv", "ToyClassesVectorEnv"),
    "vector": ("GenerationVectorEnv", "RegisteredVectorEnv"),
    "worlds": ("Masks", "World", "toy_world"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "FacesEnv",
    "FacesVectorEnv",
    "Finished",
    "GenerationCore",
    "GenerationEnv",
    "GenerationVectorEnv",
    "LatentCodeEnv",
    "LatentCodeVectorEnv",
    "Masks",
    "OracleEnv",
    "OracleVectorEnv",
    "RegisteredVectorEnv",
    "StartDistribution",
    "ToyClassesEnv",
    "ToyClassesVectorEnv",
    "ToyEnv",
    "ToyVectorEnv",
    "World",
    "run_world",
    "toy_world",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
