"""`ral-gym train`: images -> tokenizer -> prior -> RAL -> results table and pictures, one stage after the other.

Each stage loads its finished files, continues from its checkpoint, or trains. Under ``torchrun`` or ``accelerate
launch`` all processes share stages 1 to 3; only the first continues with the evaluation.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ral_gym.commands.arguments import STAGES, EvaluateArguments, TrainArguments, parse_train
from ral_gym.commands.results import report, say
from ral_gym.commands.stage_files import files_of, finished_files
from ral_gym.config import Config, effect_notes
from ral_gym.errors import RunError
from ral_gym.registry import PRESETS
from ral_gym.settings import check_prompt

# torch and the stages are imported inside the functions, so that --help and a mistyped flag respond at once, and Ctrl-C
# during the seconds of their import is handled like any other.
if TYPE_CHECKING:
    import torch

    from ral_gym.data.images import ImageSet
    from ral_gym.grid import CodeGrid
    from ral_gym.runs.run import Run
    from ral_gym.tokenizers.base import Tokenizer
    from ral_gym.tokenizers.code_set import CodeSet


def train(arguments: TrainArguments, console: Console) -> dict[str, Any]:
    """Run the stages in order; each loads its finished files, continues from its checkpoint, or trains.

    Returns:
        the results table; empty if the evaluation was not requested.

    Raises:
        RunError: a requested stage needs one that was neither requested nor trained, or another process is using the
            folder.
    """
    from ral_gym.agents.algorithm import check_stage
    from ral_gym.commands.extras import check_extras
    from ral_gym.commands.memory import check_memory
    from ral_gym.rewards.making import check_rewards
    from ral_gym.rewards.options import judge_notes
    from ral_gym.rewards.provenance import check_reward_files
    from ral_gym.runs.results import load_results
    from ral_gym.runs.run import Run, discard_start
    from ral_gym.runs.trackers import check_trackers, tracked
    from ral_gym.stages.device import resolve_device
    from ral_gym.stages.evaluate import check_measuring
    from ral_gym.stages.levels import check_prior_settings
    from ral_gym.stages.processes import launcher_note, process_count, process_index
    from ral_gym.stages.without_images import check_without_images

    config, stages = arguments.config, arguments.stages
    if "ral" in stages:
        check_stage(config.ral)
    if arguments.dry_run:
        from ral_gym.commands.overview import show_dry_run

        show_dry_run(arguments, console)
        return {}
    check_without_images(config, stages)
    device = resolve_device(arguments.device)
    check_trackers(arguments.track)
    path = Path(arguments.runs) / str(arguments.name)
    if not (path / "results.json").exists():
        check_extras(config, stages)
    if note := launcher_note():
        say(console, [note])
    main, new = process_index() == 0, not path.exists() or process_count() > 1  # another process may have made it
    try:
        run = Run(path, config) if arguments.start_from is None else _fork(arguments.start_from, path, config)
        if "evaluate" in stages and all(map(run.has, finished_files(config))):
            return report(run, load_results(run.file("results.json")), console)
        _check_stages(run, stages)
        check_stage(config.ral, check_prior_settings(config))
        if "ral" in stages:
            check_rewards(config)
            check_reward_files(run)
            if main:
                say(console, judge_notes(config))
        if "evaluate" in stages:
            check_measuring(run)
        if main and config.preset in PRESETS.builtin:
            say(console, effect_notes(config, PRESETS[config.preset]))
        pipeline = Pipeline(run, device, arguments, console)
        check_memory(run, stages, device, pipeline.compute)
        with run.locked() if main else nullcontext(), tracked(run, arguments.track if main else ()):
            return _run_stages(pipeline, stages, console)
    except BaseException:
        if main and new:
            discard_start(path, _started_with(arguments, config))
        raise


def _started_with(arguments: TrainArguments, config: Config) -> tuple[str, ...]:
    """The files that a run may have before anything is trained in it: those that --start-from copies, above all."""
    stages = STAGES[:2] if arguments.start_from is not None else ()
    return ("rewards.json", "trackers.json", *(name for stage in stages for name in files_of(stage, config)))


def _fork(source: str, path: Path, config: Config) -> Run:
    """A run that starts from another one's stages 1 and 2."""
    from ral_gym.runs.run import Run, read_config
    from ral_gym.stages.fork import fork_run

    return fork_run(Run(source, read_config(source)), path, config)


def _run_stages(pipeline: Pipeline, stages: Sequence[str], console: Console) -> dict[str, Any]:
    """Run stages 1 to 3 on all processes, then the evaluation on the first only; returns the results table, or {}."""
    from ral_gym.stages.processes import end_processes, process_count

    for stage in STAGES[:3]:
        if stage in stages:
            pipeline.steps[stage]()
    joint = pipeline.run.config.ral.n_envs % process_count() == 0  # else a control's batch has no equal shares
    if "ral" in stages and joint:
        pipeline.train_controls()
    if not end_processes():
        return {}
    if "ral" in stages and not joint:
        pipeline.train_controls()
    if "evaluate" in stages:
        pipeline.steps["evaluate"]()
    else:
        _list_files(pipeline.run, stages, console)
    return pipeline.results


def _check_stages(run: Run, stages: Sequence[str]) -> None:
    """Before any stage starts, refuse one whose required earlier stages are neither requested nor finished."""
    if not run.config.data.has_images:
        missing = [name for stage in STAGES[:2] for name in files_of(stage, run.config) if not run.has(name)]
        if missing:
            raise RunError(
                f"{run.path} has no {', '.join(missing)}, and data.source none gives no images to train from: make "
                "such a run by ral-gym import"
            )
    for number, stage in enumerate(STAGES):
        for earlier in STAGES[:number] if stage in stages else ():
            missing = [name for name in files_of(earlier, run.config) if not run.has(name)]
            if missing and earlier not in stages:
                raise RunError(
                    f"stage {stage} needs {', '.join(missing)} in {run.path}: run --stages {earlier} first, or leave "
                    "--stages out for all of them"
                )


class Pipeline:
    """The stages of one run, with the objects they pass to one another.

    Args:
        run: the run folder.
        device: device to train on.
        arguments: the command's arguments.
        console: where to print the description of the data.
    """

    def __init__(self, run: Run, device: torch.device, arguments: TrainArguments, console: Console) -> None:
        from ral_gym.stages.processes import Compute, process_index

        self.run, self.device, self.console = run, device, console
        self.has_images = run.config.data.has_images
        self.progress = not arguments.quiet and process_index() == 0
        self.measuring, self.rewarding = "evaluate" in arguments.stages, "ral" in arguments.stages
        self.compute = Compute(arguments.mixed_precision, arguments.gradient_accumulation)
        self.results: dict[str, Any] = {}
        self.steps = {"vqvae": self.train_vqvae, "prior": self.train_prior, "ral": self.train_ral}
        self.steps["evaluate"] = self.evaluate

    @functools.cached_property
    def images(self) -> ImageSet:
        """The run's images, loaded by the first process before the others, which use its cache."""
        from ral_gym.data.images import load_images
        from ral_gym.stages.evaluate import check_images
        from ral_gym.stages.processes import main_process_first

        config = self.run.config
        with main_process_first(self.device):
            images = load_images(config.data, seed=config.seed, progress=self.progress)
        if self.measuring:
            check_images(images)
        if self.rewarding and {"clip", "hps"} & config.ral.reward_weights.keys():
            check_prompt(config.ral.prompt, () if images.labels is None else ("named",))
        _introduce(images, self.run, self.device, self.console)
        return images

    @functools.cached_property
    def vqvae(self) -> Tokenizer:
        """The trained tokenizer."""
        from ral_gym.stages.levels import load_vqvae

        return load_vqvae(self.run, self.device)

    @functools.cached_property
    def grid(self) -> CodeGrid:
        """The shape of the sequences that the priors draw: with the images' classes, where they take them."""
        from ral_gym.stages.levels import sequence_grid

        grid = sequence_grid(self.run.config, self.vqvae.grid, self.codes)
        if self.codes.classes and not grid.classes:
            say(
                self.console,
                [f"  Labels are not used: prior.kind {self.run.config.prior.kind} takes no argument classes"],
            )
        return grid

    @functools.cached_property
    def codes(self) -> CodeSet:
        """The code file: made once, by the first process."""
        from ral_gym.stages.processes import main_process_first
        from ral_gym.tokenizers.code_set import CodeSet, encode_set

        file, config = self.run.file("codes.safetensors"), self.run.config
        images = None if file.exists() else self.images
        with main_process_first(self.device):
            if images is not None and not file.exists():
                passes, seed = config.prior.augmented_passes, config.seed * 1000 + 7
                encode_set(self.vqvae, images, passes=passes, seed=seed, progress=self.progress).save(file)
        return CodeSet.load(file, self.vqvae.grid)

    def train_vqvae(self) -> None:
        """Stage 1; without images the tokenizer is there already."""
        from ral_gym.stages.device import fast_products
        from ral_gym.stages.train_vqvae import train_vqvae

        if not self.has_images:
            return
        images = self.images
        with fast_products(self.device):
            self.vqvae = train_vqvae(self.run, images, self.device, self.progress, self.compute)

    def train_prior(self) -> None:
        """Stage 2; without images the prior is there already."""
        from ral_gym.stages.device import fast_products
        from ral_gym.stages.train_prior import train_prior

        if not self.has_images:
            return
        codes = self.codes
        with fast_products(self.device):
            prior = train_prior(self.run, codes, self.grid, self.device, self.progress, self.compute)
        if self.grid.classes:
            say(self.console, _label_lines(self.run, prior.levels))

    def train_ral(self) -> None:
        """Stage 3."""
        from ral_gym.agents.algorithm import find_algorithm
        from ral_gym.agents.train_ral import train_ral
        from ral_gym.stages.processes import process_index

        config = self.run.config.ral
        notes = find_algorithm(config.algo).notes(config)
        if notes and process_index() == 0:
            say(self.console, [f"{config.algo}: {'; '.join(notes)}"])
        codes = self.codes if self.has_images else None
        train_ral(self.run, self.vqvae, self.prior, codes, self.device, self.progress)

    @functools.cached_property
    def prior(self) -> Any:
        """The prior that stage 3 starts from."""
        from ral_gym.stages.levels import load_generator

        return load_generator(self.run, "prior", self.device)

    def train_controls(self) -> None:
        """The controls of stage 3, where there are images."""
        from ral_gym.stages.controls import continue_prior, train_equal_time

        if not self.has_images:
            return
        continue_prior(self.run, self.prior, self.codes, self.device, self.progress)
        if self.run.config.ral.equal_time_control:
            train_equal_time(self.run, self.prior, self.codes, self.device, self.progress)

    def evaluate(self) -> None:
        """The table and the pictures."""
        from ral_gym.stages.evaluate import evaluate

        self.results = evaluate(self.run, self.vqvae, self.codes, self.images, self.device, self.progress)
        report(self.run, self.results, self.console)


def _introduce(images: ImageSet, run: Run, device: torch.device, console: Console) -> None:
    """Print the first lines: the data and its classes, how to use your own, and the run folder."""
    from ral_gym.data.labels import described

    lines = [f"Data: {images.description}"]
    if images.labels is not None:
        lines += [f"  {described(images.labels.train, images.labels.classes)}"]
    if images.cache is not None:
        lines += [f"  Decoded images are kept in {images.cache} (ral-gym cache lists them, --clear removes them)"]
    if run.config.data.source == "faces":
        lines += ["  Your own: --data celeba:PATH (img_align_celeba, folder or zip) or --data folder:PATH"]
    lines += [f"Run:  {run.path}  (preset {run.config.preset}, {run.config.ral.algo}, {device})"]
    say(console, lines)


def _label_lines(run: Run, levels: int) -> list[str]:
    """What the held-out NLL is with right and with other labels, from the priors' files."""
    from ral_gym.priors.two_level import SUFFIXES
    from ral_gym.runs.storage import load_metadata

    lines = []
    for suffix in SUFFIXES[:levels]:
        facts = load_metadata(run.file(f"prior{suffix}.safetensors"))
        said = [f"{facts['nll_test']:.3f} with right labels"] if "nll_test" in facts else []
        named = {"nll_no_label": "without", "nll_wrong_label": "with wrong ones"}
        said += [f"{facts[name]:.3f} {words}" for name, words in named.items() if name in facts]
        lines += [f"  Held-out nats per code{suffix.replace('_', ', ')}: {', '.join(said)}"] if said else []
    return lines


def _list_files(run: Run, stages: Sequence[str], console: Console) -> None:
    """Print the stages' files, if there is no table to print."""
    say(console, [f"  {run.file(name)}" for stage in stages for name in files_of(stage, run.config)])


def evaluate_run(arguments: EvaluateArguments, console: Console) -> None:
    """`ral-gym evaluate`: run the last stage of an existing run."""
    from ral_gym.commands.generate import open_run

    run = open_run(arguments.run)
    again = TrainArguments(run.config, name=run.path.name, runs=str(run.path.parent), device=arguments.device)
    again.stages, again.quiet = ("evaluate",), arguments.quiet
    train(again, console)


def base_run(
    preset: str, seed: int, runs: str | Path, console: Console, quiet: bool = False, flags: Sequence[str] = ()
) -> Run:
    """A run with finished stages 1 and 2, for variants of stage 3; missing stages are trained.

    Args:
        preset: its settings.
        seed: its seed.
        runs: the folder of run folders; the run gets the name that `ral-gym train` would give it.
        console: where to print progress.
        quiet: no progress bars.
        flags: more arguments of `ral-gym train`.

    Raises:
        RunError: another process is training it.
    """
    from ral_gym.runs.run import Run

    argv = ["--preset", preset, "--seed", str(seed), "--runs", str(runs), "--stages", *STAGES[:2], *flags]
    arguments = parse_train([*argv, "--quiet"] if quiet else argv)
    run = Run(Path(arguments.runs) / str(arguments.name), arguments.config)
    if not all(run.has(name) for stage in STAGES[:2] for name in files_of(stage, run.config)):
        train(arguments, console)
    return run
