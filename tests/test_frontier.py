"""The frontier: every recipe against the temperature curves of its controls."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from evidence.frontier_report import CURVES, best, beyond, markdown, on_curve, save_panels, sentences, summary
from matplotlib.image import imread
from rich.console import Console

from ral_gym.errors import ConfigError, RunError

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def frontier(monkeypatch: pytest.MonkeyPatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("frontier")


def rows(*points: tuple[float, float, float], recall: float = 0.5) -> list[dict]:
    """Rows of (temperature, entropy, fd)."""
    common = {"kid": 1.0, "recall": recall, "precision": 0.1, "nll_test": 3.0, "memorisation": 1.0}
    return [{"temperature": t, "entropy": h, "fd": fd, **common} for t, h, fd in points]


def seed(shift: float, recall: float = 0.5) -> dict:
    """A seed whose recipe lies `shift` above MLE's curve, everywhere."""
    mle = rows((1.0, 3.5, 40.0), (0.8, 3.0, 20.0), (0.6, 2.5, 30.0))
    recipe = rows((1.0, 3.25, 30.0 + shift), (0.9, 2.75, 25.0 + shift), recall=recall)
    return {
        "curves": {"mle": {"rows": mle, "seconds": None}, "mle_continued": {"rows": mle, "seconds": 5.0}},
        "recipes": {"loo_fd": {"label": "loo", "about": "a reward", "rows": recipe, "seconds": 7.0}},
    }


def results_of(*seeds: dict) -> dict:
    named = {str(number): one for number, one in enumerate(seeds)}
    return {"seeds": named, "table": summary(named), "extractor": "lite0", "n_samples": 10}


def test_the_curve_is_interpolated_at_the_same_entropy_and_ends_where_it_was_measured() -> None:
    curve = seed(0.0)["curves"]["mle"]["rows"]
    assert on_curve(curve, 3.25) == pytest.approx(30.0)
    assert on_curve(curve[::-1], 2.75) == pytest.approx(25.0)
    assert on_curve(curve, 3.6) is None and on_curve(curve, 2.4) is None


@pytest.mark.parametrize("shift", [-2.0, 0.0, 3.0])
def test_a_sharpened_generator_lies_on_the_curve_and_a_better_one_beyond(shift: float) -> None:
    entry = seed(shift)
    assert best(entry["recipes"]["loo_fd"]["rows"])["temperature"] == 0.9  # the least FD
    assert beyond(entry["recipes"]["loo_fd"]["rows"], entry["curves"]["mle"]["rows"]) == pytest.approx(shift)


def test_beyond_needs_an_interval_that_excludes_0() -> None:
    results = results_of(seed(-2.0), seed(-2.1), seed(-1.9))
    won = sentences(results)
    assert "Beyond the temperature curve of MLE, by an interval that excludes 0: loo." in won
    assert any(line.startswith("loo: beyond MLE (-2.0 / -2.1 / -1.9; mean -2.0 ± 0.2)") for line in won)
    assert "| **-2.0 / -2.1 / -1.9** |" in markdown(results)
    lost = sentences(results_of(seed(2.0), seed(2.1), seed(1.9)))
    assert any(line.startswith("loo: behind MLE (") for line in lost)
    assert any("excludes 0: no recipe tried." in line for line in lost)
    one = sentences(results_of(seed(-2.0)))
    assert any(line.startswith("loo: below MLE on the one seed (-2.0)") for line in one)
    assert any("excludes 0: no recipe tried." in line for line in one)


def test_the_same_sign_on_every_seed_is_not_beyond() -> None:
    results = results_of(seed(-2.0), seed(-1.0, recall=0.4))
    won = sentences(results)
    assert any("no recipe tried. Below it on every seed, but the interval includes 0: loo." in line for line in won)
    assert any(line.startswith("loo: below MLE on every seed, but the interval includes 0 (-2.0 / -1") for line in won)
    assert "| -2.0 / -1.0 |" in markdown(results)  # no bold
    assert any("recall against MLE continued there: +0.000 / -0.100" in line for line in won)
    assert any(line.startswith("At T = 1") and "loo: FD -12.0 / -11.0, recall +0.000 / -0.100" in line for line in won)
    mixed = sentences(results_of(seed(-2.0), seed(1.0)))
    assert all("no recipe tried" in line for line in mixed if "excludes 0" in line)
    assert not any("on every seed" in line for line in mixed)
    assert any(line.startswith("loo: not clearly off MLE (-2.0 / +1.0; mean -0.5 ± 19.1)") for line in mixed)
    lost = sentences(results_of(seed(2.0), seed(1.0)))
    start = "loo: above MLE on every seed, but the interval includes 0 (+2.0 / +1.0; mean +1.5 ± 6.4)"
    assert any(line.startswith(start) for line in lost)


def test_the_figure_has_a_column_per_seed(tmp_path: Path) -> None:
    for count in (1, 3):
        save_panels(tmp_path / f"{count}.png", results_of(*[seed(-1.0)] * count))
    one, three = (imread(tmp_path / f"{count}.png").shape for count in (1, 3))
    assert three[0] == one[0] and three[1] > 1.5 * one[1]


@pytest.mark.commands
def test_quick_run_from_nothing_then_again_from_what_is_kept(
    frontier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--quick", "--quiet", "--runs", str(tmp_path)]
    console = Console(record=True, width=80)
    frontier.main(flags, console)
    folder = tmp_path / "frontier"
    first = (folder / "results.json").read_bytes()
    results = json.loads(first)
    one = results["seeds"]["0"]
    assert list(one["curves"]) == list(CURVES)
    assert list(one["recipes"]) == list(frontier.DEFAULT)
    assert len(one["recipes"]["critic"]["checkpoints"]) == 3  # of four stations two are the same update
    for recipe in one["recipes"].values():
        assert [row["temperature"] for row in recipe["rows"]] == [1.0, 0.8]
        assert all(np.isfinite(row[figure]) for row in recipe["rows"] for figure in frontier.NEEDED)
    starts = {name: entry["rows"][0]["entropy"] for kind in ("curves", "recipes") for name, entry in one[kind].items()}
    assert len(set(starts.values())) == len(starts)  # every generator is another one
    assert "| RAL, critic |" in (folder / "table.md").read_text()
    assert (folder / "frontier.png").stat().st_size > 50_000
    assert max(len(line) for line in console.export_text().splitlines() if "RAL, critic " in line) <= 80

    def no_training(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("ral_gym.stages.generator_metrics.GeneratorMetrics.row", no_training)
    frontier.main(flags, console)
    assert (folder / "results.json").read_bytes() == first
    with pytest.raises(RunError, match="other settings"):
        frontier.main([*flags, "--preset", "demo"], console)


def test_bad_arguments_are_refused_at_once(frontier, tmp_path: Path) -> None:
    for flags in (["--recipes", "magic"], ["--curve", "0.9"], ["--temperatures", "1", "0"]):
        with pytest.raises(ConfigError):
            frontier.main([*flags, "--runs", str(tmp_path)], Console())
    assert not list(tmp_path.iterdir())
