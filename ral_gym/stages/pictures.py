"""The pictures of a run: generators side by side, nearest training images, the frontier, learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ral_gym.data.images import ImageSet
from ral_gym.data.subsets import subset
from ral_gym.metrics import nearest
from ral_gym.pictures import save_class_grid, save_comparison, save_curves, save_frontier, save_neighbours
from ral_gym.priors.base import Prior
from ral_gym.priors.guidance import PLAIN, Sampling
from ral_gym.priors.sampler import make_sampler
from ral_gym.runs.run import Run
from ral_gym.tokenizers.base import Tokenizer
from ral_gym.tokenizers.code_set import CodeSet, decode_codes

SAMPLE_BATCH = 500
N_SHOWN = 16
MOST_CLASSES, PER_CLASS = 20, 8
"""Classes in the picture of samples by class, and samples of each."""
SEARCHED = 20_000
"""Most training images that are searched for the nearest ones."""
COMPARED = ("mle", "mle_continued", "ral")
NLLS = ("nll_train", "nll_test", "nll_test_ema", "nll_new_people")


def balanced_labels(n: int, classes: int) -> Tensor:
    """Labels (n,) int64 of n images, every class as often as the others: 0, 1, .., N - 1, 0, 1, .."""
    return torch.arange(n) % classes


def sequences_to_draw(prior: Prior, n: int, labels: Tensor | None = None) -> Tensor | None:
    """What a sampler needs to draw n whole images: sequences (n, T + 1) without codes; None without classes.

    Args:
        prior: the generator.
        n: number of images.
        labels: (n,) int64 classes; None: balanced.

    Raises:
        ConfigError: labels of a generator without classes, or out of range.
    """
    grid = prior.grid
    if labels is None and not grid.classes:
        return None
    labels = balanced_labels(n, grid.classes) if labels is None else labels
    sequences = grid.with_labels(torch.full((n, grid.n_codes), grid.not_drawn), labels)
    return sequences.to(next(prior.parameters()).device)


def sample_codes(
    prior: Prior,
    n: int,
    seed: int,
    temperature: float = 1.0,
    sampling: Sampling = PLAIN,
    labels: Tensor | None = None,
) -> Tensor:
    """Draw n code grids (n, T) int64 on the CPU; the same seed draws from the same uniforms for every generator.

    Args:
        prior: the generator.
        n: number of images.
        seed: of the uniforms.
        temperature: divides the logits.
        sampling: guidance, top-k and top-p.
        labels: (n,) int64 classes; None: balanced if the generator has classes.

    Raises:
        ConfigError: guidance of a generator that cannot be guided, or labels that it does not have.
    """
    generator = torch.Generator().manual_seed(seed)
    sampler = make_sampler(prior, sampling)
    sequences = sequences_to_draw(prior, n, labels)

    def batch(first: int) -> Tensor:
        size = min(SAMPLE_BATCH, n - first)
        if sequences is None:
            return sampler.sample(size, temperature=temperature, generator=generator)[0]
        given = sequences[first : first + size]
        return sampler.sample(codes=given, temperature=temperature, generator=generator)[0]

    return torch.cat([batch(first).cpu() for first in range(0, n, SAMPLE_BATCH)])


def draw_pictures(
    run: Run,
    vqvae: Tokenizer,
    codes: CodeSet,
    images: ImageSet,
    priors: dict[str, Prior],
    results: dict[str, Any],
) -> None:
    """All pictures of a finished run, into ``samples/``.

    Args:
        run: the run folder.
        vqvae: its tokenizer.
        codes: its codes.
        images: its images.
        priors: row of the table -> its network.
        results: the results table.
    """
    seed = run.config.seed * 1000 + 8
    picked = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(seed))[:N_SHOWN].numpy()
    real = {
        "real": torch.from_numpy(images.train[picked].copy()),
        "reconstruction": decode_codes(vqvae, codes.train[picked]),
    }
    caption = (
        f"{N_SHOWN} samples each, not selected, from the same uniforms; run {run.path.name}, seed {run.config.seed}"
    )

    def drawn(name: str, temperature: float = 1.0) -> Tensor:
        return decode_codes(vqvae, sample_codes(priors[name], N_SHOWN, seed, temperature))

    plain = real | {name: drawn(name) for name in COMPARED}
    save_comparison(run.file("samples/comparison.png"), plain, title="Drawn at temperature 1", caption=caption)
    best = {name: results["rows"][f"{name}_best_temperature"]["temperature"] for name in COMPARED}
    sharp = real | {name: drawn(name, best[name]) for name in COMPARED}
    at_best = ", ".join(f"{name} T={temperature:g}" for name, temperature in best.items())
    title = "Drawn at each generator's best temperature"
    path = run.file("samples/comparison_best_temperature.png")
    save_comparison(path, sharp, title=title, caption=f"{caption}; {at_best}")
    if codes.classes and priors["mle"].grid.classes:
        draw_classes(run, vqvae, codes.classes, {name: priors[name] for name in ("mle", "ral")})
    three = {name: sharp[name] for name in ("real", "mle", "ral")}
    lines = (
        f"each at its best temperature: MLE {best['mle']:g}, RAL {best['ral']:g}; not selected; seed {run.config.seed}"
    )
    save_comparison(run.file("samples/real_mle_ral.png"), three, title="Real | MLE | RAL", caption=lines)
    _draw_neighbours(run, sharp["ral"][:12], images)
    _draw_frontier(run, results)
    _draw_given_rows(run, results)
    _draw_curves(run)


def draw_classes(run: Run, vqvae: Tokenizer, names: Sequence[str], priors: Mapping[str, Prior]) -> None:
    """A row of samples per class and generator, from the same uniforms: ``samples/classes.png``."""
    shown, seed = list(names[:MOST_CLASSES]), run.config.seed * 1000 + 8
    labels = torch.arange(len(shown)).repeat_interleave(PER_CLASS)
    columns = {
        name: decode_codes(vqvae, sample_codes(prior, len(labels), seed, labels=labels))
        for name, prior in priors.items()
    }
    more = "" if len(shown) == len(names) else f", the first {len(shown)} of {len(names)}"
    caption = (
        f"{PER_CLASS} samples of each class{more}, at temperature 1 without guidance, not selected, from the same "
        f"uniforms; run {run.path.name}, seed {run.config.seed}"
    )
    save_class_grid(run.file("samples/classes.png"), columns, shown, title="Samples by class", caption=caption)


def _draw_neighbours(run: Run, samples: Tensor, images: ImageSet) -> None:
    """RAL's samples above their nearest training images: equal pairs would be memorised images."""
    picked = subset(len(images.train), SEARCHED, run.config.seed * 1000 + 8)
    train = torch.from_numpy(images.train[picked])
    index, _ = nearest(samples, train)
    among = "" if len(picked) == len(images.train) else f" of {len(picked):,}, taken at random"
    title = f"RAL's samples above their nearest training images{among} (pixel distance)"
    save_neighbours(run.file("samples/nearest.png"), samples, train[index], title=title)


def _draw_frontier(run: Run, results: dict[str, Any]) -> None:
    """FD against entropy, with MLE's temperature sweep as the baseline."""
    sweeps = {
        name: [(row["temperature"], row["entropy"], row["fd"]) for row in rows]
        for name, rows in results["sweeps"].items()
    }
    points = {
        name: [(results["rows"][name]["entropy"], results["rows"][name]["fd"])] for name in ("mle_ema", "ral_live")
    }
    stations = [(row["entropy"], row["fd"]) for row in results["checkpoints"]]
    if stations:
        points["RAL on the way"] = stations
    title = f"FD ({results['extractor']}, n = {results['n_samples']}) against entropy, run {run.path.name}"
    curve = sweeps.pop("mle")
    save_frontier(run.file("samples/frontier.png"), curve, points, title=title, sweeps=sweeps)


def _draw_given_rows(run: Run, results: dict[str, Any]) -> None:
    """The prefix curve: KID of images whose first rows are real."""
    measured = results.get("given_rows")
    if measured:
        rows = measured["given"]
        curves = {name: (rows, [point["kid"] for point in points]) for name, points in measured["curves"].items()}
        save_curves(
            run.file("samples/exposure_given_rows.png"),
            curves,
            xlabel=f"real rows given, of {measured['height']}",
            ylabel=f"KID of the finished images ({results['extractor']}, n = {measured['n']})",
            title="Real rows first, the rest drawn",
        )


def _draw_curves(run: Run) -> None:
    """The learning curves of the three stages, from ``metrics.jsonl``."""
    plots = (
        ("vqvae", ("reconstruction_error",), "mean squared error", "Stage 1: tokenizer"),
        ("prior", NLLS, "nats per code", "Stage 2: prior"),
        ("prior_bottom", NLLS, "nats per code", "Stage 2: prior of the bottom codes"),
        ("ral", ("critic/heldout_auc",), "AUC, held-out real against drawn images", "Stage 3: the critic"),
    )
    for stage, names, ylabel, title in plots:
        records = run.metrics(stage)
        curves = {
            name: ([r["step"] for r in records if name in r], [r[name] for r in records if name in r])
            for name in names
            if any(name in r for r in records)
        }
        if curves:
            xlabel = "policy update" if stage == "ral" else "step"
            save_curves(run.file(f"samples/curve_{stage}.png"), curves, xlabel=xlabel, ylabel=ylabel, title=title)
