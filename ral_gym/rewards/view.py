"""Finished images as critics and rewards see them: each is decoded, and its features computed, at most once.

A critic or a reward declares what it sees (`sees`): the images, their codes, or features of them. It gets that from a
`View`, which computes it at first use and caches it. One `FinishedImages` per rollout is shared by the critic, the
functions and the distribution terms; where all of them read codes, no image is decoded at all. Several processes
(`ral_gym.runs.sharing`) decode some of a view's images each; all see all of them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ral_gym.errors import ConfigError
from ral_gym.grid import CodeGrid
from ral_gym.runs.sharing import Processes

if TYPE_CHECKING:
    from ral_gym.metrics import Extractor

Sees = Literal["pixels", "codes", "features"]
SEES: tuple[Sees, ...] = ("pixels", "codes", "features")
Decode = Callable[[Tensor], Tensor]
"""Codes of r rows (B, codes_of(r)) int64 -> images (B, C, h, S): float in [-1, 1], or uint8."""


def sees_of(part: Any, what: str) -> Sees:
    """What a critic or reward sees: its attribute `sees`; without one, pixels.

    Args:
        part: the critic or the reward.
        what: its name in messages.

    Raises:
        ConfigError: another value.
    """
    sees = getattr(part, "sees", "pixels")
    if sees not in SEES:
        raise ConfigError(f"{what} sees {sees!r}: choose one of {', '.join(SEES)}")
    return sees


def takes_labels(function: Any) -> bool:
    """Whether a function, or the `forward` of a network, has an argument `labels`."""
    called = function.forward if isinstance(function, nn.Module) else function
    return "labels" in inspect.signature(called).parameters


class View:
    """Images of equally many rows, as codes, pixels or features.

    Args:
        codes: (B, codes_of(r)) integer, all in 0..K-1.
        decode: codes -> images.
        labels: (B,) int64 classes, or None.
        batch_size: images decoded at once.
        processes: those that share the decoding; None: this one alone.
    """

    def __init__(
        self,
        codes: Tensor,
        decode: Decode | None,
        labels: Tensor | None = None,
        batch_size: int = 128,
        processes: Processes | None = None,
    ) -> None:
        self.codes, self.labels, self.batch_size = codes.long(), labels, batch_size
        self.processes = processes or Processes()
        self._decode = decode
        self._features: dict[Any, Tensor] = {}

    def __len__(self) -> int:
        """B."""
        return len(self.codes)

    @functools.cached_property
    def own(self) -> View:
        """The images that this process decodes; all, if it is alone."""
        if self.processes.size == 1:
            return self
        rows = self.processes.rows(len(self))
        return View(self.codes[rows], self._decode, None if self.labels is None else self.labels[rows], self.batch_size)

    def joined(self, own: Tensor) -> Tensor:
        """What all processes have computed of their `own` images (n, ...), as of all images (B, ...)."""
        if self.own is self:
            return own
        sizes = self.processes.sizes(len(self))
        return self.processes.gather(own.to(self.processes.device), sizes).to(own.device)

    @functools.cached_property
    def _decoded(self) -> Tensor:
        if self.own is not self:
            return self.joined(self.own._decoded)
        if self._decode is None:
            raise ConfigError("a critic or reward sees images, but there is no decoder")
        with torch.no_grad():
            return torch.cat([self._decode(batch) for batch in self.codes.split(self.batch_size)])

    @functools.cached_property
    def pixels(self) -> Tensor:
        """(B, C, h, S) float in [-1, 1], on the decoder's device."""
        from ral_gym.data.images import to_float

        return self._decoded if self._decoded.is_floating_point() else to_float(self._decoded)

    @functools.cached_property
    def images(self) -> Tensor:
        """(B, C, h, S) uint8, on the CPU."""
        from ral_gym.data.images import to_uint8

        return (to_uint8(self._decoded) if self._decoded.is_floating_point() else self._decoded).cpu()

    def features(self, extractor: Extractor) -> Tensor:
        """(B, F) float32 of an extractor, on the CPU."""
        from ral_gym.metrics import extract

        if extractor not in self._features:
            alone = self.own is self
            found = extract(extractor, self.images) if alone else self.joined(self.own.features(extractor))
            self._features[extractor] = found
        return self._features[extractor]


class FinishedImages:
    """The finished code grids of a rollout.

    Attributes:
        codes: (n, L) int64, K + 1 where nothing was drawn: codes, or with classes in the grid sequences with labels.
        grid: their shape.
        image_rows: (n,) int64, rows of each image.
        labels: (n,) int64 classes, or None.

    Args:
        codes: as above.
        grid: as above.
        decode: codes -> images; None if only codes are seen.
        labels: as above, for a grid without classes.
        batch_size: images decoded at once.
        processes: those that share the decoding; None: this one alone.
    """

    def __init__(
        self,
        codes: Tensor,
        grid: CodeGrid,
        decode: Decode | None = None,
        labels: Tensor | None = None,
        batch_size: int = 128,
        processes: Processes | None = None,
    ) -> None:
        self.codes, self.grid, self.batch_size, self.processes = codes, grid, batch_size, processes
        self.labels = grid.labels_of(codes) if grid.classes else labels
        self.image_rows = (grid.without_labels(codes) != grid.never_drawn).sum(1) // grid.codes_of(1)
        self._decode = decode
        self._views: dict[int, View] = {}

    def __len__(self) -> int:
        """N."""
        return len(self.codes)

    @functools.cached_property
    def heights(self) -> list[int]:
        """The distinct numbers of rows of the images, ascending."""
        found: list[int] = self.image_rows.unique().tolist()
        return found

    def rows(self, height: int) -> Tensor:
        """(m,) int64: which images have `height` rows."""
        return (self.image_rows == height).nonzero().squeeze(1)

    def positions(self, height: int) -> Tensor:
        """(codes_of(height),) int64: positions in the whole grid of the codes of that many rows."""
        return torch.from_numpy(self.grid.mask(0, height)).nonzero().squeeze(1)

    def view(self, height: int) -> View:
        """The images of `height` rows; the same object each time."""
        if height not in self._views:
            rows = self.rows(height)
            labels = None if self.labels is None else self.labels[rows]
            codes = self.grid.without_labels(self.grid.crop(self.codes[rows], height))
            self._views[height] = View(codes, self._decode, labels, self.batch_size, self.processes)
        return self._views[height]

    def batch(self, size: int, generator: torch.Generator) -> Tensor:
        """Random images of one height, drawn by its share of them: (size, codes_of(height)) int64, and any labels."""
        pick = int(torch.randint(len(self.codes), (1,), generator=generator))
        height = int(self.image_rows[pick])
        same = self.rows(height)
        rows = same[torch.randint(len(same), (size,), generator=generator)]
        return self.grid.crop(self.codes[rows], height)
