"""The critic that is trained alongside the policy, and its scores as rewards (Sections 4.2 and 4.4).

The same object serves all ways of giving its rewards to the agent. Real images are *decoded real codes* with as many
rows as the fakes: the critic must not tell them apart by compression artefacts, nor by the lower edge of a short image.
A critic that sees codes gets both as codes, and nothing is decoded.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ral_gym.config import CriticConfig
from ral_gym.data.subsets import subset
from ral_gym.errors import ConfigError, DivergedError
from ral_gym.grid import CodeGrid
from ral_gym.metrics import auc
from ral_gym.rewards.augmentation import augmented, draw_augmentations
from ral_gym.rewards.critic import critic_loss, fetched
from ral_gym.rewards.score_map import Normalization, RewardKind, ScoreNormalizer
from ral_gym.rewards.scorer import CriticScorer
from ral_gym.rewards.view import FinishedImages, View, takes_labels
from ral_gym.runs.checked_state import integer_of, number_of
from ral_gym.runs.joint_dropout import JointDropout, draws_in_rows
from ral_gym.runs.sharing import Processes
from ral_gym.stages.common import make_adam, restore_optimizer
from ral_gym.tokenizers.base import Tokenizer

if TYPE_CHECKING:
    from ral_gym.metrics import Extractor

CACHE_BYTES = 512 * 2**20
"""The critic's inputs for real images are cached if those of all heights fit into this."""
CACHE_IMAGES = 2048
"""Larger sets of real images are decoded batch by batch, since most images would be used at most once."""


class _ByClass:
    """Draws real images of given classes.

    Args:
        sequences: (N, T + 1) integer, with labels.
        grid: their grid.
    """

    def __init__(self, sequences: Tensor, grid: CodeGrid) -> None:
        labels = sequences[:, -1].long() - grid.first_label  # (N,)
        self._rows = labels.argsort(stable=True)  # (N,) class by class
        self._counts = labels.bincount(minlength=grid.classes)  # (classes,)
        self._first = self._counts.cumsum(0) - self._counts  # (classes,)

    def draw(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """A random real image (B,) of each of the classes (B,).

        Raises:
            ConfigError: a class has none.
        """
        labels = labels.cpu()
        counts = self._counts[labels]  # (B,)
        if not counts.all():
            raise ConfigError(
                f"the critic compares drawn images of class {int(labels[counts == 0][0])} with real ones, but there is "
                "none in the training images: choose --ral.label-draw data, or give images of every class"
            )
        share = torch.rand(len(labels), generator=generator, dtype=torch.float64)  # below 1
        return self._rows[self._first[labels] + (share * counts).long()]


class CoTrainedCritic:
    """Trains a critic against the policy's images and turns its scores into rewards.

    Args:
        vqvae: the frozen tokenizer.
        critic: the critic to train; `ral_gym.rewards.scorer` documents its interface.
        real_codes: (N, T) integer codes of real images; with classes sequences (N, T + 1) with their labels.
        held_out_codes: (M, T) or (M, T + 1), real images that it never trains on. `config.held_out` of them, chosen
            once, are scored at every update.
        config: its training settings.
        reward: `single` or `intermediate`.
        normalization: see `ScoreNormalizer`.
        seed: seeds its batches, and the choice of held-out images.
        device: device of the critic.
        extractor: for a critic that sees features; None: the tokenizer's encoder.
        classes: how many classes the images have, 0: none. Then the critic is given labels if its `forward` or `loss`
            takes them, and each real image of a training batch has the class of a fake one.
        processes: those that share its passes; None: this one alone. All of them draw the same batches and take the
            same steps. A critic is trained by every process on the whole batch if its layers need it (batch
            normalisation), or if it has a `loss` of its own and does not say `loss_is_mean`.

    Raises:
        ConfigError: no held-out images, codes that are no such sequences, or a critic that sees features that are not
            available.
    """

    def __init__(
        self,
        vqvae: Tokenizer,
        critic: nn.Module,
        real_codes: np.ndarray,
        held_out_codes: np.ndarray,
        config: CriticConfig,
        *,
        reward: RewardKind = "single",
        normalization: Normalization = "max_abs",
        seed: int = 0,
        device: torch.device | str = "cpu",
        extractor: Extractor | None = None,
        classes: int = 0,
        processes: Processes | None = None,
    ) -> None:
        if not len(held_out_codes):
            raise ConfigError("the critic has no held-out images to be measured on: give a larger data set")
        self.device, self.processes = torch.device(device), processes or Processes()
        self.vqvae, self.grid = vqvae, replace(vqvae.grid, classes=classes)
        self.scorer = CriticScorer(vqvae, critic.to(self.device), reward, batch_size=128, extractor=extractor)
        self.real_codes = torch.as_tensor(np.ascontiguousarray(real_codes))
        self.all_held_out_codes = torch.as_tensor(np.ascontiguousarray(held_out_codes))
        if classes and self.real_codes.shape[1] != self.grid.length:
            raise ConfigError(
                f"the critic got rows of {self.real_codes.shape[1]} real codes: with {classes} classes give "
                f"{self.grid.length}, the codes and their label (CodeSet.sequences)"
            )
        self._by_class = _ByClass(self.real_codes, self.grid) if classes else None
        self.config, self.reward, self.normalization = config, reward, normalization
        make_optimizer = getattr(self.critic, "make_optimizer", None) or self._adam
        self.optimizer: torch.optim.Optimizer = make_optimizer(config)
        self.seed, self.generator = seed, torch.Generator().manual_seed(seed)
        self.normalizer = ScoreNormalizer(normalization)
        self.n_updates = 0
        self._real_images: dict[int, Tensor] = {}
        self._choose_held_out(config.held_out)

    def _adam(self, config: CriticConfig) -> torch.optim.Optimizer:
        betas = (config.adam_beta1, config.adam_beta2)
        return make_adam(self.critic, config.learning_rate, betas)

    def _choose_held_out(self, number: int) -> None:
        """Choose this many held-out images, or all if there are fewer or `number` is 0; always the same ones."""
        rows = subset(len(self.all_held_out_codes), number or None, self.seed)
        self.held_out, self.held_out_codes = number, self.all_held_out_codes[torch.from_numpy(rows)]
        self._held_out: dict[int, View] = {}

    @property
    def critic(self) -> nn.Module:
        """The network that is trained."""
        return self.scorer.critic

    @critic.setter
    def critic(self, critic: nn.Module) -> None:
        self.scorer.critic = critic

    @property
    def normalizer(self) -> ScoreNormalizer:
        """The normalisation of the scores, as last fitted."""
        return self.scorer.normalizer

    @normalizer.setter
    def normalizer(self, normalizer: ScoreNormalizer) -> None:
        self.scorer.normalizer = normalizer

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes of r rows (B, codes_of(r)) integer -> images (B, C, h, S) in [-1, 1]."""
        return self.vqvae.decode(codes.to(self.device).long())

    def finished(self, codes: Tensor) -> FinishedImages:
        """Finished grids (n, L) int64, K + 1 where nothing was drawn, as shared by all rewards."""
        return FinishedImages(codes, self.grid, self.decode, processes=self.processes)

    @torch.no_grad()
    def see(self, codes: Tensor) -> Tensor:
        """The critic's input (B, ...), on its device, for codes of r rows (B, codes_of(r)); labels are left out."""
        return self.scorer.seen(View(self.grid.without_labels(codes), self.decode, batch_size=256))

    def real(self, rows: Tensor, height: int) -> Tensor:
        """The critic's input for real images of `height` code rows; cached if there are few."""
        codes, grid = self.real_codes, self.grid
        bytes_needed = len(codes) * 4 * self.vqvae.channels * self.vqvae.image_size**2
        few = len(codes) <= CACHE_IMAGES and bytes_needed <= CACHE_BYTES // grid.height
        if self.scorer.sees == "codes" or not few:
            return self.see(grid.crop(codes[rows], height))
        if height not in self._real_images:
            self._real_images[height] = self.see(grid.crop(codes, height))
        return self._real_images[height][rows.to(self.device)]

    def train_step(self, fake_codes: Tensor) -> dict[str, float]:
        """One step of Eq. 5 on fakes of r rows (B, codes_of(r)) and as many real images of r rows.

        With classes the fakes have labels at their ends, and the real images are drawn by them.

        Raises:
            ConfigError: a fake has a class of which there is no real image.
            DivergedError: the loss became NaN or infinite; the weights are those before this step.
        """
        labels = self.grid.labels_of(fake_codes)  # (B,)
        if labels is None or self._by_class is None:
            rows = torch.randint(len(self.real_codes), (len(fake_codes),), generator=self.generator)
        else:
            rows = self._by_class.draw(labels, self.generator)
        self.critic.train()
        self.optimizer.zero_grad()
        metrics = self._backward(rows, fake_codes, labels)
        if not np.isfinite(metrics["loss"]):
            raise DivergedError(
                f"stage ral: the critic's loss is {metrics['loss']} after {self.n_updates} critic steps; the last good "
                "checkpoint is kept; lower critic.learning_rate"
            )
        self.optimizer.step()
        self.n_updates += 1
        return metrics

    def _backward(self, rows: Tensor, fake_codes: Tensor, labels: Tensor | None) -> dict[str, float]:
        """Gradients of the loss on real images `rows` (B,) and fakes (B, codes_of(r)), and the metrics."""
        processes, n, weights = self.processes, len(rows), None
        kinds = self.config.augment
        changes = draw_augmentations(2 * n, self.generator).view(2, n, -1) if kinds else None  # (2, B, DRAWS)
        own, share = slice(0, n), 1 / processes.size  # every process computes all of it: the mean is bit for bit equal
        joint: AbstractContextManager[Any] = nullcontext()
        if processes.size > 1 and self._splits:
            own, mine = processes.rows(n), processes.share(n)
            share, joint = (mine.stop - mine.start) / n, JointDropout(n, own)
            if self.config.loss == "wgan_gp" and getattr(self.critic, "loss", None) is None:
                weights = torch.rand(n, generator=self.generator)[own]
        real = self.real(rows[own], self.grid.rows_of(self.grid.without_labels(fake_codes).shape[1]))
        fake = self.see(fake_codes[own])
        if changes is not None:
            real, fake = (augmented(one, kinds, each[own]) for one, each in zip((real, fake), changes, strict=True))
        with joint:
            loss, metrics = self._loss(real, fake, None if labels is None else labels[own], weights)
        (share * loss).backward()
        processes.sum_gradients(self.critic.parameters())
        return processes.sum_numbers({name: share * value for name, value in metrics.items()})

    @property
    def _splits(self) -> bool:
        """Whether the loss is a mean over images, so that processes may compute it on some of them each."""
        if getattr(self.critic, "loss", None) is not None and not getattr(self.critic, "loss_is_mean", False):
            return False
        return draws_in_rows(self.critic) and not any(
            isinstance(part, nn.modules.batchnorm._BatchNorm) for part in self.critic.modules()
        )

    def _loss(
        self, real: Tensor, fake: Tensor, labels: Tensor | None, weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, float]]:
        """The critic's own loss if it has one, else that of the settings; the metrics include `loss`."""
        own = getattr(self.critic, "loss", None)
        given = {"labels": labels.to(self.device)} if labels is not None and takes_labels(own or self.critic) else {}
        if own is not None:
            found = own(real, fake, self.generator, **given)
            loss, metrics = found if isinstance(found, tuple) else (found, {})
            return loss, fetched({**metrics, "loss": loss})
        settings = self.config
        r1 = settings.r1 * settings.r1_every if self.n_updates % settings.r1_every == 0 else 0.0
        return critic_loss(
            self.critic,
            real,
            fake,
            settings.gradient_penalty,
            self.generator,
            settings.loss,
            weights=weights,
            r1=r1,
            **given,
        )

    def train(self, pool: FinishedImages, n_steps: int) -> dict[str, float]:
        """Several steps on a pool of fakes; the mean metrics: `loss`, `gap`, a penalty, or those of an own loss.

        A step without a number (`r1_penalty` where it is lazy) counts as 0.
        """
        sums: dict[str, float] = {}
        for _ in range(n_steps):
            for name, value in self.train_step(pool.batch(self.config.batch_size, self.generator)).items():
                sums[name] = sums.get(name, 0.0) + value / n_steps
        return sums

    @torch.no_grad()
    def score_map(self, images: Tensor | View) -> Tensor:
        """Raw scores of a view, or of codes of r rows (B, codes_of(r)), as the critic gives them."""
        view = images if isinstance(images, View) else View(images, self.decode, processes=self.processes)
        return view.joined(self.scorer.scores(view.own))

    def _real_view(self, height: int) -> View:
        """The chosen held-out images of `height` rows; if they fit in memory, cached with their features."""
        if height in self._held_out:
            return self._held_out[height]
        grid, codes = self.grid, self.grid.crop(self.held_out_codes, height).long()
        view = View(grid.without_labels(codes), self.decode, grid.labels_of(codes), processes=self.processes)
        rows = sum(self._held_out) + height
        if len(view) * 5 * self.vqvae.channels * self.vqvae.image_size**2 * rows / grid.height <= CACHE_BYTES:
            self._held_out[height] = view  # floats and, for features, bytes
        return view

    @torch.no_grad()
    def rewards(self, pool: FinishedImages) -> tuple[np.ndarray, dict[str, float]]:
        """Normalised rewards of every code of finished grids, and how well the critic tells them from held-out images.

        Args:
            pool: n grids.

        Returns:
            (n, L) float32, 0 where nothing was drawn; metrics `heldout_gap` (mean real - mean fake score),
            `heldout_auc` (chance that a real image scores above a fake one) and `score_mean`.

        Raises:
            DivergedError: a score is NaN or infinite.
        """
        fakes = {height: self.score_map(pool.view(height)) for height in pool.heights}
        reals = {height: self.score_map(self._real_view(height)) for height in pool.heights}
        if not all(bool(scores.isfinite().all()) for scores in (*fakes.values(), *reals.values())):
            raise DivergedError(
                f"stage ral: the critic's scores are NaN or infinite after {self.n_updates} critic steps; the last "
                "good checkpoint is kept; lower critic.learning_rate"
            )
        self.normalizer = ScoreNormalizer(self.normalization).fit(
            torch.cat([scores.flatten() for scores in reals.values()]),
            torch.cat([scores.flatten() for scores in fakes.values()]),
        )
        rewards = torch.zeros(pool.codes.shape)  # (n, L)
        gap = area = mean = 0.0
        own: dict[str, float] = {}
        for height in pool.heights:
            rows = pool.rows(height)  # (m,)
            share = len(rows) / len(pool)
            normalised = self.normalizer(fakes[height])
            rewards[rows[:, None], pool.positions(height)] = self.scorer.rewards(normalised, height).float().cpu()
            real, fake = (self.scorer.image_scores(scores[height]) for scores in (reals, fakes))  # (M,), (m,)
            gap += share * (real.mean() - fake.mean()).item()
            area += share * auc(real.cpu(), fake.cpu())
            mean += share * normalised.mean().item()
            for name, value in self._comparison(real, fake).items():
                own[name] = own.get(name, 0.0) + share * value
        return rewards.numpy(), {"heldout_gap": gap, "heldout_auc": area, "score_mean": mean, **own}

    @torch.no_grad()
    def action_rewards(self, codes: Tensor) -> Tensor:
        """What every code would have been paid in place of each, but for a constant: normalised scores.

        Args:
            codes: (n, L) int64 finished grids.

        Returns:
            (n, L, K); 0 behind the last row of an image, and at the label.
        """
        critic: Any = self.critic.eval()
        images, like = FinishedImages(codes, self.grid), next(critic.parameters())
        found = like.new_zeros(*codes.shape, self.grid.codebook_size)  # (n, L, K)
        for height in images.heights:
            view, rows = images.view(height), images.rows(height)
            labels = None if view.labels is None else view.labels.to(self.device)
            scores = critic.all_codes(view.codes.to(self.device).long(), labels)  # (m, T', K)
            at = (rows[:, None].to(self.device), images.positions(height).to(self.device))
            found[at] = scores / self.normalizer.scale
        return found

    def _comparison(self, real: Tensor, fake: Tensor) -> dict[str, float]:
        """Numbers of the critic's own about scores of held-out images (M,) and of drawn ones (m,)."""
        compare = getattr(self.critic, "comparison", None)
        found: dict[str, float] = {} if compare is None else compare(real, fake)
        return found

    def image_rewards(self, pool: FinishedImages) -> np.ndarray:
        """(n,) float32 normalised scores of whole images, with the current normalisation."""
        rewards = torch.zeros(len(pool))
        for height in pool.heights:
            scores = self.normalizer(self.score_map(pool.view(height)))
            rewards[pool.rows(height)] = self.scorer.image_scores(scores).float().cpu()
        return rewards.numpy()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "critic": self.critic.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "n_updates": self.n_updates,
            "normalizer": [self.normalizer.shift, self.normalizer.scale],
            "held_out": self.held_out,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint; one without a number of held-out images continues with all of them."""
        self.critic.load_state_dict(state["critic"])
        restore_optimizer(self.optimizer, state["optimizer"])
        self.generator.set_state(state["generator"])
        self.n_updates = integer_of(state["n_updates"], "n_updates")
        self.normalizer.shift, self.normalizer.scale = (number_of(one, "normalizer") for one in state["normalizer"])
        self._choose_held_out(integer_of(state.get("held_out", 0), "held_out"))
