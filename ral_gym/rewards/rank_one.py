"""Traces of matrix roots after a downdate of rank one: N of them from one eigendecomposition.

For M = U diag(l) U^T, z given by its coordinates along the eigenvectors, and s > 0 the determinant lemma gives

    det(M - k z z^T + s^2) / det(M + s^2) = 1 - k sum_d z_d^2 / (l_d + s^2),

and the integral over s > 0 of log((p + s^2) / (q + s^2)) is pi (p^(1/2) - q^(1/2)). Summed over the eigenvalues:

    tr (M - k z z^T)^(1/2) - tr M^(1/2) = 1/pi int_0^inf log(1 - k sum_d z_d^2 / (l_d + s^2)) ds.

With s = c e^v the integrand is analytic for |Im v| < pi/2 and falls off exponentially on both sides, so the trapezoid
rule with step t in v has an error of about e^(-pi^2 / t) (Trefethen and Weideman, 2014). N roots of D x D matrices
would cost O(N D^3); this costs O(D^3 + N D^2 + N D Q) for Q nodes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NODES = 144
REACH = 24.0
"""The quadrature nodes are evenly spaced in v in [-REACH, REACH]: relative error 1e-9 by the ends, less by the step."""
ROUNDING = 1e-12
"""Smaller ratios count as 0: they are rounding errors of sums of D numbers of order one."""
SMALLEST = 1e-250
"""Mean eigenvalues below this count as 0."""


def spectral(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (D,) of a positive semi-definite matrix (D, D), ascending, and its eigenvectors (D, D)."""
    spectrum, vectors = torch.linalg.eigh(matrix)
    return _without_rounding(spectrum), vectors


def root_trace(matrix: Tensor) -> Tensor:
    """Trace of the root of a positive semi-definite matrix (D, D)."""
    return _without_rounding(torch.linalg.eigvalsh(matrix)).sqrt().sum()


def _without_rounding(spectrum: Tensor) -> Tensor:
    """Eigenvalues within rounding of 0 become 0: the root of 1e-16 is 1e-8, and a small batch has hundreds of them."""
    return spectrum * (spectrum > spectrum[-1].clamp_min(0) * len(spectrum) * torch.finfo(spectrum.dtype).eps)


def root_trace_change(spectrum: Tensor, squares: Tensor, factor: float) -> Tensor:
    """How much less tr (M - k z z^T)^(1/2) is than tr M^(1/2), for many z; see the module's docstring.

    Args:
        spectrum: (D,) eigenvalues of M, none negative.
        squares: (N, D) squared coordinates of each z along the eigenvectors; ignored where the eigenvalue is 0.
        factor: k; every M - k z z^T has to be positive semi-definite.

    Returns:
        (N,), none positive.
    """
    v = torch.linspace(-REACH, REACH, NODES, dtype=spectrum.dtype, device=spectrum.device)  # (Q,)
    scale = spectrum.mean()
    scale = torch.where(scale > SMALLEST, scale, 1.0)  # images that are all alike: s^2 below would be 0, and 0 / 0
    s = scale.sqrt() * v.exp()
    squares = squares * (spectrum > 0)
    shares = factor * squares / torch.where(spectrum > 0, spectrum, 1.0)  # (N, D)
    # At s = 0 the ratio 1 - x is 0 where the downdate lowers the rank, as it always does with few images; near s = 0
    # 1 - x would be mere rounding error, and so would the sum of the parts of 1 where x is small.
    at_zero = 1 - shares.sum(1, keepdim=True)  # (N, 1)
    at_zero = at_zero * (at_zero > ROUNDING)
    weights = 1 / (spectrum[:, None] + s.square())  # (D, Q)
    x = factor * squares @ weights  # (N, Q)
    ratio = at_zero + shares @ (weights * s.square())  # (N, Q)
    logs = torch.where(x < 0.5, torch.log1p(-x.clamp_max(0.5)), ratio.clamp_min(torch.finfo(x.dtype).tiny).log())
    beyond = factor * squares.sum(1) / s[-1]  # the integrand falls off as k |z|^2 / s^2
    return (logs @ s * (2 * REACH / (NODES - 1)) - beyond) / math.pi
