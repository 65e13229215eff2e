"""Which files each stage of a run leaves, and which of them make a run finished."""

from __future__ import annotations

from ral_gym.config import Config

WEIGHTS = (
    *("vqvae", "codes", "prior", "prior_ema"),
    *("prior_continued", "prior_equal_time", "policy", "policy_ema", "critic"),
)
OPTIONAL = ("prior_equal_time",)
"""Made only if a setting asks for it."""
FINISHED = ("results.json", *(f"{name}.safetensors" for name in WEIGHTS if name not in OPTIONAL))
"""The files of a finished run of one level; a removed one is made again."""
MADE_BY = {"vqvae": ("vqvae",), "prior": ("codes", "prior", "prior_ema"), "ral": WEIGHTS[4:]}
"""Stage -> the files that later stages need from it."""
NEED_IMAGES = ("codes", "prior_continued", "prior_equal_time")
"""Files that a run without images lacks: the images' codes, and the controls trained on them."""


def finished_files(config: Config) -> tuple[str, ...]:
    """The files of a finished run."""
    return ("results.json", *(file for stage in MADE_BY for file in files_of(stage, config)))


def files_of(stage: str, config: Config) -> list[str]:
    """A stage's files; with two levels every prior is two files, and there may be no critic."""
    names = [
        name + suffix
        for name in MADE_BY[stage]
        if (name != "critic" or config.ral.uses_critic)
        and (name != "prior_equal_time" or config.ral.equal_time_control)
        and (name not in NEED_IMAGES or config.data.has_images)
        for suffix in (("", "_bottom") if name.startswith("prior") and config.vqvae.levels == 2 else ("",))
    ]
    return [f"{name}.safetensors" for name in names]
