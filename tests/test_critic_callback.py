"""The critic's rewards: order of events, what is compared with what, what the agent gets."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

from ral_gym.agents import CoTrainedCritic, CriticCallback, EpisodeRolloutBuffer, PixelCNNPolicy, Reinforce
from ral_gym.agents.vec_env import CodeVecEnv
from ral_gym.config import CriticConfig
from ral_gym.envs.worlds import World
from ral_gym.errors import ConfigError, DivergedError
from ral_gym.grid import CodeGrid
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.rewards.critic import PatchCritic
from ral_gym.rewards.view import FinishedImages
from ral_gym.tokenizers.vqvae import VQVAE

GRID = CodeGrid(4, 4, 8)
CONFIG = CriticConfig(hidden_units=4, layers=3, learning_rate=1e-3, batch_size=4, warmup_steps=12, n_critic=3)


@pytest.fixture
def vqvae() -> VQVAE:
    model = VQVAE(16, 1, codebook_size=8, codebook_dim=4, hidden_units=8, residual_units=4, layers=2)
    model.quantiser.eval()
    return model.eval()


def make_critic(vqvae: VQVAE, **changes: object) -> CoTrainedCritic:
    reward = changes.pop("reward", "single")
    critic = PatchCritic(16, 1, hidden_units=4, layers=2)
    real = np.random.default_rng(0).integers(0, 3, (40, 16)).astype(np.int16)
    return CoTrainedCritic(
        vqvae, critic, real[:30], real[30:], replace(CONFIG, **changes), reward=reward, normalization="max_abs"
    )


def make_env(vqvae: VQVAE, reset_mode: str = "full", n_envs: int = 6, lockstep: bool = True) -> CodeVecEnv:
    real = np.random.default_rng(0).integers(0, 3, (30, 16)).astype(np.int16)
    world = World(GRID, vqvae.decode, None, real, 1, torch.device("cpu"))
    env = CodeVecEnv(world, n_envs, reset_mode=reset_mode, lockstep=lockstep, paired=reset_mode == "mixed")
    env.seed(0)
    return env


def make_model(env: CodeVecEnv, algo: str = "reinforce", **kwargs: object):
    prior = PixelCNN(8, 4, 4, hidden_units=8, residual_units=8, layers=1, conv_filter_size=3, output_stack_layers=1)
    arguments = {"seed": 0, "device": "cpu", "policy_kwargs": {"prior": prior}} | kwargs
    if algo == "ppo":
        arguments |= {"n_steps": 16, "batch_size": 16 * env.num_envs, "rollout_buffer_class": EpisodeRolloutBuffer}
        return PPO(PixelCNNPolicy, env, gamma=1.0, gae_lambda=1.0, **arguments)
    return Reinforce(PixelCNNPolicy, env, **arguments)


@pytest.mark.parametrize("algo", ["reinforce", "ppo"])
@pytest.mark.parametrize("fakes", ["previous", "fresh"])
def test_order_critic_learns_then_scores_then_the_policy_updates(vqvae, algo, fakes, monkeypatch) -> None:
    events: list[str] = []
    trained_on: list[torch.Tensor] = []
    critic = make_critic(vqvae, fakes=fakes)
    env = make_env(vqvae)
    model = make_model(env, algo)
    train_step, rewards, train = critic.train_step, critic.rewards, type(model).train

    def spy_step(codes):
        events.append("critic")
        trained_on.append(codes.clone())
        return train_step(codes)

    scored: list[np.ndarray] = []

    def spy_rewards(pool):
        events.append("score")
        scored.append(pool.codes.numpy().copy())
        return rewards(pool)

    critic.train_step, critic.rewards = spy_step, spy_rewards
    monkeypatch.setattr(type(model), "train", lambda self: (events.append("policy"), train(self))[1])
    model.learn(3 * 16 * 6, callback=CriticCallback(critic))
    per_update = ["critic"] * CONFIG.n_critic + ["score", "policy"]
    assert events == ["critic"] * CONFIG.warmup_steps + per_update * 3
    # Never on the images scored at the end of the same rollout; with "previous" on those of the one before.
    for update in (1, 2):
        first = CONFIG.warmup_steps + update * CONFIG.n_critic
        batch = {tuple(c) for step in trained_on[first : first + CONFIG.n_critic] for c in step.tolist()}
        now, before = ({tuple(c) for c in scored[i].tolist()} for i in (update, update - 1))
        assert not batch & (now - before)
        assert (batch <= before) == (fakes == "previous")


@pytest.mark.parametrize("reset_mode", ["full", "continue", "scratch", "mixed"])
def test_real_images_are_decoded_from_as_many_rows_as_the_fakes(vqvae, reset_mode, monkeypatch) -> None:
    shapes: list[tuple] = []
    import ral_gym.agents.rewards.co_trained_critic as module

    loss = module.critic_loss
    monkeypatch.setattr(
        module,
        "critic_loss",
        lambda c, real, fake, *a, **k: (shapes.append((real.shape, fake.shape)), loss(c, real, fake, *a, **k))[1],
    )
    critic = make_critic(vqvae)
    model = make_model(make_env(vqvae, reset_mode))
    model.learn(16 * 6 * 6, callback=CriticCallback(critic))
    assert all(real == fake for real, fake in shapes)
    heights = {real[2] for real, _ in shapes}
    assert heights == {16} if reset_mode in ("full", "continue") else len(heights) > 1
    # The kept decoded images are those of the codes, not crops of whole images.
    for height, images in critic._real_images.items():
        torch.testing.assert_close(images[3:5], critic.decode(vqvae.grid.crop(critic.real_codes[3:5], height)))


@pytest.mark.parametrize("reward", ["single", "intermediate"])
@pytest.mark.parametrize("algo", ["reinforce", "ppo"])
def test_rewards_reach_the_buffer_and_the_log(vqvae, reward, algo) -> None:
    critic = make_critic(vqvae, reward=reward)
    model = make_model(make_env(vqvae), algo)
    found: dict[str, np.ndarray] = {}

    class Look(CriticCallback):
        def _on_rollout_end(self) -> None:
            super()._on_rollout_end()
            buffer = self.model.rollout_buffer
            maps = self.critic.normalizer(self.critic.score_map(torch.as_tensor(buffer.codes.astype(np.int64))))
            found["map"], found["rewards"] = maps.numpy(), buffer.rewards.reshape(6, 16).copy()
            found["returns"] = buffer.returns.reshape(6, 16).copy()

    model.learn(16 * 6, callback=Look(critic))
    if reward == "single":
        np.testing.assert_allclose(found["rewards"][:, -1], found["map"].mean((1, 2)), atol=1e-5)
        assert (found["rewards"][:, :-1] == 0).all()
    else:
        np.testing.assert_allclose(found["rewards"], found["map"].reshape(6, 16), atol=1e-5)
    np.testing.assert_allclose(found["returns"][:, 0], found["rewards"].sum(1), atol=1e-4)
    mean = np.mean([episode["r"] for episode in model.ep_info_buffer])
    np.testing.assert_allclose(mean, found["rewards"].sum(1).mean(), rtol=1e-5)
    assert np.abs(found["map"]).max() <= 1 + 1e-6


def test_a_pool_gives_batches_of_one_length() -> None:
    codes = (torch.arange(10) % 8)[:, None].repeat(1, 16)
    codes[:5, 8:] = GRID.never_drawn
    codes[5:] = 7
    generator = torch.Generator().manual_seed(0)
    lengths = set()
    for _ in range(20):
        batch = FinishedImages(codes, GRID).batch(7, generator)
        lengths.add(batch.shape[1])
        assert ((batch[:, 0] < 5) == (batch.shape[1] == 8)).all() and batch.max() < 8
    assert lengths == {8, 16}


def test_a_critic_that_has_learnt_nothing_is_said(vqvae, caplog) -> None:
    critic = make_critic(vqvae, learning_rate=1e-12)
    with torch.no_grad():
        critic.critic.head.weight.zero_()
    model = make_model(make_env(vqvae))
    with caplog.at_level(logging.WARNING, logger="ral_gym"):
        model.learn(16 * 6 * 3, callback=CriticCallback(critic))
    said = [r for r in caplog.records if "AUC of only 0.50" in r.getMessage()]
    assert len(said) == 1


def test_a_critic_that_diverges_stops_the_training(vqvae) -> None:
    critic = make_critic(vqvae)
    with torch.no_grad():
        critic.critic.head.bias.fill_(float("nan"))
    with pytest.raises(DivergedError, match=r"critic's loss is nan.*critic\.learning_rate"):
        make_model(make_env(vqvae)).learn(16 * 6, callback=CriticCallback(critic))


def test_the_stock_buffer_is_refused(vqvae) -> None:
    env = make_env(vqvae)
    prior = PixelCNN(8, 4, 4, hidden_units=8, residual_units=8, layers=1)
    model = PPO(PixelCNNPolicy, env, n_steps=16, batch_size=96, device="cpu", policy_kwargs={"prior": prior})
    with pytest.raises(ConfigError, match="not RolloutBuffer: pass rollout_buffer_class=EpisodeRolloutBuffer"):
        model.learn(96, callback=CriticCallback(make_critic(vqvae)))


def test_the_critic_learns_to_tell_real_from_drawn(vqvae) -> None:
    found: dict[str, float] = {}

    class Look(CriticCallback):
        def _report(self, rewards, figures) -> None:
            super()._report(rewards, figures)
            found.update(figures)

    vqvae.quantiser.codebook = torch.randn(8, 4)
    for weights in vqvae.decoder.parameters():
        weights.data *= 2  # else all images are nearly the same
    critic = make_critic(vqvae, learning_rate=3e-3, warmup_steps=150)
    make_model(make_env(vqvae, n_envs=32)).learn(16 * 32, callback=Look(critic))
    assert critic.n_updates == 150 + CONFIG.n_critic
    assert found["heldout_auc"] > 0.8


@pytest.mark.parametrize("reset_mode", ["full", "mixed"])
def test_the_monitor_scores_images_that_the_critic_never_trains_on(vqvae, reset_mode, monkeypatch) -> None:
    critic = make_critic(vqvae)
    critic.real_codes, critic.held_out_codes = critic.real_codes % 2, critic.held_out_codes % 2 + 4  # nothing in common
    seen: list[torch.Tensor] = []
    decode = critic.decode
    monkeypatch.setattr(critic, "decode", lambda codes: (seen.append(codes), decode(codes))[1])
    pool = torch.full((6, 16), 2)
    pool[:3, 8:] = GRID.never_drawn if reset_mode == "mixed" else 2
    critic.rewards(critic.finished(pool))
    real = [codes for codes in seen if not (codes == 2).all()]
    assert len(real) == len({codes.shape[1] for codes in seen}) > 0 and all((codes >= 4).all() for codes in real)


@pytest.mark.parametrize("reset_mode", ["continue", "mixed"])
def test_a_checkpoint_holds_where_fresh_images_come_from(vqvae, reset_mode) -> None:
    """With fresh fakes, starts and real images to continue are drawn by the callback's own generator."""
    drawn = []
    state: dict = {}
    for restored in (False, True):
        torch.manual_seed(1)
        callback = CriticCallback(make_critic(vqvae, fakes="fresh"))
        model = make_model(make_env(vqvae, reset_mode))
        model._setup_learn(1, callback)
        callback.init_callback(model)
        if restored:
            callback.load_state_dict(state)
        else:
            for _ in range(3):  # an odd number: of a pair of partial episodes, the second is still to come
                callback._fresh()
            state = callback.state_dict()
        torch.manual_seed(5)
        drawn.append([callback._fresh().codes for _ in range(4)])
    assert all(torch.equal(one, other) for one, other in zip(*drawn, strict=True))
