"""`ral-gym compare`: the numbers of its tables, what is paired, and the page."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ral_gym.commands.cli import main
from ral_gym.commands.compare import findings, grouped, notes_of, paired, terminal_table, values_of
from ral_gym.commands.generate import open_run
from ral_gym.errors import ConfigError, RunError
from ral_gym.metrics import Estimate, SeedDifference, mean_estimate, paired_estimate
from tests.tiny import make_tiny_run

FDS = {0: (10.0, 8.0), 1: (12.0, 9.0), 2: (11.0, 9.5)}
"""Seed -> FD of the prior and of RAL."""


def measured(path: Path, seed: int, before: float, after: float, **changed: Any) -> Path:
    """A run folder with a table of these FDs; `changed` are settings of its config.json."""
    make_tiny_run(path, seed=seed)
    config = json.loads((path / "config.json").read_text())
    for section, values in changed.items():
        config[section] |= values
    (path / "config.json").write_text(json.dumps(config))
    rows = {"mle": {"fd": before, "recall": 0.5}, "ral": {"fd": after, "recall": None}}
    facts = {"extractor": "encoder", "reference": "decoded training codes", "n_samples": 12, "seed": seed}
    table = {"rows": rows, "sweeps": {}, "checkpoints": [], **facts}
    (path / "results.json").write_text(json.dumps(table))
    return path


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """Three seeds of one setting, and two of another, whose RAL is better by 1, then by 2."""
    one = [measured(tmp_path / f"one-{seed}", seed, *fds) for seed, fds in FDS.items()]
    other = {"ral": {"learning_rate": 0.5}}
    two = [measured(tmp_path / f"two-{s}", s, FDS[s][0], FDS[s][1] - 1 - s, **other) for s in (0, 1)]
    return [*one, *two]


def test_a_paired_interval_is_that_of_the_differences() -> None:
    found = paired_estimate({0: 10.0, 1: 20.0, 2: 30.0, 9: 1.0}, {2: 27.0, 0: 8.0, 1: 19.0, 5: 4.0})
    expected = mean_estimate([-2.0, -1.0, -3.0])
    assert (found.value, found.low, found.high, found.n) == (expected.value, expected.low, expected.high, 3)
    small = paired_estimate({0: 1.0, 1: 1.0}, {0: 1.0 + 1e-12, 1: 1.0 + 3e-12})  # in float64 throughout
    assert small.value == pytest.approx(2e-12, rel=1e-3) and small.low < 0
    with pytest.raises(ConfigError, match="1 values have no interval"):
        paired_estimate({0: 1.0, 1: 2.0}, {1: 3.0})


def test_seeds_of_equal_settings_are_one_line(runs) -> None:
    groups = grouped([open_run(str(path)) for path in runs])
    assert [group.name for group in groups] == ["one-0 (3 seeds)", "two-0 (2 seeds)"]
    lines = {line.name: line.cells for line in values_of(groups)}
    assert list(lines) == [f"{group.name}: {row}" for group in groups for row in ("prior", "RAL")]
    fd = lines["one-0 (3 seeds): RAL"]["fd"]
    assert isinstance(fd, Estimate) and fd.value == pytest.approx(26.5 / 3)
    assert (fd.low, fd.high) == (mean_estimate([8.0, 9.0, 9.5]).low, mean_estimate([8.0, 9.0, 9.5]).high)
    assert lines["two-0 (2 seeds): RAL"]["recall"] is None


def test_differences_are_paired_by_seed(runs) -> None:
    groups = grouped([open_run(str(path)) for path in runs])
    found = {line.name: line.cells["fd"] for line in paired(groups)}
    assert list(found) == [
        "one-0 (3 seeds): RAL - prior",
        "two-0 (2 seeds): RAL - prior",
        "RAL, two-0 (2 seeds) - one-0 (3 seeds)",
    ]
    expected = {0: mean_estimate([-2.0, -3.0, -1.5]), 2: mean_estimate([-1.0, -2.0])}  # seed 2 has no partner
    for number, estimate in expected.items():
        cell = list(found.values())[number]
        assert isinstance(cell, SeedDifference) and cell.value == pytest.approx(estimate.value)
        assert cell.interval is not None
        assert (cell.interval.low, cell.interval.high) == pytest.approx((estimate.low, estimate.high))


def test_only_what_is_beyond_its_interval_is_bold_or_said(runs) -> None:
    lines = paired(grouped([open_run(str(path)) for path in runs]))
    # Of three seeds 1.5 to 3 lower is beyond the interval; of two, 1 and 2 lower is not: t is 12.7.
    assert findings(lines) == [
        "Intervals that exclude 0: one-0 (3 seeds): RAL - prior (FD).",
        "Same sign on every seed, but the interval includes 0: two-0 (2 seeds): RAL - prior (FD); RAL, two-0 (2 seeds) "
        "- one-0 (3 seeds) (FD).",
    ]
    column = list(terminal_table("Differences", lines).columns[1].cells)
    assert [str(getattr(cell, "style", "")) for cell in column] == ["bold", "", ""]
    assert findings([]) == []


def test_what_does_not_compare_is_said(tmp_path, runs) -> None:
    assert not any("compare" in note for note in notes_of(grouped([open_run(str(path)) for path in runs])))
    other = measured(tmp_path / "lite", 7, 1.0, 1.0, data={"image_size": 64})
    table = json.loads((other / "results.json").read_text())
    (other / "results.json").write_text(json.dumps(table | {"extractor": "lite0"}))
    notes = notes_of(grouped([open_run(str(path)) for path in (runs[0], other)]))
    assert "Distances do not compare: extractor differs (encoder, lite0)." in notes
    assert any("different images" in note for note in notes) and notes[-1].startswith("One seed:")


def test_the_page_and_the_picture(runs, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["compare", *map(str, runs), "--n", "4", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    page, picture = runs[0].parent / "comparison.html", runs[0].parent / "comparison.png"
    assert out.splitlines()[-2:] == [f"  {page}", f"  {picture}"]
    assert re.search(r"one-0 \(3 seeds\): RAL +8\.833", out) and "± 1.897" in out and "paired by seed" in out
    text = page.read_text()
    assert text.count("<img ") == 2 and "http" not in text.replace("http-equiv", "") and "<script" not in text
    assert "ral.learning_rate" in text and "0.5" in text and "8.833" in text
    with Image.open(picture) as image:
        assert image.width > 200
    assert main(["compare", str(runs[0]), str(runs[3]), "--output", str(runs[0].parent / "x.png")]) == 0
    assert (runs[0].parent / "x.png").is_file() and not (runs[0].parent / "x.html").exists()
    assert "paired" not in capsys.readouterr().out  # one seed each


def test_what_cannot_be_compared_is_refused(runs, tmp_path, capsys) -> None:
    with pytest.raises(RunError, match="equal settings and seeds"):
        grouped([open_run(str(runs[0])), open_run(str(measured(tmp_path / "again", 0, 1.0, 1.0)))])
    for argv, words in {
        (str(runs[0]),): "compare got 1 run(s): give 2 to 24",
        (str(runs[0]), str(runs[0])): "compare got 2 run(s)",
        (str(runs[0]), str(make_tiny_run(tmp_path / "bare"))): "has no results.json: measure it with ral-gym evaluate",
        (str(runs[0]), str(runs[3]), "--output", "x.pdf"): "ends with .html or .png",
        (str(runs[0]), str(runs[3]), "--n", "0"): "--n is 0",
    }.items():
        assert main(["compare", *argv]) == 2
        assert words in capsys.readouterr().err
