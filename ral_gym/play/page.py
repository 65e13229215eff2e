"""The page's events: each changes the visitor's session, and shows it again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ral_gym.errors import RalGymError
from ral_gym.play import fragments
from ral_gym.play.comparison import finish_by_each, last_mistake
from ral_gym.play.layout import Layout, gr
from ral_gym.play.models import Models
from ral_gym.play.session import Session
from ral_gym.play.sharing import gif
from ral_gym.play.upload import read_upload

OPENING_SECONDS = 3.0
"""How long the page may draw before it shows its first image."""
LIVE_SECONDS = 0.04
"""Pause between two codes, so that eyes can follow."""
SLOW_CODES = 100
"""Images of more codes are shown row by row, and finished fewer times."""
MANY, FEW = 64, 4
"""How many times each model finishes an image for the comparison."""
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
BUSY: dict[str, Any] = {"show_progress": "minimal", "api_visibility": "private"}

Values = dict[Any, Any]
"""The page's inputs by component."""


@dataclass
class Visit:
    """A visitor's session.

    Attributes:
        session: the episode.
        turn: counts events; an image that is being drawn live stops when another event comes.
        seed: what the page's seed field held when the last event came.
        label: likewise.
        lock: held while the session changes.
    """

    session: Session
    turn: int = 0
    seed: float | None = None
    label: int | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Page:
    """The Gradio page of some models.

    Args:
        models: what is drawn with.

    Attributes:
        blocks: for `ral_gym.play.server`.
    """

    def __init__(self, models: Models) -> None:
        self.models = models
        with gr.Blocks(title="ral_gym play", analytics_enabled=False) as self.blocks:
            self.layout = Layout(models)
            self._connect()

    def _connect(self) -> None:
        """Which event calls what."""
        on, inputs, outputs = self.layout, self.layout.inputs, self.layout.outputs
        self.blocks.load(self.open, inputs, outputs, **QUIET)
        on.finish.click(self.finish, inputs, outputs, **QUIET)
        on.board.select(self.put_wrong, inputs, outputs, **QUIET)
        on.choices.select(self.choose, inputs, outputs, **QUIET)
        on.photo.upload(self.begin_with_upload, inputs, outputs, **QUIET)
        for event, change in (
            (on.step.click, lambda session, values: session.draw()),
            (on.undo.click, lambda session, values: session.undo()),
            (on.new.click, _begin_anew),
            (on.label.input, lambda session, values: session.start(values[on.label])),
            (on.real.click, lambda session, values: _begin_with_real(session, values[on.rows])),
            (on.rows.release, lambda session, values: session.change_rows(values[on.rows])),
        ):
            event(self._changing(change), inputs, outputs, **QUIET)
        for event in (on.generator.input, on.temperature.release, on.guidance.release, on.seed.input):
            event(self._changing(lambda session, values: None), inputs, outputs, **QUIET)
        on.compare.click(self.compare, inputs, on.endings, **BUSY)
        on.make_gif.click(self.animate, inputs, on.animation, **BUSY)

    # Events -------------------------------------------------------------------------------------------------------

    def open(self, values: Values) -> list[Any]:
        """A first image, half drawn, so that there is something to look at and something to do."""
        visit = self._visit({**values, self.layout.visit: None})
        session, began = visit.session, time.monotonic()
        wanted = (session.grid.n_codes + session.grid.width) // 2
        while session.drawn < wanted and time.monotonic() - began < OPENING_SECONDS:
            session.draw(min(session.grid.width, wanted - session.drawn), joined=True)
        return self.show(visit)

    def finish(self, values: Values) -> Iterator[list[Any]]:
        """Draw to the end before the visitor's eyes; one step for `undo`."""
        visit = self._visit(values)
        yield from self._draw_live(visit, joined=False)

    def put_wrong(self, values: Values, event: gr.EventData) -> Iterator[list[Any]]:
        """A wrong code at the cell that was clicked; then the model goes on, one step for `undo`."""
        visit = self._visit(values)
        with visit.lock, _told():
            visit.session.put_wrong(int(event.cell))
        yield self.show(visit, live=True)
        time.sleep(10 * LIVE_SECONDS)
        yield from self._draw_live(visit, joined=True)

    def choose(self, values: Values, event: gr.EventData) -> list[Any]:
        """The code that was clicked comes next."""
        visit = self._visit(values)
        with visit.lock, _told():
            if not visit.session.finished:  # else a second click on the last cell
                visit.session.choose(int(event.code))
        return self.show(visit)

    def begin_with_upload(self, values: Values, event: gr.EventData) -> list[Any]:
        """Begin with the upper rows of an uploaded photo, whose file is deleted."""
        visit = self._visit(values)
        with visit.lock, _told():
            image = read_upload(event._data, self.models)
            visit.session.start_from_photo(image, int(values[self.layout.rows]))
        return self.show(visit)

    def compare(self, values: Values) -> str:
        """Every model finishes the image."""
        visit = self._visit(values)
        n = MANY if visit.session.grid.n_codes <= SLOW_CODES else FEW
        with visit.lock:
            return fragments.endings(visit.session, finish_by_each(visit.session, n))

    def animate(self, values: Values) -> str:
        """The episode as a GIF."""
        return fragments.animation(gif(self._visit(values).session))

    def _changing(self, change: Callable[[Session, Values], None]) -> Callable[[Values], list[Any]]:
        """A handler that changes the session and shows it."""

        def handle(values: Values) -> list[Any]:
            visit = self._visit(values)
            with visit.lock, _told():
                change(visit.session, values)
            return self.show(visit)

        return handle

    def _draw_live(self, visit: Visit, *, joined: bool) -> Iterator[list[Any]]:
        session, turn = visit.session, visit.turn
        n = 1 if session.grid.n_codes <= SLOW_CODES else session.grid.width
        while not session.finished:
            with visit.lock:
                if visit.turn != turn:
                    return
                session.draw(n, joined=joined)
            joined = True
            if not session.finished:
                yield self.show(visit, live=True)
                time.sleep(LIVE_SECONDS)
        yield self.show(visit)

    # Parts --------------------------------------------------------------------------------------------------------

    def _visit(self, values: Values) -> Visit:
        """The visitor's session with the page's settings; a new one for a new visitor, or after a restart."""
        on, visit = self.layout, values[self.layout.visit]
        if visit is None:
            visit = Visit(Session(self.models))
        with visit.lock, _told():
            visit.turn += 1
            visit.seed, visit.label = values[on.seed], values[on.label]
            visit.session.set(
                generator=values[on.generator], temperature=values[on.temperature], guidance=values[on.guidance]
            )
            if values[on.seed] is not None and values[on.seed] != visit.session.seed:
                visit.session.reseed(values[on.seed])
        return visit

    def show(self, visit: Visit, *, live: bool = False) -> list[Any]:
        """Everything on the page, in the order of `Layout.outputs`; `live`: only the image, while it is being drawn."""
        session = visit.session
        if live:
            return [visit, fragments.board(session), *[gr.skip() for _ in self.layout.outputs[2:]]]
        mistaken = session.state.before is not None
        more = gr.update(interactive=not session.finished)
        return [
            visit,
            fragments.board(session),
            fragments.choices(session),
            fragments.score_map(session),
            fragments.lines(session),
            gr.update(interactive=session.can_undo),
            more,
            more,
            gr.update(visible=mistaken),
            fragments.mistake(session, last_mistake(session)) if mistaken else "",
            # A field that already says so is left alone: somebody may be typing in it.
            gr.skip() if visit.seed == session.seed else session.seed,
            gr.skip() if visit.label == session.state.label else session.state.label,
            "",
            "",
        ]


class _told:
    """Turns an error that a visitor can fix into a message on the page."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RalGymError):
            raise gr.Error(str(error), duration=8, print_exception=False) from error


def _begin_anew(session: Session, values: Values) -> None:
    """An empty image, with the next seed."""
    session.reseed(session.seed + 1)
    session.start()


def _begin_with_real(session: Session, rows: int) -> None:
    """The next photo of the world, with the next seed."""
    session.reseed(session.seed + 1)
    session.start_from_real(session.next_real(), int(rows))
