"""A run as one HTML page: new samples, curves, the results table, score maps, settings, and commands to repeat it.

Everything is taken from the run folder and the images it was trained on, with fixed seeds, so that the same run gives
the same page. A section whose stage has not run says so, with the command that runs it.
"""

from __future__ import annotations

import functools
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

import ral_gym
from ral_gym.data.images import ImageSet, load_images, to_float
from ral_gym.data.opening import open_image, read_file
from ral_gym.data.subsets import subset
from ral_gym.errors import ConfigError, DataError, RunError
from ral_gym.priors.base import Prior
from ral_gym.priors.two_level import SUFFIXES
from ral_gym.report.figures import heat, heat_colours, strip
from ral_gym.report.page import (
    Section,
    colour_scale,
    definitions,
    figure,
    grid,
    image,
    missing,
    page,
    paragraph,
    strips,
)
from ral_gym.report.text import (
    STAGE_NAMES,
    configuration,
    frontier,
    learning_curves,
    repeat,
    results_section,
    stage_command,
)
from ral_gym.rewards.making import load_scorer
from ral_gym.rewards.scorer import CriticScorer
from ral_gym.rewards.view import View
from ral_gym.runs.results import load_results
from ral_gym.runs.run import Run
from ral_gym.runs.storage import write_text
from ral_gym.stages.completion import complete
from ral_gym.stages.levels import load_generator, load_vqvae
from ral_gym.stages.pictures import balanced_labels, sample_codes
from ral_gym.tokenizers.base import Tokenizer
from ral_gym.tokenizers.code_set import CodeSet, decode_codes, encode_images

N_SHOWN = 16
"""Images per kind in the samples section."""
N_SCORED = 8
"""Images per kind in the score-map section: the first of the samples."""
N_COMPLETED, COMPLETIONS = 4, 4
"""Number of held-out images to complete, and of completions by each generator."""
VISIBLE = 0.5
"""Share of the completed images' rows that is given."""
DRAWN = {"MLE": "prior", "RAL": "policy_ema"}
"""A generator's name on the page -> its file."""
EXPOSURE_CAPTIONS = {
    "exposure_given_rows": (
        "Prefix curve.",
        "KID of images whose first rows are real and whose other rows are drawn: at the left nothing is given, at the "
        "right nothing is drawn. It falls in any case, since less is drawn: compare the generators.",
    )
}
STAGE_OF = {"prior": "prior", "policy_ema": "ral"}


class Report:
    """The contents of one page, loaded at first use.

    Args:
        run: the run folder.
        device: device to draw on.
        progress: show a progress bar if decoding the images takes long.
    """

    def __init__(self, run: Run, device: torch.device, progress: bool = True) -> None:
        self.run, self.device, self.progress = run, device, progress
        self.seed = run.config.seed * 1000 + 8  # the seed of the run's own pictures

    @functools.cached_property
    def vqvae(self) -> Tokenizer | None:
        """The VQ-VAE, if it has been trained."""
        return load_vqvae(self.run, self.device) if self.run.has("vqvae.safetensors") else None

    @functools.cached_property
    def images(self) -> ImageSet | str:
        """The run's images, or why they are not available."""
        try:
            return load_images(self.run.config.data, seed=self.run.config.seed, progress=self.progress)
        except (ConfigError, DataError) as error:
            return str(error)

    @functools.cached_property
    def held_out(self) -> Tensor | None:
        """Held-out images (N, C, S, S) uint8, the first `N_SHOWN` in a seeded order."""
        if isinstance(self.images, str) or not len(self.images.test):
            return None
        return torch.from_numpy(self.images.test[self._shown(len(self.images.test))].copy())

    def _shown(self, n: int) -> np.ndarray:
        """Which of n held-out images are shown (N_SHOWN,)."""
        return torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))[:N_SHOWN].numpy()

    @property
    def no_images(self) -> str:
        """Why there are no held-out images."""
        return self.images if isinstance(self.images, str) else "the data set is too small to hold any out"

    @functools.cached_property
    def reconstructed_codes(self) -> np.ndarray | None:
        """Codes (N, T) of `held_out`; if there are no images, those of the code file."""
        if self.vqvae is None:
            return None
        if self.held_out is not None:
            return encode_images(self.vqvae, self.held_out.numpy(), progress=False)
        test = None if self.code_set is None else self.code_set.test
        return None if test is None else test[subset(len(test), N_SHOWN, self.seed)]

    @functools.cached_property
    def code_set(self) -> CodeSet | None:
        """The run's codes, if it has any."""
        known = self.vqvae if self.run.has("codes.safetensors") else None
        return None if known is None else CodeSet.load(self.run.file("codes.safetensors"), known.grid)

    @functools.cached_property
    def reconstructed_labels(self) -> Tensor | None:
        """The classes (N,) of `reconstructed_codes`; None if the images have none."""
        source = self.code_set if self.held_out is None else self.images
        if source is None or isinstance(source, str) or source.labels is None:
            return None
        known = torch.from_numpy(source.labels.test)
        return known[subset(len(known), N_SHOWN, self.seed) if self.held_out is None else self._shown(len(known))]

    @functools.cached_property
    def reconstruction(self) -> Tensor | None:
        """The images of these codes."""
        codes = self.reconstructed_codes
        return None if codes is None or self.vqvae is None else decode_codes(self.vqvae, codes)

    @functools.cached_property
    def generators(self) -> dict[str, Prior]:
        """The generators that have been trained, by their names on the page."""
        names = {label: name for label, name in DRAWN.items() if all(map(self.run.has, self._files(name)))}
        return {label: load_generator(self.run, name, self.device) for label, name in names.items()}

    @functools.cached_property
    def drawn(self) -> dict[str, Tensor]:
        """Codes (N_SHOWN, T) of each generator, from the same uniforms."""
        return {label: sample_codes(prior, N_SHOWN, self.seed) for label, prior in self.generators.items()}

    @functools.cached_property
    def results(self) -> dict[str, Any] | None:
        """The results table, if there is one."""
        return load_results(self.run.file("results.json")) if self.run.has("results.json") else None

    @functools.cached_property
    def scorer(self) -> CriticScorer | None:
        """The critic, with the normalisation it was saved with."""
        file = self.run.file("critic.safetensors")
        if self.vqvae is None or not file.is_file():
            return None
        return load_scorer(file, self.vqvae, self.device, lambda: load_generator(self.run, "prior", self.device))

    def _files(self, name: str) -> list[str]:
        """The files of a generator."""
        levels = self.run.config.vqvae.levels if name.startswith("prior") else 1
        return [f"{name}{suffix}.safetensors" for suffix in SUFFIXES[:levels]]

    def lacking(self, what: str, *stages: str) -> Markup:
        """A note on what is missing, with the command for its stages."""
        names = " and ".join(STAGE_NAMES[stage] for stage in stages)
        return missing(f"{what}: {names} has not run yet.", stage_command(self.run, *stages))

    # Sections ---------------------------------------------------------------------------------------------------------

    def samples(self) -> Markup:
        """Real | reconstruction | MLE | RAL."""
        figures, notes = [], []
        seeded = f"seed {self.seed}, temperature 1"
        if self.held_out is not None:
            n = len(self.held_out)
            alt = f"{n} held-out photos of the data set"
            figures.append(figure("real", strip(self.held_out, alt, 4), "Real.", f"{n} held-out images."))
        else:
            notes.append(missing(f"No real images: {self.no_images}"))
        if self.reconstruction is not None:
            n = len(self.reconstruction)
            which = "the same images" if self.held_out is not None else "held-out images"
            picture = strip(self.reconstruction, f"{n} images decoded from their codes", 4)
            caption = f"{which.capitalize()} decoded from their codes: what the tokenizer alone loses."
            figures.append(figure("reconstruction", picture, "Reconstruction.", caption))
        else:
            notes.append(self.lacking("No reconstructions", "vqvae"))
        words = {"MLE": "the prior of stage 2", "RAL": "the average of stage 3's policy"}
        for label, name in DRAWN.items():
            if label in self.drawn and self.vqvae is not None:
                alt = f"{N_SHOWN} images drawn by {label}, not selected"
                picture = strip(decode_codes(self.vqvae, self.drawn[label]), alt, 4)
                caption = f"Drawn by {words[label]}; not selected, {seeded}."
                figures.append(figure(label.lower(), picture, f"{label}.", caption))
            else:
                notes.append(self.lacking(f"No samples of {label}", STAGE_OF[name]))
        path = self.run.file("samples/classes.png")
        if path.is_file():
            alt = "samples by class, MLE beside RAL"
            figures.append(figure("classes", _picture(path, alt), "By class.", "Not selected, from the same uniforms."))
        intro = "MLE and RAL draw from the same random numbers, so images at the same position can be compared."
        return (paragraph(intro) if len(self.drawn) > 1 else Markup()) + grid(figures, "tiles") + Markup().join(notes)

    def completions(self) -> Markup:
        """Held-out images whose lower half is hidden and drawn by the generators."""
        untrained = [STAGE_OF[name] for label, name in DRAWN.items() if label not in self.generators]
        if self.vqvae is None or untrained:
            stages = [*(["vqvae"] if self.vqvae is None else []), *untrained]
            return self.lacking("No completions", *stages)
        if self.held_out is None:
            return missing(f"No held-out images to complete: {self.no_images}")
        figures = []
        for number, original in enumerate(self.held_out[:N_COMPLETED], start=1):
            try:
                done = complete(self.vqvae, self.generators, original, VISIBLE, COMPLETIONS, self.seed)
            except ConfigError as error:
                return missing(str(error))
            given = torch.stack([original, done.visible])
            parts = {"Original, given": strip(given, f"held-out image {number}, and the rows of it that are given", 2)}
            for label, images in done.completed.items():
                alt = f"{COMPLETIONS} completions of held-out image {number} by {label}"
                parts[label] = strip(images, alt, COMPLETIONS)
            share = f"{done.rows} of {self.vqvae.grid.height} rows of codes are given"
            last = self.seed + COMPLETIONS - 1
            caption = f"{share}; not selected; seeds {self.seed} to {last}, temperature 1."
            figures.append(figure(f"completion-{number}", strips(parts.items()), f"Image {number}.", caption))
        intro = "The lower rows of held-out images are hidden before the image is encoded, then drawn (Section 5.5)."
        return paragraph(intro) + grid(figures)

    def score_maps(self) -> Markup:
        """The critic's score of each patch of real and drawn images."""
        if self.scorer is None or self.vqvae is None:
            return self.lacking("No score maps", "ral")
        real = self.reconstructed_codes
        codes = {} if real is None else {"Real": torch.from_numpy(real[:N_SCORED].astype(np.int64))}
        codes |= {label: drawn[:N_SCORED] for label, drawn in self.drawn.items()}
        images = {label: decode_codes(self.vqvae, those) for label, those in codes.items()}
        maps = {label: self._scores(codes[label], shown, self._classes(label)) for label, shown in images.items()}
        if not maps:
            return missing(f"No images to score: {self.no_images}")
        both = torch.cat([scores.flatten() for scores in maps.values()])
        low, high = (float(end) for end in np.quantile(both.cpu().numpy(), (0.02, 0.98)))
        side = next(iter(maps.values())).shape[-1]
        whose = {"Real": "the first reconstructions above: the critic sees decoded images only"}
        figures = []
        for label, shown in images.items():
            mean = float(maps[label].mean())
            alt = f"the critic's scores over {len(shown)} images, {label}; their mean is {mean:.3g}"
            overlay = strip(heat(shown, maps[label], low, high), alt, 4)
            which = whose.get(label, f"the first {len(shown)} samples of {label} above")
            caption = f"{which[0].upper()}{which[1:]}. Mean score {mean:.3f}."
            figures.append(figure(f"scores-{label.lower()}", overlay, f"{label}.", caption))
        scale = colour_scale(
            heat_colours(),
            (f"{low:.2f}", f"{(low + high) / 2:.2f}", f"{high:.2f}"),
            f"colour scale of the scores, from {low:.3g} (orange) to {high:.3g} (violet)",
        )
        intro = (
            f"The critic's map of {side} x {side} scores, each over its patch: orange is low, more like drawn images; "
            "violet is high, more like real ones. Scores are normalised as for the rewards; the colours span the "
            "middle 96 % of them."
        )
        return paragraph(intro) + scale + grid(figures, "maps")

    def _classes(self, label: str) -> Tensor | None:
        """The classes of the scored images of a kind; None if the generators have none."""
        classes = max((prior.grid.classes for prior in self.generators.values()), default=0)
        labels = self.reconstructed_labels if label == "Real" else balanced_labels(N_SHOWN, max(classes, 1))
        return labels[:N_SCORED] if classes and labels is not None else None

    def _scores(self, codes: Tensor, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Normalised score maps (N, h, w) of codes (N, T), their images (N, C, S, S) uint8 and their classes (N,)."""
        assert self.scorer is not None and self.vqvae is not None
        view = View(codes, lambda _: to_float(images).to(self.device), labels, batch_size=len(codes))
        scores = self.scorer.normalizer(self.scorer.scores(view))
        return self.scorer.score_map(scores, self.vqvae.grid.height).cpu()

    def exposure_bias(self) -> Markup:
        """The run's prefix curve, and the curves of an exposure-bias experiment if its pictures exist."""
        pictures = sorted(self.run.file("samples").glob("exposure*.png"))
        if not pictures:
            return self.lacking("No curves", "evaluate")
        figures = []
        for number, path in enumerate(pictures):
            words = path.stem.replace("_", " ")
            title, caption = EXPOSURE_CAPTIONS.get(path.stem, (f"{words.capitalize()}.", path.name))
            name = path.stem if re.fullmatch(r"[\w-]+", path.stem, re.ASCII) else f"exposure-{number}"
            figures.append(figure(name, _picture(path, f"plot: {words}"), title, caption))
        intro = (
            "Does a generator suffer from its own mistakes? examples/exposure_bias.py measures this against an oracle, "
            "whose likelihoods are known; its pictures are shown here if they are in the run's samples folder as "
            "exposure*.png."
        )
        return paragraph(intro) + grid(figures, "plots")

    def header(self) -> Markup:
        """What this run is, and which stages are finished."""
        config, seconds = self.run.config, self.run.seconds()
        side = self.vqvae.grid.height if self.vqvae is not None else config.grid_size
        grids = f"{side} x {side}" + (f" + {2 * side} x {2 * side}" if config.vqvae.levels == 2 else "")
        done = {
            "vqvae": self.vqvae is not None,
            "prior": "MLE" in self.generators,
            "ral": "RAL" in self.generators,
            "evaluate": self.results is not None,
        }
        taken = {**seconds, "evaluate": seconds.get("evaluation"), "prior": _sum(seconds, "prior", "prior_bottom")}
        controls = [f"prior_{name}{suffix}" for name in ("continued", "equal_time") for suffix in SUFFIXES]
        taken["ral"] = _sum(seconds, "ral", *controls)
        stages = [
            STAGE_NAMES[stage] + (f": {taken[stage]:,.0f} s" if taken.get(stage) else "")
            for stage in done
            if done[stage]
        ]
        left = [STAGE_NAMES[stage] for stage in done if not done[stage]]
        facts = [
            ("Data", self.images.description if isinstance(self.images, ImageSet) else config.data.source),
            ("Codes", f"{grids} per image, each one of {config.vqvae.codebook_size}"),
            ("Stage 3", f"{config.ral.algo}, {config.ral.reward} reward, {config.ral.n_updates:,} updates"),
            ("Preset", f"{config.preset}, seed {config.seed}"),
            ("Finished", "; ".join(stages) or "no stage"),
            *([("Not run", "; ".join(left))] if left else []),
        ]
        return definitions(facts)

    def html(self) -> str:
        """The whole page."""
        sections = [
            Section("samples", "Samples", self.samples()),
            Section("completions", "Completions", self.completions()),
            Section("results", "Results", results_section(self.run, self.results)),
            Section("frontier", "Frontier", frontier(self.run, self.results)),
            Section("curves", "Learning curves", learning_curves(self.run)),
            Section("score-maps", "Score maps", self.score_maps()),
            Section("exposure-bias", "Exposure bias", self.exposure_bias()),
            Section("configuration", "Configuration", configuration(self.run.config)),
            Section("repeat", "Repeat it", repeat(self.run)),
        ]
        title = f"{self.run.path.resolve().name}: a run of ral_gym"
        return page(title, self.header(), sections, f"Written by ral_gym {ral_gym.__version__} (ral-gym report).")


def _picture(path: Path, alt: str) -> Markup:
    """A picture of the run folder, scaled down.

    Raises:
        RunError: it is not a picture, or exceeds the size limits for untrusted files.
    """
    try:
        with open_image(read_file(path)) as opened:
            small = opened.convert("RGB")
    except Exception as error:  # damaged files make Pillow's readers raise nearly anything
        raise RunError(f"{path} cannot be shown in the report ({error}): remove it, or make it again") from error
    small.thumbnail((1200, 1200))
    file = io.BytesIO()
    small.quantize(128).save(file, format="png", optimize=True)
    return image(file.getvalue(), alt, small.width, small.height)


def _sum(seconds: dict[str, float], *names: str) -> float:
    return sum(seconds.get(name, 0.0) for name in names)


def write_report(run: Run, path: Path, device: torch.device, progress: bool = True) -> Path:
    """Write the page of a run, atomically.

    Args:
        run: the run folder, with any of its stages finished.
        path: HTML file to write.
        device: device to draw on.
        progress: show a progress bar if decoding the images takes long.

    Returns:
        `path`.

    Raises:
        RunError: a file of the run is damaged, or the page cannot be written.
    """
    write_text(path, Report(run, device, progress).html())
    return path
