"""What does each part of RAL do? The paper's ablations (Table 3) and those it lacks, one change at a time.

    python examples/ablation.py --quick               # one seed, 20 updates, 1,000 samples: under 30 minutes on 2 cores
    python examples/ablation.py                       # the full grid: seeds 0, 1, 2, the presets' 50 (40) updates

Reference: the preset's RAL with full generation. Every variant starts from the same MLE prior and changes one thing:

* generation: partial (Section 4.3) against full, for as many updates, and for as much processor time as full took;
* maps: score maps of 2x2, 4x4 and 8x8, each with the single (Eq. 6) and the intermediate reward. A single reward comes
  after the last code, so it is not discounted (under gamma 0.9 the first of 64 codes would see 0.1 % of it); one row
  shows it discounted like the reference;
* baseline: none, mean, leave-one-out;
* gamma: 0.9, 0.99, 1;
* levels: with the two-level preset, RAL on the top codes, on the bottom codes, on both.

Beside them MLE, and MLE continued for as many updates: what a change is worth shows against those. The number of
updates of *partial, equal time* comes from the processor time of the two finished runs it is compared with; it is
printed, kept in ``equal_time.json`` and can be given: ``--partial-updates``.

Everything is kept in ``runs/ablation`` and made once: run again to continue, or to see the table. Parts can be made by
themselves or side by side, in several processes: ``--groups maps``, ``--seeds 1``. The table holds what is finished.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro
from evidence.ablation_grid import (
    GROUPS,
    LEVELS,
    Group,
    Variant,
    described,
    reference_config,
    reference_of,
    variants_of,
)
from evidence.ablation_report import markdown, save_figure, sentences, summary, terminal_table
from evidence.settings import keep_settings
from rich.console import Console

from ral_gym.agents.experiment import Experiment
from ral_gym.commands.ending import run_command
from ral_gym.commands.train import base_run
from ral_gym.errors import ConfigError, RunError
from ral_gym.presets import get_preset
from ral_gym.priors.base import Prior
from ral_gym.runs.run import Run
from ral_gym.runs.storage import load_json, save_json, write_text

QUICK = {"updates": 20, "samples": 1000, "level_samples": 500}
SHARPENED = 0.85
"""The second temperature of every row: a gain that is only sharpening is gone there."""
WAIT_SECONDS = 2.0
CONTROLS = ("mle", "mle_continued")
T = TypeVar("T")


@dataclass
class Arguments:
    """Which part of the grid, and how large."""

    seeds: tuple[int, ...] | None = None
    """Seeds, one base run each. None: 0 1 2, or 0 with --quick."""
    groups: tuple[Group, ...] = GROUPS
    """Which ablations to make; the reference and the controls come along."""
    quick: bool = False
    """20 updates, 1,000 samples a row (500 with two levels), one seed."""
    preset: str = "demo-patchgan"
    """One level: where the base runs and the reference's settings come from."""
    two_level_preset: str = "demo-2level"
    """The same for the group `levels`."""
    updates: int | None = None
    """Updates of every variant but partial generation at equal time. None: the presets', or 20 with --quick."""
    samples: int | None = None
    """Images per row of the table. None: the presets', or those of --quick."""
    partial_updates: int | None = None
    """Updates of partial generation at equal time. None: derived from the time of the other runs."""
    runs: str = "runs"
    """Folder that holds the run folders."""
    name: str = "ablation"
    """Folder in it for the variants, the table and the figure."""
    quiet: bool = False
    """No progress bars."""

    def check(self) -> None:
        """Fill in what --quick decides.

        Raises:
            ConfigError: nothing to do, or a count below 1.
        """
        if self.seeds is None:
            self.seeds = (0,) if self.quick else (0, 1, 2)
        if not self.seeds or not self.groups:
            raise ConfigError("there is nothing to do: give at least one of --seeds and one of --groups")
        if self.quick:
            self.updates = self.updates or QUICK["updates"]
        for name in ("updates", "samples", "partial_updates"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}: give an integer of 1 or more")
        for preset, levels in ((self.preset, 1), (self.two_level_preset, 2)):
            found = get_preset(preset).vqvae.levels
            if found != levels:
                raise ConfigError(f"preset '{preset}' has {found} level(s) of codes, not {levels}: choose another")

    def samples_of(self, preset: str) -> int:
        """Images per row."""
        quick = QUICK["samples" if preset == self.preset else "level_samples"] if self.quick else None
        return self.samples or quick or get_preset(preset).evaluation.n_samples


class Ablation:
    """One seed's variants from one base run.

    Args:
        arguments: the command's.
        seed: of the base run.
        preset: of the base run; the two-level one has its own folder.
        console: where to say what is done.
    """

    def __init__(self, arguments: Arguments, seed: int, preset: str, console: Console) -> None:
        self.arguments, self.console, self.seed = arguments, console, seed
        self.levels = get_preset(preset).vqvae.levels
        base = patiently(lambda: base_run(preset, seed, arguments.runs, console, arguments.quiet))
        folder = Path(arguments.runs) / arguments.name / (f"seed{seed}" + ("-levels" if self.levels == 2 else ""))
        measuring = replace(base.config.evaluation, n_samples=arguments.samples_of(preset))
        self.experiment = Experiment(base, folder, evaluation=measuring, progress=not arguments.quiet)
        self.config = reference_config(base.config, arguments.updates)
        self.folder = folder

    def run(self, groups: Sequence[str]) -> None:
        """The controls, the reference and the variants of these groups."""
        self.controls()
        reference = reference_of(self.config)
        self.variant(reference)
        for variant in LEVELS if self.levels == 2 else variants_of(self.config, groups):
            if variant.name not in reference.also:
                self.variant(variant)

    def controls(self) -> None:
        """MLE, and MLE continued for as many updates as the reference."""
        labels = ("MLE, 2 levels", "MLE cont., 2 levels") if self.levels == 2 else ("MLE", "MLE continued")
        mle, continued = (Variant(name, "controls", label) for name, label in zip(CONTROLS, labels, strict=True))
        if self.has(mle) and self.has(continued):
            return
        prior = patiently(lambda: self.experiment.continue_mle("mle_continued", self.config))
        run = Run(self.folder / "mle_continued", self.config)
        metrics = {"updates": self.config.ral.n_updates, **seconds_of(run, "prior_continued")}
        self.measured(mle, run, self.experiment.prior, {})
        self.measured(continued, run, prior, metrics)

    def variant(self, variant: Variant) -> None:
        """Train and measure one variant, unless that is done."""
        if self.has(variant):
            return
        config = variant.applied(self.config)
        if variant.name == "partial_equal_time":
            config = replace(config, ral=replace(config.ral, n_updates=self.equal_time()))
        self.say(f"{variant.label} ({config.ral.n_updates} updates)")
        run = patiently(lambda: self.experiment.train(variant.name, config))
        last = run.metrics("ral")[-1]
        metrics = {
            "updates": config.ral.n_updates,
            "images": config.ral.n_envs * config.ral.n_updates,
            "codes": int(last["time/total_timesteps"]),
            "heldout_auc": last["critic/heldout_auc"],
            **seconds_of(run, "ral"),
        }
        self.measured(variant, run, self.experiment.policy(run), metrics)

    def measured(self, variant: Variant, run: Run, prior: Prior, metrics: dict[str, Any]) -> None:
        """Measure at both temperatures, one process at a time, and write the variant's file."""

        def measure() -> dict[str, Any]:
            name = run.path.name
            with run.locked():
                return {f"{t:g}": self.experiment.measure(name, variant.name, prior, t) for t in (1.0, SHARPENED)}

        rows = patiently(measure)
        about = {key: getattr(variant, key) for key in ("name", "group", "label", "paper", "also", "changes")}
        extractor = self.experiment.base.config.evaluation.extractor
        place = {"levels": self.levels, "seed": self.seed, "extractor": extractor}
        save_json(self.file(variant), {**about, **place, **metrics, "rows": rows})
        self.say(f"{variant.label}: FD {rows['1']['fd']:.1f}")

    def equal_time(self) -> int:
        """Updates of partial generation in the reference's processor time, derived once and kept."""
        file = self.folder / "equal_time.json"
        if self.arguments.partial_updates is not None:
            return self.arguments.partial_updates
        if not file.exists():
            full, partial = (
                Run(self.folder / name, variant.applied(self.config))
                for name, variant in (
                    ("reference", Variant("", "", "")),
                    ("partial_equal_updates", Variant("", "", "", {"ral": {"reset_mode": "mixed"}})),
                )
            )
            budget, (start, each) = seconds_of(full, "ral")["cpu_seconds"], costs(partial)
            updates = max(1, round((budget - start) / each)) if each > 0 else partial.config.ral.n_updates
            save_json(file, {"updates": updates, "full_seconds": budget, "start": start, "seconds_per_update": each})
        kept = load_json(file)
        self.say(
            f"full generation took {kept['full_seconds']:.1f} s of one core; partial takes {kept['start']:.1f} s and "
            f"{kept['seconds_per_update']:.2f} s an update: {kept['updates']} updates fit (--partial-updates)"
        )
        return int(kept["updates"])

    def file(self, variant: Variant) -> Path:
        """Where the variant's metrics are kept; there once it is finished."""
        return self.folder / f"{variant.name}.json"

    def has(self, variant: Variant) -> bool:
        """Whether the variant is finished."""
        return self.file(variant).exists()

    def say(self, what: str) -> None:
        """One line about what is being done."""
        levels = " two levels," if self.levels == 2 else ""
        self.console.print(f"  seed {self.seed},{levels} {what}", highlight=False, soft_wrap=True)


def patiently(action: Callable[[], T]) -> T:
    """Do it as soon as no other process is at work in the same run folder."""
    while True:
        try:
            return action()
        except RunError as error:
            if "another process is at work" not in str(error):
                raise
            time.sleep(WAIT_SECONDS)


def seconds_of(run: Run, stage: str) -> dict[str, float]:
    """How long a stage took: on the clock, and of one core."""
    seconds = run.seconds()
    return {"seconds": seconds[stage], "cpu_seconds": seconds.get(f"{stage}_cpu", seconds[stage])}


def costs(run: Run) -> tuple[float, float]:
    """Processor seconds of a finished stage 3 before its first update (the critic's warm-up), and per update.

    The run's log has only the clock, which a busy machine stretches: it says how the processor time is shared out.
    """
    total, updates = seconds_of(run, "ral")["cpu_seconds"], run.config.ral.n_updates
    clock = [line["time/time_elapsed"] for line in run.metrics("ral")]
    each = (clock[-1] - clock[0]) / max(1, len(clock) - 1)
    if clock != sorted(clock) or each <= 0:  # interrupted, so that the clock began anew; or over in no time
        return 0.0, total / updates
    start = max(0.0, clock[0] - each)
    scale = total / (start + updates * each)
    return start * scale, each * scale


def check_settings(arguments: Arguments) -> Path:
    """The folder, made with these settings or found with the same.

    Raises:
        RunError: it was made with others.
    """
    folder = Path(arguments.runs) / arguments.name
    presets = [arguments.preset, arguments.two_level_preset]
    settings: dict[str, Any] = {"presets": presets, "updates": arguments.updates}
    settings |= {"samples": [arguments.samples_of(preset) for preset in presets]}
    reference = reference_config(get_preset(arguments.preset), arguments.updates)
    settings |= {"reference": described(reference), "normalised": reference.ral.normalize_advantage}
    return keep_settings(folder, settings)


def finished(folder: Path) -> Iterator[dict[str, Any]]:
    """Every finished variant of every seed."""
    for place in sorted(folder.glob("seed*")):
        for file in sorted(place.glob("*.json")):
            if file.name != "equal_time.json":
                yield load_json(file)


def main(argv: Sequence[str], console: Console) -> None:
    """Make what is missing of the grid, then the table and the figure of all that is there."""
    arguments = tyro.cli(Arguments, args=list(argv), description=__doc__)
    arguments.check()
    folder = check_settings(arguments)
    one_level = [group for group in arguments.groups if group != "levels"]
    for seed in arguments.seeds or ():
        if one_level:
            Ablation(arguments, seed, arguments.preset, console).run(one_level)
        if "levels" in arguments.groups:
            Ablation(arguments, seed, arguments.two_level_preset, console).run(["levels"])
    results = summary(list(finished(folder)), load_json(folder / "settings.json"), SHARPENED)
    save_json(folder / "results.json", results)
    write_text(folder / "table.md", markdown(results))
    save_figure(folder / "ablation.png", results)
    console.print(terminal_table(results))
    for sentence in sentences(results):
        console.print(sentence, highlight=False)
    for name in ("table.md", "ablation.png", "results.json"):
        console.print(f"  {folder / name}", highlight=False)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the networks are small: two processes side by side use two cores better
    sys.exit(run_command(main, sys.argv[1:]))
