"""The example that scores completions: distances, diversity, and the likelihood of what is hidden."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ral_gym.errors import ConfigError, RunError
from ral_gym.runs.run import Run, read_config
from ral_gym.stages.levels import load_generator
from ral_gym.tokenizers.code_set import CodeSet
from tests.play_runs import RUNS, make_play_runs
from tests.tiny import make_tiny_run

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("completion_scores")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_play_runs(tmp_path_factory.mktemp("runs"))


def test_distances_are_those_of_every_pair(script) -> None:
    completed, truth = torch.randn(3, 4, 5), torch.randn(3, 5)
    found = script.distances("x", completed, truth)
    for image in range(3):
        to_truth = [float((completed[image, s] - truth[image]).norm()) for s in range(4)]
        pairs = [float((completed[image, a] - completed[image, b]).norm()) for a in range(4) for b in range(a)]
        assert float(found["x_mean"][image]) == pytest.approx(sum(to_truth) / 4, rel=1e-5)
        assert float(found["x_nearest"][image]) == pytest.approx(min(to_truth), rel=1e-5)
        assert float(found["x_diversity"][image]) == pytest.approx(sum(pairs) / len(pairs), rel=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_hidden_and_visible_codes_share_the_likelihood_of_the_image(script, folders, name) -> None:
    run = Run(folders[name], read_config(folders[name]))
    prior = load_generator(run, "prior")
    grid = prior.grid
    codes = torch.randint(grid.codebook_size, (5, grid.n_codes))
    true = grid.with_labels(codes, torch.arange(5) % grid.classes) if grid.classes else codes
    log_probs = prior(true).double().log_softmax(-1)
    for rows in (1, grid.height - 1):
        hidden = [t for t in range(grid.n_codes) if grid.mask(rows, grid.height)[t]]
        expected = -torch.stack([log_probs[range(5), t, codes[:, t]] for t in hidden], 1).mean(1)
        torch.testing.assert_close(script.hidden_nll(prior, true, rows), expected.detach())


@pytest.mark.parametrize("name", RUNS)
def test_every_generator_of_the_run_is_scored_and_kept(script, folders, name) -> None:
    run = folders[name]
    console = Console(record=True, width=140)
    script.main([str(run), "--images", "6", "--completions", "3"], console)
    kept = json.loads((run / "completion_scores.json").read_text())
    assert set(kept["rows"]) == {"mle", "ral"} and kept["images"] == 4  # all there are
    mle, ral = kept["rows"]["mle"], kept["rows"]["ral"]
    assert set(mle) == set(script.FIGURES) and mle != ral
    for row in (mle, ral):
        assert 0 < row["pixels_nearest"] < row["pixels_mean"] < 1 and row["pixels_diversity"] > 0
    assert "minus mle" in console.export_text() and "| ral |" in (run / "completion_scores.md").read_text()


def test_a_colder_generator_is_less_diverse(script, folders) -> None:
    def diversity(temperature: str) -> float:
        run = folders["classes"]
        script.main([str(run), "--images", "6", "--temperature", temperature], Console(quiet=True))
        return json.loads((run / "completion_scores.json").read_text())["rows"]["mle"]["pixels_diversity"]

    assert diversity("0.02") < 0.7 * diversity("1")


def test_fewer_images_are_a_random_subset_since_the_first_ones_are_of_one_class(script, folders, monkeypatch) -> None:
    seen = []

    def noted(vqvae, extractor, prior, true, arguments):
        seen.append(true)
        return dict.fromkeys(script.FIGURES, torch.ones(len(true)))

    monkeypatch.setattr(script, "score", noted)
    for seed in range(4):
        script.main([str(folders["plain"]), "--images", "2", "--seed", str(seed)], Console(quiet=True))
    first = CodeSet.load(folders["plain"] / "codes.safetensors").test[:2]
    assert {len(true) for true in seen} == {2}
    assert not all((true.numpy() == first).all() for true in seen)


def test_bad_requests_are_refused(script, folders, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 2 images, 2 completions"):
        script.main([str(folders["plain"]), "--completions", "1"], Console(quiet=True))
    bare = make_tiny_run(tmp_path / "bare")
    (bare / "prior.safetensors").unlink()
    with pytest.raises(RunError, match="no trained prior"):
        script.main([str(bare)], Console(quiet=True))
