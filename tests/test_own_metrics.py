"""The door `metric`: extractors and columns of the table from outside the package."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ral_gym import registry
from ral_gym.commands.cli import main, train_main
from ral_gym.errors import ConfigError
from ral_gym.metrics import Estimate, ImageDistance, extract, make_extractor
from ral_gym.metrics.own import OwnMetric, own_metrics
from ral_gym.registry import EXTRACTORS, METRICS
from tests.feature_sets import images

EXTENDING = Path(__file__).parents[1] / "examples" / "extending"
PARTS = ["own_metric:Edges", "own_metric:brightness", "own_metric:common_codes"]
OPTIONS = ["--evaluation.extractor", PARTS[0], "--evaluation.metrics", *PARTS[1:]]


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers and allows is forgotten after it."""
    monkeypatch.setattr(registry, "_allowed", set())
    for kind in (EXTRACTORS, METRICS):
        monkeypatch.setattr(kind, "_parts", dict(kind._parts))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, smoke_options: list[str]) -> Path:
    """A finished run with the parts of the example."""
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXTENDING))
        assert train_main([*smoke_options, *OPTIONS, "--name", "own", "--runs", str(runs)]) == 0
    sys.modules.pop("own_metric")
    return runs / "own"


def test_the_example_is_short() -> None:
    assert len((EXTENDING / "own_metric.py").read_text().splitlines()) <= 40


def test_rows_have_the_columns_with_their_intervals(run) -> None:
    results = json.loads((run / "results.json").read_text())
    assert results["extractor"] == "own_metric:Edges"
    assert list(results["metrics"]) == ["brightness", "common_codes"]
    assert results["metrics"]["brightness"] == "Mean grey value less that of the training images"
    for name, row in results["rows"].items():
        if name == "reconstruction":
            continue
        low, high = row["intervals"]["brightness"]
        assert low < row["brightness"] < high and 0 <= row["common_codes"] <= 1
        assert "common_codes" not in row["intervals"]
    low, high = results["rows"]["floor"]["intervals"]["brightness"]
    assert low < 0 < high  # two halves of the reference
    assert len({row.get("brightness") for row in results["rows"].values()}) > 4


@pytest.mark.commands
def test_table_report_and_verify_show_them_when_the_parts_are_named(run, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(str(EXTENDING))
    plugins = ["--plugin", *PARTS]
    assert main(["evaluate", str(run), "--quiet", *plugins]) == 0
    out = capsys.readouterr().out
    assert "brightness" in out and "own_metric:Edges features" in " ".join(out.split())
    assert max(map(len, out.split("mle_rejection")[0].splitlines())) <= 80
    assert main(["report", str(run), "--output", str(tmp_path / "r.html"), *plugins]) == 0
    page = (tmp_path / "r.html").read_text()
    assert ">brightness</th>" in page and "Share of the training images" in page
    capsys.readouterr()
    verify = ["verify", str(run), "--quiet", "--device", "cpu", "--rows", "mle", "floor", *plugins]
    assert main(verify) == 0 and "All agree." in capsys.readouterr().out
    changed = Path(shutil.copytree(run, tmp_path / "run"))
    results = json.loads((changed / "results.json").read_text())
    results["rows"]["mle"]["common_codes"] += 0.25
    (changed / "results.json").write_text(json.dumps(results))
    verify[1] = str(changed)
    assert main(verify) == 2 and "common_codes" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["verify", "evaluate"])
def test_a_run_folder_names_no_code(command, run, tmp_path, monkeypatch, capsys) -> None:
    """A hostile folder: the module it names is there, and is not imported."""
    (tmp_path / "hostile.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for section in (("extractor", "hostile:Mine"), ("metrics", ["hostile:mine"])):
        folder = Path(shutil.copytree(run, tmp_path / f"{command}-{section[0]}"))
        config = json.loads((folder / "config.json").read_text())
        config["evaluation"] |= {"extractor": "encoder", "metrics": []} | dict([section])
        (folder / "config.json").write_text(json.dumps(config))
        if command == "evaluate":
            (folder / "results.json").unlink()
            (folder / "checkpoints" / "evaluation.json").unlink()
        assert main([command, str(folder), "--quiet"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "hostile:" in line and "add --plugin hostile:" in line
    assert "hostile" not in sys.modules


# Extractors ---------------------------------------------------------------------------------------------------------


class Corner(nn.Module):
    """No attribute but its function, and a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, batch: Tensor) -> Tensor:
        assert not self.training
        return batch.double().flatten(1)[:, :3] * self.scale


def test_a_class_a_function_and_a_path_are_extractors() -> None:
    EXTRACTORS.register("corner")(Corner)
    EXTRACTORS.register("means")(lambda batch: batch.float().mean((2, 3)))
    batch = images(9)
    for name, expected in (("corner", 2.0 * batch.float().flatten(1)[:, :3]), ("means", batch.float().mean((2, 3)))):
        extractor = make_extractor(name)
        features = extract(extractor, batch, batch_size=4)
        assert extractor.name == name and extractor.num_features == 3 and features.dtype == torch.float32
        assert torch.equal(features, expected)
        assert ImageDistance(extractor, batch).measure(batch)["extractor"] == name
    registry.allow(f"{__name__}:Corner")
    path = EXTRACTORS.name_of(Corner)
    assert make_extractor(path).num_features == 0  # counted at the first batch


@pytest.mark.parametrize("name", ["pyramid", "lite0"])
def test_the_packages_own_come_by_the_same_door(name) -> None:
    if name == "lite0":
        pytest.importorskip("efficientnet_lite_pytorch")
    extractor = make_extractor(name)
    assert type(extractor) is EXTRACTORS[name]
    assert extract(extractor, images(2)).shape == (2, extractor.num_features)


class NeedsAnArgument(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (NeedsAnArgument, "cannot be made without arguments"),
        (lambda batch: batch.float().mean(1), r"gives \(6, 32, 32\) for 6 images: give \(6, F\)"),
        (lambda batch: 3, "gives int for 6 images"),
        (lambda batch: torch.zeros(len(batch), len(batch)), "gives 4 features, but 6 before"),
    ],
)
def test_an_extractor_that_cannot_work_is_named(part, words) -> None:
    EXTRACTORS.register("broken")(part)
    with pytest.raises(ConfigError, match=f"extractor broken {words}"):
        extract(make_extractor("broken"), images(10), batch_size=6)


# Columns ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [2.5, np.float32(2.5), torch.tensor(2.5), (2.5, 2.0, 3.0), [2.5, 2, 3]])
def test_a_number_may_have_an_interval(given) -> None:
    value, ends = OwnMetric("mine", "images", "", lambda a, b: given).measure(torch.zeros(1), torch.zeros(1), 0)
    assert value == 2.5 and ends == (None if not isinstance(given, tuple | list) else [2.0, 3.0])


def test_an_estimate_is_taken_with_its_interval() -> None:
    estimate = Estimate(1.0, 0.5, 1.5, 10, "by hand", 0.2)
    assert OwnMetric("m", "codes", "", lambda a, b: estimate).measure(torch.zeros(1), torch.zeros(1), 0) == (
        1.0,
        [0.5, 1.5],
    )


@pytest.mark.parametrize("given", [float("nan"), (1.0, 2.0), "many", None, (1.0, 2.0, 3.0), torch.zeros(2)])
def test_what_is_no_number_is_refused(given) -> None:
    with pytest.raises(ConfigError, match="metric mine gives"):
        OwnMetric("mine", "images", "", lambda a, b: given).measure(torch.zeros(1), torch.zeros(1), 0)


def test_random_numbers_are_seeded_and_leave_no_trace() -> None:
    metric = OwnMetric("mine", "images", "", lambda a, b: torch.rand(()))
    before = torch.get_rng_state()
    found = [metric.measure(torch.zeros(1), torch.zeros(1), seed)[0] for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2] and torch.equal(before, torch.get_rng_state())


def test_names_that_cannot_be_columns_are_refused() -> None:
    METRICS.register("fd")(lambda a, b: 1.0)
    METRICS.register("sharp")(lambda a, b: 1.0)
    METRICS.register("number")(7)
    blind = lambda a, b: 1.0  # noqa: E731
    blind.sees = "tea leaves"  # type: ignore[attr-defined]
    METRICS.register("blind")(blind)
    for names, words in (
        (["fd"], "the table has a column fd already"),
        (["sharp", "sharp"], "the table has a column sharp already"),
        (["number"], "is not a function"),
        (["blind"], "wants to see 'tea leaves': give one of images, codes, features"),
        (["nobody"], "metric 'nobody' is unknown"),
    ):
        with pytest.raises(ConfigError, match=re.escape(words)):
            own_metrics(names)
    assert [metric.key for metric in own_metrics(["sharp"])] == ["sharp"]
