"""LlamaGen's transformer: against a derivation with loops and complex numbers, and its cache against full passes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ral_gym.errors import ConfigError
from ral_gym.priors.base import build_prior, config_of, load_prior, maximum_likelihood_loss, save_prior
from ral_gym.priors.kv_cache import KVCache
from ral_gym.priors.sampler import CachedSampler, sample_naive
from ral_gym.priors.transformer import Transformer
from tests.sampling import B, Episodes, H, K, T, W, assert_same_draws

N = 3
SMALL: dict[str, Any] = {"hidden_units": 16, "layers": 3, "attention_heads": 2, "multiple_of": 8}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


def transformer(**settings: Any) -> Transformer:
    """In float64, with weights of all sizes: a zero output layer would hide every error."""
    torch.manual_seed(0)
    with default_dtype(torch.float64):  # the table of angles, too
        prior = Transformer(K, H, W, **{**SMALL, **settings})
    for name, weight in prior.named_parameters():
        torch.nn.init.normal_(weight, mean=float(name.endswith("norm.weight")), std=0.3)
    return prior.eval()


def with_labels(codes: Tensor) -> Tensor:
    """Sequences (B, T' + 1), the last label "no class"."""
    return torch.cat([codes, K + 2 + torch.tensor([[0], [1], [2], [0], [N]])], 1)


@pytest.fixture
def codes() -> Tensor:
    return torch.randint(K, (B, T), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def uniforms() -> Tensor:
    return torch.rand(B, T, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------- the network


def derived_logits(prior: Transformer, codes: np.ndarray, label: int) -> np.ndarray:
    """The logits (T, K) of one image, slot by slot, from the formulas; pairs are complex numbers."""
    weights = {name: weight.detach().numpy() for name, weight in prior.named_parameters()}
    heads, size = prior.attention_heads, prior.hidden_units // prior.attention_heads

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean() + 1e-5) * weights[f"{name}.weight"]

    def turned(x: np.ndarray, slot: int) -> np.ndarray:
        pairs = x.reshape(heads, size // 2, 2)
        pairs = pairs[..., 0] + 1j * pairs[..., 1]
        if slot == 0:
            return 0 * pairs  # the class token's query and key
        row, column = divmod(slot - 1, prior.width)
        at = [row] * (size // 4) + [column] * (size // 4)
        frequency = [10_000.0 ** (-4 * (i % (size // 4)) / size) for i in range(size // 2)]
        return pairs * np.exp(1j * np.array(at) * np.array(frequency))

    stream = [weights["cls_embedding.embedding_table.weight"][label]]
    stream += [weights["tok_embeddings.weight"][code] for code in codes[:-1]]
    for layer in range(len(prior.layers)):
        keys, values, new = [], [], []
        for slot, x in enumerate(stream):
            q, k, v = np.split(
                weights[f"layers.{layer}.attention.wqkv.weight"] @ norm(x, f"layers.{layer}.attention_norm"), 3
            )
            keys.append(turned(k, slot))
            values.append(v.reshape(heads, size))
            scores = np.array([(turned(q, slot) * key.conj()).real.sum(-1) for key in keys]) / np.sqrt(
                size
            )  # (S, heads)
            shares = np.exp(scores - scores.max(0)) / np.exp(scores - scores.max(0)).sum(0)
            attended = sum(share[:, None] * value for share, value in zip(shares, values, strict=True))
            x = x + weights[f"layers.{layer}.attention.wo.weight"] @ attended.reshape(-1)
            y = norm(x, f"layers.{layer}.ffn_norm")
            gate = weights[f"layers.{layer}.feed_forward.w1.weight"] @ y
            inner = gate / (1 + np.exp(-gate)) * (weights[f"layers.{layer}.feed_forward.w3.weight"] @ y)
            new.append(x + weights[f"layers.{layer}.feed_forward.w2.weight"] @ inner)
        stream = new
    return np.stack([weights["output.weight"] @ norm(x, "norm") for x in stream])


@pytest.mark.parametrize("attention", ["math", "fused"])
def test_logits_follow_the_formulas(codes: Tensor, attention: str) -> None:
    prior = transformer(classes=N, attention=attention)
    logits = prior(with_labels(codes)).detach().numpy()
    for row, label in enumerate([0, 1, 2, 0, N]):
        np.testing.assert_allclose(logits[row], derived_logits(prior, codes[row].numpy(), label), rtol=0, atol=1e-12)


def test_without_classes_the_start_is_one_learned_token(codes: Tensor) -> None:
    prior = transformer()
    expected = derived_logits(prior, codes[0].numpy(), 0)
    np.testing.assert_allclose(prior(codes[:1])[0].detach().numpy(), expected, rtol=0, atol=1e-12)
    assert prior.cls_embedding.embedding_table.weight.shape == (1, 16)


def test_names_and_counts_are_those_of_the_released_files() -> None:
    """LlamaGen-B at 256 pixels, on no device: 7 tensors per block and 4 more, 110,888,448 parameters."""
    with torch.device("meta"):
        prior = Transformer(16384, 16, 16, hidden_units=768, layers=12, attention_heads=12, classes=1000)
    shapes = {name: tuple(weight.shape) for name, weight in prior.state_dict().items()}
    assert len(shapes) == 7 * 12 + 4 and sum(weight.numel() for weight in prior.parameters()) == 110_888_448
    expected = {"cls_embedding.embedding_table.weight": (1001, 768), "tok_embeddings.weight": (16384, 768)}
    expected |= {"norm.weight": (768,), "output.weight": (16384, 768)}
    block = {"attention.wqkv": (3 * 768, 768), "attention.wo": (768, 768), "feed_forward.w1": (2048, 768)}
    block |= {"feed_forward.w3": (2048, 768), "feed_forward.w2": (768, 2048)}
    block |= {"attention_norm": (768,), "ffn_norm": (768,)}
    expected |= {f"layers.{i}.{name}.weight": shape for i in range(12) for name, shape in block.items()}
    assert shapes == expected


def test_a_code_sees_those_before_it_only(codes: Tensor) -> None:
    prior = transformer(classes=N)
    before = prior(with_labels(codes))
    for position in range(T):
        other = codes.clone()
        other[:, position] = (other[:, position] + 1) % K
        changed = (prior(with_labels(other)) - before).abs().amax((0, 2)) > 1e-9
        assert not changed[: position + 1].any() and changed[position + 1 :].all()


def test_the_first_rows_alone_and_codes_not_drawn(codes: Tensor) -> None:
    prior = transformer()
    whole = prior(codes)
    torch.testing.assert_close(prior(codes[:, : 2 * W]), whole[:, : 2 * W], rtol=0, atol=1e-12)
    half = torch.cat([codes[:, :W], torch.full_like(codes[:, W:], K + 1)], 1)
    torch.testing.assert_close(prior(half)[:, : W + 1], whole[:, : W + 1], rtol=0, atol=1e-12)


def test_an_untrained_network_draws_uniformly(codes: Tensor) -> None:
    assert torch.equal(Transformer(K, H, W, **SMALL)(codes), torch.zeros(B, T, K))


def test_training_mode_drops_labels(codes: Tensor) -> None:
    """With dropout off and a share near 1, all labels read as "no class"."""
    prior = transformer(classes=N, dropout=0.0, class_dropout=1 - 1e-9).train()
    nothing = torch.cat([codes, torch.full((B, 1), K + 2 + N)], 1)
    assert torch.equal(prior(with_labels(codes)), prior(nothing))
    prior.eval()
    assert not torch.equal(prior(with_labels(codes)), prior(nothing))


def test_dropout_is_active_in_training_mode_only(codes: Tensor) -> None:
    prior = transformer(dropout=0.5)
    assert torch.equal(prior(codes), prior(codes))
    prior.train()
    assert not torch.equal(prior(codes), prior(codes))


def test_math_attention_has_second_order_gradients(codes: Tensor) -> None:
    prior = transformer()
    (gradient,) = torch.autograd.grad(
        maximum_likelihood_loss(prior, codes), prior.tok_embeddings.weight, create_graph=True
    )
    (second,) = torch.autograd.grad(gradient.square().sum(), prior.layers[0].attention.wqkv.weight)  # type: ignore[union-attr]
    assert second.abs().max() > 0


def test_half_precision_keeps_its_type_and_norms_in_float32(codes: Tensor) -> None:
    prior = transformer().bfloat16()
    assert prior(codes).dtype == torch.bfloat16
    x = torch.full((1, 16), 300.0, dtype=torch.float16)  # its square overflows
    assert prior.half().norm(x).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"hidden_units": 20, "attention_heads": 2},
            "hidden_units=20 does not fit attention_heads=2: give a multiple of 8",
        ),
        ({"layers": 0}, "layers=0 must be at least 1"),
        ({"classes": -1}, "classes=-1"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"class_dropout": -0.1}, "class_dropout=-0.1"),
        ({"attention": "flash"}, "choose math or fused"),
    ],
)
def test_arguments_out_of_range_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Transformer(K, H, W, **{**SMALL, **settings})
    assert said in str(caught.value)


def test_other_lengths_and_labels_are_refused(codes: Tensor) -> None:
    with pytest.raises(ConfigError, match=f"a grid of {T - 1} codes does not fit the transformer"):
        transformer()(codes[:, :-1])
    with pytest.raises(ConfigError, match=f"is its label, {K + 2}..{K + 2 + N}: found {K - 1}"):
        transformer(classes=N)(torch.cat([codes, torch.full((B, 1), K - 1)], 1))


def test_a_file_gives_back_the_same_network(codes: Tensor, tmp_path: Path) -> None:
    prior = transformer(classes=N, class_dropout=0.2, attention="fused").float()
    assert config_of(prior)["kind"] == "transformer"
    assert config_of(build_prior(config_of(prior))) == config_of(prior)
    save_prior(tmp_path / "prior.safetensors", prior)
    again = load_prior(tmp_path / "prior.safetensors", config=config_of(prior))
    assert torch.equal(again(with_labels(codes)), prior(with_labels(codes)))


# --------------------------------------------------------------------------------------------------------- the cache


def test_the_sampler_draws_through_the_cache() -> None:
    assert isinstance(CachedSampler(transformer()).weights.make_cache(2), KVCache)


@pytest.mark.parametrize("start", [0, 1, 3, W, W + 2, T - 1, T])
def test_codes_and_log_probs_are_those_of_full_passes(codes: Tensor, uniforms: Tensor, start: int) -> None:
    assert_same_draws(transformer(), codes=codes, start=start, uniforms=uniforms)
    assert_same_draws(transformer(), codes=codes[:, : 2 * W], start=min(start, 2 * W), uniforms=uniforms)
    assert_same_draws(transformer(), codes=codes, start=min(start, W), stop=2 * W, uniforms=uniforms)
    positions = torch.tensor([0, T, W - 1, 2 * W, start])
    assert_same_draws(transformer(), codes=codes, start=positions, uniforms=uniforms)


def test_rows_at_positions_of_their_own_and_rebuilt_ones(codes: Tensor) -> None:
    Episodes(transformer(), codes, torch.tensor([0, T, W - 1, 2 * W, 1])).run_with_rebuilt_rows()


def test_labels_through_the_cache_and_rows_rebuilt_with_others(codes: Tensor, uniforms: Tensor) -> None:
    prior, sequence = transformer(classes=N), with_labels(codes)
    sampler = CachedSampler(prior)
    drawn, log_probs = sampler.sample(codes=sequence, uniforms=uniforms)
    naive, naive_log_probs = sample_naive(prior, codes=sequence, uniforms=uniforms)
    assert torch.equal(drawn, naive)
    torch.testing.assert_close(log_probs, naive_log_probs, rtol=0, atol=1e-12)
    sampler.begin(sequence, torch.tensor([0, 2, 0, W, 1]))
    swapped = torch.cat([codes, sequence[:, -1:].roll(1, 0)], 1)
    sampler.rebuild(torch.tensor([0, 3]), swapped[[0, 3]], torch.tensor([0, 4]))
    expected = torch.cat([swapped[:1], sequence[1:3], swapped[3:4], sequence[4:]])
    at = torch.tensor([0, 2, 0, 4, 1])
    torch.testing.assert_close(sampler.logits(), prior(expected)[torch.arange(B), at], rtol=0, atol=1e-12)


def test_new_weights_and_dropout(uniforms: Tensor) -> None:
    prior = transformer(dropout=0.5)
    sampler = CachedSampler(prior)
    before = sampler.sample(B, uniforms=uniforms)[0]
    assert torch.equal(CachedSampler(prior.train()).sample(B, uniforms=uniforms)[0], before)
    with torch.no_grad():
        prior.output.weight.neg_()
    sampler.refresh()
    after = sampler.sample(B, uniforms=uniforms)[0]
    assert not torch.equal(before, after)
    assert torch.equal(after, sample_naive(prior.eval(), B, uniforms=uniforms)[0])


def test_the_cache_holds_a_key_and_a_value_per_slot() -> None:
    cache = CachedSampler(transformer().float()).weights.make_cache(7)
    assert isinstance(cache, KVCache)
    held = 4 * 2 * 3 * 7 * T * 16  # float32, keys and values, layers, batch, slots, units
    turns = 8 * T * 16 // 2 // 2 + 4  # complex, at most half of a head's units for each slot; and an empty sum
    assert held <= cache.nbytes <= held + 8 * 7 * (T + 3) + 8 * T + 4 * 7 * (16 + K) + turns


def test_half_precision_turns_without_complex_numbers_also_at_places_of_their_own() -> None:
    wide = transformer().float().eval()
    narrow = transformer().eval()
    narrow.load_state_dict(wide.state_dict())
    narrow = narrow.bfloat16()
    codes = torch.randint(K, (3, T), generator=torch.Generator().manual_seed(0))
    found = []
    for prior in (wide, narrow):
        sampler = CachedSampler(prior)
        sampler.begin(codes, torch.tensor([0, 5, T - 1]))
        found.append(sampler.logits().float())
        assert (sampler._cache._turns is None) == (prior is narrow)
    scale = found[0].abs().max()
    assert scale > 0.01 and (found[0] - found[1]).abs().max() < 0.1 * scale
