"""Rewards clip and hps from the command line on: curves, labels, resume, and one line for every wrong file."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from ral_gym import registry
from ral_gym.commands.arguments import TrainArguments
from ral_gym.commands.cli import main, train_main
from ral_gym.commands.train import train
from ral_gym.errors import ConfigError, RunError
from ral_gym.metrics import PyramidFeatures
from ral_gym.presets import SMOKE
from ral_gym.registry import REWARDS
from ral_gym.rewards.image_text import ImageText
from ral_gym.rewards.options import judge_notes
from ral_gym.rewards.terms import RewardTerm
from ral_gym.rewards.text import ClipReward, HPSReward, prompts_of
from ral_gym.rewards.view import View
from ral_gym.runs.run import read_config
from ral_gym.runs.storage import load_tensors
from ral_gym.settings import check_prompt
from tests.class_runs import NAMES, make_class_run
from tests.clip_models import SPACE, open_clip_state, write_clip, write_hps
from tests.test_clip_rewards import some_images
from tests.tiny import make_tiny_run

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def hps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hps(tmp_path_factory.mktemp("hps") / "HPS_v2.1_compressed.pt")


# The reward -----------------------------------------------------------------------------------------------------------


def test_each_image_is_compared_with_the_text_of_its_own_class(folder: Path) -> None:
    reward = ClipReward(str(folder), "a {name}", NAMES)
    images, labels = some_images(6), torch.tensor([0, 1, 2, 2, 1, 0])
    network = ImageText(folder)
    texts = network.texts(["a cat", "a dog", "a owl"])
    expected = torch.stack([network.images(images[i : i + 1])[0] @ texts[label] for i, label in enumerate(labels)])
    assert (reward(images, labels) - expected).abs().max() < 1e-6
    assert (reward(images, labels.flip(0)) - reward(images, (labels + 1) % 3)).abs().max() > 1e-3
    with pytest.raises(ConfigError, match=r"the images have no labels, but ral.prompt names their class"):
        reward(images)


def test_labels_reach_it_through_the_view(folder: Path) -> None:
    options = {"clip_path": str(folder), "class_names": NAMES, "device": torch.device("cpu")}
    term = RewardTerm("clip", REWARDS.get("clip"), options=options)
    images, codes = some_images(6), torch.zeros(6, 16, dtype=torch.int64)
    first, second = (term(View(codes, lambda codes: images, torch.full((6,), label)), 4) for label in (0, 1))
    assert first.shape == (6,)
    assert (first - second).abs().min() > 1e-5
    assert term.state_dict() == {}, "checkpoints do not keep the network"


def test_without_a_name_all_images_have_one_text_and_the_text_tower_goes(folder: Path, hps: Path) -> None:
    for reward in (ClipReward(str(folder), "a cat"), HPSReward(str(folder), str(hps), "a cat", heads=(2, 3))):
        assert torch.equal(reward(some_images()), reward(some_images(), torch.arange(5)))
        names = [name for name, _ in reward.named_parameters()]
        assert names and not any("text" in name for name in names)


def test_batches_are_bounded_and_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, images = ImageText(folder), some_images(11)
    whole, seen = network.images(images), []
    monkeypatch.setattr("ral_gym.rewards.image_text.IMAGES_AT_ONCE", 4)
    monkeypatch.setattr(network, "_images", lambda batch, one=network._images: seen.append(len(batch)) or one(batch))
    assert (network.images(images) - whole).abs().max() < 1e-6
    assert seen == [4, 4, 3]


def test_pixels_are_resized_as_pillow_does_and_scaled_as_the_folder_says(folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    shutil.copytree(folder, tmp_path / "clip")
    colours = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.25, 0.125]}
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(colours))
    large = some_images(1, side=100)
    pillow = Image.fromarray(large[0].permute(1, 2, 0).numpy()).resize((32, 32), Image.Resampling.BICUBIC)
    expected = torch.tensor(list(pillow.tobytes())).view(32, 32, 3).permute(2, 0, 1)
    pixels = ImageText(tmp_path / "clip").pixels(large)[0]
    mean, std = (torch.tensor(colours[name])[:, None, None] for name in ("image_mean", "image_std"))
    assert ((pixels * std + mean) * 255 - expected).abs().max() < 1.01
    grey = ImageText(tmp_path / "clip").pixels(some_images(1, channels=1))[0]
    assert torch.allclose((grey[0] * 0.5 + 0.1), (grey[2] * 0.125 + 0.3), atol=1e-6)


def test_a_short_image_is_shown_whole(folder: Path) -> None:
    pixels = ImageText(folder).pixels(some_images(1)[:, :, :8])
    assert pixels.shape == (1, 3, 32, 32)
    assert (pixels[:, :, 8:] == 0).all(), "the mean colour"
    assert (pixels[:, :, :8] != 0).any(2).all()


def test_prompts_are_of_the_first_alias() -> None:
    assert prompts_of("a photo of a {name}", ["tench, Tinca tinca", "tabby_cat"]) == [
        "a photo of a tench",
        "a photo of a tabby cat",
    ]
    assert prompts_of("sharp {{x}}", NAMES) == ["sharp {x}"]
    for wrong in ("", " ", "a {", "a }", "{}", "{label}", "{name!r}", "{name:>9}", "{name.x}", "a\nb"):
        with pytest.raises(ConfigError, match=r"give a text, with \{name\} where"):
            check_prompt(wrong)


class Judge(PyramidFeatures):
    network_name = "hps"


def test_a_reward_that_also_judges_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.EXTRACTORS, "_parts", {**registry.EXTRACTORS._parts, "judge": Judge})
    config = replace(SMOKE, ral=replace(SMOKE.ral, reward_weights={"clip": 1.0, "hps": 1.0}))
    assert judge_notes(config) == []
    (note,) = judge_notes(replace(config, evaluation=replace(SMOKE.evaluation, extractor="judge")))
    assert "the reward hps is by the network that also judges (evaluation: judge)" in note


# Files ----------------------------------------------------------------------------------------------------------------


def broken(folder: Path, tmp_path: Path, name: str) -> dict[str, Path]:
    """Flags for one kind of wrong file."""
    clip = tmp_path / "clip"
    shutil.copytree(folder, clip)
    hps = write_hps(tmp_path / "hps.pt")
    state = open_clip_state()
    config = json.loads((clip / "config.json").read_text())
    match name:
        case "no merges":
            (clip / "merges.txt").unlink()
        case "other merges":
            (clip / "merges.txt").write_text("q z\n")
        case "hps as clip":
            clip = hps
        case "clip as hps":
            hps = clip / "model.safetensors"
        case "clip folder as hps":
            hps = clip
        case "transformers clip as hps":
            torch.save({"state_dict": {"vision_model.embeddings.class_embedding": torch.zeros(4)}}, hps)
        case "open_clip as hps":
            torch.save(state, hps)
        case "code in hps":
            torch.save({"state_dict": Path}, hps)
        case "incomplete hps":
            write_hps(hps, {name: tensor for name, tensor in state.items() if name != "ln_final.bias"})
        case "repeated numbers":
            write_hps(hps, state | {"visual.proj": torch.zeros(1).expand(24, 10**7)})
        case "other vocabulary":
            write_hps(hps, state | {"token_embedding.weight": torch.zeros(7, 16)})
        case "no clip":
            (clip / "config.json").write_text(json.dumps({"model_type": "bert"}))
        case "huge config":
            config["vision_config"]["num_hidden_layers"] = 10**9
            (clip / "config.json").write_text(json.dumps(config))
        case "another config":
            config["vision_config"]["intermediate_size"] = 64
            (clip / "config.json").write_text(json.dumps(config))
        case "damaged weights":
            (clip / "model.safetensors").write_bytes(b"x" * 100)
        case "wrong path":
            clip = tmp_path / "nowhere"
        case "wrong file":
            hps = tmp_path / "nowhere.pt"
    return {"--ral.clip-path": clip, "--ral.hps-path": hps}


BROKEN = {
    "no merges": r"has no merges\.txt: give the folder of a CLIP model, with config\.json",
    "other merges": r"does not belong to vocab\.json: the merge 'q z'",
    "hps as clip": r"hps\.pt is a file: give the folder of a CLIP model.*an HPS file goes to ral\.hps_path",
    "clip as hps": r"is not HPS_v2\.1_compressed\.pt: it is a safetensors file, such as CLIP's",
    "clip folder as hps": r"ral\.hps_path .* is a folder: give HPS_v2\.1_compressed\.pt",
    "transformers clip as hps": "it holds a CLIP model of transformers",
    "open_clip as hps": "it holds a CLIP model",
    "code in hps": "it is no file of plain tensors",
    "incomplete hps": r"lacks the tensor text_model\.final_layer_norm\.bias",
    "repeated numbers": "its tensors are larger than the file",
    "other vocabulary": "has 518 tokens, but .* has 7: give its own",
    "no clip": "is no CLIP model's .model_type 'bert'.",
    "huge config": "layers of the vision tower is 1000000000: 1 to 1000 fits",
    "another config": r"fc1\.weight is \(48, 24\), the model's sizes say \(64, 24\)",
    "damaged weights": "is damaged or not a safetensors file",
    "wrong path": r"nowhere does not exist: give the folder of a CLIP model",
    "wrong file": r"nowhere\.pt does not exist: give HPS_v2\.1_compressed\.pt",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_file_is_one_line_before_stage_1(folder: Path, tmp_path: Path, capsys: Any, name: str) -> None:
    flags = [str(word) for pair in broken(folder, tmp_path, name).items() for word in pair]
    weights = ["--ral.reward-weights", "clip", "1", "hps", "1"]
    assert train_main(["--preset", "smoke", "--runs", str(tmp_path / "runs"), "--name", "x", *weights, *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and re.search(BROKEN[name], error), error
    assert not (tmp_path / "runs" / "x").exists(), "nothing half-written"


def test_what_is_not_given_or_not_installed_is_one_line(folder: Path, tmp_path: Path, capsys: Any, monkeypatch) -> None:
    base = ["--preset", "smoke", "--runs", str(tmp_path), "--name", "x", "--ral.reward-weights"]
    given = ["--ral.clip-path", str(folder)]
    wanted = [
        ([*base, "clip", "1"], "the reward clip needs ral.clip_path: give --ral.clip-path"),
        ([*base, "hps", "1", *given], "the reward hps needs ral.hps_path: give --ral.hps-path"),
        ([*base, "clip", "1", *given, "--ral.prompt", "a {thing}"], "ral.prompt is 'a {thing}': give a text"),
        ([*base, "clip", "1", *given, "--ral.reward-options", "colour", "3"], "names colour, but none of the rewards"),
        ([*base, "clip", "1", *given, "--ral.reward-options", "prompt", "x"], "names prompt, give ral.prompt"),
    ]
    for words, message in wanted:
        assert train_main(words) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and len(error.splitlines()) == 1
    monkeypatch.setattr("ral_gym.commands.extras._is_installed", lambda name: name != "transformers")
    assert train_main([*base, "clip", "1", *given]) == 2
    assert 'the reward clip needs transformers, not installed: pip install "ral-gym[clip]"' in capsys.readouterr().err


# Training -------------------------------------------------------------------------------------------------------------


def start(base: Path, runs: Path, *flags: Any, updates: int = 2) -> int:
    shutil.copy(base / "prior.safetensors", base / "prior_ema.safetensors")
    shared = ["--start-from", str(base), "--runs", str(runs), "--name", "own", "--quiet", "--stages", "ral"]
    return train_main([*shared, "--ral.n-updates", str(updates), "--ral.n-envs", "8", *map(str, flags)])


def curves(run: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == "ral"][-1]


def with_weights(folder: Path, hps: Path) -> list[Any]:
    files = ["--ral.clip-path", folder, "--ral.hps-path", hps, "--ral.reset-mode", "full"]
    return [*files, "--ral.reward-weights", "critic", "1", "loo_fd", "1", "clip", "0.5", "hps", "0.5"]


def test_a_run_with_classes_has_a_curve_of_each_term_and_goes_on(folder, hps, tmp_path, capsys) -> None:
    base = make_class_run(tmp_path / "base")
    flags = with_weights(folder, hps)
    assert start(base, tmp_path, *flags) == 0
    run = tmp_path / "own"
    last = curves(run)
    for name in ("critic", "loo_fd", "clip", "hps"):
        assert last[f"reward/{name}_std"] > 0, name
    assert -1 < last["reward/clip_mean"] != last["reward/hps_mean"] < 1
    digests = json.loads((run / "rewards.json").read_text())
    assert set(digests) == {"clip_path", "hps_path"}
    assert digests["clip_path"]["model.safetensors"]["bytes"] == os.path.getsize(folder / "model.safetensors")
    tensors = [name for file in run.glob("**/*.safetensors") for name in load_tensors(file)[0]]
    assert tensors and not any("vision" in name for name in tensors), "the networks are not saved"
    # The same files elsewhere are the same reward; others are not.
    (run / "policy.safetensors").unlink()
    moved = shutil.copytree(folder, tmp_path / "moved")
    config = json.loads((run / "config.json").read_text())
    config["ral"]["clip_path"] = str(moved)
    (run / "config.json").write_text(json.dumps(config))

    def resume() -> None:
        arguments = TrainArguments(read_config(run), name="own", runs=str(tmp_path), device="cpu", quiet=True)
        arguments.stages = ("ral",)
        train(arguments, Console(quiet=True))

    resume()
    assert (run / "policy.safetensors").exists()
    (run / "policy.safetensors").unlink()
    write_clip(moved, seed=7)
    with pytest.raises(RunError, match=r"another file as ral\.clip_path \(model\.safetensors is not that of rewards"):
        resume()


def test_without_labels_the_prompt_must_not_name_a_class(folder: Path, tmp_path: Path, capsys: Any) -> None:
    base = make_tiny_run(tmp_path / "base")
    flags = ["--ral.clip-path", folder, "--ral.reward-weights", "clip", "1"]
    assert start(base, tmp_path, *flags) == 2
    error = capsys.readouterr().err.strip()
    assert "but the images have no labels to name: give a prompt without {name}" in error
    assert len(error.splitlines()) == 1
    assert start(base, tmp_path / "other", *flags, "--ral.prompt", "a cat") == 0
    assert curves(tmp_path / "other" / "own")["reward/clip_std"] > 0


def test_the_example_of_an_aesthetic_head(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples" / "extending"))
    monkeypatch.setattr(registry, "_allowed", set())
    monkeypatch.setattr(REWARDS, "_parts", dict(REWARDS._parts))
    head = nn.Sequential(nn.Linear(SPACE, 4), nn.ReLU(), nn.Linear(4, 1))
    names = zip(("0.weight", "0.bias", "1.weight", "1.bias"), head.state_dict().values(), strict=True)
    save_file(dict(names), tmp_path / "head.safetensors")
    flags = ["--plugin", "own_aesthetic:Aesthetic", "--ral.clip-path", folder]
    flags += ["--ral.reward-options", "head_path", tmp_path / "head.safetensors"]
    base = make_tiny_run(tmp_path / "base")
    assert start(base, tmp_path, *flags, "--ral.reward-weights", "own_aesthetic:Aesthetic", "1") == 0
    assert curves(tmp_path / "own")["reward/own_aesthetic:Aesthetic_std"] > 0
    reward = REWARDS.get("own_aesthetic:Aesthetic")(str(folder), str(tmp_path / "head.safetensors"))
    images = some_images()
    expected: Tensor = head(ImageText(folder).images(images)).squeeze(1)
    assert (reward(images) - expected).abs().max() < 1e-6
    with pytest.raises(ConfigError, match=f"no head from {SPACE} features"):
        save_file({"0.weight": torch.zeros(1, 3), "0.bias": torch.zeros(1)}, tmp_path / "bad.safetensors")
        REWARDS.get("own_aesthetic:Aesthetic")(str(folder), str(tmp_path / "bad.safetensors"))
    assert main(["sample", str(tmp_path / "own"), "--n", "2", "--output", str(tmp_path / "grid.png")]) == 0
