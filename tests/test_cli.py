"""The training command: what it makes, what it says, and that it goes on where it was stopped."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ral_gym.commands.arguments import parse_train
from ral_gym.commands.cli import main, train_main
from ral_gym.commands.stage_files import FINISHED
from ral_gym.errors import ConfigError
from ral_gym.presets import PRESETS
from ral_gym.runs.run import Run, read_config
from ral_gym.runs.storage import load_tensors

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    *("--preset", "smoke", "--data.workers", "1", "--vqvae.training-steps", "2", "--prior.training-steps", "2"),
    *("--critic.warmup-steps", "1", "--ral.n-envs", "4", "--ral.n-updates", "1", "--evaluation.n-samples", "12"),
]


@pytest.fixture
def train(smoke_options: list[str]) -> Callable[[Path], int]:
    """Train with the smoke preset into the folder `runs`/smoke."""
    return lambda runs: train_main([*smoke_options, "--runs", str(runs)])


def rows(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())["rows"]


def assert_same_weights(left: Path, right: Path) -> None:
    for name in FINISHED[1:]:
        one, other = load_tensors(left / name)[0], load_tensors(right / name)[0]
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name


# Arguments ----------------------------------------------------------------------------------------------------------


def test_the_preset_chooses_the_defaults_and_flags_change_them() -> None:
    for name, preset in PRESETS.items():
        more = ["--dry-run"] if name == "llamagen-grpo" else []  # else its rewards need files
        assert parse_train(["--preset", name, *more]).config == preset
        assert parse_train([f"--preset={name}", *more]).config == preset
    config = parse_train(["--preset", "celeba64", "--vqvae.beta", "0.5", "--data", "celeba:/x", "--algo", "ppo"]).config
    assert (config.vqvae.beta, config.data.source, config.ral.algo) == (0.5, "celeba:/x", "ppo")
    assert config.prior == PRESETS["celeba64"].prior


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ([], "demo"),
        (["--preset", "smoke"], "smoke"),
        (["--algo", "ppo"], "demo-ppo"),
        (["--seed", "2"], "demo-seed2"),
        (["--preset", "smoke", "--ral.algo", "ppo", "--seed", "2"], "smoke-ppo-seed2"),
        (["--seed", "2", "--name", "mine"], "mine"),
    ],
)
def test_runs_that_differ_in_algorithm_or_seed_have_names_of_their_own(options, name) -> None:
    assert parse_train(options).name == name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--no-such-flag", "3"], "--no-such-flag"),
        (["--vqvae.batch-size", "many"], "--vqvae.batch-size"),
        (["--preset"], "--preset"),
    ],
)
def test_a_bad_flag_is_named(capsys, options, words) -> None:
    with pytest.raises(SystemExit) as caught:
        train_main(options)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert words in captured.err and "Traceback" not in captured.err and not captured.out


@pytest.mark.parametrize("field", ["extractor", "metrics"])
def test_an_unknown_part_of_the_evaluation_is_named_before_anything_is_loaded(field) -> None:
    with pytest.raises(ConfigError, match=r"'nobody' is unknown: .*bring your own as module:Class"):
        parse_train([f"--evaluation.{field}", "nobody"])


def test_settings_are_checked_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match=r"prior\.dropout is 2\.0: give at least 0 and below 1"):
        parse_train(["--prior.dropout", "2"])


def test_the_help_of_train_starts_every_line_at_the_margin(capsys) -> None:
    with pytest.raises(SystemExit):
        parse_train(["--help"])
    words = capsys.readouterr().out
    introduction = words[words.index("Train a") : words.index("--data")].splitlines()
    assert all(line == line.lstrip() for line in introduction[:4]), introduction


def test_help_and_mistakes_do_not_wait_for_torch() -> None:
    code = """if True:
        import sys, ral_gym.commands.cli
        from ral_gym.commands.arguments import parse
        ral_gym.commands.arguments.parse_train(["--seed", "1"])
        parse(["sample", "runs/demo"])
        ral_gym.commands.cli.main(["presets"])
        print("torch" in sys.modules)
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.splitlines()[-1] == "False"


# A finished run -----------------------------------------------------------------------------------------------------


def test_a_finished_run_has_every_file_and_row(smoke_run) -> None:
    assert {name for name in FINISHED if not (smoke_run / name).is_file()} == set()
    assert {"config.json", "metrics.jsonl", "seconds.json"} < {path.name for path in smoke_run.iterdir()}
    assert any((smoke_run / "tensorboard").iterdir())
    pictures = {path.stem for path in (smoke_run / "samples").glob("*.png")}
    assert {"comparison", "real_mle_ral", "nearest", "frontier"} <= pictures
    table = rows(smoke_run)
    generators = {"mle", "mle_ema", "mle_continued", "mle_temperature", "mle_best_temperature", "ral", "ral_live"}
    assert generators | {"reconstruction", "floor"} <= set(table)
    for name in generators:
        assert {"fd", "kid", "nll_test", "nll_new_people", "entropy", "n"} <= set(table[name])
    results = json.loads((smoke_run / "results.json").read_text())
    assert results["n_samples"] == 24 and results["extractor"] == "encoder" and results["seed"] == 0
    assert {"vqvae", "prior", "ral", "evaluation"} <= set(results["seconds"])
    assert {path.name for path in smoke_run.rglob(".*")} <= {".lock"}  # no temporary files


def test_the_same_command_again_prints_the_table_without_training(train, smoke_run, monkeypatch, capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in smoke_run.rglob("*")}
    monkeypatch.setattr(
        "ral_gym.data.images.load_images", lambda *args, **kwargs: pytest.fail("the images were loaded")
    )
    assert train(smoke_run.parent) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert f"{rows(smoke_run)['ral']['nll_test']:.3f}" in captured.out and "mle_best_temperature" in captured.out
    for picture in (smoke_run / "samples").glob("*.png"):
        assert f"  {picture}\n" in captured.out
    assert {path: path.stat().st_mtime_ns for path in smoke_run.rglob("*")} == before


def test_evaluate_prints_the_table_of_a_measured_run(smoke_run, capsys) -> None:
    assert main(["evaluate", str(smoke_run), "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and f"{rows(smoke_run)['ral']['nll_test']:.3f}" in captured.out


def test_stages_one_at_a_time_are_the_same_run(smoke_options, smoke_run, tmp_path, capsys) -> None:
    command = ["train", *smoke_options, "--runs", str(tmp_path)]
    run = tmp_path / "smoke"
    for stage, made in (("vqvae", ["vqvae"]), ("prior", ["codes", "prior", "prior_ema"])):
        assert main([*command, "--stages", "ral"]) == 2
        assert f"stage ral needs {made[0]}.safetensors" in capsys.readouterr().err
        assert main([*command, "--stages", stage]) == 0
        out = capsys.readouterr().out
        for name in made:
            assert (run / f"{name}.safetensors").read_bytes() == (smoke_run / f"{name}.safetensors").read_bytes()
            assert f"  {run}/{name}.safetensors\n" in out
    assert main([*command, "--stages", "evaluate"]) == 2
    assert "stage evaluate needs prior_continued.safetensors, policy.safetensors" in capsys.readouterr().err
    assert not (run / "policy.safetensors").exists()


@pytest.mark.parametrize("name", ["critic", "policy_ema", "prior_ema"])
def test_a_removed_file_of_a_finished_run_is_made_again(train, smoke_run, tmp_path, monkeypatch, name) -> None:
    # What error messages advise: "remove it to make it again".
    monkeypatch.setattr("ral_gym.stages.evaluate.draw_pictures", lambda *args: None)
    run = shutil.copytree(smoke_run, tmp_path / "smoke")
    (run / f"{name}.safetensors").unlink()
    assert train(tmp_path) == 0
    assert_same_weights(run, smoke_run)


# Stopped and continued ----------------------------------------------------------------------------------------------


def interrupt_when(monkeypatch: pytest.MonkeyPatch, target: str, wanted: Callable[..., bool]) -> None:
    """Press Ctrl-C when the function `target` is called with wanted arguments."""
    module, _, name = target.rpartition(".")
    owner = Run if module == "Run" else sys.modules[module]
    original = getattr(owner, name)

    def press(*args: Any, **kwargs: Any) -> Any:
        if wanted(*args):
            signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, press)


def test_ctrl_c_in_every_stage_loses_nothing(train, smoke_run, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("ral_gym.stages.common.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("ral_gym.stages.evaluate.draw_pictures", lambda *args: None)
    run, handler = tmp_path / "smoke", signal.signal(signal.SIGINT, signal.default_int_handler)
    stops: dict[str, tuple[str, Callable[..., bool]]] = {
        "vqvae": ("Run.log", lambda run, stage, step, figures: stage == "vqvae" and step == 10),
        "codes": ("ral_gym.tokenizers.code_set.encode_images", lambda *args: True),
        "prior": ("Run.log", lambda run, stage, step, figures: stage == "prior" and step == 20),
        "ral": ("Run.log", lambda run, stage, step, figures: stage == "ral" and step == 3),
        "continued": ("ral_gym.stages.train_prior.check_finite", lambda loss, stage, *rest: stage == "prior_continued"),
        "evaluation": ("ral_gym.stages.evaluate.save_json", lambda path, begun: "ral" in begun["rows"]),
    }
    kept: dict[Path, bytes] = {}
    try:
        for stage, (target, wanted) in stops.items():
            with monkeypatch.context() as patch:
                interrupt_when(patch, target, wanted)
                assert train(tmp_path) == 130, stage
            lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
            assert lines == ["stopped: saved files are kept; run the same command again to continue"]
            assert all(path.read_bytes() == content for path, content in kept.items()), stage
            kept = {path: path.read_bytes() for path in run.glob("*.safetensors")}
            assert not list(run.rglob(".*.tmp"))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert {path.stem for path in kept} == {Path(name).stem for name in FINISHED[1:]}
    assert train(tmp_path) == 0
    # Six stops later the run is the same as one that was left alone, to the last bit.
    assert_same_weights(run, smoke_run)
    assert rows(run) == rows(smoke_run)
    for stage in ("vqvae", "prior", "ral"):
        steps = [record["step"] for record in Run(run, read_config(run)).metrics(stage)]
        assert steps == [record["step"] for record in Run(smoke_run, read_config(run)).metrics(stage)]


def test_ctrl_c_from_outside_stops_the_script(tmp_path) -> None:
    log = tmp_path / "smoke" / "metrics.jsonl"
    command = [sys.executable, str(ROOT / "examples" / "train_celeba.py"), *TINY, "--vqvae.training-steps", "1000000"]
    process = subprocess.Popen(
        [*command, "--runs", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        limit = time.monotonic() + 60
        while not log.exists() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "stopped: saved files are kept; run the same command again to continue"
    assert "Traceback" not in errors and "Exception" not in errors


# The script as a whole, on other data ---------------------------------------------------------------------------------


@pytest.mark.commands
def test_the_script_runs_without_a_warning_on_a_folder_with_a_bad_image(tmp_path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(20):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{number}.png")
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing more")
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / "train_celeba.py"), *TINY]
    command += ["--data", f"folder:{photos}", "--data.no-grey", "--runs", str(tmp_path), "--algo", "ppo"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "80"})
    assert result.returncode == 0, result.stderr
    first = result.stdout.splitlines()[0]
    assert first.startswith("Data: ") and str(photos) in first and "1 files skipped" in first
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    progress = [line for line in lines if re.search(r": [\d,]+ of [\d,]+ \w+ in \d+:\d\d(,|$)", line)]
    for label in ("1 VQ-VAE", "2 PixelCNN", "3 RAL (ppo)", "  MLE continued", "4 evaluation"):
        assert any(line.startswith(label) for line in progress), (label, lines)
    said = [line for line in lines if line not in progress]
    assert not [line for line in said if not line.startswith(("warning: ", "First images: "))]
    (skipped,) = [line for line in said if "unusable" in line]
    assert "broken.jpg" in skipped and "1 unusable" in skipped
    table = rows(tmp_path / "smoke-ppo")
    assert table["mle"]["nll_new_people"] is None and table["mle"]["nll_test"] > 0
