"""Critics by name (`ral_gym.registry.CRITICS`): made from the settings, saved beside the run, loaded again.

`ral_gym.rewards.scorer` documents the interface of a critic. Its constructor gets those of these arguments that it
names:

    image_size, channels: of the images, for a critic that sees pixels;
    codebook_size, height, width, levels: of the code grid, for one that sees codes;
    num_features: for one that sees features;
    classes: how many classes the images have whose `labels` its `forward` gets; 0: none, or not wanted;
    prior: a copy of the run's maximum-likelihood prior, as initial weights;
    any setting of `critic` by its name, such as hidden_units;
    and all of `critic.options`.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ral_gym.config import Config, CriticConfig
from ral_gym.errors import ConfigError, RunError
from ral_gym.presets import PRESETS
from ral_gym.registry import CRITICS, PRIORS, REWARDS
from ral_gym.rewards.options import check_terms
from ral_gym.rewards.score_map import ScoreNormalizer
from ral_gym.rewards.scorer import CriticScorer, find_features, require_encoder_features
from ral_gym.rewards.terms import RewardTerm
from ral_gym.rewards.view import sees_of
from ral_gym.runs.storage import load_metadata, load_module, save_module
from ral_gym.settings import constructor_parameters, part_arguments
from ral_gym.tokenizers.base import class_of

if TYPE_CHECKING:
    from ral_gym.metrics import Extractor
    from ral_gym.tokenizers.base import Tokenizer

TRAINING = (
    "learning_rate",
    "adam_beta1",
    "adam_beta2",
    "augment",
    "batch_size",
    "warmup_steps",
    "n_critic",
    "fakes",
    "replay",
    "held_out",
    "class_conditional",
)
"""Settings that the training loop reads; a critic gets one only if its constructor names it."""
LOSS = ("loss", "gradient_penalty", "r1", "r1_every")
"""Settings that the built-in losses read."""
FACTS: dict[str, tuple[str, ...]] = {
    "codes": ("codebook_size", "height", "width", "levels", "classes"),
    "features": ("image_size", "channels", "num_features", "classes"),
    "pixels": ("image_size", "channels", "classes"),
}
"""What a critic sees -> arguments that the run fills in."""
MakePrior = Callable[[], Any]


def build_critic(
    settings: CriticConfig,
    vqvae: Tokenizer,
    *,
    extractor: Extractor | None = None,
    make_prior: MakePrior | None = None,
    untouched: Sequence[CriticConfig] = (),
    classes: int = 0,
) -> nn.Module:
    """A new critic of the kind that the settings name.

    Args:
        settings: the run's.
        vqvae: the tokenizer whose images or codes it sees.
        extractor: for a critic that sees features; None: the tokenizer's encoder.
        make_prior: makes the prior that a critic may take its initial weights from.
        untouched: defaults and the preset's settings: a value that equals one of them was not changed by the user.
        classes: how many classes the images have.

    Raises:
        ConfigError: an unknown kind, options or settings that it does not take, or what its constructor refuses.
    """
    cls = critic_class(settings.kind)
    what, facts, taken = f"critic {settings.kind!r}", _facts(cls, vqvae), constructor_parameters(cls)[0]
    if sees_of(cls, what) == "features":
        facts["num_features"] = int((extractor or require_encoder_features(vqvae)).num_features)
    facts["classes"] = classes if settings.class_conditional else 0
    known = _own_arguments(cls, settings, facts, untouched)
    known |= {name: value for name, value in facts.items() if name in taken}
    _check_loss(settings, cls)
    given = dict(known)
    if "prior" in taken and make_prior is not None:
        given["prior"] = copy.deepcopy(make_prior()).train().requires_grad_(True)
    try:
        critic: nn.Module = cls(**given)
    except TypeError as error:
        raise ConfigError(
            f"{what} cannot be built ({_line(error)}); give missing arguments in critic.options"
        ) from error
    if not isinstance(getattr(critic, "config", None), dict):
        critic.config = known  # type: ignore[assignment]
    return critic


def _own_arguments(
    cls: type[nn.Module], settings: CriticConfig, facts: Collection[str], untouched: Sequence[CriticConfig]
) -> dict[str, Any]:
    """A critic's constructor arguments from the settings, without the `facts` that are filled in."""
    taken = constructor_parameters(cls)[0]
    read = TRAINING if hasattr(cls, "loss") else TRAINING + LOSS
    return part_arguments(
        cls,
        settings,
        "critic",
        training=[name for name in read if name not in taken],
        given=[*facts, "prior"],
        untouched=(CriticConfig(), *untouched),
    )


def check_rewards(config: Config) -> None:
    """Refuse before stage 1 the rewards and the critic that stage 3 could not make.

    Raises:
        ConfigError: a part that is unknown, cannot be imported or is none, or settings and options that the critic's
            constructor does not take.
    """
    terms = [RewardTerm(name, REWARDS.get(name)) for name in config.ral.reward_weights if name != "critic"]
    check_terms(config, terms)
    seen = {term.sees for term in terms}
    if config.ral.uses_critic:
        _check_critic(config)
        seen.add(sees_of(critic_class(config.critic.kind), "critic"))
    tokenizer = class_of(config.vqvae)
    if "features" in seen and config.ral.reward_features == "encoder" and not hasattr(tokenizer, "encode_features"):
        raise ConfigError(
            f"{tokenizer.__name__} has no encode_features to take features from: choose --ral.reward-features pyramid"
        )


def _check_critic(config: Config) -> None:
    settings, cls = config.critic, critic_class(config.critic.kind)
    facts, taken = {*FACTS[sees_of(cls, f"critic {settings.kind!r}")], "prior"}, constructor_parameters(cls)[0]
    preset = [PRESETS[config.preset].critic] if config.preset in PRESETS else []
    own = _own_arguments(cls, settings, facts, preset)
    _check_loss(settings, cls)
    try:
        inspect.signature(cls).bind(**own, **dict.fromkeys(facts & taken))
    except TypeError as error:
        raise ConfigError(_not_made(settings.kind, error)) from error


def _not_made(kind: str, error: TypeError) -> str:
    return f"critic {kind!r} cannot be made ({_line(error)}); give what it lacks in critic.options"


def critic_class(kind: str) -> type[nn.Module]:
    """The class called `kind`.

    Raises:
        ConfigError: there is none, it may not be imported, or it is not an `nn.Module`.
    """
    cls = CRITICS.get(kind)
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise ConfigError(f"critic {kind!r} is not a network class: give a subclass of torch.nn.Module")
    sees_of(cls, f"critic {kind!r}")
    return cls


def _facts(cls: type[nn.Module], vqvae: Tokenizer) -> dict[str, Any]:
    """Constructor arguments about the tokenizer's images or codes, whichever the critic sees."""
    grid = vqvae.grid
    if getattr(cls, "sees", "pixels") == "codes":
        sizes = {"height": grid.height, "width": grid.width, "levels": grid.levels}
        return {"codebook_size": grid.codebook_size, **sizes}
    return {"image_size": vqvae.image_size, "channels": vqvae.channels}


def _check_loss(settings: CriticConfig, cls: type[nn.Module]) -> None:
    """Refuse penalties of gradients for a critic of discrete codes, and changed pixels for one that sees none."""
    sees = getattr(cls, "sees", "pixels")
    if settings.augment and sees != "pixels":
        raise ConfigError(
            f"critic.augment is {' '.join(settings.augment)}, which changes pixels, but critic {settings.kind!r} sees "
            f"{sees}: leave critic.augment out"
        )
    if sees == "codes" and not hasattr(cls, "loss") and settings.r1:
        raise ConfigError(
            f"critic.r1 is {settings.r1:g}, which needs gradients, but critic {settings.kind!r} sees codes: leave "
            "critic.r1 out"
        )
    if sees == "codes" and not hasattr(cls, "loss") and settings.loss == "wgan_gp":
        raise ConfigError(
            f"critic.loss is wgan_gp, whose penalty needs gradients, but critic {settings.kind!r} sees codes: choose "
            "--critic.loss hinge, or give it a loss of its own"
        )


def save_critic(path: Path, scorer: CriticScorer, kind: str) -> None:
    """Write a critic with the scale of its scores, its kind and what it sees."""
    facts: dict[str, Any] = {
        "normalization": scorer.normalizer.method,
        "shift": scorer.normalizer.shift,
        "scale": scorer.normalizer.scale,
    }
    if kind != "patch":
        facts["kind"] = kind
    if scorer.sees == "features" and scorer.extractor is not None:
        facts["features"] = scorer.extractor.name
    critic: Any = scorer.critic
    try:
        json.dumps(critic.config)
    except TypeError as error:
        raise ConfigError(f"the config of critic {kind!r} cannot be written as JSON ({_line(error)})") from error
    save_module(path, critic, **facts)


def load_critic(
    path: Path, vqvae: Tokenizer, device: torch.device | str = "cpu", make_prior: MakePrior | None = None
) -> tuple[nn.Module, ScoreNormalizer, Extractor | None]:
    """The critic of a file, frozen, the scale it was saved with, and the extractor it saw features of.

    Raises:
        ConfigError: the file names code that may not be imported (see `ral_gym.registry`).
        RunError: missing or damaged, or it scores other images than the tokenizer decodes.
    """
    metadata = load_metadata(path)
    kind = metadata.get("kind", "patch")
    if not isinstance(kind, str):
        raise RunError(f"{path} does not name the kind of its critic; remove it to train it again")
    if kind in PRIORS.builtin:
        raise RunError(f"{path} holds a prior ({kind}), not a critic; remove it to train the critic again")
    cls = critic_class(kind)
    made: Any = cls
    if "prior" in constructor_parameters(cls)[0] and make_prior is not None:
        name, made = made.__name__, functools.partial(made, prior=copy.deepcopy(make_prior()))
        made.__name__ = name
    critic: nn.Module = load_module(path, made, device)
    found = metadata.get("config") or {}
    facts = {name: value for name, value in _facts(cls, vqvae).items() if name in found}
    if {name: found[name] for name in facts} != facts:
        there = {name: found[name] for name in facts}
        raise RunError(f"{path} scores images of {there}, but the tokenizer beside it decodes {facts}; train it again")
    normalizer = ScoreNormalizer.from_file(path, metadata)
    return critic, normalizer, _extractor(metadata.get("features"))


def load_scorer(
    path: Path, vqvae: Tokenizer, device: torch.device | str = "cpu", make_prior: MakePrior | None = None
) -> CriticScorer:
    """The frozen critic of a file, ready to score codes; errors as `load_critic`."""
    critic, normalizer, extractor = load_critic(path, vqvae, device, make_prior)
    return CriticScorer(vqvae, critic, "single", normalizer, extractor=extractor)


def _extractor(name: Any) -> Extractor | None:
    """The extractor of a saved critic's features; None: the tokenizer's encoder."""
    return find_features(name, None) if isinstance(name, str) and name != "encoder" else None


def row_multiple(critic: nn.Module | None, code_rows: int) -> int:
    """The critic needs short images to have a multiple of this many of the `code_rows` rows."""
    own = getattr(critic, "row_multiple", None)
    return 1 if own is None else int(own(code_rows))


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
