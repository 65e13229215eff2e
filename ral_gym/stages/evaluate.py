"""The last stage: sample every generator, measure it, and show samples side by side.

`ral_gym.stages.generator_metrics` defines what a row of the table is. A measured row is saved in
``checkpoints/evaluation.json``, so an interrupted evaluation continues with the next row, by the rule it began with.
Measuring (`measure`, `results_of`) is separate from writing (`evaluate`), because `ral-gym verify` measures the same
rows and writes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch

from ral_gym.data.images import ImageSet
from ral_gym.errors import DataError, RunError
from ral_gym.metrics import make_extractor
from ral_gym.metrics.distances import MINIMUM_IMAGES
from ral_gym.metrics.own import own_metrics
from ral_gym.priors.base import Prior, config_of, load_prior
from ral_gym.priors.guidance import PLAIN, Sampling, guidable
from ral_gym.rewards.making import load_scorer
from ral_gym.runs.progress import progress_bar
from ral_gym.runs.results import check_rows
from ral_gym.runs.run import Run
from ral_gym.runs.storage import differences, load_json, save_json
from ral_gym.stages.common import Clock
from ral_gym.stages.generator_metrics import MEASUREMENT, PARTS, GeneratorMetrics, Row
from ral_gym.stages.given_rows import measure_given_rows
from ral_gym.stages.levels import load_generator
from ral_gym.stages.pictures import draw_pictures
from ral_gym.stages.rejection import critic_judge
from ral_gym.stages.sampling_noise import has_sampling_seeds
from ral_gym.tokenizers.base import Tokenizer
from ral_gym.tokenizers.code_set import CodeSet

__all__ = ["ROW_FILES", "SWEPT", "check_images", "check_measuring", "evaluate", "measure", "results_of"]

STAGE = "evaluation"
PARTIAL = "checkpoints/evaluation.json"
"""The rows measured so far."""
ROW_FILES = {
    "mle": "prior",
    "mle_ema": "prior_ema",
    "mle_continued": "prior_continued",
    "mle_equal_time": "prior_equal_time",
    "ral": "policy_ema",
    "ral_live": "policy",
}
"""Row of the table -> file of its weights; there is no `mle_equal_time` without `ral.equal_time_control`."""
EQUAL_TIME = "mle_equal_time"
SWEPT = ("mle", "mle_continued", "mle_equal_time", "ral")
"""Rows that are also sampled at other temperatures; each gets a row `..._best_temperature`."""
GUIDED = ("mle", "ral")
"""Rows that are also sampled with guidance, if they have classes; each gets a row `..._best_guidance`."""
REAL_ROWS = ("reconstruction", "floor")
"""Rows of real images, which no generator draws."""
LOWEST_TEMPERATURE = 0.3
TEMPERATURE_STEP = 0.1


def evaluate(
    run: Run, vqvae: Tokenizer, codes: CodeSet, images: ImageSet, device: torch.device, progress: bool = True
) -> dict[str, Any]:
    """Fill the table, write ``results.json`` and the pictures.

    Raises:
        ConfigError: the extractor is not available.
        RunError: a weight file or ``checkpoints/evaluation.json`` is damaged.
    """
    clock = Clock(run, STAGE)
    measurement, rows = _begun(run)
    evaluation = GeneratorMetrics(run, vqvae, codes, images, device, measurement)
    priors = load_priors(run, device)

    def keep(rows: dict[str, Row]) -> None:
        save_json(run.file(PARTIAL), {"measurement": measurement, "rows": rows})

    measure(evaluation, priors, rows, keep=keep, progress=progress)
    results = results_of(run, evaluation, rows)
    results["given_rows"] = measure_given_rows(evaluation, {name: priors[name] for name in ("mle", "ral")})
    clock.book()
    results["seconds"] = run.seconds()
    draw_pictures(run, vqvae, codes, images, priors, results)
    save_json(run.file("results.json"), results)
    return results


def _begun(run: Run) -> tuple[int, dict[str, Row]]:
    """The measurement rule with which the run's evaluation began, and the rows measured so far.

    Raises:
        RunError: the file is damaged.
    """
    path = run.file(PARTIAL)
    if not path.exists():
        return MEASUREMENT, {}
    begun = load_json(path)
    # Version 0.1 wrote the rows alone.
    found = begun if isinstance(begun, dict) and "measurement" in begun else {"measurement": 1, "rows": begun}
    rows, measurement = check_rows(found.get("rows"), path), found["measurement"]
    if isinstance(measurement, bool) or not isinstance(measurement, int):
        raise RunError(f"{path} holds no table rows; remove it to evaluate again")
    # Rows of versions that measured less, or on samples from fewer seeds, are measured again.
    seeds = run.config.evaluation.sampling_seeds
    whole = {name for name, row in rows.items() if name in REAL_ROWS or has_sampling_seeds(row, seeds)}
    return measurement, {name: row for name, row in rows.items() if "intervals" in row and name in whole}


def load_priors(run: Run, device: torch.device) -> dict[str, Prior]:
    """The run's generators, by row of the table.

    Raises:
        RunError: a file is missing, damaged, or another model's.
    """
    files = {row: name for row, name in ROW_FILES.items() if row != EQUAL_TIME or run.config.ral.equal_time_control}
    priors = {row: load_generator(run, name, device) for row, name in files.items()}
    for row, prior in priors.items():
        if found := differences(config_of(prior), config_of(priors["mle"])):
            raise RunError(
                f"{run.path}: {ROW_FILES[row]} does not have the prior's architecture ({found[0]}); remove its file"
            )
    return priors


def measure(
    evaluation: GeneratorMetrics,
    priors: Mapping[str, Prior],
    rows: dict[str, Row],
    *,
    keep: Callable[[dict[str, Row]], None] = lambda rows: None,
    only: Container[str] | None = None,
    progress: bool = True,
) -> None:
    """Measure the rows of the table that are still missing; nothing is written to the run folder.

    Args:
        evaluation: measures them.
        priors: row of the table -> its network, as `load_priors` gives them.
        rows: the measured rows by name; missing ones are added: those of the table, `GENERATOR_at_TEMPERATURE`,
            `GENERATOR_guided_SCALE` and `ral_after_UPDATES`.
        keep: called with all rows after each new one.
        only: names of the rows to measure, beside those that they need; None: all. `GENERATOR_best_temperature` stands
            for that generator's temperatures.
        progress: show a progress bar.

    Raises:
        RunError: a weight file is missing or damaged.
    """
    run, mle = evaluation.run, priors["mle"]
    planned = len(priors) + len(SWEPT) * len(run.config.evaluation.temperatures) + 4 + 4
    bar = progress_bar(total=planned * PARTS, desc="4 evaluation", unit="part", disable=not progress)
    begun = 0  # rows; the parts of one are counted as they end

    def tell() -> None:
        if bar.n < begun * PARTS - 1:
            bar.update(1)

    def wanted(*names: str) -> bool:
        return only is None or any(name in only for name in names)

    def add(name: str, measured: Callable[[], Row]) -> Row:
        nonlocal begun
        begun += 1
        bar.total = max(bar.total, begun * PARTS)  # a sweep may continue below the planned temperatures
        if name not in rows:
            bar.set_postfix(row=name)
            rows[name] = measured()
            keep(rows)
        bar.update(begun * PARTS - bar.n)
        return rows[name]

    evaluation.tell = tell

    def draw(name: str, prior: Prior, temperature: float = 1.0, sampling: Sampling = PLAIN) -> Row:
        return add(name, lambda: evaluation.row(prior, temperature, sampling))

    if wanted("mle_rejection") and run.config.ral.uses_critic:
        add("mle_rejection", lambda: _rejection_row(evaluation, mle))
    real_rows = functools.cache(evaluation.real_rows)
    for name in REAL_ROWS:
        if wanted(name):
            add(name, lambda name=name: real_rows()[name])  # type: ignore[misc]
    needed_by: dict[str, tuple[str, ...]] = {"mle": ("mle_best_temperature", "mle_best_guidance")}
    needed_by["ral"] = ("ral_best_temperature", "mle_temperature", "ral_best_guidance")
    for name in ("mle_continued", EQUAL_TIME):
        needed_by[name] = (f"{name}_best_temperature",)
    for name, prior in priors.items():
        if wanted(name, *needed_by.get(name, ())):
            draw(name, prior)
    if wanted("mle_temperature"):
        same_entropy = rows.get("mle_temperature", {}).get("temperature")
        if same_entropy is None:
            same_entropy = evaluation.temperature_of(mle, rows["ral"]["entropy"])
        draw("mle_temperature", mle, same_entropy)
    for file in sorted(run.file("checkpoints").glob("policy_ema_*.safetensors")):
        name = f"ral_after_{int(file.stem.rpartition('_')[2])}"
        if wanted(name):
            draw(name, load_prior(file, evaluation.device, config_of(mle)))
    for name in SWEPT:
        if name in priors and wanted(f"{name}_best_temperature"):
            _sweep(draw, name, priors[name], run.config.evaluation.temperatures)
    for name in GUIDED:
        if wanted(f"{name}_best_guidance") and guidable(priors[name]):
            for scale in run.config.evaluation.guidance:
                draw(f"{name}_guided_{scale:g}", priors[name], 1.0, Sampling(guidance=scale))
    bar.close()


def _rejection_row(evaluation: GeneratorMetrics, prior: Prior) -> Row:
    """The row of rejection sampling with the run's critic."""
    file = evaluation.run.file("critic.safetensors")
    scorer = load_scorer(file, evaluation.vqvae, evaluation.device, lambda: prior)
    return evaluation.rejection_row(prior, critic_judge(scorer, prior.grid))


def _sweep(
    draw: Callable[[str, Prior, float], dict[str, Any]],
    name: str,
    prior: Prior,
    temperatures: Sequence[float],
) -> None:
    """Measure a generator at several temperatures, and at lower ones as long as the lowest is the best."""
    fds = {temperature: draw(f"{name}_at_{temperature:g}", prior, temperature)["fd"] for temperature in temperatures}
    while fds and min(fds, key=lambda t: fds[t]) == min(fds) and min(fds) > LOWEST_TEMPERATURE:
        lower = round(min(fds) - TEMPERATURE_STEP, 3)
        fds[lower] = draw(f"{name}_at_{lower:g}", prior, lower)["fd"]


def results_of(run: Run, evaluation: GeneratorMetrics, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The content of ``results.json`` without run times: named rows first, sweeps and checkpoints separately.

    If not all rows were measured, only the sweeps of measured generators are included.
    """
    sweeps = {
        start: sorted(
            [rows[start], *(row for name, row in rows.items() if name.startswith(f"{start}_at_"))],
            key=lambda row: row["temperature"],
        )
        for start in SWEPT
        if start in rows
    }
    others = ("_at_", "_after_", "_guided_")
    named = {name: row for name, row in rows.items() if not any(part in name for part in others)}
    guided = {
        start: [rows[start], *(row for name, row in rows.items() if name.startswith(f"{start}_guided_"))]
        for start in GUIDED
        if start in rows
    }
    after = {int(name.rpartition("_")[2]): row for name, row in rows.items() if "_after_" in name}
    for start, sweep in sweeps.items():
        named[f"{start}_best_temperature"] = min(sweep, key=lambda row: row["fd"])
    guided = {start: [{"guidance": 1.0, **row} for row in sweep] for start, sweep in guided.items() if len(sweep) > 1}
    for start, sweep in guided.items():
        named[f"{start}_best_guidance"] = min(sweep, key=lambda row: row["fd"])
    # Version 0.1 recorded neither its rule nor its number of held-out images.
    rule = (
        {}
        if evaluation.measurement == 1
        else {
            "measurement": evaluation.measurement,
            "held_out": {name: len(codes) for name, codes in evaluation.held_out.items()},
        }
    )
    seeds = run.config.evaluation.sampling_seeds
    own = {metric.key: metric.meaning for metric in evaluation.own_metrics}
    return (
        {
            "rows": named,
            "sweeps": sweeps,
            "checkpoints": [{"updates": updates, **after[updates]} for updates in sorted(after)],
            "extractor": evaluation.extractor.name,
            "reference": "decoded training codes",
            "n_samples": evaluation.n_samples,
            "seed": run.config.seed,
            "preset": run.config.preset,
        }
        | rule
        | ({"sampling_seeds": seeds} if seeds > 1 else {})
        | ({"metrics": own} if own else {})
        | ({"guided": guided} if guided else {})
    )


def check_images(images: ImageSet) -> None:
    """Fail before training if there are too few images to measure distances afterwards.

    Raises:
        DataError: there are too few.
    """
    needed = 2 * MINIMUM_IMAGES  # the row `floor` compares two halves
    if len(images.train) < needed:
        raise DataError(
            f"{len(images.train)} training images are too few to measure distances: give at least {needed} "
            "(more images, or a larger data.limit)"
        )


def check_measuring(run: Run) -> None:
    """Fail before hours of training, not after, if the evaluation's extractor or metrics are not available.

    Raises:
        ConfigError: a package or weights must be installed, or a plug-in named.
    """
    own_metrics(run.config.evaluation.metrics)
    if run.config.evaluation.extractor != "encoder":
        make_extractor(run.config.evaluation.extractor)
