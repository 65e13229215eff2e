"""The priors' linear layer: the numbers of `nn.Linear`, large products by a convolution."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ral_gym.priors.linear import LARGE, Linear
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.transformer import Transformer
from ral_gym.rewards.causal import CausalCritic

SHAPE, OUT = (40, 30, 64), 96  # 7 million multiply-adds


@pytest.fixture
def convolved(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """The shapes that are convolved."""
    seen: list[tuple[int, ...]] = []
    plain = F.conv2d

    def conv2d(x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        seen.append(tuple(x.shape))
        return plain(x, *arguments, **keywords)

    monkeypatch.setattr(F, "conv2d", conv2d)
    yield seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [SHAPE, (1200, 64), (4, 10, 30, 64)], ids=str)
def test_results_and_gradients_are_those_of_torch(convolved, shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = Linear(64, OUT, bias=bias), torch.randn(shape).requires_grad_()
    direction = torch.randn(*shape[:-1], OUT)
    found = []
    for function in (layer, lambda x: F.linear(x, layer.weight, layer.bias)):
        y = function(x)
        layer.zero_grad()
        x.grad = None
        y.backward(direction)
        found.append([y.detach(), x.grad, *(weight.grad.clone() for weight in layer.parameters())])
    assert convolved == [(1, 64, 1, 1200)]
    for mine, torchs in zip(*found, strict=True):
        assert mine.shape == torchs.shape and mine.stride() == torchs.stride()
        torch.testing.assert_close(mine, torchs, rtol=0, atol=2e-6 * float(torchs.abs().max()) + 2e-5)


def test_second_derivatives_are_those_of_torch() -> None:  # TRPO needs them
    torch.manual_seed(0)
    layer, x = Linear(64, OUT), torch.randn(SHAPE).requires_grad_()
    found = []
    for function in (layer, lambda x: F.linear(x, layer.weight, layer.bias)):
        slopes = torch.autograd.grad(function(x).sigmoid().sum(), [x, layer.weight], create_graph=True)
        found.append(torch.autograd.grad(sum(slope.square().sum() for slope in slopes), [x, layer.weight]))
    for mine, torchs in zip(*found, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=0, atol=1e-5 * float(torchs.abs().max()))


@pytest.mark.parametrize("case", ["small", "float64", "bfloat16 weights", "autocast", "without oneDNN"])
def test_others_are_torchs_own(convolved, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Linear(64, OUT), torch.randn(SHAPE)
    if case == "small":
        x = x[:2]
        assert x.numel() * OUT < LARGE
    elif case == "float64":
        layer, x = layer.double(), x.double()
    elif case == "bfloat16 weights":
        layer, x = layer.bfloat16(), x.bfloat16()
    elif case == "without oneDNN":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with torch.autocast("cpu", enabled=case == "autocast"):
        found, wanted = layer(x), F.linear(x, layer.weight, layer.bias)
    assert torch.equal(found, wanted) and found.dtype == wanted.dtype and not convolved


def networks() -> dict[str, nn.Module]:
    sizes: dict[str, Any] = {"hidden_units": 8, "residual_units": 8, "layers": 2, "conv_filter_size": 3}
    pixelcnn = PixelCNN(8, 4, 4, attention_layers=1, attention_heads=2, classes=2, **sizes)
    transformer = Transformer(8, 4, 4, hidden_units=8, layers=1, attention_heads=2, multiple_of=8)
    return {"pixelcnn": pixelcnn, "transformer": transformer, "causal": CausalCritic(PixelCNN(8, 4, 4, **sizes))}


@pytest.mark.parametrize("name", ["pixelcnn", "transformer", "causal"])
def test_all_linear_layers_are_of_this_kind(name: str) -> None:
    linear = [part for part in networks()[name].modules() if isinstance(part, nn.Linear)]
    assert linear and all(type(part) is Linear for part in linear)
