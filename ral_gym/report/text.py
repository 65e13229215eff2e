"""The report's sections made from recorded numbers: results table, frontier, curves, settings, commands."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from ral_gym.config import Config, settings
from ral_gym.config.flags import flags, parts_named
from ral_gym.errors import RunError
from ral_gym.metrics.table import (
    COLUMNS,
    columns_of,
    heading,
    interval,
    metric_text,
    results_caption,
    row_names,
)
from ral_gym.pictures import colour
from ral_gym.presets import PRESETS, get_preset
from ral_gym.report.figures import curves_svg, frontier_svg
from ral_gym.report.page import collapsed, command, definitions, figure, grid, missing, paragraph, setting_list, table
from ral_gym.runs.run import Run
from ral_gym.stages.pictures import NLLS

STAGE_NAMES = {
    "vqvae": "stage 1 (VQ-VAE)",
    "prior": "stage 2 (MLE prior)",
    "ral": "stage 3 (RAL)",
    "evaluate": "stage 4 (evaluation)",
}
ROW_NAMES = {
    "mle": "stage 2's prior, the weights of the best held-out NLL",
    "mle_ema": "the exponential average of its weights",
    "mle_continued": "the control: maximum likelihood continued for as many updates as RAL",
    "mle_equal_time": "the control of equal time: maximum likelihood for as long as RAL, annealed",
    "mle_temperature": "MLE at the temperature that gives RAL's entropy",
    "mle_best_temperature": "MLE at the temperature of its lowest FD",
    "mle_best_guidance": "MLE at the scale of guidance of its lowest FD",
    "mle_continued_best_temperature": "the control at the temperature of its lowest FD",
    "mle_equal_time_best_temperature": "the control of equal time at the temperature of its lowest FD",
    "mle_rejection": "MLE, best of every four samples by the critic's score",
    "ral": "RAL, the exponential average of the policy",
    "ral_live": "RAL, the policy itself",
    "ral_best_temperature": "RAL at the temperature of its lowest FD",
    "ral_best_guidance": "RAL at the scale of guidance of its lowest FD",
    "reconstruction": "real images decoded from their codes, against real images",
    "floor": "two random halves of the reference against each other: the values of a perfect generator",
}
PLOTS = (
    ("vqvae", {"reconstruction_error": 1}, "mean squared error", "Stage 1: reconstruction error"),
    ("vqvae", {"code_usage": 1}, "share of the codebook", "Stage 1: codes in use"),
    ("vqvae", {"perceptual": 1}, "perceptual distance", "Stage 1: perceptual distance of reconstructions"),
    (
        "vqvae",
        {"adversarial": 1},
        "loss",
        "Stage 1: adversarial loss of the tokenizer",
    ),
    ("vqvae", {"discriminator_loss": 1}, "hinge loss", "Stage 1: loss of the discriminator, 1 where it knows nothing"),
    (
        "vqvae",
        {"discriminator_real": 1, "discriminator_fake": 1},
        "mean score",
        "Stage 1: the discriminator's scores of images and of their reconstructions",
    ),
    ("prior", dict.fromkeys(NLLS, 1), "nats per code", "Stage 2: prior"),
    ("prior_bottom", dict.fromkeys(NLLS, 1), "nats per code", "Stage 2: prior of the bottom codes"),
    ("ral", {"critic/heldout_auc": 1}, "AUC", "Stage 3: how well the critic tells held-out real from drawn images"),
    (
        "ral",
        {"rollout/critic_reward_mean": 1},
        "mean reward",
        "Stage 3: reward of the drawn images, by a critic that is trained along",
    ),
    ("ral", {"train/entropy_loss": -1}, "nats per code", "Stage 3: entropy of the policy"),
    ("prior_continued", dict.fromkeys(NLLS, 1), "nats per code", "Control: maximum likelihood continued"),
)
"""Stage in the log, logged names and their signs, the label of y, the caption."""
NAMES = {
    "nll_train": "NLL, training",
    "nll_test": "NLL, held-out",
    "nll_test_ema": "NLL, held-out, average",
    "nll_new_people": "NLL, new people",
    "reconstruction_error": "reconstruction error",
    "code_usage": "code usage",
    "discriminator_loss": "discriminator's loss",
    "discriminator_real": "images",
    "discriminator_fake": "reconstructions",
    "critic/heldout_auc": "AUC",
    "rollout/critic_reward_mean": "reward",
    "train/entropy_loss": "entropy",
}
DAMAGED = (AttributeError, KeyError, TypeError, ValueError)


def train_command(run: Run) -> list[str]:
    """The words of the command that trains this run: preset, changed settings, name and folder."""
    name = run.config.preset if run.config.preset in PRESETS else "demo"  # a file's or a module's: every difference
    words = ["ral-gym", "train", "--preset", name, *flags(run.config, get_preset(name))]
    path = run.path if run.path.name not in ("", "..") else run.path.resolve()
    return [*words, "--name", path.name, "--runs", str(path.parent)]


def stage_command(run: Run, *stages: str) -> str:
    """The command that runs the given stages of a run."""
    return shlex.join([*train_command(run), *(["--stages", *stages] if stages else [])])


def results_section(run: Run, results: Mapping[str, Any] | None) -> Markup:
    """The results table, what its rows mean, and how it was measured.

    Raises:
        RunError: results.json was not written by ral_gym.
    """
    if results is None:
        return missing(f"No table: {STAGE_NAMES['evaluate']} has not run yet.", stage_command(run))
    try:
        rows, keys = row_names(results), columns_of(results)
        cells = [(name, [metric_text(results["rows"][name], key) for key in keys]) for name in rows]
        measured = table("Results of every generator", ["row", *map(heading, keys)], cells)
        content = figure("results", measured, "Results.", results_caption(results))
    except DAMAGED as error:
        raise _no_results(run) from error
    known = [(name, ROW_NAMES[name]) for name in rows if name in ROW_NAMES]
    if not any(interval(row, key) for row in results["rows"].values() for key in COLUMNS):
        content += paragraph("One measurement per number, without intervals: small differences mean nothing.")
    return content + collapsed("What the rows mean", definitions(known, code=True))


def _no_results(run: Run) -> RunError:
    return RunError(f"{run.file('results.json')} is not a results file; remove it to evaluate again")


def frontier(run: Run, results: Mapping[str, Any] | None) -> Markup:
    """FD against entropy.

    Raises:
        RunError: results.json was not written by ral_gym.
    """
    if results is None:
        return missing(f"No frontier: {STAGE_NAMES['evaluate']} has not run yet.", stage_command(run))
    try:
        sweeps = {
            f"{name.upper() if name in ('mle', 'ral') else name.replace('mle', 'MLE').replace('_', ' ')}": [
                (row["temperature"], row["entropy"], row["fd"]) for row in rows
            ]
            for name, rows in results["sweeps"].items()
        }
        points = {
            label: [(row["entropy"], row["fd"])]
            for name, label in (("mle_ema", "MLE EMA"), ("ral_live", "RAL live"))
            if (row := results["rows"].get(name)) is not None
        }
        stations = [(row["entropy"], row["fd"]) for row in results["checkpoints"]]
        lowest = {label: min((fd, t) for t, _, fd in sweep) for label, sweep in sweeps.items() if sweep}
        described = ", ".join(f"{label} {fd:.3g} at temperature {t:g}" for label, (fd, t) in lowest.items())
        extractor, n = results["extractor"], results["n_samples"]
    except DAMAGED as error:
        raise _no_results(run) from error
    if stations:
        points["RAL on the way"] = stations
    alt = f"FD against entropy, one curve per generator by temperature; lowest FD: {described}"
    numbered = " Numbers: RAL's checkpoints in order." if stations else ""
    caption = f"{extractor} features, n = {n:,}; lowest FD: {described}.{numbered}"
    intro = (
        "Lower is better at the same entropy. A lower temperature moves a generator along its own curve; one that only "
        "sharpens lies on MLE's."
    )
    plot = frontier_svg("frontier", sweeps, points, alt)
    return paragraph(intro) + grid([figure("frontier", plot, "FD against entropy.", caption)], "wide")


def learning_curves(run: Run) -> Markup:
    """What each stage logged, as curves."""
    figures, stages = [], set()
    logged = {stage: run.metrics(stage) for stage in dict.fromkeys(stage for stage, *_ in PLOTS)}
    for number, (stage, names, ylabel, title) in enumerate(PLOTS):
        records = logged[stage]
        curves = {
            NAMES.get(name, name): (
                [r["step"] for r in records if name in r],
                [sign * r[name] for r in records if name in r],
            )
            for name, sign in names.items()
            if sum(name in r for r in records) > 1
        }
        if not curves:
            continue
        stages.add(stage)
        xlabel = "policy update" if stage == "ral" else "step"
        ends = "; ".join(f"{label} {_span(y)}" for label, (_, y) in curves.items())
        name = f"curve-{number}-{stage}".replace("_", "-")
        alt, tint = f"{title}, {ylabel} by {xlabel}: {ends}", colour("ral" if stage == "ral" else "mle")
        svg = curves_svg(name, curves, xlabel=xlabel, ylabel=ylabel, tint=tint, alt=alt)
        figures.append(figure(name, svg, f"{title}.", f"First to last: {ends}."))
    content = grid(figures, "plots") if figures else Markup()
    lacking = [stage for stage in ("vqvae", "prior", "ral") if stage not in stages]
    for stage in lacking:
        if run.has({"vqvae": "vqvae", "prior": "prior", "ral": "policy_ema"}[stage] + ".safetensors"):
            content += paragraph(f"No curves of {STAGE_NAMES[stage]}: metrics.jsonl has no entries of it.")
        else:
            text = f"No curves of {STAGE_NAMES[stage]}: it has not run yet."
            content += missing(text, stage_command(run, stage))
    return content


def _span(values: list[float]) -> str:
    """First and last finite value."""
    known = [value for value in values if math.isfinite(value)]
    return f"{known[0]:.3g} to {known[-1]:.3g}" if known else "never finite"


def configuration(config: Config) -> Markup:
    """Every setting, by section; those that differ from the preset's are marked."""
    base = settings(PRESETS[config.preset]) if config.preset in PRESETS else {}
    sections: dict[str, list[tuple[str, str, str | None]]] = {}
    changed: dict[str, int] = {}
    for name, value in settings(config).items():
        section, _, field = name.rpartition(".")
        differs = name in base and base[name] != value
        changed[section] = changed.get(section, 0) + differs
        preset = _words(base[name]) if differs else None
        sections.setdefault(section, []).append((field, _words(value), preset))
    content = Markup()
    for section, lines in sections.items():
        marked = f", {changed[section]} changed from the preset" if changed[section] else ""
        summary = f"{section or 'run'} ({len(lines)} settings{marked})"
        content += collapsed(summary, setting_list(lines))
    return content


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def repeat(run: Run) -> Markup:
    """The commands that make this run, its results table, its pictures and this page."""
    folder, parts = shlex.quote(str(run.path)), parts_named(run.config)
    plugins = f" --plugin {shlex.join(parts)}" if parts else ""
    return (
        paragraph("The whole run; the same command continues a stopped run. Another --name starts a new one.")
        + command(stage_command(run))
        + paragraph("More pictures, and this page:")
        + command(
            f"ral-gym sample {folder} --n 64 --generator policy_ema{plugins}",
            f"ral-gym complete {folder} IMAGE{plugins}",
            f"ral-gym report {folder}{plugins}",
        )
    )
