"""How good are a generator's completions? Figure 7 of the paper as numbers: MLE, its continuations, and RAL.

    python examples/completion_scores.py runs/demo                # 256 held-out images, 8 completions each
    python examples/completion_scores.py runs/demo --visible 0.25 --temperature 0.85

The codes of an image's lower rows are hidden and drawn again, several times, by every generator of the run, with the
same random numbers. Distances are to the decoded codes of the image itself (what the tokenizer loses no
generator could know):

* pixels: root mean square over the hidden rows, images in [0, 1]; features: Euclidean, of the run's extractor;
* *mean* is over all completions, *nearest* is the best of an image's: can the generator draw the truth at all?
* *diversity* is the mean distance between two completions of one image. Of two generators that are as near to the
  truth, the more diverse is the better; one that always draws the same is near the truth and useless;
* NLL: nats per hidden code of the true lower half, given the upper one.

Differences from `mle` are paired by image, with Student's t interval. Writes ``completion_scores.md`` and ``.json``
into the run's folder.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from rich.console import Console
from torch import Tensor

from ral_gym.commands.ending import run_command
from ral_gym.commands.generate import generator_files, open_run
from ral_gym.data.subsets import subset
from ral_gym.errors import ConfigError, RunError
from ral_gym.metrics.divergences import conditional_log_probs
from ral_gym.metrics.features import extract, make_extractor
from ral_gym.metrics.intervals import paired_estimate
from ral_gym.priors.base import Prior
from ral_gym.report.tables import markdown_table, plain_table
from ral_gym.runs.run import Run
from ral_gym.runs.storage import save_json, write_text
from ral_gym.stages.completion import continue_codes, visible_code_rows
from ral_gym.stages.device import resolve_device
from ral_gym.stages.evaluate import ROW_FILES
from ral_gym.stages.levels import load_generator, load_vqvae
from ral_gym.tokenizers.base import Tokenizer, encoder_features
from ral_gym.tokenizers.code_set import CodeSet, decode_codes

FIGURES = {
    "pixels_mean": ("pixels,\nmean", 4),
    "pixels_nearest": ("pixels,\nnearest", 4),
    "pixels_diversity": ("pixels,\ndiversity", 4),
    "features_mean": ("features,\nmean", 3),
    "features_nearest": ("features,\nnearest", 3),
    "features_diversity": ("features,\ndiversity", 3),
    "nll": ("NLL", 4),
}
"""Figure -> heading, digits."""
Scores = dict[str, Tensor]
"""Figure -> (N,), one value per image."""


@dataclass
class Arguments:
    """The run and the task."""

    run: tyro.conf.Positional[str]
    """A run folder whose generators are trained."""
    images: int = 256
    """Held-out images: a seeded random subset; all if there are fewer."""
    completions: int = 8
    """Completions of each image."""
    visible: float = 0.5
    """Share of the rows that is given."""
    temperature: float = 1.0
    """Divides the logits."""
    seed: int = 0
    """Of the random numbers, and of the subset."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N, mps."""

    def check(self) -> None:
        """Raise `ConfigError` for what cannot be run."""
        if self.images < 2 or self.completions < 2 or self.temperature <= 0:
            raise ConfigError("at least 2 images, 2 completions and a temperature above 0 are needed")


def main(argv: Sequence[str], console: Console) -> None:
    """Score every generator, print and save the table."""
    arguments = tyro.cli(Arguments, args=list(argv), description=__doc__)
    arguments.check()
    run, device = open_run(arguments.run), resolve_device(arguments.device)
    vqvae = load_vqvae(run, device)
    trained = {row: name for row, name in ROW_FILES.items() if run.has(generator_files(run, name)[0])}
    if "mle" not in trained:
        raise RunError(f"{run.path} has no trained prior: finish it with ral-gym train")
    priors: dict[str, Prior] = {row: load_generator(run, name, device) for row, name in trained.items()}
    extractor = make_extractor(run.config.evaluation.extractor, encoder_features(vqvae), device)
    codes = CodeSet.load(run.file("codes.safetensors"))
    chosen = subset(len(codes.test), arguments.images, arguments.seed)
    true = torch.from_numpy(codes.sequences("test", priors["mle"].grid)[chosen]).long()  # (N, L)
    scores = {name: score(vqvae, extractor, prior, true, arguments) for name, prior in priors.items()}
    headings, cells = table_of(scores)
    caption = caption_of(run, arguments, len(true), extractor.name)
    console.print(plain_table(headings, cells, title="Completions", caption=caption))
    means = {name: {figure: float(values.mean()) for figure, values in rows.items()} for name, rows in scores.items()}
    save_json(run.file("completion_scores.json"), {"settings": vars(arguments), "images": len(true), "rows": means})
    write_text(run.file("completion_scores.md"), markdown_table(headings, cells, caption))
    console.print(f"  {run.file('completion_scores.md')}", highlight=False)


@torch.no_grad()
def score(vqvae: Tokenizer, extractor: Any, prior: Prior, true: Tensor, arguments: Arguments) -> Scores:
    """A generator's figures for every image.

    Args:
        vqvae: decodes.
        extractor: of the features.
        prior: the generator.
        true: (N, L) int64, the sequences of the held-out images, with their labels if there are classes.
        arguments: how many completions, and how.
    """
    grid, n, many = prior.grid, len(true), arguments.completions
    rows = visible_code_rows(arguments.visible, grid.height)
    labels, truth = grid.labels_of(true), grid.without_labels(true)
    given = grid.without_labels(grid.crop(true, rows)).repeat_interleave(many, 0)  # (N S, codes_of(r))
    generator = torch.Generator().manual_seed(arguments.seed)
    uniforms = torch.rand(n * many, grid.n_codes, generator=generator)
    asked = None if labels is None else labels.repeat_interleave(many)
    drawn = continue_codes(prior, given, uniforms, arguments.temperature, labels=asked).cpu()
    top = rows * vqvae.image_size // grid.height  # pixel rows that are given
    images, real = decode_codes(vqvae, drawn), decode_codes(vqvae, truth)
    pixels, true_pixels = (x[:, :, top:].flatten(1).float() / 255 for x in (images, real))
    features, true_features = (extract(extractor, x.to(extractor.device)).cpu() for x in (images, real))
    scale = pixels.shape[1] ** 0.5  # Euclidean -> root mean square
    return {
        **distances("pixels", pixels.unflatten(0, (n, many)) / scale, true_pixels / scale),
        **distances("features", features.unflatten(0, (n, many)), true_features),
        "nll": hidden_nll(prior, true, rows),
    }


def distances(name: str, completed: Tensor, truth: Tensor) -> Scores:
    """Euclidean distances of completions (N, S, D) to the truth (N, D) and to each other."""
    to_truth = (completed - truth[:, None]).norm(dim=-1)  # (N, S)
    among = torch.cdist(completed, completed)  # (N, S, S)
    many = completed.shape[1]
    return {
        f"{name}_mean": to_truth.mean(1),
        f"{name}_nearest": to_truth.min(1).values,
        f"{name}_diversity": among.sum((1, 2)) / (many * (many - 1)),
    }


def hidden_nll(prior: Prior, true: Tensor, rows: int) -> Tensor:
    """(N,) nats per code of what is behind the first `rows` rows of images (N, L)."""
    grid, device = prior.grid, next(prior.parameters()).device
    hidden = torch.from_numpy(grid.mask(rows, grid.height)[: grid.n_codes])  # (T,)
    found = []
    for part in true.split(64):
        codes = grid.without_labels(part)
        log_probs = conditional_log_probs(prior, part.to(device)).cpu()[:, : grid.n_codes]  # (B, T, K)
        own = log_probs.gather(-1, codes[..., None]).squeeze(-1)  # (B, T)
        found.append(-own[:, hidden].mean(1))
    return torch.cat(found)


def table_of(scores: dict[str, Scores]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: a row of means per generator, and below it its paired differences from `mle`."""
    headings = ["generator", *(heading for heading, _ in FIGURES.values())]
    cells = []
    for name, row in scores.items():
        cells.append([name, *(f"{row[figure].mean():.{digits}f}" for figure, (_, digits) in FIGURES.items())])
        if name != "mle":
            cells.append(["  minus mle", *(difference(scores["mle"][f], row[f], d) for f, (_, d) in FIGURES.items())])
    return headings, cells


def difference(before: Tensor, after: Tensor, digits: int) -> str:
    """Mean of after - before (N,) and half its 95 % interval."""
    found = paired_estimate(by_image(before), by_image(after))
    return f"{found.value:+.{digits}f} ± {(found.high - found.low) / 2:.{digits}f}"


def by_image(values: Tensor) -> dict[int, float]:
    """(N,) -> number of the image -> value."""
    return dict(enumerate(values.double().tolist()))


def caption_of(run: Run, arguments: Arguments, images: int, extractor: str) -> str:
    """What the table shows."""
    return (
        f"Run {run.path.name} ({run.config.preset}, seed {run.config.seed}): {images} held-out images, "
        f"{arguments.visible:.0%} of the rows given, {arguments.completions} completions each at temperature "
        f"{arguments.temperature:g}; features of {extractor}. Differences are paired by image, "
        "± half the 95 % interval."
    )


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
