"""The commands besides training: sample, complete, presets, and training's dry run."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ral_gym.commands.arguments import COMMANDS, STAGES, TrainArguments, parse
from ral_gym.commands.cli import main
from ral_gym.commands.draw_arguments import SampleArguments
from ral_gym.commands.generate import open_run
from ral_gym.commands.stage_files import files_of, finished_files
from ral_gym.config import SECTIONS, Config
from ral_gym.presets import PRESETS, SMOKE, get_preset
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.sampler import CachedSampler
from ral_gym.priors.two_level import TwoLevelPrior
from ral_gym.runs.run import Run
from ral_gym.runs.storage import load_module, save_module
from ral_gym.stages.controls import continue_prior
from ral_gym.stages.levels import load_generator, load_vqvae, prior_of
from ral_gym.tokenizers.base import tokenizer_of
from ral_gym.tokenizers.code_set import CodeSet
from tests.tiny import make_tiny_run

TWO = dataclasses.replace(SMOKE, vqvae=dataclasses.replace(SMOKE.vqvae, layers=2, levels=2), bottom=SMOKE.prior)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a prior and another network as the policy."""
    path, other = make_tiny_run(tmp_path / "tiny"), make_tiny_run(tmp_path / "other", seed=1)
    policy = load_module(other / "prior.safetensors", PixelCNN)
    save_module(path / "policy_ema.safetensors", policy)
    return path


def two_level_run(path: Path, config: Config = TWO) -> Path:
    """A run of two levels with random weights."""
    run = Run(path, config)
    vqvae = tokenizer_of(config, 32, 1)
    with torch.no_grad():
        vqvae.train()(torch.rand(64, 1, 32, 32) * 2 - 1)  # k-means
    save_module(run.file("vqvae.safetensors"), vqvae)
    top, bottom = (prior_of(config, vqvae.grid, level) for level in range(2))
    save_module(run.file("prior.safetensors"), top)
    save_module(run.file("prior_bottom.safetensors"), bottom)
    save_module(run.file("policy_ema.safetensors"), TwoLevelPrior(bottom=bottom, top=top))
    return run.path


def photo(path: Path, width: int = 50, height: int = 40) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line with which a command ends."""
    assert main(list(argv)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


# Arguments ----------------------------------------------------------------------------------------------------------


def test_every_command_is_parsed() -> None:
    train = parse(["train", "--preset", "celeba128", "--stages", "vqvae", "prior", "--mixed-precision", "bf16"])
    assert isinstance(train, TrainArguments) and train.config == get_preset("celeba128")
    assert (train.stages, train.mixed_precision, train.name) == (("vqvae", "prior"), "bf16", "celeba128")
    assert parse(["sample", "runs/x", "--n", "3"]) == SampleArguments("runs/x", n=3)
    for argv in (["complete", "runs/x", "a.png", "--visible-rows", "0.3"], ["evaluate", "runs/x"], ["presets", "demo"]):
        assert vars(parse(argv))


@pytest.mark.parametrize(
    "argv",
    [["sample"], ["complete", "runs/x"], ["train", "--stages", "all"], ["sample", "x", "--n", "y"]],
)
def test_a_bad_command_is_an_exit_code(argv, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_an_unknown_command_is_named_with_what_was_meant(capsys) -> None:
    for more in ([], ["--help"], ["runs/x"]):
        assert "command 'xyzzy' is unknown: choose one of train, demo, import" in refused(capsys, "xyzzy", *more)
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "{" + ",".join(COMMANDS) + "}" in capsys.readouterr().out.replace("\n", "").replace(" ", "")
    assert "command 'evalute' is unknown (did you mean evaluate?)" in refused(capsys, "evalute", "--help")


@pytest.mark.parametrize(
    "name",
    [
        "../escape",
        "/tmp/x",
        "a/b",
        "a\\b",
        "",
        ".",
        "..",
        ".x",
        "con",
        "NUL.txt",
        "a\0b",
        "a\x1b[31m",
        "x" * 121,
        "a ",
        "c:d",
    ],
)
def test_a_run_lies_directly_inside_its_folder(capsys, tmp_path, name) -> None:
    assert "--name is" in refused(capsys, "train", "--name", name, "--runs", str(tmp_path / "runs"))
    assert list(tmp_path.iterdir()) == []


def test_settings_are_checked_before_anything_is_done(capsys, tmp_path) -> None:
    assert "prior.dropout is 2.0" in refused(capsys, "train", "--prior.dropout", "2", "--runs", str(tmp_path))
    assert "--gradient-accumulation is 0" in refused(capsys, "train", "--gradient-accumulation", "0")
    assert main(["train", "--preset", "x"]) == 2 and "preset 'x' is unknown" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_finished_run_of_two_levels_has_two_files_per_prior() -> None:
    assert files_of("prior", TWO) == [
        *("codes.safetensors", "prior.safetensors", "prior_bottom.safetensors"),
        *("prior_ema.safetensors", "prior_ema_bottom.safetensors"),
    ]
    assert "prior_continued_bottom.safetensors" in files_of("ral", TWO)
    assert "policy_bottom.safetensors" not in finished_files(TWO)
    assert [stage for stage in STAGES[:3] if any("bottom" in name for name in files_of(stage, SMOKE))] == []


# Presets and the dry run --------------------------------------------------------------------------------------------


def test_presets_are_listed_and_shown(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["presets"]) == 0
    out = capsys.readouterr().out
    assert all(f"{name} " in out for name in PRESETS) and "16² + 32²" in out and "512 x 20, 8a" in out
    assert max(map(len, out.splitlines())) <= 80
    assert main(["presets", "celeba128"]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if "." in line)
    assert shown["bottom.conditioning_stack_layers"].strip() == "20" and shown["vqvae.levels"].strip() == "2"
    config = get_preset("celeba128")
    expected = {
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(config)
        if dataclasses.is_dataclass(getattr(config, section.name))
        for field in dataclasses.fields(getattr(config, section.name))
    }
    expected -= {f"ral.{name}" for name in SECTIONS}
    expected |= {"ral.reinforce.baseline"}  # the algorithm's own section, and no other one's
    assert expected <= shown.keys() and "ral.ppo.n_epochs" not in shown
    assert main(["presets", "x"]) == 2 and "'x' is unknown" in capsys.readouterr().err


def test_a_dry_run_prints_every_stage_and_makes_nothing(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["train", "--preset", "demo-2level", "--dry-run", "--runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for words in ("8x8 + 16x16 codes of 128: T = 320", "1 VQ-VAE-2", "2 PixelCNN top", "2 PixelCNN bottom", "3 RAL"):
        assert words in out
    assert "encoder" in out and "lookup" in out and "decoder" in out and "MiB" in out
    assert not list(tmp_path.iterdir())


# Sample -------------------------------------------------------------------------------------------------------------


def test_samples_are_the_generators_and_their_codes_are_kept(run, tmp_path, capsys) -> None:
    codes = tmp_path / "codes.npz"
    assert main(["sample", str(run), "--n", "5", "--seed", "3", "--codes", str(codes), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "policy_ema: RAL" in out and f"  {run}/samples/sample_policy_ema.png" in out and f"  {codes}" in out
    assert (run / "samples" / "sample_policy_ema.png").is_file()
    found = np.load(codes)
    policy = load_module(run / "policy_ema.safetensors", PixelCNN)
    expected, _ = CachedSampler(policy).sample(5, generator=torch.Generator().manual_seed(3))
    assert found["codes"].dtype == np.int16 and np.array_equal(found["codes"], expected.numpy())
    assert (int(found["codebook_size"]), int(found["height"]), int(found["levels"])) == (16, 4, 1)


def test_generator_temperature_and_file_can_be_chosen(run, tmp_path, capsys) -> None:
    outputs = []
    for number, options in enumerate([[], ["--generator", "prior"], ["--generator", "prior", "--temperature", "0.3"]]):
        path = tmp_path / f"{number}.png"
        assert main(["sample", str(run), "--n", "4", "--output", str(path), *options]) == 0
        outputs.append(np.asarray(Image.open(path).convert("L"))[-200:].tobytes())
    assert len(set(outputs)) == 3
    (run / "policy_ema.safetensors").unlink()
    capsys.readouterr()
    assert main(["sample", str(run), "--n", "2"]) == 0
    assert "prior: maximum likelihood" in capsys.readouterr().out


def test_what_cannot_be_sampled_is_refused(run, tmp_path, capsys) -> None:
    assert "is not a run folder (no config.json" in refused(capsys, "sample", str(tmp_path))
    assert "has no policy.safetensors: train it (RAL, the live" in refused(
        capsys, "sample", str(run), "--generator", "policy"
    )
    assert "0 images at temperature 1.0" in refused(capsys, "sample", str(run), "--n", "0")
    assert "temperature 0.0" in refused(capsys, "sample", str(run), "--temperature", "0")
    (run / "vqvae.safetensors").unlink()
    assert "has no vqvae.safetensors" in refused(capsys, "sample", str(run))


# Complete -----------------------------------------------------------------------------------------------------------


def test_complete_writes_the_picture_and_says_what_was_done(run, tmp_path, capsys) -> None:
    image = photo(tmp_path / "me.png")
    assert main(["complete", str(run), str(image), "--visible-rows", "0.6", "--seeds", "3", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "me.png has 50x40 pixels: its central 40x40 resized to 32x32, made grey"
    assert lines[1:] == ["2 of 4 rows of codes are visible (50%)", f"  {run}/samples/complete_me.png"]
    assert (run / "samples" / "complete_me.png").is_file()


@pytest.mark.parametrize("share", ["0", "1", "-1", "2", "nan"])
def test_a_visible_share_outside_0_and_1_is_refused(run, tmp_path, capsys, share) -> None:
    image = photo(tmp_path / "me.png")
    message = refused(capsys, "complete", str(run), str(image), "--visible-rows", share)
    assert "--visible-rows is" in message and "above 0 and below 1" in message


def test_what_cannot_be_completed_is_refused(run, tmp_path, capsys) -> None:
    image = photo(tmp_path / "me.png")
    assert "no.png does not exist" in refused(capsys, "complete", str(run), str(tmp_path / "no.png"))
    assert "0 completions" in refused(capsys, "complete", str(run), str(image), "--seeds", "0")
    (run / "policy_ema.safetensors").unlink()
    assert "has no policy_ema.safetensors: train all" in refused(capsys, "complete", str(run), str(image))
    assert "is not a run folder" in refused(capsys, "complete", str(tmp_path), str(image))


def test_two_levels_are_completed_too(tmp_path, capsys) -> None:
    run, image = two_level_run(tmp_path / "run"), photo(tmp_path / "me.png")
    assert main(["complete", str(run), str(image), "--seeds", "2"]) == 0
    assert "2 of 4 rows of codes are visible" in capsys.readouterr().out
    (run / "prior_bottom.safetensors").unlink()
    assert "has no prior_bottom.safetensors" in refused(capsys, "complete", str(run), str(image))


def test_generators_of_two_levels_are_loaded_as_one(tmp_path) -> None:
    run = Run(two_level_run(tmp_path / "run"), TWO)
    prior, policy = load_generator(run, "prior"), load_generator(run, "policy_ema")
    codes = torch.randint(16, (2, 80))
    assert load_vqvae(run).levels == 2 and prior.grid.n_codes == 80
    with torch.no_grad():
        assert torch.equal(prior(codes), policy(codes))


# Training two levels ------------------------------------------------------------------------------------------------


def test_stages_1_and_2_train_two_levels(tmp_path, capsys) -> None:
    small = {"hidden-units": 8, "residual-units": 8, "layers": 2, "conv-filter-size": 3, "batch-size": 16}
    bottom = {**small, "conditioning-stack-layers": 1, "training-steps": 10, "evaluate-every": 5, "dropout": 0.0}
    options = [word for name, value in bottom.items() for word in (f"--bottom.{name}", str(value))]
    command = ["train", "--preset", "smoke", "--data.workers", "1", "--vqvae.layers", "2", "--vqvae.levels", "2"]
    command += [*options, "--prior.attention-layers", "1", "--device", "cpu", "--runs", str(tmp_path), "--quiet"]
    assert main([*command, "--stages", "vqvae", "prior"]) == 0
    folder = tmp_path / "smoke"
    made = {path.name for path in folder.glob("*.safetensors")}
    assert made == {"vqvae.safetensors", *files_of("prior", TWO)}
    run = open_run(str(folder))
    records = run.metrics("prior_bottom")
    assert [record["step"] for record in records] == [5, 10]
    prior, codes = load_generator(run, "prior"), CodeSet.load(folder / "codes.safetensors")
    assert isinstance(prior, TwoLevelPrior) and prior.top.attention_layers == 1
    assert codes.train.shape[1] == 80 and load_vqvae(run).grid == prior.grid
    # The bottom figures are of the bottom codes given the top ones, and the weights kept are the best ones'.
    test = torch.from_numpy(codes.test).long()
    top, bottom_codes = prior.grid.split(test)
    with torch.no_grad():
        nll = torch.nn.functional.cross_entropy(prior.bottom(bottom_codes, top).flatten(0, 1), bottom_codes.flatten())
    assert nll.item() == pytest.approx(min(record["nll_test"] for record in records), abs=1e-4)
    assert "test=" not in capsys.readouterr().err
    before = {path: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert main([*command, "--stages", "vqvae", "prior"]) == 0
    assert {path: path.read_bytes() for path in folder.glob("*.safetensors")} == before


def test_the_control_continues_both_levels(tmp_path) -> None:
    config = dataclasses.replace(TWO, ral=dataclasses.replace(TWO.ral, n_updates=3, n_envs=4))
    run = Run(two_level_run(tmp_path / "run", config), config)
    prior = load_generator(run, "prior")
    codes = np.random.default_rng(0).integers(16, size=(20, 80)).astype(np.int16)
    continued = continue_prior(run, prior, CodeSet(codes, codes[:4], None, clean=20), torch.device("cpu"), False)
    assert {path.name for path in run.path.glob("prior_continued*")} == {
        *("prior_continued.safetensors", "prior_continued_bottom.safetensors")
    }
    for level in ("top", "bottom"):
        pairs = zip(getattr(prior, level).parameters(), getattr(continued, level).parameters(), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs), level
