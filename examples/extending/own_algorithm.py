"""An algorithm of your own: learn from the better half of a round only, each image with the same weight.

    cd examples/extending
    ral-gym train --preset smoke --algo own_algorithm:TopHalf --ral.options share 0.25
    ral-gym train --preset smoke --algo own_algorithm:PatientPPO

A bare class takes over the policy, the defaults and the section of settings of its nearest known base: TopHalf obeys
--ral.reinforce.*, PatientPPO --ral.ppo.*. What the constructor takes besides is given by --ral.options. An algorithm
that needs another policy or other defaults is an `Algorithm` entry, as `PatientPPO` here.
"""

from typing import Any

import numpy as np
from stable_baselines3 import PPO

from ral_gym.agents import Algorithm, Reinforce, find_algorithm
from ral_gym.registry import ALGORITHMS


@ALGORITHMS.register("top-half")
class TopHalf(Reinforce):
    """REINFORCE on the images with the highest returns (a step of the cross-entropy method)."""

    def __init__(self, *arguments: Any, share: float = 0.5, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.share = share

    def advantages(self) -> np.ndarray:
        """(N,) 1 for the codes whose advantage is among the best `share`, else 0."""
        found = super().advantages()
        return (found >= np.quantile(found, 1 - self.share)).astype(np.float32)


PPO_ENTRY = find_algorithm("ppo")
PatientPPO = Algorithm(PPO, PPO_ENTRY.policy, lambda env: PPO_ENTRY.defaults(env) | {"clip_range_vf": 0.2}, "ppo")
