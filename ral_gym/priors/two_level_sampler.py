"""Drawing both levels' codes from `ral_gym.priors.two_level.TwoLevelPrior`, one code at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ral_gym.errors import ConfigError
from ral_gym.priors.drawing import host_positions
from ral_gym.priors.guidance import PLAIN, Sampling
from ral_gym.priors.sampler import CachedSampler
from ral_gym.priors.transfer import indices_on, on_device


def above(top: Tensor, labels: Tensor | None) -> Tensor:
    """What a bottom prior is given: the top codes (B, r W), and behind them the labels (B, 1) if there are any."""
    return top if labels is None else torch.cat([top, labels], 1)


class TwoLevelSampler:
    """Draws the codes of both levels, each level by a `CachedSampler` of its own.

    In sequences given to `begin` and `rebuild` the token K marks what is to be drawn; anything else is given or, if K +
    1, not part of the image. Images of a batch may be at any position, also in different levels; a code then costs a
    step of both networks. The condition is computed when an image enters the bottom level.

    Args:
        prior: the networks to draw from; the sampler keeps a reference to them.
    """

    def __init__(self, prior: Any, sampling: Sampling = PLAIN):
        self.prior = prior
        self.top, self.bottom = CachedSampler(prior.top, sampling), CachedSampler(prior.bottom, sampling)
        self._position: np.ndarray | None = None  # (B,) in the sequences given, their length when finished
        self._codes = torch.empty(0)  # (B, T')
        self._labels: Tensor | None = None  # (B, 1)
        self._next = np.empty(0)  # (B, T' + 1), the first position from each one on that is to be drawn
        self._n_top = 0  # top codes in a sequence

    @property
    def use_cuda_graphs(self) -> bool:
        """See `CachedSampler`."""
        return self.top.use_cuda_graphs and self.bottom.use_cuda_graphs

    @use_cuda_graphs.setter
    def use_cuda_graphs(self, use: bool) -> None:
        self.top.use_cuda_graphs = self.bottom.use_cuda_graphs = use

    def refresh(self) -> None:
        """Pack the prior's weights again. What `begin` started becomes invalid: begin again."""
        self.top.refresh()
        self.bottom.refresh()
        self._position = None

    @torch.no_grad()
    def sample(
        self,
        batch_size: int | None = None,
        *,
        codes: Tensor | None = None,
        prefix_rows: int | Tensor = 0,
        stop_rows: int | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        uniforms: Tensor | None = None,
        starts: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw whole images, or continue given ones. Ends any drawing that `begin` started.

        Args:
            batch_size: B; only needed without `codes`.
            codes: (B, T') int64, sequences of r top rows, whose entries in the rows before `prefix_rows` are given;
                with classes their label is behind them.
            prefix_rows: top rows that are given, and the bottom rows under them; one for all or (B,) int64, 0..r.
            stop_rows: top rows that the result has, and twice as many bottom rows; None: r.
            temperature: divides the logits.
            generator: source of the uniforms, one `torch.rand(B)` in float32 per position that any image draws.
            uniforms: (B, T') in [0, 1], used instead.
            starts: first position to draw in each level, (B,) int64 each, in place of `prefix_rows`.

        Returns:
            codes (B, codes_of(stop_rows)) int64, and as many log-probabilities of those drawn, at `temperature`; 0
            where given.

        Raises:
            ConfigError: an argument is out of range, or neither batch_size nor codes is given.
        """
        grid, width = replace(self.prior.grid, classes=0), self.prior.width
        labels = None
        if codes is not None:
            codes, labels = self.prior.split(codes)
        elif self.prior.classes:
            raise ConfigError(f"sample: a prior of {self.prior.classes} classes; pass codes, sequences with a label")
        if codes is None:
            if batch_size is None or batch_size < 1:
                raise ConfigError(f"sample: batch_size={batch_size}; pass codes, or a batch size of at least 1")
            codes = torch.full((batch_size, grid.n_codes), grid.not_drawn, device=self._device())
        rows = grid.rows_of(codes.shape[1])
        stop_rows = rows if stop_rows is None else stop_rows
        prefixes = torch.as_tensor(prefix_rows)
        if not 1 <= stop_rows <= rows or int(prefixes.min()) < 0 or int(prefixes.max()) > rows:
            raise ConfigError(
                f"sample: prefix_rows={prefix_rows} and stop_rows={stop_rows} do not fit {rows} rows; "
                f"0 to {rows} can be given, and the result have 1 to {rows}"
            )
        self._position = None
        own: list[Any] = [None, None] if uniforms is None else grid.split(uniforms)
        drawn: list[Tensor] = []
        log_probs: list[Tensor] = []
        for level, (sampler, given) in enumerate(zip((self.top, self.bottom), grid.split(codes), strict=True)):
            per_row = width * 4**level  # codes of this level in a top row
            result = sampler.sample(
                batch_size,
                codes=given,
                start=prefix_rows * per_row if starts is None else starts[level],
                stop=stop_rows * per_row,
                uniforms=own[level],
                condition=above(drawn[0], labels) if level else labels,
                temperature=temperature,
                generator=generator,
            )
            drawn.append(result[0])
            log_probs.append(result[1])
        return torch.cat(drawn, dim=1), torch.cat(log_probs, dim=1)

    @torch.no_grad()
    def begin(self, codes: Tensor, position: int | Tensor | None = None) -> None:
        """Start drawing code by code.

        Args:
            codes: (B, T') int64, sequences of r top rows; K marks what is to be drawn. With classes a label follows.
            position: next position to draw in these sequences, one for all or (B,) int64, from 0 to T' (finished);
                None: the first K. Later positions without K are skipped.

        Raises:
            ConfigError: T' is not that of 1..H rows, or a position is out of range.
        """
        codes, labels = self.prior.split(codes)
        batch, length = codes.shape
        top, bottom = self.prior._levels(codes)
        starts = None if position is None else host_positions(position, batch, length)
        self._n_top = top.shape[1]
        self._codes, self._labels = torch.empty_like(codes), None if labels is None else torch.empty_like(labels)
        self._next = np.empty((batch, length + 1), np.int64)
        self._position = np.empty(batch, np.int64)
        self.top.begin_finished(batch, self._n_top)
        self.bottom.begin_finished(batch, bottom.shape[1])
        self._start(np.arange(batch), codes, labels, starts)

    @torch.no_grad()
    def rebuild(self, rows: Tensor, codes: Tensor, position: int | Tensor | None = None) -> None:
        """Restart some rows of the batch; arguments as in `begin`, for the rows (n,) int64, without repeats.

        Raises:
            ConfigError: T' differs from `begin`'s, or a position is out of range.
        """
        self._begun()
        codes, labels = self.prior.split(codes)
        if codes.shape[1] != self._codes.shape[1]:
            raise ConfigError(f"rebuild: sequences of {codes.shape[1]} codes; `begin` got {self._codes.shape[1]}")
        starts = None if position is None else host_positions(position, len(rows), codes.shape[1])
        self._start(rows.cpu().numpy(), codes, labels, starts)

    def features(self) -> Tensor:
        """The prior's features (B, C) at each batch row's position; finished rows: meaningless but finite."""
        return self.prior._pad(self._merge(CachedSampler.features))

    def logits(self) -> Tensor:
        """The logits (B, K) of the code at each batch row's position; finished rows: meaningless but finite."""
        return self._merge(CachedSampler.logits)

    @torch.no_grad()
    def advance(self, codes: Tensor) -> None:
        """Enter the codes (B,) int64, 0..K-1, that were drawn and go on to the next K; finished rows ignore theirs."""
        positions, length = self._begun(), self._codes.shape[1]
        active = np.flatnonzero(positions < length)
        if len(active) == 0:
            return
        now = positions[active]
        at, places = indices_on(codes.device, active, now)
        self._codes[at, places] = codes[at]
        after = self._next[active, now + 1]
        in_top = now < self._n_top
        leaving = (after != now + 1) | (in_top & (after >= self._n_top))  # rows that skip positions or change level
        self.top.finish(active[leaving & in_top])
        self.bottom.finish(active[leaving & ~in_top])
        if in_top.any():
            self.top.advance(codes)
        if not in_top.all():
            self.bottom.advance(codes)
        positions[active] = after
        self._enter(active[leaving])

    @property
    def position(self) -> Tensor:
        """(B,) int64, the next position of each batch row in its sequence; T' when it is finished."""
        return on_device(self._begun().copy(), self._device())

    def _device(self) -> torch.device:
        return self.top.weights.device

    def _begun(self) -> np.ndarray:
        if self._position is None:
            raise RuntimeError(
                "the sampler holds no episode: call begin() first, and again after sample() or refresh()"
            )
        return self._position

    def _start(self, rows: np.ndarray, codes: Tensor, labels: Tensor | None, starts: np.ndarray | None) -> None:
        """Let batch rows (n,) start from codes (n, T') and labels (n, 1), at positions (n,) or at their first K."""
        length = codes.shape[1]
        to_draw = (codes == self.prior.codebook_size).cpu().numpy()  # (n, T')
        following = np.full((len(rows), length + 1), length)
        following[:, :-1] = np.where(to_draw, np.arange(length), length)
        following = np.minimum.accumulate(following[:, ::-1], axis=1)[:, ::-1]
        self._next[rows] = following
        self._begun()[rows] = following[:, 0] if starts is None else starts
        at = on_device(rows, codes.device)
        self._codes[at] = codes
        if self._labels is not None and labels is not None:
            self._labels[at] = labels
        self.top.finish(rows)
        self.bottom.finish(rows)
        self._enter(rows)

    def _enter(self, rows: np.ndarray) -> None:
        """Prepare the samplers for batch rows (n,) whose position has jumped."""
        positions, length, n_top = self._begun(), self._codes.shape[1], self._n_top
        in_top = rows[positions[rows] < n_top]
        if len(in_top):
            at = on_device(in_top, self._codes.device)
            starts = torch.as_tensor(positions[in_top])
            self.top.rebuild(torch.from_numpy(in_top), self._codes[at, :n_top], starts, condition=self._labels_of(at))
        in_bottom = rows[(positions[rows] >= n_top) & (positions[rows] < length)]
        if len(in_bottom):
            at = on_device(in_bottom, self._codes.device)
            codes, own = self._codes[at], torch.as_tensor(positions[in_bottom] - n_top)
            condition = above(codes[:, :n_top], self._labels_of(at))
            self.bottom.rebuild(torch.from_numpy(in_bottom), codes[:, n_top:], own, condition=condition)

    def _labels_of(self, rows: Tensor) -> Tensor | None:
        """The labels (n, 1) of batch rows (n,)."""
        return None if self._labels is None else self._labels[rows]

    def _merge(self, read: Callable[[CachedSampler], Tensor]) -> Tensor:
        """Read (B, ...) values from the sampler of each row's level; a level that no row is in does not run."""
        positions = self._begun()
        in_top = positions < self._n_top
        if not (~in_top & (positions < self._codes.shape[1])).any() and in_top.any():
            return read(self.top)
        if not in_top.any():
            return read(self.bottom)
        top, bottom = read(self.top), read(self.bottom)
        channels = max(top.shape[1], bottom.shape[1])
        top, bottom = (F.pad(x, (0, channels - x.shape[1])) for x in (top, bottom))
        return torch.where(on_device(in_top, top.device)[:, None], top, bottom)
