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
from PIL import Image
from rich.console import Console

from ral_gym.envs.oracle import load_oracle
from ral_gym.errors import ConfigError
from ral_gym.metrics import Estimate
from ral_gym.pixelcnn import PixelCNN
from ral_gym.storage import save_module

ROOT = Path(__file__).parents[1]
LESSON = (ROOT / "docs" / "exposure_bias.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", LESSON, re.M | re.S)
T = 64


@pytest.fixture(scope="module")
def lesson(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict[str, Any]]:
    """What the example printed, its folder and its numbers."""
    where = tmp_path_factory.mktemp("lesson")
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / "exposure_bias.py"), "--quick"]
    result = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-3000:]
    folder = where / "runs" / "exposure_bias"
    return " ".join(result.stdout.split()), folder, json.loads((folder / "exposure.json").read_text(encoding="utf-8"))


def test_writes_every_file(lesson: tuple[str, Path, dict[str, Any]]) -> None:
    _, folder, _ = lesson
    assert sorted(path.name for path in folder.iterdir()) == [
        "exposure.gif",
        "exposure.json",
        "exposure_corruption.png",
        "exposure_kl.png",
        "exposure_prefix.png",
        "exposure_ratio.png",
    ]
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 400


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


def test_the_verdict_is_that_of_the_numbers(lesson: tuple[str, Path, dict[str, Any]]) -> None:
    text, _, numbers = lesson
    assert set(numbers["models"]) == {"light", "small", "memoriser"}
    for name, model in numbers["models"].items():
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
        assert model["verdict"].startswith(f"{name}: {expected}")
        assert f"=> {model['verdict']}" in text


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
def test_every_verdict_can_be_reached(example: Any, value: float, error: float, expected: str) -> None:
    assert example.verdict(Estimate.around(value, error, 1000, "", degrees=999)).startswith(expected)


def test_rarity_is_the_probability_of_the_codes_no_likelier(example: Any) -> None:
    log_o = torch.tensor([0.5, 0.3, 0.125, 0.075]).log()  # (K,)
    rarity = example.rarity(log_o.expand(4, 4), torch.arange(4))
    torch.testing.assert_close(rarity, torch.tensor([1.0, 0.5, 0.2, 0.075]))


def test_a_policy_that_does_not_fit_is_refused(example: Any, tmp_path: Path) -> None:
    file = tmp_path / "policy.safetensors"
    save_module(file, PixelCNN(5, 2, 2, hidden_units=4, residual_units=4, layers=1))
    arguments = example.Arguments(weak=False, policy=(str(file),))
    with pytest.raises(ConfigError, match="same grid"):
        example.load_models(arguments, load_oracle(), Console(quiet=True))


def test_the_lesson_has_blocks() -> None:
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_of_the_lesson_runs(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(BLOCKS[number], f"block {number}", "exec"), {"__name__": "block"})  # in a namespace of its own
    assert capsys.readouterr().out.strip()  # each prints what the text speaks of
