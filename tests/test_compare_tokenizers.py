"""Tokenizers side by side: each gets the first one's time, none is trained twice, and the table marks its own loss."""

import json
from pathlib import Path

import compare_tokenizers
import pytest


@pytest.mark.commands
def test_tokenizers_are_compared_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_tokenizers, "seconds_per_step", lambda config, images: 0.05)  # no test of speed
    flags = ["--preset", "smoke", "--only", "vqvae", "perceptual", "--quiet", "--runs", str(tmp_path)]
    assert compare_tokenizers.main(flags) == 0
    folder = tmp_path / "tokenizers"
    rows = json.loads((folder / "tokenizers.json").read_text())["rows"]
    assert list(rows) == ["vqvae", "perceptual"] and (folder / "tokenizers.png").is_file()
    assert rows["vqvae"]["steps"] == 20
    assert rows["perceptual"]["steps"] == max(1, round(rows["vqvae"]["seconds"] / 0.05))
    assert all(row["psnr"] > 5 and row["lite0_distance"] > 0 and row["pyramid_fd"] > 0 for row in rows.values())
    lines = (folder / "table.md").read_text().splitlines()
    assert "*" not in lines[2] and lines[3].count(" *") == 2 and "in this tokenizer's loss" in lines[-1]
    made = (folder / "perceptual" / "vqvae.safetensors").stat().st_mtime_ns
    assert compare_tokenizers.main(flags) == 0
    assert (folder / "perceptual" / "vqvae.safetensors").stat().st_mtime_ns == made


def test_an_unknown_tokenizer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_tokenizers.main(["--only", "sharp", "--runs", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "tokenizer 'sharp' is unknown: choose some of vqvae, perceptual" in line
