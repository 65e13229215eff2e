"""Maximum likelihood on real codes beside a reward (`mle_coef`), shared by several processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from ral_gym.agents.policy import PriorPolicy
from ral_gym.priors.base import maximum_likelihood_loss
from ral_gym.priors.transfer import sent
from ral_gym.runs.joint_dropout import JointDropout


def real_codes_loss(policy: PriorPolicy, codes: np.ndarray, n: int, dropout: bool = False) -> Tensor:
    """The mean negative log-likelihood of random real images, in nats per code; of several processes each has a share.

    Args:
        policy: whose prior is trained.
        codes: (N, L) integer, real images as in the rollout buffer.
        n: how many of them, drawn by numpy's global generator.
        dropout: with the prior's dropout, as in stage 2; labels are kept.

    Returns:
        a scalar; its sum over all processes is the mean.
    """
    processes = policy.processes
    own, share = processes.rows(n), processes.share(n)
    rows = np.random.randint(len(codes), size=n)[own]
    batch = sent(codes[rows], policy.device).long()  # (B, L)
    with ExitStack() as stack:
        if dropout:
            stack.enter_context(with_dropout(policy.prior))
            if processes.size > 1:
                stack.enter_context(JointDropout(n, own))
        return (share.stop - share.start) / n * maximum_likelihood_loss(policy.prior, batch)


@contextmanager
def with_dropout(prior: Any) -> Iterator[None]:
    """The prior in training mode, but that it leaves out no labels; afterwards as it was."""
    parts: list[Any] = list(prior.modules())
    modes = [(part, part.training) for part in parts]
    shares = [(part, part.class_dropout) for part in parts if isinstance(getattr(part, "class_dropout", 0), float)]
    try:
        prior.train()
        for part, _ in shares:
            part.class_dropout = 0.0
        yield
    finally:
        for part, mode in modes:
            part.training = mode
        for part, share in shares:
            part.class_dropout = share
