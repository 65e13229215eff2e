"""Divergences between two distributions over the K codes of a position, in nats, exact; log-probabilities in.

The building blocks of `oracle` and `exposure`. Log-probabilities of minus infinity (forbidden codes) are fine: 0 log 0
is 0, and KL is infinite where q rules out what p does not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ral_gym.metrics.codes import Logits


def conditional_log_probs(logits: Logits, codes: Tensor) -> Tensor:
    """Log-probabilities (B, T, K) float64 of every code at every position, given the codes (B, T) before it.

    In float64, so that divergences of nearly equal generators keep their digits and never fall below 0.
    """
    return logits(codes).double().log_softmax(-1)


def cross_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """-sum_k p log q: (.., K), (.., K) -> (..); with q = p the entropy."""
    p = log_p.exp()
    return torch.where(p > 0, -p * log_q, 0).sum(-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum_k p (log p - log q): (.., K), (.., K) -> (..)."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)


def jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Jensen-Shannon divergence, KL from the mixture averaged over p and q, in [0, ln 2]: (.., K), (.., K) -> (..)."""
    mixture = torch.logaddexp(log_p, log_q) - math.log(2)  # (.., K)
    return (kl(log_p, mixture) + kl(log_q, mixture)) / 2


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Half the sum of |p - q|, in [0, 1]: (.., K), (.., K) -> (..)."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
