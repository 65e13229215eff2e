"""Files: whole or not at all, never unpickled, and every way to be damaged is one clear line."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ral_gym.errors import RunError
from ral_gym.rewards.critic import PatchCritic
from ral_gym.runs.storage import (
    config_arguments,
    differences,
    load_json,
    load_module,
    load_tensors,
    pack_state,
    save_json,
    save_module,
    save_tensors,
    unpack_state,
    weights_of,
    write_atomic,
    write_text,
)
from ral_gym.tokenizers.vqvae import VQVAE


def critic(hidden_units: int = 4) -> PatchCritic:
    return PatchCritic(16, 1, hidden_units=hidden_units, layers=2)


def message_of(path: Path, cls: type[nn.Module] = PatchCritic, **arguments: Any) -> str:
    with pytest.raises(RunError) as caught:
        load_module(path, cls, **arguments)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


# Atomic writes ------------------------------------------------------------------------------------------------------


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("broken", ["os.replace", "os.fsync", "pathlib.Path.write_bytes"])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, broken) -> None:
    path = tmp_path / "weights.safetensors"
    save_tensors(path, {"a": torch.ones(3)}, {"n": 1})
    before = path.read_bytes()
    monkeypatch.setattr(broken, full_disk)
    with pytest.raises(RunError, match=r"cannot write .*weights\.safetensors: No space left.*free some space"):
        save_tensors(path, {"a": torch.zeros(3)}, {"n": 2})
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, error) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def half(temporary: Path) -> None:
        temporary.write_text("ne")
        raise error

    with pytest.raises(error):
        write_atomic(path, half)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_new_file_is_complete_before_it_takes_the_place_of_the_old_one(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.json"
    save_json(path, {"n": 1})
    replace, seen = os.replace, []

    def look(source: Path, target: Path) -> None:
        seen.append((json.loads(Path(source).read_text()), json.loads(Path(target).read_text())))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    save_json(path, {"n": 2})
    assert seen == [({"n": 2}, {"n": 1})] and load_json(path) == {"n": 2}


def test_a_place_that_cannot_be_written_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match=r"cannot write .*file/run/a\.json: .*choose a folder you can write to"):
        save_json(tmp_path / "file" / "run" / "a.json", {})
    with pytest.raises(RunError, match=r"cannot write /proc/nowhere/a\.json"):
        save_json(Path("/proc/nowhere/a.json"), {})


def test_missing_and_damaged_json_is_named(tmp_path) -> None:
    with pytest.raises(RunError, match=r"a\.json is missing"):
        load_json(tmp_path / "a.json")
    (tmp_path / "b.json").write_text('{"n": ')
    with pytest.raises(RunError, match=r"b\.json cannot be read .*; remove it"):
        load_json(tmp_path / "b.json")
    (tmp_path / "c.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunError, match=r"c\.json cannot be read"):
        load_json(tmp_path / "c.json")


# Weights ------------------------------------------------------------------------------------------------------------


def test_a_module_comes_back_as_it_was_ready_to_use(tmp_path) -> None:
    module, path = critic(), tmp_path / "critic.safetensors"
    save_module(path, module, normalization="max_abs")
    again = load_module(path, PatchCritic)
    images = torch.rand(2, 1, 16, 16)
    assert torch.equal(again(images), module(images))
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert load_tensors(path)[1]["normalization"] == "max_abs"


def test_loading_draws_no_random_numbers(tmp_path) -> None:
    save_module(tmp_path / "critic.safetensors", critic())
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_module(tmp_path / "critic.safetensors", PatchCritic)
    assert torch.equal(torch.rand(3), expected)


def test_other_weights_of_the_same_module_can_be_saved(tmp_path) -> None:
    module, path = critic(), tmp_path / "critic.safetensors"
    average = {name: torch.full_like(tensor, 0.5) for name, tensor in weights_of(module).items()}
    save_module(path, module, average)
    assert all(bool((tensor == 0.5).all()) for tensor in load_module(path, PatchCritic).state_dict().values())


def test_weights_of_is_a_copy() -> None:
    module = critic()
    weights = weights_of(module)
    with torch.no_grad():
        module.head.weight.add_(1)
    assert not torch.equal(weights["head.weight"], module.head.weight)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_named(tmp_path, share) -> None:
    path = tmp_path / "critic.safetensors"
    save_module(path, critic())
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "damaged or not a safetensors file" in message_of(path) and "remove it" in message_of(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path) -> None:
    assert "is missing: train that stage first" in message_of(tmp_path / "critic.safetensors")
    assert "is missing" in message_of(tmp_path)


def test_foreign_files_are_refused(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"PK\x03\x04 a pickle, for example" * 20)
    assert "not a safetensors file" in message_of(path)
    for metadata in (None, {"format": "pt"}, {"ral_gym": "{"}, {"ral_gym": "[1]"}):
        safetensors.torch.save_file(critic().state_dict(), path, metadata)
        assert "was not written by ral_gym" in message_of(path)
    save_tensors(path, {}, {"stage": "prior"})
    assert "holds no weights, not PatchCritic" in message_of(path)


def test_weights_of_another_class_or_with_other_arguments_are_refused(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    save_module(path, critic(4))
    assert "holds PatchCritic, not VQVAE" in message_of(path, VQVAE)
    assert "hidden_units: 4 there, 8 here" in message_of(path, config=critic(8).config)
    assert isinstance(load_module(path, PatchCritic, config=critic(4).config), PatchCritic)


@pytest.mark.parametrize(
    "change",
    [
        {"class": "PatchCritic"},
        {"class": "PatchCritic", "config": {"image_size": 16, "colour": "red"}},
        {"class": "PatchCritic", "config": {"image_size": 15, "channels": 1}},
        {"class": "PatchCritic", "config": {"image_size": 16, "channels": 1, "hidden_units": 8, "layers": 2}},
    ],
    ids=["no arguments", "unknown argument", "impossible argument", "other shapes"],
)
def test_weights_that_this_version_cannot_rebuild_are_refused(tmp_path, change) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, critic().state_dict(), change)
    assert "does not fit this version of ral_gym" in message_of(path)


# Nested state -------------------------------------------------------------------------------------------------------


def assert_same(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right)
    elif isinstance(left, np.ndarray):
        assert left.dtype == right.dtype and left.shape == right.shape and np.array_equal(left, right)
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, tuple | list):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


def through_a_file(tmp_path: Path, state: Any) -> Any:
    tensors, rest = pack_state(state)
    save_tensors(tmp_path / "state.safetensors", tensors, {"state": rest})
    tensors, metadata = load_tensors(tmp_path / "state.safetensors")
    return unpack_state(tensors, metadata["state"])


leaves = st.none() | st.booleans() | st.integers(-(2**130), 2**130) | st.floats(allow_nan=False) | st.text(max_size=5)
arrays = st.sampled_from(
    [
        np.arange(6, dtype=np.uint32).reshape(2, 3).T,
        np.zeros((0, 3), np.int16),
        np.array(2.5),
        np.array([True, False]),
        torch.arange(3),
        torch.rand(2, 2).t(),
        torch.tensor(1.5, dtype=torch.float64),
    ]
)
keys = st.text(max_size=5) | st.integers(0, 9)
states = st.recursive(
    leaves | arrays,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=8,
)


@given(states)
def test_nested_state_survives_packing(state: Any) -> None:
    tensors, rest = pack_state(state)
    assert_same(unpack_state(tensors, json.loads(json.dumps(rest))), state)


def test_an_optimizer_and_every_kind_of_random_state_survive_a_file(tmp_path) -> None:
    module = critic()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    module(torch.rand(2, 1, 16, 16)).sum().backward()
    optimizer.step()
    state = {
        "optimizer": optimizer.state_dict(),
        "pcg": np.random.default_rng(3).bit_generator.state,
        "mt": np.random.get_state(legacy=False),
        "none": {},
        7: (np.float32(0.5), np.int64(3)),
    }
    again = through_a_file(tmp_path, state)
    assert again.pop(7) == (0.5, 3) and state.pop(7)
    assert_same(again, state)


def test_packed_state_does_not_change_with_what_it_was_taken_from() -> None:
    array, tensor = np.zeros(2), torch.zeros(2)
    array_view = array.view()
    array_view.flags.writeable = False
    tensors, rest = pack_state([array, tensor, array_view])
    array += 1
    tensor += 1
    assert all(float(value.sum()) == 0 for value in unpack_state(tensors, rest))


def test_what_cannot_be_saved_without_pickle_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot save a set in a checkpoint"):
        pack_state({"a": {1, 2}})


# Small helpers ------------------------------------------------------------------------------------------------------


def test_differences_name_every_field() -> None:
    there, here = {"a": {"x": 1, "y": 2}, "b": [1]}, {"a": {"x": 1, "y": 3}, "b": [1], "c": 0}
    assert differences(there, here) == ["a.y: 2 there, 3 here", "c: None there, 0 here"]
    assert differences(here, here) == []


def test_config_arguments_are_the_named_fields() -> None:
    from ral_gym.config import CriticConfig

    assert config_arguments(CriticConfig(layers=3), ("layers", "n_critic")) == {"layers": 3, "n_critic": 5}
