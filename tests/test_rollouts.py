"""Monte-Carlo roll-outs: action values against enumeration, an unbiased gradient, which codes a completion may draw."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ral_gym.agents import (
    CompositeReward,
    MonteCarloReturns,
    Reinforce,
)
from ral_gym.agents.algorithm import check_stage
from ral_gym.agents.rewards.monte_carlo import complete, next_values, spread_positions
from ral_gym.agents.train_ral import train_ral
from ral_gym.commands.cli import main
from ral_gym.config import RALConfig
from ral_gym.errors import ConfigError
from ral_gym.presets import SMOKE
from ral_gym.priors.sampler import make_sampler
from ral_gym.priors.two_level import load_levels
from ral_gym.registry import load_plugins
from ral_gym.runs.storage import load_tensors
from tests.kills import killed_after
from tests.label_models import make_model
from tests.test_class_runs import KINDS, SMALL, coloured
from tests.test_gradient import bench
from tests.test_train_ral import start
from tests.tiny import make_tiny_run

CPU = torch.device("cpu")


def test_positions_are_spread_and_never_the_last() -> None:
    mask = np.array([[0, 1, 1, 1, 1, 1, 1, 1, 0], [1, 0, 0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0, 0]], bool)
    chosen = spread_positions(mask, 3, np.array([0.5, 0.2, 0.9]))
    assert np.flatnonzero(chosen[0]).tolist() == [2, 4, 6]
    assert np.flatnonzero(chosen[1]).tolist() == [0, 3]  # all but the last
    assert not chosen[2].any()
    counts = sum(spread_positions(mask[:1], 3, np.array([share])) for share in np.linspace(0, 1, 100, endpoint=False))
    assert counts[0].tolist() == [0, 50, 50, 50, 50, 50, 50, 0, 0]


def test_a_code_has_the_value_of_the_next_chosen_one() -> None:
    chosen = np.array([[0, 1, 0, 1, 0]], bool)
    assert next_values(chosen, np.array([[9.0, 1, 9, 2, 9]]), np.array([5.0])).tolist() == [[1, 1, 2, 2, 5]]


def made(name: str, n_images: int = 4, gamma: float = 1.0, **more: Any) -> tuple[Any, Any, Any]:
    """The benchmark's toy, REINFORCE on it and roll-outs."""
    toy = bench().Toy()
    estimator = bench().Estimator(name, Reinforce, {"normalize_advantage": False, "gamma": gamma}, **more)
    model = bench().make_model(toy, estimator, n_images)
    return toy, model, bench().make_rollouts(model, toy, estimator)


def action_values(toy: Any, codes: np.ndarray) -> np.ndarray:
    """Q of every code of images (n, T), by enumeration."""
    p, returns = toy.probabilities().numpy(), toy.rewards["single"].sum(1).numpy()
    images, found = toy.images.numpy(), np.empty(codes.shape)
    for image, position in np.ndindex(codes.shape):
        same = (images[:, : position + 1] == codes[image, : position + 1]).all(1)
        found[image, position] = p[same] @ returns[same] / p[same].sum()
    return found


def filled(toy: Any, model: Any, rollouts: Any, codes: np.ndarray) -> np.ndarray:
    """The returns (n, T) that roll-outs leave in the buffer."""
    bench().estimate(model, toy, "single", torch.from_numpy(codes), rollouts)
    return model.rollout_buffer.returns.reshape(codes.shape)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_the_mean_over_many_roll_outs_is_the_enumerated_value(gamma: float) -> None:
    codes = np.array([[0, 1, 2, 3], [3, 3, 0, 1], [2, 0, 0, 2], [1, 1, 1, 1]])
    with bench().double_precision():
        toy, model, rollouts = made("many", gamma=gamma, n_rollouts=6001)
        discounts = gamma ** np.arange(3, -1, -1)
        exact = action_values(toy, codes) * discounts
        returns = filled(toy, model, rollouts, codes)
        own = toy.rewards["single"].sum(1).numpy()[toy.index(codes)]
    np.testing.assert_allclose(returns, exact, atol=5 * 3 / 6000**0.5)
    np.testing.assert_allclose(returns[:, -1], own, rtol=1e-6)
    assert np.abs(exact[:, 0] - own * discounts[0]).max() > 1  # the own end alone is far from it


def test_more_roll_outs_vary_less() -> None:
    codes = np.array([[0, 1, 2, 3], [3, 3, 0, 1], [2, 0, 0, 2], [1, 1, 1, 1]])
    spread = []
    with bench().double_precision():
        for number in (2, 16):
            toy, model, rollouts = made(f"N {number}", n_rollouts=number)
            spread.append(np.stack([filled(toy, model, rollouts, codes)[:, 0] for _ in range(60)]).var(0))
    # The own end is fixed here: (N - 1) / N^2 of a completion's variance is left.
    ratio = spread[0].mean() / spread[1].mean()
    assert 2 < ratio < 9  # 1/4 against 15/256: 4.3


@pytest.mark.parametrize("positions", [1, 3])
def test_the_gradient_is_unbiased(positions: int) -> None:
    arguments = {"normalize_advantage": False, "baseline": "leave_one_out"}
    with bench().double_precision():
        toy = bench().Toy()
        estimator = bench().Estimator("N 4", Reinforce, arguments, n_rollouts=4, positions=positions)
        plain = bench().Estimator("N 1", Reinforce, arguments)
        found, without = bench().measure(toy, [estimator, plain], n_images=8, repeats=400)
    assert abs(found.scale - 1) < 4 * found.scale_error < 0.2
    assert found.bias < 3 * found.bias_error < 0.3
    assert found.variance < without.variance


def test_completions_of_two_levels_draw_what_was_left(tmp_path) -> None:
    prior = load_levels(make_tiny_run(tmp_path / "run", levels=2), "prior", 2)
    grid = prior.grid
    mask = grid.mask(1, 3)  # one top row given, and the last one never drawn
    codes = torch.randint(16, (6, grid.length), generator=torch.Generator().manual_seed(0))
    codes[:, torch.from_numpy(~grid.mask(0, 3))] = grid.never_drawn
    drawn = np.flatnonzero(mask)
    after = torch.tensor([drawn[k] for k in (0, 3, 7, 8, 20, len(drawn) - 2)])
    left = torch.from_numpy(mask) & (torch.arange(grid.length) > after[:, None])
    begun = codes.masked_fill(left, grid.not_drawn)
    together = complete(make_sampler(prior), grid, begun, 3, torch.Generator().manual_seed(1))
    assert torch.equal(together[~left], codes[~left]) and (together[left] < 16).all()
    assert (together != codes)[left].float().mean() > 0.8
    # Each one as if it were alone, from the same uniforms: the top level, then the bottom one, by the slow sampler.
    uniforms = torch.rand(6, grid.codes_of(3), generator=torch.Generator().manual_seed(1))
    short, n_top = grid.crop(begun, 3), 12
    for i in range(6):
        step = make_sampler(prior)
        step.begin(short[i : i + 1])
        found = short[i].clone()
        for position in (short[i] == grid.not_drawn).nonzero().squeeze(1).tolist():
            cumulative = step.logits().softmax(1).cumsum(1)[0]
            found[position] = int((cumulative <= uniforms[i, position]).sum())
            step.advance(found[position : position + 1])
        assert torch.equal(found, grid.crop(together[i], 3)), (i, n_top)


@pytest.mark.parametrize("algo", ["reinforce", "grpo"])
@pytest.mark.parametrize("reset_mode", ["full", "mixed"])
def test_completions_keep_labels_prefixes_and_stops(algo: str, reset_mode: str) -> None:
    mode = {"full": "full", "mixed": "scratch"}[reset_mode]  # the environment has no real images to continue
    arguments = {"group_size": 4} if algo == "grpo" else {}
    model = make_model(algo, mode, **arguments)
    seen: list[torch.Tensor] = []

    def reward(codes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return codes.float().mean(1) + labels

    reward.sees = "codes"  # type: ignore[attr-defined]
    written = CompositeReward({"mine": 1.0}, functions={"mine": reward}, normalization="none")
    rollouts = MonteCarloReturns(written, n_rollouts=3, positions=2)
    score = written.score

    def keep(codes: torch.Tensor) -> np.ndarray:
        seen.append(codes)
        return score(codes)

    written.score = keep  # type: ignore[method-assign]
    model.learn(1, callback=[written, rollouts])
    buffer, grid = model.rollout_buffer, model.policy.prior.grid
    completions = torch.cat(seen)
    assert len(completions) == 12 * 2 * 2
    before = torch.from_numpy(buffer.codes.astype(np.int64))
    for one in completions:  # each begins like an image of its class, and is as long as it
        like = before[(before[:, -1] == one[-1]) & (before[:, 0] == one[0])]
        assert len(like) and ((like == grid.never_drawn) == (one == grid.never_drawn)).all(1).any()
    assert not torch.equal(completions, before[:1].expand_as(completions))


def test_the_rewards_of_completions_are_normalised_like_the_rollouts() -> None:
    model = make_model("reinforce", "scratch")
    reward = CompositeReward({"a": 0.5, "b": 2.0}, functions={"a": shade, "b": squared})
    model.learn(1, callback=reward)
    buffer = model.rollout_buffer
    paid = np.zeros(buffer.mask.shape)
    paid[buffer.mask] = buffer.rewards
    np.testing.assert_allclose(reward.score(torch.from_numpy(buffer.codes.astype(np.int64))), paid.sum(1), atol=1e-6)


def shade(images: torch.Tensor) -> torch.Tensor:
    return images.float().mean((1, 2, 3))


def squared(images: torch.Tensor) -> torch.Tensor:
    return images.float().square().mean((1, 2, 3))


def test_the_episodes_are_those_without_roll_outs_and_the_same_seed_gives_the_same() -> None:
    weights, codes = [], []
    for number in (1, 3, 3):
        model = make_model("reinforce", n_envs=6)
        reward = CompositeReward({"a": 1.0}, functions={"a": shade})
        callbacks = [reward, *([MonteCarloReturns(reward, number)] if number > 1 else [])]
        model.learn(1, callback=callbacks)
        codes.append(model.rollout_buffer.codes.copy())
        weights.append(torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach().clone())
    assert np.array_equal(codes[0], codes[1]) and torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[0], weights[1])


def test_roll_outs_need_rewards_of_images_and_no_value_function() -> None:
    reward = CompositeReward({"a": 1.0}, functions={"a": shade})
    with pytest.raises(ConfigError, match="value function"):
        make_model("ppo").learn(1, callback=[reward, MonteCarloReturns(reward, 2)])
    compared = CompositeReward({"a": 1.0}, functions={"a": Compares()})
    with pytest.raises(ConfigError, match="a compares sets"):
        make_model("reinforce").learn(1, callback=[compared, MonteCarloReturns(compared, 2)])
    with pytest.raises(ConfigError, match="n_rollouts=1"):
        MonteCarloReturns(reward, 1)


class Compares:
    minimum_batch = 3

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((1, 2, 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": "intermediate"}, "ral.reward intermediate"),
        ({"reward_weights": {"critic": 1.0, "loo_fd": 1.0}}, "loo_fd compares"),
        ({"n_rollouts": 0}, "ral.n_rollouts is 0"),
        ({"rollout_positions": 0}, "ral.rollout_positions is 0"),
    ],
)
def test_settings_without_a_meaning_are_refused_at_the_start(settings: dict[str, Any], message: str) -> None:
    config = replace(SMOKE, ral=replace(SMOKE.ral, **({"n_rollouts": 4} | settings)))
    with pytest.raises(ConfigError, match=message) as error:
        config.check()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("algo", ["ppo", "a2c", "trpo", "maskable_ppo"])
def test_algorithms_with_a_value_function_are_refused(algo: str) -> None:
    with pytest.raises(ConfigError, match=rf"ral.n_rollouts is 4, but {algo}"):
        check_stage(RALConfig(algo=algo, n_rollouts=4))
    check_stage(RALConfig(algo=algo))
    check_stage(RALConfig(algo="grpo", n_rollouts=4))


@pytest.mark.parametrize(
    ("algo", "reset_mode", "critic"), [("reinforce", "mixed", True), ("grpo", "full", True), ("grpo", "mixed", False)]
)
def test_a_killed_run_with_roll_outs_continues_to_bit_identical_weights(tmp_path, algo, reset_mode, critic) -> None:
    weights = {"critic": 1.0} if critic else {"critic": 0.5, "tests.test_rollouts:shade": 0.5}
    ral = replace(SMOKE.ral, algo=algo, reset_mode=reset_mode, n_updates=5, checkpoint_every=2)
    ral = replace(ral, n_rollouts=3, rollout_positions=2, reward_weights=weights)
    config = replace(SMOKE, ral=ral)
    load_plugins(["tests.test_rollouts:shade"])
    whole = start(tmp_path / "whole", config)
    expected = train_ral(*whole, CPU, progress=False)
    broken = start(tmp_path / "broken", config)
    with killed_after(3):
        train_ral(*broken, CPU, progress=False)
    continued = train_ral(*broken, CPU, progress=False)
    for one, other in zip(expected, continued, strict=True):
        for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
    drawn = [line["rollout/completions"] for line in whole[0].metrics("ral")]
    assert drawn == [SMOKE.ral.n_envs * 2 * 2] * 5


@pytest.mark.commands
@pytest.mark.parametrize("kind", ["transformer", "two levels"])
def test_a_run_with_classes_from_the_command_line_resumes(kind: str, tmp_path: Path) -> None:
    train, test = coloured(tmp_path / "train", 90), coloured(tmp_path / "test", 20)
    data = ["--data", f"folder:{train}", "--data.test", f"folder:{test}"]
    rollouts = ["--ral.n-rollouts", "3", "--ral.rollout-positions", "2", "--ral.reset-mode", "mixed"]
    rollouts += ["--ral.n-updates", "4", "--ral.checkpoint-every", "2", "--data.image-size", "32"]
    arguments = ["train", *SMALL, *data, *rollouts, *KINDS[kind], "--runs"]
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    with killed_after(3):
        main([*arguments, str(tmp_path / "broken")])
    assert main([*arguments, str(tmp_path / "broken")]) == 0
    for name in ("policy.safetensors", "policy_ema.safetensors", "critic.safetensors"):
        tensors = [load_tensors(tmp_path / side / "run" / name)[0] for side in ("whole", "broken")]
        assert tensors[0] and all(torch.equal(value, tensors[1][key]) for key, value in tensors[0].items()), name
    lines = [json.loads(line) for line in (tmp_path / "whole/run/metrics.jsonl").read_text().splitlines()]
    assert [line["rollout/completions"] for line in lines if line["stage"] == "ral"] == [SMOKE.ral.n_envs * 2 * 2] * 4


def test_the_command_line_refuses_roll_outs_of_codes_in_one_line(tmp_path: Path, capsys) -> None:
    for more in (["--ral.reward", "intermediate"], ["--algo", "ppo"]):
        assert main(["train", "--preset", "smoke", "--runs", str(tmp_path), "--ral.n-rollouts", "4", *more]) != 0
        assert "ral.n_rollouts is 4" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_own_end_is_one_of_the_roll_outs_and_random_numbers_are_their_own() -> None:
    codes = np.array([[0, 1, 2, 3], [3, 3, 0, 1], [2, 0, 0, 2], [1, 1, 1, 1]])
    with bench().double_precision():
        toy, model, rollouts = made("N 3", n_rollouts=3)
        rollouts.reward.score = lambda completed: np.zeros(len(completed))
        own = toy.rewards["single"].sum(1).numpy()[toy.index(codes)]
        before = torch.get_rng_state()
        returns = filled(toy, model, rollouts, codes)
        assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_allclose(returns, own[:, None] * [1 / 3, 1 / 3, 1 / 3, 1], rtol=1e-6)
