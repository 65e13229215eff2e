"""Evaluation noise: FD of samples from several seeds beside every generated row, and nothing else changed by it."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from ral_gym.commands.cli import main, train_main
from ral_gym.commands.verify import compare
from ral_gym.data.images import load_images
from ral_gym.errors import RunError
from ral_gym.metrics import extract
from ral_gym.metrics.table import results_caption, results_markdown, results_table
from ral_gym.runs.results import load_results
from ral_gym.runs.run import Run, read_config
from ral_gym.runs.storage import load_json, save_json
from ral_gym.stages.evaluate import REAL_ROWS, _begun
from ral_gym.stages.generator_metrics import MEASUREMENT, GeneratorMetrics
from ral_gym.stages.levels import load_generator, load_vqvae
from ral_gym.stages.pictures import sample_codes
from ral_gym.stages.sampling_noise import STEP, has_sampling_seeds, sampling_noise
from ral_gym.tokenizers.code_set import CodeSet, decode_codes

NOISE = {"fd_sampling_2", "fd_spread"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, smoke_options: list[str]) -> Path:
    """A finished run with two sampling seeds."""
    runs = tmp_path_factory.mktemp("runs")
    options = [*smoke_options, "--evaluation.sampling-seeds", "2", "--name", "noise", "--runs", str(runs)]
    assert train_main(options) == 0
    return runs / "noise"


def without_noise(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in NOISE}


def test_the_spread_is_that_of_all_seeds_and_one_seed_has_none() -> None:
    fds = {7: 20.0, 7 + STEP: 18.5, 7 + 2 * STEP: 21.0}
    assert sampling_noise(20.0, 7, 3, fds.__getitem__) == {
        "fd_sampling_2": 18.5,
        "fd_sampling_3": 21.0,
        "fd_spread": 2.5,
    }
    assert sampling_noise(20.0, 7, 1, fds.__getitem__) == {}
    assert has_sampling_seeds({"fd": 1.0}, 1) and not has_sampling_seeds({"fd": 1.0}, 2)


@pytest.mark.commands
def test_rows_are_those_of_one_seed_to_the_last_bit_with_the_spread_beside_them(run, smoke_run) -> None:
    one, two = (load_json(path / "results.json") for path in (smoke_run, run))
    assert "sampling_seeds" not in one and two["sampling_seeds"] == 2
    assert one["rows"].keys() == two["rows"].keys()
    for name, row in two["rows"].items():
        assert without_noise(row) == one["rows"][name], name
        assert (row.keys() >= NOISE) == (name not in REAL_ROWS), name
    sweeps = [row for rows in two["sweeps"].values() for row in rows]
    assert all(row.keys() >= NOISE for row in [*sweeps, *two["checkpoints"]])
    assert all(row["fd_spread"] == abs(row["fd"] - row["fd_sampling_2"]) > 0 for row in sweeps)
    assert two["rows"]["mle_rejection"]["fd_spread"] > 0
    assert one["given_rows"] == two["given_rows"]


@pytest.mark.commands
def test_the_second_fd_is_that_of_equally_many_samples_from_the_other_seed(run) -> None:
    opened, device = Run(run, read_config(run)), torch.device("cpu")
    vqvae, prior = load_vqvae(opened, device), load_generator(opened, "prior", device)
    codes = CodeSet.load(run / "codes.safetensors", vqvae.grid)
    images = load_images(opened.config.data, seed=opened.config.seed, progress=False)
    evaluation = GeneratorMetrics(opened, vqvae, codes, images, device)
    drawn = sample_codes(prior, evaluation.n_samples, evaluation.seed + STEP)
    measured = evaluation.distance.features.measure(extract(evaluation.extractor, decode_codes(vqvae, drawn)))
    assert measured["n"] == evaluation.n_samples
    assert load_json(run / "results.json")["rows"]["mle"]["fd_sampling_2"] == pytest.approx(measured["fd"], rel=1e-9)


@pytest.mark.commands
def test_rows_of_fewer_seeds_are_measured_again_and_no_others(run, tmp_path) -> None:
    again = shutil.copytree(run, tmp_path / "again")
    finished = load_json(again / "results.json")
    partial = load_json(again / "checkpoints" / "evaluation.json")
    partial["rows"]["mle"] = without_noise(partial["rows"]["mle"]) | {"fd": -1.0}  # of one seed, and wrong
    save_json(again / "checkpoints" / "evaluation.json", partial)
    measurement, rows = _begun(Run(again, read_config(again)))
    assert measurement == MEASUREMENT and partial["rows"].keys() - rows.keys() == {"mle"}
    (again / "results.json").unlink()
    assert main(["evaluate", str(again), "--device", "cpu", "--quiet"]) == 0
    assert {**load_json(again / "results.json"), "seconds": 0} == {**finished, "seconds": 0}
    config = read_config(again)  # and rows of two seeds are not those of one
    one = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, sampling_seeds=1))
    (again / "config.json").write_text(one.to_json())
    assert _begun(Run(again, one))[1].keys() == set(REAL_ROWS)


@pytest.mark.commands
def test_verify_measures_the_other_seeds_too(run, tmp_path, capsys) -> None:
    edited = shutil.copytree(run, tmp_path / "edited")
    command = ["verify", str(edited), "--rows", "ral", "mle_rejection", "--device", "cpu", "--quiet"]
    assert main(command) == 0
    results = load_json(edited / "results.json")
    results["rows"]["ral"]["fd_spread"] += 1.0
    save_json(edited / "results.json", results)
    capsys.readouterr()
    assert main(command) == 2
    assert "1 metrics differ from results.json, in ral" in capsys.readouterr().err
    save_json(edited / "results.json", {**load_json(run / "results.json"), "sampling_seeds": 3})
    assert main(command) == 2 and "in settings" in capsys.readouterr().err


def test_another_machines_spread_is_judged_by_the_interval_of_fd() -> None:
    row = {"fd": 20.0, "fd_sampling_2": 18.0, "fd_spread": 2.0, "intervals": {"fd": [19.0, 21.0]}}
    moved = row | {"fd_sampling_2": 18.4, "fd_spread": 1.6}
    assert not compare({"mle": row}, {"mle": moved}, 0.5).differences
    found = compare({"mle": row}, {"mle": moved}, 0.3).differences
    assert [one.metric for one in found] == ["fd_sampling_2", "fd_spread"]


@pytest.mark.commands
def test_table_and_report_show_the_spread_and_say_what_it_is(run, capsys) -> None:
    results = load_results(run / "results.json")
    console = Console(record=True, width=80)
    console.print(results_table(results))
    assert "spread" in console.export_text()
    assert "| FD spread |" in results_markdown(results)
    assert "noise of the evaluation" in results_caption(results) and "2 sampling seeds" in results_caption(results)
    assert main(["report", str(run), "--device", "cpu"]) == 0
    page = (run / "report.html").read_text()
    assert "FD spread" in page and "noise of the evaluation" in page
    alone = copy.deepcopy(results)
    for row in alone["rows"].values():
        row.pop("fd_spread", None)
    assert "spread" not in results_caption(alone) and "sampling seeds" not in results_caption(alone)


@pytest.mark.commands
def test_a_damaged_number_of_seeds_is_refused(run, tmp_path) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps({**load_json(run / "results.json"), "sampling_seeds": "two"}))
    with pytest.raises(RunError, match="sampling_seeds is not an integer"):
        load_results(file)
