"""Drawing one code per image from logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from ral_gym.priors.drawing import running_sum
from ral_gym.priors.sampler import draw
from tests.pretend_device import pretend_cuda


def test_draw_follows_the_distribution() -> None:
    logits = torch.tensor([[0.5, -1.0, 2.0, 0.0]], dtype=torch.float64)
    grid = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    codes, log_probs = draw(logits.expand(10_000, 4), grid, temperature=0.5)
    probs = (logits[0] / 0.5).softmax(0)
    torch.testing.assert_close(codes.bincount(minlength=4) / 10_000, probs.float(), rtol=0, atol=2e-4)
    torch.testing.assert_close(log_probs, probs.log()[codes])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_draw_never_returns_a_code_of_probability_zero(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randn(400, 300).to(dtype)
    logits[torch.rand(400, 300) < 0.5] = -torch.inf
    logits[:, 0], logits[:, -1] = -torch.inf, -torch.inf
    below_one = 1 - torch.finfo(torch.float32).eps / 2
    for uniform in (0.0, 1e-30, 0.5, below_one, 1.0):
        codes, log_probs = draw(logits, torch.full((400,), uniform))
        assert (logits.gather(1, codes[:, None]) > -torch.inf).all()
        assert log_probs.isfinite().all()


def test_draw_of_nan_is_a_code_with_nan_log_prob() -> None:
    codes, log_probs = draw(torch.full((2, 4), torch.nan), torch.rand(2))
    assert ((codes >= 0) & (codes < 4)).all() and log_probs.isnan().all()


class Stepping(TorchFunctionMode):
    """A `cumsum` that adds in another order at every place, so that it steps by an ulp where nothing is added."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") != "cumsum":
            return found
        ulp = torch.finfo(found.dtype).eps * torch.tensor([0.0, 1.0]).repeat(found.shape[1])[: found.shape[1]]
        return found * (1 + 8 * ulp)


def test_a_code_of_probability_zero_is_not_drawn_where_a_sum_steps() -> None:
    logits = torch.zeros(1, 40)
    logits[:, 1::2] = -torch.inf  # where the sum steps
    uniforms = torch.linspace(0, 1, 20_001)
    with Stepping():
        codes, log_probs = draw(logits.expand(len(uniforms), 40), uniforms)
    assert (codes % 2 == 0).all() and log_probs.isfinite().all() and len(codes.unique()) == 20


def test_draws_are_those_of_a_plain_running_sum() -> None:
    """Number for number, as before zeros were looked at."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(500, 64)
    logits[torch.rand(500, 64) < 0.3] = -torch.inf
    uniforms = torch.rand(500)
    probs = logits.softmax(1)
    cumulative = probs.cumsum(1)
    scaled = uniforms * (1 - torch.finfo(torch.float32).eps)
    expected = torch.searchsorted(cumulative, scaled[:, None] * cumulative[:, -1:], right=True)[:, 0]
    assert torch.equal(draw(logits, uniforms)[0], expected)


def test_deterministic_algorithms_need_no_cumsum_on_a_device() -> None:
    torch.manual_seed(0)
    probs = torch.randn(7, 37, dtype=torch.float64).softmax(1)
    with pretend_cuda() as device:
        torch.use_deterministic_algorithms(True)
        try:
            found = running_sum(probs.to("cuda"))
            assert not device.operators["aten::cumsum"]
            draw(probs.log().to("cuda"), torch.rand(7).to("cuda"), top_p=0.9)
            assert not device.operators["aten::cumsum"]
        finally:
            torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(found, probs.cumsum(1), rtol=0, atol=1e-14)
