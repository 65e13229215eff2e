"""The prefix curve of a run: how far from the data are images whose first rows are real and whose rest is drawn?

It is `ral_gym.metrics.recovery.prefix_curve` without an oracle: the first r rows of codes are real, a generator draws
the others (Section 4.3's "continue"), and the finished images are measured. With all rows given this is the distance
between two sets of real images, with none that of the generator. In between, every distance grows with the share that
is drawn, exposure bias or not: compare generators at the same r, not the ends of one curve.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ral_gym.metrics import distance_estimates, extract
from ral_gym.priors.base import Prior
from ral_gym.priors.sampler import make_sampler
from ral_gym.stages.completion import continue_codes
from ral_gym.stages.generator_metrics import SMALLEST_WITH_INTERVALS, GeneratorMetrics
from ral_gym.stages.pictures import sequences_to_draw
from ral_gym.tokenizers.code_set import decode_codes

N_IMAGES = 500
BATCH = 250
STEPS = 4
"""Number of parts into which the rows are divided; with 8 rows, the curve has r = 0, 2, 4, 6, 8."""


def measure_given_rows(evaluation: GeneratorMetrics, priors: Mapping[str, Prior]) -> dict[str, Any]:
    """FD and KID of images of which r rows are given, for each generator and several r.

    The given rows are of training images (and augmented versions) that are not in the reference; if there are too few
    others, of held-out ones. All generators draw from the same uniforms at all r.

    Args:
        evaluation: of the run.
        priors: name -> generator.

    Returns:
        `given` (the values of r), `height`, `n`, and `curves`: name -> one {`fd`, `kid`, `intervals`} per r. Empty if
        there are fewer than 12 images.
    """
    grid, codes = evaluation.vqvae.grid, evaluation.other_codes(N_IMAGES)  # (N, T)
    if len(codes) < SMALLEST_WITH_INTERVALS:
        return {}
    labels = evaluation.other_labels(N_IMAGES)
    given = sorted({grid.height * step // STEPS for step in range(STEPS + 1)})
    uniforms = torch.rand(codes.shape, generator=torch.Generator().manual_seed(evaluation.seed))  # (N, T)
    curves = {
        name: [_measure(evaluation, _finished(prior, codes, rows, uniforms, labels)) for rows in given]
        for name, prior in priors.items()
    }
    return {"given": given, "height": grid.height, "n": len(codes), "curves": curves}


def _finished(prior: Prior, codes: Tensor, rows: int, uniforms: Tensor, labels: Tensor | None = None) -> Tensor:
    """Codes (N, T) of which the generator, told their classes (N,), has drawn all but the first `rows` rows."""
    grid, device = prior.grid, next(prior.parameters()).device
    if rows == grid.height:
        return codes
    sampler, parts = make_sampler(prior), []
    kept = replace(grid, classes=0).crop(codes, max(rows, 1))  # (N, codes_of(rows))
    for batch in torch.arange(len(codes)).split(BATCH):
        asked = None if labels is None or not grid.classes else labels[batch]
        if rows:
            parts.append(continue_codes(prior, kept[batch], uniforms[batch], labels=asked))
            continue
        empty = sequences_to_draw(prior, len(batch), asked)
        parts.append(sampler.sample(len(batch), codes=empty, uniforms=uniforms[batch].to(device))[0])
    return torch.cat(parts).cpu()


def _measure(evaluation: GeneratorMetrics, codes: Tensor) -> dict[str, Any]:
    features = extract(evaluation.extractor, decode_codes(evaluation.vqvae, codes))  # (N, F)
    estimates = distance_estimates(evaluation.distance.features, features, seed=evaluation.seed)
    return {name: estimate.value for name, estimate in estimates.items()} | {
        "intervals": {name: [estimate.low, estimate.high] for name, estimate in estimates.items()}
    }
