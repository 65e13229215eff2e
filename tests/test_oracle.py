"""ral_gym/Oracle-v0: a code's reward is its log-probability, however it is drawn; masks; the bundled files."""

import json

import gymnasium as gym
import numpy as np
import pytest
import torch

import ral_gym  # noqa: F401
from ral_gym.agents import EntropyReward, PixelCNNPolicy, Reinforce, algorithm_defaults, make_sb3_env
from ral_gym.assets import FOLDER, asset_path
from ral_gym.envs.core import GenerationCore
from ral_gym.envs.oracle import load_light_prior, load_oracle, oracle_world
from ral_gym.errors import RunError
from ral_gym.metrics import nll, sequence_kl
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.sampler import CachedSampler
from ral_gym.runs.storage import load_module
from ral_gym.tokenizers.code_set import CodeSet

T, K = 64, 128


def log_probs(codes: np.ndarray) -> np.ndarray:
    """What the oracle's full pass says of whole grids (n, T)."""
    grids = torch.from_numpy(codes.astype(np.int64))
    with torch.no_grad():
        return load_oracle()(grids).log_softmax(-1).gather(2, grids[:, :, None]).squeeze(2).numpy()


def test_every_code_earns_its_log_probability_at_once() -> None:
    env, rng = gym.make("ral_gym/Oracle-v0"), np.random.default_rng(0)
    env.reset(seed=0)
    rewards = []
    for _ in range(T):
        observation, reward, terminated, _, info = env.step(rng.integers(K))
        rewards.append(reward)
    assert terminated
    expected = log_probs(observation[None])[0]
    np.testing.assert_allclose(rewards, expected, atol=1e-4)
    np.testing.assert_allclose(info["step_rewards"], expected, atol=1e-4)
    np.testing.assert_allclose(info["score_map"].ravel(), info["step_rewards"])


@pytest.mark.parametrize("reset_mode", ["full", "continue", "scratch", "mixed"])
def test_rows_anywhere_are_paid_right(reset_mode: str) -> None:
    """Rows of one batch at different positions, over several episodes: the cache follows every reset."""
    envs = gym.make_vec("ral_gym/Oracle-v0", num_envs=5, reset_mode=reset_mode)
    before, _ = envs.reset(seed=0)
    rng = np.random.default_rng(1)
    paid, episodes = np.zeros((5, T)), 0
    for _ in range(150):
        actions = rng.integers(K, size=5)
        position = (before == K).argmax(1)
        before, rewards, ended, _, infos = envs.step(actions)
        paid[np.arange(5), position] = rewards
        for row in np.flatnonzero(ended):
            codes = infos["final_info"]["codes"][row]
            drawn = paid[row] != 0
            stop = int((codes <= K).sum())
            full = np.zeros(T)
            full[:stop] = log_probs(codes[None, :stop])[0]
            np.testing.assert_allclose(paid[row][drawn], full[drawn], atol=1e-4)
            np.testing.assert_allclose(infos["final_info"]["step_rewards"][row], paid[row], atol=1e-6)
            paid[row], episodes = 0, episodes + 1
    assert episodes > 5


def test_the_rewards_at_the_end_add_up_to_those_at_once() -> None:
    codes = np.random.default_rng(0).integers(K, size=(3, T))
    totals = {}
    for reward in ("step", "intermediate", "single"):
        core = GenerationCore(oracle_world(reward), 3)
        core.reset(np.arange(3))
        finished = core.draw_round(codes)
        totals[reward] = finished.returns
        last = finished.step_rewards[:, -1] if reward == "step" else finished.returns
        np.testing.assert_allclose(finished.rewards, last)
    np.testing.assert_allclose(totals["step"], log_probs(codes).sum(1), rtol=1e-5)
    np.testing.assert_allclose(totals["intermediate"], totals["step"], rtol=1e-5)
    np.testing.assert_allclose(totals["single"], totals["step"] / T, rtol=1e-5)


def test_a_whole_round_equals_stepping() -> None:
    """Also from the middle of episodes, where some codes are paid already."""
    codes = np.random.default_rng(0).integers(K, size=(2, T))
    whole, stepped = (GenerationCore(oracle_world(), 2) for _ in range(2))
    for core in (whole, stepped):
        core.reset(np.arange(2))
    for t in range(T):
        finished = stepped.step(codes[:, t])
        if t < 20:
            whole.step(codes[:, t])
    round_ = whole.draw_round(codes)
    assert finished is not None
    np.testing.assert_allclose(round_.step_rewards, finished.step_rewards, atol=1e-4)
    np.testing.assert_allclose(round_.rewards, finished.rewards, atol=1e-4)


def test_the_three_covers_pay_the_same() -> None:
    actions = np.random.default_rng(0).integers(K, size=(70, 2))
    single = [gym.make("ral_gym/Oracle-v0") for _ in range(2)]
    vector, adapter = gym.make_vec("ral_gym/Oracle-v0", num_envs=2), make_sb3_env("ral_gym/Oracle-v0", 2, seed=0)
    for row, env in enumerate(single):
        env.reset(seed=row)
    vector.reset(seed=0)
    adapter.reset()
    returns = np.zeros(2)
    for codes in actions:
        paid = []
        for env, code in zip(single, codes, strict=True):
            _, reward, terminated, _, _ = env.step(code)
            paid.append(reward)
            if terminated:
                env.reset()
        returns += paid
        np.testing.assert_allclose(vector.step(codes)[1], paid, atol=1e-4)
        _, rewards, dones, infos = adapter.step(codes)
        np.testing.assert_allclose(rewards, paid, atol=1e-4)
        if dones[0]:
            assert infos[0]["episode"]["r"] == pytest.approx(returns[0], abs=1e-2)


def test_the_fast_path_learns_from_the_same_rewards_as_stepping() -> None:
    buffers = []
    for fast in (True, False):
        env = make_sb3_env("ral_gym/Oracle-v0", 4, seed=0)
        arguments = algorithm_defaults("reinforce", env) | {"fast_path": fast, "seed": 0, "device": "cpu"}
        arguments["policy_kwargs"] |= {"prior": load_light_prior()}
        model = Reinforce(PixelCNNPolicy, env, **arguments)
        torch.manual_seed(0)
        model.collect_rollouts(env, model._setup_learn(1, EntropyReward())[1], model.rollout_buffer, model.n_steps)
        buffers.append(model.rollout_buffer)
    fast, stepped = buffers
    np.testing.assert_array_equal(fast.codes, stepped.codes)
    np.testing.assert_allclose(fast.rewards, stepped.rewards, atol=1e-3)
    np.testing.assert_allclose(fast.returns, stepped.returns, atol=2e-2)
    own = log_probs(fast.codes)[fast.mask] - fast.log_probs
    np.testing.assert_allclose(fast.rewards, own, atol=1e-3)


def test_the_oracle_itself_has_return_zero() -> None:
    """log o - log pi is 0 for every code that the oracle draws: nothing is left to learn."""
    env = make_sb3_env("ral_gym/Oracle-v0", 4, seed=0)
    arguments = algorithm_defaults("ppo", env) | {"seed": 0, "device": "cpu"}
    arguments["policy_kwargs"] |= {"prior": asset_path("oracle/oracle.safetensors")}
    from stable_baselines3 import PPO

    model = PPO(PixelCNNPolicy, env, **arguments)
    model.collect_rollouts(env, model._setup_learn(1, EntropyReward())[1], model.rollout_buffer, model.n_steps)
    np.testing.assert_allclose(model.rollout_buffer.rewards, 0, atol=1e-3)


def test_sequence_kl_is_zero_for_itself_and_the_difference_of_two_figures() -> None:
    oracle = load_oracle()
    light = load_module(load_light_prior(), PixelCNN)
    drawn, log_prob = CachedSampler(light).sample(300, generator=torch.Generator().manual_seed(0))
    assert sequence_kl(oracle, oracle, drawn) == pytest.approx(0, abs=1e-6)
    exact = sequence_kl(light, oracle, drawn)
    by_samples = nll(oracle, drawn) + float(log_prob.mean())
    assert exact > 0.05 and exact == pytest.approx(by_samples, abs=0.03)


def test_the_light_prior_is_worse_than_the_oracle_on_its_samples() -> None:
    held_out = torch.from_numpy(CodeSet.load(asset_path("oracle/codes.safetensors")).test).long()
    light = load_module(load_light_prior(), PixelCNN)
    assert nll(load_oracle(), held_out) + 0.1 < nll(light, held_out) < np.log(K) - 0.5


def test_masks_forbid_codes_and_keep_the_likeliest() -> None:
    env = gym.make("ral_gym/Oracle-v0", forbidden_codes=[0, 7], top_k=5)
    env.reset(seed=0)
    light = load_module(load_light_prior(), PixelCNN)
    codes = torch.zeros(1, T, dtype=torch.long)
    for t in range(10):
        mask = env.unwrapped.action_masks()
        with torch.no_grad():
            logits = light(codes)[0, t]
        logits[[0, 7]] = -torch.inf
        assert set(np.flatnonzero(mask)) == set(logits.topk(5).indices.tolist())
        code = int(np.flatnonzero(mask)[t % 5])
        codes[0, t] = code
        env.step(code)
    env.step(0)  # masks are advice
    envs = gym.make_vec("ral_gym/Oracle-v0", num_envs=3, top_k=4)
    envs.reset(seed=0)
    assert envs.unwrapped.action_masks().sum(1).tolist() == [4, 4, 4]
    adapter = make_sb3_env("ral_gym/Toy-v0", 2, forbidden_codes=[1])
    adapter.reset()
    masks = np.stack(adapter.env_method("action_masks"))
    assert masks.shape == (2, 8) and not masks[:, 1].any() and masks.sum() == 14


@pytest.mark.parametrize(
    ("id", "arguments", "message"),
    [
        ("Toy", {"forbidden_codes": [8]}, r"forbidden_codes lie in 8..8: codes are 0..7"),
        ("Toy", {"forbidden_codes": list(range(8))}, "names all 8 codes: leave at least one"),
        ("Oracle", {"top_k": 0}, r"top_k=0 is out of range: choose 1..128"),
        ("Oracle", {"reward": "loss"}, "choose one of step, single, intermediate, none"),
    ],
)
def test_wrong_masks_and_rewards(id: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gym.make(f"ral_gym/{id}-v0", **arguments)


def test_what_comes_with_the_package_is_small_and_complete() -> None:
    files = [file for file in FOLDER.rglob("*") if file.suffix in (".safetensors", ".json")]
    assert sum(file.stat().st_size for file in files) <= 5 * 2**20
    assert json.loads((FOLDER / "faces/config.json").read_text())["preset"] == "demo"
    assert CodeSet.load(asset_path("faces/codes.safetensors")).train.shape == (288, 64)
    with pytest.raises(RunError, match=r"faces/policy.safetensors is not among the files that come with ral_gym"):
        asset_path("faces/policy.safetensors")


def test_the_bundled_critic_prefers_real_codes() -> None:
    """On held-out photos against samples of the bundled prior: the reward means something."""
    world = gym.make("ral_gym/Faces-v0").unwrapped.world
    real = torch.from_numpy(CodeSet.load(asset_path("faces/codes.safetensors")).test).long()
    prior = load_module(asset_path("faces/prior.safetensors"), PixelCNN)
    drawn, _ = CachedSampler(prior).sample(72, generator=torch.Generator().manual_seed(1))
    scores = [world.scorer(codes)[1].sum(1) for codes in (real, drawn)]
    assert (scores[0][:, None] > scores[1][None]).float().mean() > 0.7
