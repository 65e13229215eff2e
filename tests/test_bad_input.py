"""What a user can get wrong: one clear line that names the thing and the remedy, code 2, nothing saved lost."""

import errno
import os
import pkgutil
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from PIL import Image

from ral_gym.commands.cli import train_main
from ral_gym.commands.ending import run_command
from ral_gym.commands.stage_files import FINISHED
from ral_gym.errors import RunError
from ral_gym.runs.run import Run, read_config
from ral_gym.runs.storage import load_json, load_module, load_tensors, save_module
from ral_gym.tokenizers.vqvae import VQVAE

Train = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, smoke_options: list[str], capsys: pytest.CaptureFixture[str]) -> Train:
    """Train into `tmp_path`/smoke, which must fail; the one line that it says."""

    def train(*options: str) -> str:
        capsys.readouterr()
        assert train_main([*smoke_options, "--runs", str(tmp_path), *options]) == 2
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err + captured.out
        lines = [line for line in captured.err.splitlines() if not line.startswith("warning: ")]
        (line,) = lines
        assert line.startswith("error: ")
        return line.removeprefix("error: ")

    return train


@pytest.fixture
def finishes(
    tmp_path: Path, smoke_run: Path, smoke_options: list[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[], None]:
    """Train into `tmp_path`/smoke, which must end as a run that was left alone does, to the last bit."""

    def train() -> None:
        monkeypatch.setattr("ral_gym.stages.evaluate.draw_pictures", lambda *args: None)
        assert train_main([*smoke_options, "--runs", str(tmp_path)]) == 0
        assert load_json(tmp_path / "smoke" / "results.json")["rows"] == load_json(smoke_run / "results.json")["rows"]
        for name in FINISHED[1:]:
            one, other = load_tensors(tmp_path / "smoke" / name)[0], load_tensors(smoke_run / name)[0]
            assert all(torch.equal(one[key], other[key]) for key in other), name

    return train


@pytest.fixture
def run(tmp_path: Path, smoke_run: Path) -> Path:
    """A copy of a finished run."""
    return shutil.copytree(smoke_run, tmp_path / "smoke")


def remove(run: Path, *names: str) -> None:
    for name in names:
        (run / name).unlink(missing_ok=True)


# Arguments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--algo sarsa", "algorithm 'sarsa' is unknown: choose one of reinforce, ppo"),
        ("--ral.algo sarsa", "algorithm 'sarsa' is unknown"),
        ("--device cuda", "device 'cuda' asked for, but 0 CUDA devices are visible; use --device cpu or auto"),
        ("--device gpu", "unknown device 'gpu': choose auto, cpu, cuda or cuda:N"),
        ("--vqvae.batch-size -3", "vqvae.batch_size is -3: give an integer of 1 or more"),
        ("--vqvae.training-steps 0", "vqvae.training_steps is 0: give an integer of 1 or more"),
        ("--prior.hidden-units 0", "prior.hidden_units is 0: give"),
        ("--prior.dropout 2", "prior.dropout is 2.0: give at least 0 and below 1"),
        ("--prior.learning-rate nan", "prior.learning_rate is nan: give a number above 0"),
        ("--ral.n-envs 0", "ral.n_envs is 0: give an integer of 1 or more"),
        ("--evaluation.temperatures 0.9 0", "evaluation.temperatures is 0.0: give a number above 0"),
        ("--critic.layers 6", "critic.layers is 6: data.image_size 32 must be a multiple of 2**6"),
        ("--seed -1", "seed is -1: give 0 to 4000000"),
        ("--data.image-size 0", "data.image_size is 0: give 8 or more"),
        ("--data.limit 11", "11 training images are too few to measure distances: give at least 12"),
    ],
)
def test_wrong_settings_are_named_with_what_is_allowed(refused, monkeypatch, options, words) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert words in refused(*options.split())


# Images -------------------------------------------------------------------------------------------------------------


def test_missing_empty_and_bad_image_folders(refused, tmp_path) -> None:
    folder = tmp_path / "photos"
    assert f"{folder} of data source 'folder:{folder}' does not exist" in refused("--data", f"folder:{folder}")
    folder.mkdir()
    assert f"No images in {folder}" in refused("--data", f"folder:{folder}")
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(b"no image")
    message = refused("--data", f"folder:{folder}")
    assert "None of the 3 images" in message and "0.jpg: not an image" in message
    assert "Unknown data source 'photos'" in refused("--data", "photos")


def test_images_smaller_than_the_crop(refused, tmp_path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.fromarray(np.zeros((40, 48), np.uint8)).save(tmp_path / "photos" / f"{number}.png")
    message = refused("--data", f"folder:{tmp_path / 'photos'}", "--data.crop", "64")
    assert "None of the 3 images" in message and "48x40" in message and "change data.crop" in message


def test_a_mistake_does_not_block_the_corrected_command(refused, tmp_path) -> None:
    assert "does not exist" in refused("--data", f"folder:{tmp_path / 'photo'}")
    (tmp_path / "photos").mkdir()
    assert "No images" in refused("--data", f"folder:{tmp_path / 'photos'}")  # the same run folder, other settings
    assert not (tmp_path / "smoke").exists()  # a start that failed leaves nothing


# The run folder -----------------------------------------------------------------------------------------------------


def test_a_run_folder_of_another_configuration(refused, run) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    message = refused("--vqvae.beta", "0.5", "--seed", "0")
    assert f"{run} was made with another configuration (vqvae.beta: 0.25 there, 0.5 here); choose" in message
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_folder_that_is_no_run_folder(refused, tmp_path) -> None:
    (tmp_path / "smoke").mkdir()
    (tmp_path / "smoke" / "thesis.tex").write_text("years of work")
    assert "smoke is not a run folder: it has no config.json, but thesis.tex; choose another --name" in refused()
    assert [path.name for path in (tmp_path / "smoke").iterdir()] == ["thesis.tex"]


def test_places_that_cannot_be_written(refused, tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "cannot write" in refused("--runs", str(tmp_path / "file")) and (tmp_path / "file").is_file()
    message = refused("--runs", "/proc/nowhere")
    assert "cannot write /proc/nowhere/smoke/config.json" in message and "choose a folder you can write to" in message


# Damaged files ------------------------------------------------------------------------------------------------------

READ = ["vqvae", "codes", "prior", "policy", "policy_ema", "prior_continued", "prior_ema", "checkpoints/ral"]


def remove_later(run: Path, name: str) -> None:
    """What makes the next run read the file `name`."""
    remove(run, "results.json", *(["policy.safetensors"] if name == "checkpoints/ral" else []))


@pytest.mark.parametrize("name", READ)
def test_a_truncated_file_is_named_and_may_be_removed(refused, finishes, run, name) -> None:
    remove_later(run, name)
    file = run / f"{name}.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    message = refused()
    assert f"{file} is damaged or not a safetensors file" in message and "remove it to make it again" in message
    file.unlink()  # as it says
    finishes()


@pytest.mark.parametrize("name", READ)
def test_a_foreign_file_is_named(refused, run, name) -> None:
    remove_later(run, name)
    file = run / f"{name}.safetensors"
    shutil.copy(run / "critic.safetensors", file)
    message = refused()
    assert str(file) in message and "; remove it to " in message


def test_files_of_other_runs_are_named(refused, run) -> None:
    remove(run, "results.json")
    torch.manual_seed(0)
    other = VQVAE(**{**load_module(run / "vqvae.safetensors", VQVAE).config, "codebook_size": 32})
    save_module(run / "vqvae.safetensors", other)
    assert "vqvae.safetensors belongs to another model (codebook_size: 32 there, 16 here)" in refused()


def test_a_damaged_critic_is_named_by_the_environment(run) -> None:
    file = run / "critic.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(RunError, match=r"critic\.safetensors is damaged"):
        gym.make("ral_gym/LatentCode-v0", run=str(run))
    shutil.copy(run / "policy.safetensors", file)
    with pytest.raises(RunError, match=r"critic\.safetensors holds a prior \(pixelcnn\), not a critic"):
        gym.make("ral_gym/LatentCode-v0", run=str(run))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("results.json", "{", "results.json cannot be read"),
        (
            "results.json",
            "[]",
            "results.json is not a results file (the file is not names and values); remove it to evaluate again",
        ),
        ("results.json", '{"rows": {"mle": 3}}', "results.json is not a results file"),
        ("config.json", "{", "config.json cannot be read"),
        ("checkpoints/evaluation.json", "{", "evaluation.json cannot be read"),
        (
            "checkpoints/evaluation.json",
            '{"mle": 3}',
            "evaluation.json holds no table rows (mle is not names and values); remove it",
        ),
    ],
)
def test_damaged_json_is_named(refused, run, name, content, words) -> None:
    if name.startswith("checkpoints"):
        remove(run, "results.json")
    (run / name).write_text(content)
    assert words in refused()


def test_a_log_cut_short_is_mended(finishes, run) -> None:
    remove(run, "results.json", "vqvae.safetensors", "codes.safetensors")
    log = run / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    finishes()
    assert len(Run(run, read_config(run)).metrics("vqvae")) == 2


# A full disk --------------------------------------------------------------------------------------------------------


def test_a_full_disk_loses_nothing(refused, finishes, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("ral_gym.stages.evaluate.draw_pictures", lambda *args: None)
    monkeypatch.setattr("ral_gym.stages.common.CHECKPOINT_SECONDS", 0.0)
    replace, run = os.replace, tmp_path / "smoke"
    names = ["checkpoints/vqvae", "vqvae", "codes", "prior", "checkpoints/ral", "policy_ema", "prior_continued"]
    kept: dict[Path, bytes] = {}
    for file in [*(run / f"{name}.safetensors" for name in names), run / "results.json"]:

        def full(source: Any, target: Any, file: Path = file) -> None:
            if Path(target) == file:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            message = refused()
        words = "No space left on device; free some space and run the same command again"
        assert message == f"cannot write {file}: {words}"
        assert not file.exists() and {path.name for path in run.rglob(".*")} <= {".lock"}
        assert all(path.read_bytes() == content for path, content in kept.items())
        kept = {path: path.read_bytes() for path in run.glob("*.safetensors")}
    assert len(kept) == len(FINISHED) - 1
    finishes()


def test_a_full_disk_under_tensorboard_is_one_line_too(capsys) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail() -> None:
        raise error

    def command(argv: Any, console: Any) -> None:
        thread = threading.Thread(target=fail)  # its writer fails in a thread, and again in the next call
        thread.start()
        thread.join()
        raise error

    assert run_command(command, []) == 2
    line = "error: a log file: No space left on device; free some space and run the same command again\n"
    assert capsys.readouterr().err == line


# Ctrl-C and losses that are no numbers ------------------------------------------------------------------------------


def test_ctrl_c_is_one_line_and_130(capsys) -> None:
    def command(argv: Any, console: Any) -> None:
        raise KeyboardInterrupt

    assert run_command(command, []) == 130
    assert capsys.readouterr().err == "stopped: saved files are kept; run the same command again to continue\n"


def test_other_errors_are_bugs_and_keep_their_traceback() -> None:
    def command(argv: Any, console: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(command, [])


def at_call(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose result is NaN from its `number`-th call on."""
    calls = [0]

    def count(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        result = function(*args, **kwargs)
        if calls[0] < number:
            return result
        if isinstance(result, tuple):  # a loss and its figures
            return result[0] * float("nan"), {name: float("nan") for name in result[1]}
        return result * float("nan")

    return count


CRITIC, REINFORCE = "ral_gym.agents.rewards.co_trained_critic", "ral_gym.agents.algorithms.reinforce.Reinforce"
NOT_A_NUMBER = [
    ("vqvae", "ral_gym.stages.train_vqvae.float_batch", 15, "the loss is nan at step 15; ", 14),
    ("prior", "ral_gym.stages.scheduled_sampling.maximum_likelihood_loss", 15, "the loss is nan at step 15; ", 14),
    (
        "ral",
        CRITIC + ".critic_loss",
        9,
        "the critic's loss is nan after 8 critic steps; ",
        2,
    ),
    (
        "ral",
        CRITIC + ".CoTrainedCritic.score_map",
        1,
        "the critic's scores are NaN or ",
        2,
    ),
    (
        "ral",
        REINFORCE + ".advantages",
        1,
        "weights are NaN or infinite after step 3; ",
        2,
    ),
]
"""Stage, the function that returns NaN from one call on, what is said, and the step of the checkpoint that stays."""


def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(refused, finishes, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("ral_gym.stages.common.CHECKPOINT_SECONDS", 0.0)
    for stage, target, call, words, step in NOT_A_NUMBER:
        with monkeypatch.context() as patch:
            patch.setattr(target, at_call(call, pkgutil.resolve_name(target)))
            message = refused()
        assert message.startswith(f"stage {stage}: {words}") and "the last good checkpoint is kept; lower " in message
        run = Run(tmp_path / "smoke", read_config(tmp_path / "smoke"))
        state = run.load_checkpoint(stage)
        assert state is not None and state.get("step", state.get("updates")) == step
    finishes()


@pytest.mark.parametrize("section", ["vqvae", "prior", "critic", "ral"])
def test_an_absurd_learning_rate_is_blamed(refused, section) -> None:
    options = ["--vqvae.training-steps", "3", "--prior.training-steps", "3", "--ral.n-envs", "2"]
    assert f"; lower {section}.learning_rate" in refused(*options, f"--{section}.learning-rate", "1e30")
