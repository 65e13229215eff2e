"""Whole runs on images with classes: a folder of one folder per class, to a prior and an agent that know the label."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ral_gym.commands.cli import main
from ral_gym.runs.storage import load_metadata
from ral_gym.stages.levels import LevelCodes, label_nlls, load_generator
from ral_gym.tokenizers.code_set import CodeSet

CLASSES = {"blue": (20, 40, 220), "green": (30, 210, 40), "red": (230, 30, 20)}
SMALL = ["--preset", "smoke", "--data.workers", "0", "--quiet", "--name", "run", "--data.limit", "240"]
SMALL += ["--vqvae.training-steps", "60", "--prior.training-steps", "60", "--stages", "vqvae", "prior", "ral"]
BOTTOM = ["--bottom.hidden-units", "8", "--bottom.residual-units", "8", "--bottom.layers", "1"]
BOTTOM += ["--bottom.output-stack-layers", "1", "--bottom.conditioning-stack-layers", "1", "--bottom.batch-size", "16"]
BOTTOM += [
    "--bottom.training-steps",
    "20",
    "--bottom.evaluate-every",
    "10",
    "--vqvae.levels",
    "2",
    "--vqvae.layers",
    "2",
]
KINDS = {
    "pixelcnn": [],
    "transformer": ["--prior.kind", "transformer", "--prior.attention-heads", "2"],
    "two levels": BOTTOM,
}


def coloured(root: Path, count: int) -> Path:
    """Images of one colour per class, with noise."""
    rng = np.random.default_rng(0)
    for name, colour in CLASSES.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.clip(np.array(colour) + rng.normal(0, 12, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:03d}.png")
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("colours")
    return coloured(root / "train", 90), coloured(root / "test", 20)


@pytest.mark.commands
@pytest.mark.parametrize("kind", KINDS)
def test_labels_go_from_folders_to_the_agent(
    kind: str, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = folders
    data = ["--data", f"folder:{train}", "--data.test", f"folder:{test}", "--data.image-size", "32"]
    more = ["--prior.class-dropout", "0.25", "--ral.reset-mode", "mixed"]
    assert main(["train", *SMALL, *data, *more, *KINDS[kind], "--runs", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "3 classes: blue (80), green (80), red (80)" in said and "with right labels" in said
    run = tmp_path / "run"
    prior: Any = load_generator(_Run(run, 2 if kind == "two levels" else 1), "prior")
    assert prior.grid.classes == 3 and prior.classes == 3
    assert load_metadata(run / "prior.safetensors")["config"]["class_dropout"] == 0.25
    facts = load_metadata(run / "prior.safetensors")
    assert facts["class_names"] == sorted(CLASSES)
    if kind != "two levels":  # colours are all there is to learn
        assert facts["nll_test"] < min(facts["nll_no_label"], facts["nll_wrong_label"])
    updates = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any(line["stage"] == "ral" for line in updates)
    assert main(["train", *SMALL, *data, *more, *KINDS[kind], "--runs", str(tmp_path)]) == 0


class _Run:
    """What `load_generator` reads of a run."""

    def __init__(self, path: Path, levels: int) -> None:
        from ral_gym.runs.run import read_config

        self.path, self.config = path, read_config(path)

    def file(self, name: str) -> Path:
        return self.path / name


@pytest.mark.commands
def test_a_whole_run_measures_what_classes_add(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = folders
    data = ["--data", f"folder:{train}", "--data.test", f"folder:{test}", "--data.image-size", "32"]
    argv = [*SMALL[: SMALL.index("--stages")], *data, *KINDS["transformer"], "--runs", str(tmp_path)]
    argv += ["--evaluation.n-samples", "48", "--evaluation.temperatures", "0.9", "--evaluation.guidance", "2"]
    argv += ["--evaluation.sampling-seeds", "2"]
    assert main(["train", *argv]) == 0
    said = capsys.readouterr().out
    assert "guidance" in said.lower() and "classes.png" in said
    run = tmp_path / "run"
    results = json.loads((run / "results.json").read_text())
    rows = results["rows"]
    assert rows["reconstruction"]["accuracy"] > 0.95  # colours are easy
    assert rows["mle"]["nll_test"] < min(rows["mle"]["nll_no_label"], rows["mle"]["nll_wrong_label"])
    assert [row["guidance"] for row in results["guided"]["mle"]] == [1, 2]
    assert all(row["fd_spread"] > 0 for row in results["guided"]["mle"])  # guided samples from a second seed too
    best = min(results["guided"]["ral"], key=lambda row: row["fd"])
    assert rows["ral_best_guidance"] == best and "nll_test" not in results["guided"]["ral"][1]
    for command in (
        ["verify", str(run), "--quiet"],
        ["report", str(run)],
        ["verify", str(run), "--rows", "mle_guided_2"],
    ):
        assert main(command) == 0, command
    assert "By class." in (run / "report.html").read_text()
    assert main(["sample", str(run), "--n", "4", "--label", "red", "1", "--codes", str(tmp_path / "drawn.npz")]) == 0
    drawn = np.load(tmp_path / "drawn.npz")
    assert drawn["labels"].tolist() == [2, 1, 2, 1] and drawn["class_names"].tolist() == sorted(CLASSES)
    assert main(["complete", str(run), str(next(test.glob("red/*.png"))), "--label", "red", "--seeds", "2"]) == 0
    for label, message in (("rad", "did you mean red"), ("re", "fits 2 classes"), ("7", "is no class")):
        assert main(["sample", str(run), "--label", label]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.commands
def test_class_settings_without_classes_are_refused(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", f"folder:{folders[0]}", "--data.labels", "none", "--data.image-size", "32"]
    assert main(["train", *SMALL, *data, "--prior.class-dropout", "0.2", "--runs", str(tmp_path)]) == 2
    assert "prior.class_dropout is 0.2, but there are no classes: leave it out" in capsys.readouterr().err
    assert CodeSet.load(tmp_path / "run/codes.safetensors").labels is None


def test_wrong_labels_are_never_the_right_ones() -> None:
    seen: list[torch.Tensor] = []

    class Prior(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, codes: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
            seen.append(condition[:, -1])
            return torch.zeros(*codes.shape, 4) + self.weight

    labels = torch.randint(3, (500, 1))
    data = LevelCodes(torch.randint(4, (500, 6)), labels)
    found = label_nlls(Prior(), data, 3, seed=1)
    assert set(found) == {"nll_wrong_label", "nll_no_label"}
    wrong, none = torch.cat(seen[:2]), torch.cat(seen[2:])
    assert (wrong != labels[:, 0]).all() and wrong.min() >= 0 and wrong.max() <= 2 and len(wrong.unique()) == 3
    assert (none == 3).all()


@pytest.mark.commands
def test_a_prior_that_takes_no_classes_is_trained_without_labels_and_that_is_said(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, _ = folders
    argv = [*SMALL[: SMALL.index("--stages")], "--data", f"folder:{train}", "--data.image-size", "32"]
    argv += ["--stages", "vqvae", "prior", "--prior.kind", "tests.own_priors:GPT", "--runs", str(tmp_path)]
    assert main(["train", *argv]) == 0
    assert "Labels are not used: prior.kind tests.own_priors:GPT" in capsys.readouterr().out
