"""The oracle experiment: a whole small run of it, what it keeps, and the verdict that the intervals give."""

import copy
import importlib
import json
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from evidence import oracle_report as report
from rich.console import Console

from ral_gym.agents.rewards.oracle import log_ratio
from ral_gym.metrics import sequence_kl
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.runs.storage import load_module
from ral_gym.tokenizers.code_set import CodeSet

EXAMPLES = Path(__file__).parents[1] / "examples"
ROWS = ["mle", "mle_continued", "mle @ single", "mle_continued @ single", "mle @ intermediate"]
ROWS += ["mle_continued @ intermediate", "ral_single", "ral_intermediate", "oracle_reward", "oracle"]


def load_script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return importlib.import_module("oracle_experiment")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModuleType, Path, str]:
    """The script, the folder of runs and what it printed, for one seed."""
    script, runs = load_script(), tmp_path_factory.mktemp("oracle")
    console = Console(record=True, width=80, file=StringIO())
    script.main(["--quick", "--quiet", "--runs", str(runs), "--seeds", "3"], console)
    return script, runs, console.export_text()


def test_a_finished_experiment_has_every_row_and_file(finished) -> None:
    _, runs, text = finished
    folder = runs / "oracle_experiment_quick"
    results = json.loads((folder / "results.json").read_text())
    rows = results["seeds"]["3"]["rows"]
    assert set(rows) == set(ROWS)
    for row in rows.values():
        assert row["nll_oracle"] == pytest.approx(row["entropy"] + row["kl_model_oracle"], abs=1e-9)
        assert row["nll_test"] == pytest.approx(row["entropy_oracle"] + row["kl_oracle_model"], abs=1e-9)
        assert row["nll_oracle_per_image"] == pytest.approx(16 * row["nll_oracle"])
        assert np.isfinite([row["fd_oracle"], row["fd_real"]]).all() and row["n"] == 32
    assert rows["oracle"]["kl_model_oracle"] == pytest.approx(0, abs=1e-9)
    for name in ("single", "intermediate"):
        for control in ("mle", "mle_continued"):
            assert rows[f"{control} @ {name}"]["entropy"] == pytest.approx(rows[f"ral_{name}"]["entropy"], abs=0.02)
    assert (folder / "nll_curve.png").stat().st_size > 20_000
    table = (folder / "table.md").read_text()
    assert all(f"| `{row}` |" in table for row in ROWS) and "7.05 (-6.6 %)" in table and "not the same unit" in table
    assert all(f"\n{row} " in text for row in ROWS)
    assert "…" not in text and "One seed has no interval" in text


def test_the_generator_learns_from_samples_of_the_oracle_only(finished) -> None:
    _, runs, _ = finished
    folder, base = runs / "oracle_experiment_quick/seed3", runs / "smoke-seed3"
    drawn, real = (CodeSet.load(run / "codes.safetensors") for run in (folder / "generator", base))
    assert drawn.train.shape == (64, 16) and drawn.test.shape == (16, 16) and drawn.new_people is None
    assert not np.array_equal(drawn.train, real.train[:64])
    for run in ("ral_single", "ral_intermediate", "oracle_reward"):
        assert CodeSet.load(folder / run / "codes.safetensors").train.tobytes() == drawn.train.tobytes()
        assert json.loads((folder / run / "config.json").read_text())["ral"]["reset_mode"] == "full"
    oracle, light = (load_module(run / "prior.safetensors", PixelCNN) for run in (base, folder / "generator"))
    assert light.config["hidden_units"] < oracle.config["hidden_units"]


def test_curves_run_from_mle_to_the_rows_of_the_table(finished) -> None:
    script, runs, _ = finished
    results = json.loads((runs / "oracle_experiment_quick/results.json").read_text())["seeds"]["3"]
    curves = results["curves"]
    assert set(curves) == {"ral_single", "ral_intermediate", "oracle_reward", "mle_continued"}
    for curve in curves.values():
        assert [point["step"] for point in curve] == [0, 2, 4]
        assert {k: v for k, v in curve[0].items() if k != "stage"} == curves["mle_continued"][0]
    folder = runs / "oracle_experiment_quick/seed3"
    oracle = load_module(runs / "smoke-seed3/prior.safetensors", PixelCNN)
    policy = load_module(folder / "ral_single/policy_ema.safetensors", PixelCNN)
    codes = script.sample_codes(policy, 16, 3 * 1000 + 12)
    last = curves["ral_single"][-1]
    assert last["kl_model_oracle"] == pytest.approx(sequence_kl(policy, oracle, codes), rel=1e-9)


def test_a_second_time_everything_is_read_and_other_settings_are_refused(finished, monkeypatch) -> None:
    script, runs, _ = finished
    for name in ("make_stage", "load_run", "oracle_metrics", "curve_point", "extract"):
        monkeypatch.setattr(script, name, None)
    console = Console(record=True, width=80, quiet=True)
    flags = ["--quick", "--quiet", "--runs", str(runs), "--seeds", "3"]
    before = (runs / "oracle_experiment_quick/results.json").read_bytes()
    script.main(flags, console)
    assert (runs / "oracle_experiment_quick/results.json").read_bytes() == before
    monkeypatch.setattr(script, "QUICK", script.replace(script.QUICK, n_curve=8))
    with pytest.raises(script.RunError, match=r"other settings \(settings.n_curve: 16 there, 8 here"):
        script.main(flags, console)


def made_up(nll: dict[str, float], jsd: dict[str, float], test: dict[str, float]) -> dict[str, Any]:
    """Three seeds with a little noise, the same in every row; rows that are not given have 4, 0.1 and 3.8."""
    rng = np.random.default_rng(0)
    seeds: dict[str, Any] = {}
    for seed in "012":
        rows, noise = {}, rng.normal(0, 1e-4, 3)
        for row in ROWS:
            figures = {
                "nll_oracle": nll.get(row, 4.0),
                "jsd_per_code": jsd.get(row, 0.1),
                "nll_test": test.get(row, 3.8),
            }
            rows[row] = {name: value + e for (name, value), e in zip(figures.items(), noise, strict=True)}
            rows[row] |= {"kl_model_oracle": 0.5, "nll_oracle_per_image": 64 * rows[row]["nll_oracle"]}
        critic = {variant: {"heldout_auc": 0.9, "reward_correlation": 0.2} for variant in report.RAL}
        seeds[seed] = {"rows": rows, "critic": critic}
    return seeds


@pytest.mark.parametrize(
    ("nll", "jsd", "test", "wanted", "words"),
    [
        ({"ral_single": 3.7}, {}, {}, True, "-7.5 [-7.5, -7.5] %, beyond the paper's 6.6 %"),
        ({"ral_single": 3.8}, {}, {}, False, "less than the paper's 6.6 %"),
        ({"ral_single": 3.7, "mle @ single": 3.7}, {}, {}, False, "no different from that of mle @ single"),
        ({"ral_single": 3.7, "mle @ single": 3.6}, {}, {}, False, "higher than that of mle @ single"),
        ({"ral_single": 3.7}, {"ral_single": 0.11}, {}, False, "JSD per code: worse than mle, mle_continued, mle @ s"),
        (
            {"ral_single": 3.7},
            {},
            {"mle_continued": 3.7},
            False,
            "NLL_test: worse than mle_continued, better than none",
        ),
        ({"ral_single": 3.7}, {"mle": 0.2}, {}, True, "better than mle."),
    ],
)
def test_the_verdict_follows_the_intervals(nll, jsd, test, wanted: bool, words: str) -> None:
    seeds = made_up(nll, jsd, test)
    assert report.found(seeds, "ral_single") is wanted
    line = report.verdict(seeds)[0]
    assert "AUC 0.90, as of scores 1.6 nats apart, where MLE's images are 32.0 nats" in report.verdict(seeds)[2]
    assert words in line and line.endswith("Wanted, and found." if wanted else "Wanted, and not found.")


def test_a_fall_that_is_large_in_one_seed_only_is_not_found() -> None:
    seeds = made_up({"ral_single": 3.7}, {}, {})
    lucky = copy.deepcopy(seeds)
    lucky["2"]["rows"]["ral_single"]["nll_oracle"] = 3.2
    lucky["1"]["rows"]["ral_single"]["nll_oracle"] = 3.95
    assert report.found(seeds, "ral_single") and not report.found(lucky, "ral_single")
    assert "in the mean, but not by its interval" in report.verdict(lucky)[0]


def test_the_true_reward_is_the_log_ratio_of_the_codes_drawn() -> None:
    torch.manual_seed(0)
    oracle, policy = (PixelCNN(6, 3, 3, hidden_units=8, residual_units=8, layers=1).eval() for _ in range(2))
    codes = torch.randint(6, (5, 9))

    def log_probs(network: PixelCNN) -> torch.Tensor:
        with torch.no_grad():
            return network(codes).log_softmax(-1).gather(2, codes[..., None]).squeeze(2)

    drawn = SimpleNamespace(codes=codes.numpy().astype(np.int16), log_probs=log_probs(policy).numpy().reshape(-1))
    expected = (log_probs(oracle) - log_probs(policy)).numpy()
    np.testing.assert_allclose(log_ratio(oracle, drawn), expected, rtol=1e-5)


def test_a_stopped_variant_goes_on_to_the_same_end(finished, monkeypatch, tmp_path: Path) -> None:
    script, runs, _ = finished
    base = script.base_run("smoke", 3, runs, Console(quiet=True), True)
    seed = script.SeedExperiment(base, tmp_path / "seed3", script.QUICK, False)

    def stop(curve: Any) -> None:
        if curve.bookkeeping.updates == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script.OracleCurve, "_on_step", lambda curve: stop(curve) or True)
        patch.setattr(script.OracleCurve, "_on_rollout_start", lambda curve: (stop(curve), curve._measure())[1])
        seed.train("ral_single")
    assert not (tmp_path / "seed3/ral_single/policy.safetensors").exists()
    there, here = runs / "oracle_experiment_quick/seed3/ral_single", seed.train("ral_single").path
    for name in ("policy.safetensors", "policy_ema.safetensors", "critic.safetensors"):
        assert (here / name).read_bytes() == (there / name).read_bytes()
    logs = [(run / "metrics.jsonl").read_text().splitlines() for run in (here, there)]
    points = [[record for record in map(json.loads, log) if record["stage"] == "oracle"] for log in logs]
    assert points[0] == points[1]
