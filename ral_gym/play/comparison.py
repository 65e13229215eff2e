"""Two comparisons of a session: models that finish the same beginning, and an image with and without a wrong code."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ral_gym.errors import ConfigError
from ral_gym.play.session import Score, Session
from ral_gym.stages.completion import seeded_uniforms


@dataclass(frozen=True)
class Ending:
    """One finished image.

    Attributes:
        codes: (T,) int64.
        score: the critic's; None without a critic.
        seed: of its random numbers.
    """

    codes: np.ndarray
    score: Score | None
    seed: int


def finish_by_each(session: Session, n: int = 4) -> dict[str, list[Ending]]:
    """Every generator finishes the session's beginning n times, from the same random numbers.

    Args:
        session: not changed. A finished image is begun again behind its given rows; without any, in its middle.
        n: with the session's seed and the n - 1 after it.

    Returns:
        generator -> n endings; the first of the session's own generator is what `Session.draw` would draw.
    """
    beginning = session.codes if not session.finished else session.beginning()
    uniforms = seeded_uniforms(session.seed, n, len(beginning)).numpy()
    codes = np.repeat(beginning[None], n, 0)  # (n, T)
    endings = {}
    for name in session.models.generators:
        finished = session.continued(codes, uniforms, name=name)
        endings[name] = [Ending(c, session.score_of(c), session.seed + i) for i, c in enumerate(finished)]
    return endings


@dataclass(frozen=True)
class Mistake:
    """What a wrong code did.

    Attributes:
        position: where it was put in.
        wrong: the code.
        right: the code that was there.
        chance: the probability that the generator gave the wrong code there.
        without: the finished image without it.
        with_it: the finished image with it, from the same random numbers.
        changed: (T,) bool, the codes drawn after it that are others than without it.
        later: how many codes were drawn after it.
        ripple: (T,) float32 in 0..1, how much the wrong code alone changes what the generator expects at each later
            position if all other codes are those of `without`: the total variation distance between the two
            distributions, half the sum of |p - q|. It is 0 where the mistake is forgotten.
    """

    position: int
    wrong: int
    right: int
    chance: float
    without: Ending
    with_it: Ending
    changed: np.ndarray
    later: int
    ripple: np.ndarray


def last_mistake(session: Session) -> Mistake:
    """The effect of the session's last wrong code; unfinished images are finished by its generator for this.

    Raises:
        ConfigError: no wrong code has been put in.
    """
    state = session.state
    if state.before is None:
        raise ConfigError("no wrong code has been put in: click a drawn cell first")
    position = state.wrong[-1]
    both = [session.continued(codes[None], session.uniforms[None])[0] for codes in (state.before, state.codes)]
    endings = [Ending(codes, session.score_of(codes), session.seed) for codes in both]
    swapped = both[0].copy()
    swapped[position] = state.codes[position]
    expected = session.expectations(np.stack([both[0], swapped]))  # (2, T, K)
    ripple = (expected[0] - expected[1]).abs().sum(-1).numpy() / 2  # (T,)
    drawn = (np.arange(len(swapped)) > position) & ~session.given
    return Mistake(
        position,
        int(state.codes[position]),
        int(state.before[position]),
        float(expected[0, position, state.codes[position]]),
        endings[0],
        endings[1],
        drawn & (both[0] != both[1]),
        int(drawn.sum()),
        ripple.astype(np.float32),
    )
