"""Does RL help beyond sharpening? Every recipe against the temperature curves of maximum likelihood.

    python examples/frontier.py                      # seeds 0, 1, 2 of the preset demo-patchgan
    python examples/frontier.py --quick              # one tiny seed: does everything run?

A lower sampling temperature lowers FD too, for nothing ("Language GANs Falling Short", Caccia et al., 2018). So the
controls are curves, FD over entropy at several temperatures: MLE; MLE continued for as many updates as RAL; `loo_fd`
without its reward, that is the share of maximum likelihood in its updates alone; and, with ``--equal-time``, which
nearly doubles the work, MLE continued for as much *time* as RAL with its critic took. The recipes are points beside
them, at T = 1 and below:

* the critic, the preset's RAL, with its checkpoints;
* `loo_fd`, the leave-one-out Frechet reward, by REINFORCE and by GRPO; `kid`, the kernel one; the critic and `loo_fd`;
* with ``--recipes encoder_loo_fd``: `loo_fd` on the VQ-VAE encoder's features instead of the pyramid's.

What a reward is computed on decides. Over 2,048 samples of MLE (seed 100), the leave-one-out rewards on the
evaluation's features correlate by -0.25 with those on the encoder's, and by +0.61 with those on the pyramid's.

Seeds and recipes are made once and kept in ``runs/frontier``: run again to continue. Seeds can be made side by side
(``--seeds 0`` and ``--seeds 1``); then ``--seeds 0 1 2`` draws them all. Where a run of the preset is finished
(``ral-gym train``), its networks and its measured rows are taken over.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import tyro
from evidence.frontier_report import PANELS, markdown, save_panels, sentences, summary, terminal_table
from evidence.settings import keep_settings
from rich.console import Console

from ral_gym.agents.experiment import Experiment
from ral_gym.commands.ending import run_command
from ral_gym.commands.train import base_run
from ral_gym.config import Config
from ral_gym.errors import ConfigError
from ral_gym.priors.base import Prior, config_of, load_prior
from ral_gym.runs.run import Run
from ral_gym.runs.storage import load_json, save_json, write_text
from ral_gym.stages.levels import load_generator

NEEDED = (*PANELS, "entropy", "nll_test", "memorisation", "precision")
"""A row without one of these was measured by an older version, and is not taken over."""


@dataclass(frozen=True)
class Recipe:
    """One way of RL.

    Attributes:
        label: in tables and figures.
        about: what it is, in a few words.
        changes: of the preset's stage 3.
    """

    label: str
    about: str
    changes: Mapping[str, Any] = field(default_factory=dict)


# Tuned on seed 100 only. A terminal reward is not discounted. After 20 updates (FD 22.5 at T = 1) more only sharpened.
SET_REWARD: dict[str, Any] = {
    "reward_features": "pyramid",
    "gamma": 1.0,
    "learning_rate": 5e-4,
    "mle_coef": 1.0,
    "n_updates": 20,
}
LOO_FD: dict[str, Any] = SET_REWARD | {"reward_weights": {"loo_fd": 1.0}}
RECIPES = {
    "critic": Recipe("RAL, critic", "the preset's RAL"),
    "loo_fd": Recipe("LOO-FD, REINFORCE", "the leave-one-out Frechet reward alone, on pyramid features", LOO_FD),
    "loo_fd_grpo": Recipe("LOO-FD, GRPO", "the same by GRPO", LOO_FD | {"algo": "grpo", "learning_rate": 3e-4}),
    "kid": Recipe("KID, REINFORCE", "the kernel reward", SET_REWARD | {"reward_weights": {"kid": 1.0}}),
    "critic_loo_fd": Recipe(
        "critic + LOO-FD",
        "both, each on its own scale",
        {
            "reward_weights": {"critic": 1.0, "loo_fd": 1.0},
            "reward_features": "pyramid",
            "gamma": 0.99,
            "mle_coef": 1.0,
            "n_updates": 30,
        },
    ),
    "encoder_loo_fd": Recipe(
        "LOO-FD, encoder features",
        "the reward on the VQ-VAE encoder's features",
        LOO_FD | {"reward_features": "encoder"},
    ),
}

NO_WEIGHT = 1e-12
"""Of a reward that is to have none: normalised advantages stay below 1e-3 then."""
DEFAULT = ("critic", "loo_fd", "loo_fd_grpo", "kid", "critic_loo_fd")


@dataclass
class Arguments:
    """Which seeds and recipes, and how finely."""

    seeds: tuple[int, ...] | None = None
    """Seeds, one base run each; those the recipes were tuned on are not among them. None: 0 1 2, or 0 with --quick."""
    recipes: tuple[str, ...] = DEFAULT
    """Recipes to train and measure beside the critic's; the controls come along."""
    preset: str | None = None
    """Preset of the base runs. None: demo, or smoke with --quick."""
    curve: tuple[float, ...] = (1.0, 0.9, 0.85, 0.75, 0.65)
    """Temperatures of the controls' curves."""
    temperatures: tuple[float, ...] = (1.0, 0.85, 0.75)
    """Temperatures of the recipes."""
    equal_time: bool = False
    """Also continue MLE for as long as the critic's RAL took: the strongest control, and the slowest."""
    quick: bool = False
    """A tiny preset, one seed, three temperatures, every control."""
    runs: str = "runs"
    """Folder that holds the run folders."""
    name: str = "frontier"
    """Folder in it for the variants, the table and the figure."""
    quiet: bool = False
    """No progress bars."""

    def check(self) -> None:
        """Fill in what --quick decides.

        Raises:
            ConfigError: nothing to do, an unknown recipe, or temperatures without 1.
        """
        self.seeds = self.seeds or ((0,) if self.quick else (0, 1, 2))
        self.preset = self.preset or ("smoke" if self.quick else "demo-patchgan")
        self.equal_time = self.equal_time or self.quick
        if self.quick:
            self.curve, self.temperatures = (1.0, 0.8, 0.6), (1.0, 0.8)
        unknown = [name for name in self.recipes if name not in RECIPES]
        if unknown or not self.recipes:
            raise ConfigError(f"recipes {' '.join(unknown) or 'none'}: choose some of {', '.join(RECIPES)}")
        for name in ("curve", "temperatures"):
            if 1.0 not in getattr(self, name) or min(getattr(self, name)) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: give 1 and any other temperatures above 0")


class Frontier:
    """One seed's controls and recipes, from one base run.

    Args:
        arguments: the command's.
        seed: of the base run.
        console: where to say what is done.
    """

    def __init__(self, arguments: Arguments, seed: int, console: Console) -> None:
        self.arguments, self.seed, self.console = arguments, seed, console
        self.base = base_run(str(arguments.preset), seed, arguments.runs, console, arguments.quiet)
        self.config = self.base.config
        self.folder = Path(arguments.runs) / arguments.name / f"seed{seed}"
        self.experiment = Experiment(self.base, self.folder, progress=not arguments.quiet)

    @cached_property
    def finished_base(self) -> bool:
        """Whether the base run has gone through stage 3 and its control, so that its networks can be taken."""
        return all(self.base.has(f"{name}.safetensors") for name in ("policy", "policy_ema", "prior_continued"))

    @cached_property
    def kept(self) -> dict[str, dict[float, dict[str, Any]]]:
        """Rows that the base run's evaluation has measured: generator -> temperature (checkpoints: updates) -> row."""
        if not (self.finished_base and self.base.has("results.json")):
            return {}
        results = load_json(self.base.file("results.json"))
        found = {name: {row["temperature"]: row for row in rows} for name, rows in results["sweeps"].items()}
        found["checkpoints"] = {row["updates"]: row for row in results["checkpoints"]}
        return {
            name: {key: row for key, row in rows.items() if all(row.get(figure) is not None for figure in NEEDED)}
            for name, rows in found.items()
        }

    def run(self) -> dict[str, Any]:
        """Every control and recipe; what `evidence.frontier_report` calls a seed."""
        recipes = {"critic": self.critic()}  # first: its time is the third control's
        curves = self.controls(recipes["critic"]["seconds"])
        for name in self.arguments.recipes:
            if name != "critic":
                recipes[name] = self.recipe(name)
        found = {"curves": curves, "recipes": {n: recipes[n] for n in RECIPES if n in recipes}}
        save_json(self.folder / "figures.json", found)
        return found

    def critic(self) -> dict[str, Any]:
        """The preset's RAL: the base run's, or one trained here."""
        run = self.base if self.finished_base else self.experiment.train("critic", self.config)
        policy = load_generator(run, "policy_ema", self.experiment.device)
        entry = self.entry("critic", run, "ral", policy)
        checkpoints = []
        for file in sorted(run.file("checkpoints").glob("policy_ema_*.safetensors")):
            updates = int(file.stem.rpartition("_")[2])
            row = self.kept.get("checkpoints", {}).get(updates)
            if row is None:
                prior = load_prior(file, self.experiment.device, config_of(policy))
                row = self.experiment.measure("critic", f"after {updates} updates", prior)
            checkpoints.append({"updates": updates, **row})
        return entry | {"checkpoints": checkpoints}

    def recipe(self, name: str) -> dict[str, Any]:
        """Another recipe, trained here."""
        config = recipe_config(self.config, name)
        self.say(f"{RECIPES[name].label}: {config.ral.n_updates} updates")
        run = self.experiment.train(name, config)
        return self.entry(name, run, None, self.experiment.policy(run))

    def entry(self, name: str, run: Run, kept: str | None, policy: Prior) -> dict[str, Any]:
        """A recipe's rows and what it cost."""
        ral, recipe = run.config.ral, RECIPES[name]
        return {
            "label": recipe.label,
            "about": recipe.about,
            "rows": self.rows(name, policy, self.arguments.temperatures, kept),
            "seconds": seconds_of(run, "ral"),
            "updates": ral.n_updates,
            "images": ral.n_updates * ral.n_envs,
        }

    def controls(self, critic_seconds: float) -> dict[str, Any]:
        """The curves of MLE and of MLE continued: equal updates, as `loo_fd` without its reward, the critic's time."""
        found: dict[str, Any] = {"mle": self.control("mle", self.experiment.prior, None, 0)}
        run = self.base
        if not self.finished_base:
            self.experiment.continue_mle("mle_continued", self.config)
            run = Run(self.folder / "mle_continued", self.config)
        continued = load_generator(run, "prior_continued", self.experiment.device)
        seconds = seconds_of(run, "prior_continued")
        found["mle_continued"] = self.control("mle_continued", continued, seconds, self.config.ral.n_updates)
        found["no_reward"] = self.no_reward()
        if not self.arguments.equal_time:
            return found
        updates = self.equal_time(critic_seconds, seconds)
        self.say(f"MLE continued for the time of the critic's RAL, {critic_seconds:.0f} s: {updates} updates")
        timed = replace(self.config, ral=replace(self.config.ral, n_updates=updates))
        name = "mle_continued_equal_time"
        prior = self.experiment.continue_mle(name, timed)
        spent = seconds_of(Run(self.folder / name, timed), "prior_continued")
        return found | {name: self.control(name, prior, spent, updates)}

    def no_reward(self) -> dict[str, Any]:
        """`loo_fd`'s training without the reward: its maximum-likelihood term, without dropout."""
        config = recipe_config(self.config, "loo_fd")
        config = replace(config, ral=replace(config.ral, reward_weights={"loo_fd": NO_WEIGHT}))
        run = self.experiment.train("no_reward", config)
        policy = self.experiment.policy(run)
        return self.control("no_reward", policy, seconds_of(run, "ral"), config.ral.n_updates)

    def control(self, name: str, prior: Prior, seconds: float | None, updates: int) -> dict[str, Any]:
        """A control's curve and what it cost after stage 2."""
        return {"rows": self.rows(name, prior, self.arguments.curve, name), "seconds": seconds, "updates": updates}

    def equal_time(self, critic_seconds: float, seconds: float) -> int:
        """Updates of maximum likelihood in the time of the critic's RAL, derived once and kept."""
        file = self.folder / "equal_time.json"
        if not file.exists():
            updates = max(1, round(self.config.ral.n_updates * critic_seconds / max(seconds, 0.1)))
            save_json(file, {"updates": updates, "ral_seconds": critic_seconds, "mle_continued_seconds": seconds})
        return int(load_json(file)["updates"])

    def rows(self, name: str, prior: Prior, temperatures: Sequence[float], kept: str | None) -> list[dict[str, Any]]:
        """A generator at several temperatures, as the base run has measured it or measured here."""
        known = self.kept.get(kept or "", {})
        return [known.get(t) or self.experiment.measure(name, name, prior, t) for t in temperatures]

    def say(self, what: str) -> None:
        """One line about what is being done."""
        self.console.print(f"  seed {self.seed}, {what}", highlight=False, soft_wrap=True)


def recipe_config(config: Config, name: str) -> Config:
    """The base run's settings with a recipe's changes; never more updates than the preset's own RAL."""
    changes = dict(RECIPES[name].changes)
    changes["n_updates"] = min(changes.get("n_updates", config.ral.n_updates), config.ral.n_updates)
    return replace(config, ral=replace(config.ral, **changes))


def seconds_of(run: Run, stage: str) -> float:
    """Processor seconds of a stage where they were booked (variants), else its time on the clock (base runs)."""
    seconds = run.seconds()
    return float(seconds.get(f"{stage}_cpu", seconds.get(stage, 0.0)))


def check_settings(arguments: Arguments) -> Path:
    """The folder, made with these settings or found with the same.

    Raises:
        RunError: it was made with others.
    """
    folder = Path(arguments.runs) / arguments.name
    settings = {name: asdict(arguments)[name] for name in ("preset", "curve", "temperatures")}
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    return keep_settings(folder, settings)


def main(argv: Sequence[str], console: Console) -> None:
    """Make what is missing of every seed, then the table, the verdict and the figure."""
    arguments = tyro.cli(Arguments, args=list(argv), description=__doc__)
    arguments.check()
    folder = check_settings(arguments)
    seeds = {str(seed): Frontier(arguments, seed, console).run() for seed in arguments.seeds or ()}
    row = next(iter(seeds.values()))["curves"]["mle"]["rows"][0]
    results: dict[str, Any] = {"settings": load_json(folder / "settings.json"), "n_samples": row["n"]}
    results |= {"extractor": row.get("extractor") or base_extractor(arguments), "seeds": seeds}
    results["table"] = summary(seeds)
    results["verdict"] = sentences(results)
    save_json(folder / "results.json", results)
    write_text(folder / "table.md", markdown(results))
    save_panels(folder / "frontier.png", results)
    console.print(terminal_table(results["table"], seeds))
    for sentence in results["verdict"]:
        console.print(sentence, highlight=False)
    for name in ("table.md", "frontier.png", "results.json"):
        console.print(f"  {folder / name}", highlight=False)


def base_extractor(arguments: Arguments) -> str:
    """The features that the preset's evaluation looks at."""
    from ral_gym.presets import get_preset

    return get_preset(str(arguments.preset)).evaluation.extractor


if __name__ == "__main__":
    torch.set_num_threads(1)  # the networks are small: two processes side by side use two cores better
    sys.exit(run_command(main, sys.argv[1:]))
