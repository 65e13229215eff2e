"""A stranger's tokenizer goes through every stage and command, by its name alone."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ral_gym.commands.cli import main
from ral_gym.errors import ConfigError
from ral_gym.presets import SMOKE
from ral_gym.registry import TOKENIZERS
from ral_gym.runs.storage import load_tensors, save_tensors
from ral_gym.tokenizers.base import load_tokenizer, save_tokenizer, tokenizer_of
from ral_gym.tokenizers.vqvae import VQVAE
from ral_gym.tokenizers.vqvae2 import VQVAE2

EXTENDING = Path(__file__).parents[1] / "examples" / "extending"
NAME = "own_tokenizer:Patches"
TINY = [
    *("--preset", "smoke", "--quiet", "--prior.training-steps", "2", "--critic.warmup-steps", "1", "--ral.n-envs", "4"),
    *("--ral.n-updates", "1", "--evaluation.n-samples", "12", "--evaluation.extractor", "pyramid"),
]

LEARNING = '''
import torch
from PIL import Image
from torch import nn
from ral_gym.grid import CodeGrid

class Learning(nn.Module):
    """Rounds the mean of every quarter of the image; its loss moves one number."""
    def __init__(self, image_size, channels, width=2):
        super().__init__()
        self.config = dict(image_size=image_size, channels=channels, width=width)
        self.image_size, self.channels, self.grid = image_size, channels, CodeGrid(width, width, 4)
        self.bias = nn.Parameter(torch.tensor(3.0))
    def training_loss(self, images):
        return (self.bias - images.mean()).square(), {"bias": self.bias.item()}
    def encode(self, images):
        means = nn.functional.avg_pool2d(images.mean(1, True), self.image_size // self.grid.width)
        return [((means + 1) * 2).long().clamp(0, 3).flatten(1)]
    def decode(self, codes):
        maps = codes.view(len(codes), 1, -1, self.grid.width) / 2 - 0.75
        return maps.repeat_interleave(self.image_size // self.grid.width, 2).repeat_interleave(
            self.image_size // self.grid.width, 3).expand(-1, self.channels, -1, -1)
'''


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The example's folder and one with more parts on the path, forgotten afterwards."""
    (tmp_path / "more_tokenizers.py").write_text(LEARNING)
    for folder in (EXTENDING, tmp_path):
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr("ral_gym.registry._allowed", set())
    monkeypatch.setattr(TOKENIZERS, "_parts", dict(TOKENIZERS._parts))
    for name in ("own_tokenizer", "more_tokenizers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.commands
def test_the_examples_tokenizer_through_all_stages_and_commands(
    parts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, photo = parts / "runs" / "own", parts / "photo.png"
    flags = [*TINY, "--runs", str(run.parent), "--name", "own", "--vqvae.kind", NAME, "--vqvae.options", "patch", "4"]
    assert main(["train", "--dry-run", *flags]) == 0 and "Patches" in capsys.readouterr().out
    assert main(["train", *flags]) == 0
    tokenizer = load_tokenizer(run / "vqvae.safetensors")
    assert tokenizer.grid.height == 8 and tokenizer.patches.abs().sum() > 0
    assert main(["train", *flags]) == 0  # it is finished: the table again
    assert main(["sample", str(run), "--n", "4", "--plugin", NAME]) == 0
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8)).save(photo)
    assert main(["complete", str(run), str(photo), "--plugin", NAME]) == 0
    assert main(["verify", str(run), "--plugin", NAME]) == 0
    assert main(["report", str(run), "--plugin", NAME]) == 0


def test_a_loss_of_its_own_is_minimised_by_stage_1(parts: Path) -> None:
    flags = [*TINY, "--runs", str(parts), "--name", "r", "--vqvae.kind", "more_tokenizers:Learning"]
    flags += ["--stages", "vqvae", "--vqvae.learning-rate", "0.1", "--vqvae.training-steps", "40"]
    assert main(["train", *flags]) == 0
    assert float(load_tokenizer(parts / "r" / "vqvae.safetensors").bias) < 1
    lines = [json.loads(line) for line in (parts / "r" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 40 and lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["bias"] < lines[0]["bias"] < 3  # a figure of its own, a number as well as a tensor


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--vqvae.hidden-units", "99"], "vqvae.hidden_units is 99, but own_tokenizer:Patches takes no hidden_units"),
        (["--vqvae.training-steps", "7"], "vqvae.training_steps is 7"),
        (["--vqvae.options", "depth", "3"], "depth"),
        (["--vqvae.options", "patch", "5"], "own_tokenizer:Patches"),
        (["--vqvae.levels", "2"], "give --vqvae.levels 1"),
        (["--vqvae.kind", "own_tokenizer:Nothing"], "has no Nothing"),
        (["--vqvae.kind", "vqgann"], "tokenizer 'vqgann' is unknown"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    parts: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert main(["train", *TINY, "--runs", str(parts), "--name", "r", "--vqvae.kind", NAME, *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line


def test_code_that_only_a_file_names_is_not_imported(parts: Path) -> None:
    (parts / "evil.py").write_text("raise SystemExit('imported')")
    tensors, metadata = {"x": torch.zeros(1)}, {"class": "Mine", "kind": "evil:Mine", "config": {}}
    save_tensors(parts / "vqvae.safetensors", tensors, metadata)
    with pytest.raises(ConfigError, match="--plugin evil:Mine"):
        load_tokenizer(parts / "vqvae.safetensors")


@pytest.mark.parametrize("cls", [VQVAE, VQVAE2])
def test_files_of_older_versions_say_no_kind(tmp_path: Path, cls: type[VQVAE]) -> None:
    model = cls(16, 1, codebook_size=8, codebook_dim=4, hidden_units=8, residual_units=4, layers=2)
    save_tokenizer(tmp_path / "new.safetensors", model)
    tensors, metadata = load_tensors(tmp_path / "new.safetensors")
    assert metadata.pop("kind") in TOKENIZERS
    old = {name.replace(".inner.", ".body.1.").replace(".out.", ".body.3."): t for name, t in tensors.items()}
    assert old.keys() != tensors.keys()
    save_tensors(tmp_path / "old.safetensors", old, metadata)
    again = load_tokenizer(tmp_path / "old.safetensors")
    assert type(again) is cls
    assert all(torch.equal(value, tensors[name]) for name, value in again.state_dict().items())


def test_the_built_in_ones_are_chosen_as_before() -> None:
    two = dataclasses.replace(SMOKE, vqvae=dataclasses.replace(SMOKE.vqvae, levels=2, layers=2))
    assert type(tokenizer_of(SMOKE, 32, 1)) is VQVAE and type(tokenizer_of(two, 32, 3)) is VQVAE2
