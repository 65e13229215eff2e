from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ral_gym.errors import ConfigError
from ral_gym.priors import blocked_products, packed_weights
from ral_gym.priors.packed_weights import PackedWeights
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.pixelcnn_cache import SamplingCache
from ral_gym.priors.sampler import CachedSampler, draw, sample_naive
from tests.sampling import B, Episodes, H, K, T, W, assert_same_draws, small, some_codes, some_uniforms


@pytest.fixture
def prior() -> PixelCNN:
    return small()


@pytest.fixture
def codes() -> Tensor:
    return some_codes()


@pytest.fixture
def uniforms() -> Tensor:
    return some_uniforms()


# ------------------------------------------------------------------------------------------------ against full passes


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"position_embedding": True, "layers": 1},
        {"conv_filter_size": 5},
        {"conv_filter_size": 7, "output_stack_layers": 0, "layers": 2},
        {"hidden_units": 6, "residual_units": 10},
    ],
)
def test_codes_equal_those_of_the_naive_sampler(kwargs: dict[str, Any], uniforms: Tensor) -> None:
    assert_same_draws(small(**kwargs), batch_size=B, uniforms=uniforms)


@pytest.mark.parametrize("start", [*range(0, T + 1, W), 1, W - 1, W + 2, T - 1])
def test_every_prefix(prior: PixelCNN, codes: Tensor, uniforms: Tensor, start: int) -> None:
    assert_same_draws(prior, codes=codes, start=start, uniforms=uniforms)


@pytest.mark.parametrize("seed", range(3))
def test_a_start_for_each_image(prior: PixelCNN, codes: Tensor, uniforms: Tensor, seed: int) -> None:
    start = torch.randint(T + 1, (B,), generator=torch.Generator().manual_seed(seed))
    assert_same_draws(prior, codes=codes, start=start, uniforms=uniforms)


@pytest.mark.parametrize("rows", range(1, H + 1))
def test_every_stop_row(prior: PixelCNN, codes: Tensor, uniforms: Tensor, rows: int) -> None:
    assert_same_draws(prior, batch_size=B, stop=rows * W, uniforms=uniforms)
    assert_same_draws(prior, codes=codes, start=W + 1, stop=rows * W, uniforms=uniforms)
    assert_same_draws(prior, codes=codes[:, : rows * W], start=2, uniforms=uniforms)


def test_temperature(prior: PixelCNN, codes: Tensor, uniforms: Tensor) -> None:
    assert_same_draws(prior, codes=codes, start=3, uniforms=uniforms, temperature=0.7)
    warm, log_probs = CachedSampler(prior).sample(B, uniforms=uniforms, temperature=2.0)
    expected = (prior(warm) / 2).log_softmax(-1).gather(2, warm[..., None])[..., 0]
    torch.testing.assert_close(log_probs, expected)


def test_log_probs_in_float32(uniforms: Tensor) -> None:
    torch.manual_seed(0)
    prior = PixelCNN(128, 8, 8).eval()
    codes, log_probs = CachedSampler(prior).sample(4)
    expected = prior(codes).log_softmax(-1).gather(2, codes[..., None])[..., 0]
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs, expected, rtol=0, atol=1e-5)


def test_bfloat16(uniforms: Tensor) -> None:
    prior = small().bfloat16()
    codes, log_probs = CachedSampler(prior).sample(B, uniforms=uniforms)
    expected = prior(codes).float().log_softmax(-1).gather(2, codes[..., None])[..., 0]
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs, expected, rtol=0, atol=0.2)


def test_given_codes_are_kept_and_have_no_log_prob(prior: PixelCNN, codes: Tensor) -> None:
    start = torch.tensor([0, 3, W, T, T - 1])
    drawn, log_probs = CachedSampler(prior).sample(codes=codes, start=start)
    given = torch.arange(T) < start[:, None]
    assert torch.equal(drawn[given], codes[given])
    assert (log_probs[given] == 0).all() and (log_probs[~given] < 0).all()


def test_not_drawn_tokens_behind_the_start_do_not_matter(prior: PixelCNN, codes: Tensor, uniforms: Tensor) -> None:
    partial = codes.clone()
    partial[:, 7:] = K + 1
    sampler = CachedSampler(prior)
    expected, _ = sampler.sample(codes=codes, start=7, uniforms=uniforms)
    assert torch.equal(sampler.sample(codes=partial, start=7, uniforms=uniforms)[0], expected)


# ------------------------------------------------------------------------------------------------------ code by code


@pytest.mark.parametrize("start", [0, 2, W, 2 * W + 3])
@torch.no_grad()
def test_steps_equal_full_passes_in_lockstep(prior: PixelCNN, codes: Tensor, start: int) -> None:
    episodes = Episodes(prior, codes, start)
    for _ in range(start, T):
        episodes.check()
        episodes.advance()
    assert (episodes.sampler.position == T).all()


@torch.no_grad()
def test_steps_equal_full_passes_at_mixed_positions(codes: Tensor) -> None:
    episodes = Episodes(small(conv_filter_size=5), codes, torch.tensor([0, 3, W, T, T - 2]))
    for _ in range(T + 1):
        episodes.check()
        episodes.advance()
    assert episodes.sampler.logits().isfinite().all()


@torch.no_grad()
def test_steps_on_fewer_rows(prior: PixelCNN, codes: Tensor) -> None:
    episodes = Episodes(prior, codes[:, : 2 * W], torch.tensor([0, 3, W, 1, W + 1]))
    for _ in range(2 * W):
        episodes.check()
        episodes.advance()


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


@torch.no_grad()
def test_rebuilding_all_rows_alike_returns_to_lockstep(
    prior: PixelCNN, codes: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    episodes = Episodes(prior, codes, torch.arange(B))
    episodes.sampler.rebuild(torch.arange(B), codes, W)
    episodes.position[:] = W
    monkeypatch.delattr(SamplingCache, "step_at")
    for _ in range(W, T):
        episodes.check()
        episodes.advance()


def test_stepping_draws_what_sample_draws(prior: PixelCNN) -> None:
    sampler = CachedSampler(prior)
    expected, expected_log_probs = sampler.sample(B, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    sampler.begin(torch.zeros(B, T, dtype=torch.int64), 0)
    for position in range(T):
        codes, log_probs = draw(sampler.logits(), torch.rand(B, generator=generator))
        assert torch.equal(codes, expected[:, position])
        assert torch.equal(log_probs, expected_log_probs[:, position])
        sampler.advance(codes)


@torch.no_grad()
def test_returned_tensors_are_the_callers(prior: PixelCNN, codes: Tensor) -> None:
    sampler = CachedSampler(prior)
    sampler.begin(codes, 0)
    features, logits = sampler.features(), sampler.logits()
    kept = features.clone(), logits.clone()
    sampler.advance(codes[:, 0])
    assert not torch.equal(sampler.features(), kept[0])
    assert torch.equal(features, kept[0]) and torch.equal(logits, kept[1])
    with torch.enable_grad():
        weight = torch.ones(12, dtype=torch.float64, requires_grad=True)
        (features @ weight).sum().backward()
    assert weight.grad is not None


# --------------------------------------------------------------------------------------------------------- life cycle


def test_refresh_takes_the_new_weights(prior: PixelCNN, uniforms: Tensor) -> None:
    sampler = CachedSampler(prior)
    addresses = [sampler.weights.horizontal[0].data_ptr(), sampler.weights.vertical_table.data_ptr()]
    before, _ = sampler.sample(B, uniforms=uniforms)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    assert torch.equal(sampler.sample(B, uniforms=uniforms)[0], before)
    sampler.refresh()
    expected, expected_log_probs = sample_naive(prior, B, uniforms=uniforms)
    after, log_probs = sampler.sample(B, uniforms=uniforms)
    assert torch.equal(after, expected) and not torch.equal(after, before)
    torch.testing.assert_close(log_probs, expected_log_probs)
    assert addresses == [sampler.weights.horizontal[0].data_ptr(), sampler.weights.vertical_table.data_ptr()]


def test_every_weight_is_packed(prior: PixelCNN, codes: Tensor, uniforms: Tensor) -> None:
    sampler = CachedSampler(prior)
    before = sampler.sample(codes=codes, start=0, uniforms=uniforms)[1]
    for name, parameter in prior.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter += torch.randn_like(parameter)
        sampler.refresh()
        assert not torch.allclose(sampler.sample(codes=codes, start=0, uniforms=uniforms)[1], before), name
        with torch.no_grad():
            parameter.copy_(kept)


def test_the_cache_is_counted_without_memory_behind_it() -> None:
    setting: dict[str, Any] = {"attention_layers": 1, "attention_heads": 3, "condition": (H, W, K), "layers": 2}
    with torch.device("meta"):
        counted = SamplingCache(PackedWeights(PixelCNN(K, H, W, hidden_units=12, **setting).bfloat16()), 64)
    cache = SamplingCache(PackedWeights(PixelCNN(K, H, W, hidden_units=12, **setting).bfloat16()), 64)
    kept = {x.data_ptr(): x.nbytes for x in vars(cache).values() if isinstance(x, Tensor)}
    assert cache.nbytes == counted.nbytes == sum(kept.values())
    assert counted.features.is_meta


def test_refresh_follows_the_dtype(prior: PixelCNN) -> None:
    sampler = CachedSampler(prior)
    sampler.sample(B)
    prior.float()
    sampler.refresh()
    assert sampler.sample(B)[1].dtype == torch.float32


def test_a_sampler_made_in_inference_mode_works_outside(prior: PixelCNN, uniforms: Tensor) -> None:
    with torch.inference_mode():
        sampler = CachedSampler(prior)
        sampler.sample(B)
    sampler.refresh()
    assert torch.equal(sampler.sample(B, uniforms=uniforms)[0], sample_naive(prior, B, uniforms=uniforms)[0])


@pytest.mark.parametrize("how", ["at once", "code by code, from different positions"])
def test_blocked_weights_change_nothing(uniforms: Tensor, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked_products, "LARGE", 0)
    prior = small().float()
    sampler, before = CachedSampler(prior), uniforms[:, :1].expand(-1, T).mul(K).long()
    with torch.no_grad():
        for weight in prior.parameters():
            weight.mul_(1.1)  # `refresh` must copy them again
    found = []
    for blocked in (True, False):
        if not blocked:
            monkeypatch.setattr(packed_weights, "can_block", lambda like: False)
            sampler = CachedSampler(prior)
        sampler.refresh()
        if how == "at once":
            found += sampler.sample(B, uniforms=uniforms)
        else:
            sampler.begin(before, torch.arange(B))
            for _ in range(5):
                found.append(sampler.logits())
                sampler.advance(before[:, 0])
    half = len(found) // 2
    for mine, plain in zip(found[:half], found[half:], strict=True):
        torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("start", [0, 9])
def test_convolutions_by_products_change_nothing(prior: PixelCNN, codes: Tensor, uniforms: Tensor, start: int) -> None:
    """As on CUDA."""
    sampler, other = CachedSampler(prior), CachedSampler(prior)
    other.weights.by_products = True
    found, log_probs = other.sample(codes=codes, start=start, uniforms=uniforms)
    expected = sampler.sample(codes=codes, start=start, uniforms=uniforms)
    assert torch.equal(found, expected[0])
    torch.testing.assert_close(log_probs, expected[1], atol=1e-12, rtol=0)


def test_batch_size_may_change(prior: PixelCNN, uniforms: Tensor) -> None:
    sampler = CachedSampler(prior)
    whole, _ = sampler.sample(B, uniforms=uniforms)
    assert torch.equal(sampler.sample(2, uniforms=uniforms[:2])[0], whole[:2])
    assert torch.equal(sampler.sample(B, uniforms=uniforms)[0], whole)


def test_same_seed_same_codes(prior: PixelCNN) -> None:
    sampler = CachedSampler(prior)
    first, second = (sampler.sample(B, generator=torch.Generator().manual_seed(7))[0] for _ in range(2))
    other, _ = sampler.sample(B, generator=torch.Generator().manual_seed(8))
    naive, _ = sample_naive(prior, B, generator=torch.Generator().manual_seed(7))
    assert torch.equal(first, second) and torch.equal(first, naive) and not torch.equal(first, other)


def test_global_generator_is_drawn_from_once_per_position(prior: PixelCNN, codes: Tensor) -> None:
    torch.manual_seed(3)
    CachedSampler(prior).sample(codes=codes, start=torch.tensor([7, 9, 8, 7, T]))
    after = torch.rand(1)
    torch.manual_seed(3)
    for _ in range(7, T):
        torch.rand(B)
    assert torch.equal(torch.rand(1), after)


def test_dropout_is_never_applied(uniforms: Tensor) -> None:
    prior = small(dropout=0.5)
    expected, _ = CachedSampler(prior).sample(B, uniforms=uniforms)
    prior.train()
    assert torch.equal(CachedSampler(prior).sample(B, uniforms=uniforms)[0], expected)
    assert torch.equal(sample_naive(prior, B, uniforms=uniforms)[0], expected)
    assert prior.training


def test_given_rows_cost_no_steps(prior: PixelCNN, codes: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(name: str) -> Callable[..., None]:
        work = getattr(SamplingCache, name)

        def count(*arguments: Any) -> None:
            calls.append(name)
            work(*arguments)

        return count

    for name in ("_step", "_run_row"):
        monkeypatch.setattr(SamplingCache, name, counted(name))
    CachedSampler(prior).sample(codes=codes, start=2 * W)
    assert calls.count("_step") == T - 2 * W
    assert calls.count("_run_row") == H - 3  # the position's own row belongs to the prefix's single convolution
    calls.clear()
    CachedSampler(prior).sample(codes=codes, start=T)
    assert not calls


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "batch_size=None"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 2, "codes": torch.zeros(3, T, dtype=torch.int64)}, "batch_size=2 but codes are 3"),
        ({"codes": torch.zeros(3, 7, dtype=torch.int64)}, "7 codes.*multiple of 5"),
        ({"batch_size": 2, "stop": 7}, "stop=7.*multiple of 5"),
        ({"batch_size": 2, "stop": T + W}, "stop=25"),
        ({"batch_size": 2, "start": T + 1}, "from 0 to 20"),
        ({"batch_size": 2, "start": torch.tensor([0, -1])}, "from -1 to 0"),
        ({"batch_size": 2, "temperature": 0.0}, "temperature=0.0"),
    ],
)
def test_wrong_arguments_are_named(prior: PixelCNN, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CachedSampler(prior).sample(**arguments)


def test_steps_need_a_beginning(prior: PixelCNN, codes: Tensor) -> None:
    sampler = CachedSampler(prior)
    for end in (lambda: None, lambda: sampler.sample(B), sampler.refresh):
        end()
        with pytest.raises(RuntimeError, match="begin"):
            sampler.logits()
        sampler.begin(codes, 0)
        sampler.logits()
