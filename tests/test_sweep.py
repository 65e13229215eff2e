"""The example that varies settings of stage 3 from one run's prior."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from ral_gym.errors import ConfigError
from ral_gym.runs.run import Run, read_config

EXAMPLES = Path(__file__).parents[1] / "examples"
VARY = ["few: --ral.n-envs 4 --ral.n-updates 2", "FD alone: --ral.reward-weights loo_fd 1 --ral.n-updates 1"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("sweep")


@pytest.fixture
def run(smoke_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(smoke_run, tmp_path / "run")


def test_variants_stand_beside_the_runs_own_lines(script, run, monkeypatch) -> None:
    console = Console(record=True, width=200)
    script.main([str(run), "--vary", *VARY, "--quiet"], console)
    found = json.loads((run / "sweep/sweep.json").read_text())
    assert [(one["name"], one["images"], one["updates"]) for one in found] == [("few", 4, 2), ("FD alone", 8, 1)]
    assert found[0]["auc"] is not None and found[1]["auc"] is None  # no critic
    own = json.loads((run / "results.json").read_text())
    table = (run / "sweep/table.md").read_text()
    for name in ("mle", "mle_continued", "ral"):
        assert f"| `{name}` |" in table and f"{own['rows'][name]['nll_test']:.3f}" in table
    assert f"{found[0]['rows']['1']['nll_test']:.3f}" in table and "FD alone" in console.export_text()
    temperatures = {"1", *(f"{t:g}" for t in read_config(run).evaluation.temperatures)}
    assert set(found[0]["rows"]) == temperatures
    assert (run / "sweep/sweep.png").stat().st_size > 1000
    monkeypatch.setattr(script, "measured", lambda *_: pytest.fail("made again"))
    script.main([str(run), "--vary", *VARY, "--quiet"], console)
    assert json.loads((run / "sweep/sweep.json").read_text()) == found


def test_a_variant_without_a_change_is_the_runs_own_ral(script, run) -> None:
    script.main([str(run), "--vary", "same: --ral.n-envs 8", "--quiet"], Console())
    (found,) = json.loads((run / "sweep/sweep.json").read_text())
    own = json.loads((run / "results.json").read_text())["rows"]["ral"]
    for figure in ("fd", "nll_test", "entropy"):
        assert found["rows"]["1"][figure] == pytest.approx(own[figure], rel=1e-6)


@pytest.mark.parametrize("variant", ["few --ral.n-envs 64", ": --ral.n-envs 64"])
def test_a_variant_needs_a_name(script, run, variant: str) -> None:
    with pytest.raises(ConfigError, match="has no name"):
        script.main([str(run), "--vary", variant], Console())


@pytest.mark.parametrize("flags", ["--prior.layers 5", "--evaluation.n-samples 20"])
def test_other_stages_are_refused(script, run, flags: str) -> None:
    with pytest.raises(ConfigError, match="changes more than `ral` and `critic`"):
        script.config_of(Run(run, read_config(run)), flags)


def test_the_list_fits_the_preset_it_is_for(script, run) -> None:
    for _, flags in map(script.named, script.VARY):
        script.config_of(Run(run, read_config(run)), flags)
