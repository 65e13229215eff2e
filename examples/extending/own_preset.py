"""A preset of your own: a `Config` in a module. The same as data: own_preset.json.

cd examples/extending
ral-gym train --preset own_preset:SHORT
ral-gym train --plugin own_preset --preset short-faces
ral-gym train --preset own_preset.json
"""

from dataclasses import replace

from ral_gym.config import GRPOConfig
from ral_gym.presets import SMOKE
from ral_gym.registry import PRESETS

SHORT = replace(
    SMOKE,
    ral=replace(SMOKE.ral, algo="grpo", n_updates=2, grpo=GRPOConfig(group_size=4, n_epochs=1)),
    evaluation=replace(SMOKE.evaluation, n_samples=24, temperatures=(0.8,)),
)
PRESETS.register("short-faces")(SHORT)
