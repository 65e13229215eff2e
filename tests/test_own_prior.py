"""A stranger's prior, in calls: a small transformer that the package knows nothing of."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ral_gym.agents import (
    ALGORITHMS,
    GRPO,
    PriorPolicy,
    PriorWeights,
    Reinforce,
    algorithm_defaults,
    make_sb3_env,
    policy_for,
)
from ral_gym.agents.algorithm import check_stage
from ral_gym.errors import ConfigError
from ral_gym.grid import CodeGrid
from ral_gym.presets import SMOKE
from ral_gym.priors.check import check_prior
from ral_gym.priors.two_level import TwoLevelPrior
from tests.own_priors import GPT, Sharp

POLICY_ALGORITHMS = ["reinforce", "grpo", "ppo", "a2c", "trpo", "maskable_ppo"]
E = 8
TOY = (8, 4, 4)


def toy_gpt(**settings: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(*TOY, **settings)


def make_model(algo: str, prior: Any, n_envs: int = E, **settings: Any) -> Any:
    env = make_sb3_env("ral_gym/Toy-v0", n_envs, seed=0)
    arguments = algorithm_defaults(algo, env, prior=prior) | {"seed": 0, "device": "cpu"} | settings
    return ALGORITHMS[algo](policy_for(algo), env, **arguments)


# ------------------------------------------------------------------------------------------ algorithms


@pytest.mark.parametrize("algo", POLICY_ALGORITHMS)
def test_every_algorithm_trains_it_and_no_weight_stays_behind(algo: str) -> None:
    model = make_model(algo, toy_gpt())
    before = {name: weight.detach().clone() for name, weight in model.policy.prior.named_parameters()}
    model.learn(2 * E * 16)
    moved = {name for name, weight in model.policy.prior.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == before.keys()
    assert isinstance(model.policy.prior, GPT)


@pytest.mark.parametrize("algo", POLICY_ALGORITHMS)
def test_the_ratio_is_1_on_the_first_pass(algo: str) -> None:
    model = make_model(algo, toy_gpt(dropout=0.2))
    seen: list[float] = []
    train = model.train

    def look() -> None:
        model.policy.set_training_mode(True)
        for sample in model.rollout_buffer.get(None):
            _, log_prob, _ = model.policy.evaluate_actions(sample.observations, sample.actions)
            seen.append(float((log_prob - sample.old_log_prob).detach().abs().max()))
        train()

    model.train = look
    model.learn(E * 16)
    assert seen and max(seen) < 1e-5


def test_it_learns_the_toy() -> None:
    model = make_model("grpo", toy_gpt(), n_envs=32, learning_rate=3e-3, group_size=32)
    model.learn(40 * 32 * 16)
    assert np.mean([episode["r"] for episode in list(model.ep_info_buffer)[-32:]]) > 0.3  # random: 0.18


def test_trpo_refuses_weights_that_it_would_leave_out() -> None:
    class Named(GPT):
        def __init__(self, *sizes: int, **settings: Any) -> None:
            super().__init__(*sizes, **settings)
            self.value = nn.Linear(self.hidden_units, self.hidden_units)

        def logits(self, features: torch.Tensor, position: torch.Tensor | None = None) -> torch.Tensor:
            return super().logits(self.value(features))

    with pytest.raises(ConfigError, match=r"would not train value\.weight of Named: rename it"):
        make_model("trpo", Named(*TOY)).learn(E * 16)
    with pytest.raises(ConfigError, match=r"would not train value\.weight of Named: rename it"):
        check_stage(dataclasses.replace(SMOKE.ral, algo="trpo"), [toy_gpt(), Named(*TOY)])
    check_stage(SMOKE.ral, [Named(*TOY)])


# ------------------------------------------------------------------------------------ classes in calls


@pytest.mark.parametrize("prior", [toy_gpt(), Sharp(*TOY, hidden_units=8, residual_units=8, layers=1)])
def test_a_network_keeps_its_class_through_saving_and_loading(prior: Any, tmp_path: Path) -> None:
    env = make_sb3_env("ral_gym/Toy-v0", E, seed=0)
    model = Reinforce(PriorPolicy, env, **algorithm_defaults("reinforce", env, prior=prior), kl_coef=0.1)
    assert type(model.policy.prior) is type(prior)
    model.learn(E * 16)
    model.save(tmp_path / "model.zip")
    again = Reinforce.load(tmp_path / "model.zip", env=env)
    assert type(again.policy.prior) is type(again._reference) is type(prior)
    observation = env.reset()
    assert np.array_equal(*(one.predict(observation, deterministic=True)[0] for one in (model, again)))


def test_weights_pickle_small_and_carry_the_kind() -> None:
    prior = toy_gpt(hidden_units=128)
    weights = PriorWeights.of(prior)
    assert weights.config["kind"] == "tests.own_priors:GPT" and len(pickle.dumps(weights)) < 1000
    again = pickle.loads(pickle.dumps(weights))
    assert again.grid == CodeGrid(4, 4, 8) and isinstance(again.build(), GPT)
    assert isinstance(PriorWeights.of(TwoLevelPrior(GPT(*TOY), GPT(8, 8, 8, condition=(4, 4, 8)))).build().top, GPT)


def test_the_shape_of_its_codes_takes_no_random_number() -> None:
    weights = PriorWeights.of(toy_gpt())
    state = torch.get_rng_state()
    assert weights.grid.n_codes == 16 and torch.equal(torch.get_rng_state(), state)


# ----------------------------------------------------------------------------- networks that are wrong


class Peeks(GPT):
    """Sees the code that it is to draw."""

    def features(self, codes: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        return super().features(codes.roll(-1, 1))


class NoClamp(GPT):
    """Reads tokens that it does not know."""

    def features(self, codes: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        return self.code(torch.cat([0 * codes[:, :1], codes[:, :-1]], 1)) + super().features(codes)


class Forgetful(GPT):
    """Leaves an argument out of its config."""

    config = property(lambda self: {k: v for k, v in GPT.config.fget(self).items() if k != "hidden_units"})  # type: ignore[attr-defined]


class Odd(GPT):
    """Features of another width than it says."""

    def features(self, codes: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        return super().features(codes).repeat(1, 1, 2)

    def logits(self, features: torch.Tensor, position: torch.Tensor | None = None) -> torch.Tensor:
        return super().logits(features[..., : self.hidden_units])


class Tuple(GPT):
    """A config that JSON does not know."""

    config = property(lambda self: {**GPT.config.fget(self), "heads": torch.tensor(4)})  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (Peeks, "is not causal: changing the codes from position 8 on changes its features up to there"),
        (NoClamp, r"fails on codes \(IndexError: index out of range"),
        (Forgetful, r"its config does not rebuild the same network \(block"),
        (Odd, r"features on codes \(1, 16\) gives \(1, 16, 32\)"),
        (Tuple, "cannot be written as JSON"),
    ],
)
def test_a_network_that_breaks_the_protocol_is_refused(cls: type[GPT], said: str) -> None:
    prior = cls(*TOY, hidden_units=16).train()
    with pytest.raises(ConfigError, match=said) as caught:
        PriorWeights.of(prior)
    assert "\n" not in str(caught.value) and prior.training


def test_a_network_that_keeps_it_is_left_as_it_was() -> None:
    prior, state = toy_gpt(dropout=0.3).train(), torch.get_rng_state()
    check_prior(prior)
    assert prior.training and torch.equal(torch.get_rng_state(), state)


def test_grpo_is_what_the_default_policy_name_finds() -> None:
    assert GRPO.policy_aliases["PriorPolicy"] is GRPO.policy_aliases["PixelCNNPolicy"] is PriorPolicy
