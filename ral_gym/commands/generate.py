"""`ral-gym sample` and `ral-gym complete`: pictures from the generators of a run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch import Tensor

from ral_gym.commands.draw_arguments import CompleteArguments, SampleArguments
from ral_gym.data.labels import listed
from ral_gym.errors import ConfigError, RunError, printable
from ral_gym.grid import CodeGrid
from ral_gym.pictures import save_grid
from ral_gym.priors.guidance import Sampling
from ral_gym.runs.run import Run, read_config
from ral_gym.runs.storage import write_atomic
from ral_gym.stages.completion import complete, read_image, save_completion
from ral_gym.stages.device import resolve_device
from ral_gym.stages.labels import class_names, labels_asked
from ral_gym.stages.levels import GENERATORS, load_generator, load_vqvae
from ral_gym.stages.pictures import balanced_labels, sample_codes
from ral_gym.tokenizers.code_set import decode_codes

COMPLETED_BY = {"MLE": "prior", "RAL": "policy_ema"}
"""The generators that a completion compares, as in Figure 7."""


def open_run(path: str) -> Run:
    """An existing run folder, whatever its configuration.

    Raises:
        RunError: it is not a run folder.
    """
    if not (Path(path) / "config.json").is_file():
        raise RunError(f"{path} is not a run folder (no config.json in it): give one that ral-gym train made")
    return Run(path, read_config(path))


def need(run: Run, names: list[str], remedy: str) -> None:
    """Refuse to continue without some of the run's files.

    Raises:
        RunError: which are missing, and how to make them.
    """
    missing = [name for name in names if not run.has(name)]
    if missing:
        raise RunError(f"{run.path} has no {', '.join(missing)}: {remedy}")


def check_fits(run: Run, name: str, prior: Any, vqvae: Any) -> None:
    """Refuse a generator that draws other codes than the run's tokenizer decodes.

    Raises:
        RunError: which file, and the two grids.
    """
    if dataclasses.replace(prior.grid, classes=0) != vqvae.grid:
        raise RunError(
            f"{run.file(name + '.safetensors')} draws {prior.grid}, but vqvae.safetensors beside it decodes "
            f"{vqvae.grid}; one of them belongs to another run"
        )


def generator_files(run: Run, name: str) -> list[str]:
    """The files of a generator."""
    bottom = [f"{name}_bottom.safetensors"] if run.config.vqvae.levels == 2 and name.startswith("prior") else []
    return [f"{name}.safetensors", *bottom]


def sample(arguments: SampleArguments, console: Console) -> Path:
    """Draw images; returns the picture's path.

    Raises:
        ConfigError: n or the temperature is out of range.
        RunError: not a run folder, or the generator has not been trained.
    """
    if arguments.n < 1 or not 0 < arguments.temperature < math.inf:
        raise ConfigError(
            f"{arguments.n} images at temperature {arguments.temperature}: give 1 or more, and a temperature above 0"
        )
    sampling = sampling_of(arguments)
    device, run = resolve_device(arguments.device), open_run(arguments.run)
    trained = run.has("policy_ema.safetensors")
    name = arguments.generator or ("policy_ema" if trained else "prior")
    need(run, ["vqvae.safetensors", *generator_files(run, name)], f"train it ({GENERATORS[name]}) with ral-gym train")
    vqvae = load_vqvae(run, device)
    prior: Any = load_generator(run, name, device)
    check_fits(run, name, prior, vqvae)
    names = class_names(run, prior)
    labels = labels_asked(arguments.label, names, arguments.n)
    if labels is None and names:
        labels = balanced_labels(arguments.n, len(names))
    codes = sample_codes(prior, arguments.n, arguments.seed, arguments.temperature, sampling, labels)  # (n, T)
    path = Path(arguments.output or run.file(f"samples/sample_{name}.png"))
    how = _how(arguments.temperature, sampling)
    caption = f"{GENERATORS[name]}; not selected; {how}, seed {arguments.seed}{_classes_drawn(labels, names)}"
    columns = math.ceil(math.sqrt(arguments.n))
    title = f"{arguments.n} samples of {run.path.name}, {name}"
    save_grid(path, decode_codes(vqvae, codes), columns=columns, title=title, caption=caption)
    _say(console, f"{name}: {GENERATORS[name]}", f"  {path}")
    if arguments.codes is not None:
        _save_codes(Path(arguments.codes), codes.numpy().astype(np.int16), vqvae.grid, labels, names)
        _say(console, f"  {arguments.codes}")
    return path


def complete_image(arguments: CompleteArguments, console: Console) -> Path:
    """Complete an image with MLE and RAL; returns the picture's path.

    Raises:
        ConfigError: the visible share, the number of seeds or the temperature is out of range.
        DataError: the image cannot be read.
        RunError: not a run folder, or a stage of it has not run yet.
    """
    if not 0 < arguments.visible_rows < 1:
        raise ConfigError(f"--visible-rows is {arguments.visible_rows}: give a share above 0 and below 1, such as 0.5")
    sampling = sampling_of(arguments)
    device, run = resolve_device(arguments.device), open_run(arguments.run)
    files = [file for name in COMPLETED_BY.values() for file in generator_files(run, name)]
    need(run, ["vqvae.safetensors", *files], "train all of its stages with ral-gym train")
    vqvae = load_vqvae(run, device)
    image, said = read_image(Path(arguments.image), vqvae, run.config.data)
    if said:
        _say(console, said)
    generators = {label: load_generator(run, name, device) for label, name in COMPLETED_BY.items()}
    for label, name in COMPLETED_BY.items():
        check_fits(run, name, generators[label], vqvae)
    completion = complete(
        vqvae,
        generators,
        image,
        arguments.visible_rows,
        arguments.seeds,
        arguments.seed,
        arguments.temperature,
        sampling,
        labels_asked(arguments.label, class_names(run, generators["MLE"]), arguments.seeds),
    )
    height = vqvae.grid.height
    share = f"{completion.rows} of {height} rows of codes are visible ({completion.rows / height:.0%})"
    path = Path(arguments.output or run.file(f"samples/complete_{Path(arguments.image).stem}.png"))
    last = arguments.seed + arguments.seeds - 1
    caption = f"{share}; not selected; {_how(arguments.temperature, sampling)}, seeds {arguments.seed} to {last}"
    title = f"{Path(arguments.image).name} completed by {run.path.name}: MLE and RAL"
    save_completion(path, completion, title=title, caption=caption)
    _say(console, share, f"  {path}")
    return path


def sampling_of(arguments: SampleArguments | CompleteArguments) -> Sampling:
    """Guidance, top-k and top-p of a command.

    Raises:
        ConfigError: one of them is out of range.
    """
    return Sampling(arguments.guidance, arguments.guidance_cutoff, arguments.top_k, arguments.top_p)


def _how(temperature: float, sampling: Sampling) -> str:
    more = sampling.describe()
    return f"temperature {temperature:g}{', ' * bool(more)}{more}"


def _classes_drawn(labels: Tensor | None, names: Sequence[str]) -> str:
    """The classes of the images in the order of drawing, for a caption."""
    if labels is None:
        return ""
    first = list(dict.fromkeys(labels.tolist()))
    return f"; in turn: {listed([names[number] for number in first])}"


def _save_codes(path: Path, codes: np.ndarray, grid: CodeGrid, labels: Tensor | None, names: Sequence[str]) -> None:
    """Write codes, their classes if any, and the shape of their grid as a compressed npz file."""
    facts: dict[str, Any] = {"codebook_size": grid.codebook_size, "height": grid.height, "levels": grid.levels}
    if labels is not None:
        facts |= {"labels": labels.numpy().astype(np.int16), "class_names": np.array(names)}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez_compressed(file, codes=codes, **facts)

    write_atomic(path, write)


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(printable(line), highlight=False, soft_wrap=True, markup=False)
