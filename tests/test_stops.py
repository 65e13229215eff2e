"""`learn` stopped by a callback at any step of a rollout, then continued: what is learnt from afterwards is sound."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from ral_gym.agents import (
    GRPO,
    EpisodeRolloutBuffer,
    MaskableEpisodeRolloutBuffer,
    PixelCNNPolicy,
    Reinforce,
    make_sb3_env,
    policy_for,
)
from ral_gym.agents.regularizers import EntropyReward, PriorKLReward
from ral_gym.agents.rewards.rollout_reward import RolloutReward
from ral_gym.agents.vec_env import CodeVecEnv
from ral_gym.envs.worlds import World, toy_score_map
from ral_gym.grid import CodeGrid
from ral_gym.priors.pixelcnn import PixelCNN

T, K = 16, 8
SQUARE = CodeGrid(4, 4, K)
ON_POLICY = ("ppo", "a2c", "trpo", "maskable_ppo", "reinforce", "grpo")


class StopAt(BaseCallback):
    """Stops `learn` at the given step of the environments."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.left = step

    def _on_step(self) -> bool:
        self.left -= 1
        return self.left > 0


class CheckRollouts(BaseCallback):
    """At the end of every rollout: all stored numbers are those of the stored images, and ratios are 1."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        model: Any = self.model
        buffer = model.rollout_buffer
        for batch in buffer.get(None):
            masks = (batch.action_masks,) if hasattr(batch, "action_masks") else ()
            with torch.no_grad():
                values, log_prob, _ = model.policy.evaluate_actions(batch.observations, batch.actions, *masks)
            torch.testing.assert_close(log_prob, batch.old_log_prob, atol=1e-5, rtol=0)
            if not isinstance(model, Reinforce | GRPO):  # these two compute no values
                torch.testing.assert_close(values.flatten(), batch.old_values, atol=1e-5, rtol=0)
        self.sizes.append(len(buffer.codes))
        if not len(buffer.codes):
            assert (buffer.advantages == 0).all()
            return
        seen = buffer.codes < K
        score_map = toy_score_map(torch.as_tensor(buffer.codes.clip(max=K - 1).astype(np.int64)))
        earned = np.zeros(buffer.mask.shape)
        earned[buffer.mask] = buffer.rewards
        expected = (score_map.flatten(1).numpy() * seen).sum(1) / seen.sum(1)
        np.testing.assert_allclose(earned.sum(1), expected, atol=1e-5)  # "single": the mean over the image's codes
        assert (earned[np.arange(len(earned)), buffer.stop - 1] == earned.sum(1)).all()


def make(algo: str, n_envs: int, n_steps: int = T, env: Any = None, grid: CodeGrid = SQUARE, **kwargs: Any) -> Any:
    from ral_gym.agents import ALGORITHMS

    torch.manual_seed(1)
    small = {"hidden_units": 4, "residual_units": 4, "layers": 1, "conv_filter_size": 3, "output_stack_layers": 1}
    prior = PixelCNN(K, grid.height, grid.width, **small)  # type: ignore[arg-type]
    masks = {"rollout_buffer_class": MaskableEpisodeRolloutBuffer if "mask" in algo else EpisodeRolloutBuffer}
    minibatch = {} if algo in ("a2c", "reinforce") else {"batch_size": n_steps * n_envs}
    group = {"group_size": 2} if algo == "grpo" else {}
    trust = {"cg_max_steps": 3, "n_critic_updates": 1} if algo == "trpo" else {}
    arguments = {"n_steps": n_steps, "seed": 0, "device": "cpu", "policy_kwargs": {"prior": prior}}
    env = env or make_sb3_env("ral_gym/Toy-v0", n_envs, seed=0, **kwargs)
    return ALGORITHMS[algo](policy_for(algo), env, **arguments, **masks, **minibatch, **group, **trust)


def frozen(model: Any) -> Any:
    """The model, whose updates are made and taken back: then every stored number must be the present policy's."""
    train, weights = model.train, {name: weight.clone() for name, weight in model.policy.state_dict().items()}

    def train_and_forget() -> None:
        train()
        assert all(bool(weight.isfinite().all()) for weight in model.policy.parameters())
        model.policy.load_state_dict(weights)

    model.train = train_and_forget
    return model


@pytest.mark.parametrize("algo", ON_POLICY)
@settings(max_examples=3)
@example(step=T - 1, mode="full", n_envs=4, extra=0)  # the first step after it ends the episodes that it belongs to
@example(step=T, mode="mixed", n_envs=2, extra=5)
@given(
    step=st.integers(1, 3 * T),
    mode=st.sampled_from(["full", "continue", "scratch", "mixed"]),
    n_envs=st.sampled_from([1, 2, 4]),
    extra=st.sampled_from([0, 5]),
)
def test_any_stop_and_on(algo: str, step: int, mode: str, n_envs: int, extra: int) -> None:
    n_envs = max(n_envs, 2) if algo == "grpo" else n_envs  # it compares
    fast = step % 2 == 0 and algo in ("reinforce", "grpo")
    model = frozen(make(algo, n_envs, T + extra, reset_mode=mode))
    if algo in ("reinforce", "grpo"):
        model.fast_path = fast
    model.learn(10**9, callback=StopAt(step))
    check = CheckRollouts()
    model.learn(3 * (T + extra) * n_envs, callback=check, reset_num_timesteps=False)
    assert len(check.sizes) >= 3 and all(check.sizes[1:])


@pytest.mark.parametrize("lockstep", [True, False])
def test_every_stop_of_ppo(lockstep: bool) -> None:
    """Every second step of an episode and beyond its end, each followed by two rollouts."""
    model = frozen(make("ppo", 2, reset_mode="mixed", lockstep=lockstep))
    model.learn(1)
    for step in range(1, T + 2, 2):
        model.learn(10**9, callback=StopAt(step), reset_num_timesteps=False)
        model.learn(2 * T * 2, callback=CheckRollouts(), reset_num_timesteps=False)


def test_a_rollout_without_a_finished_episode_teaches_nothing() -> None:
    model = make("ppo", 3)
    model.learn(10**9, callback=StopAt(T - 1))
    prior = model.policy.prior  # the value head may move by rounding: Adam makes steps of the smallest gradients
    before = [weight.clone() for weight in prior.parameters()]
    check = CheckRollouts()
    model.learn(T * 3, callback=[PriorKLReward(0.1), EntropyReward(0.1), check], reset_num_timesteps=False)
    assert check.sizes == [0]
    assert all(torch.equal(old, new) for old, new in zip(before, prior.parameters(), strict=True))
    model.learn(T * 3, reset_num_timesteps=False)
    assert len(model.rollout_buffer.codes) == 3
    assert not all(torch.equal(old, new) for old, new in zip(before, prior.parameters(), strict=True))


class NumberedReward(RolloutReward):
    """Pays every episode another number."""

    paid = 0

    def write(self, buffer: EpisodeRolloutBuffer, codes: torch.Tensor) -> np.ndarray:
        totals = np.arange(self.paid, self.paid + len(codes), dtype=np.float32)
        self.paid += len(codes)
        rewards = np.zeros(buffer.mask.shape, np.float32)
        rewards[np.arange(len(codes)), buffer.stop - 1] = totals
        buffer.write_rewards(rewards)
        return totals

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize("step", [5, T - 1, T, T + 3])
def test_written_rewards_are_shown_with_their_own_episodes(step: int) -> None:
    model, reward = make("ppo", 1), NumberedReward()
    model.learn(10**9, callback=[reward, StopAt(step)])
    model.learn(4 * T, callback=reward, reset_num_timesteps=False)
    shown = [episode["r"] for episode in model.ep_info_buffer]
    assert reward.paid >= 3 and shown[-3:] == [reward.paid - 3, reward.paid - 2, reward.paid - 1]


def test_new_environments_after_a_stop_lose_nothing() -> None:
    """`reset_num_timesteps=True` resets them: then the first transition counts as well."""
    model = frozen(make("ppo", 3))
    model.learn(10**9, callback=StopAt(5))
    check = CheckRollouts()
    model.learn(T * 3, callback=check)
    assert check.sizes == [3] and model.rollout_buffer.mask.all()


def test_one_transition_alone_breaks_no_weight() -> None:
    """A2C and TRPO divide by the standard deviation of the advantages."""
    for algo in ("a2c", "trpo"):
        model = frozen(make(algo, 1))
        model.learn(10**9, callback=StopAt(T - 2))
        check = CheckRollouts()
        model.learn(T, callback=check, reset_num_timesteps=False)
        assert check.sizes == [1] and model.rollout_buffer.mask.sum() == 1


@pytest.mark.parametrize("algo", ["ppo", "reinforce"])
def test_a_checkpoint_of_the_buffer_knows_what_comes_next(algo: str) -> None:
    model = make(algo, 3, 21)
    model.learn(21 * 3 if algo == "ppo" else T * 3)
    buffer = model.rollout_buffer
    buffer.reset()
    other = make(algo, 3, 21).rollout_buffer
    other.load_state_dict(buffer.state_dict())
    other.reset()
    rows = buffer._open
    np.testing.assert_array_equal(other._open, rows)
    np.testing.assert_array_equal(other._expected[rows], buffer._expected[rows])


def test_open_episodes_are_forgotten_when_a_whole_round_comes() -> None:
    model = make("reinforce", 2)
    buffer = model.rollout_buffer
    buffer._fill[:] = 3
    empty = np.full((2, T), K, np.int16)
    codes = np.arange(2 * T).reshape(2, T) % K
    numbers = np.arange(2 * T, dtype=np.float32).reshape(2, T)
    buffer.add_round(empty, codes, np.ones(2, np.float32), numbers, numbers)
    np.testing.assert_array_equal(buffer.codes, codes)
    np.testing.assert_array_equal(buffer.log_probs, numbers.flatten())


COLUMN = CodeGrid(3, 1, K)  # the last row alone is an episode of one code


def pay_a_column(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The number that the codes are, in the base of K."""
    places = torch.tensor([1.0, K, K * K])[: codes.shape[1]]
    numbers = (codes * places).sum(1)
    steps = torch.zeros(codes.shape)
    steps[:, -1] = numbers
    return codes[:, :, None].float(), steps


def column_model(algo: str, n_envs: int, n_steps: int, reset_mode: str = "continue") -> Any:
    real = np.arange(30).reshape(10, 3) % K
    world = World(COLUMN, lambda codes: codes, pay_a_column, real.astype(np.int16), 1, torch.device("cpu"))
    env = CodeVecEnv(world, n_envs, reset_mode=reset_mode, lockstep=False)
    env.seed(0)
    return make(algo, n_envs, n_steps, env=env, grid=COLUMN)


class CheckColumns(BaseCallback):
    """At the end of every rollout: each stored image has been paid its own reward."""

    checked = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer: EpisodeRolloutBuffer = self.model.rollout_buffer  # type: ignore[attr-defined]
        seen = torch.as_tensor(np.where(buffer.codes < K, buffer.codes, 0).astype(np.int64))
        earned = np.zeros(buffer.mask.shape)
        earned[buffer.mask] = buffer.rewards
        np.testing.assert_allclose(earned.sum(1), pay_a_column(seen)[1].sum(1).numpy())
        self.checked += len(buffer.codes)


@pytest.mark.parametrize("algo", ["ppo", "maskable_ppo"])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_episodes_of_one_code_after_a_stop_are_paid_for_themselves(algo: str, n_envs: int) -> None:
    model, check = column_model(algo, n_envs, 4), CheckColumns()
    model.learn(1, callback=check)
    for step in [1, 2, 3, 4] * 2:
        model.learn(10**9, callback=StopAt(step), reset_num_timesteps=False)
        model.learn(8 * n_envs, callback=check, reset_num_timesteps=False)
    assert check.checked > 30


def test_a_stopped_algorithm_of_rounds_loses_no_episode() -> None:
    model = column_model("reinforce", 8, 3)
    model.fast_path = False
    for step in (1, 2, 3):
        model.learn(10**9, callback=StopAt(step), reset_num_timesteps=False)
        model.learn(1, callback=(check := CheckColumns()), reset_num_timesteps=False)
        assert check.checked >= 8  # one of each environment at least, those of one code among them


def test_ppo_with_the_stock_buffer_goes_on_too() -> None:
    env = make_sb3_env("ral_gym/Toy-v0", 2, seed=0)
    prior = PixelCNN(K, 4, 4, hidden_units=4, residual_units=4, layers=1, conv_filter_size=3, output_stack_layers=1)
    model = PPO(PixelCNNPolicy, env, n_steps=T, batch_size=2 * T, device="cpu", policy_kwargs={"prior": prior})
    model.learn(10**9, callback=StopAt(5))
    model.learn(2 * T, reset_num_timesteps=False)
