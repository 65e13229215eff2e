"""`ral-gym import`: a released checkpoint becomes a run folder whose stages 1 and 2 are done."""

from __future__ import annotations

import re
from pathlib import Path

from rich.console import Console

from ral_gym.commands.arguments import check_name
from ral_gym.commands.extras import check_source
from ral_gym.commands.import_arguments import ImportArguments, LlamaGenArguments, TamingArguments
from ral_gym.data.labels import read_class_names
from ral_gym.errors import ConfigError, RunError, printable
from ral_gym.runs.run import Run
from ral_gym.stages.device import resolve_device
from ral_gym.stages.released.importing import Released, import_run
from ral_gym.stages.released.networks import (
    LLAMAGEN,
    LLAMAGEN_VQ,
    TAMING,
    Weights,
    llamagen_prior,
    llamagen_tokenizer,
    taming_prior,
    taming_tokenizer,
)
from ral_gym.stages.released.taming_config import TamingConfig, read_taming_config
from ral_gym.stages.released.torch_files import read_checkpoint


def import_released(arguments: ImportArguments, console: Console) -> Run:
    """Run the command; returns the new run.

    Raises:
        ConfigError: a size, a name or a class list does not fit.
        RunError: a file is missing, damaged or another one than expected, or the run folder exists.
    """
    given = arguments.source
    check_name(given.name)
    path = Path(given.runs) / given.name
    if path.exists() or path.is_symlink():
        raise RunError(f"{path} exists: choose another --name, or remove it")
    check_source(given.data)
    device = resolve_device(given.device)
    if given.image_size < 8:
        raise ConfigError(f"--image-size is {given.image_size}: give the side of the images in pixels, 8 or more")
    if given.heads is not None and given.heads < 1:
        raise ConfigError(f"--heads is {given.heads}: give 1 or more")
    released = _llamagen(given) if isinstance(given, LlamaGenArguments) else _taming(given)
    run = import_run(released, path, given.data, device, progress=not given.quiet)
    _say(console, *_described(released, given.image_size), f"Run:       {run.path}")
    if given.data is None:
        _say(console, "  It has no images: draw from it, or train stage 3 with rewards that need none")
    return run


def _llamagen(given: LlamaGenArguments) -> Released:
    tokens = read_checkpoint(Path(given.vq), LLAMAGEN_VQ, average=True)
    tokenizer = llamagen_tokenizer(tokens, given.image_size)
    gpt = read_checkpoint(Path(given.gpt), LLAMAGEN)
    prior = llamagen_prior(gpt, tokenizer[0].grid, given.heads)
    _check_side(given)
    names = _class_names(given.class_names, prior)
    return Released("llamagen", tokenizer, prior, tokens.facts(), gpt.facts(), names)


def _check_side(given: LlamaGenArguments) -> None:
    """Refuse the side of another file: weights of 256 pixels draw nonsense at 384, and no shape tells.

    Raises:
        ConfigError: the file is named for another side.
    """
    named = re.search(r"c2i_[A-Za-z0-9]+_(256|384)\b", Path(given.gpt).name)
    if named and int(named[1]) != given.image_size:
        raise ConfigError(
            f"--image-size is {given.image_size}, but {Path(given.gpt).name} is named for {named[1]} pixels: give "
            f"--image-size {named[1]}"
        )


def _taming(given: TamingArguments) -> Released:
    config = TamingConfig() if given.config is None else read_taming_config(Path(given.config))
    if given.config is None and given.classes is None:
        raise ConfigError("the checkpoint does not say what it draws from: give --config model.yaml, or --classes N")
    classes = config.classes if given.classes is None else given.classes
    if classes < 0:
        raise ConfigError(f"--classes is {classes}: give 0 (not conditional) or more")
    checkpoint = read_checkpoint(Path(given.checkpoint), TAMING)
    tokenizer = taming_tokenizer(checkpoint, given.image_size)
    prior = taming_prior(checkpoint, tokenizer[0].grid, given.heads or config.heads, classes, config.start)
    facts, names = checkpoint.facts(), _class_names(given.class_names, prior)
    return Released("taming", tokenizer, prior, facts, facts, names)


def _class_names(file: str | None, prior: Weights) -> tuple[str, ...]:
    """The names in a file; see `read_class_names`."""
    return () if file is None else read_class_names(file, prior[0].classes)


def _described(released: Released, image_size: int) -> list[str]:
    vqgan, prior = released.tokenizer[0], released.prior[0]
    grid, config = vqgan.grid, prior.config
    weights = sum(weight.numel() for weight in prior.parameters())
    kind = f"{prior.classes} classes" if prior.classes else "no classes"
    return [
        f"Tokenizer: {released.tokenizer_source['file']}: {image_size}x{image_size} pixels as "
        f"{grid.height}x{grid.width} codes of {grid.codebook_size}",
        f"Prior:     {released.prior_source['file']}: {config['layers']} layers, {prior.attention_heads} heads, "
        f"{prior.hidden_units} units, {weights:,} weights, {kind}",
    ]


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(printable(line), highlight=False, soft_wrap=True, markup=False)
