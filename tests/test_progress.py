"""Progress: a bar in a terminal, whole lines in a log file, a widget in a notebook; one file decides."""

import re
import sys
import types
from pathlib import Path

import pytest
from tqdm import tqdm

from ral_gym.runs import progress
from ral_gym.runs.progress import EVERY, LogLines, progress_bar

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A clock that a test moves by hand."""
    now = types.SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
    return now


def test_a_log_file_gets_one_line_a_minute_and_one_at_the_end(capsys, clock) -> None:
    bar = progress_bar(range(1, 301), desc="2 PixelCNN", unit="step")
    assert isinstance(bar, LogLines)
    for step in bar:
        clock.seconds += 1.0
        bar.set_postfix(train=f"{step / 100:.2f}")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "2 PixelCNN: 60 of 300 steps after 1:00, about 4:00 left, train 0.60",
        "2 PixelCNN: 120 of 300 steps after 2:00, about 3:00 left, train 1.20",
        "2 PixelCNN: 180 of 300 steps after 3:00, about 2:00 left, train 1.80",
        "2 PixelCNN: 240 of 300 steps after 4:00, about 1:00 left, train 2.40",
        "2 PixelCNN: 300 of 300 steps after 5:00, about 0:00 left, train 3.00",
        "2 PixelCNN: 300 of 300 steps in 5:00, train 3.00",
    ]


def test_a_continued_stage_counts_only_its_own_time(capsys, clock) -> None:
    bar = progress_bar(total=1000, initial=900, desc="3 RAL", unit="update")
    clock.seconds = EVERY
    bar.update(50)
    assert capsys.readouterr().err == "3 RAL: 950 of 1,000 updates after 1:00, about 1:00 left\n"


def test_a_loop_that_need_not_stay_or_fails_says_nothing_at_its_end(capsys) -> None:
    assert list(progress_bar([1, 2], desc="encoding", unit="batch", leave=False)) == [1, 2]
    with pytest.raises(ZeroDivisionError):
        for number in progress_bar([0], desc="1 VQ-VAE", unit="step"):
            print(1 / number)
    with pytest.raises(ZeroDivisionError), progress_bar(total=1, desc="decoding", unit="img"):
        print(1 / 0)
    assert capsys.readouterr().err == ""
    assert list(progress_bar([1], desc="decoding", unit="img", delay=0.5)) == [1]  # too short to be shown
    assert capsys.readouterr().err == ""
    bar = progress_bar(total=2, desc="4 evaluation", unit="row")
    bar.update(2)
    bar.close()
    bar.close()
    assert capsys.readouterr().err == "4 evaluation: 2 of 2 rows in 0:00\n"


def test_a_terminal_gets_a_bar_and_quiet_nothing(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = progress_bar(total=2, desc="1 VQ-VAE", unit="step")
    assert type(bar) is tqdm and not bar.disable
    bar.close()
    assert "\r1 VQ-VAE" in capsys.readouterr().err
    assert list(progress_bar([1, 2], desc="x", unit="step", disable=True)) == [1, 2]
    assert capsys.readouterr().err == ""


def test_a_notebook_gets_the_bar_of_tqdm_auto(monkeypatch) -> None:
    shell = types.SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    taken: list[str] = []
    monkeypatch.setattr(progress, "_notebook_bar", lambda: lambda *_, **given: taken.append(given["desc"]))
    progress_bar(total=2, desc="1 VQ-VAE", unit="step")
    shell.config = {"TerminalIPythonApp": {}}
    progress_bar(total=2, desc="2 PixelCNN", unit="step")
    assert taken == ["1 VQ-VAE"]


def test_one_file_decides() -> None:
    files = [path for name in ("ral_gym", "envs", "agents", "examples") for path in (ROOT / name).rglob("*.py")]
    found = {path.name for path in files if re.search(r"^\s*(from|import) tqdm", path.read_text("utf-8"), re.MULTILINE)}
    assert found == {"progress.py", "ending.py"}  # ending.py closes bars that an error has left open
