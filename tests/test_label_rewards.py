"""Rewards, critics and stage 3 where images have classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from torch import Tensor, nn

from ral_gym.agents import GRPO, PriorPolicy, Reinforce, load_run, make_sb3_env
from ral_gym.agents.rewards.co_trained_critic import CoTrainedCritic
from ral_gym.agents.rewards.composite import CompositeReward
from ral_gym.agents.rewards.critic_callback import CriticCallback
from ral_gym.agents.rewards.deliveries import StepCriticCallback
from ral_gym.agents.train_ral import train_ral
from ral_gym.agents.vec_env import CodeVecEnv
from ral_gym.config import CriticConfig
from ral_gym.envs.toy_classes import GRID, toy_classes_sequences, toy_classes_world
from ral_gym.envs.worlds import World
from ral_gym.errors import ConfigError
from ral_gym.grid import CodeGrid
from ral_gym.presets import SMOKE
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.rewards.critic import PatchCritic, critic_loss, gradient_penalty
from ral_gym.rewards.making import build_critic, load_scorer, save_critic
from ral_gym.rewards.view import FinishedImages
from ral_gym.runs.run import Run, read_config
from ral_gym.runs.storage import load_metadata
from ral_gym.stages.levels import load_generator, load_vqvae
from ral_gym.tokenizers.code_set import CodeSet
from ral_gym.tokenizers.vqvae import VQVAE
from tests.class_runs import make_class_run
from tests.kills import killed_after
from tests.label_models import CPU, FIRST, E, K, T, make_model, make_prior

# Rewards and the critic --------------------------------------------------------------------------------------------


def make_vqvae() -> VQVAE:
    torch.manual_seed(0)
    vqvae = VQVAE(16, 1, codebook_size=K, codebook_dim=4, hidden_units=8, residual_units=4, layers=2)
    vqvae.quantiser.eval()
    vqvae.quantiser.codebook = torch.randn(K, 4)
    for weights in vqvae.decoder.parameters():
        weights.data *= 2  # else all images are nearly the same
    return vqvae.eval()


CONFIG = CriticConfig(hidden_units=4, layers=2, learning_rate=1e-3, batch_size=8, warmup_steps=6, n_critic=3)


def make_critic(critic: nn.Module | None = None, real: np.ndarray | None = None, **changes: Any) -> CoTrainedCritic:
    vqvae, settings = make_vqvae(), replace(CONFIG, **changes)
    network = build_critic(settings, vqvae, classes=3) if critic is None else critic
    real = toy_classes_sequences() if real is None else real
    return CoTrainedCritic(vqvae, network, real, real, settings, classes=3)


def make_world(**changes: Any) -> World:
    return replace(toy_classes_world("none"), decode=make_vqvae().decode, recipe=None, **changes)


def test_a_new_critic_ignores_labels_and_a_trained_one_does_not() -> None:
    critic = make_critic()
    images = torch.randn(6, 1, 16, 16)
    labels = torch.arange(6) % 3
    network: Any = critic.critic
    assert torch.equal(network(images, labels), network(images))
    network.class_embedding.weight.data.normal_()
    features = network.body(images)
    expected = network(images) + (network.class_embedding.weight[labels][:, :, None, None] * features).sum(1)
    torch.testing.assert_close(network(images, labels), expected)
    torch.testing.assert_close(network(images[:, :, :8], labels), network(images[:, :, :8], labels=labels))
    for loss in ("wgan_gp", "hinge"):
        total, _ = critic_loss(network, images, images.flip(0), 10.0, loss=loss, labels=labels)
        network.zero_grad()
        total.backward()
        assert network.class_embedding.weight.grad.abs().sum() > 0
    one, other = (
        gradient_penalty(network, images, images.flip(0), torch.Generator().manual_seed(0), y)
        for y in (labels, labels.flip(0))
    )
    assert one != other
    one, other = (
        critic_loss(network, images, images, 10.0, torch.Generator().manual_seed(0), labels=y)[1]["gradient_penalty"]
        for y in (labels, labels.flip(0))
    )
    assert one != other


def test_without_classes_a_critic_is_what_it_was() -> None:
    settings, vqvae = CONFIG, make_vqvae()
    for network in (
        build_critic(settings, vqvae),
        build_critic(replace(settings, class_conditional=False), vqvae, classes=3),
    ):
        assert isinstance(network, PatchCritic) and "classes" not in network.config
        assert not any("class" in name for name in network.state_dict())


def test_a_critic_learns_which_image_belongs_to_which_class() -> None:
    """The fakes are real images with wrong labels: only a critic that uses labels can tell."""
    real = toy_classes_sequences()
    wrong = torch.as_tensor(real.astype(np.int64))
    wrong[:, -1] = FIRST + (wrong[:, -1] - FIRST + 1) % 3
    aucs = []
    for conditional in (True, False):
        torch.manual_seed(0)
        critic = make_critic(loss="hinge", batch_size=24, learning_rate=1e-2, class_conditional=conditional)
        pool = critic.finished(wrong)
        for _ in range(60):
            critic.train(pool, 1)
        aucs.append(critic.rewards(pool)[1]["heldout_auc"])
    assert aucs[0] > 0.8 and aucs[1] == pytest.approx(0.5, abs=0.02)


def test_real_images_of_a_batch_have_the_classes_of_the_fakes() -> None:
    critic, seen = make_critic(), []
    real = critic.real

    def spy(rows: Tensor, height: int) -> Tensor:
        seen.append(critic.real_codes[rows, -1])
        return real(rows, height)

    critic.real = spy  # type: ignore[method-assign]
    fakes = GRID.with_labels(torch.randint(K, (50, T)), torch.arange(50) % 3)
    critic.train_step(fakes)
    assert torch.equal(seen[0].long(), fakes[:, -1])
    critic.train_step(GRID.crop(fakes, 2))
    rows = {int(row) for _ in range(40) for row in critic._by_class.draw(torch.tensor([1]), critic.generator)}  # type: ignore[union-attr]
    assert rows == set(range(8, 16))
    critic = make_critic(real=toy_classes_sequences()[:16])
    with pytest.raises(ConfigError, match="images of class 2 with real ones, but there is none"):
        critic.train_step(fakes)
    with pytest.raises(ConfigError, match="got rows of 16 real codes: with 3 classes give 17"):
        make_critic(real=toy_classes_sequences()[:, :-1])


class Own(nn.Module):
    """A critic that knows no labels."""

    sees = "codes"

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Embedding(K, 1)

    def forward(self, codes: Tensor) -> Tensor:
        assert codes.max() < K
        return self.scores(codes).mean((1, 2))


class OwnWithLabels(Own):
    """One that does, in its loss too."""

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        return super().forward(codes) * labels

    def loss(self, real: Tensor, fake: Tensor, generator: torch.Generator, labels: Tensor) -> Tensor:
        assert len(labels) == len(real) == len(fake)
        return self(fake, labels).mean() - self(real, labels).mean()


@pytest.mark.parametrize("cls", [Own, OwnWithLabels, None])
@pytest.mark.parametrize("fakes", ["previous", "fresh"])
@pytest.mark.parametrize("reset_mode", ["full", "mixed"])
def test_any_critic_trains_in_a_world_with_classes(cls: Any, fakes: str, reset_mode: str) -> None:
    critic = make_critic(None if cls is None else cls(), fakes=fakes, loss="hinge")
    env = CodeVecEnv(make_world(), E, reset_mode=reset_mode, paired=reset_mode == "mixed")
    model = Reinforce(PriorPolicy, env, policy_kwargs={"prior": make_prior()}, device="cpu", seed=0)
    callback = CriticCallback(critic)
    model.learn(3 * E * T, callback)
    state = callback.state_dict()
    assert callback._pool is not None and callback._pool.codes.shape == (E, T + 1)
    CriticCallback(critic).load_state_dict(state | {"pool": state["pool"].numpy()})
    assert critic.n_updates >= 15


def test_a_critic_for_other_classes_is_refused_at_the_start() -> None:
    vqvae, real = make_vqvae(), toy_classes_sequences()[:, :-1]
    critic = CoTrainedCritic(vqvae, build_critic(CONFIG, vqvae), real, real, CONFIG)
    env = CodeVecEnv(make_world(), E)
    model = Reinforce(PriorPolicy, env, policy_kwargs={"prior": make_prior()}, device="cpu")
    with pytest.raises(ConfigError, match=r"made for no classes, but the environment has 3: give .* classes=3"):
        model.learn(E, CriticCallback(critic))


def test_rewards_by_steps_see_the_label_too() -> None:
    critic = make_critic(OwnWithLabels(), loss="hinge")
    model = PPO("MlpPolicy", CodeVecEnv(make_world(), 4), n_steps=16, batch_size=16, device="cpu", seed=0)
    model.learn(4 * T * 3, StepCriticCallback(critic, episodes_per_update=4))
    assert critic.n_updates == 6 + 3 * 3  # the warm-up, and 3 steps after each round of 4 images


def test_named_rewards_see_labels_and_codes_without_them() -> None:
    seen: list[Tensor] = []

    def by_class(images: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels)
        return labels.float()

    def colours(codes: Tensor) -> Tensor:
        assert codes.max() < K
        return codes.float()

    colours.sees = "codes"  # type: ignore[attr-defined]
    model = make_model("grpo", "mixed", group_size=3)
    reward = CompositeReward(
        {"by_class": 1.0, "colours": 1.0}, functions={"by_class": by_class, "colours": colours}, normalization="none"
    )
    model.learn(1, reward)
    buffer = model.rollout_buffer
    order = torch.cat([labels.sort().values for labels in seen])
    assert torch.equal(order.sort().values, torch.as_tensor(buffer.codes[:, -1] - FIRST).long().sort().values)
    totals = np.zeros(buffer.mask.shape)
    totals[buffer.mask] = buffer.rewards
    expected = np.where(buffer.mask, buffer.codes, 0).sum(1) + buffer.codes[:, -1] - FIRST
    np.testing.assert_allclose(totals.sum(1), expected, rtol=1e-5)


def test_finished_images_keep_labels_apart() -> None:
    sequences = torch.as_tensor(toy_classes_sequences().astype(np.int64))
    sequences[:12, 8:16] = K + 1
    images = FinishedImages(sequences, GRID)
    assert images.image_rows.tolist() == [2] * 12 + [4] * 12
    short = images.view(2)
    assert short.codes.shape == (12, 8) and short.labels is not None and short.labels.tolist() == [0] * 8 + [1] * 4
    assert images.positions(2).tolist() == list(range(8))
    batch = images.batch(5, torch.Generator().manual_seed(0))
    assert batch.shape[1] in (9, 17) and batch[:, -1].min() >= FIRST
    column = CodeGrid(3, 1, K, classes=2)
    assert FinishedImages(torch.tensor([[1, K + 1, K + 1, FIRST]]), column).image_rows.tolist() == [1]


# Runs --------------------------------------------------------------------------------------------------------------


def make_stage_3(path: Path, **ral: Any) -> Run:
    make_class_run(path)
    config = read_config(path)
    config = replace(config, ral=replace(SMOKE.ral, n_envs=6, n_updates=4, checkpoint_every=2, **ral))
    (path / "critic.safetensors").unlink()
    (path / "config.json").write_text(config.to_json())
    return Run(path, config)


def train(run: Run) -> Any:
    vqvae, prior = load_vqvae(run), load_generator(run, "prior")
    return train_ral(run, vqvae, prior, CodeSet.load(run.file("codes.safetensors")), CPU, progress=False)


@pytest.mark.parametrize(
    ("algo", "reset_mode", "terms"),
    [("grpo", "full", {"critic": 1.0}), ("ppo", "mixed", {"critic": 1.0}), ("reinforce", "mixed", {"kid": 1.0})],
)
def test_a_killed_run_with_classes_continues_bit_for_bit(
    tmp_path: Path, algo: str, reset_mode: str, terms: dict[str, float]
) -> None:
    runs = [
        make_stage_3(
            tmp_path / name, algo=algo, reset_mode=reset_mode, reward_weights=terms, kl_coef=0.01, mle_coef=0.1
        )
        for name in ("whole", "broken")
    ]
    expected = train(runs[0])
    with killed_after(3):
        train(runs[1])
    continued = train(runs[1])
    for one, other in zip(expected, continued, strict=True):
        for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
    assert expected[0].grid.classes == 3
    if "critic" in terms:
        files = [run.file("critic.safetensors") for run in runs]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert load_metadata(files[0])["config"]["classes"] == 3
        stage = load_run(runs[0].path)
        scorer = load_scorer(files[0], load_vqvae(runs[0]))
        codes, labels = torch.randint(16, (4, 16)), torch.arange(4) % 3
        torch.testing.assert_close(scorer.score(codes, labels), stage.critic.scorer.score(codes, labels))
        env: Any = make_sb3_env("ral_gym/LatentCode-v0", 3, run=str(runs[0].path))
        env.set_options({"label": "dog"})
        env.reset()
        finished = env.core.draw_round(np.zeros((3, 17), np.int64))
        right = scorer(torch.zeros(3, 16).long(), torch.ones(3).long())[1].sum(1)
        np.testing.assert_allclose(finished.rewards, right.detach().numpy(), rtol=1e-4)


def test_labels_are_drawn_as_the_settings_say(tmp_path: Path) -> None:
    run = make_stage_3(tmp_path / "data", algo="ppo", reset_mode="full", label_draw="data")
    train(run)
    assert load_run(run.path).model.env.core.labels._draw == "data"
    run = make_stage_3(tmp_path / "none", label_draw="data")
    make_class_run(run.path, classes=0)
    with pytest.raises(ConfigError, match=r"ral.label_draw is data, but the prior has no classes"):
        train(run)


def test_a_critic_file_without_classes_has_no_trace_of_them(tmp_path: Path) -> None:
    vqvae = make_vqvae()
    critic = make_critic(PatchCritic(16, 1, hidden_units=4, layers=2))
    save_critic(tmp_path / "critic.safetensors", critic.scorer, "patch")
    assert set(load_metadata(tmp_path / "critic.safetensors")["config"]) == {
        "image_size",
        "channels",
        "hidden_units",
        "layers",
    }
    load_scorer(tmp_path / "critic.safetensors", vqvae)


def test_a_pixelcnn_without_classes_still_learns_where_there_are_none() -> None:
    env = make_sb3_env("ral_gym/Toy-v0", 4, seed=0)
    prior = PixelCNN(8, 4, 4, hidden_units=8, residual_units=8, layers=1, conv_filter_size=3, output_stack_layers=1)
    model = GRPO(PriorPolicy, env, policy_kwargs={"prior": prior}, group_size=3, device="cpu", seed=0)
    model.learn(4 * T)
    assert model.rollout_buffer.codes.shape == (4, T)
