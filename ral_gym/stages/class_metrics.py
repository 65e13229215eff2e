"""What only generators of classes are measured by: does a sample show the class that was asked for?

* Accuracy: how many of the samples a small classifier takes for their class. It learns from *reconstructions* of the
  training images, since samples come from the decoder too, and is no reward, so nothing is trained to please it. Its
  accuracy on held-out reconstructions stands in the row `reconstruction`. An accuracy can be had by samples that all
  look alike, so read it beside FD and recall.
* FD of each class against the reference images of the class, averaged over classes, where each has `SMALLEST_FD`
  samples and reference images or more; else KID in its place, which is unbiased at any number.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ral_gym.data.images import to_float
from ral_gym.metrics import Estimate, FeatureDistance, mean_estimate
from ral_gym.metrics.distances import MINIMUM_IMAGES
from ral_gym.tokenizers.base import Tokenizer, device_of
from ral_gym.tokenizers.code_set import decode_codes

SMALLEST_FD = 500
"""Samples of a class from which its FD is measured; a smaller set's covariance is too rough."""
JUDGE_IMAGES = 20_000
"""Most reconstructions that the classifier learns from."""
JUDGE_STEPS = 600
JUDGE_BATCH = 64
JUDGE_SIDE = 32
"""Side to which the classifier's images are reduced."""


class ClassJudge(nn.Module):
    """A small convolutional classifier: images (B, C, S, S) uint8 -> logits (B, N).

    Args:
        channels: C.
        classes: N.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        widths = (channels, 32, 64, 128)
        layers: list[nn.Module] = []
        for one, other in pairwise(widths):
            layers += [nn.Conv2d(one, other, 3, padding=1), nn.GroupNorm(8, other), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1] * 4, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, N) of uint8 images."""
        small = F.interpolate(to_float(images), (JUDGE_SIDE, JUDGE_SIDE), mode="area")  # (B, C, 32, 32)
        return self.head(F.adaptive_avg_pool2d(self.body(small), 2).flatten(1))


def train_judge(vqvae: Tokenizer, codes: np.ndarray, labels: np.ndarray, classes: int, seed: int) -> ClassJudge:
    """Train the classifier on decoded images, whatever the global random state, which does not change.

    Args:
        vqvae: decodes.
        codes: (M, T) of the training images; of more than `JUDGE_IMAGES` a random subset is used.
        labels: (M,) their classes.
        classes: N.
        seed: of weights, batches and flips.
    """
    device = device_of(vqvae)
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randperm(len(codes), generator=generator)[:JUDGE_IMAGES].numpy()
    images, known = decode_codes(vqvae, codes[picked]), torch.from_numpy(labels[picked])  # (M, C, S, S) uint8, (M,)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = ClassJudge(vqvae.channels, classes).to(device)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=JUDGE_STEPS)
    with torch.enable_grad():
        for rows, flips in _batches(len(images), generator):
            batch = torch.where(flips[:, None, None, None], images[rows].flip(3), images[rows]).to(device)
            loss = F.cross_entropy(judge(batch), known[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return judge.eval().requires_grad_(False)


def _batches(total: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Random rows and which of them are mirrored, for every step."""
    for _ in range(JUDGE_STEPS):
        yield (
            torch.randint(total, (JUDGE_BATCH,), generator=generator),
            torch.rand(JUDGE_BATCH, generator=generator) < 0.5,
        )


@torch.no_grad()
def accuracy(judge: ClassJudge, images: Tensor, labels: Tensor) -> Estimate:
    """Share of uint8 images (N, C, S, S) that the judge takes for their class (N,)."""
    device = next(judge.parameters()).device
    right = [
        judge(batch.to(device)).argmax(1).cpu() == known
        for batch, known in zip(images.split(JUDGE_BATCH * 4), labels.split(JUDGE_BATCH * 4), strict=True)
    ]
    return mean_estimate(torch.cat(right).double(), method="mean over images", bounds=(0.0, 1.0))


def class_distance(
    features: Tensor, labels: Tensor, reference: Tensor, known: Tensor, classes: int
) -> dict[str, float]:
    """Distance of each class's samples from the reference images of the class, averaged over classes.

    Args:
        features: (N, F) of the samples.
        labels: (N,) their classes.
        reference: (M, F).
        known: (M,) the reference images' classes.
        classes: how many there are.

    Returns:
        `class_fd` where each class has `SMALLEST_FD` images or more on both sides; else `class_kid`; empty if a class
        has too few images for that, too.
    """
    pairs = [(features[labels == number], reference[known == number]) for number in range(classes)]
    smallest = min(len(part) for pair in pairs for part in pair)
    if smallest < MINIMUM_IMAGES:
        return {}
    name = "fd" if smallest >= SMALLEST_FD else "kid"
    found = [FeatureDistance(theirs, extractor="class", seed=0).measure(ours)[name] for ours, theirs in pairs]  # type: ignore[literal-required]
    return {f"class_{name}": float(np.mean(found))}
