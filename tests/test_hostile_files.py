"""Run folders from strangers: whatever is in a file, it is read or refused in one line; no code, no hang, no memory."""

import functools
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ral_gym.agents.policy import PriorWeights
from ral_gym.commands.cli import main
from ral_gym.commands.ending import run_command
from ral_gym.commands.generate import open_run
from ral_gym.commands.verify import Difference, _table
from ral_gym.errors import RalGymError, RunError
from ral_gym.metrics.table import results_table
from ral_gym.priors.base import save_prior
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.rewards.critic import PatchCritic
from ral_gym.rewards.score_map import ScoreNormalizer
from ral_gym.runs.results import check_rows, load_results
from ral_gym.runs.run import Run, read_config
from ral_gym.runs.storage import load_json, load_metadata, load_module, save_json
from ral_gym.stages.levels import load_generator, load_vqvae
from ral_gym.tokenizers.code_set import CodeSet
from tests.damage import JSON, WEIGHTS, Damage, damages, edit_tensors, same
from tests.tiny import make_tiny_run

MEMORY = 12 * 2**30
"""Bytes of address space: none of these files may take more, whatever they declare."""


@contextmanager
def bounded_memory() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@functools.cache
def config_of(folder: Path) -> Any:
    return read_config(folder)


def read(folder: Path, file: str, run: Run, grid: Any) -> None:
    """What the commands do first with this file."""
    path = folder / file
    name = path.stem
    if file == "config.json":
        open_run(str(folder))
    elif file == "results.json":
        results_table(load_results(path))
    elif file == "seconds.json":
        run.seconds()
    elif file == "checkpoints/evaluation.json":
        begun = load_json(path)
        check_rows(begun.get("rows") if isinstance(begun, dict) else begun, path)
    elif file == "metrics.jsonl":
        run.metrics("ral")
        run.forget_after("ral", 1)
    elif name == "codes":
        CodeSet.load(path, grid)
    elif name == "vqvae":
        load_vqvae(run)
    elif name == "critic":
        load_module(path, PatchCritic)
        ScoreNormalizer.from_file(path, load_metadata(path))
    elif name == "ral":
        run.load_checkpoint("ral")
    else:
        load_generator(run, name)


def test_every_damage_to_every_file_is_read_or_refused_in_one_line(tmp_path: Path, smoke_run: Path) -> None:
    """More than 250 damaged folders; what the kinds of damage are, `damage.py` says."""
    base, flag = shutil.copytree(smoke_run, tmp_path / "run"), tmp_path / "executed"
    config = config_of(base)
    run, grid = Run(base, config), load_vqvae(Run(base, config)).grid
    refused = {"": 0}
    with bounded_memory():
        for damage in damages(0, flag):
            path, kept = base / damage.file, (smoke_run / damage.file).read_bytes()
            damage.apply(path)
            try:
                read(base, damage.file, run, grid)
            except RalGymError as error:
                message = str(error)
                assert message.isprintable() and len(message) <= 2000 and path.name in message, (str(damage), message)
                refused[damage.file] = refused.get(damage.file, 0) + 1
            except OSError as error:  # the command line makes a line of it
                assert error.filename, str(damage)
            finally:
                _restore(path, kept)
            assert not flag.exists(), str(damage)
    assert all(refused[file] >= 5 for file in JSON), refused
    assert all(refused[f"{name}.safetensors"] >= 12 for name in WEIGHTS), refused


def _restore(path: Path, content: bytes) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    path.write_bytes(content)


def cases() -> list[Damage]:
    """A few for the whole commands, one of each file."""
    found = damages(1, Path("/nonexistent/flag"))
    kinds = {"config.json": "a value", "results.json": "a pipe", "metrics.jsonl": "lines"}
    return [
        next(one for one in found if one.file == file and one.kind.startswith(kind)) for file, kind in kinds.items()
    ]


@pytest.mark.parametrize("damage", cases(), ids=str)
def test_a_command_on_a_damaged_run_ends_with_0_or_one_line(tmp_path, smoke_run, capsys, damage) -> None:
    folder = shutil.copytree(smoke_run, tmp_path / "run")
    damage.apply(folder / damage.file)
    code = main(["report", str(folder), "--output", str(tmp_path / "page.html")])
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert (code, len(errors)) in [(0, 0), (2, 1)] and all(line.startswith("error: ") for line in errors)


@pytest.mark.parametrize("name", ["vqvae", "prior", "policy_ema", "critic"])
def test_weights_that_are_nan_are_refused_with_file_and_tensor(tmp_path, smoke_run, name) -> None:
    folder = shutil.copytree(smoke_run, tmp_path / "run")
    path = folder / f"{name}.safetensors"
    first = []

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        first.append(next(key for key, tensor in tensors.items() if tensor.is_floating_point()))
        return {**tensors, first[0]: tensors[first[0]] * float("nan")}

    edit_tensors(path, spoil, same)
    run = Run(folder, config_of(folder))
    with pytest.raises(RunError) as caught:
        read(folder, f"{name}.safetensors", run, None)
    assert f"{path}: tensor {first[0]} has NaN or infinite numbers" in str(caught.value)


def test_a_giant_is_refused_before_it_is_built(tmp_path, smoke_run, monkeypatch) -> None:
    folder = shutil.copytree(smoke_run, tmp_path / "run")
    path = folder / "prior.safetensors"
    edit_tensors(path, same, lambda facts: {**facts, "config": {**facts["config"], "layers": 10**7}})
    with pytest.raises(RunError, match="the arguments ask for more than the"):
        load_generator(Run(folder, config_of(folder)), "prior")
    edit_tensors(path, same, lambda facts: {**facts, "config": {**facts["config"], "layers": 10**9}})
    with pytest.raises(RunError, match="an argument above 16,777,216"):
        load_generator(Run(folder, config_of(folder)), "prior")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {**t, "train": t["train"] + 1000},
        lambda t: {**t, "train": t["train"] - 1000},
        lambda t: {**t, "test": t["test"].int()},
        lambda t: {**t, "train": t["train"][:0]},
        lambda t: {**t, "train": t["train"].flatten()},
        lambda t: {"train": t["train"]},
    ],
)
def test_codes_out_of_range_are_refused(tmp_path, smoke_run, change: Callable[[Any], Any]) -> None:
    shutil.copy(smoke_run / "codes.safetensors", tmp_path)
    grid = load_vqvae(Run(smoke_run, config_of(smoke_run))).grid
    CodeSet.load(tmp_path / "codes.safetensors", grid)
    edit_tensors(tmp_path / "codes.safetensors", change, same)
    with pytest.raises(RunError, match=r"codes\.safetensors"):
        CodeSet.load(tmp_path / "codes.safetensors", grid)


def test_text_from_files_reaches_no_terminal_raw(tmp_path, smoke_run, capsys) -> None:
    folder = shutil.copytree(smoke_run, tmp_path / "r\x1b]0;gotcha\x07\x1b[31mun")
    assert main(["sample", str(folder), "--n", "2"]) == 0
    assert main(["sample", str(folder), "--n", "2", "--generator", "prior", "--output", f"{folder}/\x1b[2J.png"]) == 0
    assert main(["evaluate", str(folder)]) == 0
    (folder / "prior.safetensors").unlink()
    assert main(["sample", str(folder), "--generator", "prior"]) == 2
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err and "\x07" not in captured.out + captured.err
    assert r"\x1b]0;gotcha\x07" in captured.out and r"\x1b]0;gotcha\x07" in captured.err


@pytest.mark.parametrize(
    ("number", "words"),
    [
        ("1" + 400 * "0", "an integer of 401 digits"),
        (str(10**30), "fd is an integer of 100 bits"),
        ("true", "not a number"),
    ],
)
def test_a_distance_that_no_floating_point_number_holds_is_one_line(tmp_path, capsys, number, words) -> None:
    folder = make_tiny_run(tmp_path / "run")
    text = '{"rows": {"ral": {"fd": 7}}, "sweeps": {}, "checkpoints": [], "n_samples": 2, "seed": 0}'
    (folder / "results.json").write_text(text.replace("7", number))
    assert main(["report", str(folder), "--output", str(tmp_path / "page.html")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "results.json" in error and words in error


def test_names_in_a_table_reach_no_terminal_raw_and_are_no_markup(tmp_path, smoke_run, capsys) -> None:
    folder = shutil.copytree(smoke_run, tmp_path / "run")
    results = load_json(folder / "results.json")
    figures = dict(results["rows"]["ral"], **{"own\x1b[2J": 1.0})
    results["rows"] |= {name: figures for name in ("\x1b]0;gotcha\x07", "[/bold]", "[red]plain", "two\rlines")}
    results |= {"extractor": "\x9b31m", "metrics": {"own\x1b[2J": "words\x1b[31m"}}
    save_json(folder / "results.json", results)
    assert main(["evaluate", str(folder)]) == 0
    assert main(["report", str(folder), "--output", str(tmp_path / "page.html")]) == 0
    differences = [Difference("\x1b]0;row\x07[/b]", "\x1b[2J", "\x1b[31m", 1.0)]
    assert run_command(lambda argv, console: console.print(_table(differences)), []) == 0
    shown = capsys.readouterr().out
    assert not set(shown) & set("\x1b\x07\r\x9b")
    assert all(text in shown for text in (r"\x1b]0;gotcha\x07", "[/bold]", "[red]plain", r"\x9b31m", r"words\x1b[31m"))


def test_a_prior_of_another_grid_is_refused(tmp_path, smoke_run, capsys) -> None:
    folder = shutil.copytree(smoke_run, tmp_path / "run")
    save_prior(folder / "prior.safetensors", PixelCNN(8, 3, 3, hidden_units=8, residual_units=8, layers=1))
    assert main(["sample", str(folder), "--generator", "prior"]) == 2
    assert "prior.safetensors draws CodeGrid(height=3, width=3, codebook_size=8" in capsys.readouterr().err


def test_a_policy_does_not_start_from_a_damaged_file(tmp_path, smoke_run) -> None:
    path = tmp_path / "prior.safetensors"
    shutil.copy(smoke_run / "prior.safetensors", path)
    PriorWeights.of(path)
    edit_tensors(path, lambda t: {name: tensor * float("inf") for name, tensor in t.items()}, same)
    with pytest.raises(RunError, match="has NaN or infinite numbers"):
        PriorWeights.of(path)
    edit_tensors(path, same, lambda facts: {})
    with pytest.raises(RunError, match=r"prior\.safetensors"):
        PriorWeights.of(path)
