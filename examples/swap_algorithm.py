"""Swap the algorithm: one flag, the same environment, the same starting prior, the same number of images.

    python examples/swap_algorithm.py                                  # toy and oracle, three seeds
    python examples/swap_algorithm.py --algos reinforce ppo dqn --env ral_gym/Toy-v0  # adds DQN to the same table
    python examples/swap_algorithm.py --env ral_gym/Faces-v0 --algos reinforce ppo a2c grpo
    python examples/swap_algorithm.py --env ral_gym/LatentCode-v0 --run runs/demo     # a run of your own

Every (algorithm, seed) trains an agent through the environment; a bar shows the reward of the images it draws. Ends
with a table per environment (means over the seeds) and learning curves over images, in ``runs/swap_algorithm``. A
finished pair is kept there and not run again, so that more seeds or algorithms can be added by the same command.

The policy-gradient algorithms start from one PixelCNN: that of the run, the one bundled with the environment, or, on
the toy, a small one with random weights (one per seed). DQN and QR-DQN learn a value per code and have no sequence
model: they start from nothing, look at one code at a time, and end with one image, the greedy one.

On ``ral_gym/Oracle-v0`` the agent earns log o - log pi for every code (`EntropyReward`), which is largest for the
oracle itself: KL(policy || oracle) tells how near it has come, exact over a position's codes, Monte Carlo over
prefixes. The reward in the table is the environment's own, log o alone, and could be had by sharpening.
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from evidence.learning_curves import save_learning_curves
from rich.console import Console
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.utils import LinearSchedule, set_random_seed

from ral_gym.agents import (
    ALGORITHMS,
    CodeVecEnv,
    EntropyReward,
    PriorWeights,
    algorithm_defaults,
    make_sb3_env,
    policy_for,
)
from ral_gym.agents.progress import EpisodeProgress
from ral_gym.assets import asset_path
from ral_gym.commands.ending import run_command
from ral_gym.envs.oracle import load_oracle
from ral_gym.errors import ConfigError, RunError
from ral_gym.metrics import entropy, sequence_kl
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.registry import allow_given
from ral_gym.report.tables import markdown_table, mean_and_interval, plain_table
from ral_gym.runs.storage import differences, load_json, save_json, write_text

ORACLE = "ral_gym/Oracle-v0"
BUNDLED_PRIORS = {"ral_gym/Faces-v0": "faces/prior.safetensors", ORACLE: "oracle/prior.safetensors"}
# What differs from `algorithm_defaults`. From random weights there is no pretrained start to stay near: larger steps,
# and an entropy bonus, without which policy gradients often settle on one flawed image of the toy.
FROM_SCRATCH: dict[str, dict[str, Any]] = {
    "reinforce": {"learning_rate": 3e-3, "ent_coef": 0.1},
    "grpo": {"learning_rate": 3e-3, "ent_coef": 0.1},
    "a2c": {"learning_rate": 3e-3, "ent_coef": 0.1},
    "ppo": {"learning_rate": 3e-3, "ent_coef": 0.05, "clip_range": 0.2, "target_kl": None, "n_epochs": 4},
    "maskable_ppo": {"learning_rate": 3e-3, "ent_coef": 0.05, "clip_range": 0.2, "target_kl": None, "n_epochs": 4},
    "trpo": {"learning_rate": 3e-3, "target_kl": 0.05, "cg_max_steps": 5, "n_critic_updates": 1},
    "dqn": {"learning_rate": 1e-3},
    "qrdqn": {"learning_rate": 1e-3},
}
PRETRAINED: dict[str, dict[str, Any]] = {
    "a2c": {"learning_rate": 1e-4},  # SB3's 7e-4 is RMSProp's
    "ppo": {"learning_rate": 1e-4},
    "maskable_ppo": {"learning_rate": 1e-4},
}
# A reward per code, so that the value head learns from every code: with gae_lambda 1 its errors over 64 of them drown
# the signal (PPO at 4,096 images: KL 0.369 instead of 0.328). Tuned on seed 100.
ON_ORACLE: dict[str, dict[str, Any]] = {
    "reinforce": {"learning_rate": 3e-4},
    "grpo": {"learning_rate": 3e-4},
    "a2c": {"learning_rate": 3e-4, "gae_lambda": 0.5},
    "ppo": {"learning_rate": 3e-4, "gae_lambda": 0.5},
    "maskable_ppo": {"learning_rate": 3e-4, "gae_lambda": 0.5},
    "trpo": {"learning_rate": 1e-3, "gae_lambda": 0.5, "target_kl": 0.002, "cg_max_steps": 3},
}
IMAGES = {"ral_gym/Toy-v0": 8_192}
IMAGES_ELSEWHERE = 2_560


@dataclass
class Arguments:
    """What to compare, on what."""

    algos: tuple[str, ...] = ("reinforce", "ppo", "a2c", "trpo", "grpo")
    """Algorithms to compare; maskable_ppo too, dqn and qrdqn, which are slow, and your own `module:Class`."""
    env: tuple[str, ...] = ("ral_gym/Toy-v0", ORACLE)
    """Registered environments."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds to average over."""
    images: int | None = None
    """Images that every algorithm draws, rounded up to whole rounds of `n_envs`. None: 8,192 on the toy, else 2,560."""
    n_envs: int = 64
    """Environments, that is images per update of a policy gradient."""
    evaluation_images: int = 512
    """Images drawn from every finished agent for the table."""
    learning_rate: float | None = None
    """Initial learning rate of all algorithms; it falls to 0. None: each algorithm's own."""
    run: str | None = None
    """Run folder, for `ral_gym/LatentCode-v0`."""
    prior: str | None = None
    """File or run folder of the PixelCNN to start from. None: the environment's own."""
    runs: str = "runs"
    """Folder of the runs; results, table and curves go to its `swap_algorithm`."""
    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:N`; small networks are faster on the CPU."""
    quiet: bool = False
    """No progress bars."""

    def check(self) -> None:
        """Raise `ConfigError` for what cannot be compared; algorithms that cannot draw codes are told why."""
        for algo in self.algos:
            policy_for(algo)
        least = min(1 if self.images is None else self.images, self.n_envs, self.evaluation_images)
        if not self.algos or not self.env or not self.seeds or least < 1:
            raise ConfigError("at least one algorithm, seed, image and environment are needed")
        for name in self.env:
            if name not in gym.registry:
                ours = ", ".join(known for known in gym.registry if known.startswith("ral_gym/"))
                raise ConfigError(f"environment '{name}' is unknown: choose one of {ours}")
        if "ral_gym/LatentCode-v0" in self.env and self.run is None:
            raise ConfigError("ral_gym/LatentCode-v0 draws in the codes of a run: give --run runs/NAME")

    def task(self, env: str) -> "Task":
        """What is compared in one of the environments."""
        images = self.images or IMAGES.get(env, IMAGES_ELSEWHERE)
        run = self.run if env == "ral_gym/LatentCode-v0" else None
        file = self.prior or run
        if file is None and env in BUNDLED_PRIORS:
            file = str(asset_path(BUNDLED_PRIORS[env]))
        return Task(self, env, math.ceil(images / self.n_envs) * self.n_envs, run, file)


@dataclass(frozen=True)
class Task:
    """One environment: how many images, and which PixelCNN all start from (None: one with random weights)."""

    arguments: Arguments
    env: str
    images: int
    run: str | None
    prior_file: str | None

    @property
    def folder(self) -> Path:
        """Its pairs and curves."""
        return Path(self.arguments.runs) / "swap_algorithm" / self.env.replace("/", "-")

    def environment(self, count: int, seed: int) -> CodeVecEnv:
        """Environments for SB3."""
        run: dict[str, Any] = {"run": self.run} if self.run else {}
        return make_sb3_env(self.env, count, reset_mode="full", seed=seed, device=self.arguments.device, **run)

    def settings(self, algo: str) -> dict[str, Any]:
        """What a result depends on, besides the seed."""
        names = ("n_envs", "evaluation_images", "learning_rate", "prior", "device")
        shared = {name: getattr(self.arguments, name) for name in names}
        return shared | {"env": self.env, "images": self.images, "run": self.run, "algorithm": self.keywords(algo)}

    def keywords(self, algo: str) -> dict[str, Any]:
        """What differs from `algorithm_defaults`."""
        from_scratch = self.prior_file is None or not learns_prior(algo)
        own = FROM_SCRATCH if from_scratch else ON_ORACLE if self.env == ORACLE else PRETRAINED
        rate = self.arguments.learning_rate
        return own.get(algo, {}) | ({} if rate is None else {"learning_rate": rate})


def main(argv: Sequence[str], console: Console) -> None:
    """Train every pair that has not been, then print the tables and draw the curves."""
    allow_given(argv)
    arguments = tyro.cli(Arguments, args=list(argv), description=__doc__)
    arguments.check()
    torch.set_num_threads(1)  # small networks: more threads would wait for each other
    everything: dict[str, Any] = {}
    parts: list[str] = []
    for task in map(arguments.task, arguments.env):
        results: dict[str, list[dict[str, Any]]] = {algo: [] for algo in arguments.algos}
        for seed in arguments.seeds:  # seed by seed: stopped early, every algorithm has had its share
            for algo in arguments.algos:
                results[algo].append(run_pair(algo, seed, task))
        everything[task.env] = results
        save_plot(task.folder / "learning_curves.png", results, task)
        headings, rows, caption = comparison(results, task)
        title = f"{task.env}, {task.images:,} images, seeds {', '.join(map(str, arguments.seeds))}"
        console.print(plain_table(headings[:-1], [row[:-1] for row in rows], title=title), "")
        parts.append(f"`{task.env}`, {task.images:,} images:\n\n" + markdown_table(headings, rows, caption))
        if value_based := [algo for algo in results if not learns_prior(algo)]:
            console.print(
                f"{' and '.join(value_based)}: from scratch, without the prior; judged greedily, on one image"
            )
        console.print(f"  {task.folder / 'learning_curves.png'}", highlight=False)
    folder = Path(arguments.runs) / "swap_algorithm"
    save_json(folder / "results.json", everything)
    write_text(folder / "table.md", "\n".join(parts))
    for name in ("table.md", "results.json"):
        console.print(f"  {folder / name}", highlight=False)


def learns_prior(algo: str) -> bool:
    """Whether an algorithm trains a PixelCNN; the others learn a value per code."""
    return policy_for(algo) != "MlpPolicy"


def run_pair(algo: str, seed: int, task: Task) -> dict[str, Any]:
    """The result of one algorithm and seed: read if it is there, else trained.

    Raises:
        RunError: existing results were made with other settings.
    """
    path, settings = task.folder / f"{algo}-seed{seed}.json", task.settings(algo)
    if path.exists():
        result = load_json(path)
        if others := differences(result["settings"], settings):
            raise RunError(f"{path} has other settings ({'; '.join(others[:3])}): remove it, or choose another --runs")
        return result
    result = train(algo, seed, task)
    save_json(path, {"settings": settings, "algo": algo, "seed": seed} | result)
    return load_json(path)


def train(algo: str, seed: int, task: Task) -> dict[str, Any]:
    """One agent from the starting prior to the last image."""
    environment = task.environment(task.arguments.n_envs, seed)
    model = make_model(algo, environment, seed, task)
    start = evaluate(model, seed, task)
    set_random_seed(seed)
    # The oracle's log-probability alone is highest for one image; with log o - log pi the optimum is the oracle itself.
    bonus = [EntropyReward()] if task.env == ORACLE and learns_prior(algo) else []
    progress = EpisodeProgress(task.images, f"{algo}, seed {seed}", task.arguments.quiet, divergence=bool(bonus))
    began, cpu_began = time.perf_counter(), time.process_time()
    model.learn(task.images * environment.core.grid.n_codes, callback=[*bonus, progress])
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    return {
        "images": len(progress.rewards),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "start": start,
        "final": evaluate(model, seed, task),
        "curve": progress.curve(),
    }


def make_model(algo: str, environment: CodeVecEnv, seed: int, task: Task) -> BaseAlgorithm:
    """The algorithm with its defaults, from the starting prior."""
    keywords = algorithm_defaults(algo, environment) | task.keywords(algo)
    if learns_prior(algo):
        keywords["policy_kwargs"] = keywords.get("policy_kwargs", {}) | {"prior": starting_prior(seed, task)}
    if "learning_rate" in keywords:
        # With a constant rate an agent that has solved its task can still lose it: normalised advantages stay large.
        keywords["learning_rate"] = LinearSchedule(keywords["learning_rate"], 0.0, 1.0)
    return ALGORITHMS[algo](policy_for(algo), environment, seed=seed, device=task.arguments.device, **keywords)


def starting_prior(seed: int, task: Task) -> PriorWeights:
    """The PixelCNN that all algorithms start from."""
    if task.prior_file is not None:
        return PriorWeights.of(task.prior_file)
    grid = task.environment(1, seed).core.grid
    torch.manual_seed(seed)
    small: dict[str, Any] = {"hidden_units": 24, "residual_units": 24, "layers": 1, "conv_filter_size": 3}
    return PriorWeights.of(PixelCNN(grid.codebook_size, grid.height, grid.width, **small))


def evaluate(model: BaseAlgorithm, seed: int, task: Task) -> dict[str, Any]:
    """The environment's reward and the variety of fresh images, drawn at random; a value-based agent's best guess."""
    set_random_seed(seed)
    count = task.arguments.evaluation_images
    environment = task.environment(count, seed)
    prior: Any = getattr(model.policy, "prior", None)
    observations: Any = environment.reset()
    for _ in range(environment.core.grid.n_codes):
        actions, _ = model.predict(observations, deterministic=prior is None)
        observations, _, _, infos = environment.step(actions)
    codes = np.stack([info["codes"] for info in infos]).astype(np.int64)  # (B, T)
    metrics: dict[str, Any] = {
        "reward": float(np.mean([info["episode"]["r"] for info in infos])),
        "distinct": len(np.unique(codes, axis=0)) / count,
        "entropy": None,
        "kl": None,
    }
    if prior is not None:
        drawn = torch.as_tensor(codes, device=model.device)
        metrics["entropy"] = entropy(prior, drawn)
        if task.env == ORACLE:
            metrics["kl"] = sequence_kl(prior, load_oracle(task.arguments.device), drawn)
    return metrics


def comparison(results: dict[str, list[dict[str, Any]]], task: Task) -> tuple[list[str], list[list[str]], str]:
    """Headings, rows and caption: first the starting prior, then an algorithm each; the last column is per seed."""
    key, name, digits = ("kl", "KL to\noracle", 4) if task.env == ORACLE else ("reward", "reward", 3)
    headings = [name, *(["reward"] if key == "kl" else []), "entropy", "distinct", "CPU s", f"{key}, per seed"]

    def row(label: str, metrics: list[dict[str, Any]], cpu: str) -> list[str]:
        main_values = [one[key] for one in metrics]
        cells = [mean_and_interval(main_values, digits)]
        cells += [mean_and_interval([one["reward"] for one in metrics], 1)] if key == "kl" else []
        cells += [mean_and_interval([one["entropy"] for one in metrics], 2)]
        cells += [f"{np.mean([one['distinct'] for one in metrics]):.0%}", cpu]
        return [label, *cells, " / ".join("-" if value is None else f"{value:.3f}" for value in main_values)]

    starts = next((runs for algo, runs in results.items() if learns_prior(algo)), [])
    rows = [row("(start)", [run["start"] for run in starts], "-")] if starts else []
    for algo, runs in results.items():
        rows.append(row(algo, [run["final"] for run in runs], f"{np.mean([r['cpu_seconds'] for r in runs]):.0f}"))
    several = len(task.arguments.seeds) > 1
    caption = (
        f"Seeds {', '.join(map(str, task.arguments.seeds))}"
        f"{'; means ± half the 95 % interval over them (Student t)' if several else ''}. Measured on "
        f"{task.arguments.evaluation_images} fresh images per seed; entropy {'and KL ' if key == 'kl' else ''}in nats "
        f"per code. CPU s: of one thread, per seed. {task.arguments.n_envs} images an update."
    )
    return ["algorithm", *headings], rows, caption


def save_plot(path: Path, results: dict[str, list[dict[str, Any]]], task: Task) -> None:
    """Learning curves of the images drawn in training: KL to the oracle, or reward."""
    key = "kl" if task.env == ORACLE else "reward"
    label = "KL(policy || oracle), nats per code" if key == "kl" else "mean reward of the images drawn in training"
    shown = {algo: runs for algo, runs in results.items() if all(key in run["curve"] for run in runs)}
    curves = {algo: (runs[0]["curve"]["images"], [run["curve"][key] for run in runs]) for algo, runs in shown.items()}
    dashed = [algo for algo in shown if not learns_prior(algo)]
    seeds = ", ".join(map(str, task.arguments.seeds))
    caption = (
        f"Lines: mean over seeds {seeds}; bands: least to greatest seed. {task.arguments.n_envs} images an update."
    )
    if dashed:
        caption += "\nDashed: learns a value per code from scratch, without the starting prior; exploration included."
    title = f"{task.env}: the same start, another algorithm"
    save_learning_curves(path, curves, ylabel=label, title=title, caption=caption, dashed=dashed)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
