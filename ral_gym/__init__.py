"""ral_gym: a Gymnasium environment and RL agents in which drawing an image is an episode.

Importing the package registers its environments; no network is imported for that.
"""

from pathlib import Path as _Path

from gymnasium.envs.registration import register as _register
from gymnasium.envs.registration import registry as _registry

__version__ = "0.2.0"

# In the root of a checkout, the folder `ral_gym` shadows the installed package; `envs` and `agents`, which are inside
# the installed package, are next to it here.
_root = _Path(__file__).resolve().parents[1]
if not (_root / "ral_gym" / "envs").exists() and (_root / "envs" / "core.py").exists():
    __path__.append(str(_root))

# No max_episode_steps: the last code terminates the episode; there is no time limit. Only a task with a known optimum
# has a reward threshold; it holds for `reward="single"`.
for _name, _module, _class, _reward_threshold in [
    ("ral_gym/Toy-v0", "ral_gym.envs.toy", "Toy", 0.9),
    ("ral_gym/ToyClasses-v0", "ral_gym.envs.toy_classes", "ToyClasses", 0.9),
    ("ral_gym/Faces-v0", "ral_gym.envs.faces", "Faces", None),
    ("ral_gym/Oracle-v0", "ral_gym.envs.oracle", "Oracle", None),
    ("ral_gym/LatentCode-v0", "ral_gym.envs.latent_code", "LatentCode", None),
]:
    if _name not in _registry:
        _register(
            _name,
            entry_point=f"{_module}:{_class}Env",
            vector_entry_point=f"{_module}:{_class}VectorEnv",
            reward_threshold=_reward_threshold,
        )
