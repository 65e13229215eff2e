"""Distances between two generators whose likelihoods are both known; nats per code."""

from __future__ import annotations

import torch
from torch import Tensor

from ral_gym.metrics.codes import Logits


@torch.no_grad()
def sequence_kl(p: Logits, q: Logits, codes_of_p: Tensor, batch_size: int = 256) -> float:
    """KL(p || q) of whole grids: sum over t of E_{c ~ p} KL(p(. | c_<t) || q(. | c_<t)), divided by T.

    Exact over the K codes of a position, Monte Carlo over the prefixes only: a much smaller variance than the mean of
    log p - log q. For KL(q || p) give samples of q and swap the generators.

    Args:
        p: logits (B, T) -> (B, T, K) of the generator that drew the samples.
        q: the other one's.
        codes_of_p: (N, T) int64, samples of p at temperature 1.
        batch_size: rows per pass.

    Returns:
        Nats per code, 0 or more.
    """
    total = 0.0
    for codes in codes_of_p.long().split(batch_size):
        log_p, log_q = p(codes).log_softmax(-1), q(codes).log_softmax(-1)  # (B, T, K)
        total += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
    return total / codes_of_p.numel()
