"""The protocols of a prior and of its sampling cache, and building, saving and loading priors by kind.

Everything after stage 1 (training, samplers, policies, results table, report) uses a prior only through `Prior`, so a
network of your own can be chosen with ``--prior.kind my_parts:GPT`` or passed in a call. The members of `Prior` are
required. Optional members are

* ``split(sequence) -> (codes (B, T'), condition or None)``, for sequences that hold more than the codes that are drawn,
  such as a class label at their end; ``features`` and calls then take both ``(sequence)`` and ``(codes, condition)``.
  Without it a sequence holds codes only;
* ``pack() -> Packed``, a sampling cache; without it every code costs a full pass (``ral_gym.priors.full_pass``);
* ``condition``, an attribute and a constructor argument: the shape (H, W, K) of another grid that the codes depend on.
  A prior of bottom codes has it, and takes the top codes (B, T'') as a second argument of ``features`` and of a call.

A `kind` is a name in `ral_gym.registry.PRIORS`. A file or a config without a kind is that of a PixelCNN or, if it has
`top`, of a two-level model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from ral_gym.errors import ConfigError, RalGymError
from ral_gym.grid import CodeGrid
from ral_gym.registry import PRIORS
from ral_gym.runs.storage import load_tensors, rebuild_module, save_module

KIND = "kind"
MEMBERS = ("codebook_size", "height", "width", "hidden_units", "levels", "config", "grid", "features", "logits")
"""What a prior must have."""


class Prior(Protocol):
    """p(codes) = prod_t p(c_t | c_0 .. c_{t-1}), an `nn.Module`.

    Attributes:
        codebook_size: K.
        height: H, rows of the (top) grid.
        width: W, columns of the (top) grid.
        hidden_units: C, channels of the features.
        levels: 1; the package's own joined model of two levels has 2.
    """

    codebook_size: int
    height: int
    width: int
    hidden_units: int
    levels: int

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-able; it may also hold the `kind`."""

    @property
    def grid(self) -> CodeGrid:
        """The shape of the codes."""

    def features(self, sequence: Tensor) -> Tensor:
        """The features from which the logits are computed, by one teacher-forced pass.

        Args:
            sequence: (B, T') int64, the first r rows of the grid for some 1 <= r <= H, and whatever else `split`
                expects. Entries of K and more stand for codes not drawn yet: they must be accepted, for instance by
                ``clamp(max=K - 1)``, and must not change the features up to and including their own position.

        Returns:
            (B, T', C) float; position t has seen sequence[:, :t] only.
        """

    def logits(self, features: Tensor, position: Tensor | None = None) -> Tensor:
        """Features (..., C) to logits (..., K); `position` (...) int64 is where in the grid each one is from."""

    def __call__(self, sequence: Tensor) -> Tensor:
        """Logits (B, T', K) of every code given those before it."""

    # Members of nn.Module.
    training: bool

    def parameters(self, recurse: bool = True) -> Any:
        """The weights."""

    def named_parameters(self) -> Any:
        """The weights with their names."""

    def state_dict(self) -> dict[str, Any]:
        """The weights and buffers by name."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any:
        """Load what `state_dict` returned."""

    def to(self, device: Any) -> Any:
        """Move to a device."""

    def train(self, mode: bool = True) -> Any:
        """Switch dropout on."""

    def eval(self) -> Any:
        """Switch dropout off."""

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Whether the weights get gradients."""


class Cache(Protocol):
    """What a sampler caches for a batch of images, each of which may be at a different position of its grid.

    The caller (`ral_gym.priors.sampler.CachedSampler`) keeps track of positions. Before `step` can run at a column,
    `fill` or `next_row` must have prepared the grid row, and `step` and `put` must have run at the columns before.

    Attributes:
        batch: B.
        use_cuda_graphs: replay the work as CUDA graphs; ignored by caches that do not support it.
        features: (B, C), written by `step` and `step_at`.
        logits: (B, K), written by `step` and `step_at`.
    """

    batch: int
    use_cuda_graphs: bool
    features: Tensor
    logits: Tensor

    def fill(self, rows: Tensor | slice, codes: Tensor, positions: np.ndarray, condition: Tensor | None = None) -> None:
        """Enter the codes (n, T) before positions (n,), on the host, of batch rows (n,) or all; ignore later codes.

        `condition` (n, ...) is what `split` found in the sequences, or the codes of another grid.
        """

    def step(self, row: int, column: int) -> None:
        """Features and logits of all batch rows at one position."""

    def step_at(self, grid_rows: np.ndarray, columns: np.ndarray) -> None:
        """Features and logits of the batch rows, each at a position of its own (B,)."""

    def put(self, codes: Tensor, row: int, column: int) -> None:
        """Enter the codes (B,) of all batch rows at one position."""

    def put_at(self, rows: np.ndarray, codes: Tensor, grid_rows: np.ndarray, columns: np.ndarray) -> None:
        """Enter the codes (n,) of some batch rows (n,), each at a position of its own."""

    def next_row(self, row: int) -> None:
        """All batch rows begin this grid row."""

    def next_row_of(self, rows: np.ndarray, grid_rows: np.ndarray) -> None:
        """Some batch rows (n,) begin grid rows (n,) of their own."""


class Packed(Protocol):
    """A prior's weights in the layout that its cache needs: copies, or the live weights."""

    @property
    def device(self) -> torch.device:
        """Where they are."""

    @property
    def dtype(self) -> torch.dtype:
        """Their type."""

    def refresh(self) -> None:
        """Take over the prior's current weights; device and dtype do not change."""

    def make_cache(self, batch: int) -> Cache:
        """A cache for B batch rows."""


# Kinds ------------------------------------------------------------------------------------------------------------


def kind_of(prior: Any) -> str:
    """The name of a prior's class; a class that is not registered becomes known in this process."""
    return PRIORS.name_of(type(prior))


def _kind_in(config: Mapping[str, Any]) -> str:
    return str(config.get(KIND, "two_level" if "top" in config else "pixelcnn"))


def config_of(prior: Any) -> dict[str, Any]:
    """The config from which `build_prior` makes the same network: constructor arguments, and the kind if needed.

    For a PixelCNN it is `prior.config` unchanged, so that its files keep the format of earlier versions.

    Raises:
        ConfigError: the config cannot be written as JSON.
    """
    kind = kind_of(prior)
    try:
        config = json.loads(json.dumps(dict(prior.config)))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the config of prior {kind!r} cannot be written as JSON ({error})") from error
    config.pop(KIND, None)
    return config if kind == _kind_in(config) else {KIND: kind, **config}


def prior_class(kind: str) -> Any:
    """The class called `kind`.

    Raises:
        ConfigError: there is none, it may not be imported, or it is not a subclass of `nn.Module`.
    """
    cls = PRIORS.get(kind)
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise ConfigError(f"prior {kind!r} is not a network class: give a subclass of torch.nn.Module")
    return cls


def build_prior(config: Mapping[str, Any]) -> Any:
    """Build the network that a `config_of` describes, with fresh weights.

    Raises:
        ConfigError: the kind is unknown or may not be imported, or its class refuses the arguments.
    """
    kind = _kind_in(config)
    cls = prior_class(kind)
    try:
        prior = cls(**{name: value for name, value in config.items() if name != KIND})
    except RalGymError:
        raise
    except Exception as error:  # third-party code
        reason = (str(error).strip() or "no reason given").splitlines()[-1]
        raise ConfigError(
            f"prior {kind!r} cannot be built ({type(error).__name__}: {reason}); check its settings"
        ) from error
    check_members(prior, kind)
    return prior


def check_members(prior: Any, kind: str) -> None:
    """Refuse an object that lacks what `Prior` asks for.

    Raises:
        ConfigError: what is missing.
    """
    missing = [name for name in MEMBERS if not hasattr(prior, name)]
    if missing:
        raise ConfigError(f"prior {kind!r} has no {', '.join(missing)}: ral_gym.priors.base.Prior says what it needs")


# Files ------------------------------------------------------------------------------------------------------------


def save_prior(path: Path, prior: Any, weights: dict[str, Tensor] | None = None, **facts: Any) -> None:
    """Write a prior's weights, its kind and its constructor's arguments; see `save_module`."""
    save_module(path, prior, weights, **{KIND: kind_of(prior)}, **facts)


def load_prior(path: Path, device: torch.device | str = "cpu", config: dict[str, Any] | None = None) -> Any:
    """Rebuild a prior from its file, in evaluation mode, without gradients; draws no random numbers.

    Args:
        path: the file.
        device: where it goes.
        config: the `config_of` that the file must hold; None: any.

    Raises:
        ConfigError: the file names an unknown kind, or code whose import was not allowed.
        RunError: the file is missing, damaged, not a prior's or made with other arguments, or its weights do not fit.
    """
    tensors, metadata = load_tensors(path)
    found = _stored_config(metadata)
    cls = prior_class(_kind_in(found))
    prior = rebuild_module(path, tensors, {**metadata, "config": found}, cls, device, config, left_out=(KIND,))
    check_members(prior, _kind_in(found))
    return prior


def _stored_config(metadata: dict[str, Any]) -> Any:
    """The `config_of` of the prior that a file holds; anything but a dict is left for `rebuild_module` to refuse."""
    config = metadata.get("config")
    if not isinstance(config, dict):
        return {}
    arguments = {name: value for name, value in config.items() if name != KIND}
    kind = str(metadata.get(KIND, _kind_in(config)))
    return arguments if kind == _kind_in(arguments) else {KIND: kind, **arguments}


# Sequences --------------------------------------------------------------------------------------------------------


def split(prior: Any, sequence: Tensor) -> tuple[Tensor, Tensor | None]:
    """Split sequences (B, ...) into the codes (B, T') that the prior draws and their condition, or None."""
    own = getattr(prior.module if isinstance(prior, DistributedDataParallel) else prior, "split", None)
    return (sequence, None) if own is None else own(sequence)


def given_codes(prior: Any, sequence: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`split`, or the sequence as it is with a condition that was passed separately.

    Raises:
        ConfigError: see `check_condition`.
    """
    if condition is None:
        codes, condition = split(prior, sequence)
        if condition is not None:
            return codes, condition
    else:
        codes = sequence
    check_condition(prior, condition, len(codes))
    return codes, condition


def logits_of(prior: Any, sequence: Tensor, condition: Tensor | None = None) -> Tensor:
    """Logits (B, T', K) of sequences; `condition` is passed on unless it is None."""
    return prior(sequence) if condition is None else prior(sequence, condition)


def maximum_likelihood_loss(
    prior: Any, sequence: Tensor, condition: Tensor | None = None, given: Tensor | None = None
) -> Tensor:
    """Mean negative log-likelihood in nats per code of sequences (B, ...), given the condition (B, T'') if any.

    Args:
        prior: the network, perhaps wrapped for several processes.
        sequence: (B, ...) int64, whose codes are to be likely.
        condition: (B, T'') int64.
        given: (B, ...) int64, other sequences, whose codes stand before each; None: the sequences themselves.
    """
    logits = logits_of(prior, sequence if given is None else given, condition)  # (B, T', K)
    target = split(prior, sequence)[0] if condition is None else sequence  # (B, T')
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def split_label(sequence: Tensor, codebook_size: int, largest: int) -> tuple[Tensor, Tensor]:
    """Sequences (B, T' + 1) -> codes (B, T') and labels (B, 1), 0..largest.

    Raises:
        ConfigError: a last entry is no label.
    """
    first = codebook_size + 2
    labels = sequence[:, -1:] - first  # (B, 1)
    least, most = torch.stack(labels.aminmax()).tolist() if len(labels) else (0, 0)
    if not 0 <= least <= most <= largest:
        raise ConfigError(
            f"the last entry of a sequence is its label, {first}..{first + largest}: found "
            f"{least + first}..{most + first}"
        )
    return sequence[:, :-1], labels


def check_condition(prior: Any, condition: Tensor | None, batch: int) -> None:
    """Raise ConfigError if a network's condition is missing, of another batch, or given to a network without one."""
    wanted, classes = getattr(prior, "condition", None), getattr(prior, "classes", 0)
    name = type(prior).__name__
    if wanted is None and condition is not None and not classes:
        raise ConfigError(f"this {name} takes no condition: leave it out, or build it with condition=(H, W, K)")
    if wanted is not None and condition is None:
        rows, columns, _ = wanted
        raise ConfigError(f"this {name} is conditional: pass condition, the {rows}x{columns} codes above its own")
    if condition is not None and len(condition) != batch:
        raise ConfigError(f"a condition of {len(condition)} grids for {batch} images; pass one for each")
