"""Drawing one code per image from logits."""

from __future__ import annotations

import pytest
import torch

from ral_gym.priors.sampler import draw


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
