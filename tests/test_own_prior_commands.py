"""A stranger's prior from the command line: its settings, every stage and command, and files that name code."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from torch import nn

from ral_gym import registry
from ral_gym.agents import (
    load_run,
)
from ral_gym.commands.cli import main
from ral_gym.config import Config
from ral_gym.errors import ConfigError
from ral_gym.grid import CodeGrid
from ral_gym.presets import SMOKE
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.two_level import TwoLevelPrior
from ral_gym.runs.run import Run, read_config
from ral_gym.stages.levels import check_prior_settings, load_generator, prior_of
from tests.own_priors import GPT

pytestmark = pytest.mark.commands

# -------------------------------------------------------------------------------------------- settings


def config(levels: int = 1, bottom: dict[str, Any] | None = None, **settings: Any) -> Config:
    kind = {"kind": "tests.own_priors:GPT", "residual_units": SMOKE.prior.residual_units}
    prior = dataclasses.replace(SMOKE.prior, **{**kind, **settings})
    vqvae = dataclasses.replace(SMOKE.vqvae, levels=levels, layers=SMOKE.vqvae.layers + 1 - levels)
    return dataclasses.replace(
        SMOKE, prior=prior, vqvae=vqvae, bottom=dataclasses.replace(SMOKE.bottom, **(bottom or {}))
    )


@pytest.fixture
def allowed() -> None:
    registry.allow("tests.own_priors:GPT", "tests.own_priors:Sharp")


def test_settings_and_options_reach_the_constructor(allowed: None) -> None:
    grid = CodeGrid(4, 4, 16)
    prior = prior_of(config(hidden_units=24, dropout=0.3, options={"heads": 2}), grid)
    assert (prior.hidden_units, prior.dropout, prior.heads, prior.grid) == (24, 0.3, 2, grid)
    sharp = config(kind="tests.own_priors:Sharp", hidden_units=24, layers=1, options={"sharpness": 2.0})
    prior = prior_of(sharp, grid)
    assert (prior.hidden_units, prior.layers, prior.sharpness) == (24, 1, 2.0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"layers": 7}, r"prior.layers is 7, but tests.own_priors:GPT takes no layers: leave prior.layers out"),
        ({"attention_layers": 1}, "prior.attention_layers is 1"),
        ({"options": {"width": 3}}, "which the run fills in: leave it out"),
        ({"options": {"hidden_units": 3}}, "which is a setting: give prior.hidden_units"),
        ({"options": {"learning_rate": 3}}, "which is a setting: give prior.learning_rate"),
        ({"options": {"haeds": 3}}, "takes no haeds: choose among heads"),
        ({"options": {"heads": 5}}, r"cannot be built \(AssertionError: embed_dim must be divisible by num_heads\)"),
        ({"kind": "pixelcnn", "options": {"heads": 5}}, "pixelcnn takes no heads: it has no options"),
        ({"kind": "tests.own_priors:nothing"}, "is code that a file names"),
        ({"kind": "two_level"}, "prior"),
        ({"levels": 2, "bottom": {"kind": "examples.extending.own_prior:GPT"}}, "bottom.kind is .* takes no condition"),
    ],
)
def test_what_it_does_not_take_is_refused_before_stage_1(settings: dict[str, Any], said: str, allowed: None) -> None:
    registry.PRIORS._parts["examples.extending.own_prior:GPT"] = NoCondition
    with pytest.raises(ConfigError, match=said) as caught:
        check_prior_settings(config(**settings))
    assert "\n" not in str(caught.value)


class NoCondition(nn.Module):
    def __init__(self, codebook_size: int, height: int, width: int) -> None:
        super().__init__()


def test_a_setting_of_the_preset_need_not_be_taken(allowed: None) -> None:
    changed = {field.name for field in dataclasses.fields(SMOKE.prior) if getattr(SMOKE.prior, field.name) != 5}
    assert "residual_units" in changed and check_prior_settings(config())[0].hidden_units == SMOKE.prior.hidden_units


def test_two_levels_of_ones_own(allowed: None) -> None:
    own = {"kind": "tests.own_priors:GPT"}
    top, bottom = check_prior_settings(config(levels=2, bottom=own))
    assert bottom.condition == (4, 4, 16) and TwoLevelPrior(top, bottom).grid.n_codes == 80
    (top,) = check_prior_settings(config(levels=2))
    assert isinstance(top, GPT)


# ---------------------------------------------------------------------------------------- command line

EXAMPLE = Path(__file__).parents[1] / "examples/extending/own_prior.py"
PARTS = """
from tests.own_priors import GPT as Base

class GPT(Base):
    pass
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a stranger's module in it."""
    path = tmp_path_factory.mktemp("stranger")
    shutil.copy(EXAMPLE, path)
    (path / "my_gpt_parts.py").write_text(PARTS)
    return path


FLAGS = ["--preset", "smoke", "--quiet", "--evaluation.temperatures", "0.5", "--evaluation.n-samples", "24"]
FLAGS += ["--vqvae.training-steps", "30", "--prior.training-steps", "20", "--ral.n-updates", "2"]
COMMANDS_SHOWN = [shlex.split(line) for line in EXAMPLE.read_text().splitlines() if line.startswith("    ral-gym")]
"""What the example's docstring says."""
OWN = COMMANDS_SHOWN[0][COMMANDS_SHOWN[0].index("--prior.kind") :]


def forget() -> None:
    """What another process would know of the stranger's module."""
    registry._allowed.clear()
    for module in ("own_prior", "my_gpt_parts"):
        registry.PRIORS._parts.pop(f"{module}:GPT", None)
        sys.modules.pop(module, None)


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A finished run with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*COMMANDS_SHOWN[0][1:], *FLAGS]) == 0
    forget()
    return folder / "runs/gpt"


@pytest.fixture
def copy(run: Path, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, seen from a process that knows nothing of the stranger's module."""
    monkeypatch.chdir(folder)
    forget()
    return Path(shutil.copytree(run, tmp_path / "gpt"))


def test_the_whole_way_leaves_a_table_of_it(run: Path) -> None:
    rows = json.loads((run / "results.json").read_text())["rows"]
    assert {"mle", "mle_continued", "ral", "ral_live", "mle_rejection"} <= rows.keys()
    registry.allow("own_prior:GPT")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run.parents[1])
        networks = [load_generator(Run(run, read_config(run)), name) for name in ("prior", "policy_ema")]
    assert [type(one).__name__ for one in networks] == ["GPT", "GPT"]
    assert networks[0].config["heads"] == 2 and networks[0].hidden_units == 32
    forget()


COMMANDS = {
    "sample": ["--n", "4"],
    "complete": ["IMAGE", "--seeds", "2"],
    "evaluate": ["--quiet"],
    "verify": ["--quiet", "--rows", "mle"],
    "report": [],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_asks_for_the_name_and_then_works(
    command: str, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "evaluate":
        (copy / "results.json").unlink()
    shutil.copy(next((copy / "samples").glob("*.png")), tmp_path / "image.png")
    words = [str(tmp_path / "image.png") if word == "IMAGE" else word for word in COMMANDS[command]]
    assert main([command, str(copy), *words]) == 2
    said = capsys.readouterr().err.strip()
    assert "is code that a file names" in said and "--plugin own_prior:GPT" in said and "Traceback" not in said
    assert "own_prior" not in sys.modules
    assert main([command, str(copy), *words, "--plugin", "own_prior:GPT"]) == 0


def test_a_variant_starts_from_it_and_a_dry_run_counts_it(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["train", "--start-from", str(copy), "--runs", str(tmp_path), "--name", "again", "--quiet"]
    start += ["--stages", "ral", "--ral.algo", "ppo"]
    assert main(start) == 2
    assert "is code that a file names" in capsys.readouterr().err
    assert main([*start, "--plugin", "own_prior:GPT"]) == 0
    assert (tmp_path / "again/policy.safetensors").is_file()
    assert main(["train", "--preset", "smoke", "--dry-run", *OWN]) == 0
    assert "GPT" in capsys.readouterr().out


def test_stage_3_goes_on_and_the_environment_masks_with_it(copy: Path) -> None:
    with pytest.raises(ConfigError, match="is code that a file names"):
        load_run(copy, device="cpu")
    with pytest.raises(ConfigError, match="is code that a file names"):
        gym.make("ral_gym/LatentCode-v0", run=str(copy), top_k=3)
    assert "own_prior" not in sys.modules
    env = gym.make("ral_gym/LatentCode-v0", run=str(copy), top_k=3, plugins=["own_prior:GPT"])
    env.reset(seed=0)
    assert env.unwrapped.action_masks().sum() == 3  # type: ignore[attr-defined]
    forget()
    vector = gym.make_vec("ral_gym/LatentCode-v0", num_envs=2, run=str(copy), top_k=3, plugins=["own_prior:GPT"])
    assert type(vector.world.masks.prior).__name__ == "GPT"  # type: ignore[attr-defined]
    forget()
    stage = load_run(copy, device="cpu", plugins=["own_prior:GPT"])
    assert type(stage.model.policy.prior).__name__ == "GPT"


def test_an_unknown_option_ends_before_stage_1(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["train", *FLAGS, "--prior.kind", "own_prior:GPT", "--runs", str(tmp_path / "runs"), "--name", "x"]
    assert main([*flags, "--prior.options", "haeds", "2"]) == 2
    assert "takes no haeds: choose among heads" in capsys.readouterr().err
    assert not (tmp_path / "runs/x/vqvae.safetensors").exists()


def test_a_run_folder_cannot_name_code(tmp_path: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy.parent / "evil_prior_part.py").write_text("from pathlib import Path\nPath('ran').touch()\nclass Bad: pass\n")
    settings = json.loads((copy / "config.json").read_text())
    settings["prior"]["kind"] = "evil_prior_part:Bad"
    (copy / "config.json").write_text(json.dumps(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(copy.parent)
        start = ["train", "--start-from", str(copy), "--runs", "runs", "--name", "x", "--quiet", "--stages", "ral"]
        assert main(start) == 2
        assert "evil_prior_part:Bad' is code that a file names" in capsys.readouterr().err
        (copy / "prior.safetensors").unlink()
        assert main([*start[:-2], "--stages", "prior"]) == 2
    assert "evil_prior_part" not in sys.modules and not (copy.parent / "ran").exists()


def test_two_levels_with_a_prior_of_ones_own_run_to_the_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    forget()
    flags = ["--vqvae.levels", "2", "--vqvae.layers", "2", "--bottom.kind", "my_gpt_parts:GPT"]
    flags += ["--bottom.training-steps", "10", "--bottom.hidden-units", "16", "--ral.n-envs", "8"]
    flags += ["--stages", "vqvae", "prior", "ral"]
    assert main(["train", *FLAGS, *flags, "--name", "two", "--ral.algo", "grpo"]) == 0
    policy = load_generator(Run("runs/two", read_config("runs/two")), "policy")
    assert type(policy.top) is PixelCNN and type(policy.bottom).__name__ == "GPT"
    forget()


def test_the_example_is_short_and_says_how_to_run_it(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 40
    command = EXAMPLE.read_text().partition("``ral-gym ")[2].partition("``")[0].split()
    assert command[:2] == ["sample", "runs/gpt"] and main([*command, "--n", "4"]) == 0
    assert "sample_policy_ema.png" in capsys.readouterr().out
