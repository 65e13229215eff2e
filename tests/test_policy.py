"""The policy: same distribution cached, uncached and teacher-forced; ratio 1; save and load."""

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

from ral_gym.agents import (
    ALGORITHMS,
    EpisodeRolloutBuffer,
    PixelCNNPolicy,
    PriorWeights,
    Reinforce,
    algorithm_defaults,
    make_sb3_env,
    policy_for,
)
from ral_gym.errors import ConfigError
from ral_gym.priors.pixelcnn import PixelCNN

T, K = 16, 8


def tiny_prior(**changes: object) -> PixelCNN:
    arguments = {"hidden_units": 12, "residual_units": 12, "layers": 2, "conv_filter_size": 3, "output_stack_layers": 1}
    return PixelCNN(K, 4, 4, **(arguments | changes))


def make_ppo(use_cache: bool = True, reset_mode: str = "mixed", lockstep: bool = False, **kwargs: object) -> PPO:
    torch.manual_seed(1)
    env = make_sb3_env("ral_gym/Toy-v0", 6, reset_mode=reset_mode, lockstep=lockstep, seed=0)
    defaults = {"n_steps": T, "batch_size": 48, "seed": 0, "device": "cpu", "n_epochs": 1}
    return PPO(
        PixelCNNPolicy,
        env,
        policy_kwargs={"prior": tiny_prior(dropout=0.5), "use_cache": use_cache},
        rollout_buffer_class=EpisodeRolloutBuffer,
        **(defaults | kwargs),
    )


def rollout(model: PPO) -> None:
    _, callback = model._setup_learn(1, None)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)


@pytest.mark.parametrize(("use_cache", "tolerance"), [(False, 0.0), (True, 1e-5)])
@pytest.mark.parametrize("lockstep", [False, True])
def test_ratio_is_one_on_the_first_pass(use_cache: bool, tolerance: float, lockstep: bool) -> None:
    model = make_ppo(use_cache, lockstep=lockstep)
    rollout(model)
    model.policy.set_training_mode(True)
    for batch in model.rollout_buffer.get(48):
        _, log_prob, _ = model.policy.evaluate_actions(batch.observations, batch.actions)
        difference = (log_prob - batch.old_log_prob).abs().max().item()
        assert difference <= max(tolerance, 1e-6 if not use_cache else 0)


@pytest.mark.parametrize("lockstep", [False, True])
def test_cache_and_full_pass_act_alike(lockstep: bool) -> None:
    grids = []
    for use_cache in (True, False):
        model = make_ppo(use_cache, lockstep=lockstep)
        rollout(model)
        grids.append((model.rollout_buffer.codes, model.rollout_buffer.log_probs, model.rollout_buffer.values))
    np.testing.assert_array_equal(grids[0][0], grids[1][0])
    np.testing.assert_allclose(grids[0][1], grids[1][1], atol=1e-5)
    np.testing.assert_allclose(grids[0][2], grids[1][2], atol=1e-5)


def test_the_cache_is_hit_at_every_step_but_the_first_of_an_episode() -> None:
    model = make_ppo(reset_mode="full", lockstep=True)
    rollout(model)
    # The look at the end of the rollout is SB3's value of the next observation.
    assert (model.policy.cache.hits, model.policy.cache.misses) == (6 * (T - 1), 6 * 2)


def test_the_cache_notices_changed_weights_and_foreign_observations() -> None:
    policy = make_ppo().policy
    codes = torch.randint(K, (6, T))
    obs = codes.clone()
    obs[:, 5:] = K
    with torch.no_grad():
        policy.forward(obs)
        for parameter in policy.prior.parameters():
            parameter.mul_(1.3)
        obs[:, 5] = codes[:, 5]
        _, logits = policy.cache.look(obs)
        expected = policy.prior(codes)[:, 6]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


def test_evaluation_does_not_disturb_a_rollout() -> None:
    model = make_ppo(reset_mode="full", lockstep=True)
    other = make_sb3_env("ral_gym/Toy-v0", 2, seed=5)
    obs = model.env.reset()
    eval_obs = other.reset()
    for _ in range(10):
        with torch.no_grad():
            actions, _, _ = model.policy(torch.as_tensor(obs))
        obs, *_ = model.env.step(actions.numpy())
        eval_actions, _ = model.policy.predict(eval_obs)
        eval_obs, *_ = other.step(eval_actions)
    assert model.policy.cache.misses == 6


def test_gradients_equal_those_of_single_observations() -> None:
    model = make_ppo()
    rollout(model)
    policy, buffer = model.policy, model.rollout_buffer
    batch = next(iter(buffer.get(None)))
    weights = torch.randn(len(batch.actions))
    gradients = []
    episodes = batch.observations
    observations = episodes.codes[episodes.row].clone()  # (N, T): the grid as it stood at each transition
    later = torch.arange(T) >= episodes.pos[:, None]
    observations[later & (observations < K)] = K
    for obs in (episodes, observations):
        policy.zero_grad()
        values, log_prob, entropy = policy.evaluate_actions(obs, batch.actions)
        (weights * (log_prob + entropy + values.flatten())).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=2e-4, rtol=1e-4)


def test_given_codes_get_no_gradient() -> None:
    env = make_sb3_env("ral_gym/Toy-v0", 4, reset_mode="continue", seed=0)
    model = Reinforce(PixelCNNPolicy, env, seed=0, device="cpu", policy_kwargs={"prior": tiny_prior()})
    _, callback = model._setup_learn(1, None)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    buffer = model.rollout_buffer
    episodes = buffer.episodes()
    prefix = int(buffer.start[0])
    assert prefix > 0
    logits = model.policy.prior(episodes.codes)
    logits.retain_grad()
    chosen = logits.log_softmax(-1)[episodes.row, episodes.pos, episodes.codes[episodes.row, episodes.pos]]
    chosen.sum().backward()
    assert logits.grad[:, :prefix].abs().max() == 0
    assert logits.grad[:, prefix:].abs().sum(-1).min() > 0


def test_the_value_loss_stays_out_of_the_trunk_by_default() -> None:
    model = make_ppo()
    rollout(model)
    values = model.policy.predict_values(model.rollout_buffer.episodes())
    values.sum().backward()
    assert all(p.grad is None for p in model.policy.prior.parameters())
    assert all(p.grad is not None for p in model.policy.value_net.parameters())


def test_the_value_head_sees_where_a_short_episode_stops() -> None:
    policy = make_ppo().policy
    long, short = torch.full((1, T), K), torch.full((1, T), K)
    short[:, 4:] = K + 1
    with torch.no_grad():
        assert policy.predict_values(long) != policy.predict_values(short)


def test_save_and_load_act_alike(tmp_path) -> None:
    model = make_ppo()
    model.learn(T * 6)
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", device="cpu")
    obs = np.full((3, T), K, np.int16)
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
    model.policy.save(tmp_path / "policy")
    policy = PixelCNNPolicy.load(tmp_path / "policy", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(policy.prior(torch.zeros(1, T).long()), model.policy.prior(torch.zeros(1, T).long()))


def test_a_pickled_prior_carries_no_weights() -> None:
    import pickle

    start = PriorWeights.of(tiny_prior())
    assert start.weights and pickle.loads(pickle.dumps(start)).weights is None


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (lambda: PixelCNN(9, 4, 4, hidden_units=4, residual_units=4, layers=1), "9 codes.*Discrete\\(8\\)"),
        (lambda: PixelCNN(8, 2, 4, hidden_units=4, residual_units=4, layers=1), "2x4 = 8 codes.*\\(16,\\)"),
    ],
)
def test_a_prior_of_another_size_is_refused(prior, message: str) -> None:
    env = make_sb3_env("ral_gym/Toy-v0", 1)
    with pytest.raises(ConfigError, match=message):
        Reinforce(PixelCNNPolicy, env, device="cpu", policy_kwargs={"prior": prior()})


@torch.no_grad()
def test_masked_draws_are_legal_and_their_log_probs_those_of_the_masked_distribution() -> None:
    env = make_sb3_env("ral_gym/Toy-v0", 6, seed=0)
    arguments = algorithm_defaults("maskable_ppo", env, prior=tiny_prior()) | {"seed": 0, "device": "cpu"}
    policy = ALGORITHMS["maskable_ppo"](policy_for("maskable_ppo"), env, **arguments).policy
    obs = torch.full((200, T), K, dtype=torch.int16)
    masks = np.random.default_rng(0).random((200, K)) < 0.4
    masks[:, 3] |= ~masks.any(1)
    actions, _, log_prob = policy(obs, action_masks=masks)
    assert masks[np.arange(200), actions.numpy()].all() and len(actions.unique()) == K
    assert torch.equal(log_prob, policy.get_distribution(obs, masks).log_prob(actions))
    assert (log_prob - policy.get_distribution(obs).log_prob(actions) > 0.1).any()
    masks[7] = False
    with pytest.raises(ValueError, match="forbid every code"):
        policy(obs, action_masks=masks)


def test_the_cache_notices_the_step_of_a_fused_optimizer() -> None:
    """Which does not raise its parameters' versions."""
    model = make_ppo()
    policy = model.policy
    obs = torch.full((3, T), K, dtype=torch.int16)
    with torch.no_grad():
        policy(obs)
    for weight in policy.parameters():
        weight.grad = torch.ones_like(weight)
    versions = [weight._version for weight in policy.parameters()]
    with torch.no_grad():
        policy.optimizer.step(lambda: None)
        for weight, version in zip(policy.parameters(), versions, strict=True):
            torch._C._autograd._unsafe_set_version_counter((weight,), (version,))
        found = policy.get_distribution(obs).distribution.logits
        again = policy(obs)[1]
    policy.use_cache = False
    with torch.no_grad():
        torch.testing.assert_close(found, policy.get_distribution(obs).distribution.logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(again, policy(obs)[1], rtol=0, atol=1e-5)
