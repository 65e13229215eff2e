"""Swap the algorithm: one flag, the same environment, the same starting prior, the same number of images.

    python examples/swap_algorithm.py                               # every policy gradient on the toy, three seeds
    python examples/swap_algorithm.py --algos reinforce ppo dqn     # adds DQN to the same table
    python examples/swap_algorithm.py --env ral_gym/Faces-v0 --algos reinforce ppo a2c grpo --images 4096
    python examples/swap_algorithm.py --env ral_gym/LatentCode-v0 --run runs/demo  # a run of your own

Every (algorithm, seed) trains an agent through the environment; a bar shows the reward of the images it draws. Ends
with a table (reward, time, entropy; means over the seeds) and learning curves over images, in ``runs/swap_algorithm``.
A finished pair is kept there and not run again, so that more seeds or algorithms can be added by the same command.
On the toy, seconds of one CPU core per pair: REINFORCE, GRPO, A2C 3, PPO 20, TRPO 35, DQN 110.

The policy-gradient algorithms start from one PixelCNN: that of the run, the one bundled with the environment, or, on
the toy, a small one with random weights (one per seed). DQN and QR-DQN learn a value per code and have no sequence
model: they start from nothing, look at one code at a time, and end with one image, the greedy one.
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import LinearSchedule, set_random_seed
from tqdm import tqdm

from ral_gym.agents import (
    ALGORITHMS,
    CodeVecEnv,
    EntropyReward,
    PriorWeights,
    algorithm_defaults,
    make_sb3_env,
    policy_for,
)
from ral_gym.cli import run_command
from ral_gym.errors import ConfigError, RunError
from ral_gym.figures import MARKERS, OTHER_COLOURS
from ral_gym.pixelcnn import PixelCNN
from ral_gym.storage import differences, load_json, save_json, write_atomic

BUNDLED_PRIORS = {"ral_gym/Faces-v0": "faces/prior.safetensors", "ral_gym/Oracle-v0": "oracle/prior.safetensors"}
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
CURVE_POINTS = 40
T_QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # 97.5 %, of 1 to 9 degrees of freedom


@dataclass
class Arguments:
    """What to compare, on what."""

    algos: tuple[str, ...] = ("reinforce", "ppo", "a2c", "trpo", "grpo", "maskable_ppo")
    """Algorithms to compare; dqn and qrdqn too, which are slow."""
    env: str = "ral_gym/Toy-v0"
    """A registered environment."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds to average over."""
    images: int = 8_192
    """Images that every algorithm draws (rounded up to whole rounds of `n_envs`)."""
    n_envs: int = 64
    """Environments, that is images per update of a policy gradient."""
    evaluation_images: int = 256
    """Images drawn from every finished agent for the table."""
    learning_rate: float | None = None
    """Initial learning rate of all algorithms; it falls to 0. None: each algorithm's own."""
    run: str | None = None
    """Run folder, for `ral_gym/LatentCode-v0`."""
    prior: str | None = None
    """File or run folder of the PixelCNN to start from. None: the environment's own."""
    folder: str = "runs/swap_algorithm"
    """Where results, table and curves go; each environment has a folder in it."""
    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:N`; small networks are faster on the CPU."""
    quiet: bool = False
    """No progress bars."""

    def check(self) -> None:
        """Raise `ConfigError` for what cannot be compared; algorithms that cannot draw codes are told why."""
        for algo in self.algos:
            policy_for(algo)
        if not self.algos or not self.seeds or min(self.images, self.n_envs, self.evaluation_images) < 1:
            raise ConfigError("at least one algorithm, seed, image and environment are needed")
        if self.env not in gym.registry:
            ours = ", ".join(name for name in gym.registry if name.startswith("ral_gym/"))
            raise ConfigError(f"environment '{self.env}' is unknown: choose one of {ours}")
        if self.env == "ral_gym/LatentCode-v0" and self.run is None:
            raise ConfigError("ral_gym/LatentCode-v0 draws in the codes of a run: give --run runs/NAME")
        self.images = math.ceil(self.images / self.n_envs) * self.n_envs

    @property
    def env_kwargs(self) -> dict[str, Any]:
        """The environment's own arguments."""
        return {"device": self.device} | ({"run": self.run} if self.run else {})

    @property
    def prior_file(self) -> str | None:
        """Where the starting prior is read from; None: it has random weights."""
        if self.prior or self.run:
            return self.prior or self.run
        if self.env in BUNDLED_PRIORS:
            from ral_gym.assets import asset_path

            return str(asset_path(BUNDLED_PRIORS[self.env]))
        return None


def main(argv: Sequence[str], console: Console) -> None:
    """Train every pair that has not been, then print the table and draw the curves."""
    arguments = tyro.cli(Arguments, args=list(argv), description=__doc__)
    arguments.check()
    folder = Path(arguments.folder) / arguments.env.replace("/", "-")
    results: dict[str, list[dict[str, Any]]] = {algo: [] for algo in arguments.algos}
    for seed in arguments.seeds:  # seed by seed: stopped early, every algorithm has had its share
        for algo in arguments.algos:
            results[algo].append(run_pair(algo, seed, arguments, folder / f"{algo}-seed{seed}.json"))
    save_json(folder / "summary.json", results)
    save_plot(folder / "learning_curves.png", results, arguments)
    console.print(comparison_table(results, arguments))
    if value_based := [algo for algo in results if not learns_prior(algo)]:
        console.print(f"{' and '.join(value_based)}: from scratch, without the prior; judged greedily, on one image")
    for name in ("learning_curves.png", "summary.json"):
        console.print(f"  {folder / name}", highlight=False)


def learns_prior(algo: str) -> bool:
    """Whether an algorithm trains a PixelCNN; the others learn a value per code."""
    return policy_for(algo) != "MlpPolicy"


def run_pair(algo: str, seed: int, arguments: Arguments, path: Path) -> dict[str, Any]:
    """The result of one algorithm and seed: read if it is there, else trained.

    Raises:
        RunError: what is there was made with other settings.
    """
    shown = asdict(arguments)
    names = ("env", "images", "n_envs", "evaluation_images", "learning_rate", "run", "prior", "device")
    settings = {name: shown[name] for name in names} | {"algorithm": keywords_for(algo, arguments)}
    if path.exists():
        result = load_json(path)
        if others := differences(result["settings"], settings):
            raise RunError(
                f"{path} has other settings ({'; '.join(others[:3])}): remove it, or choose another --folder"
            )
        return result
    result = train(algo, seed, arguments)
    save_json(path, {"settings": settings, "algo": algo, "seed": seed} | result)
    return load_json(path)


def keywords_for(algo: str, arguments: Arguments) -> dict[str, Any]:
    """What differs from `algorithm_defaults`."""
    from_scratch = arguments.prior_file is None or not learns_prior(algo)
    keywords = (FROM_SCRATCH if from_scratch else PRETRAINED).get(algo, {})
    return keywords | ({} if arguments.learning_rate is None else {"learning_rate": arguments.learning_rate})


def train(algo: str, seed: int, arguments: Arguments) -> dict[str, Any]:
    """One agent from the starting prior to the last image."""
    environment = make_sb3_env(arguments.env, arguments.n_envs, reset_mode="full", seed=seed, **arguments.env_kwargs)
    model = make_model(algo, environment, seed, arguments)
    start = evaluate(model, seed, arguments)
    set_random_seed(seed)
    progress = Progress(arguments.images, f"{algo}, seed {seed}", arguments.quiet)
    # The oracle's log-probability alone is highest for one image; with log o - log pi the optimum is the oracle itself.
    entropy = [EntropyReward()] if arguments.env == "ral_gym/Oracle-v0" and learns_prior(algo) else []
    began = time.perf_counter()
    model.learn(arguments.images * environment.core.grid.n_codes, callback=[progress, *entropy])
    seconds = time.perf_counter() - began
    return {
        "images": len(progress.rewards),
        "seconds": seconds,
        "start": start,
        "final": evaluate(model, seed, arguments),
        "curve": progress.curve(),
    }


def make_model(algo: str, environment: CodeVecEnv, seed: int, arguments: Arguments) -> BaseAlgorithm:
    """The algorithm with its defaults, from the starting prior."""
    keywords = algorithm_defaults(algo, environment) | keywords_for(algo, arguments)
    if learns_prior(algo):
        keywords["policy_kwargs"] = keywords.get("policy_kwargs", {}) | {"prior": starting_prior(seed, arguments)}
    if "learning_rate" in keywords:
        # With a constant rate an agent that has solved its task can still lose it: normalised advantages stay large.
        keywords["learning_rate"] = LinearSchedule(keywords["learning_rate"], 0.0, 1.0)
    return ALGORITHMS[algo](policy_for(algo), environment, seed=seed, device=arguments.device, **keywords)


def starting_prior(seed: int, arguments: Arguments) -> PriorWeights:
    """The PixelCNN that all algorithms start from."""
    if arguments.prior_file is not None:
        return PriorWeights.of(arguments.prior_file)
    grid = make_sb3_env(arguments.env, 1, **arguments.env_kwargs).core.grid
    torch.manual_seed(seed)
    small: dict[str, Any] = {"hidden_units": 24, "residual_units": 24, "layers": 1, "conv_filter_size": 3}
    return PriorWeights.of(PixelCNN(grid.codebook_size, grid.height, grid.width, **small))


class Progress(BaseCallback):
    """Collects the true reward of every finished image, and shows the mean of the last ones.

    Args:
        images: how many will be drawn.
        label: of the bar.
        quiet: no bar.
    """

    def __init__(self, images: int, label: str, quiet: bool) -> None:
        super().__init__()
        self.rewards: list[float] = []
        self._images, self._label, self._quiet = images, label, quiet

    def _on_training_start(self) -> None:
        self._bar = tqdm(total=self._images, desc=self._label, unit="img", disable=self._quiet)

    def _on_step(self) -> bool:
        finished = [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
        if finished:
            self.rewards += finished
            self._bar.set_postfix(reward=f"{np.mean(self.rewards[-100:]):.3f}", refresh=False)
            self._bar.update(len(finished))
        return True

    def _on_training_end(self) -> None:
        self._bar.close()

    def curve(self) -> dict[str, list[float]]:
        """Mean reward of consecutive shares of the images, over the images drawn by the end of each share."""
        shares = np.array_split(np.array(self.rewards), min(CURVE_POINTS, len(self.rewards)))
        drawn = np.cumsum([len(share) for share in shares])
        return {"images": drawn.tolist(), "reward": [float(share.mean()) for share in shares]}


def evaluate(model: BaseAlgorithm, seed: int, arguments: Arguments) -> dict[str, Any]:
    """True reward and variety of fresh images: a PixelCNN draws at random, a value-based agent its best guess."""
    set_random_seed(seed)
    count = arguments.evaluation_images
    environment = make_sb3_env(arguments.env, count, reset_mode="full", seed=seed, **arguments.env_kwargs)
    prior: Any = getattr(model.policy, "prior", None)
    observations: Any = environment.reset()
    for _ in range(environment.core.grid.n_codes):
        actions, _ = model.predict(observations, deterministic=prior is None)
        observations, _, _, infos = environment.step(actions)
    codes = np.stack([info["codes"] for info in infos]).astype(np.int64)  # (B, T)
    figures: dict[str, Any] = {
        "reward": float(np.mean([info["episode"]["r"] for info in infos])),
        "distinct": len(np.unique(codes, axis=0)) / count,
        "entropy": None,
    }
    if prior is not None:
        with torch.no_grad():
            log_probs = prior(torch.as_tensor(codes, device=model.device)).log_softmax(-1)  # (B, T, K)
        figures["entropy"] = float(-(log_probs.exp() * log_probs).sum(-1).mean())
    return figures


def mean_and_interval(values: Sequence[float], digits: int) -> str:
    """The mean, and half the 95 % interval of it by Student's t where there is more than one seed."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    quantile = T_QUANTILES[min(len(values) - 1, len(T_QUANTILES)) - 1]  # beyond 10 seeds a little too wide
    half = quantile * np.std(values, ddof=1) / math.sqrt(len(values))
    return f"{np.mean(values):.{digits}f} ± {half:.{digits}f}"


def comparison_table(results: dict[str, list[dict[str, Any]]], arguments: Arguments) -> Table:
    """One row per algorithm, means over seeds; first the starting prior."""
    seeds = ", ".join(map(str, arguments.seeds))
    interval = "± half the 95 % interval over seeds; " if len(arguments.seeds) > 1 else ""
    caption = f"{interval}reward and entropy (nats per code) of {arguments.evaluation_images} fresh images per seed"
    style: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "show_edge": False, "pad_edge": False}
    table = Table(title=f"{arguments.env}, seeds {seeds}", caption=caption, **style)
    for heading in ("algorithm", "reward", "images", "seconds", "images/s", "entropy", "distinct"):
        table.add_column(heading, justify="left" if heading == "algorithm" else "right", no_wrap=True)
    if starts := next((runs for algo, runs in results.items() if learns_prior(algo)), []):
        table.add_row("(start)", *_cells([run["start"] for run in starts]), end_section=True)
    for algo, runs in results.items():
        reward, _, _, _, entropy, distinct = _cells([run["final"] for run in runs])
        seconds = np.array([run["seconds"] for run in runs])
        speed = np.mean([run["images"] for run in runs] / seconds)
        table.add_row(
            algo, reward, f"{runs[0]['images']:,}", f"{seconds.mean():.1f}", f"{speed:,.0f}", entropy, distinct
        )
    return table


def _cells(figures: list[dict[str, Any]]) -> tuple[str, ...]:
    """Reward, nothing for images and time, entropy and distinct images."""
    entropies = [one["entropy"] for one in figures]
    entropy = "-" if None in entropies else mean_and_interval(entropies, 2)
    distinct = f"{np.mean([one['distinct'] for one in figures]):.0%}"
    return mean_and_interval([one["reward"] for one in figures], 3), "", "", "", entropy, distinct


def save_plot(path: Path, results: dict[str, list[dict[str, Any]]], arguments: Arguments) -> None:
    """Learning curves: the reward of the images drawn in training, mean and range over the seeds."""
    figure = Figure(figsize=(9, 6), dpi=160, facecolor="white", layout="constrained")
    axes = figure.add_subplot(xlabel="images drawn", ylabel="mean reward of the images drawn in training")
    for number, (algo, runs) in enumerate(results.items()):
        images = runs[0]["curve"]["images"]
        rewards = np.array([run["curve"]["reward"] for run in runs])  # (seeds, points)
        colour, style = OTHER_COLOURS[number % len(OTHER_COLOURS)], "-" if learns_prior(algo) else "--"
        mark: dict[str, Any] = {"marker": MARKERS[number % len(MARKERS)], "markersize": 5, "markevery": (number % 5, 5)}
        axes.plot(images, rewards.mean(0), style, color=colour, label=algo, linewidth=1.8, **mark)
        axes.fill_between(images, rewards.min(0), rewards.max(0), color=colour, alpha=0.15, linewidth=0)
    axes.set_title(f"{arguments.env}: the same start, another algorithm", fontsize=12, weight="bold", loc="left")
    axes.legend(frameon=False, fontsize=10)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    seeds = ", ".join(map(str, arguments.seeds))
    caption = f"Lines: mean over seeds {seeds}; bands: least to greatest seed. {arguments.n_envs} images an update."
    if not all(map(learns_prior, results)):
        caption += "\nDashed: learns a value per code from scratch, without the starting prior; exploration included."
    figure.supxlabel(caption, fontsize=9, x=0.01, ha="left")
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", metadata={"Software": None}))


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
