"""The class of an episode's image: checked options, and the draw for episodes without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from ral_gym.grid import CodeGrid

LabelDraw = Literal["uniform", "data"]
LABEL_DRAWS: tuple[str, ...] = get_args(LabelDraw)


class LabelDistribution:
    """The classes of a world, and which of them an episode gets that neither asks for one nor continues an image.

    Args:
        grid: the code grid; it says how many classes there are, perhaps none.
        real_codes: (M, T + 1) int16 sequences of real images with their labels, or None.
        names: the name of every class, or none.
        draw: `uniform`: every class equally often; `data`: as often as among the real images.

    Raises:
        ValueError: an unknown draw, `data` without real images, or another number of names than of classes.
    """

    def __init__(
        self, grid: CodeGrid, real_codes: np.ndarray | None, names: Sequence[str] = (), draw: str = "uniform"
    ) -> None:
        if draw not in LABEL_DRAWS:
            raise ValueError(f"label_draw={draw!r} is unknown: choose one of {', '.join(LABEL_DRAWS)}")
        if names and len(names) != grid.classes:
            raise ValueError(f"{len(names)} class names for {grid.classes} classes: give one for each")
        self.classes, self.names, self._draw = grid.classes, tuple(names), draw
        self._of_images = None if real_codes is None else grid.labels_of(real_codes.astype(np.int64))  # (M,)
        if draw == "data" and (self._of_images is None or not len(self._of_images)):
            lacking = "real images" if grid.classes else "classes"
            raise ValueError(f"label_draw='data' draws labels of real images, but this environment has no {lacking}")
        labels = np.empty(0, np.int64) if self._of_images is None else self._of_images
        self._counts = np.bincount(labels, minlength=grid.classes)  # (N,)
        self._by_class = np.argsort(labels, kind="stable")  # (M,) images, class by class
        self._first = np.cumsum(self._counts) - self._counts  # (N,)

    def number(self, label: Any) -> int:
        """The class that the option `label` means: its number, or its name where names are known.

        Raises:
            ValueError: there are no classes, or no such class.
        """
        if not self.classes:
            raise ValueError(f"option label={label!r}, but images have no classes in this environment: leave it out")
        known = f"0..{self.classes - 1}"
        if isinstance(label, str):
            if label in self.names:
                return self.names.index(label)
            raise ValueError(f"option label={label!r} is no class: {self._choices(known)}")
        if isinstance(label, bool) or not isinstance(label, int | np.integer):
            raise ValueError(f"option label={label!r} must be a class, an integer in {known} or a name")
        if not 0 <= label < self.classes:
            raise ValueError(f"option label={label} is out of range: {self._choices(known)}")
        return int(label)

    def _choices(self, numbers: str) -> str:
        if not self.names:
            return f"choose {numbers}"
        names = [*self.names[:10], *(["..."] if self.classes > 10 else [])]
        return f"choose {numbers}, or a name: {', '.join(names)}"

    def name(self, label: int) -> str:
        """A class in messages: its number, and its name if it has one."""
        return f"{label} ({self.names[label]})" if self.names else str(label)

    def of_image(self, image: int) -> int | None:
        """The class of a real image; None without classes."""
        return None if self._of_images is None else int(self._of_images[image])

    def count(self, label: int) -> int:
        """How many real images a class has."""
        return int(self._counts[label])

    def draw(self, rng: np.random.Generator) -> int:
        """A class at random."""
        return int(self.draw_many(rng, 1)[0])

    def draw_many(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Classes (n,) int64 at random."""
        if self._draw == "uniform" or self._of_images is None:
            return rng.integers(self.classes, size=n)
        return self._of_images[rng.integers(len(self._of_images), size=n)]

    def draw_image(self, rng: np.random.Generator, label: int) -> int:
        """A real image of a class that has some, uniformly."""
        return int(self._by_class[self._first[label] + rng.integers(self._counts[label])])
