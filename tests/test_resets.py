"""Where episodes start and stop; the environment against a plain-Python model of the MDP."""

import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import ral_gym  # noqa: F401
from ral_gym.envs.resets import RESET_MODES, StartDistribution, parse_options
from ral_gym.envs.toy import ToyEnv
from ral_gym.grid import CodeGrid

GRID = CodeGrid(height=6, width=4, codebook_size=8)


def distribution(mode: str = "full", **arguments: Any) -> StartDistribution:
    return StartDistribution(GRID, mode, **{"n_images": 5, "row_multiple": 2, **arguments})


def draws(starts: StartDistribution, n: int = 2000) -> list[tuple[int, int]]:
    """The rows of n starts in a row."""
    rng, pending, found = np.random.default_rng(0), 0, []
    for _ in range(n):
        prefix, stop, pending = starts.draw(rng, pending)
        found.append((prefix, stop))
    return found


def test_full_draws_everything() -> None:
    assert set(draws(distribution("full"))) == {(0, 6)}


def test_continue_is_given_every_number_of_rows_alike() -> None:
    found = draws(distribution("continue"))
    counts = [found.count((n, 6)) for n in range(1, 6)]
    assert sum(counts) == 2000 and min(counts) > 320


@pytest.mark.parametrize(("multiple", "allowed"), [(1, {1, 2, 3, 4, 5}), (2, {2, 4}), (3, {3}), (6, {6})])
def test_scratch_stops_after_whole_score_map_rows(multiple: int, allowed: set[int]) -> None:
    found = draws(distribution("scratch", row_multiple=multiple))
    assert {prefix for prefix, _ in found} == {0}
    assert {stop for _, stop in found} == allowed
    assert min(np.unique([stop for _, stop in found], return_counts=True)[1]) > 0.8 * 2000 / len(allowed)


def test_mixed_is_either_half_the_time() -> None:
    found = draws(distribution("mixed"))
    assert {(n, 6) for n in range(1, 6)} | {(0, 2), (0, 4)} == set(found)
    assert 900 < sum(prefix > 0 for prefix, _ in found) < 1100


@pytest.mark.parametrize("multiple", [1, 2, 3, 6])
def test_pairs_fill_whole_images(multiple: int) -> None:
    found = draws(distribution("mixed", row_multiple=multiple, paired=True))
    lengths = [stop - prefix for prefix, stop in found]
    if multiple == 6:  # a shorter image would break the only row of the score map, so there is nothing to pair
        assert set(lengths) == {6}
    else:
        assert {a + b for a, b in zip(lengths[::2], lengths[1::2], strict=True)} == {6}
        assert all(prefix > 0 and stop == 6 for prefix, stop in found[::2])
        assert all(prefix == 0 and stop % multiple == 0 for prefix, stop in found[1::2])


def test_pairing_is_for_mixed_only() -> None:
    rng = np.random.default_rng(0)
    for mode in ("full", "continue", "scratch"):
        one_off = [distribution(mode, paired=True).draw(rng, 0, "mixed") for _ in range(50)]
        assert {pending for _, _, pending in one_off} == {0}, "nothing waits for a second half"
        assert {prefix > 0 for prefix, _, _ in one_off} == {True, False}


@pytest.mark.parametrize(
    ("mode", "arguments", "message"),
    [
        ("half", {}, "reset_mode='half' is unknown: choose one of full, continue, scratch, mixed"),
        ("continue", {"n_images": 0}, "no real codes"),
        ("mixed", {"n_images": 0}, "no real codes"),
        ("full", {"row_multiple": 4}, "row_multiple 4 must divide the 6 rows"),
        ("full", {"row_multiple": 0}, "row_multiple 0 must divide the 6 rows"),
    ],
)
def test_impossible_modes_are_refused(mode: str, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distribution(mode, **arguments)


def test_one_row_cannot_be_continued() -> None:
    with pytest.raises(ValueError, match="at least 2 rows of codes, the grid has 1"):
        StartDistribution(CodeGrid(1, 4, 8), "mixed", n_images=3)
    with pytest.raises(ValueError, match="at least 2 rows of codes, the grid has 1"):
        parse_options({"image_index": 0}, StartDistribution(CodeGrid(1, 4, 8), n_images=3))


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"rows": 2}, "'rows' is unknown: choose from mode, prefix_rows, stop_rows, codes, image_index"),
    ({"mode": "half"}, "mode='half' is unknown: choose one of full, continue, scratch, mixed"),
    ({"mode": 3}, "mode=3 is unknown"),
    ({"prefix_rows": 6}, r"prefix_rows=6 is out of range: choose 0\.\.5"),
    ({"prefix_rows": -1}, r"prefix_rows=-1 is out of range: choose 0\.\.5"),
    ({"prefix_rows": 1.0}, r"prefix_rows=1.0 must be an integer in 0\.\.5"),
    ({"prefix_rows": True}, r"prefix_rows=True must be an integer in 0\.\.5"),
    ({"stop_rows": 0}, r"stop_rows=0 is out of range: choose 1\.\.6"),
    ({"stop_rows": 3}, "stop_rows=3 would give the critic a broken score-map row: choose a multiple of 2 up to 6"),
    ({"stop_rows": 2, "prefix_rows": 2}, "prefix_rows=2 leaves nothing to draw before stop_rows=2"),
    ({"image_index": 5}, r"image_index=5 is out of range: choose 0\.\.4"),
    ({"image_index": 1, "mode": "full"}, "image_index=1 needs rows to continue"),
    ({"image_index": 1, "mode": "scratch"}, "image_index=1 needs rows to continue"),
    ({"image_index": 1, "stop_rows": 4}, "image_index=1 needs rows to continue"),
    ({"mode": "full", "stop_rows": 2}, "mode='full' contradicts prefix_rows or stop_rows"),
    ({"mode": "mixed", "prefix_rows": 2}, "mode='mixed' contradicts prefix_rows or stop_rows"),
    ({"mode": "scratch", "prefix_rows": 2}, "mode='scratch' contradicts prefix_rows or stop_rows"),
    ({"mode": "continue", "stop_rows": 2}, "needs prefix_rows too"),
    ({"codes": [0] * 25}, r"shape \(25,\): give \(6, 4\), fewer rows of 4, or up to 24 codes"),
    ({"codes": np.zeros((4, 6), int)}, r"shape \(4, 6\): give \(6, 4\)"),
    ({"codes": np.zeros((7, 4), int)}, r"shape \(7, 4\): give \(6, 4\)"),
    ({"codes": np.zeros((1, 2, 4), int)}, r"shape \(1, 2, 4\): give \(6, 4\)"),
    ({"codes": [0.0, 1.0]}, "dtype float64: give integers"),
    ({"codes": [True]}, "dtype bool: give integers"),
    ({"codes": [0, 10]}, r"lies in 0\.\.10: codes are 0\.\.7, 8 means not drawn yet"),
    ({"codes": [-1]}, r"lies in -1\.\.-1: codes are 0\.\.7"),
    ({"codes": [0] * 24}, "gives 24 codes and nothing is left to draw: give fewer than 24, or prefix_rows"),
    ({"codes": [0] * 8, "stop_rows": 2}, "gives 8 codes and nothing is left to draw: give fewer than 8"),
    ({"codes": [0, 8, 0, 0], "prefix_rows": 1}, "prefix_rows=1 needs 4 codes, but codes gives 1"),
    ({"codes": [0], "image_index": 1}, "leave mode and image_index out"),
    ({"codes": [0], "mode": "full"}, "leave mode and image_index out"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_wrong_options_say_what_is_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_options(options, distribution())


@pytest.mark.parametrize("options", [{"prefix_rows": 1}, {"image_index": 0}, {"mode": "continue"}, {"mode": "mixed"}])
def test_nothing_is_continued_without_real_codes(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no real codes"):
        parse_options(options, distribution(n_images=0))


@pytest.mark.parametrize(
    ("codes", "rest", "expected"),
    [
        ([], {}, []),
        ([3], {}, [3]),
        ([3, 8, 5], {}, [3]),
        ([3, 9, 5], {}, [3]),
        (np.arange(8).reshape(2, 4), {}, list(range(8))),
        (np.full((6, 4), 8), {}, []),
        (np.arange(24).reshape(6, 4) % 8, {"prefix_rows": 1}, [0, 1, 2, 3]),
        (np.arange(6, dtype=np.uint8), {"stop_rows": 2}, list(range(6))),
    ],
)
def test_given_codes_are_continued(codes: Any, rest: dict[str, int], expected: list[int]) -> None:
    request = parse_options({"codes": codes, **rest}, distribution())
    stop = rest.get("stop_rows", 6)
    first = [*expected, *[8] * (4 * stop - len(expected)), *[9] * (4 * (6 - stop))]
    assert request.codes is not None and request.codes.tolist() == first
    assert request.stop_rows == stop


NOT_DRAWN, NEVER = 8, 9


class Reference:
    """The toy MDP in plain Python: 4 x 4 codes out of 8; a code is right if it follows its neighbour."""

    def __init__(self, reward: str) -> None:
        self.reward = reward
        self.codes = [NOT_DRAWN] * 16
        self.start = self.position = self.stop = 0

    def begin(self, given: list[int], stop: int) -> None:
        self.start = self.position = len(given)
        self.stop = stop
        self.codes = given + [NOT_DRAWN] * (stop - len(given)) + [NEVER] * (16 - stop)

    def right(self, t: int) -> bool:
        if t == 0:
            return True
        neighbour = self.codes[t - 1] if t % 4 else self.codes[t - 4]
        return self.codes[t] == (neighbour + 1) % 8

    def draw(self, code: int) -> tuple[float, bool]:
        self.codes[self.position] = code
        self.position += 1
        ended = self.position == self.stop
        if not ended or self.reward == "none":
            return 0.0, ended
        if self.reward == "single":
            return sum(self.right(t) for t in range(self.stop)) / self.stop, True
        return float(sum(self.right(t) for t in range(self.start, self.stop))), True


def perfect(image: int, rows: int) -> list[int]:
    """The first rows of a perfect image."""
    return [(image + t // 4 + t % 4) % 8 for t in range(4 * rows)]


class EnvironmentAgainstReference(RuleBasedStateMachine):
    """Any sequence of resets, steps and mistakes."""

    @initialize(
        reward=st.sampled_from(["single", "intermediate", "none"]),
        reset_mode=st.sampled_from(RESET_MODES),
        seed=st.integers(0, 2**31),
    )
    def make(self, reward: str, reset_mode: str, seed: int) -> None:
        self.env = ToyEnv(reward=reward, reset_mode=reset_mode)
        self.reset_mode = reset_mode
        self.model = Reference(reward)
        self.observation = np.full(16, NOT_DRAWN)
        self.refused(gym.error.ResetNeeded, lambda: self.env.step(0))
        self.reset_as_constructed(seed)

    def follow(self, given: list[int], stop: int, options: dict[str, Any]) -> None:
        self.observation, info = self.env.reset(options=options)
        self.model.begin(given, stop)
        assert info == {}

    def drawn_start(self, mode: str, options: dict[str, Any] | None, seed: int | None = None) -> None:
        """Where the environment draws, the model follows it, once what was drawn is found legal."""
        self.observation, info = self.env.reset(seed=seed, options=options)
        codes = self.observation.tolist()
        rows = sum(code < NOT_DRAWN for code in codes) // 4
        stop = sum(code != NEVER for code in codes)
        continued = rows > 0 and stop == 16 and codes[: 4 * rows] == perfect(codes[0], rows)
        scratch = rows == 0 and stop in (4, 8, 12)
        full = rows == 0 and stop == 16
        allowed = {"full": full, "continue": continued, "scratch": scratch, "mixed": continued or scratch}
        assert allowed[mode] and info == {}
        self.model.begin(codes[: 4 * rows], stop)

    @rule(seed=st.none() | st.integers(0, 2**31))
    def reset_as_constructed(self, seed: int | None) -> None:
        self.drawn_start(self.reset_mode, None, seed)

    @rule(mode=st.sampled_from(RESET_MODES))
    def reset_with_mode(self, mode: str) -> None:
        self.drawn_start(mode, {"mode": mode})

    @rule(image=st.integers(0, 7))
    def reset_with_image_alone(self, image: int) -> None:
        self.drawn_start("continue", {"image_index": image})
        assert self.model.codes[0] == image

    @rule(prefix=st.integers(0, 3), more=st.integers(1, 4), image=st.integers(0, 7))
    def reset_with_rows(self, prefix: int, more: int, image: int) -> None:
        stop = min(prefix + more, 4)
        options = {"prefix_rows": prefix, "stop_rows": stop, "image_index": image}
        self.follow(perfect(image, prefix), 4 * stop, options)

    @rule(codes=st.lists(st.integers(0, 7), max_size=15), rest=st.booleans())
    def reset_with_codes(self, codes: list[int], rest: bool) -> None:
        grid = np.array(codes + [NOT_DRAWN] * (16 - len(codes))).reshape(4, 4) if rest else codes
        self.follow(codes, 16, {"codes": grid})

    @precondition(lambda self: self.model.position < self.model.stop)
    @rule(code=st.integers(0, 7), kind=st.sampled_from([int, np.int64, np.uint8, np.array]))
    def step(self, code: int, kind: Any) -> None:
        reward, ended = self.model.draw(code)
        self.observation, given, terminated, truncated, info = self.env.step(kind(code))
        assert given == reward and type(given) is float
        assert terminated is ended and truncated is False
        if not ended:
            assert info == {}
            return
        assert info["codes"].tolist() == self.model.codes
        assert set(info) == ({"codes"} if self.model.reward == "none" else {"codes", "score_map", "step_rewards"})
        if self.model.reward != "none":
            assert abs(info["step_rewards"].sum() - reward) < 1e-6
            scores = [float(t < self.model.stop and self.model.right(t)) for t in range(16)]
            assert info["score_map"].flatten().tolist() == scores

    @precondition(lambda self: self.model.position < self.model.stop)
    @rule(action=st.sampled_from([-1, 8, 3.0, 2**70, None, "1", np.array([1]), np.float32(1)]))
    def wrong_action(self, action: Any) -> None:
        self.refused(ValueError, lambda: self.env.step(action), r"is not a code: give an integer in 0\.\.7")

    @precondition(lambda self: self.model.position == self.model.stop)
    @rule()
    def step_after_the_end(self) -> None:
        self.refused(gym.error.ResetNeeded, lambda: self.env.step(0), "call reset")

    @rule(
        options=st.sampled_from([{"mode": "half"}, {"prefix_rows": 4}, {"codes": [9.5]}, {"image_index": 8}, {"x": 1}]),
        seed=st.none() | st.integers(0, 9),
    )
    def wrong_options(self, options: dict[str, Any], seed: int | None) -> None:
        self.refused(ValueError, lambda: self.env.reset(seed=seed, options=options))

    def refused(self, error: type[Exception], call: Any, message: str | None = None) -> None:
        before = pickle.dumps((self.env.core.state_dict(), self.env.np_random))
        with pytest.raises(error, match=message):
            call()
        assert pickle.dumps((self.env.core.state_dict(), self.env.np_random)) == before

    @invariant()
    def the_observation_is_the_models(self) -> None:
        if hasattr(self, "model") and self.model.stop:
            assert self.observation.tolist() == self.model.codes
            assert self.observation.dtype == np.int16


TestEnvironmentAgainstReference = EnvironmentAgainstReference.TestCase
TestEnvironmentAgainstReference.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
