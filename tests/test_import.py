"""`ral-gym import`: files of the released structure become runs that draw what their networks draw."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ral_gym.commands.cli import main
from ral_gym.data.images import load_images
from ral_gym.priors.sampler import CachedSampler
from ral_gym.runs.run import Run, read_config
from ral_gym.runs.storage import load_metadata
from ral_gym.stages.levels import load_generator, load_vqvae
from ral_gym.tokenizers.code_set import CodeSet, encode_images
from tests.released_files import (
    MODEL_YAML,
    SIDE,
    K,
    N,
    gpt,
    llamagen_files,
    llamagen_gpt,
    llamagen_vq,
    taming_file,
    taming_state,
    tokenizer,
    transformer,
)

LABELS = torch.arange(N)


def sequences() -> Tensor:
    codes = torch.randint(K, (N, 16), generator=torch.Generator().manual_seed(1))
    return torch.cat([codes, K + 2 + LABELS[:, None]], 1)


def imported(argv: list[str], tmp_path: Path, *more: str) -> Run:
    assert main([*argv, "--runs", str(tmp_path / "runs"), "--name", "mine", *more]) == 0
    path = tmp_path / "runs" / "mine"
    return Run(path, read_config(path))


def assert_same_network(found: Any, expected: Any) -> None:
    assert torch.equal(found(sequences()), expected(sequences()))
    start = {"codes": sequences(), "generator": torch.Generator().manual_seed(0)}
    again = {"codes": sequences(), "generator": torch.Generator().manual_seed(0)}
    expected.attention = "fused"
    assert torch.equal(CachedSampler(found).sample(**start)[0], CachedSampler(expected).sample(**again)[0])


def assert_same_tokenizer(found: Any, expected: Any) -> None:
    images = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    (codes,) = found.encode(images)
    assert torch.equal(codes, expected.encode(images)[0]) and len(codes.unique()) > 4
    torch.testing.assert_close(found.decode(codes), expected.decode(codes), rtol=0, atol=2e-5)


# --------------------------------------------------------------------------------------------------------- LlamaGen


def test_llamagen_files_become_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = imported(llamagen_files(tmp_path), tmp_path)
    prior, expected = load_generator(run, "prior"), transformer()
    expected.attention = "fused"
    assert_same_network(prior, expected)
    assert_same_network(load_generator(run, "prior_ema"), expected)
    assert_same_tokenizer(load_vqvae(run), tokenizer())
    assert sorted(path.name for path in run.path.iterdir()) == [
        *("config.json", "prior.safetensors", "prior_ema.safetensors", "vqvae.safetensors")
    ]
    said = capsys.readouterr().out
    assert "c2i_tiny.pt: 2 layers, 2 heads, 128 units" in said and f"{N} classes" in said
    assert "vq_tiny.pt: 32x32 pixels as 4x4 codes of 24" in said


def test_the_settings_are_read_from_the_shapes(tmp_path: Path) -> None:
    config = imported(llamagen_files(tmp_path), tmp_path).config
    assert (config.prior.kind, config.prior.layers, config.prior.attention_heads) == ("transformer", 2, 2)
    assert config.prior.hidden_units == 128 and config.prior.options["multiple_of"] == 32
    assert (config.vqvae.kind, config.vqvae.codebook_size, config.vqvae.codebook_dim) == ("vqgan", K, 6)
    assert config.vqvae.options["multipliers"] == "1,1,2,2" and config.vqvae.options["codebook_l2_norm"] is True
    assert (config.data.image_size, config.data.grey) == (SIDE, False)


def test_files_name_their_source_and_classes(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"class {n}" for n in range(N)) + "\n")
    run = imported(llamagen_files(tmp_path), tmp_path, "--class-names", str(names))
    source = load_metadata(run.file("prior.safetensors"))["source"]
    content = (tmp_path / "c2i_tiny.pt").read_bytes()
    assert source == {"file": "c2i_tiny.pt", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert load_metadata(run.file("vqvae.safetensors"))["source"]["file"] == "vq_tiny.pt"
    assert load_metadata(run.file("prior.safetensors"))["class_names"] == [f"class {n}" for n in range(N)]


def test_code_vectors_have_length_1(tmp_path: Path) -> None:
    book = load_vqvae(imported(llamagen_files(tmp_path), tmp_path)).quantize.embedding.weight  # type: ignore[attr-defined]
    torch.testing.assert_close(book.norm(dim=1), torch.ones(K))


GPT_WRAPPERS: dict[str, Callable[[OrderedDict[str, Tensor]], Any]] = {
    "DDP": lambda state: {"model": state, "optimizer": {"state": {}}, "steps": 5, "args": argparse.Namespace(lr=1e-4)},
    "DeepSpeed": lambda state: {"module": state, "buffer_names": [], "ds_version": "0.14"},
    "FSDP": lambda state: state,
    "a wrapper's names": lambda state: {"model": {f"module._orig_mod.{name}": w for name, w in state.items()}},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrapper", GPT_WRAPPERS)
def test_every_wrapper_of_the_gpt(wrapper: str, legacy: bool, tmp_path: Path) -> None:
    argv = llamagen_files(tmp_path)
    content = GPT_WRAPPERS[wrapper](llamagen_gpt())
    torch.save(content, tmp_path / "c2i_tiny.pt", _use_new_zipfile_serialization=not legacy)
    prior, expected = load_generator(imported(argv, tmp_path), "prior"), transformer()
    expected.attention = "fused"
    assert torch.equal(prior(sequences()), expected(sequences()))


def test_the_average_of_a_tokenizer_is_preferred(tmp_path: Path) -> None:
    argv, other = llamagen_files(tmp_path), {name: w + 1 for name, w in llamagen_vq().items()}
    torch.save({"model": other, "ema": llamagen_vq()}, tmp_path / "vq_tiny.pt")
    assert_same_tokenizer(load_vqvae(imported(argv, tmp_path)), tokenizer())


# ----------------------------------------------------------------------------------------------------------- taming


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_lightning_file_of_taming_becomes_a_run(legacy: bool, tmp_path: Path) -> None:
    argv = taming_file(tmp_path / "last.ckpt", taming_state(), _use_new_zipfile_serialization=not legacy)
    (tmp_path / "model.yaml").write_text(MODEL_YAML)
    run = imported(argv, tmp_path, "--config", str(tmp_path / "model.yaml"))
    prior, expected = load_generator(run, "prior"), gpt()
    assert prior.config["classes"] == N and run.config.prior.kind == "gpt"
    expected.attention = "fused"
    assert_same_network(prior, expected)
    assert_same_tokenizer(load_vqvae(run), tokenizer(unit=False))


def test_an_unconditional_model_of_taming_starts_from_its_token(tmp_path: Path) -> None:
    argv = taming_file(tmp_path / "last.ckpt", taming_state(gpt(classes=0)))
    text = MODEL_YAML.replace("cond_stage_key: class_label", "unconditional: true\n    sos_token: 7")
    (tmp_path / "model.yaml").write_text(text)
    prior = load_generator(imported(argv, tmp_path, "--config", str(tmp_path / "model.yaml")), "prior")
    assert torch.equal(prior.cls_embedding.embedding_table.weight, gpt(classes=0).tok_embeddings.weight[7:8])
    assert prior.classes == 0


def test_shapes_and_classes_are_enough(tmp_path: Path) -> None:
    run = imported(taming_file(tmp_path / "last.ckpt", taming_state()), tmp_path, "--classes", str(N), "--heads", "2")
    expected = gpt()
    expected.attention = "fused"
    assert_same_network(load_generator(run, "prior"), expected)


# ----------------------------------------------------------------------------------------------------------- images


def write_classes(folder: Path, classes: int) -> list[str]:
    """Twelve pictures of each class in a folder of its own, and the arguments that name them."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"n{label:03}").mkdir(parents=True)
        for number in range(12):
            pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"n{label:03}" / f"{number}.png")
    return ["--data", f"folder:{folder}"]


def test_images_are_encoded_with_their_classes(tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text(json.dumps([f"class {n}" for n in range(N)]))
    names = ["--class-names", str(tmp_path / "names.json")]
    run = imported(llamagen_files(tmp_path), tmp_path, *write_classes(tmp_path / "data", N), *names)
    codes = CodeSet.load(run.file("codes.safetensors"), load_vqvae(run).grid)
    assert codes.classes == tuple(f"class {n}" for n in range(N)) and codes.labels is not None
    assert len(codes.train) + len(codes.test) == 12 * N and set(codes.labels.train.tolist()) == set(range(N))
    images = load_images(run.config.data, progress=False)
    assert np.array_equal(codes.train, encode_images(load_vqvae(run), images.train, progress=False))
    assert run.config.data.has_images and read_config(run.path) == run.config


def test_images_of_other_classes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = write_classes(tmp_path / "data", N - 1)
    assert main([*llamagen_files(tmp_path), "--runs", str(tmp_path / "runs"), "--name", "mine", *more]) == 2
    assert f"the images have {N - 1} classes, but the model draws images of {N}: give --data" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_an_unconditional_model_takes_images_without_their_classes(tmp_path: Path) -> None:
    argv = taming_file(tmp_path / "last.ckpt", taming_state(gpt(classes=0)))
    run = imported(argv, tmp_path, "--classes", "0", *write_classes(tmp_path / "data", 3))
    assert CodeSet.load(run.file("codes.safetensors"), load_vqvae(run).grid).labels is None


@pytest.mark.commands
@pytest.mark.parametrize("project", ["unconditional", "llamagen"])
def test_every_stage_goes_on_from_an_import_with_images(project: str, tmp_path: Path) -> None:
    data = write_classes(tmp_path / "data", N)
    if project == "llamagen":
        argv = llamagen_files(tmp_path)
    else:
        argv = [*taming_file(tmp_path / "last.ckpt", taming_state(gpt(classes=0))), "--classes", "0"]
    source = imported(argv, tmp_path, *data)
    short = ["--ral.n-envs", "8", "--ral.n-updates", "2", "--critic.warmup-steps", "2", "--critic.n-critic", "1"]
    short += ["--critic.hidden-units", "8", "--evaluation.n-samples", "24", "--evaluation.extractor", "encoder"]
    argv = ["train", "--start-from", str(source.path), "--name", "next", "--runs", str(tmp_path / "runs"), "--quiet"]
    assert main([*argv, *short, "--ral.reset-mode", "mixed", "--ral.mle-coef", "0.1"]) == 0
    results = json.loads((tmp_path / "runs" / "next" / "results.json").read_text())
    assert {"mle", "mle_continued", "ral", "reconstruction"} <= results["rows"].keys()
    assert main(["report", str(tmp_path / "runs" / "next")]) == 0
    assert main(["verify", str(tmp_path / "runs" / "next"), "--rows", "mle", "--quiet"]) == 0


@pytest.mark.parametrize("project", ["llamagen", "taming"])
def test_sample_draws_the_classes_in_turn(project: str, tmp_path: Path) -> None:
    """As greedy as a temperature near 0: what full passes of the file's own network find likeliest."""
    if project == "llamagen":
        argv, expected = llamagen_files(tmp_path), transformer()
    else:
        argv = [*taming_file(tmp_path / "last.ckpt", taming_state()), "--classes", str(N), "--heads", "2"]
        expected = gpt()  # type: ignore[assignment]
    run = imported(argv, tmp_path)
    file = tmp_path / "codes.npz"
    assert main(["sample", str(run.path), "--n", str(N + 2), "--temperature", "1e-6", "--codes", str(file)]) == 0
    codes = torch.full((N + 2, 16), K)
    for position in range(16):
        labels = torch.arange(N + 2) % N
        logits = expected(torch.cat([codes, K + 2 + labels[:, None]], 1))[:, position]
        codes[:, position] = logits.argmax(1)
    assert np.array_equal(np.load(file)["codes"], codes.numpy())
    assert len({tuple(row) for row in codes.tolist()}) == N
    assert run.file("samples/sample_prior.png").is_file()


def test_only_a_model_with_a_row_for_no_class_is_guided(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = imported(llamagen_files(tmp_path), tmp_path)
    assert main(["sample", str(run.path), "--n", "2", "--guidance", "2"]) == 0
    argv = taming_file(tmp_path / "last.ckpt", taming_state())
    assert main([*argv, "--classes", str(N), "--runs", str(tmp_path / "runs"), "--name", "taming"]) == 0
    capsys.readouterr()
    assert main(["sample", str(tmp_path / "runs" / "taming"), "--n", "2", "--guidance", "2"]) == 2
    assert 'needs a prior that knows "no class", this GPT has' in capsys.readouterr().err
