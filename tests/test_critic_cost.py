"""What an update of stage 3 costs, and which held-out images it measures the critic on (not those it learns from)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ral_gym.agents import CoTrainedCritic, CriticCallback, load_run
from ral_gym.rewards.critic import PatchCritic
from ral_gym.tokenizers.vqvae import VQVAE
from tests.test_critic_callback import CONFIG, make_critic, make_env, make_model, vqvae
from tests.test_reward_terms import stage_2, train

__all__ = ["vqvae"]  # a fixture


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images every call decodes."""
    counts: list[int] = []
    decode = VQVAE.decode
    monkeypatch.setattr(VQVAE, "decode", lambda self, codes: (counts.append(len(codes)), decode(self, codes))[1])
    return counts


def updates(vqvae: VQVAE, n_real: int, n_held_out: int, rollouts: int = 3, **settings: Any) -> CoTrainedCritic:
    rng = np.random.default_rng(1)
    real, held_out = (rng.integers(0, 3, (n, 16)).astype(np.int16) for n in (n_real, n_held_out))
    config = replace(CONFIG, **settings)
    critic = CoTrainedCritic(vqvae, PatchCritic(16, 1, hidden_units=4, layers=2), real, held_out, config)
    make_model(make_env(vqvae)).learn(16 * 6 * rollouts, callback=CriticCallback(critic))
    return critic


def test_the_cost_of_an_update_does_not_grow_with_the_data(vqvae, monkeypatch) -> None:
    found = []
    for n_real, n_held_out in ((3000, 40), (3000, 400), (9000, 4000)):
        with monkeypatch.context() as patch:
            counts = counted(patch)
            critic = updates(vqvae, n_real, n_held_out, held_out=20)
        found.append(sum(counts))
        assert len(critic.held_out_codes) == 20
    assert len(set(found)) == 1


class Table(nn.Embedding):
    """A score per image: the mean of what a fixed table says of its codes."""

    sees = "codes"

    def __init__(self) -> None:
        super().__init__(8, 1)
        self.weight.data = torch.linspace(-1, 1, 8)[:, None]

    def forward(self, codes: Tensor) -> Tensor:
        return super().forward(codes).mean((1, 2))


def test_the_scale_of_the_scores_does_not_drift_with_the_data(vqvae) -> None:
    """The largest of many scores is larger than that of few: with all held-out images the scale would rise."""
    rng = np.random.default_rng(1)
    scales: dict[int, list[float]] = {0: [], 30: []}
    for held_out in scales:
        for n in (30, 3000):
            codes = rng.integers(0, 8, (n, 16)).astype(np.int16)
            critic = CoTrainedCritic(vqvae, Table(), codes, codes, replace(CONFIG, held_out=held_out))
            critic.rewards(critic.finished(torch.from_numpy(codes[:6]).long()))
            scales[held_out].append(critic.normalizer.scale)
    assert scales[0][1] > 1.3 * scales[0][0]
    assert scales[30][1] == pytest.approx(scales[30][0], rel=0.2)


def test_held_out_images_are_chosen_once_and_for_all(vqvae) -> None:
    codes = np.arange(100 * 16).reshape(100, 16) % 8
    one, other, third = (
        CoTrainedCritic(
            vqvae, PatchCritic(16, 1, hidden_units=4, layers=2), codes, codes, replace(CONFIG, held_out=7), seed=seed
        )
        for seed in (1, 1, 2)
    )
    assert torch.equal(one.held_out_codes, other.held_out_codes)
    assert one.held_out_codes.shape == (7, 16)
    everything = make_critic(vqvae, held_out=7)
    assert len(everything.held_out_codes) == 7 and third.held_out == 7
    assert len(make_critic(vqvae, held_out=0).held_out_codes) == len(make_critic(vqvae).held_out_codes) == 10


def test_a_half_finished_run_ends_under_the_rule_it_began_with(vqvae) -> None:
    critic, old = make_critic(vqvae, held_out=4), make_critic(vqvae, held_out=0)
    state = old.state_dict()
    state.pop("held_out")  # a checkpoint of an older version: all held-out images
    critic.load_state_dict(state)
    assert len(critic.held_out_codes) == 10
    assert critic.state_dict()["held_out"] == 0  # and the next checkpoint says so
    again = make_critic(vqvae, held_out=4)
    again.load_state_dict(critic.state_dict())
    assert len(again.held_out_codes) == 10
    fresh = make_critic(vqvae, held_out=4)
    fresh.load_state_dict(make_critic(vqvae, held_out=4).state_dict())
    assert len(fresh.held_out_codes) == 4


def test_the_area_is_measured_on_images_that_were_not_trained_on(tmp_path: Path) -> None:
    """Of a real run: its held-out codes are the test images', none of them a training image."""
    run = stage_2(tmp_path / "run", n_updates=2)
    train(run)
    critic = load_run(run.path).critic
    held_out = {tuple(codes) for codes in critic.held_out_codes.tolist()}
    trained = {tuple(codes) for codes in critic.real_codes.tolist()}
    assert held_out and not held_out & trained
