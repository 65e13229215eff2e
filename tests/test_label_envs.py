"""Environments with classes: the label in observations, options and infos, and what it does to rewards."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from torch import Tensor

from ral_gym.agents.vec_env import make_sb3_env
from ral_gym.envs.core import GenerationCore
from ral_gym.envs.from_run import run_world
from ral_gym.envs.toy_classes import CLASS_NAMES, GRID, toy_classes_sequences, toy_classes_world
from ral_gym.envs.worlds import World, toy_world
from ral_gym.errors import RunError
from ral_gym.priors.transformer import Transformer
from tests.class_runs import make_class_run

ID = "ral_gym/ToyClasses-v0"
E, K, T, FIRST = 6, 8, 16, 10


def make(**kwargs: Any) -> Any:
    return gym.make(ID, **kwargs).unwrapped


def test_the_option_sets_the_last_entry_and_the_info() -> None:
    env = make()
    for label, number in [(2, 2), (np.int64(1), 1), ("same", 0)]:
        observation, info = env.reset(seed=0, options={"label": label})
        assert observation in env.observation_space and observation[-1] == FIRST + number
        assert info == {"label": number} and type(info["label"]) is int
    for _ in range(T):
        observation, _, terminated, _, info = env.step(3)
        assert observation[-1] == FIRST
    assert terminated and info["label"] == 0 and (info["codes"] == observation).all()
    assert info["step_rewards"].shape == (T,)


def test_options_of_a_vector_environment_may_differ_by_row() -> None:
    env: Any = gym.make_vec(ID, num_envs=E)
    observations, infos = env.reset(seed=0, options={"label": "next"})
    assert (observations[:, -1] == FIRST + 1).all() and infos["label"].tolist() == [1] * E and infos["_label"].all()
    _, infos = env.reset(options={"label": 2, "reset_mask": np.arange(E) < 2})
    assert infos["_label"].tolist() == (np.arange(E) < 2).tolist() and env.core.codes[:, -1].tolist() == [12] * 2 + [
        11
    ] * (E - 2)
    adapter = make_sb3_env(ID, E)
    adapter.set_options([{"label": row % 3} for row in range(E)])
    assert (adapter.reset()[:, -1] - FIRST).tolist() == [info["label"] for info in adapter.reset_infos]
    assert [info["label"] for info in adapter.reset_infos] == [0, 1, 2, 0, 1, 2]


def test_each_class_has_its_own_rule() -> None:
    core = GenerationCore(toy_classes_world(), 24)
    perfect = toy_classes_sequences()
    core.reset(np.arange(24), [{"label": int(row)} for row in perfect[:, -1] - FIRST])
    assert (core.draw_round(perfect).rewards == 1).all()
    core.reset(np.arange(24), [{"label": (int(row) + 1) % 3} for row in perfect[:, -1] - FIRST])
    np.testing.assert_allclose(core.draw_round(perfect).rewards, 1 / 16)


@pytest.mark.parametrize("reset_mode", ["continue", "mixed"])
def test_a_continued_image_keeps_its_label(reset_mode: str) -> None:
    core = GenerationCore(toy_classes_world(), 50, reset_mode=reset_mode)
    core.reset(np.arange(50), seeds=list(range(50)))
    images = toy_classes_sequences()
    continued = core.start > 0
    assert continued.sum() > 10
    for codes, start in zip(core.codes[continued], core.start[continued], strict=True):
        same = (images[:, :start] == codes[:start]).all(1) & (images[:, -1] == codes[-1])
        assert same.any()
    core.reset(np.arange(50), {"label": 2, "prefix_rows": 1})
    steps = np.diff(core.codes[:, :4], axis=1) % K
    assert (steps == K - 1).all() and (core.codes[:, -1] == FIRST + 2).all()
    core.reset(np.arange(50), {"label": 2, "image_index": 0})  # image 0 is of class 0: both wishes hold
    assert (core.codes[:, :4] == 0).all() and (core.codes[:, -1] == FIRST + 2).all()


def test_given_codes_may_end_with_their_label() -> None:
    env = make()
    before, _ = env.reset(seed=0, options={"label": 1, "prefix_rows": 2})
    again, info = env.reset(options={"codes": before})
    assert (again == before).all() and info == {"label": 1}
    again, info = env.reset(options={"codes": before[:8], "label": 2})
    assert (again[:16] == before[:16]).all() and again[-1] == FIRST + 2
    with pytest.raises(ValueError, match="label=0 differs from the label 1 at the end of option codes"):
        env.reset(options={"codes": before, "label": 0})


def with_frequencies(counts: list[int]) -> World:
    """A world without rewards whose real images have the first code 0, 1, .. and so many images per class."""
    labels = np.repeat(np.arange(3), counts)
    codes = np.arange(len(labels))[:, None].repeat(T, 1).astype(np.int16) % K
    return replace(toy_classes_world("none"), real_codes=GRID.with_labels(codes, labels), recipe=None)


def test_labels_are_drawn_uniformly_or_by_the_frequencies_of_the_data() -> None:
    for draw, shares in [("uniform", [1 / 3, 1 / 3, 1 / 3]), ("data", [0.75, 0.25, 0.0])]:
        core = GenerationCore(with_frequencies([6, 2, 0]), 2000, label_draw=draw)
        core.reset(np.arange(2000), seeds=list(range(2000)))
        found = np.bincount(core.codes[:, -1] - FIRST, minlength=3) / 2000
        np.testing.assert_allclose(found, shares, atol=0.04)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": 3}, r"label=3 is out of range: choose 0\.\.2, or a name: same, next, previous"),
        ({"label": -1}, r"label=-1 is out of range"),
        ({"label": True}, r"label=True must be a class, an integer in 0\.\.2"),
        ({"label": 1.0}, r"label=1.0 must be a class"),
        ({"label": "nxt"}, r"label='nxt' is no class: choose 0\.\.2, or a name: same, next, previous"),
    ],
)
def test_a_wrong_label_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    env, vector, adapter = make(), gym.make_vec(ID, num_envs=2), make_sb3_env(ID, 2)
    before = env.reset(seed=5)[0].copy()
    for reset in (lambda: env.reset(options=options), lambda: vector.reset(options=options)):
        with pytest.raises(ValueError, match=message) as found:
            reset()
        assert "\n" not in str(found.value)
    with pytest.raises(ValueError, match=message):
        adapter.set_options(options)
    assert (env.core.codes[0] == before).all()


def test_a_class_without_images_cannot_be_continued() -> None:
    world = with_frequencies([6, 2, 0])
    core = GenerationCore(world, 1, reset_mode="continue")
    for options in ({"label": 2}, {"label": "previous", "prefix_rows": 2}, {"label": 2, "mode": "mixed"}):
        with pytest.raises(ValueError, match=re.escape("label=2 (previous): no real image of this class")):
            core.reset(np.arange(1), options)
    for options in ({"label": 2, "mode": "full"}, {"label": 2, "stop_rows": 1}, {"label": 2, "image_index": 0}):
        core.reset(np.arange(1), options)
        assert core.codes[0, -1] == FIRST + 2


def test_environments_without_classes_refuse_labels() -> None:
    with pytest.raises(ValueError, match="label=1, but images have no classes in this environment: leave it out"):
        gym.make("ral_gym/Toy-v0").reset(options={"label": 1})
    with pytest.raises(ValueError, match=r"label_draw='data' draws labels of real images, but .* no classes"):
        gym.make("ral_gym/Toy-v0", label_draw="data")
    with pytest.raises(ValueError, match="label_draw='often' is unknown: choose one of uniform, data"):
        gym.make(ID, label_draw="often")
    with pytest.raises(ValueError, match=r"real_codes have shape .*: with 3 classes a row has 17 entries"):
        replace(toy_classes_world(), real_codes=toy_world().real_codes)


def test_a_scorer_and_a_decoder_never_see_a_label() -> None:
    seen: list[Tensor] = []

    def scorer(codes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        seen.extend([codes, labels])
        return codes[:, :1, None].float(), labels[:, None].float().expand_as(codes)

    core = GenerationCore(replace(toy_classes_world(), scorer=scorer, recipe=None), E, reset_mode="scratch")
    core.reset(np.arange(E), {"label": 2, "stop_rows": 2})
    finished = core.draw_round(np.zeros((E, T + 1), np.int64))
    assert seen[0].shape == (E, 8) and seen[0].max() < K and seen[1].tolist() == [2] * E
    assert finished.labels is not None and finished.labels.tolist() == [2] * E
    assert finished.step_rewards.shape == (E, T) and (finished.returns == 16).all()


def test_a_state_comes_back_and_a_damaged_one_is_refused() -> None:
    core, other = (GenerationCore(toy_classes_world(), E, reset_mode="mixed") for _ in range(2))
    core.reset(np.arange(E), seeds=list(range(E)))
    other.load_state_dict(core.state_dict())
    codes = np.random.default_rng(0).integers(K, size=core.codes.shape)
    assert (core.draw_round(codes).rewards == other.draw_round(codes).rewards).all()
    for one in (core, other):
        one.reset(np.arange(E))
    assert (core.codes == other.codes).all()
    for column, entry in [(-1, 3), (0, FIRST)]:
        state = core.state_dict()
        state["codes"][0, column] = entry
        with pytest.raises(ValueError):
            other.load_state_dict(state)


def test_checkers_pickles_and_pictures() -> None:
    env = make(render_mode="rgb_array")
    check_env(env, skip_render_check=True)
    sb3_check_env(env)
    env.reset(seed=0)
    assert env.render().shape == (256, 256, 3)
    again = pickle.loads(pickle.dumps(env.world))
    assert again.class_names == CLASS_NAMES and (again.real_codes == env.world.real_codes).all()
    json.dumps(gym.spec(ID).to_json())


@pytest.mark.parametrize("cls", [PPO, DQN])
def test_stock_algorithms_run_on_the_observation(cls: Any) -> None:
    arguments = {"n_steps": 16, "batch_size": 32} if cls is PPO else {"learning_starts": 10, "buffer_size": 200}
    model = cls("MlpPolicy", make_sb3_env(ID, 2), seed=0, device="cpu", **arguments)
    model.learn(64)
    assert model.observation_space == make().observation_space


# The world of a run ------------------------------------------------------------------------------------------------


def test_the_world_of_a_run_has_the_classes_of_its_prior(tmp_path: Path) -> None:
    world = run_world(str(make_class_run(tmp_path / "three")), top_k=4)
    assert world.grid.classes == 3 and world.class_names == ("cat", "dog", "owl")
    assert world.real_codes is not None and world.real_codes.shape == (12, 17)
    assert (world.real_codes[:, -1] - 18).tolist() == [0, 1, 2] * 4
    core = GenerationCore(world, 3)
    core.reset(np.arange(3), {"label": "owl"})
    assert core.codes[:, -1].tolist() == [20] * 3 and core.action_masks().sum(1).tolist() == [4] * 3
    assert run_world(str(make_class_run(tmp_path / "none", classes=0))).grid.classes == 0
    with pytest.raises(RunError, match="labels of no classes, but the prior beside it draws images of 3"):
        run_world(str(make_class_run(tmp_path / "lost", labelled=False)))
    with pytest.raises(RunError, match="labels of 3 classes, but the prior beside it draws images of 5"):
        run_world(str(make_class_run(tmp_path / "five", classes=5)))


def test_masks_by_a_prior_depend_on_the_label_if_it_has_classes() -> None:
    torch.manual_seed(1)
    prior = Transformer(K, 4, 4, hidden_units=16, layers=1, classes=3).eval().requires_grad_(False)
    prior.output.weight.normal_()
    world = replace(toy_classes_world(), recipe=None)
    for network, alike in [(prior, False), (Transformer(K, 4, 4, hidden_units=16, layers=1), True)]:
        core = GenerationCore(replace(world, masks=replace(world.masks, top_k=3, prior=network)), 3)
        core.reset(np.arange(3), [{"label": label} for label in range(3)])
        masks = core.action_masks()
        assert (masks == masks[0]).all() == alike
