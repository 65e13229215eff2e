"""The toy of `gradient.py`: a grid so small that expectations are sums, a warm policy, and reward tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ral_gym.agents import EpisodeRolloutBuffer
from ral_gym.agents.rewards.rollout_reward import RolloutReward
from ral_gym.grid import CodeGrid
from ral_gym.priors.pixelcnn import PixelCNN


class KeepGradient(torch.optim.Optimizer):
    """An optimizer that leaves the weights alone; their gradients stay where `train()` put them."""

    steps = 0

    def __init__(self, params: Any, lr: float = 0.0, **kwargs: Any) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Count, and change nothing."""
        self.steps += 1


@contextmanager
def double_precision() -> Iterator[None]:
    """Float64 for every tensor made inside, so that an estimate is exact to the float32 of advantages."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Toy:
    """All images of a small grid, the policy's network, and the reward tables. Made under `double_precision`.

    Args:
        codebook_size: K.
        height: H.
        width: W.
        seed: of weights and rewards.

    Attributes:
        images: (K^T, T) int64, every image.
        prior: the network, warm: its images are far from equally likely.
        rewards: name -> (K^T, T), the reward of each code of each image; the sums over codes are the same for all.
    """

    def __init__(self, codebook_size: int = 4, height: int = 2, width: int = 2, seed: int = 0) -> None:
        self.grid = CodeGrid(height, width, codebook_size)
        length = self.grid.n_codes
        axes = [torch.arange(codebook_size)] * length
        self.images = torch.cartesian_prod(*axes)
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            sizes: dict[str, Any] = {"hidden_units": 6, "residual_units": 6, "layers": 1, "output_stack_layers": 1}
            self.prior = PixelCNN(codebook_size, height, width, conv_filter_size=3, position_embedding=True, **sizes)
            for weights in self.prior.parameters():
                weights.data *= 2
            self.prior.output.to_logits.weight.data *= 8
        self.prior.eval()
        number = len(self.images)
        causal = torch.empty(number, length)
        for t in range(length):
            after = codebook_size ** (length - t - 1)  # images that share the codes up to t
            causal[:, t] = torch.randn(number // after, generator=generator).repeat_interleave(after)
        returns = 1 + causal.sum(1)
        single = torch.zeros(number, length)
        single[:, -1] = returns
        causal[:, -1] += 1
        noise = torch.randn(number, length, generator=generator)
        whole = returns[:, None] / length + noise - noise.mean(1, keepdim=True)
        self.rewards = {"single": single, "causal": causal, "whole": whole}

    def index(self, codes: np.ndarray) -> np.ndarray:
        """Which of `images` some grids (..., T) are: (...)."""
        return codes @ self.grid.codebook_size ** np.arange(self.grid.n_codes - 1, -1, -1)

    def action_rewards(self, codes: Tensor) -> Tensor:
        """(n, T) -> (n, T, K), the causal reward of every code in place of each."""
        n, length, size = *codes.shape, self.grid.codebook_size
        every = codes[:, None, None].repeat(1, length, size, 1)  # (n, T, K, T)
        for t in range(length):
            every[:, t, :, t] = torch.arange(size)
        index = torch.as_tensor(self.index(every.numpy()))  # (n, T, K)
        positions = torch.arange(length)[:, None].expand(n, length, size)
        return self.rewards["causal"][index, positions]

    def log_probs(self) -> Tensor:
        """(K^T, T) log-probability of every code of every image, with a graph."""
        return self.prior(self.images).log_softmax(-1).gather(-1, self.images[..., None]).squeeze(-1)

    def probabilities(self) -> Tensor:
        """(K^T,) of every image."""
        with torch.no_grad():
            return self.log_probs().sum(1).exp()

    def flat(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Gradients of the prior's weights as one vector (D,)."""
        parameters = self.prior.parameters()
        return torch.cat(
            [
                torch.zeros_like(p).flatten() if g is None else g.flatten()
                for p, g in zip(parameters, gradients, strict=True)
            ]
        )

    def exact(self) -> Tensor:
        """(D,) gradient of the loss, minus the expected (undiscounted) return divided by T, by enumeration."""
        value = (self.log_probs().sum(1).exp() * self.rewards["single"].sum(1)).sum()
        loss = -value / self.grid.n_codes
        return self.flat(torch.autograd.grad(loss, list(self.prior.parameters()), allow_unused=True))

    def scores(self) -> Tensor:
        """(K^T, T, D) gradient of every log-probability."""
        log_probs = self.log_probs()
        parameters = list(self.prior.parameters())
        one_each = torch.eye(log_probs.numel()).view(-1, *log_probs.shape)
        gradients = torch.autograd.grad(log_probs, parameters, one_each, is_grads_batched=True, allow_unused=True)
        columns = [
            torch.zeros(log_probs.numel(), p.numel()) if g is None else g.flatten(1)
            for p, g in zip(parameters, gradients, strict=True)
        ]
        return torch.cat(columns, 1).view(*log_probs.shape, -1)


class TableReward(RolloutReward):
    """The single rewards of a toy, as the callback whose returns roll-outs replace.

    Args:
        toy: what has the table.
    """

    def __init__(self, toy: Toy) -> None:
        super().__init__()
        self.toy = toy

    def check_alone(self) -> None:
        """An image has its reward alone."""

    def score(self, codes: Tensor) -> np.ndarray:
        """(m, T) -> (m,)."""
        returns = self.toy.rewards["single"].sum(1).numpy()
        found: np.ndarray = returns[self.toy.index(codes.numpy())]
        return found

    def write(self, buffer: EpisodeRolloutBuffer, codes: Tensor) -> np.ndarray:
        """Not used: `estimate` writes them."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""
