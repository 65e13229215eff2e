"""The critic that is trained alongside the policy, and its scores as rewards (Sections 4.2 and 4.4).

One object, whatever brings its rewards to the agent. Real images are *decoded real codes* of equally many rows as the
fakes: the critic must not tell them apart by the compression, nor by the decoder's edge of a short image.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ral_gym.config import CriticConfig
from ral_gym.errors import DivergedError
from ral_gym.grid import CodeGrid
from ral_gym.metrics import auc
from ral_gym.rewards.critic import PatchCritic, critic_loss
from ral_gym.rewards.score_map import Normalization, RewardKind, ScoreNormalizer, step_rewards
from ral_gym.tokenizers.vqvae import VQVAE

REAL_CACHE_BYTES = 512 * 2**20
"""Decoded real images are kept when they fit in this."""


class FakePool:
    """Code grids the critic may learn from.

    Attributes:
        codes: (n, T) int64, K + 1 where nothing was drawn.
        grid: their shape.
        image_rows: (n,) int64, rows of each image.
    """

    def __init__(self, codes: Tensor, grid: CodeGrid) -> None:
        self.codes, self.grid = codes, grid
        self.image_rows = (codes != grid.never_drawn).sum(1) // grid.codes_of(1)

    def batch(self, size: int, generator: torch.Generator) -> Tensor:
        """Some grids of one common height: (size, codes of the rows) int64, a height by its share of the pool."""
        pick = int(torch.randint(len(self.codes), (1,), generator=generator))
        height = int(self.image_rows[pick])
        same = (self.image_rows == height).nonzero().squeeze(1)
        rows = same[torch.randint(len(same), (size,), generator=generator)]
        return self.grid.crop(self.codes[rows], height)


class CoTrainedCritic:
    """Trains a `PatchCritic` against the policy's images and turns its scores into rewards.

    Args:
        vqvae: the frozen VQ-VAE.
        critic: the critic to train.
        real_codes: (N, T) integer codes of real images.
        held_out_codes: (M, T) codes of real images it never trains on: the monitor's.
        config: its training settings.
        reward: `single` or `intermediate`.
        normalization: see `ScoreNormalizer`.
        seed: seeds its batches.
        device: where it runs.
    """

    def __init__(
        self,
        vqvae: VQVAE,
        critic: PatchCritic,
        real_codes: np.ndarray,
        held_out_codes: np.ndarray,
        config: CriticConfig,
        *,
        reward: RewardKind = "single",
        normalization: Normalization = "max_abs",
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.vqvae, self.critic = vqvae, critic.to(self.device)
        self.real_codes = torch.as_tensor(np.ascontiguousarray(real_codes)).long()
        self.held_out_codes = torch.as_tensor(np.ascontiguousarray(held_out_codes)).long()
        self.config, self.reward, self.normalization = config, reward, normalization
        self.optimizer = torch.optim.Adam(
            self.critic.parameters(), lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2)
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.normalizer = ScoreNormalizer(normalization)
        self.n_updates = 0
        self._real_images: dict[int, Tensor] = {}

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes of r rows (B, codes_of(r)) int64 -> images (B, C, h, S) in [-1, 1]."""
        return self.vqvae.decode(codes.to(self.device))

    def _real(self, rows: Tensor, height: int) -> Tensor:
        """Decoded real images of `height` code rows; kept for the next time where they all fit in memory."""
        codes, grid = self.real_codes, self.vqvae.grid
        bytes_needed = len(codes) * 4 * self.vqvae.channels * self.vqvae.image_size**2
        if bytes_needed > REAL_CACHE_BYTES // self.vqvae.height:
            return self.decode(grid.crop(codes[rows], height))
        if height not in self._real_images:
            batches = grid.crop(codes, height).split(256)
            self._real_images[height] = torch.cat([self.decode(batch) for batch in batches])
        return self._real_images[height][rows.to(self.device)]

    def train_step(self, fake_codes: Tensor) -> dict[str, float]:
        """One step of Eq. 5 on fakes of r rows (B, codes_of(r)) and as many real images of r rows.

        Raises:
            DivergedError: the loss became NaN or infinite; the weights are those before this step.
        """
        rows = torch.randint(len(self.real_codes), (len(fake_codes),), generator=self.generator)
        real = self._real(rows, self.vqvae.grid.rows_of(fake_codes.shape[1]))
        loss, figures = critic_loss(
            self.critic,
            real,
            self.decode(fake_codes),
            self.config.gradient_penalty,
            self.generator,
            self.config.loss,
        )
        if not np.isfinite(figures["loss"]):
            raise DivergedError(
                f"stage ral: the critic's loss is {figures['loss']} after {self.n_updates} critic steps; the last good "
                "checkpoint is kept; lower critic.learning_rate"
            )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.n_updates += 1
        return figures

    def train(self, pool: FakePool, n_steps: int) -> dict[str, float]:
        """Several steps on a pool of fakes; the mean figures: `loss`, `gap`, `gradient_penalty`."""
        sums: dict[str, float] = {}
        for _ in range(n_steps):
            for name, figure in self.train_step(pool.batch(self.config.batch_size, self.generator)).items():
                sums[name] = sums.get(name, 0.0) + figure / n_steps
        return sums

    @torch.no_grad()
    def score_map(self, codes: Tensor, batch_size: int = 128) -> Tensor:
        """Raw score maps (B, h, w) of codes of r rows (B, codes_of(r))."""
        return torch.cat([self.critic(self.decode(batch)) for batch in codes.split(batch_size)])

    @torch.no_grad()
    def rewards(self, pool: FakePool) -> tuple[np.ndarray, dict[str, float]]:
        """Normalised rewards of every code of finished grids, and how the critic tells them from held-out real images.

        Args:
            pool: n grids.

        Returns:
            (n, T) float32, 0 where nothing was drawn; figures `heldout_gap` (mean real - mean fake score),
            `heldout_auc` (chance that a real image scores above a fake one) and `score_mean`.

        Raises:
            DivergedError: a score is NaN or infinite.
        """
        grid, heights = self.vqvae.grid, pool.image_rows.unique().tolist()
        fakes = {r: self.score_map(grid.crop(pool.codes[pool.image_rows == r], r)) for r in heights}
        reals = {r: self.score_map(grid.crop(self.held_out_codes, r)) for r in heights}
        if not all(bool(scores.isfinite().all()) for scores in (*fakes.values(), *reals.values())):
            raise DivergedError(
                f"stage ral: the critic's scores are NaN or infinite after {self.n_updates} critic steps; the last "
                "good checkpoint is kept; lower critic.learning_rate"
            )
        self.normalizer = ScoreNormalizer(self.normalization).fit(
            torch.cat([scores.flatten() for scores in reals.values()]),
            torch.cat([scores.flatten() for scores in fakes.values()]),
        )
        rewards = torch.zeros(pool.codes.shape)  # (n, T)
        gap = area = mean = 0.0
        for height in heights:
            rows = (pool.image_rows == height).nonzero()  # (m, 1)
            share = len(rows) / len(pool.codes)
            normalised = self.normalizer(fakes[height])
            earned = step_rewards(normalised, height, grid.width, self.reward, grid.levels).float().cpu()
            rewards[rows, torch.from_numpy(grid.mask(0, height)).nonzero().squeeze(1)] = earned
            real, fake = reals[height].flatten(1).mean(1), fakes[height].flatten(1).mean(1)
            gap += share * (real.mean() - fake.mean()).item()
            area += share * auc(real.cpu(), fake.cpu())
            mean += share * normalised.mean().item()
        return rewards.numpy(), {"heldout_gap": gap, "heldout_auc": area, "score_mean": mean}

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "critic": self.critic.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "n_updates": self.n_updates,
            "normalizer": [self.normalizer.shift, self.normalizer.scale],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.critic.load_state_dict(state["critic"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.n_updates = state["n_updates"]
        self.normalizer.shift, self.normalizer.scale = state["normalizer"]
