"""One row of the results table: how far a generator's samples are from the data, each metric with its interval.

Distances are to the decoded training codes, which the prior is trained on, as in the paper ("FID on reconstructed real
images"). Samples, training images and held-out images have all been through the decoder, so that its blur, the largest
difference from real images, affects only `fd_real` and `kid_real`. All generators draw from the same uniforms.

The cost of a row does not grow with the data set: real images, codes and held-out images are seeded random subsets of
fixed size (`MEASUREMENT`). Up to version 0.1, real images were the first of a sorted list and the NLL was that of all
held-out images; evaluations begun by that rule are verified and finished by it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ral_gym.data.images import ImageSet
from ral_gym.data.subsets import subset
from ral_gym.errors import RunError
from ral_gym.metrics import (
    Estimate,
    FeatureDistance,
    ImageDistance,
    Memorisation,
    Neighbourhood,
    distance_estimates,
    entropy,
    extract,
    hamming_distance,
    image_entropy,
    image_nll,
    make_extractor,
    match_temperature,
)
from ral_gym.metrics.distances import kid_subset_size
from ral_gym.metrics.neighbourhood import SCORES
from ral_gym.metrics.own import measure_own, own_metrics
from ral_gym.priors.base import Prior
from ral_gym.priors.guidance import PLAIN, Sampling
from ral_gym.runs.run import Run
from ral_gym.stages.class_metrics import ClassJudge, accuracy, class_distance, train_judge
from ral_gym.stages.levels import wrong_labels
from ral_gym.stages.pictures import balanced_labels, sample_codes
from ral_gym.stages.rejection import Judge, Rejection, rejection_sample
from ral_gym.stages.row_parts import image_mean, interval_ends, labelled
from ral_gym.stages.sampling_noise import sampling_noise
from ral_gym.tokenizers.base import Tokenizer, encoder_features
from ral_gym.tokenizers.code_set import CodeSet, decode_codes, encode_images

REJECTION_SHARE = 0.25
LOGITS_PER_PASS = 2**24
"""Limits the images per teacher-forced pass to 64 MiB of logits: 2,048 images of 8 x 8 codes with K = 128."""
TEMPERATURE_BATCH = 500
"""Samples per step of the search for the temperature at which MLE has RAL's entropy."""
SMALLEST_WITH_INTERVALS = 12
"""Halves of fewer samples are too small for FD or the neighbourhood metrics."""
NEIGHBOURHOOD_REPETITIONS = 20
"""Halves for the intervals of precision, recall, density and coverage: half the usual number, 0.7 s of a row's 13."""
MEMORY = 2
"""Training images searched for a sample's nearest one, in multiples of `n_samples`."""
HELD_OUT = 500
"""Held-out images to compare samples with; if there are fewer, as many augmented versions of each as fit."""

MEASUREMENT = 2
"""Version of the rule by which a table is measured, in results.json.

1 (if the file names none): real images are the first `n_samples` of the set, held-out NLL is over all images.
2: both use seeded random subsets, of `n_samples` and `evaluation.held_out` images.
"""

PARTS = 5
"""Parts of a row, about equally long: drawing, features, distances, neighbours and memory, likelihoods."""

Row = dict[str, Any]
"""A row of the table: metrics, facts needed to interpret them, and `intervals` {metric: [low, high]} (95 %)."""


class GeneratorMetrics:
    """Measures generators of one run against the decoded training codes.

    Args:
        run: the run folder; nothing is written to it.
        vqvae: its tokenizer.
        codes: its codes.
        images: its images, for the distance to real ones.
        device: device of the models.
        measurement: version of the rule, see `MEASUREMENT`.

    Attributes:
        held_out: the held-out codes behind the NLLs, by set: `test` and, where there are any, `new_people`.
        classes: how many classes the images have; 0: none.
        tell: called after every part of a row (`PARTS`), for a progress bar.

    Raises:
        ConfigError: the extractor or a metric of your own is not available.
        RunError: an unknown version of the rule.
    """

    def __init__(
        self,
        run: Run,
        vqvae: Tokenizer,
        codes: CodeSet,
        images: ImageSet,
        device: torch.device,
        measurement: int = MEASUREMENT,
    ) -> None:
        if measurement not in range(1, MEASUREMENT + 1):
            raise RunError(
                f"{run.path}: its table was measured by rule {measurement!r}, which this version of ral_gym does not "
                "know: use the version that wrote it, or remove results.json and checkpoints/evaluation.json"
            )
        self.run, self.vqvae, self.codes, self.images, self.device = run, vqvae, codes, images, device
        self.measurement = measurement
        self.tell: Callable[[], None] = lambda: None
        config = run.config.evaluation
        self.own_metrics = own_metrics(config.metrics)
        self.n_samples, self.seed = config.n_samples, run.config.seed * 1000 + 6
        self.batch_size = max(1, LOGITS_PER_PASS // (vqvae.grid.n_codes * vqvae.grid.codebook_size))
        self.extractor = make_extractor(config.extractor, encoder_features(vqvae), device)
        self._order = torch.randperm(len(codes.train), generator=torch.Generator().manual_seed(self.seed)).numpy()
        self.reference = decode_codes(vqvae, codes.train[self._order[: self.n_samples]])  # (N, C, S, S)
        self.distance = ImageDistance(self.extractor, self.reference, seed=self.seed)
        real = images.train[self._pick(len(images.train), self.n_samples)]
        self.real_distance = FeatureDistance(
            extract(self.extractor, real), extractor=self.extractor.name, seed=self.seed
        )
        limit = config.held_out if measurement > 1 else None
        sets = {"test": codes.test, "new_people": codes.new_people}
        self.held_out = {
            name: held_out[self._pick(len(held_out), limit)] for name, held_out in sets.items() if held_out is not None
        }
        self.classes = len(codes.classes)
        if codes.labels is not None:
            self._test_labels = torch.from_numpy(codes.labels.test[self._pick(len(codes.test), limit)])
            self._known = torch.from_numpy(codes.labels.train[self._order[: self.n_samples]])

    def _pick(self, total: int, limit: int | None) -> np.ndarray:
        """Rows of at most `limit` of a set, by the table's rule."""
        if self.measurement == 1:
            return np.arange(total)[:limit]
        return subset(total, limit, self.seed)

    def row(self, prior: Prior, temperature: float = 1.0, sampling: Sampling = PLAIN) -> Row:
        """One row of the table; of a generator of classes, each class is asked for equally often.

        `fd`, `kid`, `precision`, `recall`, `density` and `coverage` compare with the decoded training codes, `fd_real`
        and `kid_real` with the training images themselves; `memorisation` and `memorisation_near` compare distances to
        the nearest training image with those of held-out images, `memorisation_new_people` with those of new people
        (see `ral_gym.metrics.memorisation`); `nll_test`, `nll_new_people` and `entropy` are in nats per code.

        The intervals are over samples or over held-out images: they describe other sets drawn by the same network, not
        retrained networks, which need other seeds. Photos of the same person count as independent.
        """
        codes = sample_codes(prior, self.n_samples, self.seed, temperature, sampling)  # (N, T)
        self.tell()
        labels = self._asked(prior, len(codes))
        row = self.distances(codes, labels)
        row |= self._noise(row["fd"], lambda seed: sample_codes(prior, len(codes), seed, temperature, sampling))
        estimates: dict[str, Estimate | None] = {"diversity": hamming_distance(codes)}
        if not sampling.guided:
            estimates |= self._likelihoods(prior, temperature)
            drawn = labelled(prior, codes, labels)
            estimates["entropy"] = image_mean(image_entropy(prior, drawn, temperature, self.batch_size, self.device))
        row |= {name: None if estimate is None else estimate.value for name, estimate in estimates.items()}
        row["intervals"] |= interval_ends(estimates)
        guided = {"guidance": sampling.guidance} if sampling.guided else {}
        return row | {"samples_per_kept": 1.0, "temperature": temperature} | guided

    def _noise(self, fd: float, draw: Callable[[int], Tensor]) -> Row:
        """FD of the codes (N, T) that `draw` gives of other seeds, with `evaluation.sampling_seeds` above 1."""

        def again(seed: int) -> float:
            return self.distance.features.fd(extract(self.extractor, decode_codes(self.vqvae, draw(seed))))

        return dict(sampling_noise(fd, self.seed, self.run.config.evaluation.sampling_seeds, again))

    def _asked(self, prior: Prior, n: int) -> Tensor | None:
        """The classes (n,) that `sample_codes` asks a generator for; None without classes."""
        return balanced_labels(n, prior.grid.classes) if prior.grid.classes else None

    def _likelihoods(self, prior: Prior, temperature: float) -> dict[str, Estimate | None]:
        """Held-out NLL; with classes also of wrong labels and of none."""
        codes, grid = torch.from_numpy(self.held_out["test"]).long(), prior.grid
        if not grid.classes:
            people = self.held_out.get("new_people")
            new = None if people is None else self.nll(prior, people, temperature)
            return {"nll_test": self.nll(prior, codes, temperature), "nll_new_people": new}
        given = {"nll_test": self._test_labels}
        if grid.classes > 1:
            given["nll_wrong_label"] = wrong_labels(self._test_labels, grid.classes, self.seed)
        if getattr(prior, "null_class", True):
            given["nll_no_label"] = torch.full_like(self._test_labels, grid.classes)
        return {name: self.nll(prior, grid.with_labels(codes, labels), temperature) for name, labels in given.items()}

    def rejection_row(self, prior: Prior, judge: Judge) -> Row:
        """The row of rejection sampling as in VQ-VAE-2: the best of every four samples by a judge.

        It has no likelihood, so no NLL and no entropy; it costs more drawn samples, and diversity.
        """

        def keep(seed: int) -> Rejection:
            def drawn(n: int) -> Tensor:
                return labelled(prior, sample_codes(prior, n, seed), self._asked(prior, n))

            return rejection_sample(drawn, judge, self.n_samples, REJECTION_SHARE)

        kept = keep(self.seed)
        codes = prior.grid.without_labels(kept.codes)
        self.tell()
        row, varied = self.distances(codes, prior.grid.labels_of(kept.codes)), hamming_distance(codes)
        row["intervals"] |= interval_ends({"diversity": varied})
        row |= self._noise(row["fd"], lambda seed: prior.grid.without_labels(keep(seed).codes))
        return row | {"diversity": varied.value, "samples_per_kept": kept.samples_per_kept, "temperature": 1.0}

    def distances(self, codes: Tensor, labels: Tensor | None = None) -> Row:
        """Distances of samples (N, T), see `image_distances`."""
        return self.image_distances(decode_codes(self.vqvae, codes), labels, codes)

    def image_distances(self, images: Tensor, labels: Tensor | None = None, codes: Tensor | None = None) -> Row:
        """Of images (N, C, S, S) uint8: distances from decoded training codes and from training images, memorisation.

        With the classes (N,) that were asked for also `ral_gym.stages.class_metrics`; with codes (N, T) own metrics.
        """
        features = extract(self.extractor, images)  # (N, F)
        self.tell()
        row, real = self._against(self.distance.features, features), self._against(self.real_distance, features)
        row |= {f"{name}_real": real[name] for name in ("fd", "kid")}
        row["intervals"] |= {f"{name}_real": ends for name, ends in real["intervals"].items()}
        self.tell()
        if labels is not None:
            right = accuracy(self.judge, images, labels)
            row |= {"accuracy": right.value} | self._class_distance(features, labels)
            row["intervals"] |= interval_ends({"accuracy": right})
        parts = [self._neighbours(self.neighbourhood, features), self._memorised(features)]
        if codes is not None:
            drawn = {"images": images, "codes": codes, "features": features}
            parts.append(measure_own(self.own_metrics, drawn, self._reference(), self.seed))
        for part in parts:
            row["intervals"] |= part.pop("intervals")
            row |= part
        self.tell()
        return row

    def real_rows(self) -> dict[str, Row]:
        """Rows that put distances into proportion: reconstructed against real images, two halves of the reference."""
        # The same images as `real_distance`, unless the codes are not those of the images.
        n_clean = min(len(self.images.train), self.codes.clean)
        clean = self.codes.train[self._pick(n_clean, self.n_samples)]
        rebuilt = extract(self.extractor, decode_codes(self.vqvae, clean))
        rows = {"reconstruction": self._against(self.real_distance, rebuilt)}
        if self.classes and len(self.held_out["test"]):
            right = accuracy(self.judge, decode_codes(self.vqvae, self.held_out["test"]), self._test_labels)
            rows["reconstruction"] |= {"accuracy": right.value}
            rows["reconstruction"]["intervals"] |= interval_ends({"accuracy": right})
        # The halves of `FeatureDistance.floor`.
        reference = self.distance.features.reference  # (N, F)
        order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(self.seed))
        first, second = reference[order].chunk(2)
        name = self.extractor.name
        floor = self._against(FeatureDistance(first, extractor=name, seed=self.seed), second)
        near = self._neighbours(Neighbourhood(first, extractor=name), second)
        halves = [{sees: part[half] for sees, part in self._reference().items()} for half in order.chunk(2)]
        own = measure_own(self.own_metrics, halves[1], halves[0], self.seed)
        for part in (near, own):
            floor["intervals"] |= part.pop("intervals")
            floor |= part
        return rows | {"floor": floor}

    def _reference(self) -> dict[str, Tensor]:
        """The reference in every form that metrics of your own can see."""
        codes = torch.from_numpy(self.codes.train[self._order[: self.n_samples]]).long()  # (M, T)
        return {"images": self.reference, "codes": codes, "features": self.distance.features.reference.float()}

    def other_codes(self, n: int) -> Tensor:
        """Codes (N, T) int64 of up to n images outside the reference: training images, else held-out ones."""
        part, picked = self._others(n)
        return torch.from_numpy(getattr(self.codes, part)[picked]).long()

    def other_labels(self, n: int) -> Tensor | None:
        """The classes (N,) of the images of `other_codes`, if they are known."""
        part, picked = self._others(n)
        return None if self.codes.labels is None else torch.from_numpy(getattr(self.codes.labels, part)[picked])

    def _others(self, n: int) -> tuple[str, np.ndarray]:
        """The part of the set that `other_codes` takes, and its rows."""
        picked = self._order[self.n_samples : self.n_samples + n]
        if len(picked) >= SMALLEST_WITH_INTERVALS:
            return "train", picked
        return "test", self._pick(len(self.codes.test), n)

    def nll(self, prior: Prior, codes: np.ndarray | Tensor, temperature: float) -> Estimate:
        """Nats per code of held-out codes (N, T), or sequences with labels; the interval is over images."""
        return image_mean(image_nll(prior, codes, temperature, self.batch_size, self.device))

    def temperature_of(self, prior: Prior, target_entropy: float) -> float:
        """The temperature at which `prior` has the target entropy."""
        return match_temperature(
            lambda t: sample_codes(prior, TEMPERATURE_BATCH, self.seed, t),
            lambda codes, t: entropy(
                prior, labelled(prior, codes, self._asked(prior, len(codes))), t, self.batch_size, self.device
            ),
            target_entropy,
            tolerance=5e-3,
        ).temperature

    # What samples are compared with, computed at first use ---------------------------------------------------

    @functools.cached_property
    def judge(self) -> ClassJudge:
        """The classifier that no generator was trained to please."""
        assert self.codes.labels is not None
        clean = slice(self.codes.clean)
        return train_judge(self.vqvae, self.codes.train[clean], self.codes.labels.train[clean], self.classes, self.seed)

    def _class_distance(self, features: Tensor, labels: Tensor) -> Row:
        reference = self.distance.features.reference.float()  # (M, F)
        return dict(class_distance(features, labels, reference, self._known, self.classes))

    @functools.cached_property
    def neighbourhood(self) -> Neighbourhood:
        """The neighbourhoods of the decoded training codes."""
        return Neighbourhood(self.distance.features.reference, extractor=self.extractor.name)

    @functools.cached_property
    def memory(self) -> dict[str, Memorisation]:
        """Memorisation scorers by the held-out images they compare with: `test` and, if there are any, `new_people`.

        The training images are the augmented, decoded ones of the code file, since those are what a prior can memorise;
        held-out images are augmented in the same way, or they would lie nearer to them than a perfect sample.
        """
        more = self.codes.train[self._order[self.n_samples : MEMORY * self.n_samples]]
        train = self.distance.features.reference.float()  # (N, F)
        if len(more):
            train = torch.cat([train, extract(self.extractor, decode_codes(self.vqvae, more))])
        sets = {
            "test": (self.codes.test, self.images.test),
            "new_people": (self.codes.new_people, self.images.new_people),
        }
        return {
            name: Memorisation(train, self._versions(codes, images), extractor=self.extractor.name, seed=self.seed)
            for name, (codes, images) in sets.items()
            if codes is not None and len(codes)
        }

    def _versions(self, codes: np.ndarray, images: np.ndarray | None) -> Tensor:
        """Features (V, P, F) of held-out images, decoded: V images with P augmented versions of each."""
        picked = np.random.default_rng(self.seed).permutation(len(codes))[:HELD_OUT]
        passes = min(self.run.config.prior.augmented_passes, math.ceil(HELD_OUT / len(picked)))
        versions = codes[picked][None]  # (1, V, T)
        if passes > 1 and images is not None and len(images) == len(codes):
            again = encode_images(self.vqvae, images[picked], passes=passes, seed=self.seed, progress=False)
            again = again.reshape(passes, *versions.shape[1:])  # (P, V, T)
            # If the codes are not those of the images, such as an oracle's samples, they are used as they are.
            if (again[0] == versions[0]).mean() > 0.5:
                versions = again
        features = extract(self.extractor, decode_codes(self.vqvae, versions.reshape(-1, versions.shape[-1])))
        return features.view(*versions.shape[:2], -1).transpose(0, 1)  # (V, P, F)

    # Groups of metrics of features (N, F) -----------------------------------------------------------------------------

    def _against(self, distance: FeatureDistance, features: Tensor) -> Row:
        """FD and KID."""
        n, n_reference = len(features), len(distance.reference)
        counts = {"n": n, "n_reference": n_reference, "kid_subset_size": kid_subset_size(n, n_reference)}
        if n < SMALLEST_WITH_INTERVALS:
            measured = distance.measure(features)
            return {"fd": measured["fd"], "kid": measured["kid"], **counts, "intervals": {}}
        estimates = distance_estimates(distance, features, seed=self.seed)
        return {name: estimate.value for name, estimate in estimates.items()} | {
            **counts,
            "intervals": interval_ends(estimates),
        }

    def _neighbours(self, neighbourhood: Neighbourhood, features: Tensor) -> Row:
        """Precision, recall, density and coverage."""
        if len(features) < SMALLEST_WITH_INTERVALS:
            measured = dict(neighbourhood.measure(features))
            return {name: measured[name] for name in SCORES} | {"intervals": {}}
        estimates = neighbourhood.estimates(features, repetitions=NEIGHBOURHOOD_REPETITIONS, seed=self.seed)
        return {name: estimate.value for name, estimate in estimates.items()} | {"intervals": interval_ends(estimates)}

    def _memorised(self, features: Tensor) -> Row:
        """The memorisation scores; None if there is nothing to compare with."""
        row: Row = {"memorisation": None, "memorisation_near": None, "memorisation_new_people": None, "intervals": {}}
        names = {"test": ("memorisation", "memorisation_near"), "new_people": ("memorisation_new_people", None)}
        for key, memory in self.memory.items():
            estimates = memory.estimates(features) if memory.has_intervals(len(features)) else {}
            measured = {name: e.value for name, e in estimates.items()} or memory.measure(features)
            for name, metric in zip(names[key], ("score", "near"), strict=True):
                if name is not None:
                    row[name] = measured[metric]
                    row["intervals"] |= interval_ends({name: estimates.get(metric)})
        return row
