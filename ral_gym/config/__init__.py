"""The settings of a run: one documented dataclass per stage (`stages`), one per algorithm of stage 3 (`algorithms`).

The same names appear on the command line (tyro), in ``config.json`` and in the logs.
``ral_gym.presets`` holds named instances: the paper's tables and small ones for a CPU.
"""

from ral_gym.config.algorithms import (
    SECTIONS,
    A2CConfig,
    GRPOConfig,
    MaskablePPOConfig,
    PPOConfig,
    ReinforceConfig,
    TRPOConfig,
    changed_settings,
)
from ral_gym.config.effects import effect_notes, without_effect
from ral_gym.config.flags import settings
from ral_gym.config.ranges import RANGES
from ral_gym.config.stages import (
    Config,
    CriticConfig,
    DataConfig,
    EvaluationConfig,
    PriorConfig,
    RALConfig,
    VQVAEConfig,
)

__all__ = [
    "RANGES",
    "SECTIONS",
    "A2CConfig",
    "Config",
    "CriticConfig",
    "DataConfig",
    "EvaluationConfig",
    "GRPOConfig",
    "MaskablePPOConfig",
    "PPOConfig",
    "PriorConfig",
    "RALConfig",
    "ReinforceConfig",
    "TRPOConfig",
    "VQVAEConfig",
    "changed_settings",
    "effect_notes",
    "settings",
    "without_effect",
]
