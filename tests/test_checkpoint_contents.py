"""Checkpoints of stage 3 that are read without an error and hold something wrong: training goes on, or one line."""

import copy
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ral_gym.agents.train_ral import train_ral
from ral_gym.errors import RalGymError
from ral_gym.presets import SMOKE
from ral_gym.runs.run import Run, read_config
from ral_gym.stages.levels import load_generator, load_vqvae
from ral_gym.tokenizers.code_set import CodeSet
from tests.kills import killed_after
from tests.tiny import make_tiny_run

CPU = torch.device("cpu")
ODD: list[Any] = [None, True, -1, 0, 3.5, 10**9, float("nan"), float("inf"), "", "abc", [], [None], {}, {"a": "b"}]
MISSING = object()
STAGES = {
    "reinforce": {"algo": "reinforce", "reset_mode": "mixed", "reward_weights": {"loo_fd": 1.0, "critic": 1.0}},
    "maskable_ppo": {"algo": "maskable_ppo", "reset_mode": "mixed"},
    "grpo": {"algo": "grpo", "reset_mode": "full"},
}
N_UPDATES = 3


@pytest.fixture(scope="module", params=STAGES)
def stopped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any]]:
    """A run that was stopped after its second update, and its checkpoint."""
    path = make_tiny_run(tmp_path_factory.mktemp("stopped") / "run")
    ral = replace(SMOKE.ral, n_updates=N_UPDATES, checkpoint_every=1, n_envs=4, **STAGES[request.param])
    config = replace(read_config(path), ral=ral)
    (path / "config.json").write_text(config.to_json())
    run = Run(path, config)
    with killed_after(N_UPDATES - 1):
        train(run)
    state = run.load_checkpoint("ral")
    assert state is not None and state["updates"] == N_UPDATES - 1
    return run, state


def train(run: Run) -> None:
    vqvae, prior, codes = load_vqvae(run), load_generator(run, "prior"), CodeSet.load(run.file("codes.safetensors"))
    train_ral(run, vqvae, prior, codes, CPU, progress=False)


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every place in a state, and what stands there; the dicts and lists on the way too."""
    if path and path[0] != "random":
        yield path, tree
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inner:
        yield from leaves(value, (*path, key))


def others(value: Any) -> list[Any]:
    """What may stand there instead."""
    if isinstance(value, np.ndarray):
        return [one.numpy() if isinstance(one, torch.Tensor) else one for one in others(torch.from_numpy(value))]
    if not isinstance(value, torch.Tensor):
        return [*ODD, MISSING]
    flat = value.reshape(-1)
    found = [MISSING, None, flat, torch.cat([flat, flat]), flat[:0], torch.zeros(())]
    found += [value[:0], torch.cat([value, value])] if value.ndim else []
    if value.is_floating_point():
        return [*found, value * float("nan"), value.long()]
    if value.dtype == torch.bool:
        return [*found, ~value]
    largest = torch.full_like(value, torch.iinfo(value.dtype).max)
    return [*found, largest, value - 1, value + 1, value.double() + 0.5]


def changed(state: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """The state with another value in one place, or without it."""
    new = here = copy.copy(state)
    for key in path[:-1]:
        here[key] = copy.copy(here[key])
        here = here[key]
    if value is MISSING:
        del here[path[-1]]
    else:
        here[path[-1]] = value
    return new


def changes(state: dict[str, Any], part: str, number: int) -> list[tuple[tuple[Any, ...], Any]]:
    """So many changes of one part of a state, by a seed."""
    found = [(path, other) for path, value in leaves(state) if path[0] == part for other in others(value)]
    random.Random(part).shuffle(found)
    return found[:number]


def goes_on_or_says_why(run: Run, state: dict[str, Any], number: int, folder: Path) -> tuple[int, int]:
    """How many changes of every part were refused, of how many; anything but one line is an error."""
    refused = tried = 0
    for part in state:
        for path, other in changes(state, part, number):
            copied = Run(shutil.copytree(run.path, folder / "run"), run.config)
            copied.save_checkpoint("ral", changed({k: v for k, v in state.items() if k != "random"}, path, other))
            try:
                train(copied)
            except RalGymError as error:
                refused += 1
                assert str(error).isprintable() and len(str(error)) < 1000, (path, other)
            except Exception as error:
                raise AssertionError(f"{path} as {other!r:.60}") from error
            tried += 1
            shutil.rmtree(copied.path)
    return refused, tried


def test_whatever_a_checkpoint_holds_training_goes_on_or_ends_in_one_line(stopped, tmp_path) -> None:
    refused, tried = goes_on_or_says_why(*stopped, 2, tmp_path)
    assert tried >= 20 and refused >= tried // 3


@pytest.mark.faults
def test_many_more_of_them(stopped, tmp_path) -> None:
    refused, tried = goes_on_or_says_why(*stopped, 12, tmp_path)
    assert tried >= 100 and refused >= tried // 3


@pytest.mark.parametrize(
    ("path", "other"),
    [
        (("env", "codes"), lambda codes: codes + 1),
        (("env", "position"), lambda position: position + 1),
        (("env", "stop"), lambda stop: np.concatenate([stop, stop])),
        (("env", "to_draw"), lambda to_draw: to_draw[:0]),
        (("env", "pending"), lambda pending: pending + 100),
        (("last_obs",), lambda last_obs: last_obs + 2),
        (("buffer", "fill"), lambda fill: fill + 10**6),
        (("buffer", "arrays", "_actions"), lambda actions: actions[:, :1]),
        (("updates",), lambda updates: 10**6),
        (("n_updates",), lambda n_updates: "abc"),
        (("num_timesteps",), lambda num_timesteps: None),
        (("average", "n_updates"), lambda n_updates: -1),
        (("optimizer", "state"), lambda moments: {k: {**v, "exp_avg": torch.zeros(())} for k, v in moments.items()}),
    ],
    ids=lambda value: "/".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_is_refused(stopped, tmp_path, path, other) -> None:
    run, state = stopped
    value = state
    for key in path:
        value = value[key]
    copied = Run(shutil.copytree(run.path, tmp_path / "run"), run.config)
    copied.save_checkpoint("ral", changed({k: v for k, v in state.items() if k != "random"}, path, other(value)))
    with pytest.raises(RalGymError, match=r"ral\.safetensors is not a checkpoint from which stage ral can continue"):
        train(copied)
