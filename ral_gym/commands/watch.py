"""`ral-gym watch`: a generator draws images before your eyes, in a window, in the terminal, or into a GIF file."""

from __future__ import annotations

import io
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from ral_gym.commands.generate import need, open_run
from ral_gym.commands.look_arguments import WatchArguments
from ral_gym.commands.terminal_pictures import Screen
from ral_gym.envs.rendering import render_codes
from ral_gym.errors import ConfigError, printable
from ral_gym.play.models import load_models
from ral_gym.play.session import Session
from ral_gym.play.sharing import FRAME_MS, LAST_MS, stages
from ral_gym.runs.storage import write_atomic
from ral_gym.stages.labels import labels_asked

MOST_EPISODES = 100


@dataclass(frozen=True)
class Episode:
    """A whole episode as pictures.

    Attributes:
        frames: (F, S, S, 3) uint8; undrawn cells are grey.
        caption: the class, the seed and the critic's score.
    """

    frames: np.ndarray
    caption: str


def watch(arguments: WatchArguments, console: Console) -> list[Episode]:
    """Draw and show the episodes; returns them.

    Raises:
        ConfigError: a number is out of range, or there is no such class or generator.
        RunError: not a run folder, or stage 1 or 2 has not run.
    """
    if not 1 <= arguments.n <= MOST_EPISODES:
        raise ConfigError(f"--n is {arguments.n}: give 1 to {MOST_EPISODES} episodes")
    if not 0 < arguments.speed < math.inf:
        raise ConfigError(f"--speed is {arguments.speed}: give a number above 0; 2 is twice as fast")
    if arguments.run is not None:
        files = ["vqvae.safetensors", "prior.safetensors"]
        need(open_run(arguments.run), files, "train stages 1 and 2 with ral-gym train --stages vqvae prior")
    found = episodes(arguments)
    if arguments.gif is not None:
        shown = list(found)
        write_gif(Path(arguments.gif), shown, arguments.speed)
        _say(console, *(episode.caption for episode in shown), f"  {arguments.gif}")
        return shown
    window = None if arguments.terminal else _window()
    screen = Screen(sys.stdout, os.environ)
    shown = []
    for episode in found:
        shown.append(episode)
        if window is not None and not window.closed:
            window.show(episode, arguments.speed)
        elif window is None:
            screen.play(episode.frames, FRAME_MS / 1000 / arguments.speed)
        else:
            break
        _say(console, episode.caption)
    return shown


def episodes(arguments: WatchArguments) -> Iterator[Episode]:
    """One episode after the other; the first has the seed that was asked for, the others the next ones.

    Raises:
        ConfigError: there is no such class or generator.
    """
    models = load_models(arguments.run, arguments.device, arguments.plugins)
    names = models.class_names
    labels = labels_asked(arguments.label, names, arguments.n)
    session = Session(models, generator=arguments.generator)
    session.set(temperature=arguments.temperature, guidance=arguments.guidance)
    for number in range(arguments.n):
        label = None
        if names:
            label = number % len(names) if labels is None else int(labels[number])
        session.reseed(arguments.seed + number)
        session.start(label)
        session.draw(None)
        sequences = models.sequences(stages(session), label).cpu().numpy().astype(np.int16)
        parts = [session.generator, *([names[label]] if label is not None else []), f"seed {session.seed}"]
        score = session.score()
        parts += [f"score {score.value:.2f}"] if score is not None else []
        yield Episode(render_codes(models.world, sequences), ", ".join(parts))


def write_gif(path: Path, shown: list[Episode], speed: float) -> None:
    """All episodes one after the other as an animated GIF.

    Raises:
        RunError: the file cannot be written.
    """
    pictures = [Image.fromarray(frame) for episode in shown for frame in episode.frames]
    times: list[int] = []
    for episode in shown:
        times += [max(20, round(FRAME_MS / speed))] * (len(episode.frames) - 1) + [LAST_MS]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=times, loop=0)
    write_atomic(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))


class Window:
    """A window of Python's own toolkit; closing it ends the command."""

    def __init__(self, toolkit: Any, photo: Any) -> None:
        self.closed = False
        self._photo, self._root = photo, toolkit.Tk()
        self._root.title("ral-gym watch")
        self._root.protocol("WM_DELETE_WINDOW", self._close)
        self._picture = toolkit.Label(self._root)
        self._picture.pack()
        self._words = toolkit.Label(self._root)
        self._words.pack()

    def _close(self) -> None:
        self.closed = True
        self._root.destroy()

    def show(self, episode: Episode, speed: float) -> None:
        """Show the frames, the last one for longer."""
        for number, frame in enumerate(episode.frames):
            if self.closed:
                return
            image = self._photo(Image.fromarray(frame).resize((512, 512), Image.Resampling.NEAREST))
            last = number == len(episode.frames) - 1
            self._picture.configure(image=image)
            self._words.configure(text=episode.caption if last else "")
            self._wait((LAST_MS if last else FRAME_MS) / 1000 / speed)

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.closed and time.monotonic() < end:
            self._root.update()
            time.sleep(0.01)


def _window() -> Window | None:
    """A window, or None where there is no screen or Python came without its toolkit."""
    if sys.platform not in ("win32", "darwin") and not os.environ.get("DISPLAY"):
        return None
    try:
        import tkinter

        from PIL import ImageTk

        return Window(tkinter, ImageTk.PhotoImage)
    except (ImportError, RuntimeError):
        return None
    except Exception as error:
        if type(error).__name__ != "TclError":  # no display after all
            raise
        return None


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(printable(line), highlight=False, soft_wrap=True, markup=False)
