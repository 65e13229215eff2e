"""Updates in 16 bits: weights stay in 32, the ratio starts at 1, parts of a batch give the whole batch's gradient."""

from typing import Any

import pytest
import torch

import ral_gym.envs  # noqa: F401
from ral_gym.agents import GRPO, PriorPolicy, Reinforce, make_sb3_env
from ral_gym.errors import ConfigError
from ral_gym.priors.transformer import Transformer


def agent(cls: Any = GRPO, **settings: Any) -> Any:
    torch.manual_seed(0)
    prior = Transformer(8, 4, 4, hidden_units=32, layers=2, attention_heads=2, multiple_of=16)
    prior.output.weight.data.normal_(std=0.5)
    env = make_sb3_env("ral_gym/Toy-v0", 8)
    return cls(PriorPolicy, env, 1e-3, policy_kwargs={"prior": prior}, seed=1, device="cpu", **settings)


def ratios(model: Any, rounds: int = 1) -> list[torch.Tensor]:
    """The ratios of the first epoch of every round."""
    found: list[torch.Tensor] = []
    loss = model.policy_loss

    def noted(log_prob: Any, old: Any, advantages: Any, row: Any) -> Any:
        found.append((log_prob - old).detach().exp())
        return loss(log_prob, old, advantages, row)

    model.policy_loss = noted
    model.learn(rounds * 8 * 16)
    return found


@pytest.mark.parametrize("batch_size", [None, 48])
def test_the_ratio_starts_at_1_and_weights_stay_in_32_bits(batch_size: int | None) -> None:
    model = agent(mixed_precision="bf16", batch_size=batch_size, n_epochs=2, kl_coef=0.1)
    found = ratios(model)
    parts = 1 if batch_size is None else 3  # 8 images of 16 codes, three to a part
    assert len(found) == 2 * parts
    assert all(torch.equal(one, torch.ones_like(one)) for one in found[:parts])
    assert all(not torch.equal(one, torch.ones_like(one)) for one in found[parts:])
    assert {weight.dtype for weight in model.policy.parameters()} == {torch.float32}
    moments = [state["exp_avg"] for state in model.policy.optimizer.state.values()]
    assert moments and {moment.dtype for moment in moments} == {torch.float32}


def test_passes_are_really_in_16_bits() -> None:
    """Against the draws' 32 bits the log-probabilities differ by a rounding of 8 bits, no more."""
    model = agent(mixed_precision="bf16")
    model.policy.optimizer.step = lambda: None  # weights stay
    model.learn(8 * 16)
    drawn = torch.as_tensor(model.rollout_buffer.log_probs)
    assert 1e-4 < (torch.as_tensor(model._old_log_probs()) - drawn).abs().max() < 0.2
    model.mixed_precision = "no"
    assert torch.equal(torch.as_tensor(model._old_log_probs()), drawn)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_parts_of_a_batch_give_its_gradient(precision: str) -> None:
    gradients = []
    for batch_size in (None, 32):
        model = agent(mixed_precision=precision, batch_size=batch_size, n_epochs=1, kl_coef=0.1, ent_coef=0.01)
        model.policy.optimizer.step = lambda: None  # gradients stay
        model.learn(8 * 16)
        gradients.append(torch.cat([w.grad.flatten() for w in model.policy.parameters() if w.grad is not None]))
    tolerance = {"no": 1e-5, "bf16": 2e-2}[precision]
    assert (gradients[0] - gradients[1]).norm() < tolerance * gradients[0].norm()


def test_reinforce_trains_in_16_bits_too() -> None:
    model = agent(Reinforce, mixed_precision="bf16", baseline="value", vf_coef=0.5)
    before = [weight.clone() for weight in model.policy.parameters()]
    model.learn(2 * 8 * 16)
    assert all(torch.isfinite(weight).all() for weight in model.policy.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, model.policy.parameters(), strict=True))


def test_another_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match="mixed_precision 'fp8' is unknown: choose no or bf16"):
        agent(mixed_precision="fp8")
