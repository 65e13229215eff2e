"""`CodeFeatures`: value-based and recurrent algorithms run with one line."""

import time

import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import RecurrentPPO

from ral_gym.agents import ALGORITHMS, CodeFeatures, algorithm_defaults, make_sb3_env, policy_for
from ral_gym.errors import ConfigError

T, K = 16, 8


def test_features_know_the_codes_and_the_position() -> None:
    space = make_sb3_env("ral_gym/Toy-v0", 1).observation_space
    extractor = CodeFeatures(space, features_dim=64)
    obs = torch.full((4, T), float(K))
    obs[0, 0] = obs[1, 0] = obs[2, 0] = 1
    obs[1, 0] = 2  # another code
    obs[2, 1] = 1  # another position
    obs[3, 0], obs[3, 8:] = 1, K + 1  # another stop
    features = extractor(obs)
    assert features.shape == (4, 64)
    distances = torch.cdist(features, features) + torch.eye(4)
    assert distances.min() > 1e-2
    torch.testing.assert_close(extractor(obs.to(torch.int16)), features)


def test_the_newest_code_is_always_seen_in_the_same_place() -> None:
    extractor = CodeFeatures(make_sb3_env("ral_gym/Toy-v0", 1).observation_space)
    with torch.no_grad():
        extractor.position.weight.zero_()
        extractor.window.weight[:, :-16] = 0  # only the last place
    obs = torch.full((3, T), K)
    obs[0, :3], obs[1, :9] = torch.tensor([0, 1, 5]), torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 5])
    obs[2, :3] = torch.tensor([0, 1, 6])
    features = extractor(obs)
    torch.testing.assert_close(features[0], features[1])
    assert (features[0] - features[2]).abs().max() > 1e-2


@pytest.mark.parametrize("space", [spaces.Box(0.0, 1.0, (4,)), spaces.Box(0, 255, (3, 8, 8), np.uint8)])
def test_other_observations_are_refused(space: spaces.Box) -> None:
    with pytest.raises(ConfigError, match="CodeFeatures reads codes"):
        CodeFeatures(space)


@pytest.mark.parametrize("algo", ["dqn", "qrdqn"])
@pytest.mark.filterwarnings("ignore:`n_steps=4` is ignored")  # SB3 says so of its own class when it loads
def test_value_based_algorithms_run_with_their_defaults_and_load(algo: str, tmp_path) -> None:
    env = make_sb3_env("ral_gym/Toy-v0", 4, reset_mode="mixed", lockstep=False, seed=0)
    arguments = algorithm_defaults(algo, env) | {"learning_starts": 64, "seed": 0, "device": "cpu"}
    model = ALGORITHMS[algo](policy_for(algo), env, **arguments)
    model.learn(256)
    network = model.policy.quantile_net if algo == "qrdqn" else model.policy.q_net
    assert isinstance(network.features_extractor, CodeFeatures)
    assert model.replay_buffer.observations.dtype == np.int16
    model.save(tmp_path / "model")
    loaded = ALGORITHMS[algo].load(tmp_path / "model", device="cpu")
    obs = env.reset()
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])


def test_recurrent_ppo_runs() -> None:
    env = make_sb3_env("ral_gym/Toy-v0", 4, seed=0)
    features = {"features_extractor_class": CodeFeatures, "lstm_hidden_size": 16}
    model = RecurrentPPO("MlpLstmPolicy", env, n_steps=T, batch_size=32, policy_kwargs=features, seed=0, device="cpu")
    before = model.policy.features_extractor.embedding.weight.clone()
    model.learn(T * 4 * 2)
    assert not torch.equal(before, model.policy.features_extractor.embedding.weight)


def test_dqn_learns_the_toy_but_does_not_solve_it() -> None:
    """Random drawing obeys the rule at 0.18 of the tiles, DQN after 20,000 codes at 0.56 to 0.69 (three seeds).

    The 0.9 that policy gradients reach in seconds is out of its reach in this time.
    """
    env = make_sb3_env("ral_gym/Toy-v0", 32, reward="intermediate", seed=0)
    arguments = algorithm_defaults("dqn", env) | {
        "learning_rate": 2e-3,
        "batch_size": 256,
        "gradient_steps": 4,
        "buffer_size": 10_000,
        "learning_starts": 1000,
        "exploration_fraction": 0.4,
    }
    model = ALGORITHMS["dqn"](policy_for("dqn"), env, seed=0, device="cpu", **arguments)
    began = time.process_time()
    model.learn(20_000)
    assert time.process_time() - began < 15
    obs = env.reset()
    for _ in range(T):
        actions, _ = model.predict(obs, deterministic=True)
        obs, rewards, _, _ = env.step(actions)
    assert rewards.mean() / T > 0.45
