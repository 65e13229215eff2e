from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from ral_gym.errors import ConfigError
from ral_gym.priors.condition import ConditioningStack, upsample
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.sampler import CachedSampler, sample_naive
from tests.sampling import B, Episodes, K, assert_same_draws, small, some_codes, some_uniforms

TOP_H, TOP_W, TOP_K = 2, 3, 7
H, W = 2 * TOP_H, 2 * TOP_W
T, TOP_T = H * W, TOP_H * TOP_W


def conditional(**kwargs: Any) -> PixelCNN:
    arguments = {"condition": (TOP_H, TOP_W, TOP_K), "conditioning_stack_layers": 2}
    return small(H, W, **{**arguments, **kwargs})


@pytest.fixture
def prior() -> PixelCNN:
    return conditional()


@pytest.fixture
def codes() -> Tensor:
    return some_codes(T)


@pytest.fixture
def condition() -> Tensor:
    return some_codes(TOP_T, TOP_K, seed=3)


@pytest.fixture
def uniforms() -> Tensor:
    return some_uniforms(T)


# -------------------------------------------------------------------------------------------------------- the network


def gradients(prior: PixelCNN, embedding: torch.nn.Module, codes: Tensor, condition: Tensor) -> Tensor:
    """Which embedded codes each logit depends on: (T, number of them) bool."""
    embedded: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    handle = embedding.register_forward_hook(keep)
    logits = prior(codes[:1], condition[:1])[0]  # (T, K)
    handle.remove()
    weights = torch.randn(K, dtype=logits.dtype)
    depends = []
    for t in range(len(logits)):
        (gradient,) = torch.autograd.grad(logits[t] @ weights, embedded, retain_graph=True)
        depends.append(gradient.abs().sum(dim=-1).flatten() > 0)
    return torch.stack(depends)


@pytest.mark.parametrize("attention_layers", [0, 1])
def test_every_logit_sees_the_condition_and_only_earlier_codes(
    codes: Tensor, condition: Tensor, attention_layers: int
) -> None:
    prior = conditional(layers=6, attention_layers=attention_layers, attention_heads=3)
    assert prior.conditioning is not None
    assert gradients(prior, prior.conditioning.embedding, codes, condition).all()
    depends = gradients(prior, prior.input.embedding, codes, condition)
    assert torch.equal(depends, torch.ones(T, T, dtype=torch.bool).tril(-1))


def test_a_code_lies_under_its_top_code(codes: Tensor, condition: Tensor) -> None:
    # One block, no stack on the condition: a position of the first row sees the top codes that its kernels touch.
    prior = conditional(layers=1, conditioning_stack_layers=0)
    assert prior.conditioning is not None
    depends = gradients(prior, prior.conditioning.embedding, codes, condition).view(H, W, TOP_H, TOP_W)
    for row in range(H):
        for column in range(W):
            seen = torch.zeros(TOP_H, TOP_W, dtype=torch.bool)
            seen[row // 2, column // 2] = True  # the block adds it behind the kernels
            assert torch.equal(depends[row, column], seen)


def test_upsample_repeats_rows_and_columns() -> None:
    x = torch.arange(6).view(1, 2, 3, 1)
    assert upsample(x, 2)[0, :, :, 0].tolist() == [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2


def test_absent_codes_are_all_alike(prior: PixelCNN, codes: Tensor, condition: Tensor) -> None:
    partial = condition.clone()
    partial[:, TOP_W:] = TOP_K
    other = partial.clone()
    other[:, TOP_W:] = TOP_K + 1
    expected = prior(codes, partial)
    assert torch.equal(prior(codes, other), expected)
    assert torch.equal(prior(codes, condition[:, :TOP_W]), expected)
    for code in range(TOP_K):
        other[:, TOP_W:] = code
        assert not torch.allclose(prior(codes, other), expected)


def test_absence_starts_as_nothing() -> None:
    prior = PixelCNN(K, H, W, condition=(TOP_H, TOP_W, TOP_K))
    assert prior.conditioning is not None
    assert (prior.conditioning.embedding.weight[-1] == 0).all()


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_fewer_rows_are_the_first_rows_of_the_full_grid(
    prior: PixelCNN, codes: Tensor, condition: Tensor, rows: int
) -> None:
    few = prior(codes[:, : rows * W], condition)
    torch.testing.assert_close(few, prior(codes, condition)[:, : rows * W], rtol=1e-12, atol=1e-12)


def test_dropout_is_active_in_training_only(codes: Tensor, condition: Tensor) -> None:
    prior = conditional(dropout=0.5)
    assert prior.conditioning is not None
    assert torch.equal(prior.conditioning(condition), prior.conditioning(condition))
    prior.train()
    assert not torch.equal(prior.conditioning(condition), prior.conditioning(condition))


def test_every_parameter_gets_a_gradient(prior: PixelCNN, codes: Tensor, condition: Tensor) -> None:
    condition[0, 0] = TOP_K
    prior(codes, condition).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in prior.parameters())
    # sb3_contrib's TRPO leaves out every parameter with "value" in its name.
    assert not [name for name, _ in prior.named_parameters() if "value" in name]


@pytest.mark.parametrize("layers", [1, 20])
def test_activations_keep_their_scale_at_any_depth(layers: int) -> None:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"hidden_units": 32, "residual_units": 32, "layers": layers}
    prior = PixelCNN(64, 8, 8, **arguments, condition=(4, 4, 64), conditioning_stack_layers=layers).eval()
    codes, condition = torch.randint(64, (8, 64)), torch.randint(64, (8, 16))
    assert prior.conditioning is not None
    assert 0.05 < prior.conditioning(condition).std() < 1
    assert 0.05 < prior.features(codes, condition).std() < 3
    loss = torch.nn.functional.cross_entropy(prior(codes, condition).flatten(0, 1), codes.flatten())
    assert abs(loss.item() - torch.tensor(64.0).log().item()) < 0.1


def test_second_order_gradients_are_right() -> None:
    torch.manual_seed(0)
    arguments = {"hidden_units": 4, "residual_units": 3, "layers": 2, "conv_filter_size": 3, "output_stack_layers": 1}
    prior = PixelCNN(7, 4, 4, **arguments, condition=(2, 2, 7), conditioning_stack_layers=1)  # type: ignore[arg-type]
    prior = prior.double().eval()
    codes, condition = torch.randint(7, (2, 16)), torch.randint(7, (2, 4))
    names = [name for name, _ in prior.named_parameters() if "condition" in name]
    parameters = [dict(prior.named_parameters())[name] for name in names]

    def loss(*weights: Tensor) -> Tensor:
        replaced = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(prior, replaced, (codes, condition)).log_softmax(-1)[0, -1]

    assert torch.autograd.gradgradcheck(loss, parameters, fast_mode=True)


def test_config_rebuilds_the_network(prior: PixelCNN, codes: Tensor, condition: Tensor) -> None:
    copy = PixelCNN(**json.loads(json.dumps(prior.config))).double().eval()
    copy.load_state_dict(prior.state_dict())
    assert copy.config == prior.config
    assert torch.equal(copy(codes, condition), prior(codes, condition))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"condition": (3, 3, 7)}, r"condition=\(3, 3, 7\).*4x6"),
        ({"condition": (2, 6, 7)}, "whole multiple"),
        ({"condition": (2, 3)}, "rows, columns, codebook size"),
        ({"condition": (2, 3, 0)}, "condition="),
        ({"condition": (8, 12, 7)}, "condition="),
        ({"conditioning_stack_layers": -1}, "conditioning_stack_layers=-1"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        conditional(**arguments)


def test_a_condition_is_passed_where_it_belongs(prior: PixelCNN, codes: Tensor, condition: Tensor) -> None:
    with pytest.raises(ConfigError, match="2x3 codes"):
        prior(codes)
    with pytest.raises(ConfigError, match="takes no condition"):
        small(H, W)(codes, condition)
    with pytest.raises(ConfigError, match=r"5 codes.*multiple of 3 from 3 to 6"):
        prior(codes, condition[:, :5])
    with pytest.raises(ConfigError, match="2 grids for 5 images"):
        CachedSampler(prior).sample(codes=codes, condition=condition[:2])
    with pytest.raises(ConfigError, match="2x3 codes"):
        CachedSampler(prior).begin(codes, 0)
    with pytest.raises(ConfigError, match="2 grids for 5 images"):
        prior(codes, condition[:2])


# -------------------------------------------------------------------------------------------------------- the sampler


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"conv_filter_size": 5, "layers": 1}, {"attention_layers": 2, "attention_heads": 3}, {"condition": (4, 6, 7)}],
)
def test_codes_equal_those_of_the_naive_sampler(kwargs: dict[str, Any], uniforms: Tensor) -> None:
    prior = conditional(**kwargs)
    assert prior.condition is not None
    condition = torch.randint(TOP_K + 2, (B, prior.condition[0] * prior.condition[1]))
    assert_same_draws(prior, batch_size=B, uniforms=uniforms, condition=condition)


@pytest.mark.parametrize("start", [*range(0, T + 1, W), 1, W - 1, W + 2, T - 1])
def test_every_prefix(prior: PixelCNN, codes: Tensor, condition: Tensor, uniforms: Tensor, start: int) -> None:
    assert_same_draws(prior, codes=codes, start=start, uniforms=uniforms, condition=condition)


@pytest.mark.parametrize("rows", range(1, H + 1))
def test_every_stop_row(prior: PixelCNN, codes: Tensor, condition: Tensor, uniforms: Tensor, rows: int) -> None:
    assert_same_draws(prior, codes=codes, start=W + 1, stop=rows * W, uniforms=uniforms, condition=condition)
    assert_same_draws(
        prior, codes=codes[:, : rows * W], start=2, uniforms=uniforms, condition=condition[:, : (rows + 1) // 2 * TOP_W]
    )


def test_rows_instead_of_positions(prior: PixelCNN, codes: Tensor, condition: Tensor, uniforms: Tensor) -> None:
    sampler = CachedSampler(prior)
    for rows in (1, torch.tensor([0, 1, 2, 1, 3])):
        expected = sampler.sample(codes=codes, start=rows * W, stop=3 * W, uniforms=uniforms, condition=condition)
        found = sampler.sample(codes=codes, prefix_rows=rows, stop_rows=3, uniforms=uniforms, condition=condition)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@torch.no_grad()
def test_steps_equal_full_passes(prior: PixelCNN, codes: Tensor, condition: Tensor) -> None:
    Episodes(prior, codes, W + 2, condition).run()
    Episodes(prior, codes, torch.tensor([0, 3, W, T, T - 2]), condition).run()
    Episodes(prior, codes[:, : 2 * W], torch.tensor([0, 3, W, 1, W + 1]), condition[:, :TOP_W]).run()


@torch.no_grad()
def test_rebuilt_rows_have_conditions_of_their_own(prior: PixelCNN, codes: Tensor, condition: Tensor) -> None:
    episodes = Episodes(prior, codes, 0, condition.clone())
    assert episodes.condition is not None
    for step in range(T):
        episodes.check()
        if step % 6 == 4:
            rows = torch.randperm(B)[:2]
            episodes.codes[rows] = torch.randint(K, (2, T))
            episodes.condition[rows] = torch.randint(TOP_K + 1, (2, TOP_T))
            episodes.position[rows] = torch.randint(T + 1, (2,))
            arguments = (episodes.codes[rows], episodes.position[rows], episodes.condition[rows])
            episodes.sampler.rebuild(rows, *arguments)
            episodes.check()
        episodes.advance()


def test_the_condition_is_computed_once(
    prior: PixelCNN, codes: Tensor, condition: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    work = ConditioningStack.forward

    def count(stack: ConditioningStack, codes: Tensor) -> Tensor:
        calls.append(len(codes))
        return work(stack, codes)

    monkeypatch.setattr(ConditioningStack, "forward", count)
    sampler = CachedSampler(prior)
    sampler.sample(B, condition=condition)
    assert calls == [B]
    Episodes(prior, codes, torch.tensor([0, 3, T, T, T - 2]), condition).sampler.logits()
    assert calls == [B, 3]  # finished images need nothing


def test_every_weight_is_packed(prior: PixelCNN, codes: Tensor, condition: Tensor, uniforms: Tensor) -> None:
    condition[0, 0] = TOP_K
    sampler = CachedSampler(prior)
    arguments: dict[str, Any] = {"codes": codes, "uniforms": uniforms, "condition": condition}
    before = sampler.sample(**arguments)[1]
    for name, parameter in prior.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter += torch.randn_like(parameter)
        assert torch.equal(sampler.sample(**arguments)[1], before), name  # its weights are copies
        sampler.refresh()
        assert not torch.allclose(sampler.sample(**arguments)[1], before), name
        with torch.no_grad():
            parameter.copy_(kept)
        sampler.refresh()


def test_dropout_is_never_applied(condition: Tensor, uniforms: Tensor) -> None:
    prior = conditional(dropout=0.5)
    expected, _ = CachedSampler(prior).sample(B, uniforms=uniforms, condition=condition)
    prior.train()
    assert torch.equal(CachedSampler(prior).sample(B, uniforms=uniforms, condition=condition)[0], expected)
    assert torch.equal(sample_naive(prior, B, uniforms=uniforms, condition=condition)[0], expected)


def test_bfloat16(condition: Tensor, uniforms: Tensor) -> None:
    prior = conditional().bfloat16()
    codes, log_probs = CachedSampler(prior).sample(B, uniforms=uniforms, condition=condition)
    expected = prior(codes, condition).float().log_softmax(-1).gather(2, codes[..., None])[..., 0]
    torch.testing.assert_close(log_probs, expected, rtol=0, atol=0.5)
