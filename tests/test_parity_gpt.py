"""LlamaGen's transformer and taming's GPT against independent implementations, `LlamaModel` and `GPT2Model`.

Same weights in both: random ones, norms perturbed, the output layer not zero. What transformers does not have is given
to it: LlamaGen's two-dimensional angles as a table, its class token, and its order of pairs (neighbours, where
`LlamaModel` turns the two halves of a head).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ral_gym.priors.gpt import GPT
from ral_gym.priors.guidance import Sampling
from ral_gym.priors.sampler import CachedSampler, make_sampler
from ral_gym.priors.transformer import Transformer

pytestmark = pytest.mark.parity

K, SIDE, N, B = 29, 4, 5, 3
T = SIDE * SIDE
SIZES: dict[str, Any] = {"hidden_units": 64, "layers": 3, "attention_heads": 4}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}
LABELS = torch.tensor([4, 0, 2])


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """The type of all numbers, buffers included."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def perturbed(prior: Any) -> Any:
    """Random weights everywhere: initial ones (norms 1, biases and output 0) would hide errors."""
    for name, weight in prior.named_parameters():
        nn.init.normal_(weight, mean=float(name.endswith("norm.weight")), std=0.2)
    return prior.eval()


def some_codes() -> Tensor:
    return torch.randint(K, (B, T), generator=torch.Generator().manual_seed(1))


def labelled(codes: Tensor, labels: Tensor) -> Tensor:
    return torch.cat([codes, K + 2 + labels[:, None]], 1)


class Oracle:
    """A model of transformers that is fed embeddings: a class token, then codes."""

    def __init__(self, model: Any, start: Tensor, embedding: Tensor, output: Tensor) -> None:
        self.model, self.start, self.embedding, self.output = model.eval(), start, embedding, output
        self.cache: Any = None

    @torch.no_grad()
    def logits(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Teacher-forced, (B, T, K)."""
        x = torch.cat([self.start[labels][:, None], self.embedding[codes[:, :-1]]], 1)
        return self.model(inputs_embeds=x, use_cache=False).last_hidden_state @ self.output.T

    @torch.no_grad()
    def step(self, tokens: Tensor, slot: int) -> Tensor:
        """One slot through its own cache: labels (B,) at slot 0, then codes (B,) -> logits (B, K)."""
        from transformers import DynamicCache

        self.cache = DynamicCache() if slot == 0 else self.cache
        x = (self.embedding if slot else self.start)[tokens][:, None]  # (B, 1, C)
        where = torch.full((1, 1), slot)
        found = self.model(inputs_embeds=x, position_ids=where, cache=self.cache, use_cache=True)
        return found.last_hidden_state[:, 0] @ self.output.T


# -------------------------------------------------------------------------------------------------------- LlamaGen


class Angles(nn.Module):
    """`LlamaModel`'s rotary embedding, from LlamaGen's rule: slot 0 has neither cosine nor sine."""

    def __init__(self, head: int) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cosines, sines = [], []
        for slot in position_ids[0].tolist():
            row, column = divmod(slot - 1, SIDE)
            half = self.head // 2
            rate = [10_000.0 ** (-2 * i / half) for i in range(half // 2)]
            angle = torch.tensor([row * r for r in rate] + [column * r for r in rate]).repeat(2)  # (h,)
            cosines.append(angle.cos() * (slot > 0))
            sines.append(angle.sin() * (slot > 0))
        return torch.stack(cosines)[None].to(x), torch.stack(sines)[None].to(x)


def halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key matrix (C, C): every head's pairs (0, 1), (2, 3), .. become (0, h/2), (1, h/2 + 1), .."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def llama(prior: Transformer) -> Oracle:
    from transformers import LlamaConfig, LlamaModel

    w, size, heads = prior.state_dict(), prior.hidden_units, prior.attention_heads
    inner = len(w["layers.0.feed_forward.w1.weight"])
    sizes = {"hidden_size": size, "intermediate_size": inner, "num_hidden_layers": len(prior.layers)}
    model = LlamaModel(
        LlamaConfig(**sizes, vocab_size=K, num_attention_heads=heads, num_key_value_heads=heads, rms_norm_eps=1e-5)
    )
    there = {"embed_tokens.weight": w["tok_embeddings.weight"], "norm.weight": w["norm.weight"]}
    for i in range(len(prior.layers)):
        queries, keys, values = w[f"layers.{i}.attention.wqkv.weight"].chunk(3)
        projections = {"q": halves(queries, heads), "k": halves(keys, heads), "v": values}
        projections["o"] = w[f"layers.{i}.attention.wo.weight"]
        there |= {f"layers.{i}.self_attn.{name}_proj.weight": weight for name, weight in projections.items()}
        for name, ours in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            there[f"layers.{i}.mlp.{name}_proj.weight"] = w[f"layers.{i}.feed_forward.{ours}.weight"]
        there[f"layers.{i}.input_layernorm.weight"] = w[f"layers.{i}.attention_norm.weight"]
        there[f"layers.{i}.post_attention_layernorm.weight"] = w[f"layers.{i}.ffn_norm.weight"]
    model.load_state_dict(there)
    model.rotary_emb = Angles(size // heads)
    if torch.get_default_dtype() == torch.float64:
        in_torch_norms(model)
    return Oracle(model, w["cls_embedding.embedding_table.weight"], w["tok_embeddings.weight"], w["output.weight"])


def in_torch_norms(model: Any) -> None:
    """Torch's own RMSNorm: that of `LlamaModel` rounds to 32 bits."""

    def own(norm: Any) -> nn.RMSNorm:
        new = nn.RMSNorm(len(norm.weight), eps=1e-5)
        new.load_state_dict(norm.state_dict())
        return new

    model.norm = own(model.norm)
    for layer in model.layers:
        layer.input_layernorm = own(layer.input_layernorm)
        layer.post_attention_layernorm = own(layer.post_attention_layernorm)


def llamagen() -> Transformer:
    return perturbed(Transformer(K, SIDE, SIDE, classes=N, multiple_of=32, **SIZES))


# ----------------------------------------------------------------------------------------------------------- taming


def gpt2(prior: GPT) -> Oracle:
    from transformers import GPT2Config, GPT2Model

    w, size = prior.state_dict(), prior.hidden_units
    sizes = {"n_positions": T, "n_embd": size, "n_layer": len(prior.layers), "n_head": prior.attention_heads}
    model = GPT2Model(GPT2Config(vocab_size=K, activation_function="gelu", **sizes))
    there = {"wte.weight": w["tok_embeddings.weight"], "wpe.weight": w["position"]}
    there |= {f"ln_f.{end}": w[f"norm.{end}"] for end in ("weight", "bias")}
    names = {"ln_1": "attention_norm", "ln_2": "ffn_norm", "attn.c_attn": "attention.wqkv"}
    names |= {"attn.c_proj": "attention.wo", "mlp.c_fc": "feed_forward.0", "mlp.c_proj": "feed_forward.2"}
    for i in range(len(prior.layers)):
        for name, ours in names.items():
            weight = w[f"layers.{i}.{ours}.weight"]
            there[f"h.{i}.{name}.weight"] = weight.T if weight.dim() == 2 else weight  # its Conv1D is transposed
            there[f"h.{i}.{name}.bias"] = w[f"layers.{i}.{ours}.bias"]
    model.load_state_dict(there)
    return Oracle(model, w["cls_embedding.embedding_table.weight"], w["tok_embeddings.weight"], w["output.weight"])


def taming() -> GPT:
    return perturbed(GPT(K, SIDE, SIDE, classes=N, **SIZES))


PAIRS = [pytest.param(llamagen, llama, id="llamagen"), pytest.param(taming, gpt2, id="taming")]


@pytest.mark.parametrize("attention", ["math", "fused"])
@pytest.mark.parametrize(("make", "independent"), PAIRS)
def test_teacher_forced_logits(make: Any, independent: Any, attention: str, dtype: torch.dtype) -> None:
    prior, codes = make(), some_codes()
    prior.attention = attention
    expected = independent(prior).logits(codes, LABELS)
    assert expected.abs().max() > 1
    torch.testing.assert_close(
        prior(labelled(codes, LABELS)).detach(), expected, rtol=0, atol=TOLERANCE[dtype] * float(expected.abs().max())
    )


@pytest.mark.parametrize(("make", "independent"), PAIRS)
def test_greedy_codes_through_both_caches(make: Any, independent: Any, dtype: torch.dtype) -> None:
    prior = make()
    oracle, sampler = independent(prior), CachedSampler(prior)
    sampler.begin(labelled(torch.full((B, T), K), LABELS), 0)
    tokens = LABELS
    for slot in range(T):
        expected, found = oracle.step(tokens, slot), sampler.logits()
        assert (found - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()
        tokens = expected.argmax(1)
        assert torch.equal(found.argmax(1), tokens)
        sampler.advance(tokens)


def test_greedy_codes_with_guidance_are_those_of_two_passes(dtype: torch.dtype) -> None:
    """The logits of "no class" + s x (those of the label - those of no class), s = 2, as LlamaGen mixes them."""
    prior = llamagen()
    given, nothing, sampler = llama(prior), llama(prior), make_sampler(prior, Sampling(guidance=2.0))
    sampler.begin(labelled(torch.full((B, T), K), LABELS), 0)
    tokens, empty = LABELS, torch.full_like(LABELS, N)
    for slot in range(T):
        plain, without = given.step(tokens, slot), nothing.step(empty, slot)
        expected, found = without + 2 * (plain - without), sampler.logits()
        assert (found - expected).abs().max() <= 5 * TOLERANCE[dtype] * expected.abs().max()
        assert (plain - expected).abs().max() > 0.1
        tokens = empty = expected.argmax(1)
        assert torch.equal(found.argmax(1), tokens)
        sampler.advance(tokens)
