"""A row of the results table: every figure with its interval, memorising seen, older rows measured again."""

import copy
import dataclasses
import shutil
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ral_gym.commands.cli import train_main
from ral_gym.data.images import ImageSet, to_float
from ral_gym.metrics import Neighbourhood, entropy, extract, nll
from ral_gym.metrics.neighbourhood import SCORES
from ral_gym.runs.run import Run, read_config
from ral_gym.runs.storage import load_json, save_json
from ral_gym.stages import evaluate as stage_4
from ral_gym.stages import given_rows
from ral_gym.stages.evaluate import measure
from ral_gym.stages.generator_metrics import PARTS, GeneratorMetrics
from ral_gym.stages.given_rows import measure_given_rows
from ral_gym.stages.levels import load_generator
from ral_gym.stages.pictures import sample_codes
from ral_gym.stages.rejection import diversity
from ral_gym.tokenizers.base import tokenizer_of
from ral_gym.tokenizers.code_set import CodeSet, decode_codes, encode_set
from tests.tiny import make_tiny_run

MEMORISATION = {"memorisation", "memorisation_near", "memorisation_new_people"}
LIKELIHOOD = {"nll_test", "nll_new_people", "entropy"}


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> GeneratorMetrics:
    """Of an untrained model, whose codes differ, with augmented passes."""
    path = make_tiny_run(tmp_path_factory.mktemp("runs") / "tiny")
    config = read_config(path)
    config = dataclasses.replace(config, prior=dataclasses.replace(config.prior, augmented_passes=3))
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, n_samples=60))
    (path / "config.json").write_text(config.to_json())
    squares = torch.rand(100, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels = (F.interpolate(squares, 32) * 255).byte()
    images = ImageSet(*(part.numpy() for part in pixels.split([60, 32, 8])), "random squares", ())
    run, vqvae = Run(path, config), tokenizer_of(config, 32, 1)
    with torch.no_grad():
        vqvae.train()(to_float(pixels[:60]))  # k-means
    vqvae.eval().requires_grad_(False)
    return GeneratorMetrics(run, vqvae, encode_set(vqvae, images, passes=3, seed=1), images, torch.device("cpu"))


def test_every_generator_has_every_figure_and_its_interval(smoke_run) -> None:
    rows = load_json(smoke_run / "results.json")["rows"]
    distances = {"fd", "kid", "fd_real", "kid_real", "diversity", *SCORES, *MEMORISATION}
    for name, row in rows.items():
        wanted = {"fd", "kid"} if name in ("reconstruction", "floor") else distances
        wanted = wanted if name in ("reconstruction", "floor", "mle_rejection") else wanted | LIKELIHOOD
        assert wanted <= row.keys() and row["intervals"].keys() <= row.keys(), name
        for key, (low, high) in row["intervals"].items():
            assert low <= row[key] <= high and low < high, (name, key)
        # A share that is the same in every half of 24 samples has no spread.
        assert wanted - row["intervals"].keys() <= {*SCORES, *MEMORISATION}, name


def test_the_figures_are_those_of_their_metrics(evaluation) -> None:
    prior = load_generator(evaluation.run, "prior")
    row = evaluation.row(prior, 0.9)
    codes = sample_codes(prior, evaluation.n_samples, evaluation.seed, 0.9)
    features = extract(evaluation.extractor, decode_codes(evaluation.vqvae, codes))
    measured = {**evaluation.distance.features.measure(features)}
    real = evaluation.real_distance.measure(features)
    measured |= {"fd_real": real["fd"], "kid_real": real["kid"]}
    measured |= Neighbourhood(evaluation.distance.features.reference, extractor="encoder").measure(features)
    measured |= {"entropy": entropy(prior, codes, 0.9), "nll_test": nll(prior, evaluation.codes.test, 0.9)}
    measured |= {"diversity": diversity(codes).distance}
    for key in ("n", "n_reference", "kid_subset_size", "fd_real", "kid_real", *SCORES, "entropy", "nll_test"):
        assert row[key] == pytest.approx(measured[key], rel=1e-9), key
    assert row["diversity"] == pytest.approx(measured["diversity"])
    assert (row["fd"], row["kid"]) == pytest.approx((measured["fd"], measured["kid"]), rel=1e-9)


def test_the_bar_moves_within_every_row(evaluation, monkeypatch) -> None:
    seen: list[tuple[int, int]] = []

    class Bar:
        n = 0

        def __init__(self, **given: Any) -> None:
            self.total = given["total"]

        def update(self, n: int) -> None:
            self.n += n
            seen.append((n, self.n))

        def set_postfix(self, **figures: Any) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr(stage_4, "progress_bar", Bar)
    rows: dict[str, Any] = {}
    prior = load_generator(evaluation.run, "prior")
    measure(evaluation, {"mle": prior, "mle_ema": prior}, rows, only={"mle", "mle_ema"})
    assert list(rows) == ["mle", "mle_ema"]
    assert seen == [(1, number) for number in range(1, 2 * PARTS + 1)]
    seen.clear()
    measure(evaluation, {"mle": prior, "mle_ema": prior}, rows, only={"mle", "mle_ema"})
    assert seen == [(PARTS, PARTS), (PARTS, 2 * PARTS)]  # measured before


def test_training_images_count_as_memorised_and_held_out_ones_do_not(evaluation) -> None:
    known = evaluation.codes.train[evaluation._order[: evaluation.n_samples]]
    copies = evaluation.distances(torch.from_numpy(known).long())
    # Some held-out images have the codes of a training image too: these are small grids.
    assert min(copies["memorisation"], copies["memorisation_new_people"]) > 0.85
    assert copies["memorisation_near"] == 1
    new = evaluation.distances(torch.from_numpy(evaluation.codes.test).long())
    low, high = new["intervals"]["memorisation"]
    assert low < 0.5 < high and high - low < 0.4 and new["memorisation_near"] < 0.3


def test_held_out_images_are_augmented_as_training_images_are(evaluation) -> None:
    versions = evaluation.memory["test"].held_out
    assert versions.shape == (len(evaluation.codes.test), 3)
    assert (versions[:, 0] != versions[:, 1]).float().mean() > 0.5


def test_codes_that_are_not_the_images_stand_for_themselves(evaluation) -> None:
    rng, shape = np.random.default_rng(0), evaluation.codes.train.shape
    codes = CodeSet(*(rng.integers(16, size=(n, shape[1])).astype(np.int16) for n in (60, 32)), None, clean=60)
    drawn = GeneratorMetrics(evaluation.run, evaluation.vqvae, codes, evaluation.images, evaluation.device)
    assert drawn.memory.keys() == {"test"} and drawn.memory["test"].held_out.shape == (32, 1)
    row = drawn.row(load_generator(drawn.run, "prior"))
    assert row["memorisation_new_people"] is None and row["nll_new_people"] is None and 0 < row["memorisation"] < 1


def test_rows_of_an_older_version_are_measured_again(smoke_run, smoke_options, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("ral_gym.stages.evaluate.draw_pictures", lambda *args: None)
    run = shutil.copytree(smoke_run, tmp_path / "smoke")
    (run / "results.json").unlink()
    file = run / "checkpoints/evaluation.json"
    begun = load_json(file)
    rows = begun["rows"]
    older = {name: {"fd": -1.0, "temperature": row.get("temperature")} for name, row in list(rows.items())[:3]}
    save_json(file, {**begun, "rows": {**rows, **older}})
    assert train_main([*smoke_options, "--runs", str(tmp_path)]) == 0
    assert load_json(run / "results.json")["rows"] == load_json(smoke_run / "results.json")["rows"]


def test_the_prefix_curve_goes_from_the_generator_to_real_images(evaluation) -> None:
    prior = load_generator(evaluation.run, "prior")
    other = copy.deepcopy(prior)
    for weights in other.parameters():
        weights.data *= 1.5
    measured = measure_given_rows(evaluation, {"mle": prior, "other": other})
    codes = evaluation.other_codes(500)
    assert measured["given"] == [0, 1, 2, 3, 4] and measured["height"] == 4 and measured["n"] == len(codes) >= 12
    real = evaluation.distance.measure(decode_codes(evaluation.vqvae, codes))
    mle, others = measured["curves"]["mle"], measured["curves"]["other"]
    assert mle[-1]["kid"] == others[-1]["kid"] == pytest.approx(real["kid"], rel=1e-9)  # nothing is drawn
    assert all(a["fd"] != b["fd"] for a, b in zip(mle[:-1], others[:-1], strict=True))
    assert all(point["intervals"]["kid"][0] <= point["kid"] <= point["intervals"]["kid"][1] for point in mle + others)


def test_given_rows_stay_and_the_others_are_drawn(evaluation) -> None:
    prior = load_generator(evaluation.run, "prior")
    codes = evaluation.other_codes(500)
    uniforms = torch.rand(codes.shape, generator=torch.Generator().manual_seed(1))
    for rows in range(5):
        done = given_rows._finished(prior, codes, rows, uniforms)
        kept = torch.from_numpy(~prior.grid.mask(rows, 4))
        assert torch.equal(done[:, kept], codes[:, kept])
        assert rows == 4 or not torch.equal(done[:, ~kept], codes[:, ~kept])


def test_a_finished_run_has_its_prefix_curve(smoke_run) -> None:
    measured = load_json(smoke_run / "results.json")["given_rows"]
    assert list(measured["curves"]) == ["mle", "ral"] and measured["given"] == [0, 1, 2, 3, 4]
    assert (smoke_run / "samples" / "exposure_given_rows.png").stat().st_size > 5_000
