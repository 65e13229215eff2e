"""The pictures of docs/: the idea in five pictures, from the bundled models, and a learning curve per algorithm.

    python examples/make_docs_pictures.py                          # docs/idea_1.png .. idea_5.png: seconds
    python examples/swap_algorithm.py --env ral_gym/Toy-v0 --algos reinforce grpo ppo a2c maskable_ppo trpo
    python examples/make_docs_pictures.py --curves runs/swap_algorithm    # docs/curve_NAME.png, from what that measured

The five pictures come from `ral_gym/Faces-v0` and its models with one seed. A curve shows one algorithm before
the others.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from ral_gym.assets import asset_path
from ral_gym.commands.ending import run_command
from ral_gym.envs.core import GenerationCore
from ral_gym.errors import RunError
from ral_gym.priors.base import load_prior
from ral_gym.priors.sampler import make_sampler
from ral_gym.runs.storage import load_json, write_atomic

BLUE, GREY, ORANGE = "#0072b2", "#999999", "#d55e00"
TOY = "ral_gym-Toy-v0"
"""Folder of the pairs that the curves show."""


@dataclass
class Arguments:
    """What to draw, and where."""

    docs: str = "docs"
    """Folder of the pages."""
    seed: int = 0
    """Seed of the drawn images."""
    curves: str | None = None
    """Folder of a finished `swap_algorithm.py`: draw the curves in place of the five pictures."""


def main(argv: Sequence[str], console: Console) -> None:
    """Draw the five pictures, or the curves."""
    arguments = tyro.cli(Arguments, args=list(argv), description=__doc__)
    docs = Path(arguments.docs)
    if arguments.curves is None:
        pictures = five_pictures(arguments.seed)
        figures = {f"idea_{number}.png": figure for number, figure in enumerate(pictures, start=1)}
    else:
        figures = {f"curve_{algo}.png": figure for algo, figure in learning_curves(Path(arguments.curves)).items()}
    for name, figure in figures.items():
        save(figure, docs / name)
        console.print(f"  {docs / name}", highlight=False)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, the same bytes for the same figure."""
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", metadata={"Software": None}))


def panels(count: int, caption: str, height: float = 2.7) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels side by side above a caption."""
    figure = Figure(figsize=(2.2 * count, height), dpi=120, facecolor="white", layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    figure.supxlabel(caption, fontsize=9, x=0.01, ha="left")
    return figure, axes


def show_image(axes: Axes, image: np.ndarray, title: str) -> None:
    """A grey or coloured image (S, S, 3) without ticks."""
    axes.imshow(image, interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])


def five_pictures(seed: int) -> list[Figure]:
    """Codes, an episode, the next code, the critic's scores, an update."""
    env = gym.make("ral_gym/Faces-v0", render_mode="rgb_array")
    core: GenerationCore = env.unwrapped.core  # type: ignore[attr-defined]
    prior = load_prior(asset_path("faces/prior.safetensors"))
    codes, _ = make_sampler(prior).sample(64, generator=torch.Generator().manual_seed(seed))
    drawn = codes.numpy()
    return [
        image_to_codes(env, core),
        an_episode(env, drawn[0]),
        the_next_code(env, prior, drawn[0]),
        scores(env, core, drawn[0]),
        an_update(env, drawn),
    ]


def finished(env: gym.Env[Any, Any], codes: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
    """The image (S, S, 3) of codes (T,), its reward, and its score map (h, w)."""
    env.reset(options={"codes": codes[:-1]})
    _, reward, _, _, info = env.step(int(codes[-1]))
    return np.asarray(env.render()), float(reward), info["score_map"]


def image_to_codes(env: gym.Env[Any, Any], core: GenerationCore) -> Figure:
    """Picture 1: a training photo's codes, and the image that they stand for."""
    assert core.world.real_codes is not None
    grid = core.world.real_codes[3].reshape(core.grid.height, core.grid.width)
    caption = (
        "The VQ-VAE's encoder gives each of 8 x 8 cells the number\nof one of 128 code vectors; its decoder turns the "
        "numbers\nback into an image. Both are trained first."
    )
    figure, axes = panels(2, caption, 3.3)
    axes[0].imshow(grid, cmap="viridis")
    for (row, column), code in np.ndenumerate(grid):
        axes[0].text(column, row, str(code), ha="center", va="center", fontsize=6, color="white")
    axes[0].set(xlabel="column", ylabel="row")
    axes[0].set_title("64 codes of a photo", fontsize=9)
    show_image(axes[1], finished(env, grid.reshape(-1))[0], "the decoded image")
    return figure


def an_episode(env: gym.Env[Any, Any], codes: np.ndarray) -> Figure:
    """Picture 2: what `render` shows as an episode goes on."""
    caption = "State: the codes so far. Action: the next code. After the last one the episode ends with a reward."
    figure, axes = panels(5, caption)
    env.reset(seed=0)
    shown = iter(axes)
    for step in range(len(codes) + 1):
        if step % 16 == 0:
            show_image(next(shown), np.asarray(env.render()), f"after {step} codes")
        if step < len(codes):
            env.step(int(codes[step]))
    return figure


def the_next_code(env: gym.Env[Any, Any], prior: Any, codes: np.ndarray, position: int = 28) -> Figure:
    """Picture 3: the policy in one state is the prior's distribution of the next code."""
    figure = Figure(figsize=(9, 2.9), dpi=120, facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2.6))
    env.reset(options={"codes": codes[:position]})
    show_image(left, np.asarray(env.render()), f"after {position} codes")
    with torch.no_grad():
        share = prior(torch.from_numpy(codes).long()[None])[0, position].softmax(-1).numpy()
    order = np.argsort(share)[::-1]
    colours = [ORANGE if code == codes[position] else BLUE for code in order]
    right.bar(np.arange(len(share)), 100 * share[order], color=colours, width=0.9)
    right.set(xlabel="the 128 codes, likeliest first", ylabel="probability, %")
    right.spines[["top", "right"]].set_visible(False)
    caption = "The policy is the prior: one distribution over all codes per state. Orange: the code that was drawn."
    figure.supxlabel(caption, fontsize=9, x=0.01, ha="left")
    return figure


def scores(env: gym.Env[Any, Any], core: GenerationCore, codes: np.ndarray) -> Figure:
    """Picture 4: the critic's map on a training photo's codes and on drawn ones."""
    assert core.world.real_codes is not None
    figure, axes = panels(4, "The critic scores patches; the mean of its map is the reward of the image. Blue: looks "
                             "real; red: does not.", 2.9)  # fmt: skip
    found = [finished(env, core.world.real_codes[3]), finished(env, codes)]
    most = max(np.abs(map_).max() for _, _, map_ in found)
    for number, (name, (image, reward, map_)) in enumerate(zip(("photo", "drawn"), found, strict=True)):
        show_image(axes[2 * number], image, f"{name}: reward {reward:+.2f}")
        artist = axes[2 * number + 1].imshow(map_, cmap="RdBu", vmin=-most, vmax=most)
        axes[2 * number + 1].set_title("score map", fontsize=9)
        axes[2 * number + 1].set(xticks=[], yticks=[])
    figure.colorbar(artist, ax=axes, shrink=0.7, label="score")
    return figure


def an_update(env: gym.Env[Any, Any], drawn: np.ndarray) -> Figure:
    """Picture 5: of a round, the images that an update makes likeliest and least likely."""
    found = [finished(env, codes) for codes in drawn]
    rewards = np.array([reward for _, reward, _ in found])
    advantages = (rewards - rewards.mean()) / rewards.std()
    order = np.argsort(advantages)
    caption = (
        f"Of a round of {len(drawn)} images, the two with the least and the two with the greatest reward. Every code's "
        "log-probability\nis weighed by its image's advantage: left, codes become less likely, right, likelier."
    )
    figure, axes = panels(4, caption, 3.1)
    for panel, index in zip(axes, [*order[:2], *order[-2:]], strict=True):
        show_image(panel, found[index][0], f"advantage {advantages[index]:+.1f}")
        panel.spines[:].set(color=BLUE if advantages[index] > 0 else ORANGE, linewidth=3)
    return figure


def learning_curves(folder: Path) -> dict[str, Figure]:
    """A figure per algorithm: its curve in colour, those of the others in grey.

    Raises:
        RunError: the folder holds no finished pairs.
    """
    by_algo: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((folder / TOY).glob("*-seed*.json")):
        by_algo.setdefault(path.stem.partition("-seed")[0], []).append(load_json(path))
    if not by_algo:
        raise RunError(f"{folder / TOY} has no results: run swap_algorithm.py first")
    return {algo: curve_of(algo, by_algo) for algo in by_algo}


def curve_of(algo: str, by_algo: dict[str, list[dict[str, Any]]]) -> Figure:
    """One algorithm's mean and range over seeds, before the means of the others."""
    figure = Figure(figsize=(7, 3.6), dpi=120, facecolor="white", layout="constrained")
    axes = figure.add_subplot(xlabel="images drawn", ylabel="mean reward of the round (best: 1)")
    for other in sorted(by_algo, key=algo.__eq__):
        runs, own = by_algo[other], other == algo
        values = np.array([run["curve"]["reward"] for run in runs])  # (seeds, P)
        images = runs[0]["curve"]["images"]
        colour, width = (BLUE, 2.2) if own else (GREY, 0.9)
        axes.plot(images, values.mean(0), color=colour, linewidth=width, zorder=2 + own)
        if own:
            axes.fill_between(images, values.min(0), values.max(0), color=BLUE, alpha=0.2, linewidth=0)
    axes.set_title(f"{algo} on ral_gym/Toy-v0, from random weights", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    seeds = ", ".join(str(run["seed"]) for run in by_algo[algo])
    caption = f"Mean over seeds {seeds}; band from the least to the greatest. Grey: the other algorithms' means."
    figure.supxlabel(caption, fontsize=9, x=0.01, ha="left")
    return figure


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
