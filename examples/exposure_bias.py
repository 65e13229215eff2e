"""Exposure bias, a lesson: does a model suffer from its own mistakes, and does a cure help? Measured against an oracle.

    python examples/exposure_bias.py                              # three seeds: the cures compared, and two poor models
    python examples/exposure_bias.py --seeds 0 --no-weak --no-ral     # one seed, without the poor models and the critic
    python examples/exposure_bias.py --policy runs/x/policy.safetensors   # and any PixelCNN of the same code grid

First two episodes of ``ral_gym/Oracle-v0``, code by code: one follows a sample of the oracle (teacher-forced), one
follows the model itself (free-running). One episode proves nothing, so that batches follow: models on their own
prefixes and on the oracle's (EB-C, He et al., 2021; accumulated error, Arora et al., 2022), completions of an oracle's
beginning, and recovery from a spoilt one. Every verdict is made of the numbers and their 95 % intervals.

The models: `light`, the bundled prior, and four that continue it for equally many updates, each of equally many images
and at the same learning rate. `mle`: on fresh samples of the oracle. `scheduled_sampling`: on the same ones, partly
replaced by its own codes. `ral`: REINFORCE with a critic's scores of the decoded images, co-trained against the bundled
samples of the oracle. `true_reward`: REINFORCE with log o - log p, KL(p || o) itself, which no real data offer: what
RAL could do with a perfect reward. Beside them two PixelCNNs that are poor on purpose.

Writes ``table.md``, ``exposure.json``, ``exposure_*.png`` and ``exposure.gif`` (the two episodes side by side) into
``runs/exposure_bias``, and each seed's models and figures into a folder of its own: run again, it continues. The lesson
in words, with exercises: docs/exposure_bias.md.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from evidence.exposure_figures import Episode, save_animation, save_comparison, save_plots
from evidence.exposure_lesson import (
    Numbers,
    Protocol,
    compare,
    draw,
    lines_of,
    markdown,
    measure,
    measure_recovery,
    rarity,
    table_of,
)
from evidence.exposure_models import Recipe, make_model
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ral_gym.commands.ending import run_command
from ral_gym.envs.oracle import load_light_prior, load_oracle
from ral_gym.errors import ConfigError, RunError
from ral_gym.metrics.divergences import conditional_log_probs, kl
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.runs.storage import differences, load_json, load_module, load_tensors, save_json, save_module, write_text

ATTEMPTS = 5  # Free-running episodes played until one has a wrong code to show.
POOR = ("small", "memoriser")
NOT_SETTINGS = ("seeds", "runs", "quiet", "quick", "policy", "weak", "scheduled_sampling", "ral", "true_reward")


@dataclass
class Arguments:
    """What to compare, how often, and where it goes."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of all that is trained and drawn. The first one's figures are drawn, and its poor models trained."""
    runs: str = "runs"
    """Its folder `exposure_bias` gets plots, animation and numbers."""
    scheduled_sampling: bool = True
    """Continue the light prior by scheduled sampling."""
    ral: bool = True
    """Continue it by RAL with a critic: more than half of the time that training takes."""
    true_reward: bool = True
    """Continue it by REINFORCE with the reward log o - log p."""
    weak: bool = True
    """Also train two poor PixelCNNs: one too small, one that has seen only 64 images."""
    policy: tuple[str, ...] = ()
    """Files of further PixelCNNs over the same grid, such as a RAL policy."""
    updates: int = 40
    """Updates by which the light prior is continued."""
    batch: int = 128
    """Images per update: fresh samples of the oracle, or of the policy."""
    learning_rate: float = 3e-4
    """Adam's, in all four."""
    way: Literal["two_pass", "sequential"] = "two_pass"
    """How scheduled sampling draws the model's own codes."""
    share: float = 0.5
    """The share of own codes that scheduled sampling reaches at the last update, on a straight line."""
    critic_warmup: int = 200
    """Critic steps before RAL's first update."""
    critic_steps: int = 5
    """Critic steps per update."""
    mle_coef: float = 0.0
    """RAL's share of maximum likelihood on the bundled samples of the oracle; the preset `demo-patchgan` has 0.1."""
    weak_steps: int = 500
    """Training steps of each poor PixelCNN."""
    n: int = 1024
    """Images drawn by each model, and by the oracle."""
    n_prefixes: int = 256
    """Beginnings of the oracle's that are continued or spoilt."""
    corrupted: float = 0.5
    """Share of the codes in the last row of the beginning that are replaced by random ones."""
    corrupted_rows: int = 4
    """Rows of that beginning."""
    wrong: float = 0.001
    """A code is wrong if the oracle draws it, or a code as unlikely, with a smaller probability than this."""
    quick: bool = False
    """A few seconds, to see that it runs: too few images for any verdict. Goes into `exposure_bias_quick`."""
    quiet: bool = False
    """No progress bars."""

    def check(self) -> None:
        """Raise `ConfigError` for what cannot be measured."""
        if self.quick:
            self.n, self.n_prefixes, self.weak_steps = min(self.n, 24), min(self.n_prefixes, 4), min(self.weak_steps, 5)
            self.updates, self.batch = min(self.updates, 2), min(self.batch, 8)
            self.critic_warmup, self.critic_steps = min(self.critic_warmup, 2), min(self.critic_steps, 1)
        steps = (self.weak_steps, self.updates, self.critic_warmup, self.critic_steps)
        if min(self.n, self.n_prefixes, self.batch) < 2 or min(steps) < 1:
            raise ConfigError("n, n_prefixes and batch must be at least 2, for an interval, and all steps at least 1")
        if not 0 < self.wrong < 1:
            raise ConfigError(f"wrong={self.wrong} is not a probability: give a number between 0 and 1, such as 0.001")
        if not 0 <= self.share <= 1:
            raise ConfigError(f"share={self.share} is not a probability: give a number from 0 to 1")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds {self.seeds}: give at least one, none twice")

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return Path(self.runs) / ("exposure_bias_quick" if self.quick else "exposure_bias")

    @property
    def protocol(self) -> Protocol:
        """What is measured."""
        return Protocol(self.n, self.n_prefixes, self.corrupted, self.corrupted_rows, self.wrong)

    @property
    def recipe(self) -> Recipe:
        """How the models are trained."""
        return Recipe(**{entry.name: getattr(self, entry.name) for entry in fields(Recipe)})

    def models(self, first: bool) -> list[str]:
        """The names of the models of a seed."""
        cures = [name for name in ("scheduled_sampling", "ral", "true_reward") if getattr(self, name)]
        return ["light", "mle", *cures, *(POOR if self.weak and first else ())]


def main(argv: Sequence[str], console: Console) -> None:
    """The episodes, the measurements, the pictures."""
    arguments = tyro.cli(Arguments, args=list(argv), description=__doc__)
    arguments.check()
    folder, oracle, first = arguments.folder, load_oracle(), arguments.seeds[0]
    episodes = tell_story(load_module(load_light_prior(), PixelCNN), oracle, arguments, console)
    save_animation(folder / "exposure.gif", episodes, oracle.width, arguments.wrong)
    console.print(
        "\n[bold]2. Many images.[/] Two episodes prove nothing; what follows are means with 95 % intervals.",
        markup=True,
    )
    results = {seed: measure_seed(seed, arguments, oracle, seed == first, console) for seed in arguments.seeds}
    comparison = compare(results)
    console.print("\n[bold]3. The cures compared.[/]", markup=True)
    console.print(table_of(comparison, arguments.seeds))
    save_plots(folder, results[first], oracle.width)
    shown = {name: row for name, row in comparison.items() if name not in POOR}
    save_comparison(folder / "exposure_comparison.png", shown)
    write_text(folder / "table.md", markdown(comparison, arguments.seeds, caption(arguments)))
    save_results(folder / "exposure.json", results, comparison, episodes, arguments)
    console.print(f"\nTable, pictures and numbers: {folder}/", highlight=False)


def measure_seed(
    seed: int, arguments: Arguments, oracle: PixelCNN, first: bool, console: Console
) -> dict[str, Numbers]:
    """All models of one seed: read, where they were measured before, else trained and measured."""
    folder, results = arguments.folder / f"seed{seed}", {}
    check_settings(folder / "settings.json", arguments)
    protocol = arguments.protocol
    fresh = draw(oracle, max(protocol.n, protocol.n_prefixes), 1000 * seed + 1)  # no model was trained on these
    others = policies(arguments, oracle)
    for name in (*arguments.models(first), *others):
        file = folder / f"{name}.json"
        result = load_json(file) if file.exists() and name not in others else {}
        if "compared" not in result or (first and "prefix" not in result):
            if not (arguments.quiet or name in others):
                console.print(f"Seed {seed}: training and measuring {name} ...", highlight=False)
            model, facts = (others[name], {}) if name in others else load_trained(name, seed, folder, arguments)
            result = {**facts, **measure(model, oracle, fresh, protocol, 1000 * seed)}
            if first:
                result |= measure_recovery(model, oracle, fresh, protocol, 1000 * seed)
            if name not in others:
                save_json(file, result)
        results[name] = result
        report(name, seed, result, arguments.wrong if first else None, console)
    return results


def check_settings(file: Path, arguments: Arguments) -> None:
    """Refuse to go on with other settings than those a seed's folder was made with."""
    here = {name: value for name, value in asdict(arguments).items() if name not in NOT_SETTINGS}
    found = differences(load_json(file), here) if file.exists() else []
    if found:
        raise RunError(f"{file.parent} was made with other settings ({'; '.join(found[:3])}): give another --runs")
    save_json(file, here)


# ---- the models --------------------------------------------------------------------------------------------------


def policies(arguments: Arguments, oracle: PixelCNN) -> dict[str, PixelCNN]:
    """The PixelCNNs of the files that were given, by name."""
    models: dict[str, PixelCNN] = {}
    for number, file in enumerate(arguments.policy):
        model: PixelCNN = load_module(Path(file), PixelCNN)
        if model.grid != oracle.grid:
            raise ConfigError(f"{file} draws {model.grid}, the oracle {oracle.grid}: give a PixelCNN of the same grid")
        name = Path(file).stem
        models[f"{name}_{number}" if name in (*models, *arguments.models(True)) else name] = model
    return models


def load_trained(name: str, seed: int, folder: Path, arguments: Arguments) -> tuple[PixelCNN, Numbers]:
    """A model of a seed and the figures of its training; trained, unless its file is there."""
    if name == "light":
        return make_model(name, seed, arguments.recipe)
    file = folder / f"{name}.safetensors"
    if not file.exists():
        model, facts = make_model(name, seed, arguments.recipe)
        save_module(file, model, None, **facts)
    facts = {fact: value for fact, value in load_tensors(file)[1].items() if fact == "critic_auc"}
    return load_module(file, PixelCNN), facts


# ---- two episodes ------------------------------------------------------------------------------------------------


def tell_story(model: PixelCNN, oracle: PixelCNN, arguments: Arguments, console: Console) -> dict[str, Episode]:
    """Play a teacher-forced and a free-running episode, and say row by row what happened."""
    seed = 1000 * arguments.seeds[0]
    episodes = {"teacher-forced": play(model, oracle, seed, draw(oracle, 1, seed + 1)[0])}
    for attempt in range(ATTEMPTS):
        episodes["free-running"] = play(model, oracle, seed + attempt, None)
        if episodes["free-running"].first_wrong(arguments.wrong) is not None:
            break
    console.print(
        "\n[bold]1. Two episodes.[/] State: the codes so far; action: the next code; reward: its log-probability under "
        "the oracle. Left, the codes are a sample of the oracle, and the model only says what it would have drawn, as "
        "in training. Right, the model's codes are its own context. KL(oracle || model), in nats per code, is how "
        "wrong its next code's distribution is.",
        markup=True,
    )
    table = Table("row", "KL, teacher-forced", "KL, free-running", "reward, teacher-forced", "reward, free-running")
    for row in range(oracle.height):
        codes = slice(row * oracle.width, (row + 1) * oracle.width)
        kls = [f"{np.mean(episode.kl[codes]):.2f}" for episode in episodes.values()]
        table.add_row(str(row + 1), *kls, *(f"{np.mean(one.rewards[codes]):.2f}" for one in episodes.values()))
    console.print(table)
    console.print(
        f"Shown is free-running episode {attempt + 1} of at most {ATTEMPTS}: the first with a wrong code, which the "
        f"oracle draws, or one as unlikely, with a probability below {arguments.wrong:g}."
    )
    for name, episode in episodes.items():
        at = episode.first_wrong(arguments.wrong)
        if at is None:
            console.print(f"{name}: no wrong code.")
            continue
        console.print(
            f"{name}: the first wrong code is number {at + 1} (row {at // oracle.width + 1}, column "
            f"{at % oracle.width + 1}): the oracle draws one as unlikely with probability {episode.rarity[at]:.1e}. "
            + ", ".join(f"KL behind it, {other}: {np.mean(one.kl[at + 1 :]):.2f}" for other, one in episodes.items())
            if at + 1 < len(episode.kl)
            else f"{name}: the first wrong code is number {at + 1}, the last one."
        )
    return episodes


@torch.no_grad()
def play(model: PixelCNN, oracle: PixelCNN, seed: int, given: Tensor | None) -> Episode:
    """One episode of the environment: along the codes (T,) that are given, or, without them, along the model's own."""
    env = gym.make("ral_gym/Oracle-v0", render_mode="rgb_array")
    generator = torch.Generator().manual_seed(seed)
    observation, _ = env.reset(seed=seed)
    episode, terminated = Episode(frames=[_picture(env)]), False
    while not terminated:
        position = len(episode.codes)
        codes = torch.from_numpy(observation).long()[None]  # (1, T)
        log_p = conditional_log_probs(model, codes)[0, position]  # (K,)
        log_o = conditional_log_probs(oracle, codes)[0, position]  # (K,)
        own = torch.multinomial(log_p.exp(), 1, generator=generator)[0]
        code = own if given is None else given[position]
        observation, reward, terminated, _, _ = env.step(int(code))
        episode.codes.append(int(code))
        episode.rewards.append(float(reward))
        episode.kl.append(float(kl(log_o, log_p)))
        episode.rarity.append(float(rarity(log_o, code)))
        episode.frames.append(_picture(env))
    env.close()
    return episode


def _picture(env: gym.Env[Any, Any]) -> np.ndarray:
    return np.asarray(env.render(), np.uint8)


# ---- what is said of them ----------------------------------------------------------------------------------------


def report(name: str, seed: int, result: Numbers, threshold: float | None, console: Console) -> None:
    """The lesson of one model; without a threshold its verdict alone."""
    if threshold is None:
        console.print(f"seed {seed}, {name}: {result['verdict']}", highlight=False, markup=False)
        return
    nll = result["compared"]["nll_test"]["value"]
    title = f"\n[bold]{name}[/], seed {seed} (held-out NLL {nll:.3f} nats per code)"
    console.print(title, highlight=False, markup=True)
    for line in lines_of(result, threshold):
        console.print(f"  {line}", highlight=False, markup=False)
    console.print(f"  => {name}: {result['verdict']}", style="bold", highlight=False, markup=False)


def caption(arguments: Arguments) -> str:
    """The text under the table."""
    seeds = ", ".join(map(str, arguments.seeds))
    over_seeds = "Student's t over the seeds (models of one seed: over images)"
    intervals = over_seeds if len(arguments.seeds) > 1 else "over images, of one training each"
    return (
        f"`ral_gym/Oracle-v0`, seeds {seeds}; nats per code; n = {arguments.n:,} images of each model and the oracle "
        f"per seed; ±: 95 %, {intervals}. All but `light`, `small` and `memoriser` "
        f"continue `light` for {arguments.updates} updates of {arguments.batch} images. Reward of `ral`: a co-trained "
        "critic's scores; of `true_reward`: log o - log p."
    )


def save_results(
    path: Path,
    results: dict[int, dict[str, Numbers]],
    comparison: dict[str, dict[str, Numbers]],
    episodes: dict[str, Episode],
    arguments: Arguments,
) -> None:
    """All numbers used in the text and the pictures."""
    played = {
        name: {key: value for key, value in vars(episode).items() if key != "frames"}
        | {"first_wrong": episode.first_wrong(arguments.wrong)}
        for name, episode in episodes.items()
    }
    values = {"settings": asdict(arguments), "episodes": played, "comparison": comparison, "seeds": results}
    save_json(path, values)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
