"""The batched core: whole images or code by code, pairs, lockstep, scoring, saving, mistakes."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from torch import Tensor

from ral_gym.envs.core import GenerationCore
from ral_gym.envs.finished import Finished
from ral_gym.envs.from_run import run_world
from ral_gym.envs.resets import RESET_MODES
from ral_gym.envs.toy_classes import toy_classes_world
from ral_gym.envs.worlds import World, toy_images, toy_world
from ral_gym.grid import CodeGrid
from ral_gym.runs.storage import pack_state, unpack_state
from tests.tiny import make_tiny_run

E, T, K = 6, 16, 8


@pytest.fixture(scope="module")
def coarse_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose score map has one row for two code rows."""
    return make_tiny_run(tmp_path_factory.mktemp("runs") / "coarse", critic_layers=4)


@pytest.fixture(params=["toy", "classes", "run"])
def world(request: pytest.FixtureRequest, coarse_run: Path) -> World:
    toys = {"toy": toy_world, "classes": toy_classes_world}
    return toys[request.param]("intermediate") if request.param in toys else run_world(str(coarse_run), "intermediate")


def seeded(world: World, **arguments: Any) -> GenerationCore:
    core = GenerationCore(world, E, **arguments)
    core.reset(np.arange(E), seeds=list(range(E)))
    return core


def random_codes(core: GenerationCore, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(core.grid.codebook_size, size=core.codes.shape)


def step_to_the_end(core: GenerationCore, codes: np.ndarray) -> dict[int, Finished]:
    """Draw `codes` one by one where the rows stand; what each row was told at its end."""
    ended: dict[int, Finished] = {}
    while True:
        running = np.flatnonzero(core.position < core.stop)
        if not len(running):
            return ended
        finished = core.step(codes[np.arange(E), core.position.clip(max=T - 1)], running)
        if finished is not None:
            ended |= dict.fromkeys(finished.rows.tolist(), finished)


def assert_same(one: Finished, row: int, other: Finished, other_row: int) -> None:
    a, b = int(np.flatnonzero(one.rows == row)[0]), int(np.flatnonzero(other.rows == other_row)[0])
    assert one.score_map is not None and other.score_map is not None
    np.testing.assert_allclose(one.score_map[a], other.score_map[b], atol=1e-5)
    np.testing.assert_allclose(one.step_rewards[a], other.step_rewards[b], atol=1e-5)
    np.testing.assert_allclose(one.rewards[a], other.rewards[b], atol=1e-5)
    assert (one.codes[a] == other.codes[b]).all()
    assert (one.start[a], one.stop[a]) == (other.start[b], other.stop[b])


@pytest.mark.parametrize("mode", RESET_MODES)
@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_round_at_once_is_the_round_step_by_step(world: World, mode: str, steps_before: int) -> None:
    stepped, at_once = seeded(world, reset_mode=mode), seeded(world, reset_mode=mode)
    codes = random_codes(stepped)
    for _ in range(steps_before):  # the shortest episode has 4 codes
        for core in (stepped, at_once):
            core.step(codes[np.arange(E), core.position])
    ended, round_ = step_to_the_end(stepped, codes), at_once.draw_round(torch.from_numpy(codes))
    assert sorted(ended) == round_.rows.tolist() == list(range(E))
    for row, finished in ended.items():
        assert_same(finished, row, round_, row)
    for core in (stepped, at_once):
        core.reset(np.arange(E))
    assert (stepped.codes == at_once.codes).all()


@pytest.mark.parametrize("mode", RESET_MODES)
def test_only_drawn_codes_are_rewarded(world: World, mode: str) -> None:
    core = seeded(world, reset_mode=mode)
    before = core.observations()
    finished = core.draw_round(random_codes(core))
    drawn = before == core.grid.not_drawn
    assert ((finished.step_rewards != 0) <= drawn[:, :T]).all()
    assert (finished.codes[~drawn] == before[~drawn]).all()
    np.testing.assert_allclose(finished.rewards, finished.step_rewards.sum(1), rtol=1e-6)
    assert finished.score_map is not None
    cells_per_row = T // finished.score_map[0].size
    below = np.arange(T) >= finished.stop[:, None]  # (E, T)
    assert (finished.score_map.reshape(E, -1)[below[:, ::cells_per_row]] == 0).all()


def test_single_reward_is_the_mean_score_of_what_was_drawn(coarse_run: Path) -> None:
    core = seeded(run_world(str(coarse_run)), reset_mode="scratch")
    finished = core.draw_round(random_codes(core))
    assert set(finished.stop) == {8}
    assert finished.score_map is not None and finished.score_map.shape == (E, 2, 2)
    np.testing.assert_allclose(finished.rewards, finished.score_map[:, 0].mean(1), rtol=1e-5)
    assert (finished.step_rewards[:, :7] == 0).all() and (finished.step_rewards[:, 7] == finished.rewards).all()


def test_the_scorer_sees_whole_images_of_one_height(coarse_run: Path) -> None:
    world, shapes = run_world(str(coarse_run)), []

    def scorer(codes: Tensor) -> tuple[Tensor, Tensor]:
        shapes.append(tuple(codes.shape))
        assert codes.dtype == torch.int64 and int(codes.min()) >= 0 and int(codes.max()) < world.grid.codebook_size
        assert world.scorer is not None
        return world.scorer(codes)

    core = seeded(dataclasses.replace(world, scorer=scorer, recipe=None), reset_mode="mixed")
    for round_ in range(10):
        core.reset(np.arange(E))
        heights, counts = np.unique(core.stop, return_counts=True)
        shapes.clear()
        core.draw_round(random_codes(core, round_))
        assert shapes == list(zip(counts.tolist(), heights.tolist(), strict=True))
        assert set(heights) <= {8, 16}  # multiples of two rows


def test_prefixes_are_rows_of_real_images(world: World) -> None:
    core = seeded(world, reset_mode="continue")
    assert world.real_codes is not None
    for row, codes in enumerate(core.codes):
        given = codes[: core.start[row]]
        assert len(given) and (world.real_codes[:, : len(given)] == given).all(1).any()


def rounds(core: GenerationCore, n: int) -> np.ndarray:
    """The lengths of n episodes in a row, (n, E), with resets as the vector environments make them."""
    lengths = []
    for _ in range(n):
        lengths.append(core.stop - core.position)
        core.draw_round(np.zeros(core.codes.shape, int))
        core.reset(np.arange(E))
    return np.array(lengths)


@pytest.mark.parametrize("lockstep", [False, True])
def test_complementary_pairs_draw_one_image_each(world: World, lockstep: bool) -> None:
    core = seeded(world, reset_mode="mixed", paired=True, lockstep=lockstep)
    lengths = rounds(core, 20)
    assert (lengths[::2] + lengths[1::2] == T).all()
    assert len(np.unique(lengths)) == T // 4 // world.row_multiple - 1


@pytest.mark.parametrize(
    "again",
    [
        {},
        {"seeds": [1] * E},
        {"options": {"mode": "mixed"}},
        {"options": [{"mode": "mixed"}] * E},
    ],
)
def test_a_reset_in_the_middle_begins_a_new_pair(again: dict[str, Any]) -> None:
    core = seeded(toy_world(), reset_mode="mixed", paired=True)
    for _ in range(5):
        assert (core.start > 0).all()
        core.step(np.zeros(E, int))
        core.reset(np.arange(E), **again)
    lengths = rounds(core, 2)
    assert (lengths.sum(0) == T).all()


def test_options_after_the_first_half_begin_a_new_pair_too() -> None:
    core = seeded(toy_world(), reset_mode="mixed", paired=True)
    rounds(core, 2)
    core.draw_round(np.zeros((E, T), int))
    core.reset(np.arange(3))
    core.reset(np.arange(3, E), {"mode": "mixed"})
    assert (core.start[:3] == 0).all() and (core.start[3:] > 0).all()


def test_lockstep_rows_stand_alike_on_different_images() -> None:
    core = seeded(toy_world(), reset_mode="mixed", lockstep=True)
    seen = set()
    for options in [None, {"mode": "mixed"}, {"mode": "continue"}, {"mode": "scratch"}] * 8:
        core.reset(np.arange(E), options)
        assert len(set(core.position)) == len(set(core.stop)) == 1
        seen.add((int(core.position[0]), int(core.stop[0])))
        if core.position[0]:
            assert len(set(core.codes[:, 0])) > 1
    assert seen == {(4, 16), (8, 16), (12, 16), (0, 4), (0, 8), (0, 12)}


def test_options_may_differ_by_row() -> None:
    core = seeded(toy_world(), lockstep=True)
    core.reset(np.arange(2, 5), [{"image_index": 3, "prefix_rows": 1}, None, {"codes": [5, 6], "stop_rows": 1}])
    assert core.codes[2].tolist() == [*toy_images()[3, :4], *[K] * 12]
    assert core.codes[3].tolist() == [K] * 16
    assert core.codes[4].tolist() == [5, 6, K, K, *[K + 1] * 12]
    assert core.position.tolist() == [0, 0, 4, 0, 2, 0] and core.stop.tolist() == [16, 16, 16, 16, 4, 16]


def test_a_saved_state_continues_identically_and_is_a_copy() -> None:
    core = seeded(toy_world(), reset_mode="mixed", paired=True)
    actions = np.random.default_rng(5).integers(K, size=(40, E))

    def go_on(core: GenerationCore) -> list[np.ndarray]:
        seen = []
        for action in actions:
            finished = core.step(action)
            if finished is not None:
                core.reset(finished.rows)
                seen.append(finished.rewards)
            seen.append(core.observations())
        return seen

    go_on(core)
    tensors, rest = pack_state(core.state_dict())  # what a checkpoint file holds
    state = core.state_dict()
    first = go_on(core)
    for saved in (state, unpack_state(tensors, rest)):
        other = GenerationCore(toy_world(), E, reset_mode="mixed", paired=True)
        other.load_state_dict(saved)
        for a, b in zip(first, go_on(other), strict=True):
            assert (a == b).all()


def test_a_state_of_another_shape_is_refused() -> None:
    core, other = seeded(toy_world()), GenerationCore(toy_world(), E + 1)
    with pytest.raises(ValueError, match=r"has \(6, 16\) codes .* these environments \(7, 16\)"):
        other.load_state_dict(core.state_dict())


BAD_CALLS: dict[str, tuple[type[Exception], str, Any]] = {
    "too large": (ValueError, r"action 8 of environment 2 .* 0\.\.7", lambda c: c.step(np.array([0, 7, 8, 0, 0, 0]))),
    "negative": (ValueError, r"action -1 of environment 0 .* 0\.\.7", lambda c: c.step(np.array([-1, 0, 0, 0, 0, 0]))),
    "floats": (ValueError, r"dtype float64: give 6 integers in 0\.\.7", lambda c: c.step(np.zeros(E))),
    "booleans": (ValueError, r"dtype bool: give 6 integers", lambda c: c.step(np.zeros(E, bool))),
    "too few": (ValueError, r"shape \(5,\) .* give 6 integers", lambda c: c.step(np.zeros(5, int))),
    "a column": (ValueError, r"shape \(6, 1\) .* give 6 integers", lambda c: c.step(np.zeros((E, 1), int))),
    "round shape": (ValueError, r"shape \(6, 15\)", lambda c: c.draw_round(np.zeros((E, 15), int))),
    "round dtype": (ValueError, "dtype float32", lambda c: c.draw_round(torch.zeros(E, T))),
    "round codes": (ValueError, r"lie in 8\.\.8: choose 0\.\.7", lambda c: c.draw_round(np.full((E, T), K))),
    "options": (ValueError, "prefix_rows=9", lambda c: c.reset(np.arange(E), {"prefix_rows": 9}, [1] * E)),
    "one row's": (ValueError, "prefix_rows=9", lambda c: c.reset(np.arange(2), [{"stop_rows": 1}, {"prefix_rows": 9}])),
    "option count": (ValueError, "options for 2 .* a list of 6", lambda c: c.reset(np.arange(E), [{}, {}])),
    "seed count": (ValueError, "2 seeds for 6", lambda c: c.reset(np.arange(E), seeds=[1, 2])),
    "seed": (ValueError, "non-negative", lambda c: c.reset(np.arange(E), seeds=[1, 2, 3, 4, 5, -1])),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_mistakes_change_nothing(name: str) -> None:
    error, message, call = BAD_CALLS[name]
    core = seeded(toy_world(), reset_mode="mixed", paired=True)
    core.step(np.zeros(E, int))
    before = repr(core.state_dict())
    with pytest.raises(error, match=message):
        call(core)
    assert repr(core.state_dict()) == before


def test_finished_rows_must_be_reset() -> None:
    core = GenerationCore(toy_world(), E)
    for call in (core.step, core.draw_round):
        with pytest.raises(ResetNeeded, match=r"\[0, 1, 2, 3, 4, 5\] have no running episode: call reset"):
            call(np.zeros(E, int) if call == core.step else np.zeros((E, T), int))
    core.reset(np.arange(E), [{}, {}, {}, {"stop_rows": 1}, {}, {}])
    for _ in range(4):
        core.step(np.zeros(E, int))
    before = repr(core.state_dict())
    for call in (core.step, core.draw_round):
        with pytest.raises(ResetNeeded, match=r"\[3\] have no running episode"):
            call(np.ones(E, int) if call == core.step else np.ones((E, T), int))
    assert repr(core.state_dict()) == before


def test_there_must_be_an_environment() -> None:
    with pytest.raises(ValueError, match="num_envs=0: give the number of environments"):
        GenerationCore(toy_world(), 0)


def test_a_tall_grid_works_too() -> None:
    """Rows and columns are not mixed up where they differ in number."""
    grid = CodeGrid(height=4, width=3, codebook_size=5)

    def scorer(codes: Tensor) -> tuple[Tensor, Tensor]:
        return codes.reshape(len(codes), -1, 3)[:, ::2].float(), codes.float()

    real = np.arange(24).reshape(2, 12).astype(np.int16) % 5
    core = GenerationCore(World(grid, lambda codes: codes, scorer, real, 2, torch.device("cpu")), 2)
    core.reset(np.arange(2), [{"image_index": 1, "prefix_rows": 1, "stop_rows": 2}, {"stop_rows": 4}])
    finished = core.draw_round(np.full((2, 12), 4))
    assert finished.codes.tolist() == [[2, 3, 4, 4, 4, 4] + [6] * 6, [4] * 12]
    assert finished.rewards.tolist() == [12.0, 48.0]
    assert finished.score_map is not None
    assert finished.score_map.tolist() == [[[2, 3, 4], [0, 0, 0]], [[4, 4, 4], [4, 4, 4]]]


@pytest.mark.cuda
@pytest.mark.parametrize("mode", RESET_MODES)
def test_cuda_scores_as_the_cpu_does(coarse_run: Path, mode: str) -> None:
    results = []
    for device in ("cpu", "cuda"):
        core = seeded(run_world(str(coarse_run), "intermediate", device), reset_mode=mode)
        codes = torch.from_numpy(random_codes(core)).to(core.device)
        results.append(core.draw_round(codes))
    for row in range(E):
        one, other = results
        assert (one.codes == other.codes).all()
        np.testing.assert_allclose(one.rewards[row], other.rewards[row], rtol=1e-3, atol=1e-3)


def test_rows_that_share_a_start_share_all_of_it() -> None:
    core = seeded(toy_world())
    core.reset(np.arange(2), [{"prefix_rows": 1, "image_index": 0}, {"prefix_rows": 1, "stop_rows": 3}])
    core.share_starts(np.array([1, 1, 2, 3, 4, 5]))
    for name in ("codes", "start", "position", "stop", "image_rows", "to_draw"):
        np.testing.assert_array_equal(getattr(core, name)[0], getattr(core, name)[1])
    assert core.image_rows[0] == 3 and core.to_draw[0].sum() == 8 and core.asked[0] == core.asked[1]
