"""What can be taken away from the page: the episode as a GIF, and as the lines of Python that repeat it."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from ral_gym.envs.rendering import render_codes
from ral_gym.play.session import Session

MOST_FRAMES = 65
"""Frames of a GIF; images of more codes show several at once."""
FRAME_MS, LAST_MS = 90, 2500
"""How long a frame, and the finished image, is shown."""


def stages(session: Session) -> np.ndarray:
    """The episode from its beginning to now, (n, T) int64: after every step, or at most `MOST_FRAMES` of them."""
    codes, beginning = session.codes, session.beginning()
    drawn = np.flatnonzero((beginning == session.grid.not_drawn) & (codes != session.grid.not_drawn))
    counts = np.unique(np.linspace(0, len(drawn), min(len(drawn) + 1, MOST_FRAMES)).round().astype(int))
    frames = np.repeat(beginning[None], len(counts), 0)
    for frame, count in zip(frames, counts, strict=True):
        frame[drawn[:count]] = codes[drawn[:count]]
    return frames


def gif(session: Session) -> bytes:
    """The episode so far as an animated GIF, undrawn cells grey."""
    frames = session.models.sequences(stages(session), session.state.label).cpu().numpy().astype(np.int16)
    pictures = [Image.fromarray(frame) for frame in render_codes(session.models.world, frames)]
    buffer = io.BytesIO()
    times = [FRAME_MS] * (len(pictures) - 1) + [LAST_MS]
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=times, loop=0)
    return buffer.getvalue()


def python_lines(session: Session) -> str:
    """Five lines that repeat the episode in its Gymnasium environment: the same codes, the same return."""
    grid, state, codes = session.grid, session.state, session.codes
    options = []
    if state.rows:
        given = np.where(session.given, codes, grid.not_drawn)
        given = given[: int(np.flatnonzero(session.given)[-1]) + 1]
        options += [f'"codes": {given.tolist()}', f'"prefix_rows": {state.rows}']
    if state.label is not None:
        options.append(f'"label": {state.label}')
    reset = f"options={{{', '.join(options)}}}" if options else ""
    drawn = codes[~session.given & (codes != grid.not_drawn)]
    return "\n".join(
        [
            "import gymnasium, ral_gym",
            f"env = {session.models.environment}",
            f"observation, info = env.reset({reset})",
            f"for code in {drawn.tolist()}: observation, reward, terminated, truncated, info = env.step(code)",
            "print(observation.tolist(), reward)" if len(drawn) else "print(observation.tolist())",
        ]
    )
