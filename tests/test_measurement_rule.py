"""What a table is measured on: seeded random subsets of fixed size, whatever the size and the order of the set."""

import dataclasses
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ral_gym.commands.cli import main, train_main
from ral_gym.data.images import ImageSet
from ral_gym.data.subsets import subset
from ral_gym.metrics import nll
from ral_gym.report.report import Report
from ral_gym.runs.run import Run, read_config
from ral_gym.runs.storage import load_json, load_tensors, save_json
from ral_gym.stages import boards, evaluate, generator_metrics, given_rows, pictures
from ral_gym.stages.common import WeightAverage
from ral_gym.stages.generator_metrics import MEASUREMENT, GeneratorMetrics
from ral_gym.stages.given_rows import measure_given_rows
from ral_gym.stages.levels import LevelCodes, load_generator, load_vqvae
from ral_gym.stages.prior_measurements import HeldOut
from ral_gym.tokenizers.code_set import CodeSet, encode_set
from tests.tiny import GRID, make_tiny_run

FIXTURES = Path(__file__).parent / "fixtures" / "before_registry"
CPU = torch.device("cpu")


def image_set(n_train: int, n_test: int) -> ImageSet:
    """Noise sorted by class: the first half of each part is dark, the second bright."""
    rng = np.random.default_rng(0)

    def part(n: int) -> np.ndarray:
        low = np.where(np.arange(n) < n // 2, 0, 180)[:, None, None, None]
        return (low + rng.integers(0, 60, (n, 1, 32, 32))).astype(np.uint8)

    return ImageSet(part(n_train), part(n_test), part(n_test), "sorted squares", ())


def make_run(path: Path, **evaluation: Any) -> Run:
    config = read_config(make_tiny_run(path))
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, **evaluation))
    (path / "config.json").write_text(config.to_json())
    return Run(path, config)


def bright(images: Any) -> float:
    """Share of bright images."""
    return float((torch.as_tensor(np.asarray(images)).float().flatten(1).mean(1) > 120).float().mean())


# The subset ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "limit"), [(5, 5), (5, None), (5, 9), (0, 3)])
def test_a_set_within_the_limit_is_taken_whole_and_in_order(total, limit) -> None:
    assert subset(total, limit, 0).tolist() == list(range(total))


def test_a_subset_is_seeded_random_sorted_and_without_repetition() -> None:
    rows = subset(100_000, 1000, 3)
    assert len(set(rows.tolist())) == 1000 and (np.diff(rows) > 0).all()
    assert abs(rows.mean() - 50_000) < 4 * 100_000 / (12 * 1000) ** 0.5
    assert (rows == subset(100_000, 1000, 3)).all() and (rows != subset(100_000, 1000, 4)).any()


# Sorted sets --------------------------------------------------------------------------------------------------------


def test_real_images_are_of_every_class(tmp_path, monkeypatch) -> None:
    run, images = make_run(tmp_path / "run", n_samples=40), image_set(240, 60)
    vqvae, seen = load_vqvae(run), []
    extract = generator_metrics.extract
    monkeypatch.setattr(generator_metrics, "extract", lambda e, i, *a: seen.append(i) or extract(e, i, *a))
    decoded = []
    decode = generator_metrics.decode_codes
    monkeypatch.setattr(generator_metrics, "decode_codes", lambda v, c: decoded.append(c) or decode(v, c))
    codes = encode_set(vqvae, images, passes=1, seed=0, progress=False)
    metrics = GeneratorMetrics(run, vqvae, codes, images, CPU)
    real = seen[-1]
    assert len(real) == 40 and 0.25 < bright(real) < 0.75
    metrics.real_rows()
    # The row `reconstruction` compares the same images, rebuilt from their codes.
    picked = subset(240, 40, metrics.seed)
    assert (real == images.train[picked]).all() and (decoded[-1] == codes.train[picked]).all()
    assert (metrics.other_codes(500).numpy()[:, None] == codes.train).all(2).any(0)[120:].mean() > 0.2


def test_prefixes_pictures_and_boards_are_of_every_class(tmp_path, monkeypatch) -> None:
    run, images = make_run(tmp_path / "run", n_samples=60), image_set(60, 60)
    vqvae, shown = load_vqvae(run), {}
    codes = encode_set(vqvae, images, passes=1, seed=0, progress=False)
    codes.test[30:], codes.test[:30] = 1, 0  # known by their codes
    prefixes = GeneratorMetrics(run, vqvae, codes, images, CPU).other_codes(20)
    assert len(prefixes) == 20 and 0.2 < float(prefixes.float().mean()) < 0.8

    monkeypatch.setattr(pictures, "SEARCHED", 20)
    nearest = pictures.nearest
    monkeypatch.setattr(pictures, "nearest", lambda s, t: shown.update(nearest=t) or nearest(s, t))
    pictures._draw_neighbours(run, torch.from_numpy(images.test[:4]), images)
    assert len(shown["nearest"]) == 20 and 0.2 < bright(shown["nearest"]) < 0.8

    monkeypatch.setattr(boards, "add_grid", lambda writer, tag, found, step, columns: shown.update(board=found))
    boards.add_reconstructions(None, "tag", vqvae, images.test, 1)
    assert 0 < bright(shown["board"][: boards.N_IMAGES]) < 1


# Cost ---------------------------------------------------------------------------------------------------------------


class Counted:
    """Counts the images that go through a run's models."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: Counter[str] = Counter()
        self.monkeypatch = monkeypatch

    def watch(self, owner: Any, name: str) -> None:
        """Count the rows of a method's first tensor or array."""
        method = getattr(owner, name)

        def counted(*args: Any, **options: Any) -> Any:
            rows = next(len(value) for value in args if isinstance(value, torch.Tensor | np.ndarray))
            self.counts[name] += rows
            return method(*args, **options)

        self.monkeypatch.setattr(owner, name, counted)

    def watch_forward(self, module: nn.Module) -> nn.Module:
        """Count the rows that a network is given."""
        module.register_forward_pre_hook(lambda _, inputs: self.counts.update(forward=len(inputs[0])))
        return module


def test_a_table_row_costs_the_same_for_ten_times_the_data(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(generator_metrics, "HELD_OUT", 12)
    monkeypatch.setattr(given_rows, "N_IMAGES", 14)
    monkeypatch.setattr(pictures, "SEARCHED", 20)
    run = make_run(tmp_path / "run", n_samples=16, held_out=20)
    counts = []
    for times in (1, 10):
        images = image_set(60 * times, 30 * times)
        vqvae = load_vqvae(run)
        codes = encode_set(vqvae, images, passes=1, seed=0, progress=False)
        counted = Counted(monkeypatch)
        for name in ("encode", "decode", "encode_features"):
            counted.watch(vqvae, name)
        prior = counted.watch_forward(load_generator(run, "prior"))
        metrics = GeneratorMetrics(run, vqvae, codes, images, CPU)
        row = metrics.row(prior)
        metrics.real_rows()
        measure_given_rows(metrics, {"mle": prior})
        assert {name: len(rows) for name, rows in metrics.held_out.items()} == {"test": 20, "new_people": 20}
        assert row["nll_test"] == pytest.approx(nll(prior, metrics.held_out["test"]))
        assert metrics.nll(prior, metrics.held_out["test"], 1.0).n == 20
        counts.append(counted.counts)
    assert counts[0] == counts[1]
    assert min(counts[0].values()) > 0 and {"decode", "encode_features", "forward"} <= counts[0].keys()


def test_stage_2_measures_as_many_images_of_ten_times_the_data(monkeypatch, tmp_path) -> None:
    prior = load_generator(make_run(tmp_path / "run"), "prior")
    counts = []
    for n in (60, 600):
        codes = np.random.default_rng(0).integers(16, size=(n, GRID.n_codes)).astype(np.int16)
        counted = Counted(monkeypatch)
        held_out = HeldOut(LevelCodes.of(codes, GRID, 0), None, 1, limit=50, seed=3)
        found = held_out.measure(counted.watch_forward(prior), WeightAverage(prior, 0.9), 1)
        counts.append(counted.counts["forward"])
        prior._forward_pre_hooks.clear()
        assert found["nll_test"] == pytest.approx(nll(prior.eval(), codes[subset(n, 50, 3)]), rel=1e-6)
    assert counts[0] == counts[1] == 2 * 50  # live and averaged weights


def test_a_report_costs_the_same_for_ten_times_the_data(tmp_path, monkeypatch) -> None:
    run, counts = make_run(tmp_path / "run"), []
    for times in (1, 10):
        material = Report(run, CPU, progress=False)
        material.images = image_set(60 * times, 30 * times)
        counted = Counted(monkeypatch)
        for name in ("encode", "decode"):
            counted.watch(material.vqvae, name)
        material.html()
        counts.append(counted.counts)
    assert counts[0] == counts[1] and counts[0]["decode"] > 0 and counts[0]["encode"] > 0


# What began by the older rule ---------------------------------------------------------------------------------------


def test_results_and_evaluations_say_the_rule_and_the_held_out_images(smoke_run) -> None:
    results = load_json(smoke_run / "results.json")
    assert results["measurement"] == MEASUREMENT == load_json(smoke_run / "checkpoints/evaluation.json")["measurement"]
    assert set(results["held_out"]) == {"test", "new_people"} and results["held_out"]["test"] > 1


def test_an_older_table_is_verified_by_the_older_rule(tmp_path, capsys) -> None:
    path = Path(shutil.copytree(FIXTURES / "one_level", tmp_path / "run"))
    verify = [
        "verify",
        str(path),
        "--quiet",
        "--device",
        "cpu",
        "--tolerance",
        "0.1",
        "--rows",
        "mle",
        "reconstruction",
    ]
    assert main(verify) == 0
    out = capsys.readouterr().out
    assert "measured by an older rule (1), which is used again" in out and "All agree." in out
    results = load_json(path / "results.json")
    save_json(path / "results.json", {**results, "measurement": MEASUREMENT})
    assert main(verify) == 2  # by the new rule other real images are compared
    assert "fd_real" in capsys.readouterr().out
    save_json(path / "results.json", {**results, "measurement": MEASUREMENT + 1})
    assert main(verify) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"rule {MEASUREMENT + 1}, which this version of ral_gym does not know" in line


def test_an_evaluation_that_began_by_the_older_rule_ends_by_it(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(evaluate, "draw_pictures", lambda *args: None)
    path = Path(shutil.copytree(FIXTURES / "one_level", tmp_path / "run"))
    saved = load_json(path / "results.json")
    (path / "results.json").unlink()
    begun = path / "checkpoints/evaluation.json"
    save_json(begun, {name: row for name, row in load_json(begun).items() if name in ("mle_rejection", "mle")})
    assert main(["evaluate", str(path), "--quiet", "--device", "cpu"]) == 0
    results = load_json(path / "results.json")
    assert "measurement" not in results and load_json(begun)["measurement"] == 1
    assert results["rows"]["ral"]["fd_real"] == pytest.approx(saved["rows"]["ral"]["fd_real"], rel=1e-3)
    assert results["rows"]["ral"]["nll_test"] == pytest.approx(saved["rows"]["ral"]["nll_test"], rel=1e-4)


@pytest.mark.parametrize("older", [False, True])
def test_stage_2_ends_by_the_rule_it_began_with(older, tmp_path) -> None:
    codes = np.random.default_rng(0).integers(16, size=(30, GRID.n_codes)).astype(np.int16)
    data = LevelCodes.of(codes, GRID, 0)
    state = HeldOut(data, None, 1, limit=20).state_dict()
    if older:  # checkpoints of version 0.1 name no limit
        del state["held_out"]
    resumed = HeldOut(data, data, 1, limit=10)
    resumed.load_state_dict(state)
    assert len(resumed.test.codes) == len(resumed.new_people.codes) == (30 if older else 20)


def test_stage_2_takes_the_number_of_its_option(tmp_path, smoke_options) -> None:
    options = ["--prior.held-out", "3", "--stages", "vqvae", "prior"]
    assert train_main([*smoke_options, *options, "--runs", str(tmp_path)]) == 0
    run = Run(tmp_path / "smoke", read_config(tmp_path / "smoke"))
    codes = CodeSet.load(run.file("codes.safetensors"))
    picked = codes.test[subset(len(codes.test), 3, run.config.seed * 1000 + 2)]
    saved = load_tensors(run.file("prior.safetensors"))[1]["nll_test"]
    assert len(codes.test) > 3 and saved == pytest.approx(nll(load_generator(run, "prior"), picked), rel=1e-5)
