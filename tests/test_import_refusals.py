"""`ral-gym import` refuses what does not fit in one line, runs nothing of a file, and leaves nothing half-written."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from ral_gym.commands.cli import main
from tests.released_files import (
    MODEL_YAML,
    K,
    llamagen_files,
    llamagen_gpt,
    llamagen_vq,
    named_class,
    taming_file,
    taming_state,
    tokenizer,
)


def refused(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """The one line, after which there is no trace of a run."""
    capsys.readouterr()
    assert main([*argv, "--runs", str(tmp_path / "runs"), "--name", "mine", *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert not (tmp_path / "runs").exists()
    return line


def changed(tmp_path: Path, gpt: Any = None, vq: Any = None) -> list[str]:
    """The arguments of an import whose file of the GPT or of the tokenizer holds something else."""
    argv = llamagen_files(tmp_path)
    if gpt is not None:
        torch.save({"model": gpt}, tmp_path / "c2i_tiny.pt")
    if vq is not None:
        torch.save({"model": vq}, tmp_path / "vq_tiny.pt")
    return argv


def without(state: OrderedDict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in names}


WO = "layers.1.attention.wo.weight"
REFUSED_GPT: dict[str, tuple[Callable[[], Any], str]] = {
    "text-to-image": (
        lambda: {**llamagen_gpt(), "cls_embedding.cap_proj.fc1.weight": torch.zeros(8, 8)},
        "draws from text (t2i): give a class-conditional checkpoint (c2i_...)",
    ),
    "a tokenizer": (llamagen_vq, "holds a tokenizer: give it as --vq, and LlamaGen's class-conditional GPT"),
    "other codes": (
        lambda: {**llamagen_gpt(), "tok_embeddings.weight": torch.zeros(K + 8, 128)},
        f"draws {K + 8} codes, but the tokenizer has {K}: give the tokenizer it was trained with",
    ),
    "a missing tensor": (
        lambda: without(llamagen_gpt(), WO),
        f"has no tensor {WO}: give the file with LlamaGen's class-conditional GPT (c2i)",
    ),
    "a tensor left over": (
        lambda: {**llamagen_gpt(), "pos_embed": torch.zeros(2), "z": torch.zeros(2)},
        "has tensor pos_embed and 1 more, which LlamaGen's class-conditional GPT (c2i) of this size does not have",
    ),
    "another shape": (
        lambda: {**llamagen_gpt(), WO: torch.zeros(64, 128)},
        f"{WO} has shape (64, 128), but LlamaGen's class-conditional GPT (c2i) of this size has (128, 128)",
    ),
    "NaN": (
        lambda: {**llamagen_gpt(), WO: torch.full((128, 128), torch.nan)},
        f"tensor {WO} has numbers that are not finite",
    ),
    "heads that do not divide": (
        lambda: {**llamagen_gpt(), "tok_embeddings.weight": torch.zeros(K, 100)},
        "has 100 units, which 1 heads do not divide: give --heads",
    ),
    "no weights": (lambda: {"a": 1}, "holds no weights by name: give the file with LlamaGen's class-conditional GPT"),
    "one more dimension": (
        lambda: {**llamagen_gpt(), "tok_embeddings.weight": torch.zeros(2)},
        "tensor tok_embeddings.weight has shape (2,), not 2 dimensions",
    ),
    "tensors of more bytes than the file": (
        lambda: {**llamagen_gpt(), WO: torch.zeros(1).expand(100_000, 1000)},
        "is smaller than its tensors together",
    ),
}


@pytest.mark.parametrize("case", REFUSED_GPT)
def test_a_gpt_that_does_not_fit_is_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, said = REFUSED_GPT[case]
    line = refused(changed(tmp_path, gpt=make()), tmp_path, capsys)
    assert line.startswith(f"error: {tmp_path / 'c2i_tiny.pt'}") and said in line


REFUSED_VQ: dict[str, tuple[Callable[[], Any], str]] = {
    "a GPT": (llamagen_gpt, "holds a GPT: give it as --gpt, and LlamaGen's tokenizer (VQ-16 or VQ-8) as --vq"),
    "taming's": (lambda: dict(tokenizer().state_dict()), "is a VQGAN of taming-transformers"),
    "another network": (lambda: {"weight": torch.zeros(3)}, "has no encoder with levels"),
    "attention elsewhere": (
        lambda: {**llamagen_vq(), "encoder.conv_blocks.0.attn.0.q.weight": torch.zeros(32, 32, 1, 1)},
        "has tensor encoder.conv_blocks.0.attn.0.q.weight, which LlamaGen's tokenizer",
    ),
}


@pytest.mark.parametrize("case", REFUSED_VQ)
def test_a_tokenizer_that_does_not_fit_is_refused(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, said = REFUSED_VQ[case]
    line = refused(changed(tmp_path, vq=make()), tmp_path, capsys)
    assert line.startswith(f"error: {tmp_path / 'vq_tiny.pt'}") and said in line


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--image-size", "36"], "--image-size is 36, but "),
        (["--image-size", "0"], "--image-size is 0: give the side of the images in pixels"),
        (["--heads", "3"], "has 128 units, which 3 heads do not divide"),
        (["--gpt", "nowhere.pt"], "nowhere.pt cannot be read (No such file or directory): give the file with LlamaGen"),
        (["--class-names", "nowhere.txt"], "nowhere.txt cannot be read (No such file or directory): give a"),
        (["--name", "../up"], "--name is '../up'"),
        (["--data", "folder:nowhere"], "nowhere"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = llamagen_files(tmp_path)
    capsys.readouterr()
    assert main([*argv, "--runs", str(tmp_path / "runs"), "--name", "mine", *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and not (tmp_path / "runs").exists()


def test_a_file_named_for_another_side_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = llamagen_files(tmp_path)
    (tmp_path / "c2i_tiny.pt").rename(tmp_path / "c2i_L_384.pt")
    line = refused(argv, tmp_path, capsys, "--gpt", str(tmp_path / "c2i_L_384.pt"))
    assert line.endswith("but c2i_L_384.pt is named for 384 pixels: give --image-size 384")


class Runs:
    """Unpickled, it would make a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_code_in_a_file_is_not_run(legacy: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv, traces = llamagen_files(tmp_path), [tmp_path / "ran", tmp_path / "ran_too"]
    content = {"model": llamagen_gpt(), "args": Runs(traces[0])}
    torch.save(content, tmp_path / "c2i_tiny.pt", _use_new_zipfile_serialization=not legacy)
    refused(argv, tmp_path, capsys)
    (tmp_path / "c2i_tiny.pt").write_bytes(pickle.dumps({"x": Runs(traces[1])}))
    refused(argv, tmp_path, capsys)
    assert not any(trace.exists() for trace in traces)
    torch.save({"model": llamagen_gpt(), "hook": named_class("helpful.things", "Hook")}, tmp_path / "c2i_tiny.pt")
    line = refused(argv, tmp_path, capsys)
    assert "asks for helpful.things.Hook, which no such checkpoint needs: nothing of it was run" in line


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_truncated_file_is_refused(
    share: float, legacy: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, file = llamagen_files(tmp_path), tmp_path / "c2i_tiny.pt"
    torch.save({"model": llamagen_gpt()}, file, _use_new_zipfile_serialization=not legacy)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    line = refused(argv, tmp_path, capsys)
    assert line.startswith(f"error: {file} is damaged or not a checkpoint of PyTorch (")


def test_compressed_parts_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv, file = llamagen_files(tmp_path), tmp_path / "c2i_tiny.pt"
    with zipfile.ZipFile(file) as old:
        parts = {part.filename: old.read(part) for part in old.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in parts.items():
            new.writestr(name, content)
    assert "(compressed parts)" in refused(argv, tmp_path, capsys)


def test_an_existing_folder_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv, there = llamagen_files(tmp_path), tmp_path / "runs" / "mine"
    there.mkdir(parents=True)
    assert main([*argv, "--runs", str(tmp_path / "runs"), "--name", "mine"]) == 2
    assert capsys.readouterr().err == f"error: {there} exists: choose another --name, or remove it\n"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mine"] and not any(there.iterdir())


def test_an_import_that_fails_half_way_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, file: Any, metadata: Any) -> None:
        Path(file).write_bytes(b"half")
        if "prior" in str(file):
            raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    line = refused(llamagen_files(tmp_path), tmp_path, capsys)
    assert "No space left on device" in line and "free some space" in line


REFUSED_TAMING: dict[str, tuple[Callable[[], Any], list[str], str]] = {
    "a condition that is an image": (
        lambda: {**taming_state(), "cond_stage_model.encoder.conv_in.weight": torch.zeros(2)},
        ["--classes", "5"],
        "draws from another image or a map: give a class-conditional or unconditional one",
    ),
    "a VQGAN alone": (lambda: dict(tokenizer().state_dict()), ["--classes", "5"], "holds a tokenizer alone: give"),
    "no VQGAN": (
        lambda: {name: w for name, w in taming_state().items() if name.startswith("transformer.")},
        ["--classes", "5"],
        "has no encoder with levels: give the file with taming's transformer and its VQGAN",
    ),
    "fewer positions than codes": (
        lambda: taming_state(block_size=12),
        ["--classes", "5"],
        "has learned 12 positions, but images of this size have 16 codes: give a smaller --image-size",
    ),
    "more classes than codes": (taming_state, ["--classes", "25"], "25 classes for 24 codes"),
    "neither a configuration nor classes": (taming_state, [], "give --config model.yaml, or --classes N"),
    "a missing projection": (
        lambda: without(taming_state(), "transformer.blocks.1.attn.key.bias"),
        ["--classes", "5"],
        "has no tensor transformer.blocks.1.attn.key.bias",
    ),
}


@pytest.mark.parametrize("case", REFUSED_TAMING)
def test_a_file_of_taming_that_does_not_fit_is_refused(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, more, said = REFUSED_TAMING[case]
    assert said in refused(taming_file(tmp_path / "last.ckpt", make()), tmp_path, capsys, *more)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("taming.modules.util.Labelator", "taming.modules.misc.coord.CoordStage", "the model draws from taming"),
        ("n_head: 2", "n_head: two", "n_head is two: a whole number of 1 or more is needed"),
        ("transformer_config", "other", "is not a model.yaml of taming's transformer"),
        ("cond_stage_key: class_label", "permuter_config: {target: a.Spiral}", "the codes are not in raster order"),
        ("model:", "!!python/object/apply:os.system [true]\nmodel:", "is not a model.yaml"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    old: str, new: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.yaml").write_text(MODEL_YAML.replace(old, new))
    argv = taming_file(tmp_path / "last.ckpt", taming_state())
    assert said in refused(argv, tmp_path, capsys, "--config", str(tmp_path / "model.yaml"))
