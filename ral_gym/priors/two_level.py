"""The prior of a two-level model (VQ-VAE-2): a network over the top codes, and one over the bottom codes given them.

Follows "Generating Diverse High-Fidelity Images with VQ-VAE-2" (Razavi et al., 2019), p(top) p(bottom | top), with the
sizes of the supplement's Tables 8 to 10. Everything after it sees one sequence per image, top codes and then bottom
codes, so `TwoLevelPrior` is a `Prior` like each of its networks, and `TwoLevelSampler` a `Sampler`. One difference: the
codes that an episode draws need not be the end of the sequence (rows are given in both grids), so K marks them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ral_gym.errors import ConfigError
from ral_gym.grid import CodeGrid
from ral_gym.priors.base import Prior, build_prior, config_of, load_prior
from ral_gym.priors.drawing import host_positions
from ral_gym.priors.guidance import PLAIN, Sampling
from ral_gym.priors.sampler import CachedSampler


class TwoLevelPrior(nn.Module):
    """p(top codes) p(bottom codes | top codes).

    Args:
        top: the prior of the H x W top codes, such as a PixelCNN, or what `build_prior` makes it from.
        bottom: that of the 2H x 2W bottom codes, with condition=(H, W, K), or what `build_prior` makes it from.

    Attributes:
        frozen: `top` or `bottom`: that network runs without gradients, so that only the other one learns; None: both.

    Raises:
        ConfigError: the two do not fit together.
    """

    levels = 2

    def __init__(self, top: Prior | dict[str, Any], bottom: Prior | dict[str, Any]):
        super().__init__()
        self.top: Any = build_prior(top) if isinstance(top, dict) else top
        self.bottom: Any = build_prior(bottom) if isinstance(bottom, dict) else bottom
        self.codebook_size, self.height, self.width = self.top.codebook_size, self.top.height, self.top.width
        self.hidden_units = max(self.top.hidden_units, self.bottom.hidden_units)
        self.frozen: str | None = None
        self._check_levels()

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as the two networks' own; `TwoLevelPrior(**config)` builds the same networks."""
        return {"top": config_of(self.top), "bottom": config_of(self.bottom)}

    @property
    def grid(self) -> CodeGrid:
        """The shape of the codes."""
        return CodeGrid(self.height, self.width, self.codebook_size, levels=2)

    def features(self, codes: Tensor) -> Tensor:
        """The two networks' features, those of the narrower one padded with zeros.

        Args:
            codes: (B, T') int64, sequences of the first r top rows, T' = codes_of(r); entries of K and more stand for
                codes not drawn. Among the top codes the bottom network reads them as absent.

        Returns:
            (B, T', C), C the larger of the networks' channels.

        Raises:
            ConfigError: T' is not that of 1..H rows.
        """
        top, bottom = self.grid.split(codes)  # (B, r W), (B, 4 r W)
        with self._gradients("top"):
            of_top = self._pad(self.top.features(top))
        with self._gradients("bottom"):
            of_bottom = self._pad(self.bottom.features(bottom, top))
        return torch.cat([of_top, of_bottom], dim=1)

    def logits(self, features: Tensor, position: Tensor | None = None) -> Tensor:
        """Features to logits, each by the network of its level.

        Args:
            features: (..., C) of `features`.
            position: (...) int64, where in the whole sequence (0..T-1) each one is from, also if the codes were fewer.

        Returns:
            (..., K).

        Raises:
            ConfigError: no position is given.
        """
        if position is None:
            raise ConfigError("TwoLevelPrior.logits needs the position of each feature: its level depends on it")
        flat, in_top = features.reshape(-1, features.shape[-1]), (position < self.height * self.width).flatten()
        top, bottom = in_top.nonzero()[:, 0], (~in_top).nonzero()[:, 0]
        with self._gradients("top"):
            of_top = self.top.logits(flat[top, : self.top.hidden_units])
        with self._gradients("bottom"):
            of_bottom = self.bottom.logits(flat[bottom, : self.bottom.hidden_units])
        logits = torch.cat([of_top, of_bottom])  # (N, K)
        return logits[torch.cat([top, bottom]).argsort()].view(*features.shape[:-1], -1)

    def forward(self, codes: Tensor) -> Tensor:
        """Logits (B, T', K) of every code given those before it; see `features` for codes (B, T')."""
        top, bottom = self.grid.split(codes)
        with self._gradients("top"):
            of_top = self.top(top)
        with self._gradients("bottom"):
            of_bottom = self.bottom(bottom, top)
        return torch.cat([of_top, of_bottom], dim=1)

    def split(self, sequence: Tensor) -> tuple[Tensor, None]:
        """Sequences (B, T') hold nothing but the codes of both levels: returns them and None."""
        return sequence, None

    def make_sampler(self, sampling: Sampling = PLAIN) -> TwoLevelSampler:
        """The sampler of both levels; it uses one cache per level."""
        return TwoLevelSampler(self, sampling)

    def _gradients(self, level: str) -> torch.set_grad_enabled:
        return torch.set_grad_enabled(torch.is_grad_enabled() and level != self.frozen)

    def _pad(self, features: Tensor) -> Tensor:
        return F.pad(features, (0, self.hidden_units - features.shape[-1]))

    def _check_levels(self) -> None:
        top, bottom = self.top, self.bottom
        if getattr(top, "condition", None) is not None:
            raise ConfigError(f"TwoLevelPrior: the top prior has condition={top.condition}; it takes none")
        wanted = (2 * top.height, 2 * top.width, top.codebook_size, (top.height, top.width, top.codebook_size))
        condition = getattr(bottom, "condition", None)
        condition = None if condition is None else tuple(condition)
        found = (bottom.height, bottom.width, bottom.codebook_size, condition)
        if found != wanted:
            raise ConfigError(
                "TwoLevelPrior: the bottom prior's (height, width, codebook_size, condition) are "
                f"{found}, where the top prior needs {wanted}"
            )


def join_priors(priors: Sequence[Prior]) -> Any:
    """The generator of whole images: the only prior, or top and bottom ones as one."""
    return priors[0] if len(priors) == 1 else TwoLevelPrior(*priors)


def split_prior(prior: Any) -> list[Any]:
    """The inverse of `join_priors`."""
    return [prior] if prior.levels == 1 else [prior.top, prior.bottom]


SUFFIXES = ("", "_bottom")
"""The suffix of the file name of each level's prior."""


def load_levels(
    folder: Path,
    name: str,
    levels: int,
    device: torch.device | str = "cpu",
    load: Callable[[Path, Any], Any] = load_prior,
) -> Any:
    """A generator of whole images from its files, ``NAME.safetensors`` and with two levels ``NAME_bottom.safetensors``.

    Args:
        folder: the run folder.
        name: such as `prior`.
        levels: the number of files: 1 also for two levels in one file, as stage 3 writes them.
        device: where it goes.
        load: reads one file: `load_prior`, or a function that caches its results.

    Returns:
        the prior, in evaluation mode, without gradients.

    Raises:
        ConfigError: see `load_prior`.
        RunError: see `load_prior`.
    """
    return join_priors([load(folder / f"{name}{suffix}.safetensors", device) for suffix in SUFFIXES[:levels]]).eval()


class TwoLevelSampler:
    """Draws the codes of both levels, each level by a `CachedSampler` of its own.

    In sequences given to `begin` and `rebuild` the token K marks what is to be drawn; anything else is given or, if K +
    1, not part of the image. Images of a batch may be at any position, also in different levels; a code then costs a
    step of both networks. The condition is computed when an image enters the bottom level.

    Args:
        prior: the networks to draw from; the sampler keeps a reference to them.
    """

    def __init__(self, prior: TwoLevelPrior, sampling: Sampling = PLAIN):
        self.prior = prior
        self.top, self.bottom = CachedSampler(prior.top, sampling), CachedSampler(prior.bottom, sampling)
        self._position: np.ndarray | None = None  # (B,) in the sequences given, their length when finished
        self._codes = torch.empty(0)  # (B, T')
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
    ) -> tuple[Tensor, Tensor]:
        """Draw whole images, or continue given ones. Ends any drawing that `begin` started.

        Args:
            batch_size: B; only needed without `codes`.
            codes: (B, T') int64, sequences of r top rows, whose entries in the rows before `prefix_rows` are given.
            prefix_rows: top rows that are given, and the bottom rows under them; one for all or (B,) int64, 0..r.
            stop_rows: top rows that the result has, and twice as many bottom rows; None: r.
            temperature: divides the logits.
            generator: source of the uniforms, one `torch.rand(B)` in float32 per position that any image draws.
            uniforms: (B, T') in [0, 1], used instead.

        Returns:
            codes (B, codes_of(stop_rows)) int64, and as many log-probabilities of those drawn, at `temperature`; 0
            where given.

        Raises:
            ConfigError: an argument is out of range, or neither batch_size nor codes is given.
        """
        grid, width = self.prior.grid, self.prior.width
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
                start=prefix_rows * per_row,
                stop=stop_rows * per_row,
                uniforms=own[level],
                condition=drawn[0] if level else None,
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
            codes: (B, T') int64, sequences of r top rows; K marks what is to be drawn.
            position: next position to draw in these sequences, one for all or (B,) int64, from 0 to T' (finished);
                None: the first K. Later positions without K are skipped.

        Raises:
            ConfigError: T' is not that of 1..H rows, or a position is out of range.
        """
        batch, length = codes.shape
        top, bottom = self.prior.grid.split(codes)
        starts = None if position is None else host_positions(position, batch, length)
        self._n_top = top.shape[1]
        self._codes = torch.empty_like(codes)
        self._next = np.empty((batch, length + 1), np.int64)
        self._position = np.empty(batch, np.int64)
        self.top.begin_finished(batch, self._n_top)
        self.bottom.begin_finished(batch, bottom.shape[1])
        self._start(np.arange(batch), codes, starts)

    @torch.no_grad()
    def rebuild(self, rows: Tensor, codes: Tensor, position: int | Tensor | None = None) -> None:
        """Restart some rows of the batch; arguments as in `begin`, for the rows (n,) int64, without repeats.

        Raises:
            ConfigError: T' differs from `begin`'s, or a position is out of range.
        """
        self._begun()
        if codes.shape[1] != self._codes.shape[1]:
            raise ConfigError(f"rebuild: sequences of {codes.shape[1]} codes; `begin` got {self._codes.shape[1]}")
        starts = None if position is None else host_positions(position, len(rows), codes.shape[1])
        self._start(rows.cpu().numpy(), codes, starts)

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
        now, at = positions[active], torch.as_tensor(active, device=codes.device)
        self._codes[at, torch.as_tensor(now, device=codes.device)] = codes[at]
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
        return torch.as_tensor(self._begun().copy(), device=self._device())

    def _device(self) -> torch.device:
        return self.top.weights.device

    def _begun(self) -> np.ndarray:
        if self._position is None:
            raise RuntimeError(
                "the sampler holds no episode: call begin() first, and again after sample() or refresh()"
            )
        return self._position

    def _start(self, rows: np.ndarray, codes: Tensor, starts: np.ndarray | None) -> None:
        """Let batch rows (n,) start from sequences (n, T'), at positions (n,) or (None) at their first K."""
        length = codes.shape[1]
        to_draw = (codes == self.prior.codebook_size).cpu().numpy()  # (n, T')
        following = np.full((len(rows), length + 1), length)
        following[:, :-1] = np.where(to_draw, np.arange(length), length)
        following = np.minimum.accumulate(following[:, ::-1], axis=1)[:, ::-1]
        self._next[rows] = following
        self._begun()[rows] = following[:, 0] if starts is None else starts
        self._codes[torch.as_tensor(rows, device=codes.device)] = codes
        self.top.finish(rows)
        self.bottom.finish(rows)
        self._enter(rows)

    def _enter(self, rows: np.ndarray) -> None:
        """Prepare the samplers for batch rows (n,) whose position has jumped."""
        positions, length, n_top = self._begun(), self._codes.shape[1], self._n_top
        in_top = rows[positions[rows] < n_top]
        if len(in_top):
            at = torch.as_tensor(in_top, device=self._codes.device)
            self.top.rebuild(at, self._codes[at, :n_top], torch.as_tensor(positions[in_top]))
        in_bottom = rows[(positions[rows] >= n_top) & (positions[rows] < length)]
        if len(in_bottom):
            at = torch.as_tensor(in_bottom, device=self._codes.device)
            codes, own = self._codes[at], torch.as_tensor(positions[in_bottom] - n_top)
            self.bottom.rebuild(at, codes[:, n_top:], own, condition=codes[:, :n_top])

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
        return torch.where(torch.as_tensor(in_top, device=top.device)[:, None], top, bottom)
