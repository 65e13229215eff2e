"""Wrappers of Gymnasium and SB3 around the environments: they work, or one sentence says what to do."""

import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import gymnasium.wrappers as single
import gymnasium.wrappers.vector as vector
import numpy as np
import pytest
import torch
from sb3_contrib import QRDQN, RecurrentPPO
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecCheckNan,
    VecEnv,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)

from ral_gym.agents import (
    GRPO,
    EpisodeRolloutBuffer,
    PixelCNNPolicy,
    PriorPolicy,
    Reinforce,
    algorithm_defaults,
    make_sb3_env,
)
from ral_gym.errors import ConfigError
from ral_gym.priors.pixelcnn import PixelCNN

ID, T, K = "ral_gym/Toy-v0", 16, 8


def tiny() -> PixelCNN:
    return PixelCNN(K, 4, 4, hidden_units=4, residual_units=4, layers=1, conv_filter_size=3, output_stack_layers=1)


def dummy(wrap: Callable[[gym.Env], gym.Env], n: int = 2, **kwargs: Any) -> VecEnv:
    return DummyVecEnv([lambda: wrap(gym.make(ID, **kwargs))] * n)


def train(cls: type, env: Any, **kwargs: Any) -> Any:
    """Some rounds, without the help of `algorithm_defaults`."""
    steps = {"n_steps": T, "batch_size": T, "rollout_buffer_class": EpisodeRolloutBuffer} if cls is PPO else {}
    arguments = {"policy_kwargs": {"prior": tiny()}, "device": "cpu", **steps, **kwargs}
    return cls(PixelCNNPolicy, env, **arguments).learn(5 * T)


WORKING: dict[str, Callable[[], VecEnv]] = {
    "VecNormalize, rewards only": lambda: VecNormalize(make_sb3_env(ID, 2), norm_obs=False),
    "VecCheckNan": lambda: VecCheckNan(make_sb3_env(ID, 2)),
    "FlattenObservation": lambda: dummy(single.FlattenObservation),
    "NormalizeReward": lambda: dummy(single.NormalizeReward),
    "ClipReward": lambda: dummy(lambda env: single.ClipReward(env, 0, 0.5)),
    "RecordEpisodeStatistics": lambda: dummy(single.RecordEpisodeStatistics),
    "TimeLimit that is long enough": lambda: dummy(lambda env: single.TimeLimit(env, T)),
}


@pytest.mark.parametrize("cls", [PPO, Reinforce])
@pytest.mark.parametrize("name", WORKING)
def test_wrappers_that_leave_codes_alone_work(cls: type, name: str) -> None:
    train(cls, WORKING[name]())


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "VecNormalize": (lambda: VecNormalize(make_sb3_env(ID, 2)), "norm_obs=False"),
    "VecFrameStack": (lambda: VecFrameStack(make_sb3_env(ID, 2), 2), "VecFrameStack|n_steps=16 cannot hold"),
    "NormalizeObservation": (lambda: dummy(single.NormalizeObservation), "remove wrappers that change observations"),
    "RescaleObservation": (
        lambda: dummy(lambda env: single.RescaleObservation(env, np.zeros(T, np.float32), np.ones(T, np.float32))),
        "remove wrappers that change observations",
    ),
    "FrameStackObservation": (
        lambda: dummy(lambda env: single.FrameStackObservation(env, 2)),
        "remove wrappers that change observations",
    ),
    "DelayObservation": (lambda: dummy(lambda env: single.DelayObservation(env, 2)), "remove wrappers|DelayObserv"),
    "TimeLimit": (lambda: dummy(lambda env: single.TimeLimit(env, 7)), "time limit"),
    "max_episode_steps": (lambda: dummy(lambda env: env, max_episode_steps=7), "time limit"),
    "StickyAction": (lambda: dummy(lambda env: single.StickyAction(env, 0.9)), "StickyAction"),
    "RepeatAction": (lambda: dummy(lambda env: single.RepeatAction(env, 2)), "remove wrappers that change actions"),
    "MaxAndSkip": (lambda: dummy(single.MaxAndSkipObservation), "remove wrappers"),
}


@pytest.mark.parametrize("cls", [PPO, Reinforce])
@pytest.mark.parametrize("name", REFUSED)
def test_wrappers_that_cannot_work_are_refused_in_one_sentence(cls: type, name: str) -> None:
    make, sentence = REFUSED[name]
    with pytest.raises(ConfigError, match=sentence) as refusal:
        train(cls, make())
    assert "\n" not in str(refusal.value)


def test_the_defaults_refuse_what_an_algorithm_would_meet_later() -> None:
    for env, sentence in [
        (gym.make(ID), "use make_sb3_env"),
        (gym.make_vec(ID, num_envs=2), "use make_sb3_env"),
        (DummyVecEnv([lambda: gym.make("CartPole-v1")]), "not the codes of a ral_gym environment"),
        (dummy(lambda env: single.TimeLimit(env, 7)), "a time limit of 7 steps ends episodes of 16 codes"),
        (VecNormalize(make_sb3_env(ID, 2)), "make it with norm_obs=False"),
        (VecFrameStack(make_sb3_env(ID, 2), 2), "such as VecFrameStack"),
        (dummy(lambda env: single.DiscretizeObservation(env, 2)), "not the codes of a ral_gym environment"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            algorithm_defaults("ppo", env)
    with pytest.raises(ConfigError, match="use make_sb3_env"):
        train(Reinforce, gym.make_vec(ID, num_envs=2))


@pytest.mark.parametrize("cls", [PPO, Reinforce])
@pytest.mark.parametrize("given", [{}, {"prior": None}])
def test_a_policy_without_a_prior_says_how_to_give_one(cls: type, given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="needs a network to start from"):
        train(cls, make_sb3_env(ID, 2), policy_kwargs=given)


@pytest.mark.parametrize("cls", [DQN, QRDQN, RecurrentPPO])
def test_an_algorithm_that_trains_no_prior_says_which_do(cls: type) -> None:
    with pytest.raises(ConfigError, match=f"^{cls.__name__} trains networks that PriorPolicy does not have: choose"):
        cls(PriorPolicy, make_sb3_env(ID, 2), policy_kwargs={"prior": tiny()}, device="cpu")
    policy = A2C(PriorPolicy, make_sb3_env(ID, 2), policy_kwargs={"prior": tiny()}, device="cpu").policy
    assert not hasattr(policy, "q_net") and not hasattr(policy, "no_such_thing")


@pytest.mark.parametrize("policy", ["MlpPolicy", ActorCriticPolicy])
@pytest.mark.parametrize("cls", [Reinforce, GRPO])
def test_a_policy_that_draws_no_images_is_refused(cls: type, policy: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{cls.__name__} draws whole images, which policy .* give PriorPolicy$"):
        cls(policy, make_sb3_env(ID, 2), device="cpu")


def test_an_evaluation_monitor_may_stand_around_the_adapter() -> None:
    with pytest.warns(UserWarning, match="already wrapped with a `Monitor`"):
        env = VecMonitor(make_sb3_env(ID, 2))
    assert train(Reinforce, env).ep_info_buffer


def rollout(envs: Any, mode: str, steps: int = 2 * T + 3) -> int:
    """A CleanRL-style loop; how many episodes ended."""
    obs, _ = envs.reset(seed=0)
    ended = 0
    for _ in range(steps):
        obs, _, terminations, truncations, _ = envs.step(envs.action_space.sample())
        done = np.asarray(terminations) | np.asarray(truncations)
        ended += int(done.sum())
        if mode == "Disabled" and done.any():
            obs, _ = envs.reset(options={"reset_mask": done})
        assert envs.observation_space.contains(np.asarray(obs))
    return ended


OBSERVATION_WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "FlattenObservation": vector.FlattenObservation,
    "ReshapeObservation": lambda envs: vector.ReshapeObservation(envs, (4, 4)),
    "DtypeObservation": lambda envs: vector.DtypeObservation(envs, np.float32),
    "NormalizeObservation": vector.NormalizeObservation,
}
OTHER_WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "DictInfoToList": vector.DictInfoToList,
    "TransformAction": lambda envs: vector.TransformAction(envs, lambda action: action),
    "ClipReward": lambda envs: vector.ClipReward(envs, 0, 0.5),
    "NormalizeReward": vector.NormalizeReward,
    "RecordEpisodeStatistics": vector.RecordEpisodeStatistics,
}


@pytest.mark.parametrize("mode", ["SameStep", "NextStep", "Disabled"])
@pytest.mark.parametrize("name", OTHER_WRAPPERS)
def test_gymnasiums_other_vector_wrappers_work_in_every_mode(mode: str, name: str) -> None:
    assert rollout(OTHER_WRAPPERS[name](gym.make_vec(ID, num_envs=2, autoreset_mode=mode)), mode) == 4


@pytest.mark.parametrize("name", OBSERVATION_WRAPPERS)
def test_gymnasiums_observation_wrappers_take_the_mode_that_the_page_names(name: str) -> None:
    assert rollout(OBSERVATION_WRAPPERS[name](gym.make_vec(ID, num_envs=2, autoreset_mode="NextStep")), "NextStep") == 4
    with pytest.raises(ValueError, match="NEXT_STEP"):
        OBSERVATION_WRAPPERS[name](gym.make_vec(ID, num_envs=2))
    assert 'autoreset_mode="NextStep"' in (gym.make_vec(ID).unwrapped.__class__.__mro__[2].__doc__ or "")


@pytest.mark.parametrize("mode", ["sync", "async", "vector_entry_point"])
def test_every_way_of_make_vec(mode: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork of a process with threads
        envs = gym.make_vec(ID, num_envs=2, vectorization_mode=mode, reset_mode="continue")
        assert rollout(envs, "") >= 2
        envs.close()


@pytest.mark.parametrize("options", [[{"prefix_rows": 1}] * 2, "x", 5, [None, {}]])
def test_options_of_another_kind_are_named(options: Any) -> None:
    for env in (gym.make(ID), gym.make_vec(ID, num_envs=2)):
        with pytest.raises(ValueError, match=r"options are .*: give one mapping"):
            env.reset(options=options)


@pytest.mark.parametrize("seed", [-1, "a", 1.5, [1, -2], [1, "b"], [1]])
def test_seeds_of_another_kind_are_named(seed: Any) -> None:
    with pytest.raises(ValueError, match=r"seed"):
        gym.make_vec(ID, num_envs=2).reset(seed=seed)


def test_the_packages_export_what_users_subclass() -> None:
    import ral_gym.agents as agents
    import ral_gym.envs as envs

    for package, names in [
        (envs, ["GenerationEnv", "GenerationVectorEnv", "GenerationCore", "World", "ToyEnv", "LatentCodeVectorEnv"]),
        (agents, ["EpisodeAlgorithm", "Reinforce", "GRPO", "EpisodeRolloutBuffer"]),
    ]:
        assert {*names} <= {*package.__all__} <= {*dir(package)}
        assert all(getattr(package, name) is not None for name in package.__all__)
    assert {*envs.__all__} == {*envs._HOME}
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = envs.Nothing
    assert torch.is_tensor(envs.toy_world().decode(torch.zeros(1, T, dtype=torch.int64)))
