"""The codebook: features -> nearest code vectors, in pieces where there are many codes.

It is that of `vector-quantize-pytorch` (k-means start, exponential moving average, restart of dead codes), which
computes the distances of all positions to all codes at once: at K = 16,384, 128 images of 16 x 16 positions take 12 GB.
Above `PIECE` distances `Quantiser` does the same piece by piece, so that memory does not grow with positions times
codes; below, the library's own code runs. On CUDA that code waits for the device at every step, to ask whether the
codebook has been started and which codes are dead; `_Codebook` does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from vector_quantize_pytorch import VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import Codebook

from ral_gym.errors import ConfigError

PIECE = 2**25
"""Most distances computed at once, 4 bytes each; whole batches of all of the paper's tables stay below it."""
KMEANS_ROUNDS = 10


class _Codebook(Codebook):
    """The library's codebook without its waits for a CUDA device; on the CPU and over processes the library's, exactly.

    Attributes:
        started: the host has seen that `initted` is true.
    """

    started = False

    def init_embed_(self, data: Tensor, mask: Tensor | None = None) -> None:
        """Start the codes by k-means, unless that has been done."""
        if not self.started:
            super().init_embed_(data, mask)
            self.started = True

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self.started = False  # the state may be that of a codebook which has not been started
        super()._load_from_state_dict(*arguments, **options)

    def expire_codes_(self, batch_samples: Tensor, **options: Any) -> None:
        """Restart dead codes at features of the batch (1, ..., D); on CUDA drawn as the library draws them.

        Distinct features for distinct codes; where there are more dead codes than features, some random ones of them.
        """
        masked = any(option is not None for option in options.values())
        if not batch_samples.is_cuda or self.use_ddp or masked or self.num_codebooks > 1:
            super().expire_codes_(batch_samples, **options)
        elif self.training and self.threshold_ema_dead_code > 0:
            self._restart(batch_samples.flatten(0, -2))

    def _restart(self, features: Tensor) -> None:
        """Restart dead codes at some of the features (N, D), without asking which ones there are."""
        dead = self.cluster_size[0] < self.threshold_ema_dead_code  # (K,)
        order = torch.rand(dead.shape, device=dead.device).masked_fill(~dead, 2).argsort()  # dead ones first
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))  # (K,)
        chosen = torch.randperm(len(features), device=features.device)[rank.clamp(max=len(features) - 1)]
        vectors, restarted = features[chosen], dead & (rank < len(features))  # (K, D), (K,)
        size = float(self.reset_cluster_size)
        self.cluster_size[0].masked_fill_(restarted, size)
        for own, new in ((self.embed, vectors), (self.embed_avg, vectors * size)):
            own[0].copy_(torch.where(restarted[:, None], new.to(own), own[0]))


class Quantiser(VectorQuantize):
    """One Euclidean codebook, updated by exponential moving averages.

    Args:
        dim: D, dimension of a code vector.
        codebook_size: K.
        decay: of the moving average.
        commitment_weight: beta.
        threshold_ema_dead_code: codes used less often than this per batch are restarted.
    """

    def __init__(
        self, dim: int, codebook_size: int, decay: float, commitment_weight: float, threshold_ema_dead_code: int
    ) -> None:
        super().__init__(
            dim=dim,
            codebook_size=codebook_size,
            decay=decay,
            commitment_weight=commitment_weight,
            kmeans_init=True,
            threshold_ema_dead_code=threshold_ema_dead_code,
            rotation_trick=False,
        )
        self._codebook.__class__ = _Codebook  # the library lets nobody choose the class

    def forward(self, x: Tensor, accum_ema_update: bool = False, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Replace features by code vectors; in training mode update the codebook.

        Args:
            x: (B, n, D).
            accum_ema_update: only accumulate statistics for the update that a later call makes.
            options: see `VectorQuantize.forward`; with any of them, all distances are computed at once.

        Returns:
            code vectors (B, n, D) with straight-through gradients, codes (B, n) int64, commitment loss.
        """
        if options or x.shape[:-1].numel() * self.codebook_size <= PIECE:
            return super().forward(x, accum_ema_update=accum_ema_update, **options)
        with torch.no_grad():
            flat = x.detach().float().flatten(0, 1)  # (N, D)
            book = self._codebook
            if not (book.started or bool(book.initted)):
                self._start(flat)
            book.started = True
            codes = _nearest(flat, self.codebook)  # (N,)
            vectors = self.codebook[codes].view_as(x).to(x.dtype)  # (B, n, D)
            if self.training:
                self._move(flat, codes, accum_ema_update)
        loss = self.zero
        if self.training:
            loss = F.mse_loss(vectors, x) * self.commitment_weight
            if x.requires_grad:
                vectors = x + (vectors - x).detach()
        return vectors, codes.view(x.shape[:-1]), loss

    def _start(self, flat: Tensor) -> None:
        """Put the codes at the k-means centres of features (N, D), as `Codebook.init_embed_` does."""
        book, k = self._codebook, self.codebook_size
        means = book.sample_fn(flat[None], k)[0]  # (K, D)
        for _ in range(KMEANS_ROUNDS):
            sizes, sums = self._totals(flat, _nearest(flat, means), book.kmeans_all_reduce_fn)
            means = torch.where((sizes == 0)[:, None], means, sums / sizes.clamp_min(1)[:, None])
        book.embed_avg.copy_((means * sizes[:, None])[None])
        book.cluster_size.copy_(sizes[None])
        book.update_ema()
        book.initted.fill_(True)

    def _move(self, flat: Tensor, codes: Tensor, collect: bool) -> None:
        """One step of the moving averages, or a part of one; restart of dead codes."""
        book = self._codebook
        sizes, sums = self._totals(flat, codes, book.all_reduce_fn)
        for average, new in ((book.cluster_size, sizes[None]), (book.embed_avg, sums[None])):
            if average.grad is not None:  # accumulated by earlier parts
                new = new + average.grad
                average.grad = None
            if collect:
                average.grad = new
            else:
                average.lerp_(new, 1 - book.decay)
        if not collect:
            book.update_ema()
            book.expire_codes_(flat[None])

    def _totals(self, flat: Tensor, codes: Tensor, all_reduce: Any) -> tuple[Tensor, Tensor]:
        """How many features (N, D) each code has, (K,), and their sums, (K, D), over all processes."""
        k = self.codebook_size
        sizes = torch.bincount(codes, minlength=k).to(flat.dtype)
        sums = flat.new_zeros(k, flat.shape[1])
        for rows in _pieces(len(flat), k):  # a matrix product: adding rows by index has no fixed order on CUDA
            chosen = torch.zeros(len(codes[rows]), k, dtype=flat.dtype, device=flat.device)
            sums += chosen.scatter_(1, codes[rows, None], 1.0).T @ flat[rows]
        all_reduce(sizes)
        all_reduce(sums)
        return sizes, sums


def _pieces(rows: int, codes: int) -> Iterator[slice]:
    """Slices of rows with at most a quarter of `PIECE` distances each, since computing them makes copies."""
    step = max(1, PIECE // 4 // codes)
    return (slice(start, start + step) for start in range(0, rows, step))


def _nearest(flat: Tensor, vectors: Tensor) -> Tensor:
    """The nearest of (K, D) to each of (N, D): (N,) int64, in pieces."""
    if flat.shape[0] * vectors.shape[0] <= PIECE:
        return torch.cdist(flat, vectors).argmin(-1)
    return torch.cat([torch.cdist(flat[rows], vectors).argmin(-1) for rows in _pieces(len(flat), len(vectors))])


def quantise(quantiser: VectorQuantize, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A training step of one codebook: features (B, D, h, w) -> quantised features, codes, commitment loss.

    Returns:
        (B, D, h, w) with straight-through gradients, (B, h * w) int64, and a scalar.
    """
    vectors, codes, commitment = quantiser(features.flatten(2).transpose(1, 2))  # (B, h w, D), (B, h w)
    return vectors.transpose(1, 2).reshape(features.shape), codes, commitment.sum()


def nearest(features: Tensor, vectors: Tensor) -> Tensor:
    """The code of every position: features (B, D, h, w), code vectors (K, D) -> (B, h * w) int64."""
    flat = features.flatten(2).transpose(1, 2).float()  # (B, h w, D)
    if math.prod(flat.shape[:2]) * len(vectors) > PIECE:
        return _nearest(flat.flatten(0, 1), vectors.float()).view(flat.shape[:2])
    return torch.cdist(flat, vectors.float()).argmin(-1)  # (B, h w)


def check_codes(levels: Sequence[Tensor], codebook_size: int) -> None:
    """Refuse codes (B, T) outside 0..K-1, which on CUDA would end the process's use of the device.

    All levels are looked at in one transfer; codes on the meta device, as of the dry run, have no values to look at.

    Raises:
        ConfigError: the lowest and highest code, and what is allowed.
    """
    ends = [end for codes in levels if codes.numel() and not codes.is_meta for end in codes.aminmax()]
    found = torch.stack(ends).tolist() if ends else [0]
    if min(found) < 0 or max(found) >= codebook_size:
        raise ConfigError(f"codes in {min(found)}..{max(found)}: they must lie in 0..{codebook_size - 1}")


def vectors_at(codes: Tensor, vectors: Tensor, width: int) -> Tensor:
    """The inverse of `nearest`: codes (B, h * w) in rows of `width`, code vectors (K, D) -> (B, D, h, w)."""
    return vectors[codes].transpose(1, 2).unflatten(2, (-1, width))
