"""ral_gym: a Gymnasium environment and RL agents in which drawing an image is an episode.

Importing the package registers its environments; no network is imported for that.
"""

from gymnasium.envs.registration import register as _register
from gymnasium.envs.registration import registry as _registry

__version__ = "0.1.0"

for _name, _entry_point in {
    "ral_gym/Toy-v0": "ral_gym.envs.toy:ToyEnv",
    "ral_gym/LatentCode-v0": "ral_gym.envs.latent_code:LatentCodeEnv",
}.items():
    if _name not in _registry:
        _register(_name, entry_point=_entry_point)
