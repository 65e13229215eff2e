"""Rewards from a whole set of images: how much farther from the real ones would the set be without this image?

A critic scores images one by one and cannot see that they are all alike. The leave-one-out reward of image i, r_i =
FD(set without i) - FD(set), can: positive means that the set needs the image. It follows "Policy-based Tuning of
Autoregressive Image Models with Instance- and Distribution-Level Rewards" (Baran et al., 2026, arXiv 2603.23086), whose
code takes a *diagonal* Frechet distance, which ignores correlations between features. Here it is the full distance,
computed exactly, by one eigendecomposition in place of N matrix square roots. FD = |m_r - m|^2 + tr S_r + tr S - 2 tr
(A S A)^(1/2), A = S_r^(1/2), for the reference's and the images' mean and covariance (Dowson and Landau, 1982; Heusel
et al., 2017).

Moments are averaged over batches, raw ones, with decay b: m' = b m + (1 - b) mu and S' = b M + (1 - b)(S_B + mu mu^T) -
m' m'^T, for a batch x_1..x_N of mean mu and covariance S_B = sum e_i e_i^T / N, e_i = x_i - mu. Without x_i, the but
with the batch's weight unchanged, the batch has the mean mu - e_i / (N-1), and its raw second moment loses (x_i x_i^T -
S_B - mu mu^T) / (N-1). With a = (1-b) / (N-1), h = m' - mu, and the square completed, that is

    m'_i = m' - a e_i,    S'_i = B - k u_i u_i^T,    where
    B = S' + a S_B + a/(1+a) h h^T,    k = a (1+a),    u_i = e_i - h/(1+a):

which is, for every i, a rank-one downdate of the same matrix; `ral_gym.rewards.rank_one` gives the traces of the matrix
square roots for all i at once.

To first order in 1/N, r_i = -a phi(x_i), with phi(x) = 2 (m' - m_r)^T (x - m') + (x - m')^T (I - T) (x - m') - its mean
over the batch, T = A (A S' A)^(-1/2) A the optimal map to the reference: FD's influence function. A change of the
generator G changes FD by the integral of its influence, so grad FD(G) = E_(x~G)[grad log G(x) phi(x)]: REINFORCE with
the reward r_i / a is gradient descent on FD. Hence all rewards here are divided by a = (1-b) / (N-1), which also makes
them independent of the batch size. Dividing by the standard deviation of anything smaller than the batch breaks the
identity.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ral_gym.errors import ConfigError
from ral_gym.rewards.moments import MINIMUM_BATCH, Moments, checked_features
from ral_gym.rewards.rank_one import root_trace, root_trace_change, spectral
from ral_gym.runs.checked_state import integer_of, tensor_like

Form = Literal["exact", "first_order", "diagonal"]
FORMS = ("exact", "first_order", "diagonal")
KERNEL_CHUNK = 4096


class DistributionReward(Protocol):
    """Features of a batch -> the reward of each image; keeps its averages over batches.

    Attributes:
        distance: of the last batch from the reference, as averaged.
    """

    distance: float
    minimum_batch: int
    """Batches of fewer images get no reward."""

    def __call__(self, features: Tensor) -> Tensor:
        """Features (N, F) -> rewards (N,) float64."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""


class LeaveOneOut(NamedTuple):
    """The averaged moments, and what they become without each image; D x D matrices, or their diagonals (D,).

    Attributes:
        share: a = (1-b) / (N-1).
        mean: m' (D,).
        covariance: S'.
        offset: h (D,).
        deviations: e (N, D).
        base: B.
        factor: k.
        directions: u (N, D).
    """

    share: float
    mean: Tensor
    covariance: Tensor
    offset: Tensor
    deviations: Tensor
    base: Tensor
    factor: float
    directions: Tensor


class FrechetReward:
    """Leave-one-out Frechet distance; the equations are in the module's docstring.

    The exact form is defined for every N, also N <= D. The first-order form is its limit for many images: it needs a
    covariance of full rank, so N well above D, or an average over batches. The diagonal form compares variances only
    (Baran et al.: |m_r - m|^2 + |s_r - s|^2 with standard deviations s).

    Args:
        reference: features (M, F) of real images, M >= 3, or their moments.
        form: `exact`, `first_order` or `diagonal`.
        ema: b, 0 <= b < 1. The first batches weigh more, so that the weights always sum to 1 (Adam's bias correction).
        components: use only this many directions, those of largest variance in the reference: cheaper, and better
            conditioned when there are few images. None: all (`diagonal`: the features as they are).
        start: features (M', F) that the average starts with, such as the pretrained generator's; None: it starts with
            the first batch.

    Raises:
        ConfigError: unknown `form`, `ema` or `components` out of range, features of another shape, or variances where
            covariances are needed.
        DivergedError: a feature is NaN or infinite.
    """

    sees = "features"
    takes_moments = True
    """The reference may be moments."""
    minimum_batch = MINIMUM_BATCH
    distance = float("nan")

    def __init__(
        self,
        reference: Tensor | Moments,
        form: Form = "exact",
        ema: float = 0.0,
        components: int | None = None,
        start: Tensor | None = None,
    ) -> None:
        given = reference if isinstance(reference, Moments) else checked_features(reference)  # (M, F)
        width = len(given.mean) if isinstance(given, Moments) else given.shape[1]
        if form not in FORMS:
            raise ConfigError(f"form {form!r} is unknown: choose one of {', '.join(FORMS)}")
        if not 0 <= ema < 1:
            raise ConfigError(f"ema={ema} is out of range: choose 0 (this batch only) or more, below 1")
        if components is not None and not 1 <= components <= width:
            raise ConfigError(f"components={components} of {width} features: choose 1..that, or None")
        self.form, self.ema = form, ema
        diagonal = form == "diagonal" and components is None
        self.centre, covariance = _moments_of(given, diagonal)  # (F,), and (F,) or (F, F)
        # FD does not change when both sets are turned: in the reference's own axes A is diagonal.
        if diagonal:
            self.axes = None
            self.root = covariance.clamp_min(0).sqrt()  # (D,)
        else:
            spectrum, axes = torch.linalg.eigh(covariance)
            # Contiguous, as a restored one is: products of other memory layouts round differently.
            self.axes = axes[:, -(components or len(spectrum)) :].contiguous()  # (F, D)
            self.root = spectrum[-self.axes.shape[1] :].clamp_min(0).sqrt()  # (D,) the diagonal of A
        self._moments: tuple[Tensor, Tensor] | None = None
        self._batches: int | None = 0  # None: the average did not start with a batch
        if start is not None:
            points = self._project(start)
            self._moments, self._batches = (points.mean(0), self._second(points)), None

    def __call__(self, features: Tensor) -> Tensor:
        """Rewards of a batch, which then enters the average.

        Args:
            features: (N, F), N >= 3, any float type.

        Returns:
            (N,) float64: (FD without the image - FD) (N-1) / (1-b), whose mean (with b = 0) is the jackknife's estimate
            of FD's bias; or its first-order form, whose mean is 0.
        """
        points = self._project(features)  # (N, D)
        left_out, moments = self._leave_one_out(points)
        forms = {"exact": self._exact, "first_order": self._first_order, "diagonal": self._diagonal}
        rewards, distance = forms[self.form](left_out)
        self.distance = float(distance)
        self._moments, self._batches = moments, None if self._batches is None else self._batches + 1
        return rewards

    def state_dict(self) -> dict[str, Any]:
        """The averaged moments and their axes, which may differ in sign when computed again on another machine."""
        first, second = self._moments or (None, None)
        return {"first": first, "second": second, "batches": self._batches, "axes": self.axes, "root": self.root}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them, bit for bit.

        Raises:
            ValueError: they are those of other features, or of another form.
        """
        batches, first, size = state["batches"], state["first"], len(self.root)
        root = tensor_like(state["root"], "root", self.root)
        axes = None if self.axes is None else tensor_like(state["axes"], "axes", self.axes)
        moments = None
        if first is not None:
            second = root.new_empty((size,) if self.form == "diagonal" else (size, size))
            moments = tensor_like(first, "first", root), tensor_like(state["second"], "second", second)
        self._batches = None if batches is None else integer_of(batches, "batches")
        self.root, self.axes, self._moments = root, axes, moments

    def _project(self, features: Tensor) -> Tensor:
        """Checked features (N, F) -> (N, D) float64, relative to the reference's mean."""
        centred = checked_features(features, len(self.centre)).to(self.centre) - self.centre
        return centred if self.axes is None else centred @ self.axes

    def _second(self, points: Tensor) -> Tensor:
        """Mean of x x^T: (D, D), or its diagonal (D,)."""
        return points.square().mean(0) if self.form == "diagonal" else points.T @ points / len(points)

    def _decay(self) -> float:
        """b, corrected so that the weights of the batches so far sum to 1; 0 for the first."""
        t = self._batches
        return self.ema if t is None else self.ema * (1 - self.ema**t) / (1 - self.ema ** (t + 1))

    def _leave_one_out(self, points: Tensor) -> tuple[LeaveOneOut, tuple[Tensor, Tensor]]:
        """The downdates of a batch (N, D), and the updated averages of the raw moments."""
        decay, n = self._decay(), len(points)
        now, second = points.mean(0), self._second(points)
        mean, deviations = now, points - now
        if self._moments is not None:
            mean = decay * self._moments[0] + (1 - decay) * mean
            second = decay * self._moments[1] + (1 - decay) * second
        offset = mean - now
        covariance = second - self._outer(mean)
        share = (1 - decay) / (n - 1)
        base = covariance + share * self._second(deviations) + share / (1 + share) * self._outer(offset)
        directions = deviations - offset / (1 + share)
        factor = share * (1 + share)
        return LeaveOneOut(share, mean, covariance, offset, deviations, base, factor, directions), (mean, second)

    def _outer(self, vector: Tensor) -> Tensor:
        return vector.square() if self.form == "diagonal" else vector[:, None] * vector

    def _mean_term(self, left_out: LeaveOneOut) -> Tensor:
        """(N,) change of |m' - m_r|^2, divided by a."""
        deviations = left_out.deviations
        return left_out.share * deviations.square().sum(1) - 2 * deviations @ left_out.mean

    def _exact(self, left_out: LeaveOneOut) -> tuple[Tensor, Tensor]:
        scaled = self.root[:, None] * left_out.base * self.root  # (D, D) A B A
        spectrum, vectors = spectral(scaled)
        squares = (left_out.directions * self.root @ vectors).square()  # (N, D) z^2
        loss = root_trace_change(spectrum, squares, left_out.factor)  # (N,)
        now = root_trace(self.root[:, None] * left_out.covariance * self.root)
        traces = torch.trace(left_out.base - left_out.covariance) - 2 * (spectrum.sqrt().sum() - now)
        change = traces - left_out.factor * left_out.directions.square().sum(1) - 2 * loss  # (N,)
        distance = left_out.mean.square().sum() + self.root.square().sum() + torch.trace(left_out.covariance) - 2 * now
        return self._mean_term(left_out) + change / left_out.share, distance

    def _first_order(self, left_out: LeaveOneOut) -> tuple[Tensor, Tensor]:
        spectrum, vectors = spectral(self.root[:, None] * left_out.covariance * self.root)
        points = left_out.deviations - left_out.offset  # (N, D) x - m'
        quarter = torch.where(spectrum > 0, spectrum.pow(-0.25), 0.0)  # (D,) (A S' A)^(-1/4)
        mapped = (points * self.root @ vectors * quarter).square().sum(1)  # (N,) (x - m')^T T (x - m')
        influence = 2 * points @ left_out.mean + points.square().sum(1) - mapped
        distance = left_out.mean.square().sum() + self.root.square().sum() + torch.trace(left_out.covariance)
        return influence.mean() - influence, distance - 2 * spectrum.sqrt().sum()

    def _diagonal(self, left_out: LeaveOneOut) -> tuple[Tensor, Tensor]:
        now = (left_out.covariance.clamp_min(0).sqrt() - self.root).square().sum()
        variances = left_out.base - left_out.factor * left_out.directions.square()  # (N, D)
        without = (variances.clamp_min(0).sqrt() - self.root).square().sum(1)  # (N,)
        return self._mean_term(left_out) + (without - now) / left_out.share, left_out.mean.square().sum() + now


class ExactFrechet(FrechetReward):
    """The term `loo_fd`; arguments as `FrechetReward`."""

    def __init__(self, reference: Tensor | Moments, ema: float = 0.0, components: int | None = None) -> None:
        super().__init__(reference, "exact", ema, components)


class FirstOrderFrechet(FrechetReward):
    """The term `loo_fd_first_order`; arguments as `FrechetReward`."""

    def __init__(self, reference: Tensor | Moments, ema: float = 0.0, components: int | None = None) -> None:
        super().__init__(reference, "first_order", ema, components)


class DiagonalFrechet(FrechetReward):
    """The term `loo_fd_diagonal`; arguments as `FrechetReward`."""

    def __init__(self, reference: Tensor | Moments, ema: float = 0.0, components: int | None = None) -> None:
        super().__init__(reference, "diagonal", ema, components)


class KernelReward:
    """Leave-one-out kernel distance (KID, Binkowski et al., 2018), whose estimate by U-statistics has no bias.

    With the kernel k(x, y) = (x.y / D + 1)^3 of KID, b_i the mean of k(x_i, y) over the reference and c_i that over the
    batch's other images, KID = mean c - 2 mean b + const, and without image i it changes by exactly

        r_i = 2 (mean c - c_i) / (N-2) - 2 (mean b - b_i) / (N-1).

    The rewards are r_i (N-1) and sum to 0; those of REINFORCE without bias are r_i N. Nothing is averaged over batches.

    Args:
        reference: features (M, F) of real images, M >= 3.

    Raises:
        ConfigError: features of another shape.
        DivergedError: a feature is NaN or infinite.
    """

    sees = "features"
    minimum_batch = MINIMUM_BATCH
    distance = float("nan")

    def __init__(self, reference: Tensor) -> None:
        self.reference = checked_features(reference)  # (M, F)
        m = len(self.reference)
        total = sum(float(block.sum()) for block in self._kernels(self.reference))
        self._among = (total - float(self._self_kernel(self.reference).sum())) / (m * (m - 1))

    def __call__(self, features: Tensor) -> Tensor:
        """Features (N, F), N >= 3 -> (N,) float64: (KID without the image - KID) (N-1)."""
        points = checked_features(features, self.reference.shape[1]).to(self.reference)  # (N, F)
        n = len(points)
        real = sum((block.sum(1) for block in self._kernels(points)), points.new_zeros(n)) / len(self.reference)
        others = (self._kernel(points, points).sum(1) - self._self_kernel(points)) / (n - 1)  # (N,)
        self.distance = float(others.mean() - 2 * real.mean()) + self._among
        return 2 * (others.mean() - others) * (n - 1) / (n - 2) - 2 * (real.mean() - real)

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""

    def _kernels(self, points: Tensor) -> Iterator[Tensor]:
        """Blocks (N, M') of the kernel between points and the reference."""
        return (self._kernel(points, block) for block in self.reference.split(KERNEL_CHUNK))

    @staticmethod
    def _kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1).pow(3)

    @staticmethod
    def _self_kernel(a: Tensor) -> Tensor:
        """(N,) k(x, x)."""
        return (a.square().mean(1) + 1).pow(3)


DISTRIBUTION_TERMS: dict[str, type[FrechetReward] | type[KernelReward]] = {
    "loo_fd": ExactFrechet,
    "loo_fd_first_order": FirstOrderFrechet,
    "loo_fd_diagonal": DiagonalFrechet,
    "kid": KernelReward,
}
"""The names under which `ral_gym.registry.REWARDS` has them."""


def _moments_of(reference: Tensor | Moments, diagonal: bool) -> tuple[Tensor, Tensor]:
    """Mean (F,) and covariance (F, F), or its diagonal (F,), of features (M, F) or of a reference's moments."""
    if isinstance(reference, Moments):
        mean, covariance = reference.mean, reference.covariance
        if covariance.dim() == 1 and not diagonal:
            raise ConfigError(
                "ral.reward_reference has variances only: the reward loo_fd_diagonal uses these, others need the "
                "covariance (F, F)"
            )
        return mean, covariance.diagonal() if diagonal and covariance.dim() == 2 else covariance
    mean = reference.mean(0)
    centred = reference - mean
    return mean, centred.square().mean(0) if diagonal else centred.T @ centred / len(centred)
