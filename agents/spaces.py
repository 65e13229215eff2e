"""What the spaces of an environment say about its sequences: Stable-Baselines3 shows its parts nothing else."""

from __future__ import annotations

from typing import NamedTuple

from gymnasium import spaces


class SequenceShape(NamedTuple):
    """The sequences that an environment shows.

    Attributes:
        n_codes: T.
        codebook_size: K.
        classes: N, 0 without labels.
    """

    n_codes: int
    codebook_size: int
    classes: int

    @property
    def length(self) -> int:
        """Entries of an observation: T, or T + 1 with classes."""
        return self.n_codes + (self.classes > 0)

    @property
    def largest_entry(self) -> int:
        """The largest entry of an observation: K + 1 + N."""
        return self.codebook_size + 1 + self.classes


def sequence_shape(observation_space: spaces.Space, action_space: spaces.Space) -> SequenceShape | None:
    """The shape of sequences that are shown as Box(0, K + 1 + N, (T,) or (T + 1,)) and drawn by Discrete(K).

    None: spaces of another kind, such as those of a wrapper.
    """
    if not (isinstance(action_space, spaces.Discrete) and isinstance(observation_space, spaces.Box)):
        return None
    low, high, size = observation_space.low, observation_space.high, int(action_space.n)
    if low.ndim != 1 or low.any() or (high != high[0]).any() or high[0] < size + 1:
        return None
    classes = int(high[0]) - size - 1
    length = len(low) - (classes > 0)
    return SequenceShape(length, size, classes) if length > 0 else None
