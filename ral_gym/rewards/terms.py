"""Rewards by name (`ral_gym.registry.REWARDS`): their interface, and how one is called.

A reward is a function of what it sees:

    @reward("bright")                                   # sees pixels: images uint8 (B, C, h, S)
    def bright(images, labels=None):
        return images.float().mean((1, 2, 3))           # (B,), given with an image's last code

    @reward("repeats", sees="codes")                    # codes (B, codes_of(r)) int64; nothing is decoded for it
    def repeats(codes):
        return -(codes[:, 1:] == codes[:, :-1]).float().mean(1)  # or (B, codes_of(r)): one per code

It always sees all finished images of one height at once, so it may compare them. A reward with state that outlives a
rollout is a class, instantiated once per image height; its constructor gets those of these arguments that it names:

    reference: what it sees (pixels, codes or features) of real images of that height;
    ema, components: the run's settings of distribution rewards;
    class_names, device: the names of the images' classes, empty without labels, and where networks should be;
    clip_path, hps_path, prompt: those settings of `ral`;
    any name that `ral.reward_options` gives.

Optional attributes of its objects: `minimum_batch`, batches of fewer images get no reward; `distance`, logged as
`reward/NAME_distance`; `state_dict` and `load_state_dict`, which checkpoints keep: tensors, arrays, numbers, text, and
lists and dicts of these; `reset`, called before the first rollout unless a checkpoint is restored. A network
(`nn.Module`) is instantiated once for all heights, and checkpoints do not keep its weights.

Optional attributes of a class: a static method `check`, called before anything is trained with those of the settings
that it names, and `network_name`, which network it is, for a warning where the same one judges.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ral_gym.errors import ConfigError, RunError
from ral_gym.registry import REWARDS
from ral_gym.rewards.view import Sees, View, sees_of
from ral_gym.runs.storage import pack_state

if TYPE_CHECKING:
    from ral_gym.metrics import Extractor
    from ral_gym.rewards.moments import Moments

Part = TypeVar("Part")


def reward(name: str, *, sees: Sees = "pixels") -> Callable[[Part], Part]:
    """Decorate a function or class to make it the reward `name` that sees `sees`.

    Raises:
        ConfigError: a name that is taken or has a colon, or another `sees`.
    """

    def keep(part: Part) -> Part:
        part.sees = sees  # type: ignore[attr-defined]
        sees_of(part, f"reward {name!r}")
        return REWARDS.register(name)(part)

    return keep


class CriticTerm:
    """The co-trained critic's reward: stage 3 trains and evaluates it (`agents.rewards`), not this class."""


class RewardTerm:
    """One reward of finished images.

    Args:
        name: what messages, curves and checkpoints call it.
        part: a function of what it sees, a class of such functions, or an object that is one.
        extractor: for a reward that sees features.
        reference: rows -> real images of that many rows, or their moments; None: there are none.
        options: other arguments that a class may name.

    Raises:
        ConfigError: it is none of these, or names an argument that is not available.
    """

    def __init__(
        self,
        name: str,
        part: Any,
        *,
        extractor: Extractor | None = None,
        reference: Callable[[int], View | Moments] | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        if not callable(part):
            raise ConfigError(f"reward {name!r} is a {type(part).__name__}: give a function or a class")
        self.name, self.part, self.sees = name, part, sees_of(part, f"reward {name!r}")
        self.extractor, self.reference, self.options = extractor, reference, options or {}
        self._made: dict[int, Any] = {}
        self._restored: dict[int, Any] = {}

    @property
    def is_network(self) -> bool:
        """Whether it is one network for images of all heights."""
        return isinstance(self.part, nn.Module) or _is_network(self.part)

    @property
    def takes_moments(self) -> bool:
        """Whether its reference may be `Moments`."""
        return bool(getattr(self.part, "takes_moments", False))

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with real images."""
        return isinstance(self.part, type) and "reference" in _parameters(self.part)

    @property
    def compares(self) -> bool:
        """Whether an image's reward depends on the others it is given with, or on earlier ones."""
        part, batch = self.part, getattr(self.part, "minimum_batch", 1)
        return not self.is_network and (hasattr(part, "distance") or hasattr(part, "state_dict") or batch != 1)

    def __call__(self, view: View, rows: int) -> Tensor:
        """The rewards of images of `rows` rows: (B,), or (B, codes_of(rows)) of a reward that sees codes; float64.

        Raises:
            ConfigError: it gives something else.
        """
        function = self.function(rows)
        if len(view) < getattr(function, "minimum_batch", 1):
            return torch.zeros(len(view), dtype=torch.float64)
        if self.is_network and view.own is not view:  # images are judged one by one: by several processes
            return view.joined(self(view.own, rows))
        labels = {"labels": view.labels} if "labels" in _parameters(function) else {}
        with torch.no_grad():
            earned = torch.as_tensor(function(self._seen(view), **labels)).detach().cpu().double()
        shapes = [(len(view),)] + ([tuple(view.codes.shape)] if self.sees == "codes" else [])
        if tuple(earned.shape) not in shapes:
            also = f", or one per code, {shapes[1]}" if len(shapes) > 1 else ""
            raise ConfigError(
                f"the reward {self.name!r} gave shape {tuple(earned.shape)} for {len(view)} images: one number per "
                f"image is needed{also}"
            )
        return earned

    def function(self, rows: int) -> Any:
        """The reward function for images of `rows` rows, made at its first use."""
        key = 0 if self.is_network else rows
        if key not in self._made:
            made = self._make(rows)
            if _remembers(made):
                self._check_state(made)
            if key in self._restored and _remembers(made):
                self._restore(made, self._restored.pop(key))
            elif hasattr(made, "reset"):
                made.reset()
            self._made[key] = made
        return self._made[key]

    def _make(self, rows: int) -> Any:
        if not isinstance(self.part, type):
            # A stateful object is copied: image heights, and runs in one process, must not share it.
            return copy.deepcopy(self.part) if _remembers(self.part) or hasattr(self.part, "reset") else self.part
        taken = _parameters(self.part)
        given = {name: value for name, value in self.options.items() if name in taken}
        if "reference" in taken:
            assert self.reference is not None
            real = self.reference(rows)
            given["reference"] = self._seen(real) if isinstance(real, View) else real
        lacking = [name for name, p in taken.items() if name not in given and _is_required(p)]
        if lacking:
            offered = ", ".join(["reference", *self.options])
            raise ConfigError(f"reward {self.name!r} asks for {lacking[0]}: its constructor may take {offered}")
        return self.part(**given)

    def _check_state(self, made: Any) -> None:
        """Refuse early any state that a checkpoint could not keep."""
        if not hasattr(made, "load_state_dict"):
            raise ConfigError(f"reward {self.name!r} has state_dict, but no load_state_dict: give both, or none")
        try:
            pack_state(made.state_dict())
        except TypeError as error:
            raise ConfigError(
                f"reward {self.name!r}: {error}; let state_dict give tensors, arrays, numbers, text, lists and dicts"
            ) from error

    def _restore(self, made: Any, state: Any) -> None:
        """Put back what a checkpoint has of it; here, and not where the checkpoint is read: it is made only now."""
        try:
            made.load_state_dict(state)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            reason = (str(error).splitlines() or [""])[-1].strip() or type(error).__name__
            raise RunError(
                f"the checkpoint's state of the reward {self.name!r} does not fit ({reason}); remove "
                "checkpoints/ral.safetensors of the run to start the stage again"
            ) from error

    def _seen(self, view: View) -> Tensor:
        if self.sees == "codes":
            return view.codes
        if self.sees == "pixels":
            return view.images
        assert self.extractor is not None
        return view.features(self.extractor)

    def state_dict(self) -> dict[str, Any]:
        """``NAME/ROWS`` -> the state for images of that many rows, for a checkpoint."""
        states = {rows: made.state_dict() for rows, made in self._made.items() if _remembers(made)}
        return {f"{self.name}/{rows}": state for rows, state in {**self._restored, **states}.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint, of all terms or of this one; takes effect at the next images of that height."""
        start = f"{self.name}/"
        found = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
        self._made, self._restored = {}, {int(rows): value for rows, value in found.items() if rows.isdecimal()}


def _remembers(part: Any) -> bool:
    """Whether it has state that a checkpoint must keep."""
    return hasattr(part, "state_dict") and not isinstance(part, nn.Module)


def _is_network(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, nn.Module)


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind not in (
        parameter.VAR_POSITIONAL,
        parameter.VAR_KEYWORD,
    )


def _parameters(part: Any) -> dict[str, inspect.Parameter]:
    """The parameters of a function, or of a class's constructor; none where Python cannot tell."""
    try:
        return dict(inspect.signature(part.forward if isinstance(part, nn.Module) else part).parameters)
    except (TypeError, ValueError):
        return {}
