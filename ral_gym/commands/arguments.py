"""The arguments of every command, as dataclasses that tyro turns into flags; nothing here imports torch."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, cast

import tyro

from ral_gym.commands.draw_arguments import CompleteArguments, PlayArguments, Plugins, RunFolder, SampleArguments
from ral_gym.commands.ending import output
from ral_gym.commands.help import is_short_help, known_preset, print_short_help, with_full_help
from ral_gym.commands.hub_arguments import PullArguments, PushArguments
from ral_gym.commands.import_arguments import ImportArguments
from ral_gym.commands.look_arguments import (
    CacheArguments,
    CompareArguments,
    CompletionArguments,
    DemoArguments,
    RunsArguments,
    WatchArguments,
)
from ral_gym.config import SECTIONS, Config, RALConfig
from ral_gym.errors import ConfigError
from ral_gym.presets import PRESETS
from ral_gym.registry import EXTRACTORS, METRICS, allow_given, load_plugins
from ral_gym.settings import check_parts

Stage = Literal["vqvae", "prior", "ral", "evaluate"]
STAGES: tuple[Stage, ...] = ("vqvae", "prior", "ral", "evaluate")


@dataclass
class TrainArguments:
    """Train a tokenizer, a prior and RAL on a set of images, and compare the generators.

    Running the same command again continues a stopped run; a finished run prints its results table.
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    """The stages' settings; the defaults are the preset's."""
    data: str | None = None
    """Images: `faces`, `emoji`, `celeba:PATH`, `folder:PATH`, `lsun:PATH`, `hf:NAME`, or your own `NAME:ARGUMENT`.
    Short for --data.source."""
    algo: str | None = None
    """Algorithm of stage 3: reinforce, ppo, a2c, trpo, grpo, maskable_ppo, or your own `module:Class`. Short for
    --ral.algo; its own settings have a section, such as --ral.ppo.clip-range."""
    start_from: str | None = None
    """A run folder whose trained tokenizer and prior this run starts from: only stage 3 is trained. Its settings
    replace the preset's; only those of `ral`, `critic` and `evaluation` may be changed. With --preset, `ral` and
    `critic` start from that preset's. Give --name too."""
    stages: tuple[Stage, ...] = STAGES
    """Run only these stages, for instance `--stages vqvae prior`; each needs the files of the stages before it."""
    dry_run: bool = False
    """Print parameters, codes, memory and FLOPs of every stage, and train nothing."""
    processes: int | None = None
    """With --dry-run: as if so many processes shared the work, one GPU each. To train on several, start them:
    `torchrun --nproc-per-node N -m ral_gym train ...`."""
    name: str | None = None
    """Name of the run folder. None: the preset's, plus algorithm and seed if they are not the preset's."""
    runs: str = "runs"
    """Folder that holds the run folders."""
    device: str = "auto"
    """`auto` (CUDA when present), `cpu`, `cuda` or `cuda:N`."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Stages 1 and 2: `bf16` computes in 16 bits; weights and optimizer stay in 32."""
    gradient_accumulation: int = 1
    """Stages 1 and 2: split each batch into this many parts, for less memory; the step stays the same."""
    quiet: bool = False
    """No progress bars."""
    track: tuple[Literal["wandb", "mlflow", "trackio"], ...] = ()
    """Also send what metrics.jsonl gets to these experiment trackers, which must be installed; TensorBoard has it
    anyway."""
    plugins: Plugins = ()
    """Your own parts: modules that register some, or `module:Class` names that the run's files may ask for."""


@dataclass
class EvaluateArguments:
    """Measure a trained run's generators and draw its pictures; a measured run prints its results table."""

    run: RunFolder
    """The run folder, for instance runs/demo."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    quiet: bool = False
    """No progress bars."""
    plugins: Plugins = ()
    """Your own parts: modules that register some, or `module:Class` names that the run's files may ask for."""


@dataclass
class ReferenceArguments:
    """Write the statistics of real images' features, for --ral.reward-reference of a run with or without images."""

    run: RunFolder
    """The run folder, for instance runs/demo: its tokenizer, and how it crops and resizes."""
    features: str = "encoder"
    """The features, as --ral.reward-features."""
    data: str | None = None
    """A source of images as in `ral-gym train`. None: the run's training images after encoding and decoding."""
    n: int | None = None
    """Use only this many images, a seeded random subset. None: all."""
    output: str | None = None
    """File. None: RUN/reference_FEATURES.npz."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    quiet: bool = False
    """No progress bars."""
    plugins: Plugins = ()
    """Your own parts: modules that register some, or `module:Class` names that the run's files may ask for."""


@dataclass
class PresetsArguments:
    """List the presets, or all settings of one."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """A preset, `module:NAME` or a .json file; None: a table of all registered presets."""
    plugins: Plugins = ()
    """Your own parts: modules that register some."""


@dataclass
class ReportArguments:
    """Write a run as one self-contained HTML page: samples, completions, results, curves, score maps, settings."""

    run: RunFolder
    """The run folder, for instance runs/demo; the page says which stages have not run."""
    output: str | None = None
    """HTML file. None: RUN/report.html."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    plugins: Plugins = ()
    """Your own parts: modules that register some, or `module:Class` names that the run's files may ask for."""


@dataclass
class VerifyArguments:
    """Measure a finished run again from its saved weights and list differences from results.json; writes nothing.

    On the machine, device and number of threads that measured the run, all metrics agree. Elsewhere rounding changes
    some
    codes: allow for it with `--tolerance 0.5`. The exit code is 0 if all metrics agree, else 2.
    """

    run: RunFolder
    """The run folder, for instance runs/demo."""
    rows: tuple[str, ...] = ()
    """Measure only these rows of the table, for instance `--rows mle ral`, and rows that they need. None: all."""
    tolerance: float = 0.0
    """Accept differences up to this fraction of half a metric's 95 % interval; 0: up to a millionth of the metric."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    quiet: bool = False
    """No progress bars."""
    plugins: Plugins = ()
    """Your own parts: modules that register some, or `module:Class` names that the run's files may ask for."""


Arguments = (
    TrainArguments
    | DemoArguments
    | ImportArguments
    | SampleArguments
    | CompleteArguments
    | PlayArguments
    | WatchArguments
    | EvaluateArguments
    | VerifyArguments
    | ReportArguments
    | ReferenceArguments
    | PushArguments
    | PullArguments
    | RunsArguments
    | CompareArguments
    | PresetsArguments
    | CacheArguments
    | CompletionArguments
)


def parse(argv: Sequence[str]) -> Arguments:
    """Arguments of ``ral-gym COMMAND ...``.

    Raises:
        ConfigError: an unknown preset, or a setting out of range.
        SystemExit: wrong arguments (2) or --help (0), by tyro.
    """
    _check_command(argv)
    if list(argv[:1]) == ["train"] and is_short_help(argv):
        return parse_train(argv[1:])
    _load_plugins(argv)
    base = _preset(argv)
    train: Any = tyro.conf.subcommand("train", default=TrainArguments(base), description=_training_help())
    commands: Any = Union[  # noqa: UP007 (made at run time)
        Annotated[TrainArguments, train],
        Annotated[DemoArguments, tyro.conf.subcommand("demo")],
        Annotated[ImportArguments, tyro.conf.subcommand("import")],
        Annotated[SampleArguments, tyro.conf.subcommand("sample")],
        Annotated[CompleteArguments, tyro.conf.subcommand("complete")],
        Annotated[PlayArguments, tyro.conf.subcommand("play")],
        Annotated[WatchArguments, tyro.conf.subcommand("watch")],
        Annotated[EvaluateArguments, tyro.conf.subcommand("evaluate")],
        Annotated[VerifyArguments, tyro.conf.subcommand("verify")],
        Annotated[ReportArguments, tyro.conf.subcommand("report")],
        Annotated[ReferenceArguments, tyro.conf.subcommand("reference")],
        Annotated[PushArguments, tyro.conf.subcommand("push")],
        Annotated[PullArguments, tyro.conf.subcommand("pull")],
        Annotated[RunsArguments, tyro.conf.subcommand("runs")],
        Annotated[CompareArguments, tyro.conf.subcommand("compare")],
        Annotated[PresetsArguments, tyro.conf.subcommand("presets")],
        Annotated[CacheArguments, tyro.conf.subcommand("cache")],
        Annotated[CompletionArguments, tyro.conf.subcommand("completion")],
    ]
    arguments = cast(
        Arguments,
        tyro.cli(
            commands,
            prog="ral-gym",
            description="Images -> VQ-VAE -> PixelCNN -> reinforced adversarial learning.",
            args=with_full_help(argv),
            config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.AvoidSubcommands),
        ),
    )
    return _complete(arguments, base) if isinstance(arguments, TrainArguments) else arguments


COMMANDS = (
    *("train", "demo", "import", "sample", "complete", "play", "watch", "evaluate"),
    *("verify", "report", "reference", "push", "pull", "runs", "compare", "presets", "cache", "completion"),
)


def _check_command(argv: Sequence[str]) -> None:
    """Refuse an unknown command, also before ``--help``.

    Raises:
        ConfigError: the first word is not a command; lists the commands.
    """
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"command {argv[0][:60]!r} is unknown{meant}: choose one of {', '.join(COMMANDS)}")


def check_name(name: str) -> None:
    """Refuse a run's name that is not a valid folder name directly inside ``--runs`` on every system.

    Raises:
        ConfigError: what is allowed.
    """
    system = name.partition(".")[0].upper() in _RESERVED
    if _NAME.fullmatch(name) is None or name.endswith((".", " ")) or system or not name.isprintable():
        raise ConfigError(
            f"--name is {name[:60]!r}: give the name of a folder inside --runs, of letters, digits and characters such "
            "as . _ - + (at most 120, no / or \\, no name that a system reserves); --runs is the folder it is in"
        )


_NAME = re.compile(r"[^\s./\\:*?\"<>|\x00][^/\\:*?\"<>|\x00]{0,119}")
_RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{port}{number}" for port in ("COM", "LPT") for number in range(1, 10))}
"""Device names of Windows, reserved with any suffix."""


def parse_train(argv: Sequence[str]) -> TrainArguments:
    """Arguments of the training command alone; `--preset` chooses the defaults of all others.

    Raises:
        ConfigError: an unknown preset, or a setting out of range.
        SystemExit: wrong arguments (2) or --help (0), by tyro.
    """
    _load_plugins(argv)
    base = _preset(argv)
    default = TrainArguments(base)
    if is_short_help(argv):
        print_short_help(default, output())
        raise SystemExit(0)
    words = with_full_help(argv)
    return _complete(tyro.cli(TrainArguments, args=words, default=default, description=_training_help()), base)


def _load_plugins(argv: Sequence[str]) -> None:
    """Load or allow the parts that this command line names, before they are used.

    Raises:
        ConfigError: a plug-in that cannot be imported.
    """
    allow_given(argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--plugin", nargs="*", default=[])
    load_plugins(first.parse_known_args(argv)[0].plugin)


def _preset(argv: Sequence[str]) -> Config:
    """The settings that the arguments start from: a preset's, or another run's, with stage 3 of a preset that is given.

    Raises:
        ConfigError: an unknown preset.
        RunError: not a run folder.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=None)
    first.add_argument("--start-from", "--start_from", default=None)
    given = first.parse_known_args(argv)[0]
    if given.start_from is None:
        return known_preset(given.preset or "demo")
    from ral_gym.runs.run import read_config  # imports torch

    config = read_config(given.start_from)
    if given.preset is None:
        return config
    recipe = known_preset(given.preset)
    return dataclasses.replace(config, critic=recipe.critic, ral=recipe.ral)


def _training_help() -> str:
    return inspect.getdoc(TrainArguments) or ""


def _complete(arguments: TrainArguments, base: Config) -> TrainArguments:
    """Apply the short flags, check the settings and name the run; `base` is what the arguments started from."""
    config = dataclasses.replace(arguments.config, preset=base.preset)  # the flag may be a file or module:NAME
    if arguments.data is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=arguments.data))
    if arguments.algo is not None:
        config = dataclasses.replace(config, ral=dataclasses.replace(config.ral, algo=arguments.algo))
    config.check(files=not arguments.dry_run)
    config = dataclasses.replace(config, ral=_own_section(config.ral, base.ral))
    EXTRACTORS.check(config.evaluation.extractor)
    for name in config.evaluation.metrics:
        METRICS.check(name)
    if "ral" in arguments.stages:
        check_parts(config.ral.reward_weights, config.critic.kind, config.ral.reward_features)
    if arguments.processes is not None and (arguments.processes < 1 or not arguments.dry_run):
        raise ConfigError(
            f"--processes {arguments.processes} belongs to --dry-run and is 1 or more: to train on several, start them "
            "with torchrun --nproc-per-node N -m ral_gym train ..."
        )
    if not arguments.stages:
        raise ConfigError(f"--stages is empty: give one or more of {' '.join(STAGES)}")
    if arguments.gradient_accumulation < 1:
        raise ConfigError(f"--gradient-accumulation is {arguments.gradient_accumulation}: give 1 or more")
    arguments.config = config
    if arguments.start_from is not None and arguments.name is None:
        raise ConfigError(f"--start-from {arguments.start_from} makes a new run: name it with --name")
    if arguments.name is None:
        algo = config.ral.algo.rpartition(":")[2]
        usual = base.ral.algo if base.preset in PRESETS.builtin else "reinforce"
        parts = [config.preset, *([algo] if algo != usual else [])]
        named = "-".join(parts + ([f"seed{config.seed}"] if config.seed else []))
        arguments.name = re.sub(r"[^\w.+-]+", "-", named).lstrip(".-")[:120]
    check_name(arguments.name)
    return arguments


def _own_section(ral: RALConfig, base: RALConfig) -> RALConfig:
    """Stage 3's settings; if the algorithm is not the preset's, the preset's settings for its algorithm are reset.

    Raises:
        ConfigError: the command line changes a setting of another algorithm.
    """
    own: str | None = ral.algo
    if own not in SECTIONS:
        from ral_gym.agents.algorithm import find_algorithm  # imports torch

        own = find_algorithm(ral.algo).section
    for name, cls in SECTIONS.items():
        section, before = getattr(ral, name), getattr(base, name)
        changed = [f.name for f in dataclasses.fields(cls) if getattr(section, f.name) != getattr(before, f.name)]
        if name != own and changed:
            flag = f"--ral.{name}.{changed[0]}".replace("_", "-")
            instead = f", or give what ral.{own} has" if own in SECTIONS else ""
            raise ConfigError(f"{flag} is for another algorithm than {ral.algo}: leave it out{instead}")
        if name != own and ral.algo != base.algo and base.algo == name:
            ral = dataclasses.replace(ral, **{name: cls()})
    return ral
