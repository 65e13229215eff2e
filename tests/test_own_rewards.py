"""Rewards that someone brings: what they are shown, what they are paid as, by name through every command."""

import json
import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ral_gym import registry
from ral_gym.agents.rewards.composite import CompositeReward
from ral_gym.commands.cli import main, train_main
from ral_gym.errors import ConfigError
from ral_gym.metrics import EncoderFeatures
from ral_gym.registry import REWARDS
from ral_gym.rewards.terms import RewardTerm, reward
from ral_gym.rewards.view import FinishedImages, View
from ral_gym.runs.storage import load_tensors
from tests.kills import killed_after
from tests.test_composite_reward import CRITIC, learn, make_critic, make_model, runs, standard, world_of
from tests.test_reward_terms import stage_2, train, weights

__all__ = ["runs"]  # a fixture

EXAMPLES = Path(__file__).parents[1] / "examples" / "extending"


@pytest.fixture
def own_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the user stood in examples/extending; nothing that a test registers or allows stays."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(registry, "_allowed", set())
    for parts in (REWARDS, registry.CRITICS):
        monkeypatch.setattr(parts, "_parts", dict(parts._parts))
    for name in ("own_reward", "own_critic"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)


def bright(images: Tensor) -> Tensor:
    return images.float().mean((1, 2, 3))


class Repeats:
    """How often a code follows itself, code by code."""

    sees = "codes"

    def __call__(self, codes: Tensor) -> Tensor:
        return torch.nn.functional.pad((codes[:, 1:] == codes[:, :-1]).float(), (1, 0))


# What a reward is shown ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_critic", [True, False])
def test_nothing_is_decoded_twice_and_no_features_are_taken_twice(runs, monkeypatch, with_critic: bool) -> None:
    """Per rollout of 8: 8 decoded for all terms together; 2 critic steps of 4 + 4 where there is a critic."""
    model = make_model(runs[1])
    vqvae = world_of(model).decode.args[0]
    decoded, measured = [], []
    decode, forward = type(vqvae).decode, EncoderFeatures.forward
    monkeypatch.setattr(type(vqvae), "decode", lambda self, codes: (decoded.append(len(codes)), decode(self, codes))[1])
    monkeypatch.setattr(
        EncoderFeatures, "forward", lambda self, images: (measured.append(len(images)), forward(self, images))[1]
    )
    functions = {"bright": bright, "dark": lambda images: -bright(images), "repeats": Repeats()}
    terms = {"loo_fd": 1.0, "kid": 1.0, "loo_fd_diagonal": 1.0, **dict.fromkeys(functions, 1.0)}
    critic = make_critic(model) if with_critic else None
    callback = CompositeReward(terms | ({"critic": 1.0} if critic else {}), critic=critic, functions=functions)
    learn(model, callback)  # the warm-up, the reference and the held-out images
    decoded.clear(), measured.clear()
    write, rollouts = callback.write, []
    callback.write = lambda *a: (rollouts.append(1), write(*a))[1]  # type: ignore[method-assign]
    learn(model, callback)
    steps = CRITIC.n_critic * CRITIC.batch_size if critic else 0  # of fakes; the real ones are kept
    assert sum(decoded) == len(rollouts) * (8 + steps) > 0
    assert sum(measured) == len(rollouts) * 8


def test_terms_that_read_codes_decode_nothing(runs, monkeypatch) -> None:
    model = make_model(runs[1])
    monkeypatch.setattr(type(world_of(model).decode.args[0]), "decode", None)
    learn(model, CompositeReward({"repeats": 1.0}, functions={"repeats": Repeats()}))


def test_a_reward_sees_what_it_asks_for(runs) -> None:
    model, seen = make_model(runs[1]), {}

    def look(sees: str) -> Any:
        def function(what: Tensor, labels: Tensor | None = None) -> Tensor:
            seen[sees] = what
            return torch.zeros(len(what))

        function.sees = sees  # type: ignore[attr-defined]
        return function

    functions = {sees: look(sees) for sees in ("pixels", "codes", "features")}
    (rollout,) = learn(model, CompositeReward(dict.fromkeys(functions, 1.0), functions=functions))
    world = world_of(model)
    assert torch.equal(seen["codes"], torch.from_numpy(rollout["codes"]).long())
    assert torch.equal(seen["pixels"], world.decode(seen["codes"])) and seen["pixels"].dtype == torch.uint8
    vqvae = world.decode.args[0]
    torch.testing.assert_close(
        seen["features"], EncoderFeatures(vqvae.encode_features, vqvae.num_features)(seen["pixels"])
    )


def test_labels_are_given_to_those_that_ask() -> None:
    labels = torch.tensor([3, 1, 2])
    images = FinishedImages(torch.zeros(3, 16).long(), world_grid(), None, labels)
    term = RewardTerm("labelled", Labelled())
    assert term(images.view(4), 4).tolist() == [3, 1, 2]


class Labelled:
    sees = "codes"

    def __call__(self, codes: Tensor, labels: Tensor) -> Tensor:
        return labels.float()


def world_grid():
    from tests.tiny import GRID

    return GRID


# What it is paid ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 2])
def test_rewards_of_codes_are_paid_code_by_code_on_their_own_scale(runs, levels: int) -> None:
    model = make_model(runs[levels])
    functions = {"repeats": Repeats(), "bright": bright}
    (rollout,) = learn(model, CompositeReward({"repeats": 2.0, "bright": 1.0}, functions=functions))
    codes = torch.from_numpy(rollout["codes"]).long()
    by_code = Repeats()(codes).double().numpy()
    expected = 2 / by_code.sum(1).std() * by_code
    expected[:, -1] += standard(bright(world_of(model).decode(codes)).double().numpy())
    np.testing.assert_allclose(rollout["rewards"], expected, rtol=1e-4, atol=1e-4)
    assert rollout["logged"]["reward/repeats_mean"] == pytest.approx(by_code.sum(1).mean())


def test_only_drawn_codes_are_paid(runs) -> None:
    model = make_model(runs[1], reset_mode="mixed")
    functions = {"ones": Ones()}
    callback = CompositeReward({"ones": 1.0}, functions=functions, normalization="none")
    for rollout in learn(model, callback, rollouts=4):
        drawn = model.rollout_buffer.mask.shape
        assert rollout["rewards"].shape[1] == drawn[1]
        totals = rollout["rewards"].sum(1)
        assert rollout["logged"]["reward/ones_mean"] == pytest.approx(totals.mean(), rel=1e-5)
        assert totals.max() <= 16 and totals.min() >= 4


class Ones:
    sees = "codes"

    def __call__(self, codes: Tensor) -> Tensor:
        return torch.ones(codes.shape)


# What it remembers --------------------------------------------------------------------------------------------------


class Counter:
    """Pays how many images it has seen before, and how many real ones it was given to compare with."""

    sees = "codes"

    def __init__(self, reference: Tensor, ema: float) -> None:
        self.seen, self.reference, self.ema = 0, len(reference), ema

    def __call__(self, codes: Tensor) -> Tensor:
        self.seen += len(codes)
        return torch.arange(len(codes)) + self.seen + 100.0 * self.reference

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


def test_a_class_is_made_with_what_it_asks_for_and_remembers(runs) -> None:
    model = make_model(runs[1])
    callback = CompositeReward({"counter": 1.0}, functions={"counter": Counter}, normalization="none", ema=0.25)
    found = learn(model, callback, rollouts=2)
    real = len(world_of(model).real_codes)
    assert [rollout["rewards"][0, -1] for rollout in found] == [8 + 100 * real, 16 + 100 * real]
    assert callback.state_dict()["terms"] == {"counter/4": {"seen": 16}}
    again = CompositeReward({"counter": 1.0}, functions={"counter": Counter}, normalization="none", ema=0.25)
    again.load_state_dict(callback.state_dict())
    (rollout,) = learn(make_model(runs[1]), again)
    assert rollout["rewards"][0, -1] == 24 + 100 * real
    assert again.terms[0].function(4).ema == 0.25


def test_an_object_is_not_shared_between_runs_or_heights() -> None:
    shared = Restarted()
    term, other = RewardTerm("r", shared), RewardTerm("r", shared)
    for rows in (1, 2, 2):
        term(View(torch.zeros(3, 4 * rows).long(), None), rows)
    assert (term.function(1).calls, term.function(2).calls) == (1, 2)
    assert other.function(1).calls == 0 and shared.calls == 7


class Restarted:
    sees, calls = "codes", 7

    def reset(self) -> None:
        self.calls = 0

    def __call__(self, codes: Tensor) -> Tensor:
        self.calls += 1
        return torch.zeros(len(codes))


def test_a_network_is_made_once_and_its_weights_are_not_kept() -> None:
    term = RewardTerm("net", Network)
    assert term.function(1) is term.function(4) and term.state_dict() == {}


class Network(nn.Linear):
    sees = "codes"

    def __init__(self) -> None:
        super().__init__(1, 1)


# Refusals -----------------------------------------------------------------------------------------------------------


def test_what_a_reward_cannot_be_is_refused(runs) -> None:
    class Lost:
        sees = "codes"

        def state_dict(self) -> dict[str, Any]:
            return {"object": object()}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

        def __call__(self, codes: Tensor) -> Tensor:
            return torch.zeros(len(codes))

    class Wanting:
        def __init__(self, teacher: str) -> None: ...

    blind = Repeats()
    blind.sees = "sound"
    refused = [
        (blind, "reward 'own' sees 'sound': choose one of pixels, codes, features"),
        (3, "reward 'own' is a int: give a function or a class"),
        (Lost(), "reward 'own': cannot save a object in a checkpoint; let state_dict give"),
        (Wanting, "reward 'own' asks for teacher: its constructor may take reference, ema, components"),
        (lambda images: torch.zeros(8, 16), r"gave shape \(8, 16\) for 8 images: one number per image is needed$"),
    ]
    for part, message in refused:
        with pytest.raises(ConfigError, match=message):
            learn(make_model(runs[1]), CompositeReward({"own": 1.0}, functions={"own": part}))
    codes_reward = Repeats()
    codes_reward.__class__ = type("Wrong", (Repeats,), {"__call__": lambda self, codes: torch.zeros(3)})
    with pytest.raises(ConfigError, match=r"shape \(3,\) for 8 images: one .* or one per code, \(8, 16\)"):
        learn(make_model(runs[1]), CompositeReward({"own": 1.0}, functions={"own": codes_reward}))


# By name, through the commands --------------------------------------------------------------------------------------


def start(base: Path, runs: Path, *flags: str) -> int:
    shared = ["--start-from", str(base), "--runs", str(runs), "--name", "own", "--quiet", "--stages", "ral"]
    return train_main([*shared, "--ral.n-updates", "2", *flags])


def test_stage_3_pays_rewards_by_name(own_parts, smoke_run: Path, tmp_path: Path) -> None:
    flags = ["--plugin", "own_reward", "own_reward:Novelty", "--ral.reward-weights"]
    terms = ["critic", "1", "bright", "0.5", "calm", "0.25", "own_reward:Novelty", "1"]
    assert start(smoke_run, tmp_path, *flags, *terms) == 0
    lines = [json.loads(line) for line in (tmp_path / "own" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["stage"] == "ral"][-1]
    for name in ("critic", "bright", "calm", "own_reward:Novelty"):
        assert np.isfinite(last[f"reward/{name}_mean"]) and last[f"reward/{name}_std"] > 0
    assert 0 < last["reward/bright_mean"] < 255


def test_a_run_with_someones_reward_draws_without_it(own_parts, smoke_run: Path, tmp_path: Path, monkeypatch) -> None:
    assert start(smoke_run, tmp_path, "--plugin", "own_reward", "--ral.reward-weights", "bright", "1") == 0
    monkeypatch.setattr(REWARDS, "_parts", {})
    assert main(["sample", str(tmp_path / "own"), "--n", "2", "--output", str(tmp_path / "grid.png")]) == 0


def test_a_file_cannot_name_code(own_parts, smoke_run: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """A run folder from a stranger: its config.json names a module that would be run."""
    folder = tmp_path / "hostile"
    shutil.copytree(smoke_run, folder)
    (tmp_path / "wicked.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\ndef f(images): return images[:, 0, 0, 0]"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    values = json.loads((folder / "config.json").read_text())
    values["ral"]["reward_weights"] = {"wicked:f": 1.0}
    (folder / "config.json").write_text(json.dumps(values))
    assert start(folder, tmp_path / "new") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "reward 'wicked:f' is code that a file names" in said and "--plugin wicked:f" in said
    from ral_gym.agents import load_run

    with pytest.raises(ConfigError, match="is code that a file names"):
        load_run(folder)
    with pytest.raises(ConfigError, match="is code that a file names"):
        gym.make("ral_gym/LatentCode-v0", run=str(folder), reward="wicked:f")
    assert not (tmp_path / "ran").exists()
    assert start(folder, tmp_path / "new", "--plugin", "wicked:f") == 0  # the user says so
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("algo", ["reinforce", "grpo", "ppo", "a2c", "trpo", "maskable_ppo"])
def test_a_killed_run_continues_with_what_rewards_remember(own_parts, tmp_path: Path, monkeypatch, algo: str) -> None:
    registry.load_plugins(["own_reward:Novelty", "own_reward"])
    ral = {"algo": algo, "reward_weights": {"own_reward:Novelty": 1.0, "calm": 0.5}, "n_updates": 3}
    whole, broken = (stage_2(tmp_path / name, **ral) for name in ("whole", "broken"))
    train(whole)
    with killed_after(2):
        train(broken)
    train(broken)
    assert weights(whole) == weights(broken)
    for one, other in zip(*(run.metrics("ral") for run in (whole, broken)), strict=True):
        assert one["reward/own_reward:Novelty_mean"] == other["reward/own_reward:Novelty_mean"]
    kept = load_tensors(broken.file("checkpoints/ral.safetensors"))[1]
    assert "own_reward:Novelty/4" in json.dumps(kept)


def test_an_environment_pays_a_reward_by_name(own_parts, smoke_run: Path) -> None:
    registry.load_plugins(["own_reward"])
    for id_, arguments in (("Toy-v0", {}), ("LatentCode-v0", {"run": str(smoke_run)})):
        for name in ("bright", "calm"):
            env = gym.make(f"ral_gym/{id_}", reward=name, **arguments)
            env.reset(seed=0)
            total, terminated = 0.0, False
            while not terminated:
                _, earned, terminated, _, info = env.step(env.action_space.sample())
                total += float(earned)
            world = env.unwrapped.world
            codes = torch.from_numpy(info["codes"][None].astype(np.int64))
            part = REWARDS.get(name)
            expected = float(bright(world.decode(codes)) if name == "bright" else part(codes).sum())
            assert total == pytest.approx(expected, rel=1e-5)
            assert info["step_rewards"].sum() == pytest.approx(expected, rel=1e-5)
    for name, message in (("kid", "needs more than one image's"), ("none_such", "'none_such' is unknown")):
        with pytest.raises(ValueError, match=message):
            gym.make("ral_gym/Toy-v0", reward=name)


def test_a_name_is_taken_once_and_what_it_sees_is_checked(own_parts) -> None:
    with pytest.raises(ConfigError, match="reward 'own' sees 'sound'"):
        reward("own", sees="sound")(bright)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a reward called 'kid' is registered already"):
        reward("kid")(lambda images: bright(images))
