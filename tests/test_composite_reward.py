"""Several rewards in one: what each term is worked out from, how they are scaled and added, what is refused."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from torch import Tensor

from ral_gym.agents import (
    GRPO,
    CoTrainedCritic,
    CriticCallback,
    EpisodeRolloutBuffer,
    PixelCNNPolicy,
    Reinforce,
    make_sb3_env,
)
from ral_gym.agents.rewards.composite import CompositeReward
from ral_gym.agents.vec_env import CodeVecEnv, unwrap_code_env
from ral_gym.config import CriticConfig
from ral_gym.errors import ConfigError, DivergedError
from ral_gym.metrics import EncoderFeatures
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.rewards.critic import PatchCritic
from ral_gym.rewards.distribution import FrechetReward, KernelReward
from ral_gym.runs.storage import load_tensors, pack_state, save_tensors, unpack_state
from ral_gym.tokenizers.code_set import decode_codes
from tests.tiny import GRID, make_tiny_run

N_ENVS = 8
CRITIC = CriticConfig(hidden_units=4, layers=2, learning_rate=1e-3, batch_size=4, warmup_steps=2, n_critic=1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[int, str]:
    folder = tmp_path_factory.mktemp("runs")
    for levels in (1, 2):
        file = make_tiny_run(folder / str(levels), levels=levels) / "vqvae.safetensors"
        tensors, metadata = load_tensors(file)
        # Else the features of all images are alike up to the rounding of float32.
        louder = {name: w * 4 if name.startswith("encoder") and w.dim() > 1 else w for name, w in tensors.items()}
        save_tensors(file, louder, metadata)
    return {levels: str(folder / str(levels)) for levels in (1, 2)}


def make_model(run: str, cls: type = Reinforce, reset_mode: str = "full", lockstep: bool = True, **kwargs: Any):
    env_arguments = {"run": run, "reward": "none", "reset_mode": reset_mode, "lockstep": lockstep, "device": "cpu"}
    env = make_sb3_env("ral_gym/LatentCode-v0", N_ENVS, seed=0, **env_arguments)
    code_env = unwrap_code_env(env)
    arguments: dict[str, Any] = {"policy_kwargs": {"prior": run}, "seed": 0, "device": "cpu"} | kwargs
    if code_env.levels is not None and len(code_env.levels) > 1:
        arguments["rollout_buffer_kwargs"] = {"levels": code_env.levels}
        arguments["policy_kwargs"] |= {"levels": code_env.levels}
    return cls(PixelCNNPolicy, env, **arguments)


def world_of(model):
    env = unwrap_code_env(model.env)
    assert isinstance(env, CodeVecEnv)
    return env.world


def make_critic(model, reward: str = "single") -> CoTrainedCritic:
    world, vqvae = world_of(model), world_of(model).decode.args[0]
    torch.manual_seed(0)
    critic = PatchCritic(32, 1, hidden_units=4, layers=2)
    return CoTrainedCritic(vqvae, critic, world.real_codes, world.real_codes, CRITIC, reward=reward, seed=0)


def learn(model, callback: CompositeReward, rollouts: int = 1) -> list[dict[str, np.ndarray]]:
    """Train; the codes, rewards (n, T) and returns (n, T) of every rollout, and the figures logged at its end."""
    found: list[dict[str, Any]] = []
    end = callback._on_rollout_end

    def look() -> None:
        end()
        buffer = model.rollout_buffer
        rewards, returns = np.zeros(buffer.mask.shape), np.zeros(buffer.mask.shape)
        rewards[buffer.mask], returns[buffer.mask] = buffer.rewards, buffer.returns
        logged = dict(model.logger.name_to_value)
        found.append({"codes": buffer.codes.copy(), "rewards": rewards, "returns": returns, "logged": logged})

    callback._on_rollout_end = look  # type: ignore[method-assign]
    steps = unwrap_code_env(model.env).world.grid.n_codes * N_ENVS
    model.learn(model.num_timesteps + rollouts * steps, callback=callback, reset_num_timesteps=False)
    return found[:rollouts]


def brightness(images: Tensor) -> Tensor:
    assert images.dtype == torch.uint8 and images.dim() == 4
    return images.float().mean((1, 2, 3))


def features_of(model, codes: np.ndarray) -> Tensor:
    vqvae = world_of(model).decode.args[0]
    images = decode_codes(vqvae, torch.from_numpy(codes.astype(np.int64)))
    return EncoderFeatures(vqvae.encode_features, vqvae.num_features)(images)


def standard(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / values.std()


@pytest.mark.parametrize("cls", [Reinforce, GRPO])
def test_one_line_gives_the_leave_one_out_reward_of_the_encoders_features(runs, cls) -> None:
    model = make_model(runs[1], cls)
    rollouts = learn(model, CompositeReward({"loo_fd": 1.0}, ema=0.5), rollouts=3)
    reference = features_of(model, world_of(model).real_codes)
    expected = FrechetReward(reference, "exact", 0.5)
    for rollout in rollouts:
        by_hand = expected(features_of(model, rollout["codes"])).numpy()
        np.testing.assert_allclose(rollout["rewards"][:, -1], standard(by_hand), rtol=1e-3, atol=1e-4)
        assert (rollout["rewards"][:, :-1] == 0).all()
        assert rollout["logged"]["reward/loo_fd_mean"] == pytest.approx(by_hand.mean(), rel=1e-3)
        assert rollout["logged"]["reward/loo_fd_std"] == pytest.approx(by_hand.std(), rel=1e-3)
        assert rollout["logged"]["reward/loo_fd_distance"] == pytest.approx(expected.distance, rel=1e-3)


def test_terms_are_scaled_apart_and_added_by_weight(runs) -> None:
    model = make_model(runs[1])
    weights = {"kid": 0.5, "bright": -2.0, "loo_fd_diagonal": 0.25}
    composite = CompositeReward(
        weights, functions={"bright": brightness}, normalization={"kid": "none", "loo_fd_diagonal": "centre"}, ema=0.0
    )
    (rollout,) = learn(model, composite)
    features = features_of(model, rollout["codes"])
    reference = features_of(model, world_of(model).real_codes)
    kid = KernelReward(reference)(features).numpy()
    diagonal = FrechetReward(reference, "diagonal")(features).numpy()
    images = decode_codes(world_of(model).decode.args[0], rollout["codes"])
    bright = brightness(images).numpy()
    expected = 0.5 * kid - 2 * standard(bright) + 0.25 * (diagonal - diagonal.mean())
    np.testing.assert_allclose(rollout["rewards"][:, -1], expected, rtol=1e-3, atol=1e-4)
    assert rollout["logged"]["reward/bright_mean"] == pytest.approx(bright.mean(), rel=1e-5)
    assert rollout["logged"]["reward/std"] == pytest.approx(expected.std(), rel=1e-3)
    shown = [episode["r"] for episode in model.ep_info_buffer]  # what rollout/ep_rew_mean averages
    np.testing.assert_allclose(shown, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reward", ["single", "intermediate"])
def test_the_critic_is_trained_as_ever_and_its_term_is_its_reward(runs, reward: str) -> None:
    alone = make_model(runs[1])
    callback = CriticCallback(make_critic(alone, reward))
    expected = learn(alone, callback, rollouts=2)  # type: ignore[arg-type]
    model = make_model(runs[1])
    critic = make_critic(model, reward)
    found = learn(model, CompositeReward({"critic": 1.0}, critic=critic, normalization="none"), rollouts=2)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a["codes"], b["codes"])
        np.testing.assert_allclose(a["rewards"], b["rewards"], atol=1e-5)
        np.testing.assert_allclose(a["returns"], b["returns"], atol=1e-4)
        for name in ("critic/heldout_auc", "critic/loss", "rollout/critic_reward_mean"):
            assert a["logged"][name] == pytest.approx(b["logged"][name], rel=1e-4)
    assert critic.n_updates == 4


@pytest.mark.parametrize("reward", ["single", "intermediate"])
@pytest.mark.parametrize("levels", [1, 2])
def test_a_critic_and_a_term_of_whole_images_add_up(runs, reward: str, levels: int) -> None:
    alone = make_model(runs[levels])
    (expected,) = learn(alone, CriticCallback(make_critic(alone, reward)))  # type: ignore[arg-type]
    model = make_model(runs[levels])
    weights = {"critic": 3.0, "bright": 1.0}
    composite = CompositeReward(weights, critic=make_critic(model, reward), functions={"bright": brightness})
    (found,) = learn(model, composite)
    totals = expected["rewards"].sum(1)
    images = decode_codes(world_of(model).decode.args[0], found["codes"])
    bright = standard(brightness(images).numpy())
    if reward == "single":
        by_code = np.zeros_like(found["rewards"])
        by_code[:, -1] = 3 * standard(totals) + bright
    else:
        by_code = 3 * expected["rewards"] / totals.std()
        by_code[:, -1] += bright
    np.testing.assert_allclose(found["rewards"], by_code, rtol=1e-3, atol=1e-3)
    if levels == 2:  # both levels earn what the whole image earns, and the top one its own codes' rewards too
        top = slice(0, GRID.n_codes)
        shared = by_code[:, -1] if reward == "single" else bright
        np.testing.assert_allclose(found["returns"][:, 0], by_code[:, top].sum(1) + shared, rtol=1e-3, atol=2e-3)


def test_images_of_one_height_are_compared_with_each_other(runs) -> None:
    model = make_model(runs[1], reset_mode="scratch", lockstep=False)
    composite = CompositeReward({"loo_fd": 1.0}, normalization="none", ema=0.0)
    found = learn(model, composite, rollouts=6)
    real = world_of(model).real_codes
    sizes, heights = set(), set()
    for rollout in found:
        rows = (rollout["codes"] <= GRID.codebook_size).sum(1) // GRID.width
        last = rollout["rewards"][np.arange(len(rows)), rows * GRID.width - 1]
        for height in np.unique(rows):
            same, length = rows == height, height * GRID.width
            sizes.add(int(same.sum()))
            if same.sum() >= 3:
                reward = FrechetReward(features_of(model, real[:, :length]))
                by_hand = reward(features_of(model, rollout["codes"][same][:, :length])).numpy()
                np.testing.assert_allclose(last[same], by_hand, rtol=1e-3, atol=1e-3 * np.abs(by_hand).max())
                heights.add(height)
            else:
                assert (last[same] == 0).all()
    assert len(heights) > 1 and sizes >= {1, 2, 3}


def test_a_checkpoint_goes_on_as_if_nothing_happened(runs, tmp_path) -> None:
    model = make_model(runs[1])
    composite = CompositeReward({"loo_fd": 1.0, "critic": 1.0}, critic=make_critic(model))
    learn(model, composite, rollouts=2)
    tensors, rest = pack_state({"composite": composite.state_dict()})
    save_tensors(tmp_path / "checkpoint.safetensors", tensors, {"state": rest})
    tensors, metadata = load_tensors(tmp_path / "checkpoint.safetensors")
    state = unpack_state(tensors, metadata["state"])["composite"]
    restored = CompositeReward({"loo_fd": 1.0, "critic": 1.0}, critic=make_critic(model))
    restored.load_state_dict(state)
    assert sorted(restored.state_dict()["terms"]) == ["loo_fd/4"]  # kept even before its first rollout
    forgetful = CompositeReward({"loo_fd": 1.0}, normalization="none")
    codes = torch.randint(16, (N_ENVS, 16), generator=torch.Generator().manual_seed(9))
    worlds = []
    for callback in (composite, restored, forgetful):
        callback.init_callback(model)
        worlds.append(callback.terms[0].function(4)(features_of(model, codes.numpy())))
    torch.testing.assert_close(worlds[1], worlds[0], rtol=1e-6, atol=1e-8)
    assert (worlds[2] - worlds[0]).abs().max() > 1e-3
    assert restored.critic.critic.n_updates == composite.critic.critic.n_updates > 0


@pytest.mark.parametrize(("evaluation", "warned"), [("encoder", True), ("lite0", False)])
def test_being_judged_by_the_rewards_own_features_is_said(runs, evaluation: str, warned: bool, caplog) -> None:
    composite = CompositeReward({"kid": 1.0}, evaluation_extractor=evaluation)
    with caplog.at_level(logging.WARNING, logger="ral_gym"):
        learn(make_model(runs[1]), composite)
    said = [record for record in caplog.records if "the reward's features (encoder)" in record.getMessage()]
    assert len(said) == warned


def test_the_policy_learns_to_please() -> None:
    """On the colour wheel, whose decoder is no network: blue images, by a function of images."""
    torch.manual_seed(0)
    prior = PixelCNN(8, 4, 4, hidden_units=8, residual_units=8, layers=1, conv_filter_size=3, output_stack_layers=1)
    env = make_sb3_env("ral_gym/Toy-v0", 32, reward="none", seed=0)
    model = Reinforce(PixelCNNPolicy, env, 1e-2, seed=0, device="cpu", policy_kwargs={"prior": prior})
    means: list[float] = []

    def blue(images: Tensor) -> np.ndarray:
        means.append(float(images[:, 2].float().mean()))
        return images[:, 2].float().mean((1, 2)).numpy()

    model.learn(32 * 16 * 25, callback=CompositeReward({"blue": 1.0}, functions={"blue": blue}))
    assert means[-1] > means[0] + 40


def test_what_does_not_fit_is_refused(runs) -> None:
    model = make_model(runs[1])
    critic, functions = make_critic(model), {"bright": brightness}
    refused: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"fid": 1.0}, {"functions": functions}, "'fid' is unknown.*: choose one of critic, loo_fd,.* kid"),
        ({}, {}, "no rewards: give weights"),
        ({"kid": float("nan")}, {}, "weight of reward 'kid' is nan"),
        ({"critic": 1.0}, {}, "'critic' needs a CoTrainedCritic"),
        ({"kid": 1.0}, {"critic": critic}, "'critic' is given, but has no weight"),
        ({"kid": 1.0}, {"functions": functions}, "'bright' has no weight"),
        ({"kid": 1.0}, {"functions": {"kid": brightness}}, "'kid' has the name of a registered reward"),
        ({"kid": 1.0}, {"normalization": "max"}, "'max' of reward 'kid': choose standard, centre, none"),
        ({"kid": 1.0}, {"normalization": {"critic": "none"}}, "of reward 'critic': choose .* for some of kid"),
    ]
    for weights, arguments, message in refused:
        with pytest.raises(ConfigError, match=message):
            CompositeReward(weights, **arguments)
    with pytest.raises(ConfigError, match=r"gave shape \(\) for 8 images"):
        learn(make_model(runs[1]), CompositeReward({"bright": 1.0}, functions={"bright": lambda images: 1.0}))
    with pytest.raises(DivergedError, match="reward bright is NaN"):
        nothing = {"bright": lambda images: torch.full((len(images),), float("nan"))}
        learn(make_model(runs[1]), CompositeReward({"bright": 1.0}, functions=nothing))


def test_models_that_do_not_fit_are_refused(runs) -> None:
    env = make_sb3_env("ral_gym/Toy-v0", 2, reward="none", seed=0)
    prior = PixelCNN(8, 4, 4, hidden_units=8, residual_units=8, layers=1)
    arguments: dict[str, Any] = {"n_steps": 16, "batch_size": 32, "device": "cpu", "policy_kwargs": {"prior": prior}}
    stock = PPO(PixelCNNPolicy, env, **arguments)
    with pytest.raises(ConfigError, match="not RolloutBuffer: pass rollout_buffer_class=EpisodeRolloutBuffer"):
        stock.learn(32, callback=CompositeReward({"kid": 1.0}))
    toy = PPO(PixelCNNPolicy, env, rollout_buffer_class=EpisodeRolloutBuffer, **arguments)
    with pytest.raises(ConfigError, match=r"kid needs features, but the environment has no tokenizer.*give extractor"):
        toy.learn(32, callback=CompositeReward({"kid": 1.0}))
