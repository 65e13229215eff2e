"""The registries ("doors"): parts of every kind by name, so that your own are used without editing this package.

A part is found by its name in one of these ways:

* it comes with the package (imported at first use);
* its module has registered it: ``@REWARDS.register("bright")``;
* an installed package offers it as an entry point of the kind's group, such as ``ral_gym.rewards``;
* the name is ``module:Class``, given in a call or on the command line.

The last one imports a module, which runs its code. So a name that only occurs in a *file* (config.json, the metadata of
weights, a checkpoint) is imported only if the user also gave the same name: on the command line (``--plugin
module:Class``, or the flag of such a part), or by `allow` in a program. An untrusted file cannot name code to run.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any, TypeVar

from ral_gym.errors import ConfigError

Part = TypeVar("Part")

_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_NAMING = (
    *("plugin", "preset", "data", "source", "test", "kind", "options", "algo", "algos"),
    *("reward-weights", "reward-features", "features", "extractor", "metrics"),
)
"""The flags whose values are names of parts, without their section: ``--prior.kind`` is one, ``--runs`` is none."""
_allowed: set[str] = set()


def is_path(name: str) -> bool:
    """Whether a name has the form ``module:Class``."""
    return _PATH.fullmatch(name) is not None


def allow(*names: str) -> None:
    """Let these ``module:Class`` names be imported from now on, wherever they occur. Only for names that the user gave.

    Raises:
        ConfigError: a name of another form.
    """
    for name in names:
        if not is_path(name):
            raise ConfigError(f"plug-in {name!r} is not a module:Class: give, for instance, my_parts:Bright")
    _allowed.update(names)


def allow_given(argv: Iterable[str]) -> None:
    """Allow the ``module:Class`` names that a command line gives to a flag for parts, such as ``--algo my_parts:Mine``.

    A data source may have an argument behind it: ``--data my_parts:Array:images.npy``. Other words are left alone: a
    run folder, or a picture, may be called ``my_parts:Mine`` by a stranger.
    """
    flag = ""
    for place, word in enumerate(argv):
        if word.startswith("--"):
            flag, _, word = word.partition("=")
            flag = flag.removeprefix("--").replace("_", "-").rpartition(".")[2]
        elif place == 0 and word == "presets":  # ral-gym presets my_parts:SMALL
            flag = "preset"
        if flag in _NAMING and not (flag in ("data", "source", "test") and word.partition(":")[0] in SOURCES):
            allow(*(name for name in {word, ":".join(word.split(":")[:2])} if is_path(name)))


def load_plugins(names: Iterable[str]) -> None:
    """Import modules that register parts, or allow ``module:Class`` names, for ``--plugin`` and ``plugins=``.

    Args:
        names: ``module`` (imported now; its decorators register its parts) or ``module:Class`` (imported when that name
            is used).

    Raises:
        ConfigError: a name of another form, or a module that cannot be imported.
    """
    for name in names:
        if is_path(name):
            allow(name)
        elif _MODULE.fullmatch(name):
            _import(name, f"plug-in {name!r}")
        else:
            raise ConfigError(
                f"plug-in {name!r} is neither a module nor a module:Class: give my_parts or my_parts:Bright"
            )


class Registry(Mapping[str, Any]):
    """The parts of one kind by name.

    Args:
        kind: its name in messages, such as "prior".
        group: the entry-point group of installed packages.
        builtin: name -> ``module:attribute`` of the package's own parts, imported at first use.
    """

    def __init__(self, kind: str, group: str, builtin: Mapping[str, str] | None = None) -> None:
        self.kind, self.group = kind, group
        self._builtin = dict(builtin or {})
        self._parts: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[Part], Part]:
        """Decorator that registers a part as `name`; registering the same object again changes nothing.

        Raises:
            ConfigError: the name is empty, looks like ``module:Class``, or belongs to another part.
        """
        if not name or ":" in name or name != name.strip():
            raise ConfigError(f"{self.kind} {name!r}: give a name without a colon or spaces around it")

        def keep(part: Part) -> Part:
            known = self._parts.get(name)
            again = known is part or (known is not None and _same(known, part))  # a module run twice
            if name in self._builtin or (known is not None and not again):
                raise ConfigError(f"a {self.kind} called {name!r} is registered already: choose another name")
            self._parts[name] = part
            return part

        return keep

    @property
    def builtin(self) -> tuple[str, ...]:
        """The names of the package's own parts."""
        return tuple(self._builtin)

    def check(self, name: str) -> None:
        """Raise `ConfigError` for a name that `get` would refuse; imports nothing of this package or of a path."""
        if name in self._parts or name in self._builtin or name in _allowed or name in self._offered():
            return
        known = ", ".join(self)
        if is_path(name):
            raise ConfigError(
                f"{self.kind} {name!r} is code that a file names; it is imported only if you name it too: add --plugin "
                f"{name}, or call ral_gym.registry.allow({name!r}); registered ones: {known}"
            )
        near = difflib.get_close_matches(name, list(self), n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(
            f"{self.kind} {name!r} is unknown{meant}: {f'choose one of {known}, or ' if known else ''}bring your own "
            "as module:Class"
        )

    def get(self, name: str) -> Any:  # type: ignore[override]
        """The part called `name`.

        Raises:
            ConfigError: there is none, or it may not or cannot be imported; the known names are listed.
        """
        if name not in self._parts:
            self.check(name)
            if name in self._builtin:
                self._parts[name] = _attribute(self._builtin[name], f"{self.kind} {name!r}")
            elif name in self._offered():
                self._parts[name] = _attribute(self._offered()[name], f"{self.kind} {name!r}")
            else:
                self._parts[name] = _attribute(name, f"{self.kind} {name!r}")
        return self._parts[name]

    def name_of(self, part: Any) -> str:
        """The name of a given part, such as the class of an object in a call.

        A class that is not registered becomes known in this process as ``module:Class``.
        """
        for name, known in self._parts.items():
            if known is part:
                return name
        path = path_of(part)
        for name, builtin in self._builtin.items():
            if builtin == path:
                return name
        self._parts[path] = part
        return path

    def __getitem__(self, name: str) -> Any:
        return self.get(name)

    def __iter__(self) -> Iterator[str]:
        """The known names: the package's own first, then registered ones and entry points."""
        return iter(dict.fromkeys([*self._builtin, *self._parts, *self._offered()]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in list(self)

    def _offered(self) -> dict[str, str]:
        """The entry points of installed packages: name -> ``module:attribute``."""
        return _entry_points(self.group)


@functools.cache
def _entry_points(group: str) -> dict[str, str]:
    """Name -> ``module:attribute``; searching all installed packages takes tens of milliseconds."""
    return {point.name: point.value for point in entry_points(group=group)}


def path_of(part: Any) -> str:
    """The ``module:Class`` of a class or function; that of its class for any other object."""
    named = part if hasattr(part, "__qualname__") else type(part)
    return f"{named.__module__}:{named.__qualname__}"


def _same(one: Any, other: Any) -> bool:
    """Whether two parts are the same: classes and functions by path, other objects (such as presets) by value."""
    named = hasattr(one, "__qualname__") and hasattr(other, "__qualname__")
    return path_of(one) == path_of(other) if named else bool(one == other)


def _import(module: str, what: str) -> Any:
    if "" not in sys.path:  # the current working directory; "." would stay that of the first import
        sys.path.append("")  # last, so that a user's file is found but shadows nothing
    try:
        return importlib.import_module(module)
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise ConfigError(
            f"{what}: importing {module} failed ({type(error).__name__}: {reason}); it must be installed, or be in "
            "the current folder"
        ) from error


def _attribute(path: str, what: str) -> Any:
    """Import ``module:attribute``."""
    module, _, names = path.partition(":")
    part = _import(module, what)
    for name in names.split("."):
        if not hasattr(part, name):
            raise ConfigError(f"{what}: module {module} has no {names}")
        part = getattr(part, name)
    return part


TOKENIZERS = Registry(
    "tokenizer",
    "ral_gym.tokenizers",
    {
        "vqvae": "ral_gym.tokenizers.vqvae:VQVAE",
        "vqvae2": "ral_gym.tokenizers.vqvae2:VQVAE2",
        "vqgan": "ral_gym.tokenizers.vqgan:VQGAN",
    },
)
PRIORS = Registry(
    "prior",
    "ral_gym.priors",
    {
        "pixelcnn": "ral_gym.priors.pixelcnn:PixelCNN",
        "two_level": "ral_gym.priors.two_level:TwoLevelPrior",
        "transformer": "ral_gym.priors.transformer:Transformer",
        "gpt": "ral_gym.priors.gpt:GPT",
    },
)
CRITICS = Registry(
    "critic",
    "ral_gym.critics",
    {"patch": "ral_gym.rewards.critic:PatchCritic", "causal": "ral_gym.rewards.causal:CausalCritic"},
)
REWARDS = Registry(
    "reward",
    "ral_gym.rewards",
    {
        "critic": "ral_gym.rewards.terms:CriticTerm",
        "loo_fd": "ral_gym.rewards.distribution:ExactFrechet",
        "loo_fd_first_order": "ral_gym.rewards.distribution:FirstOrderFrechet",
        "loo_fd_diagonal": "ral_gym.rewards.distribution:DiagonalFrechet",
        "kid": "ral_gym.rewards.distribution:KernelReward",
        "clip": "ral_gym.rewards.text:ClipReward",
        "hps": "ral_gym.rewards.text:HPSReward",
    },
)
SOURCES = Registry(
    "data source",
    "ral_gym.sources",
    {
        "faces": "ral_gym.data.faces:Faces",
        "emoji": "ral_gym.data.emoji:Emoji",
        "celeba": "ral_gym.data.celeba:CelebA",
        "folder": "ral_gym.data.folder:Folder",
        "lsun": "ral_gym.data.sources:Lsun",
        "hf": "ral_gym.data.sources:HuggingFace",
    },
)
EXTRACTORS = Registry(
    "extractor",
    "ral_gym.extractors",
    {
        "lite0": "ral_gym.metrics.features:Lite0Features",
        "inception": "ral_gym.metrics.features:InceptionFeatures",
        "encoder": "ral_gym.metrics.features:EncoderFeatures",
        "pyramid": "ral_gym.metrics.pyramid:PyramidFeatures",
    },
)
METRICS = Registry("metric", "ral_gym.metrics")
_ENTRIES = "ral_gym.agents.defaults:"
ALGORITHMS = Registry(
    "algorithm",
    "ral_gym.algorithms",
    {
        "reinforce": _ENTRIES + "REINFORCE",
        "ppo": _ENTRIES + "PROXIMAL",
        "a2c": _ENTRIES + "ACTOR_CRITIC",
        "trpo": _ENTRIES + "TRUST_REGION",
        "grpo": _ENTRIES + "GROUPED",
        "maskable_ppo": _ENTRIES + "MASKABLE",
        "dqn": _ENTRIES + "DEEP_Q",
        "qrdqn": _ENTRIES + "QUANTILE_DEEP_Q",
    },
)
_PRESET_NAMES = [
    *("demo", "demo-converged", "demo-patchgan", "demo-2level", "demo-attention"),
    *("demo-classes", "demo-cifar10", "demo-celeba"),
    *("celeba64", "celeba64-oracle", "lsun64-8x8", "lsun64-16x16"),
    *("celeba128-16x16", "lsun128-16x16", "celeba128", "lsun128", "celeba256", "celebahq512"),
    *("vqgan-f16", "vq-16", "vq-8"),
    *("llamagen-b", "llamagen-l", "llamagen-l-384", "llamagen-xl-384", "llamagen-grpo", "smoke"),
]
PRESETS = Registry(
    "preset",
    "ral_gym.presets",
    {name: f"ral_gym.presets:{name.upper().replace('-', '_')}" for name in _PRESET_NAMES},
)
