"""Small networks to sample from, and the comparison of the cached sampler with full passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.sampler import CachedSampler, sample_naive

B, H, W, K = 5, 4, 5, 11
T = H * W


def small(height: int = H, width: int = W, **kwargs: Any) -> PixelCNN:
    """A network with weights of all sizes, biases included, so that no part can be left out unnoticed."""
    torch.manual_seed(0)
    arguments = {"hidden_units": 12, "residual_units": 8, "layers": 3, "conv_filter_size": 3, "output_stack_layers": 2}
    prior = PixelCNN(K, height, width, **{**arguments, **kwargs}).double()
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return prior.eval()


def some_codes(length: int = T, size: int = K, seed: int = 1) -> Tensor:
    """Sequences (B, length) int64."""
    torch.manual_seed(seed)
    return torch.randint(size, (B, length))


def some_uniforms(length: int = T) -> Tensor:
    """(B, length) float64 in 0..1."""
    torch.manual_seed(2)
    return torch.rand(B, length, dtype=torch.float64)


def assert_same_draws(prior: PixelCNN, **arguments: Any) -> None:
    cached, cached_log_probs = CachedSampler(prior).sample(**arguments)
    naive, naive_log_probs = sample_naive(prior, **arguments)
    assert torch.equal(cached, naive)
    torch.testing.assert_close(cached_log_probs, naive_log_probs, rtol=0, atol=1e-10)


class Episodes:
    """Drives a sampler through codes of its own, and compares it with full passes at every position."""

    def __init__(self, prior: PixelCNN, codes: Tensor, position: int | Tensor, condition: Tensor | None = None):
        self.prior, self.codes = prior, codes.clone()
        self.sampler = CachedSampler(prior)
        self.condition = condition
        self.sampler.begin(self.codes, position, condition)
        self.position = torch.zeros(len(codes), dtype=torch.int64, device=codes.device) + position

    def check(self) -> None:
        assert torch.equal(self.sampler.position, self.position)
        alive = self.position < self.codes.shape[1]
        rows, at = torch.arange(len(self.codes), device=alive.device)[alive], self.position[alive]
        features = self.prior.features(self.codes, self.condition)
        torch.testing.assert_close(self.sampler.features()[alive], features[rows, at])
        torch.testing.assert_close(self.sampler.logits()[alive], self.prior.logits(features)[rows, at])

    def advance(self) -> None:
        new = torch.randint(K, (len(self.codes),)).to(self.codes.device)
        self.sampler.advance(new)
        alive = self.position < self.codes.shape[1]
        self.codes[alive, self.position[alive]] = new[alive]
        self.position[alive] += 1

    def run(self) -> None:
        """To the end, checking at every position, and once more behind it."""
        for _ in range(self.codes.shape[1] - int(self.position.min()) + 1):
            self.check()
            self.advance()
        assert self.sampler.logits().isfinite().all()

    def run_with_rebuilt_rows(self) -> None:
        """A grid row of steps; then two images take the place of each other, at other positions; then to the end."""
        for _ in range(self.prior.width):
            self.check()
            self.advance()
        rows, positions = torch.tensor([3, 1]), torch.tensor([2, 0])
        self.codes[rows], self.position[rows] = self.codes[rows].flip(1), positions
        self.sampler.rebuild(rows, self.codes[rows], positions)
        self.run()
