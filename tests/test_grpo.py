"""GRPO: groups, clipping, k3 and the entropy rule by hand; its gradient at ratio 1 is REINFORCE's."""

import math

import numpy as np
import pytest
import torch

from ral_gym.agents import GRPO, AdaptiveEntropy, PixelCNNPolicy, Reinforce, make_sb3_env
from ral_gym.agents.algorithms.grpo import clipped_surrogate, start_groups
from ral_gym.envs.worlds import toy_score_map
from ral_gym.errors import ConfigError
from ral_gym.priors.pixelcnn import PixelCNN

T, K = 16, 8


def make(
    cls: type = GRPO,
    reset_mode: str = "full",
    n_envs: int = 8,
    lockstep: bool = True,
    reward: str = "single",
    **kwargs: object,
):
    torch.manual_seed(1)
    prior = PixelCNN(K, 4, 4, hidden_units=16, residual_units=16, layers=2, conv_filter_size=3, output_stack_layers=1)
    env = make_sb3_env(
        "ral_gym/Toy-v0", n_envs, reset_mode=reset_mode, lockstep=lockstep, paired=False, seed=0, reward=reward
    )
    return cls(PixelCNNPolicy, env, seed=0, device="cpu", policy_kwargs={"prior": prior}, **kwargs)


def rollout(model, seed: int = 3) -> None:
    torch.manual_seed(seed)
    callback = model._setup_learn(1, None, reset_num_timesteps=False)[1]
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)


@pytest.mark.parametrize("ratio", ["sequence", "token"])
@pytest.mark.parametrize(("scale", "gamma"), [("batch", 1.0), ("none", 0.9)])
def test_one_epoch_at_ratio_one_is_reinforce_with_the_mean_as_baseline(ratio: str, scale: str, gamma: float) -> None:
    grpo = make(n_epochs=1, ratio=ratio, scale_advantage=scale, gamma=gamma, max_grad_norm=1e9)
    reinforce = make(Reinforce, baseline="mean", normalize_advantage=scale == "batch", gamma=gamma, max_grad_norm=1e9)
    moved = []
    for model in (grpo, reinforce):
        rollout(model)
        model.policy.optimizer = torch.optim.SGD(model.policy.parameters(), lr=1.0)
        model.lr_schedule = lambda _: 1.0
        before = torch.nn.utils.parameters_to_vector(model.policy.parameters())
        model.train()
        moved.append(torch.nn.utils.parameters_to_vector(model.policy.parameters()) - before)
    np.testing.assert_array_equal(grpo.rollout_buffer.codes, reinforce.rollout_buffer.codes)
    assert moved[1].abs().max() > 1e-3
    torch.testing.assert_close(*moved, atol=1e-5, rtol=1e-3)


def test_clipping_by_hand_is_pessimistic() -> None:
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1])
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0])
    log_prob = ratios.log().requires_grad_()
    loss, found = clipped_surrogate(log_prob, torch.zeros(5), advantages, 0.2, row=None)
    # A gain counts up to the clip, a loss in full.
    torch.testing.assert_close(loss.detach(), -torch.tensor([1.2 * 2, 1.5 * -2, 0.5 * 2, 0.8 * -2, 1.1 * 2]))
    torch.testing.assert_close(found, ratios)
    loss.sum().backward()
    torch.testing.assert_close(log_prob.grad, torch.tensor([0.0, 3.0, -1.0, 0.0, -2.2]))


def test_the_sequence_ratio_is_the_geometric_mean_and_gradients_stay_with_their_codes() -> None:
    row = torch.tensor([0, 0, 2, 2, 2])
    log_prob = torch.tensor([0.3, -0.1, 0.9, 0.0, 0.3], requires_grad=True)
    advantages = torch.tensor([1.0, 3.0, 1.0, 1.0, -1.0])
    loss, ratio = clipped_surrogate(log_prob, torch.zeros(5), advantages, 0.2, row)
    first, second = math.exp(0.1), math.exp(0.4)
    torch.testing.assert_close(ratio, torch.tensor([first, first, second, second, second]))
    torch.testing.assert_close(loss.detach(), -torch.tensor([first, 3 * first, 1.2, 1.2, -second]))
    loss.sum().backward()
    torch.testing.assert_close(log_prob.grad, -torch.tensor([first, 3 * first, 0.0, 0.0, -second]))


def test_k3_by_hand() -> None:
    log_probs = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]).log()
    reference = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.2, 0.7]]).log()
    actions = torch.tensor([0, 2])
    log_prob = log_probs.gather(1, actions[:, None])[:, 0]
    k3 = GRPO._prior_kl(None, log_probs, log_prob, reference, actions)
    torch.testing.assert_close(k3, torch.tensor([0.5 - 1 - math.log(0.5), 0.0]))
    every = torch.arange(3).repeat(2, 1)  # its expectation over the policy is the exact divergence
    mean = sum(
        (GRPO._prior_kl(None, log_probs, log_probs[:, a], reference, every[:, a]) * log_probs[:, a].exp())
        for a in range(3)
    )
    torch.testing.assert_close(mean, (log_probs.exp() * (log_probs - reference)).sum(1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("fast_path", [True, False])
def test_rows_of_a_group_continue_one_image_and_are_compared_with_each_other_only(fast_path: bool) -> None:
    model = make(reset_mode="continue", n_envs=16, group_size=4, scale_advantage="none", fast_path=fast_path)
    images = set()
    for seed in range(4):
        rollout(model, seed)
        buffer = model.rollout_buffer
        assert len(buffer.codes) == 16 and len({*buffer.start}) == 1
        prefix = int(buffer.start[0])
        by_env = np.empty_like(buffer.codes)
        by_env[buffer.episode_envs] = buffer.codes
        given = by_env[:, :prefix].reshape(4, 4, prefix)
        assert (given == given[:, :1]).all()
        images |= {tuple(grid) for grid in given[:, 0].tolist()}
        group = start_groups(buffer)
        returns = np.zeros(buffer.mask.shape)
        advantages = returns.copy()
        returns[buffer.mask], advantages[buffer.mask] = buffer.returns, model.advantages()
        for label in {*group.tolist()}:
            mine = group == label
            same = (buffer.codes[mine][:, :prefix] == buffer.codes[mine][0, :prefix]).all()
            assert same and mine.sum() % 4 == 0
            expected = (returns[mine] - returns[mine].mean(0)) * buffer.mask[mine]
            np.testing.assert_allclose(advantages[mine], expected, atol=1e-6)
    assert len(images) > 4


def test_from_an_empty_grid_the_group_is_the_batch() -> None:
    model = make(n_envs=7, group_size=3)
    rollout(model)
    assert (start_groups(model.rollout_buffer) == 0).all()
    scratch = make(reset_mode="scratch", n_envs=12, lockstep=False)
    rollout(scratch)
    buffer = scratch.rollout_buffer
    assert len({*start_groups(buffer)}) == len({*buffer.stop}) > 1


def test_groups_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(ConfigError, match="group_size=3 does not divide 8 environments"):
        make(reset_mode="continue", group_size=3)
    with pytest.raises(ConfigError, match="make them with lockstep=True"):
        make(reset_mode="continue", lockstep=False)
    model = make()
    rollout(model)
    model.rollout_buffer.mask[np.tril_indices(8, -1)] = False  # as if eight different prefixes had been given
    with pytest.raises(ConfigError, match="all started from different grids"):
        model.train()
    for wrong in ({"ratio": "word"}, {"scale_advantage": "group"}, {"entropy_target": 2.0, "ent_coef": 0.1}):
        with pytest.raises(ConfigError, match="choose"):
            make(**wrong)


def test_several_epochs_log_what_they_did() -> None:
    model = make(n_envs=32, n_epochs=4, learning_rate=1e-2, kl_coef=0.01, ratio="token", clip_range=0.05)
    model.learn(T * 32 * 2)
    logged = model.logger.name_to_value
    assert logged["train/n_updates"] == 8 and logged["train/clip_range"] == 0.05
    assert 0 < logged["train/clip_fraction"] < 1 and logged["train/approx_kl"] > 0 and logged["train/kl_to_prior"] > 0
    names = ("policy_gradient_loss", "entropy_loss", "loss", "advantage_std", "grad_norm")
    assert all(np.isfinite(logged[f"train/{name}"]) for name in names)


def test_target_kl_ends_the_epochs() -> None:
    model = make(n_epochs=50, learning_rate=3e-2, target_kl=1e-3)
    model.learn(T * 8)
    assert 1 < model._n_updates < 50


def test_the_entropy_rule_by_hand() -> None:
    rule = AdaptiveEntropy(K, coef=1e-3, target=0.78)
    at = lambda share: rule(share * math.log(K))  # noqa: E731
    assert at(0.78) == at(0.77) == pytest.approx(1e-3)
    assert at(0.70) == pytest.approx(1e-3 * math.exp(3 * 0.08))
    assert at(0.90) == pytest.approx(1e-3 * math.exp(-3 * 0.12))
    assert at(0.0) == 4e-3
    scheduled = AdaptiveEntropy(K, coef=1e-3, target=0.78, schedule=True)
    found = [scheduled(0.78 * math.log(K), progress) for progress in (0.025, 0.05, 0.5, 0.925, 1.0)]
    assert found == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4, 7e-5])
    start = AdaptiveEntropy(K, coef=1e-3)
    assert start(1.0) == 1e-3 and start(0.5) > 1e-3 and start(1.5) < 1e-3


def test_adaptive_entropy_steers_the_bonus() -> None:
    model = make(ent_coef=1e-3, entropy_target=0.5)
    model.learn(T * 8)
    expected = 1e-3 * math.exp(3 * (0.5 + model.rollout_buffer.log_probs.mean() / math.log(K)))
    assert model.logger.name_to_value["train/ent_coef"] == pytest.approx(expected, rel=1e-5)
    assert model.ent_coef < 1e-3


def test_save_and_load_keep_reference_and_entropy_rule(tmp_path) -> None:
    model = make(kl_coef=0.5, ent_coef=1e-3, entropy_target="start", mle_coef=0.1)
    model.learn(T * 8 * 2)
    model.save(tmp_path / "model")
    loaded = GRPO.load(tmp_path / "model", env=make_sb3_env("ral_gym/Toy-v0", 8), device="cpu")
    for old, new in zip(model._reference.parameters(), loaded._reference.parameters(), strict=True):
        torch.testing.assert_close(old, new)
    assert loaded.entropy_rule.target == model.entropy_rule.target > 0.9
    loaded.learn(T * 8)


def run_with_options(model, options: list[dict], fast_path: bool) -> tuple[np.ndarray, np.ndarray]:
    """A round that starts as asked: per environment what its first episode earned, and should have earned."""
    model.fast_path = fast_path
    model.env.set_options(options)
    callback = model._setup_learn(1, None)[1]
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    buffer = model.rollout_buffer
    first = np.unique(buffer.episode_envs, return_index=True)[1]
    returns = np.zeros(buffer.mask.shape)
    returns[buffer.mask] = buffer.rewards
    image = torch.as_tensor(buffer.codes.clip(max=K - 1).astype(np.int64))
    true = (toy_score_map(image).flatten(1).numpy() * buffer.mask).sum(1)
    return returns.sum(1)[first], true[first]


A, B = {"prefix_rows": 1, "image_index": 0}, {"prefix_rows": 3, "image_index": 1}


@pytest.mark.parametrize("fast_path", [True, False])
@pytest.mark.parametrize("reset_mode", ["continue", "full"])
@pytest.mark.parametrize(
    "options", [[A, A, B, B], [A, B, A, B], [{"prefix_rows": 2}] * 4, [{"mode": "mixed"}] * 4, [A, A, None, None]]
)
def test_rows_with_options_of_their_own_are_paid_for_what_they_draw(
    fast_path: bool, reset_mode: str, options: list[dict | None]
) -> None:
    model = make(reset_mode=reset_mode, n_envs=4, group_size=2, reward="intermediate", scale_advantage="none")
    earned, true = run_with_options(model, options, fast_path)
    np.testing.assert_array_equal(earned, true)
    buffer = model.rollout_buffer
    first = np.unique(buffer.episode_envs, return_index=True)[1]
    for row, asked in enumerate(options):
        if asked and "prefix_rows" in asked:
            assert buffer.start[first][row] == 4 * asked["prefix_rows"]
    group = start_groups(buffer)
    returns, advantages = np.zeros(buffer.mask.shape), np.zeros(buffer.mask.shape)
    returns[buffer.mask], advantages[buffer.mask] = buffer.returns, model.advantages()
    partners = [np.flatnonzero(group == label) for label in group[first]]
    assert all(len(rows) > 1 for rows in partners)
    for row, rows in zip(first, partners, strict=True):
        assert len({tuple(np.where(buffer.mask[other], -1, buffer.codes[other])) for other in rows}) == 1
        expected = (returns[row] - returns[rows].mean(0)) * buffer.mask[row]
        np.testing.assert_allclose(advantages[row], expected, atol=1e-6)
    for seed in (1, 2):  # and the rounds after it, whose rows do not stand alike at first
        rollout(model, seed)
        model.train()


def test_rows_that_nothing_can_be_compared_with_are_refused() -> None:
    for reset_mode in ("continue", "full"):
        model = make(reset_mode=reset_mode, n_envs=4, group_size=2)
        with pytest.raises(ConfigError, match="environment 0 starts from a grid that no other one has"):
            run_with_options(model, [A, B, B, B], True)


def test_the_sequence_ratio_in_double_precision() -> None:
    model = make(n_envs=4, group_size=2, kl_coef=0.1, reset_mode="continue", mle_coef=0.1, ent_coef=0.01)
    model.policy.double()
    model._reference.double()
    rollout(model)
    model.train()
    assert next(model.policy.parameters()).dtype == torch.float64
