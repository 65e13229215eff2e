"""The last stage: sample every generator, measure it, and lay the pictures side by side.

Distances are to the decoded training codes, as in the paper ("FID on reconstructed real images"): what the prior is
trained on. All generators draw from the same uniforms. A row that has been measured is kept in
``checkpoints/evaluation.json``, so an interrupted evaluation goes on with the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ral_gym.codes import CodeSet, decode_codes
from ral_gym.critic import PatchCritic
from ral_gym.data import ImageSet
from ral_gym.errors import DataError, RunError
from ral_gym.metrics import (
    EncoderFeatures,
    FeatureDistance,
    ImageDistance,
    entropy,
    extract,
    make_extractor,
    match_temperature,
    nll,
)
from ral_gym.metrics.distances import MINIMUM_IMAGES
from ral_gym.rejection import Judge, critic_judge, diversity, rejection_sample
from ral_gym.rewards import CriticScorer
from ral_gym.run import Run
from ral_gym.stages.common import Clock
from ral_gym.stages.levels import load_generator
from ral_gym.stages.pictures import draw_pictures, sample_codes
from ral_gym.storage import differences, load_json, load_module, save_json
from ral_gym.two_level import Prior
from ral_gym.vqvae import VQVAE

STAGE = "evaluation"
GENERATORS = {
    "mle": "prior",
    "mle_ema": "prior_ema",
    "mle_continued": "prior_continued",
    "ral": "policy_ema",
    "ral_live": "policy",
}
"""Row of the table -> file of its weights."""
SWEPT = ("mle", "mle_continued", "ral")
"""Rows that are also sampled at other temperatures; each gets a row `..._best_temperature`."""
LOWEST_TEMPERATURE = 0.3
TEMPERATURE_STEP = 0.1
REJECTION_SHARE = 0.25
LOGITS_PER_PASS = 2**24
"""Bounds the images per teacher-forced pass: 64 MiB of logits; 2,048 images of 8 x 8 codes with K = 128."""
TEMPERATURE_BATCH = 500
"""Samples per step of the search for the temperature that gives RAL's entropy."""


class Evaluation:
    """Measures generators of one run against the decoded training codes.

    Args:
        run: the run folder.
        vqvae: its VQ-VAE.
        codes: its codes.
        images: its images, for the distance to real ones.
        device: where the models are.
    """

    def __init__(self, run: Run, vqvae: VQVAE, codes: CodeSet, images: ImageSet, device: torch.device) -> None:
        self.run, self.vqvae, self.codes, self.device = run, vqvae, codes, device
        config = run.config.evaluation
        self.n_samples, self.seed = config.n_samples, run.config.seed * 1000 + 6
        self.batch_size = max(1, LOGITS_PER_PASS // (vqvae.grid.n_codes * vqvae.codebook_size))
        encoder = EncoderFeatures(vqvae.encode_features, vqvae.num_features)
        self.extractor = make_extractor(config.extractor, encoder, device)
        picked = torch.randperm(len(codes.train), generator=torch.Generator().manual_seed(self.seed))[: self.n_samples]
        self.reference = decode_codes(vqvae, codes.train[picked.numpy()])  # (N, C, S, S)
        self.distance = ImageDistance(self.extractor, self.reference, seed=self.seed)
        real = extract(self.extractor, torch.from_numpy(images.train[: self.n_samples].copy()))
        self.real_distance = FeatureDistance(real, extractor=self.extractor.name, seed=self.seed)

    def row(self, prior: Prior, temperature: float = 1.0) -> dict[str, Any]:
        """One row of the table.

        `fd` and `kid` are distances to the decoded training codes, `fd_real` and `kid_real` to the training images
        themselves; `nll_test`, `nll_new_people` and `entropy` are in nats per code.
        """
        codes = sample_codes(prior, self.n_samples, self.seed, temperature)
        new_people = self.codes.new_people
        return self.distances(codes) | {
            "nll_test": self.nll(prior, self.codes.test, temperature),
            "nll_new_people": None if new_people is None else self.nll(prior, new_people, temperature),
            "entropy": entropy(prior, codes, temperature, self.batch_size, self.device),
            "diversity": diversity(codes).distance,
            "samples_per_kept": 1.0,
            "temperature": temperature,
        }

    def rejection_row(self, prior: Prior, judge: Judge) -> dict[str, Any]:
        """The row of rejection sampling, VQ-VAE-2's way to better samples: of every four the one judged best.

        It has no likelihood, so no NLL and no entropy; what it costs is drawn samples, and diversity.
        """
        kept = rejection_sample(lambda n: sample_codes(prior, n, self.seed), judge, self.n_samples, REJECTION_SHARE)
        figures = {"diversity": kept.diversity.distance, "samples_per_kept": kept.samples_per_kept}
        return self.distances(kept.codes) | figures | {"temperature": 1.0}

    def distances(self, codes: Tensor) -> dict[str, Any]:
        """How far samples (N, T) are from the decoded training codes, and from the training images."""
        features = extract(self.extractor, decode_codes(self.vqvae, codes))
        measured, from_real = self.distance.features.measure(features), self.real_distance.measure(features)
        counts = {key: measured[key] for key in ("n", "n_reference", "kid_subset_size")}
        return {"fd": measured["fd"], "kid": measured["kid"]} | {
            "fd_real": from_real["fd"],
            "kid_real": from_real["kid"],
            **counts,
        }

    def nll(self, prior: Prior, codes: Any, temperature: float) -> float:
        """Nats per code of held-out codes (N, T)."""
        return nll(prior, torch.as_tensor(codes), temperature, self.batch_size, self.device)

    def temperature_of(self, prior: Prior, target_entropy: float) -> float:
        """The temperature at which `prior` has the target entropy."""
        return match_temperature(
            lambda t: sample_codes(prior, TEMPERATURE_BATCH, self.seed, t),
            lambda codes, t: entropy(prior, codes, t, self.batch_size, self.device),
            target_entropy,
            tolerance=5e-3,
        ).temperature


def evaluate(
    run: Run, vqvae: VQVAE, codes: CodeSet, images: ImageSet, device: torch.device, progress: bool = True
) -> dict[str, Any]:
    """Fill the table, write ``results.json`` and the pictures.

    Raises:
        ConfigError: the extractor cannot be had.
    """
    clock = Clock(run, STAGE)
    evaluation = Evaluation(run, vqvae, codes, images, device)
    partial = run.file("checkpoints/evaluation.json")
    rows: dict[str, dict[str, Any]] = load_json(partial) if partial.exists() else {}
    if not isinstance(rows, dict) or not all(isinstance(row, dict) and "fd" in row for row in rows.values()):
        raise RunError(f"{partial} holds no rows of a table; remove it to evaluate again")
    priors = {row: load_generator(run, name, device) for row, name in GENERATORS.items()}
    mle = priors["mle"]
    for row, prior in priors.items():
        found = differences(prior.config, mle.config)
        if found:
            raise RunError(
                f"{run.path}: {GENERATORS[row]} is another model than the prior ({found[0]}); remove its file"
            )
    planned = len(priors) + len(SWEPT) * len(run.config.evaluation.temperatures) + 4 + 4
    bar = tqdm(total=planned, desc="4 evaluation", unit="row", disable=not progress)

    def measure(name: str, prior: Prior, temperature: float = 1.0) -> dict[str, Any]:
        if name not in rows:
            rows[name] = evaluation.row(prior, temperature)
            save_json(partial, rows)
        bar.total = max(bar.total, bar.n + 1)  # a sweep may go on below the temperatures planned
        bar.update(1)
        return rows[name]

    if "mle_rejection" not in rows:
        judge = critic_judge(CriticScorer(vqvae, load_module(run.file("critic.safetensors"), PatchCritic, device)))
        rows["mle_rejection"] = evaluation.rejection_row(mle, judge)
    _measure_real(evaluation, images, rows)
    bar.update(3)
    for name, prior in priors.items():
        measure(name, prior)
    same_entropy = rows.get("mle_temperature", {}).get("temperature")
    if same_entropy is None:
        same_entropy = evaluation.temperature_of(priors["mle"], rows["ral"]["entropy"])
    measure("mle_temperature", priors["mle"], same_entropy)
    for file in sorted(run.file("checkpoints").glob("policy_ema_*.safetensors")):
        measure(f"ral_after_{int(file.stem.rpartition('_')[2])}", load_module(file, type(mle), device, mle.config))
    for name in SWEPT:
        _sweep(measure, name, priors[name], run.config.evaluation.temperatures)
    bar.close()
    results = _results(run, evaluation, rows)
    clock.book()
    results["seconds"] = run.seconds()
    draw_pictures(run, vqvae, codes, images, priors, results)
    save_json(run.file("results.json"), results)
    return results


def _sweep(
    measure: Callable[[str, Prior, float], dict[str, Any]],
    name: str,
    prior: Prior,
    temperatures: Sequence[float],
) -> None:
    """Measure a generator at several temperatures, and at lower ones still while the lowest is the best."""
    fds = {temperature: measure(f"{name}_at_{temperature:g}", prior, temperature)["fd"] for temperature in temperatures}
    while fds and min(fds, key=lambda t: fds[t]) == min(fds) and min(fds) > LOWEST_TEMPERATURE:
        lower = round(min(fds) - TEMPERATURE_STEP, 3)
        fds[lower] = measure(f"{name}_at_{lower:g}", prior, lower)["fd"]


def _measure_real(evaluation: Evaluation, images: ImageSet, rows: dict[str, dict[str, Any]]) -> None:
    """The rows that say what a distance means: real against reconstructed images, and two halves of the reference."""
    if "floor" in rows:
        return
    n_clean = min(len(images.train), evaluation.n_samples)
    rebuilt = extract(evaluation.extractor, decode_codes(evaluation.vqvae, evaluation.codes.train[:n_clean]))
    reconstruction = evaluation.real_distance.measure(rebuilt)
    floor = evaluation.distance.floor()
    for name, measured in (("reconstruction", reconstruction), ("floor", floor)):
        rows[name] = {key: measured[key] for key in ("fd", "kid", "n", "n_reference", "kid_subset_size")}


def _results(run: Run, evaluation: Evaluation, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The table: named rows first, the temperature sweeps apart."""
    sweeps = {
        start: sorted(
            [rows[start], *(row for name, row in rows.items() if name.startswith(f"{start}_at_"))],
            key=lambda row: row["temperature"],
        )
        for start in SWEPT
    }
    named = {name: row for name, row in rows.items() if "_at_" not in name and "_after_" not in name}
    after = {int(name.rpartition("_")[2]): row for name, row in rows.items() if "_after_" in name}
    for start, sweep in sweeps.items():
        named[f"{start}_best_temperature"] = min(sweep, key=lambda row: row["fd"])
    return {
        "rows": named,
        "sweeps": sweeps,
        "checkpoints": [{"updates": updates, **after[updates]} for updates in sorted(after)],
        "extractor": evaluation.extractor.name,
        "reference": "decoded training codes",
        "n_samples": evaluation.n_samples,
        "seed": run.config.seed,
        "preset": run.config.preset,
    }


def check_images(images: ImageSet) -> None:
    """Fail before training where there are too few images to measure distances afterwards.

    Raises:
        DataError: how many there are and must be.
    """
    needed = 2 * MINIMUM_IMAGES  # the row `floor` compares two halves
    if len(images.train) < needed:
        raise DataError(
            f"{len(images.train)} training images are too few to measure distances: give at least {needed} "
            "(more images, or a larger data.limit)"
        )


def check_extractor(run: Run) -> None:
    """Fail before hours of training, not after, where the evaluation's extractor cannot be had.

    Raises:
        ConfigError: what to install or where to put the weights.
    """
    if run.config.evaluation.extractor != "encoder":
        make_extractor(run.config.evaluation.extractor)
