"""The command line, the one place above the three layers: images -> VQ-VAE -> PixelCNN -> RAL -> table and pictures."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from tqdm import tqdm

from ral_gym.config import Config
from ral_gym.errors import RalGymError, RunError
from ral_gym.presets import PRESETS, get_preset

# torch and the stages are imported inside the commands: --help and a mistyped flag answer at once, and Ctrl-C during
# the seconds that they take to load is caught like any other.
if TYPE_CHECKING:
    import torch

    from ral_gym.codes import CodeGrid, CodeSet
    from ral_gym.data import ImageSet
    from ral_gym.run import Run
    from ral_gym.vqvae import VQVAE

WEIGHTS = ("vqvae", "codes", "prior", "prior_ema", "prior_continued", "policy", "policy_ema", "critic")
FINISHED = ("results.json", *(f"{name}.safetensors" for name in WEIGHTS))
"""The files of a finished run; one that was removed is made again."""


@dataclass
class TrainArguments:
    """Train a VQ-VAE, a PixelCNN and RAL on a set of images, and compare the generators.

    The same command run again continues where it stopped; a finished run prints its table.
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    """The stages' settings; the defaults are the preset's."""
    data: str | None = None
    """Images: `faces`, `celeba:PATH` or `folder:PATH`. Short for --data.source."""
    algo: str | None = None
    """Algorithm of stage 3: reinforce, ppo, a2c, trpo, grpo or maskable_ppo. Short for --ral.algo."""
    name: str | None = None
    """Name of the run folder. None: the preset's, with the algorithm and the seed where they are not the default."""
    runs: str = "runs"
    """Folder that holds the run folders."""
    device: str = "auto"
    """`auto` (CUDA when present), `cpu`, `cuda` or `cuda:N`."""
    quiet: bool = False
    """No progress bars."""


def parse_train(argv: Sequence[str]) -> TrainArguments:
    """Arguments of the training command; `--preset` chooses the defaults of all others.

    Raises:
        ConfigError: an unknown preset, or a setting out of range.
        SystemExit: wrong arguments (2) or --help (0), by tyro.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="demo")
    preset = get_preset(first.parse_known_args(argv)[0].preset)
    description = f"{TrainArguments.__doc__}\nPresets: {', '.join(PRESETS)}."
    arguments = tyro.cli(TrainArguments, args=list(argv), default=TrainArguments(preset), description=description)
    config = arguments.config
    if arguments.data is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=arguments.data))
    if arguments.algo is not None:
        config = dataclasses.replace(config, ral=dataclasses.replace(config.ral, algo=arguments.algo))
    config.check()
    arguments.config = config
    if arguments.name is None:
        parts = [config.preset, *([config.ral.algo] if config.ral.algo != "reinforce" else [])]
        arguments.name = "-".join(parts + ([f"seed{config.seed}"] if config.seed else []))
    return arguments


def train(arguments: TrainArguments, console: Console) -> dict[str, Any]:
    """All stages in order; each loads what is there, continues what was begun, or trains."""
    from ral_gym.agents.defaults import check_algorithm
    from ral_gym.agents.train_ral import train_ral
    from ral_gym.codes import CodeGrid
    from ral_gym.data import load_images
    from ral_gym.run import Run
    from ral_gym.stages.common import resolve_device
    from ral_gym.stages.evaluate import check_extractor, check_images, evaluate
    from ral_gym.stages.train_prior import continue_prior, train_prior
    from ral_gym.stages.train_vqvae import train_vqvae
    from ral_gym.storage import load_json

    config, progress = arguments.config, not arguments.quiet
    check_algorithm(config.ral.algo)
    device = resolve_device(arguments.device)
    run = Run(Path(arguments.runs) / str(arguments.name), config)
    if all(map(run.has, FINISHED)):
        return report(run, load_json(run.file("results.json")), console)
    check_extractor(run)
    images = load_images(config.data, seed=config.seed, progress=progress)
    check_images(images)
    _introduce(images, run, device, console)
    vqvae = train_vqvae(run, images, device, progress)
    grid = CodeGrid(vqvae.height, vqvae.width, vqvae.codebook_size)
    codes = _codes(run, vqvae, grid, images, progress)
    prior = train_prior(run, codes, grid, device, progress)
    train_ral(run, vqvae, prior, codes, device, progress)
    continue_prior(run, prior, codes, device, progress)
    return report(run, evaluate(run, vqvae, codes, images, device, progress), console)


def _introduce(images: ImageSet, run: Run, device: torch.device, console: Console) -> None:
    """The first lines: which data, how to give other data, where the run lives."""
    lines = [f"Data: {images.description}"]
    if run.config.data.source == "faces":
        lines += ["  Your own: --data celeba:PATH (img_align_celeba, folder or zip) or --data folder:PATH"]
    lines += [f"Run:  {run.path}  (preset {run.config.preset}, {run.config.ral.algo}, {device})"]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _codes(run: Run, vqvae: VQVAE, grid: CodeGrid, images: ImageSet, progress: bool) -> CodeSet:
    """The code file: made once."""
    from ral_gym.codes import CodeSet, encode_set

    file = run.file("codes.safetensors")
    if not file.exists():
        passes = run.config.prior.augmented_passes
        encode_set(vqvae, images, passes=passes, seed=run.config.seed * 1000 + 7, progress=progress).save(file)
    return CodeSet.load(file, grid)


def report(run: Run, results: dict[str, Any], console: Console) -> dict[str, Any]:
    """The table, and the pictures' paths.

    Raises:
        RunError: the results are not ral_gym's.
    """
    from ral_gym.figures import results_table

    try:
        table = results_table(results)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{run.file('results.json')} is no results file; remove it to evaluate again") from error
    console.print(table)
    for picture in sorted(run.file("samples").glob("*.png")):
        console.print(f"  {picture}", highlight=False, soft_wrap=True, markup=False)
    return results


class _Lines(logging.Handler):
    """Log records as lines "warning: ..." on the error stream, above any progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        tqdm.write(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


def _quiet_about_files(arguments: threading.ExceptHookArgs) -> None:
    """No traceback from TensorBoard's writing thread: the main thread raises the same error at its next write."""
    if not issubclass(arguments.exc_type, OSError):
        threading.__excepthook__(arguments)


def run_command(command: Callable[[Sequence[str], Console], Any], argv: Sequence[str]) -> int:
    """Run a command; a user's mistake is one line on the error stream.

    Returns:
        the exit code: 0, 2 after an error a user can mend, 130 after Ctrl-C.
    """
    logger, handler = logging.getLogger("ral_gym"), _Lines()
    logger.addHandler(handler)
    thread_hook, threading.excepthook = threading.excepthook, _quiet_about_files
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")  # libraries' remarks to programmers
            command(argv, Console())
        return 0
    except RalGymError as error:
        message, code = f"error: {error}", 2
    except OSError as error:
        thing, reason = error.filename or "a log file", error.strerror or str(error)
        remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
        message, code = f"error: {thing}: {reason}; {remedy} and run the same command again", 2
    except KeyboardInterrupt:
        message, code = "stopped: what was saved is kept; run the same command again to continue", 130
    finally:
        logger.removeHandler(handler)
        threading.excepthook = thread_hook
    for bar in list(getattr(tqdm, "_instances", ())):  # an unfinished bar would share its line with the message
        bar.close()
    print(message, file=sys.stderr)
    return code


def train_main(argv: Sequence[str] | None = None) -> int:
    """The training command, for ``examples/train_celeba.py``."""
    return run_command(lambda args, console: train(parse_train(args), console), sys.argv[1:] if argv is None else argv)
