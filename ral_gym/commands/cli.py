"""The command line, above all other layers: ``ral-gym train | sample | complete | evaluate | ...``.

The arguments are in `ral_gym.commands.arguments`; the commands are in the other files of this folder.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from ral_gym.commands.arguments import (
    Arguments,
    CompleteArguments,
    EvaluateArguments,
    PresetsArguments,
    ReferenceArguments,
    ReportArguments,
    RunsArguments,
    SampleArguments,
    TrainArguments,
    VerifyArguments,
    parse,
    parse_train,
)
from ral_gym.commands.draw_arguments import PlayArguments
from ral_gym.commands.ending import run_command
from ral_gym.commands.hub_arguments import PullArguments, PushArguments
from ral_gym.commands.import_arguments import ImportArguments
from ral_gym.commands.look_arguments import (
    CacheArguments,
    CompareArguments,
    CompletionArguments,
    DemoArguments,
    WatchArguments,
    training_words,
)
from ral_gym.commands.next_steps import say_next, welcome
from ral_gym.commands.train import evaluate_run, train

__all__ = ["main", "train_main"]


def _run(argv: Sequence[str], console: Console) -> None:
    """Parse and run one command, and say what to try next; without a command, say what to begin with."""
    if not argv:
        welcome(console)
        return
    arguments = parse(argv)
    if isinstance(arguments, DemoArguments):
        arguments = parse_train(training_words(arguments))
    _dispatch(arguments, console)
    say_next(arguments, console)


def _dispatch(arguments: Arguments, console: Console) -> None:
    """Run one command."""
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
        case WatchArguments():
            from ral_gym.commands.watch import watch

            watch(arguments, console)
        case VerifyArguments():
            from ral_gym.commands.verify import verify_run

            verify_run(arguments, console)
        case ReportArguments():
            from ral_gym.commands.report import report_run

            report_run(arguments, console)
        case ReferenceArguments():
            from ral_gym.commands.reference import write_reference

            write_reference(arguments, console)
        case PushArguments():
            from ral_gym.commands.hub import push_run

            push_run(arguments, console)
        case PullArguments():
            from ral_gym.commands.hub import pull_run

            pull_run(arguments, console)
        case RunsArguments():
            from ral_gym.commands.run_list import list_runs

            list_runs(arguments, console)
        case CompareArguments():
            from ral_gym.commands.compare import compare_runs

            compare_runs(arguments, console)
        case PresetsArguments():
            from ral_gym.commands.overview import show_presets

            show_presets(arguments, console)
        case CacheArguments():
            from ral_gym.commands.cache import show_cache

            show_cache(arguments, console)
        case CompletionArguments():
            from ral_gym.commands.completion import print_completion

            print_completion(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """``ral-gym``."""
    return run_command(_run, sys.argv[1:] if argv is None else argv, ends_process=argv is None)


def train_main(argv: Sequence[str] | None = None) -> int:
    """The training command alone, for ``examples/train_celeba.py``."""

    def run(words: Sequence[str], console: Console) -> None:
        arguments = parse_train(words)
        train(arguments, console)
        say_next(arguments, console)

    return run_command(run, sys.argv[1:] if argv is None else argv, ends_process=argv is None)
