"""`ral-gym watch`: the episodes that it draws, as a GIF, as text, and in a window (a pretended one)."""

import io
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence

from ral_gym.commands import watch as watching
from ral_gym.commands.cli import main
from ral_gym.commands.look_arguments import WatchArguments
from ral_gym.commands.terminal_pictures import GREYS, UPPER_HALF, Screen, grey_text, half_blocks, shrunk
from ral_gym.commands.watch import episodes
from tests.class_runs import NAMES, make_class_run
from tests.tiny import make_tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_run(tmp_path_factory.mktemp("watch") / "tiny")


def asked(run: Path, **given: Any) -> WatchArguments:
    return WatchArguments(run=str(run), device="cpu", **given)


# Episodes -----------------------------------------------------------------------------------------------------------


def test_an_episode_is_drawn_code_by_code_and_its_seed_repeats_it(run) -> None:
    first, second = episodes(asked(run, n=2, seed=3))
    assert first.frames.shape == (17, 256, 256, 3) and (first.frames[0] == 128).all()  # 16 codes, and none yet
    undrawn = [(frame == 128).all(-1).mean() for frame in first.frames]
    assert undrawn == sorted(undrawn, reverse=True) and undrawn[-1] < 0.1
    (again,) = episodes(asked(run, n=1, seed=4))
    assert np.array_equal(again.frames, second.frames) and not np.array_equal(again.frames, first.frames)
    assert second.caption.startswith("MLE, seed 4, score ") and second.caption == again.caption


def test_temperature_and_generator_change_the_images(run) -> None:
    (plain,) = episodes(asked(run, n=1))
    (cold,) = episodes(asked(run, n=1, temperature=0.01))
    assert not np.array_equal(plain.frames[-1], cold.frames[-1])
    (faces,) = episodes(WatchArguments(n=1, device="cpu", generator="MLE"))
    (tuned,) = episodes(WatchArguments(n=1, device="cpu"))
    assert faces.caption.startswith("MLE") and tuned.caption.startswith("RAL") and len(faces.frames) == 65


def test_classes_are_drawn_in_turn_or_as_asked(tmp_path) -> None:
    labelled = make_class_run(tmp_path / "classes")
    captions = [episode.caption.split(", ")[1] for episode in episodes(asked(labelled, n=3))]
    assert captions == [str(number) for number in range(3)] or tuple(captions) == NAMES
    assert [episode.caption.split(", ")[1] for episode in episodes(asked(labelled, n=2, label=("2",)))] == [
        captions[2]
    ] * 2


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--n", "0"], "--n is 0: give 1 to 100 episodes"),
        (["--speed", "0"], "--speed is 0.0"),
        (["--temperature", "0"], "temperature is 0.0"),
        (["--label", "cat"], "this run has no classes"),
        (["--generator", "RAL"], "model 'RAL' is unknown: choose one of MLE"),
    ],
)
def test_what_cannot_be_shown_is_refused(run, more, words, capsys) -> None:
    assert main(["watch", str(run), "--device", "cpu", *more]) == 2
    assert words in capsys.readouterr().err
    assert main(["watch", str(run.parent)]) == 2 and "is not a run folder" in capsys.readouterr().err


# GIF ----------------------------------------------------------------------------------------------------------------


def test_a_gif_holds_every_frame(run, tmp_path, capsys) -> None:
    path = tmp_path / "episode.gif"
    argv = ["watch", str(run), "--device", "cpu", "--n", "2", "--gif", str(path), "--speed", "2"]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:11] for line in lines[:2]] == ["MLE, seed 0", "MLE, seed 1"] and lines[2] == f"  {path}"
    both = list(episodes(asked(run, n=2)))
    with Image.open(path) as gif:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(gif)]
        times = [frame.info["duration"] for frame in ImageSequence.Iterator(gif)]
    assert len(frames) == 34 and times[1] in (40, 50) and times[16] == times[33] == 2500
    assert np.abs(frames[16].astype(int) - both[0].frames[-1]).mean() < 8  # a GIF has 256 colours


# The terminal -------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


def test_half_blocks_have_the_colours_of_two_pixels() -> None:
    picture = np.array([[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [10, 11, 12]]], np.uint8)
    assert half_blocks(picture) == (
        f"\x1b[38;2;1;2;3;48;2;7;8;9m{UPPER_HALF}\x1b[38;2;4;5;6;48;2;10;11;12m{UPPER_HALF}\x1b[0m"
    )


def test_grey_text_gets_denser_with_brightness() -> None:
    picture = np.zeros((2, 3, 3), np.uint8)
    picture[:, 1], picture[:, 2] = 128, 255
    assert grey_text(picture) == GREYS[0] + GREYS[5] + GREYS[-1]


def test_a_picture_is_shrunk_by_its_means() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    expected = picture.reshape(4, 3, 4, 3, 3).astype(float).mean((1, 3)).round()
    assert np.array_equal(shrunk(picture, 4), expected)
    assert shrunk(picture, 16).shape == (16, 16, 3)


def test_colours_need_a_terminal_that_has_them(monkeypatch) -> None:
    deep = {"COLORTERM": "truecolor", "TERM": "xterm"}
    assert Screen(Terminal(), deep).colours
    for environment in ({"TERM": "xterm"}, deep | {"NO_COLOR": "1"}, {"COLORTERM": "truecolor", "TERM": "dumb"}):
        assert not Screen(Terminal(), environment).colours
    assert not Screen(io.StringIO(), deep).colours
    narrow = Terminal()
    monkeypatch.setattr(narrow, "encoding", "ascii")
    assert not Screen(narrow, deep).colours


def test_frames_are_shown_in_one_place(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("LINES", "13")
    frames = np.zeros((3, 32, 32, 3), np.uint8)
    terminal = Terminal()
    Screen(terminal, {"COLORTERM": "truecolor", "TERM": "xterm"}).play(frames, 0.0)
    written = terminal.getvalue()
    assert written.count("\x1b[10A") == 2 and written.count("\n") == 30  # 20 pixels across are 10 lines
    file = io.StringIO()
    Screen(file, {}).play(frames, 100.0)
    assert file.getvalue().count("\n") == 10 and "\x1b" not in file.getvalue()


def test_without_a_screen_it_draws_in_the_terminal(run, capsys, monkeypatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    assert main(["watch", str(run), "--device", "cpu", "--n", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("MLE, seed 0") and len({len(line) for line in lines[:-1]}) == 1
    assert set("".join(lines[:-1])) <= set(GREYS)


# The window ---------------------------------------------------------------------------------------------------------


def test_a_window_shows_every_frame_until_it_is_closed(run, capsys, monkeypatch) -> None:
    seen: list[tuple[int, int]] = []
    toolkit = types.SimpleNamespace(Tk=lambda: Root(), Label=lambda root: Widget())

    class Root:
        def title(self, text: str) -> None: ...

        def protocol(self, name: str, close: Any) -> None:
            self.close = close

        def update(self) -> None:
            if len(seen) == 20:
                self.close()

        def destroy(self) -> None: ...

    class Widget:
        def pack(self) -> None: ...

        def configure(self, **given: Any) -> None: ...

    def photo(image: Image.Image) -> Image.Image:
        seen.append(image.size)
        return image

    monkeypatch.setattr(watching, "_window", lambda: watching.Window(toolkit, photo))
    assert main(["watch", str(run), "--device", "cpu", "--n", "3", "--speed", "1000"]) == 0
    assert seen == [(512, 512)] * 20  # 17 frames of the first image, then three of the second
    assert "seed 2" not in capsys.readouterr().out


def test_no_window_where_there_is_none(monkeypatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    assert watching._window() is None
    monkeypatch.setenv("DISPLAY", ":987")  # nobody listens there
    assert watching._window() is None
