from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from ral_gym.errors import ConfigError
from ral_gym.priors.attention import attention_blocks
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.sampler import CachedSampler
from tests.pretend_device import pretend_cuda
from tests.sampling import B, Episodes, H, K, T, W, assert_same_draws, small, some_codes, some_uniforms

ATTENTION: dict[str, Any] = {"attention_layers": 2, "attention_heads": 3}


@pytest.fixture
def prior() -> PixelCNN:
    return small(**ATTENTION)


@pytest.fixture
def codes() -> Tensor:
    return some_codes()


@pytest.fixture
def uniforms() -> Tensor:
    return some_uniforms()


# -------------------------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize(
    ("layers", "attention_layers", "blocks"),
    [(8, 2, [3, 7]), (5, 5, [0, 1, 2, 3, 4]), (3, 1, [2]), (4, 0, []), (20, 8, [2, 4, 7, 9, 12, 14, 17, 19])],
)
def test_attention_is_spread_evenly(layers: int, attention_layers: int, blocks: list[int]) -> None:
    assert attention_blocks(layers, attention_layers) == blocks


@pytest.mark.parametrize(("layers", "attention_layers"), [(1, 1), (3, 1), (3, 2)])
def test_logits_depend_on_every_earlier_code_and_on_no_other(layers: int, attention_layers: int) -> None:
    # Wide enough that the convolutions of one block alone miss most of the grid.
    prior = small(3, 9, layers=layers, attention_layers=attention_layers, attention_heads=3)
    embedded: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    prior.input.embedding.register_forward_hook(keep)
    logits = prior(torch.randint(K, (1, 27)))[0]  # (T, K)
    weights = torch.randn(K, dtype=logits.dtype)
    depends = []
    for t in range(27):
        (gradient,) = torch.autograd.grad(logits[t] @ weights, embedded, retain_graph=True)  # (1, H, W, C)
        depends.append(gradient.abs().sum(dim=-1).flatten() > 0)
    assert torch.equal(torch.stack(depends), torch.ones(27, 27, dtype=torch.bool).tril(-1))


def test_changing_later_codes_changes_nothing(prior: PixelCNN, codes: Tensor) -> None:
    other = codes.clone()
    other[:, 13:] = torch.randint(K, (B, T - 13))
    torch.testing.assert_close(prior(codes)[:, :14], prior(other)[:, :14], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(prior(codes)[:, 14], prior(other)[:, 14])


@pytest.mark.parametrize("rows", range(1, H))
def test_fewer_rows_are_the_first_rows_of_the_full_grid(prior: PixelCNN, codes: Tensor, rows: int) -> None:
    few = prior(codes[:, : rows * W])
    torch.testing.assert_close(few, prior(codes)[:, : rows * W], rtol=1e-12, atol=1e-12)


def test_attention_tells_places_apart(codes: Tensor) -> None:
    # All convolutions left out, the same code everywhere: only its place can make a difference.
    prior = small(attention_layers=1, attention_heads=3, layers=1)
    for parameter in [*prior.blocks[0].parameters(), *prior.input.horizontal.parameters()]:
        torch.nn.init.zeros_(parameter)
    torch.nn.init.zeros_(prior.input.vertical.weight)
    features = prior.features(torch.full_like(codes, 3))[0]
    assert torch.pdist(features).min() > 1e-6


def test_second_order_gradients_are_right() -> None:
    torch.manual_seed(0)
    arguments = {"hidden_units": 4, "residual_units": 3, "layers": 2, "conv_filter_size": 3, "output_stack_layers": 1}
    prior = PixelCNN(7, 3, 3, **arguments, attention_layers=2, attention_heads=2).double().eval()  # type: ignore[arg-type]
    codes = torch.randint(7, (2, 9))
    names = [name for name, _ in prior.named_parameters() if name.startswith("attention.")]
    parameters = [dict(prior.named_parameters())[name] for name in [*names, "input.embedding.weight"]]

    def loss(*weights: Tensor) -> Tensor:
        replaced = dict(zip([*names, "input.embedding.weight"], weights, strict=True))
        return torch.func.functional_call(prior, replaced, (codes,)).log_softmax(-1)[0, -1]

    assert torch.autograd.gradgradcheck(loss, parameters, fast_mode=True)


def test_every_parameter_gets_a_gradient(prior: PixelCNN, codes: Tensor) -> None:
    prior(codes).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in prior.parameters())
    # sb3_contrib's TRPO leaves out every parameter with "value" in its name.
    assert not [name for name, _ in prior.named_parameters() if "value" in name]


@pytest.mark.parametrize(("layers", "attention_layers"), [(1, 1), (20, 8)])
def test_activations_keep_their_scale_at_any_depth(layers: int, attention_layers: int) -> None:
    torch.manual_seed(0)
    prior = PixelCNN(
        64, 8, 8, hidden_units=32, residual_units=32, layers=layers, attention_layers=attention_layers, dropout=0.0
    )
    codes = torch.randint(64, (8, 64))
    features, logits = prior.features(codes), prior(codes)
    assert 0.05 < features.std() < 3
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten())
    assert abs(loss.item() - torch.tensor(64.0).log().item()) < 0.1
    loss.backward()
    for name in ("out", "memory"):
        norms = [getattr(attention, name).weight.grad.norm().item() for attention in prior.attention]
        assert 0 < max(norms) < 100 * min(norms)


def test_config_rebuilds_the_network(prior: PixelCNN, codes: Tensor) -> None:
    copy = PixelCNN(**json.loads(json.dumps(prior.config))).double().eval()
    copy.load_state_dict(prior.state_dict())
    assert torch.equal(copy(codes), prior(codes))


def test_a_plain_networks_file_is_what_it_was() -> None:
    plain = small()
    assert not [name for name in [*plain.config, *plain.state_dict()] if "attention" in name or "condition" in name]


def test_compiles_in_place(prior: PixelCNN, codes: Tensor) -> None:
    before = prior(codes)
    prior.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(prior(codes), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_layers": 4}, "attention_layers=4 does not fit 3 blocks"),
        ({"attention_layers": -1}, "attention_layers=-1"),
        ({"attention_layers": 1, "attention_heads": 5}, "attention_heads=5 does not divide hidden_units=12"),
        ({"attention_layers": 1, "attention_heads": 0}, "attention_heads=0"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(**arguments)


# -------------------------------------------------------------------------------------------------------- the sampler


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"layers": 1, "attention_layers": 1, "attention_heads": 1, "position_embedding": True},
        {"attention_layers": 3, "conv_filter_size": 5, "attention_heads": 12},
    ],
)
def test_codes_equal_those_of_the_naive_sampler(kwargs: dict[str, Any], uniforms: Tensor) -> None:
    assert_same_draws(small(**{**ATTENTION, **kwargs}), batch_size=B, uniforms=uniforms)


@pytest.mark.parametrize("start", [*range(0, T + 1, W), 1, W - 1, W + 2, T - 1])
def test_every_prefix(prior: PixelCNN, codes: Tensor, uniforms: Tensor, start: int) -> None:
    assert_same_draws(prior, codes=codes, start=start, uniforms=uniforms)


def test_a_start_for_each_image(prior: PixelCNN, codes: Tensor, uniforms: Tensor) -> None:
    for seed in range(3):
        start = torch.randint(T + 1, (B,), generator=torch.Generator().manual_seed(seed))
        assert_same_draws(prior, codes=codes, start=start, uniforms=uniforms)


@pytest.mark.parametrize("rows", range(1, H + 1))
def test_every_stop_row(prior: PixelCNN, codes: Tensor, uniforms: Tensor, rows: int) -> None:
    assert_same_draws(prior, codes=codes, start=W + 1, stop=rows * W, uniforms=uniforms)
    assert_same_draws(prior, codes=codes[:, : rows * W], start=2, uniforms=uniforms)


def test_log_probs_in_float32() -> None:
    torch.manual_seed(0)
    prior = PixelCNN(128, 8, 8, attention_layers=2).eval()
    codes, log_probs = CachedSampler(prior).sample(4)
    expected = prior(codes).log_softmax(-1).gather(2, codes[..., None])[..., 0]
    torch.testing.assert_close(log_probs, expected, rtol=0, atol=1e-5)


def test_bfloat16(uniforms: Tensor) -> None:
    prior = small(**ATTENTION).bfloat16()
    sampler = CachedSampler(prior)
    codes, log_probs = sampler.sample(B, uniforms=uniforms)
    expected = prior(codes).float().log_softmax(-1).gather(2, codes[..., None])[..., 0]
    torch.testing.assert_close(log_probs, expected, rtol=0, atol=0.5)
    assert sampler._cache is not None and sampler._cache._memory.dtype == torch.bfloat16


@pytest.mark.parametrize("start", [0, 2, W, 2 * W + 3])
@torch.no_grad()
def test_steps_equal_full_passes_in_lockstep(prior: PixelCNN, codes: Tensor, start: int) -> None:
    Episodes(prior, codes, start).run()


@torch.no_grad()
def test_steps_equal_full_passes_at_mixed_positions(prior: PixelCNN, codes: Tensor) -> None:
    Episodes(prior, codes, torch.tensor([0, 3, W, T, T - 2])).run()
    Episodes(prior, codes[:, : 2 * W], torch.tensor([0, 3, W, 1, W + 1])).run()


@torch.no_grad()
def test_rebuilt_rows_start_anew_and_leave_the_others_alone(prior: PixelCNN, codes: Tensor) -> None:
    episodes = Episodes(prior, codes, 0)
    for step in range(2 * T):
        episodes.check()
        if step % 6 == 4:
            rows = torch.randperm(B)[:2]
            episodes.codes[rows] = torch.randint(K, (2, T))
            episodes.position[rows] = torch.randint(T + 1, (2,))
            episodes.sampler.rebuild(rows, episodes.codes[rows], episodes.position[rows])
            episodes.check()
        episodes.advance()


def test_recorded_steps_see_what_they_should(prior: PixelCNN, codes: Tensor, uniforms: Tensor) -> None:
    """Replayed graphs give the plain run's codes, whole and at mixed positions."""
    expected, expected_log_probs = CachedSampler(prior).sample(codes=codes, start=2, uniforms=uniforms)
    with pretend_cuda() as device:
        prior.to("cuda")
        sampler, there = CachedSampler(prior), (codes.to("cuda"), uniforms.to("cuda"))
        for _ in range(2):
            drawn, log_probs = sampler.sample(codes=there[0], start=2, uniforms=there[1])
            assert torch.equal(drawn.cpu(), expected)
            torch.testing.assert_close(log_probs.cpu(), expected_log_probs)
        assert device.counts["replays"] > device.counts["captures"] >= W
        device.counts.clear()
        with torch.no_grad():
            position = torch.tensor([0, 3, W, T, T - 2])
            episodes = Episodes(prior, there[0], position.to("cuda"))
            episodes.run()
        assert device.counts["replays"]


def test_every_weight_is_packed(prior: PixelCNN, codes: Tensor, uniforms: Tensor) -> None:
    sampler = CachedSampler(prior)
    before = sampler.sample(codes=codes, uniforms=uniforms)[1]
    for name, parameter in prior.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter += torch.randn_like(parameter)
        sampler.refresh()
        assert not torch.allclose(sampler.sample(codes=codes, uniforms=uniforms)[1], before), name
        with torch.no_grad():
            parameter.copy_(kept)


def test_a_batch_reuses_its_cache_after_a_refresh(prior: PixelCNN, codes: Tensor, uniforms: Tensor) -> None:
    sampler = CachedSampler(prior)
    sampler.sample(codes=codes, uniforms=uniforms)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    sampler.refresh()
    drawn, log_probs = sampler.sample(codes=codes, uniforms=uniforms)
    expected, expected_log_probs = CachedSampler(prior).sample(codes=codes, uniforms=uniforms)
    assert torch.equal(drawn, expected)
    torch.testing.assert_close(log_probs, expected_log_probs)
