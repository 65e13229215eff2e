"""The ablation grid: one change at a time, made once, and a table that says what is beyond the noise."""

import dataclasses
import importlib
import io
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from evidence import ablation_report
from evidence.ablation_grid import GROUPS, LEVELS, reference_config, reference_of, variants_of
from rich.console import Console

from ral_gym import presets
from ral_gym.config import PriorConfig
from ral_gym.errors import ConfigError, RunError
from ral_gym.presets import DEMO_PATCHGAN, SMOKE
from ral_gym.runs.run import Run, read_config
from ral_gym.runs.storage import differences, load_json, save_json

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = dataclasses.replace(
    SMOKE,
    vqvae=dataclasses.replace(SMOKE.vqvae, training_steps=2),
    prior=dataclasses.replace(SMOKE.prior, training_steps=2),
    critic=dataclasses.replace(SMOKE.critic, hidden_units=2, warmup_steps=1, n_critic=1),
    ral=dataclasses.replace(SMOKE.ral, n_envs=4),
)
PRESETS = {
    "smoke": TINY,
    "smoke-2level": dataclasses.replace(
        TINY,
        preset="smoke-2level",
        vqvae=dataclasses.replace(TINY.vqvae, layers=2, levels=2),
        bottom=PriorConfig(**{**dataclasses.asdict(TINY.prior), "conditioning_stack_layers": 1}),
    ),
}
ONE_LEVEL = {
    "mle",
    "mle_continued",
    "reference",
    "partial_equal_updates",
    "partial_equal_time",
    *(f"{reward}_{cells}x{cells}" for reward in ("single", "intermediate") for cells in (2, 4, 8)),
    "baseline_none",
    "baseline_mean",
    "gamma_0.9",
    "gamma_0.99",
} - {"single_4x4"}  # the preset's own


@pytest.fixture(scope="module")
def ablation() -> ModuleType:
    """The script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return importlib.import_module("ablation")


def flags(runs: Path, *more: str) -> list[str]:
    presets_ = ["--preset", "smoke", "--two-level-preset", "smoke-2level"]
    return ["--runs", str(runs), "--updates", "2", "--samples", "24", "--seeds", "0", "--quiet", *presets_, *more]


def run(ablation: ModuleType, *arguments: str) -> str:
    """What the script prints."""
    console = Console(file=io.StringIO(), width=100)
    with pytest.MonkeyPatch.context() as patch:
        for name, config in PRESETS.items():
            patch.setitem(presets.PRESETS._parts, name, config)
        ablation.main(list(arguments), console)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


@pytest.fixture(scope="module")
def grid(ablation: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a whole finished grid, and what was printed."""
    runs = tmp_path_factory.mktemp("runs")
    return runs, run(ablation, *flags(runs))


@pytest.mark.commands
def test_every_variant_is_trained_from_one_prior_and_changes_one_thing(grid: tuple[Path, str]) -> None:
    seed = grid[0] / "ablation" / "seed0"
    reference = json.loads(read_config(seed / "reference").to_json())
    trained = {path.parent.name for path in seed.glob("*/policy.safetensors")}
    assert trained == ONE_LEVEL - {"mle", "mle_continued"}
    for name in trained - {"reference", "partial_equal_time"}:
        changed = {
            line.split(":")[0] for line in differences(reference, json.loads(read_config(seed / name).to_json()))
        }
        allowed = {"partial": {"ral.reset_mode"}, "baseline": {"ral.reinforce.baseline"}, "gamma": {"ral.gamma"}}
        maps = {"critic.layers", "ral.reward", "ral.gamma"}  # a single reward at the end is not discounted
        assert changed and changed <= allowed.get(name.split("_")[0], maps), (name, changed)
        assert (seed / name / "prior.safetensors").read_bytes() == (seed / "reference/prior.safetensors").read_bytes()
    assert read_config(seed / "reference").ral.reset_mode == "full"
    tuned = [read_config(grid[0] / "ablation/seed0-levels" / name).ral.train_levels for name in ("top", "bottom")]
    assert tuned == ["top", "bottom"]


@pytest.mark.commands
def test_table_figure_and_results_hold_every_variant(grid: tuple[Path, str]) -> None:
    folder = grid[0] / "ablation"
    results = load_json(folder / "results.json")
    found = {(variant["levels"], variant["name"]) for variant in results["variants"]}
    levels = {(2, name) for name in ("mle", "mle_continued", "reference", "top", "bottom")}
    assert found == {(1, name) for name in ONE_LEVEL} | levels
    by_name = {variant["name"]: variant for variant in results["variants"] if variant["levels"] == 1}
    row = by_name["baseline_none"]["seeds"]["0"]
    assert row["updates"] == 2 and row["images"] == 8 and row["codes"] == 8 * 16
    assert by_name["partial_equal_updates"]["seeds"]["0"]["codes"] == 8 * 16 // 2  # a pair of rounds is one image's
    assert 0 <= row["heldout_auc"] <= 1 and row["cpu_seconds"] > 0 and row["n"] == 24
    assert {"fd", "kid", "recall", "entropy", "nll_test", "fd_sharpened"} <= set(row)
    assert row["entropy_sharpened"] < row["entropy"]
    apart = by_name["baseline_none"]["difference"]
    assert apart["mean"] == pytest.approx(row["fd"] - by_name["reference"]["seeds"]["0"]["fd"])
    table = (folder / "table.md").read_text()
    assert "| partial, equal time | " in table and "51.91 (20.25)" in table and "another data set" in table
    assert all(line.count("|") == table.splitlines()[0].count("|") for line in table.splitlines() if line[:1] == "|")
    assert (folder / "ablation.png").stat().st_size > 30_000
    assert "updates fit (--partial-updates)" in grid[1] and "Two levels: FD by the codes that RAL tunes" in grid[1]


@pytest.mark.commands
def test_a_finished_grid_is_read_and_a_lost_row_made_from_its_run(
    ablation: ModuleType, grid: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = grid[0] / "ablation"
    weights = {path: path.stat().st_mtime_ns for path in grid[0].rglob("*.safetensors")}
    before = {name: (folder / name).read_bytes() for name in ("results.json", "table.md", "ablation.png")}
    (folder / "seed0" / "gamma_0.9.json").unlink()  # as if the process had been killed before it wrote the file
    monkeypatch.setattr(ablation.Experiment, "measure", _kept_row)
    assert run(ablation, *flags(grid[0])).count("(2 updates)") == 1
    assert {path: path.stat().st_mtime_ns for path in grid[0].rglob("*.safetensors")} == weights
    assert {name: (folder / name).read_bytes() for name in before} == before


def _kept_row(self: Any, name: str, label: str, prior: object, temperature: float) -> Any:
    """`Experiment.measure` that must find its row."""
    return load_json(self.folder / name / "rows.json")["rows"][f"{label} at {temperature:g}"]


@pytest.mark.commands
def test_a_part_alone_leaves_the_others_in_the_table(ablation: ModuleType, grid: tuple[Path, str]) -> None:
    assert "top level only" in run(ablation, *flags(grid[0], "--groups", "gamma"))


@pytest.mark.commands
def test_other_settings_are_refused(ablation: ModuleType, grid: tuple[Path, str]) -> None:
    with pytest.raises(RunError, match=r"updates: 2 there, 3 here.*choose another --name"):
        run(ablation, *flags(grid[0], "--updates", "3"))
    with pytest.raises(RunError, match=r"samples"):
        run(ablation, *flags(grid[0], "--samples", "30"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seeds"], "nothing to do"),
        (["--updates", "0"], "updates is 0"),
        (["--two-level-preset", "smoke"], "has 1 level(s) of codes, not 2"),
    ],
)
def test_what_cannot_be_made_is_refused_at_once(
    ablation: ModuleType, tmp_path: Path, more: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        run(ablation, *flags(tmp_path), *more)
    assert not list(tmp_path.iterdir())


def test_the_quick_grid_is_smaller(ablation: ModuleType) -> None:
    quick, full = ablation.Arguments(quick=True), ablation.Arguments()
    for arguments in (quick, full):
        arguments.check()
    assert quick.seeds == (0,) and full.seeds == (0, 1, 2)
    assert quick.updates == 20 and full.updates is None
    assert [quick.samples_of(p) for p in ("demo-patchgan", "demo-2level")] == [1000, 500]
    assert full.samples_of("demo-patchgan") == DEMO_PATCHGAN.evaluation.n_samples


def test_the_demo_grid_is_valid_and_shares_its_reference() -> None:
    config = reference_config(DEMO_PATCHGAN, 20)
    variants = variants_of(config, GROUPS)
    for variant in variants:
        variant.applied(config).check()
        if variant.group == "maps" and variant.name != "single_discounted":
            cells = config.data.image_size // 2 ** variant.applied(config).critic.layers
            assert variant.name.endswith(f"_{cells}x{cells}")
    assert reference_config(SMOKE, None).ral == dataclasses.replace(SMOKE.ral, reset_mode="full")
    reference = reference_of(config)
    assert set(reference.also) == {"intermediate_4x4", "baseline_leave_one_out", "gamma_0.9"}
    assert reference.paper == "54.835 (19.47)"
    assert len({variant.name for variant in [*variants, *LEVELS]}) == len(variants) + len(LEVELS) == 17


def test_equal_time_is_equal(ablation: ModuleType, tmp_path: Path) -> None:
    """Full: 30 s + 20 updates of 3 s = 90 s. Partial: 10 s + 2 s an update, on a clock that runs at half speed."""
    monkey = ablation.Ablation.__new__(ablation.Ablation)
    monkey.folder, monkey.config, monkey.seed, monkey.levels = tmp_path, reference_config(DEMO_PATCHGAN, 20), 0, 1
    monkey.arguments, monkey.console = ablation.Arguments(), Console(file=io.StringIO())
    for name, mode, start, each in (("reference", "full", 30, 3), ("partial_equal_updates", "mixed", 10, 2)):
        config = dataclasses.replace(monkey.config, ral=dataclasses.replace(monkey.config.ral, reset_mode=mode))
        made = Run(tmp_path / name, config)
        for step in range(20):
            made.log("ral", step, {"time/time_elapsed": 2.0 * (start + each * (step + 1))})
        save_json(made.file("seconds.json"), {"ral": 2.0 * (start + 20 * each), "ral_cpu": start + 20.0 * each})
    assert monkey.equal_time() == 40
    assert load_json(tmp_path / "equal_time.json")["full_seconds"] == pytest.approx(90)
    save_json(tmp_path / "reference" / "seconds.json", {"ral": 1.0, "ral_cpu": 1.0})
    assert monkey.equal_time() == 40  # derived once
    monkey.arguments.partial_updates = 7
    assert monkey.equal_time() == 7


def test_an_interrupted_run_has_a_cost_per_update(ablation: ModuleType, tmp_path: Path) -> None:
    made = Run(tmp_path, reference_config(DEMO_PATCHGAN, 4))
    for step, clock in enumerate((10.0, 12.0, 9.0, 11.0)):
        made.log("ral", step, {"time/time_elapsed": clock})
    save_json(made.file("seconds.json"), {"ral": 40.0})
    assert ablation.costs(made) == (0.0, 10.0)


def test_another_process_is_waited_for(ablation: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "WAIT_SECONDS", 0.0)
    answers = [RunError("another process is at work in runs/x: wait"), "done"]

    def act() -> str:
        answer = answers.pop(0)
        if isinstance(answer, RunError):
            raise answer
        return answer

    assert ablation.patiently(act) == "done" and not answers
    answers.append(RunError("damaged"))
    with pytest.raises(RunError, match="damaged"):
        ablation.patiently(act)


def entry(name: str, seed: int, fd: float, half: float | None = 1.0, **more: Any) -> dict[str, Any]:
    """A finished variant's file."""
    group = {"reference": "reference", "mle": "controls"}.get(name, "baseline")
    row = {"fd": fd, "kid": 1.0, "recall": 0.5, "entropy": 3.0, "nll_test": 3.0}
    row |= {} if half is None else {"intervals": {"fd": [fd - half, fd + half]}}
    about = {"name": name, "group": group, "label": name, "paper": "-", "changes": {}, "also": [], "levels": 1}
    return {**about, "seed": seed, "extractor": "lite0", "rows": {"1": row, "0.85": row}, "cpu_seconds": 1.0, **more}


def summarised(*entries: dict[str, Any]) -> dict[str, Any]:
    settings = {"samples": [1000, 500], "normalised": True, "reference": "full generation"}
    return ablation_report.summary(entries, settings, 0.85)


def test_one_seeds_noise_is_that_of_both_rows_samples() -> None:
    results = summarised(entry("reference", 0, 20.0, 3.0), entry("a", 0, 14.0, 4.0), entry("b", 0, 25.5, 4.0))
    found = {variant["name"]: variant.get("difference") for variant in results["variants"]}
    assert found["reference"] is None
    kept = {"mean": -6.0, "half": 5.0, "beyond": True, "bold": False, "on_every_seed": False, "seeds": {"0": -6.0}}
    assert found["a"] == kept
    assert found["b"]["half"] == 5.0 and found["b"]["beyond"]
    lines = ablation_report.sentences(results)
    assert "Better than the reference, beyond the noise: baseline: a (-6.0)." in lines
    assert "Worse than the reference, beyond the noise: baseline: b (+5.5)." in lines
    assert any(line.startswith("One seed: the noise above is that of the samples only") for line in lines)


def test_several_seeds_noise_is_students() -> None:
    seeds = {0: (20.0, 17.0), 1: (40.0, 38.0), 2: (30.0, 26.0)}
    entries = [e for s, (ref, fd) in seeds.items() for e in (entry("reference", s, ref), entry("a", s, fd))]
    results = summarised(*entries, entry("b", 0, 10.0))
    a = next(variant for variant in results["variants"] if variant["name"] == "a")
    assert a["difference"]["mean"] == pytest.approx(-3.0)
    assert a["difference"]["half"] == pytest.approx(4.303 / 3**0.5, rel=1e-3)  # t of two degrees, sd 1, three seeds
    assert a["difference"]["beyond"] and a["difference"]["seeds"] == {"0": -3.0, "1": -2.0, "2": -4.0}
    assert "| 27.0 (17.0 / 38.0 / 26.0) | **-3.0 ± 2.5** (-3.0 / -2.0 / -4.0) |" in ablation_report.markdown(results)
    assert "baseline: a (-3.0); baseline: b (-10.0, one seed only)." in ablation_report.sentences(results)[0]
    two = summarised(*entries[:4])
    found = next(variant for variant in two["variants"] if variant["name"] == "a")["difference"]
    assert found["mean"] == pytest.approx(-2.5) and not found["beyond"] and found["on_every_seed"]
    assert "| -2.5 ± 6.4 (-3.0 / -2.0) |" in ablation_report.markdown(two)  # no bold: the interval includes 0
    assert any(line.startswith("Two seeds") for line in ablation_report.sentences(two))


def test_rows_without_interval_or_reference_are_never_beyond_the_noise() -> None:
    results = summarised(entry("reference", 0, 20.0, None), entry("a", 0, 2.0, None))
    assert not next(v for v in results["variants"] if v["name"] == "a")["difference"]["beyond"]
    lonely = summarised(entry("reference", 0, 20.0), entry("a", 1, 2.0))
    assert next(v for v in lonely["variants"] if v["name"] == "a")["difference"] is None
    assert "| baseline: a | 2.0 ± 1.0 | - |" in ablation_report.markdown(lonely)
    ablation_report.terminal_table(lonely)


def test_controls_are_compared_at_both_temperatures() -> None:
    entries = [entry("reference", 0, 20.0), entry("mle", 0, 30.0)]
    for one, fd in zip(entries, (15.0, 15.5), strict=True):
        one["rows"]["0.85"] = {**one["rows"]["1"], "fd": fd, "intervals": {"fd": [fd - 3, fd + 3]}}
    lines = ablation_report.sentences(summarised(*entries))
    assert "RAL's FD is 10.0 ± 1.4 below that of MLE: beyond the noise." in lines
    assert "At T = 0.85 RAL's FD is 0.5 ± 4.2 below that of MLE: within the noise." in lines
    two = [one for seed in (0, 1) for one in (entry("reference", seed, 20.0), entry("mle", seed, 23.0 + seed))]
    said = "RAL's FD is 3.5 ± 6.4 below that of MLE: within the noise, on every seed, but the interval includes 0."
    assert said in ablation_report.sentences(summarised(*two))
