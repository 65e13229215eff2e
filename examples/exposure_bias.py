"""Exposure bias, a lesson: does a model suffer from its own mistakes? Measured against an oracle.

    python examples/exposure_bias.py                                  # the bundled prior and two deliberately poor ones
    python examples/exposure_bias.py --no-weak                        # the bundled prior alone
    python examples/exposure_bias.py --policy runs/x/policy.safetensors   # and any PixelCNN of the same code grid

First two episodes of ``ral_gym/Oracle-v0``, code by code: one follows a sample of the oracle (teacher-forced), one
follows the model itself (free-running). One episode proves nothing, so that batches follow: the model on its own
prefixes and on the oracle's (EB-C, He et al., 2021; accumulated error, Arora et al., 2022), completions of an oracle's
beginning, and recovery from a spoilt one. Every verdict is made of the numbers and their 95 % intervals.

Writes ``exposure.json``, ``exposure_*.png`` and ``exposure.gif`` (the two episodes side by side). The lesson in words,
with exercises: docs/exposure_bias.md.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ral_gym.assets import asset_path
from ral_gym.cli import run_command
from ral_gym.codes import CodeSet
from ral_gym.envs.oracle import load_light_prior, load_oracle
from ral_gym.errors import ConfigError
from ral_gym.exposure_figures import entry_text, interval_text, mean_text, save_plots
from ral_gym.metrics import (
    Estimate,
    ExposureBias,
    as_lists,
    corruption_response,
    exposure_bias,
    nll,
    prefix_curve,
)
from ral_gym.metrics.divergences import conditional_log_probs, cross_entropy, kl
from ral_gym.pixelcnn import PixelCNN
from ral_gym.sampler import CachedSampler
from ral_gym.stages.train_prior import maximum_likelihood_loss
from ral_gym.storage import load_module, save_json, write_atomic

ATTEMPTS = 5  # Free-running episodes played until one has a wrong code to show.
SMALL = 5.0  # Percent: an excess of the accumulated error below this is called small.
BATCH = 256
LEAST_SIDE = 256  # Pixels of an image in the animation: smaller ones are enlarged by a whole number.
RED = 255  # Index in the palette of the animation.
BAR = 76  # Pixels of text under each of them.


@dataclass
class Arguments:
    """What to measure, how often, and where it goes."""

    weak: bool = True
    """Also train two poor PixelCNNs: one too small, one that has seen only 64 images."""
    policy: tuple[str, ...] = ()
    """Files of further PixelCNNs over the same grid, such as a RAL policy."""
    n: int = 1536
    """Images drawn by each model, and by the oracle."""
    n_prefixes: int = 384
    """Beginnings of the oracle's that are continued or spoilt."""
    weak_steps: int = 500
    """Training steps of each poor PixelCNN."""
    corrupted: float = 0.5
    """Share of the codes in the last row of the beginning that are replaced by random ones."""
    corrupted_rows: int = 4
    """Rows of that beginning."""
    wrong: float = 0.001
    """A code is wrong if the oracle draws it, or a code as unlikely, with a smaller probability than this."""
    seed: int = 0
    """Of everything that is drawn."""
    folder: str = "runs/exposure_bias"
    """Where plots, animation and numbers go."""
    quick: bool = False
    """A few seconds, to see that it runs: too few images for any verdict."""

    def check(self) -> None:
        """Raise `ConfigError` for what cannot be measured."""
        if self.quick:
            self.n, self.n_prefixes, self.weak_steps = min(self.n, 32), min(self.n_prefixes, 8), min(self.weak_steps, 5)
        if min(self.n, self.n_prefixes) < 2 or self.weak_steps < 1:
            raise ConfigError("n and n_prefixes must be at least 2, for an interval, and weak_steps at least 1")
        if not 0 < self.wrong < 1:
            raise ConfigError(f"wrong={self.wrong} is no probability: give a number between 0 and 1, such as 0.001")


@dataclass
class Episode:
    """One image, code by code: T entries each, and T + 1 pictures."""

    codes: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)  # log o(code), nats
    kl: list[float] = field(default_factory=list)  # KL(o || p) before the code, nats
    rarity: list[float] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)  # uint8 (S, S, 3)

    def first_wrong(self, threshold: float) -> int | None:
        """Position of the first code that is rarer than the threshold."""
        return next((t for t, rarity in enumerate(self.rarity) if rarity < threshold), None)


class Measured(NamedTuple):
    """All that is measured about one model; `oracle_entropy`: on the model's prefixes, and on the oracle's."""

    nll_test: float
    exposure: ExposureBias
    prefix: Any
    corruption: dict[str, Any]
    excess: Estimate
    wrong: float
    oracle_entropy: tuple[float, float]
    verdict: str


def main(argv: Sequence[str], console: Console) -> None:
    """The episodes, the measurements, the pictures."""
    arguments = tyro.cli(Arguments, args=list(argv), description=__doc__)
    arguments.check()
    torch.manual_seed(arguments.seed)
    folder, oracle = Path(arguments.folder), load_oracle()
    models = load_models(arguments, oracle, console)
    fresh = draw(oracle, max(arguments.n, arguments.n_prefixes), arguments.seed + 1)  # no model was trained on these
    episodes = tell_story(models["light"], oracle, fresh[0], arguments, console)
    save_animation(folder / "exposure.gif", episodes, oracle.width, arguments.wrong)
    console.print("\n[bold]2. Many images.[/] Two episodes prove nothing; what follows are means with 95 % intervals.")
    results = {}
    for name, model in models.items():
        results[name] = measure(name, model, oracle, fresh, arguments)
        report(name, results[name], arguments.wrong, console)
    save_plots(folder, results, oracle.width)
    save_results(folder / "exposure.json", results, episodes, arguments)
    console.print(f"\nPictures and numbers: {folder}/exposure*", highlight=False)


# ---- the models --------------------------------------------------------------------------------------------------


def load_models(arguments: Arguments, oracle: PixelCNN, console: Console) -> dict[str, PixelCNN]:
    """The bundled light prior, the poor ones, and those of the files, by name."""
    models: dict[str, PixelCNN] = {"light": load_module(load_light_prior(), PixelCNN)}
    for number, file in enumerate(arguments.policy):
        model: PixelCNN = load_module(Path(file), PixelCNN)
        if model.grid != oracle.grid:
            raise ConfigError(f"{file} draws {model.grid}, the oracle {oracle.grid}: give a PixelCNN of the same grid")
        name = Path(file).stem
        models[name if name not in models else f"{name}_{number}"] = model
    if arguments.weak:
        console.print("Training two poor PixelCNNs ...")
        seen = torch.from_numpy(CodeSet.load(asset_path("oracle/codes.safetensors")).train).long()  # (1024, T)
        models["small"] = fit(oracle, seen, arguments.weak_steps, hidden_units=8, residual_units=8, layers=1)
        models["memoriser"] = fit(oracle, seen[:64], arguments.weak_steps, hidden_units=32, residual_units=32, layers=2)
    return models


def fit(oracle: PixelCNN, codes: Tensor, steps: int, **size: Any) -> PixelCNN:
    """Maximum likelihood on codes (N, T), with a learning rate that falls to zero."""
    shape = (oracle.codebook_size, oracle.height, oracle.width)
    model = PixelCNN(*shape, dropout=0.0, output_stack_layers=1, **size)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = maximum_likelihood_loss(model, codes[torch.randint(len(codes), (64,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def draw(model: PixelCNN, n: int, seed: int) -> Tensor:
    """Codes (n, T) int64 drawn from a model."""
    sampler, generator = CachedSampler(model), torch.Generator().manual_seed(seed)
    return torch.cat([sampler.sample(min(BATCH, n - i), generator=generator)[0] for i in range(0, n, BATCH)])


# ---- two episodes ------------------------------------------------------------------------------------------------


def tell_story(
    model: PixelCNN, oracle: PixelCNN, given: Tensor, arguments: Arguments, console: Console
) -> dict[str, Episode]:
    """Play a teacher-forced and a free-running episode, and say row by row what happened."""
    episodes = {"teacher-forced": play(model, oracle, arguments.seed, given)}
    for attempt in range(ATTEMPTS):
        episodes["free-running"] = play(model, oracle, arguments.seed + attempt, None)
        if episodes["free-running"].first_wrong(arguments.wrong) is not None:
            break
    console.print(
        "\n[bold]1. Two episodes.[/] State: the codes so far; action: the next code; reward: its log-probability under "
        "the oracle. Left, the codes are a sample of the oracle, and the model only says what it would have drawn, as "
        "in training. Right, the model's codes are its own context. KL(oracle || model), in nats per code, is how "
        "wrong its next code's distribution is."
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


def rarity(log_o: Tensor, codes: Tensor) -> Tensor:
    """Probability that the oracle draws a code at most as likely as the one given: (.., K), (..) -> (..)."""
    own = log_o.gather(-1, codes[..., None])  # (.., 1)
    return torch.where(log_o <= own, log_o.exp(), 0).sum(-1)


def _picture(env: gym.Env[Any, Any]) -> np.ndarray:
    return np.asarray(env.render(), np.uint8)


def save_animation(path: Path, episodes: Mapping[str, Episode], width: int, threshold: float) -> None:
    """Both episodes side by side, a frame per code; a red frame around the first wrong code of each."""
    parts = [_animate(name, episode, width, threshold) for name, episode in episodes.items()]
    frames = [Image.fromarray(np.concatenate(pictures, 1)) for pictures in zip(*parts, strict=True)]
    for frame in frames:  # one palette for all, the greys and red: choosing one per frame takes half a minute
        frame.putpalette([grey for grey in range(RED) for _ in range(3)] + [220, 0, 0])
    durations = [120] * (len(frames) - 1) + [4000]  # milliseconds
    write_atomic(
        path,
        lambda temporary: frames[0].save(
            temporary, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0
        ),
    )


def _animate(name: str, episode: Episode, width: int, threshold: float) -> list[np.ndarray]:
    """One episode's frames with two lines of text, as indices (Y, X) uint8 of greys and `RED`."""
    font, wrong, frames = ImageFont.load_default(size=15), episode.first_wrong(threshold), []
    scale = max(1, LEAST_SIDE // len(episode.frames[0]))
    side = len(episode.frames[0]) * scale
    cell = side // width
    for drawn, picture in enumerate(episode.frames):
        frame = Image.new("L", (side + 20, side + BAR + 10), RED - 1)
        grey = Image.fromarray(picture[..., 0].clip(max=RED - 1))
        frame.paste(grey.resize((side, side), Image.Resampling.NEAREST), (10, 10))
        pen = ImageDraw.Draw(frame)
        total = f"log o = {sum(episode.rewards[:drawn]):.1f}"
        pen.text((10, side + 16), f"{name}\ncode {drawn} of {len(episode.codes)}, {total}", 0, font)
        if wrong is not None and drawn > wrong:
            y, x = divmod(wrong, width)
            pen.rectangle((10 + x * cell, 10 + y * cell, 9 + (x + 1) * cell, 9 + (y + 1) * cell), None, RED, 4)
            pen.text((10, side + 54), f"first wrong code: number {wrong + 1}", 0, font)
        frames.append(np.asarray(frame))
    return frames


# ---- the measurements --------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(name: str, model: PixelCNN, oracle: PixelCNN, fresh: Tensor, arguments: Arguments) -> Measured:
    """Everything about one model; `fresh` (N, T) are the oracle's samples."""
    given, beginnings, sampler = fresh[: arguments.n], fresh[: arguments.n_prefixes], CachedSampler(model)
    own = draw(model, arguments.n, arguments.seed + 2)  # (n, T)
    exposure = exposure_bias(model, oracle, own, given)
    excess = Estimate.around(
        float(exposure.excess.mean[-1]), float(exposure.excess.error[-1]), arguments.n, "delta", degrees=arguments.n - 1
    )
    generator = torch.Generator().manual_seed(arguments.seed + 3)
    spoilt: dict[str, Any] = {
        "fraction": arguments.corrupted,
        "prefix_rows": arguments.corrupted_rows,
        "window": oracle.width,
    }
    log_o, log_o_given = (
        conditional_log_probs(oracle, one[: arguments.n_prefixes]) for one in (own, given)
    )  # (B, T, K)
    rare = rarity(log_o, own[: arguments.n_prefixes]) < arguments.wrong  # (B, T)
    entropies = [float(cross_entropy(log, log).mean()) for log in (log_o, log_o_given)]
    return Measured(
        nll_test=nll(model, given),
        exposure=exposure,
        prefix=prefix_curve(model, oracle, sampler, beginnings, oracle.grid, generator=generator),
        corruption={
            "given": corruption_response(model, oracle, beginnings, oracle.grid, generator=generator, **spoilt),
            "own": corruption_response(
                model, oracle, beginnings, oracle.grid, generator=generator, sampler=sampler, **spoilt
            ),
        },
        excess=excess,
        wrong=float(rare.double().mean()),
        oracle_entropy=(entropies[0], entropies[1]),
        verdict=f"{name}: {verdict(excess)}",
    )


def verdict(excess: Estimate) -> str:
    """What the excess of the accumulated error over the whole image says, in words, from its interval alone."""
    shown = f"({excess.value:+.1f} % [{excess.low:+.1f}, {excess.high:+.1f}])"
    if excess.low > 0:
        size = "small" if excess.value < SMALL else "large"
        return f"{size} exposure bias: errors are larger on the model's own prefixes {shown}"
    if excess.high < 0:
        return f"reversed: errors are smaller on the model's own prefixes than on the oracle's {shown}"
    if max(-excess.low, excess.high) < SMALL:
        return f"no measurable exposure bias, and one of {SMALL:g} % or more is ruled out {shown}"
    return f"undecided: neither none nor {SMALL:g} % is ruled out; draw more images {shown}"


def report(name: str, result: Measured, threshold: float, console: Console) -> None:
    """The lesson of one model, in numbers and words."""
    bias, rows = result.exposure, result.prefix.rows
    half = len(bias.ratio["kl"].mean) // 2
    early, late = (float(part.mean()) for part in bias.ratio["kl"].mean.split(half)[:2])
    console.print(f"\n[bold]{name}[/] (held-out NLL {result.nll_test:.3f} nats per code)", highlight=False)
    lines = [
        f"KL(oracle || model): {mean_text(bias.on_model['kl'])} on its own prefixes, {mean_text(bias.on_oracle['kl'])} "
        f"on the oracle's; gap {interval_text(bias.gap.value, bias.gap.low, bias.gap.high)} nats per code",
        f"EB-C: {early:.3f} in the first half of the image, {late:.3f} in the second (1: no exposure bias)",
        f"accumulated error over {len(bias.excess.mean)} codes: {float(bias.accumulated.mean[-1]):.1f}",
        f"wrong codes: {100 * result.wrong:.2f} % of its own; by definition fewer than "
        f"{100 * threshold:g} % of the oracle's",
        f"entropy of the oracle: {result.oracle_entropy[0]:.2f} nats per code on the model's prefixes, "
        f"{result.oracle_entropy[1]:.2f} on its own (higher: less certain there)",
        f"prefix curve: harm of its own context {entry_text(result.prefix.harm, 0)} nats per code after {rows[0]} "
        f"given rows, {entry_text(result.prefix.harm, -1)} after {rows[-1]}",
    ]
    for who, text in (("given", "the oracle's codes follow"), ("own", "its own codes follow")):
        response = result.corruption[who]
        area = interval_text(response.area.value, response.area.low, response.area.high)
        life = f"half of it within {response.half_life:.1f} codes" if response.half_life >= 0 else "no measurable bump"
        lines.append(f"{response.replaced} spoilt codes, {text}: {area} nats more in all; {life}")
    for line in lines:
        console.print(f"  {line}", highlight=False)
    console.print(f"  => {result.verdict}", style="bold", highlight=False, markup=False)


def save_results(
    path: Path, results: Mapping[str, Measured], episodes: Mapping[str, Episode], arguments: Arguments
) -> None:
    """All numbers behind the text and the pictures."""
    played = {
        name: {key: value for key, value in vars(episode).items() if key != "frames"}
        | {"first_wrong": episode.first_wrong(arguments.wrong)}
        for name, episode in episodes.items()
    }
    measured = {name: as_lists(one._asdict()) for name, one in results.items()}
    save_json(path, {"settings": asdict(arguments), "episodes": played, "models": measured})


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
