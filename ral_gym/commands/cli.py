"""The command line, above all other layers: ``ral-gym train | sample | complete | evaluate | ...``.

The arguments are in `ral_gym.commands.arguments`; the commands are in the other files of this folder.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from ral_gym.commands.arguments import (
    CacheArguments,
    CompleteArguments,
    EvaluateArguments,
    PresetsArguments,
    ReferenceArguments,
    ReportArguments,
    SampleArguments,
    TrainArguments,
    VerifyArguments,
    parse,
    parse_train,
)
from ral_gym.commands.draw_arguments import PlayArguments
from ral_gym.commands.ending import run_command
from ral_gym.commands.import_arguments import ImportArguments
from ral_gym.commands.train import evaluate_run, train

__all__ = ["main", "train_main"]


def _dispatch(argv: Sequence[str], console: Console) -> None:
    """Parse and run one command."""
    arguments = parse(argv)
    match arguments:
        case TrainArguments():
            train(arguments, console)
        case ImportArguments():
            from ral_gym.commands.importing import import_released

            import_released(arguments, console)
        case EvaluateArguments():
            evaluate_run(arguments, console)
        case SampleArguments():
            from ral_gym.commands.generate import sample

            sample(arguments, console)
        case CompleteArguments():
            from ral_gym.commands.generate import complete_image

            complete_image(arguments, console)
        case PlayArguments():
            from ral_gym.commands.play import play

            play(arguments, console)
        case VerifyArguments():
            from ral_gym.commands.verify import verify_run

            verify_run(arguments, console)
        case ReportArguments():
            from ral_gym.commands.report import report_run

            report_run(arguments, console)
        case ReferenceArguments():
            from ral_gym.commands.reference import write_reference

            write_reference(arguments, console)
        case PresetsArguments():
            from ral_gym.commands.overview import show_presets

            show_presets(arguments, console)
        case CacheArguments():
            from ral_gym.commands.cache import show_cache

            show_cache(arguments, console)


def main(argv: Sequence[str] | None = None) -> int:
    """``ral-gym``."""
    return run_command(_dispatch, sys.argv[1:] if argv is None else argv, ends_process=argv is None)


def train_main(argv: Sequence[str] | None = None) -> int:
    """The training command alone, for ``examples/train_celeba.py``."""
    return run_command(
        lambda args, console: train(parse_train(args), console),
        sys.argv[1:] if argv is None else argv,
        ends_process=argv is None,
    )
