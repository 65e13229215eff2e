"""The lesson on exposure bias: the example says what its numbers say, and the document's code runs."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evidence.exposure_lesson import COMPARED, compare, markdown, rarity, verdict
from PIL import Image
from rich.console import Console

from ral_gym.envs.oracle import load_oracle
from ral_gym.errors import ConfigError, RunError
from ral_gym.metrics import Estimate
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.runs.storage import save_module

ROOT = Path(__file__).parents[1]
LESSON = (ROOT / "docs" / "exposure_bias.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", LESSON, re.M | re.S)
T = 64
QUICK = ["--quick", "--seeds", "0", "--no-weak"]


MODELS = ("light", "mle", "scheduled_sampling", "ral", "true_reward")


@pytest.fixture(scope="module")
def lesson(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict[str, Any]]:
    """What the example printed, its folder and its numbers."""
    where = tmp_path_factory.mktemp("lesson")
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / "exposure_bias.py"), *QUICK]
    result = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-3000:]
    folder = where / "runs" / "exposure_bias_quick"
    return " ".join(result.stdout.split()), folder, json.loads((folder / "exposure.json").read_text(encoding="utf-8"))


@pytest.mark.commands
def test_writes_every_file(lesson: tuple[str, Path, dict[str, Any]]) -> None:
    _, folder, _ = lesson
    assert sorted(path.name for path in folder.iterdir()) == [
        "exposure.gif",
        "exposure.json",
        "exposure_comparison.png",
        "exposure_corruption.png",
        "exposure_kl.png",
        "exposure_prefix.png",
        "exposure_ratio.png",
        "seed0",
        "table.md",
    ]
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 400


@pytest.mark.commands
def test_the_table_holds_the_numbers(lesson: tuple[str, Path, dict[str, Any]]) -> None:
    _, folder, numbers = lesson
    table = (folder / "table.md").read_text(encoding="utf-8")
    rows = {row[1].strip(): row for row in (line.split("|") for line in table.splitlines() if line.startswith("| "))}
    assert tuple(numbers["comparison"]) == MODELS and set(rows) == {"model", *MODELS}
    for name in MODELS:
        gap = numbers["comparison"][name]["gap"]
        assert gap["value"] == numbers["seeds"]["0"][name]["exposure"]["gap"]["value"] and gap["low"] < gap["high"]
        assert f"{gap['value']:+.3f} ± {(gap['high'] - gap['low']) / 2:.3f}" in table
    assert "Reward of `ral`: a co-trained critic's scores; of `true_reward`: log o - log p" in table


@pytest.mark.commands
def test_the_same_command_again_trains_and_measures_nothing(
    lesson: tuple[str, Path, dict[str, Any]], example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder, numbers = lesson
    for name in ("make_model", "measure", "tell_story", "save_animation", "save_plots", "save_comparison"):
        forbidden = name in ("make_model", "measure")
        monkeypatch.setattr(example, name, (lambda *_: pytest.fail("done before")) if forbidden else (lambda *_: {}))
    example.main([*QUICK, "--runs", str(folder.parent)], Console(quiet=True))
    assert json.loads((folder / "exposure.json").read_text())["seeds"] == numbers["seeds"]
    with pytest.raises(RunError, match=r"seed0 was made with other settings \(share: 0.5 there, 0.25 here\)"):
        example.main([*QUICK, "--share", "0.25", "--runs", str(folder.parent)], Console(quiet=True))


def test_several_seeds_have_a_mean_and_an_interval_over_them() -> None:
    def one(value: float) -> dict[str, Any]:
        return {"compared": {column: {"value": value, "low": 0.0, "high": 9.0} for column in COMPARED}}

    results = {0: {"mle": one(1.0), "small": one(7.0)}, 1: {"mle": one(3.0)}}
    comparison = compare(results)
    gap = comparison["mle"]["gap"]
    assert gap["value"] == 2 and gap["seeds"] == [1, 3]
    assert (gap["high"] - gap["low"]) / 2 == pytest.approx(12.706, rel=1e-3)  # Student's t with one degree, error 1
    assert comparison["small"]["gap"]["low"] == 0 and comparison["small"]["gap"]["high"] == 9
    text = markdown(comparison, [0, 1], "caption")
    assert "| mle | +1.000, +3.000 | +1.0, +3.0 |" in text and text.count("| small |") == 1


@pytest.mark.commands
def test_the_animation_has_a_frame_per_code(lesson: tuple[str, Path, dict[str, Any]]) -> None:
    _, folder, numbers = lesson
    with Image.open(folder / "exposure.gif") as animation:
        assert animation.n_frames == T + 1  # the first one is empty
        width, height = animation.size
        assert width > 1.5 * height  # side by side
        wrong = [episode["first_wrong"] for episode in numbers["episodes"].values()]
        first = min((t for t in wrong if t is not None), default=T)
        for frame in {first, min(first + 1, T), T}:
            animation.seek(frame)
            pixels = np.asarray(animation.convert("RGB"))  # (H, W, 3)
            # Marked as soon as it is drawn: frame t shows the codes before t.
            assert bool((pixels == (220, 0, 0)).all(-1).any()) == (frame > first)


@pytest.mark.commands
def test_the_first_wrong_code_is_the_first_one_below_the_threshold(lesson: tuple[str, Path, dict[str, Any]]) -> None:
    text, _, numbers = lesson
    for name, episode in numbers["episodes"].items():
        assert len(episode["codes"]) == len(episode["rewards"]) == T
        # A code's own probability is part of its rarity.
        assert all(math.exp(reward) <= rare + 1e-6 for reward, rare in zip(*both(episode), strict=True))
        wrong = [t for t, rare in enumerate(episode["rarity"]) if rare < numbers["settings"]["wrong"]]
        assert episode["first_wrong"] == (wrong[0] if wrong else None)
        said = f"{name}: the first wrong code is number {wrong[0] + 1} " if wrong else f"{name}: no wrong code"
        assert said in text


def both(episode: dict[str, Any]) -> tuple[list[float], list[float]]:
    return episode["rewards"], episode["rarity"]


@pytest.mark.commands
def test_the_verdict_is_that_of_the_numbers(lesson: tuple[str, Path, dict[str, Any]]) -> None:
    text, _, numbers = lesson
    for name, model in numbers["seeds"]["0"].items():
        excess = model["excess"]
        value, low, high = excess["value"], excess["low"], excess["high"]
        assert value == pytest.approx(model["exposure"]["excess"]["mean"][-1])
        along = [sum(model["exposure"][where]["kl"]["mean"]) for where in ("on_model", "on_oracle")]
        assert value == pytest.approx(100 * (along[0] / along[1] - 1))
        if low > 0:
            expected = "small exposure bias" if value < 5 else "large exposure bias"
        elif high < 0:
            expected = "reversed"
        else:
            expected = "no measurable" if low > -5 and high < 5 else "undecided"
        assert model["verdict"].startswith(expected)
        assert f"=> {name}: {model['verdict']}" in text


@pytest.fixture(scope="module")
def example() -> Any:
    spec = spec_from_file_location("exposure_lesson", ROOT / "examples" / "exposure_bias.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [(1, 0.1, "small"), (20, 2, "large"), (-9, 2, "reversed"), (0.5, 1, "no measurable"), (2, 4, "undecided")],
)
def test_every_verdict_can_be_reached(value: float, error: float, expected: str) -> None:
    assert verdict(Estimate.around(value, error, 1000, "", degrees=999)).startswith(expected)


def test_rarity_is_the_probability_of_the_codes_no_likelier() -> None:
    log_o = torch.tensor([0.5, 0.3, 0.125, 0.075]).log()  # (K,)
    found = rarity(log_o.expand(4, 4), torch.arange(4))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.5, 0.2, 0.075]))


def test_a_policy_that_does_not_fit_is_refused(example: Any, tmp_path: Path) -> None:
    file = tmp_path / "policy.safetensors"
    save_module(file, PixelCNN(5, 2, 2, hidden_units=4, residual_units=4, layers=1))
    with pytest.raises(ConfigError, match="same grid"):
        example.policies(example.Arguments(policy=(str(file),)), load_oracle())
    save_module(file, PixelCNN(128, 8, 8, hidden_units=4, residual_units=4, layers=1))
    assert list(example.policies(example.Arguments(policy=(str(file), str(file))), load_oracle())) == [
        "policy",
        "policy_1",
    ]


def test_the_lesson_has_blocks() -> None:
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_of_the_lesson_runs(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(BLOCKS[number], f"block {number}", "exec"), {"__name__": "block"})  # in a namespace of its own
    assert capsys.readouterr().out.strip()  # each prints what the text speaks of
