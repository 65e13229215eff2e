"""The example that trains a GAN on a run's pixels and measures it as the run's generators are measured."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ral_gym.data.images import load_images
from ral_gym.errors import ConfigError, RunError
from ral_gym.runs.run import read_config
from tests.tiny import make_tiny_run

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = ["--steps", "3", "--batch-size", "4", "--hidden-units", "4"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("gan_baseline")


@pytest.fixture
def run(smoke_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(smoke_run, tmp_path / "run")


@pytest.mark.parametrize("loss", ["hinge", "wgan_gp"])
def test_the_same_seed_trains_the_same_gan(script, run, loss) -> None:
    images = load_images(read_config(run).data, progress=False).train
    arguments = script.Arguments(run=str(run), batch_size=4, hidden_units=4, loss=loss)
    drawn = []
    for seed in (0, 0, 1):
        arguments.seed = seed
        gan = script.GAN(arguments, images, torch.device("cpu"))
        untrained = gan.sample(3)
        assert untrained.shape == (3, *images.shape[1:]) and untrained.dtype == torch.uint8
        before = {name: weight.clone() for name, weight in gan.critic.named_parameters()}
        for _ in range(4):
            gan.step()
        assert all(
            not torch.equal(weight, before[name])
            for name, weight in gan.critic.named_parameters()
            if name != "head.bias"
        )
        drawn.append([*gan.generator.parameters(), *gan.average.parameters()])
        still = gan.average.first.weight
        assert not torch.equal(still, gan.generator.first.weight)
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[2], strict=True))


def test_a_gan_learns_how_bright_the_images_are(script, run) -> None:
    images = load_images(read_config(run).data, progress=False).train
    arguments = script.Arguments(run=str(run), batch_size=8, hidden_units=4, learning_rate=2e-3, ema_decay=0.9)
    gan = script.GAN(arguments, images // 8, torch.device("cpu"))  # dark
    before = float(gan.sample(16).float().mean())
    for _ in range(60):
        gan.step()
    after, wanted = float(gan.sample(16).float().mean()), float((images // 8).mean())
    assert abs(after - wanted) < 0.5 * abs(before - wanted)


def test_the_table_has_a_row_per_gan_and_trains_each_once(script, run, monkeypatch) -> None:
    console = Console(record=True, width=120)
    script.main([str(run), *SMALL], console)
    (gan,) = json.loads((run / "gan_baseline/gan.json").read_text())
    assert gan["steps"] == 3 and {"fd", "fd_real", "recall", "memorisation"} <= set(gan["row"])
    text = console.export_text()
    assert f"{gan['row']['fd_real']:.1f}" in text and "gan 1" in text and "mle_equal_time" not in text
    assert (run / "gan_baseline/samples_1.png").stat().st_size > 1000
    script.main([str(run), *SMALL, "--seed", "1"], console)
    monkeypatch.setattr(script, "trained", lambda *_: pytest.fail("trained again"))
    script.main([str(run), *SMALL], console)
    table = (run / "gan_baseline/table.md").read_text()
    assert (run / "gan_baseline/samples_2.png").exists()
    assert table.count("| gan ") == 2 and "seed 1, 3 steps of 4 images" in table
    assert table.count("| ral ") == table.count("| mle ") == 1


def test_steps_need_no_time(script, run) -> None:
    (run / "seconds.json").unlink()
    script.main([str(run), *SMALL], Console())
    assert (run / "gan_baseline/gan.json").exists()


def test_the_time_is_that_of_the_three_stages(script, run) -> None:
    taken = json.loads((run / "seconds.json").read_text())
    arguments = script.Arguments(run=str(run))
    opened = script.open_run(str(run))
    assert script.seconds_of(arguments, opened) == pytest.approx(taken["vqvae"] + taken["prior"] + taken["ral"])
    (run / "seconds.json").unlink()
    with pytest.raises(ConfigError, match="vqvae, prior, ral took: give --seconds"):
        script.seconds_of(arguments, opened)


def test_what_cannot_be_trained_is_said(script, run, tmp_path) -> None:
    for flags in (["--steps", "0"], ["--seconds", "0"], ["--batch-size", "1"]):
        with pytest.raises(ConfigError):
            script.main([str(run), *flags], Console())
    with pytest.raises(ConfigError, match="side 48 are no doubled side of 4"):
        script.Generator(48, 1, 4)
    unfinished = make_tiny_run(tmp_path / "tiny")
    with pytest.raises(RunError, match=r"has no results\.json.*: finish it with ral-gym train"):
        script.main([str(unfinished)], Console())
