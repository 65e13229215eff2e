"""`ral-gym presets` and `ral-gym train --dry-run`: the presets, and what a run would cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from ral_gym.commands.arguments import PresetsArguments, TrainArguments
from ral_gym.commands.help import known_preset
from ral_gym.config import Config, settings
from ral_gym.presets import PRESETS

if TYPE_CHECKING:
    from ral_gym.commands.counting import StageCost


def show_presets(arguments: PresetsArguments, console: Console) -> None:
    """All presets in one table, or every setting of one.

    Raises:
        ConfigError: there is no such preset.
    """
    console.print(_all_presets() if arguments.name is None else _one_preset(known_preset(arguments.name)))
    if arguments.name is None:
        console.print("All settings of one: ral-gym presets NAME", highlight=False)


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", no_wrap=True)
    return table


def _all_presets() -> Table:
    """Images, codes, priors and training steps of every preset; it fits 80 columns."""
    table = _table("Presets", "preset", "data", "pixels", "codes", "K", "prior", "steps 1, 2", left=2)
    for name, config in PRESETS.items():
        two = config.vqvae.levels == 2
        sides = [config.grid_size, *([2 * config.grid_size] if two else [])]
        priors = [config.prior, *([config.bottom] if two else [])]
        steps = [config.vqvae.training_steps, *(prior.training_steps for prior in priors)]
        table.add_row(
            name,
            config.data.source.partition(":")[0],
            str(config.data.image_size),
            " + ".join(f"{side}²" for side in sides),
            str(config.vqvae.codebook_size),
            "\n".join(_network(prior.hidden_units, prior.layers, prior.attention_layers) for prior in priors),
            "\n".join([", ".join(f"{step:,}" for step in steps[:2]), *(f"{step:,}" for step in steps[2:])]),
        )
    table.caption = "Prior: hidden units x layers, a: attention layers; two levels: top above bottom"
    return table


def _network(units: int, layers: int, attention: int) -> str:
    return f"{units} x {layers}" + (f", {attention}a" if attention else "")


def _one_preset(config: Config) -> Table:
    """Every setting of a preset."""
    table = _table(f"Preset {config.preset}", "setting", "value", left=2)
    shown = list(settings(config).items())
    for (name, value), following in zip(shown, [*shown[1:], ("", None)], strict=True):
        last = name.rpartition(".")[0] != following[0].rpartition(".")[0]
        table.add_row(name, str(value), end_section=last)
    return table


def show_dry_run(arguments: TrainArguments, console: Console) -> None:
    """Parameters, codes, memory and operations of every stage.

    Raises:
        ConfigError: the settings do not fit one another.
    """
    from ral_gym.commands.dry_run import dry_run
    from ral_gym.stages.processes import Compute, process_count

    config = arguments.config
    compute = Compute(arguments.mixed_precision, arguments.gradient_accumulation)
    processes = arguments.processes or process_count()
    result = dry_run(config, compute, processes)
    sides = " + ".join(f"{height}x{width}" for height, width in result.grid.shapes)
    size = config.data.image_size
    console.print(
        f"{config.preset}: {size}x{size} images with {result.channels} channel(s), {sides} codes of "
        f"{result.grid.codebook_size}: T = {result.grid.n_codes:,} per image",
        highlight=False,
        soft_wrap=True,
    )
    table = _table("Dry run", "stage", "parameters", "batch", "steps", "FLOPs/step", "FLOPs", "memory")
    for stage in result.stages:
        table.add_row(
            stage.stage,
            f"{stage.parameters:,}",
            f"{stage.batch_size:,}",
            f"{stage.steps:,}",
            _flops(stage.flops_per_step),
            _flops(stage.flops_per_step * stage.steps),
            _memory(stage.memory),
        )
    console.print(table)
    if processes > 1:
        console.print(_sharing_table(result.stages, processes))
        for line in sharing_notes(config, processes):
            console.print(line, highlight=False, soft_wrap=True)
    for stage in filter(lambda stage: stage.parts, result.stages):
        parts = ", ".join(f"{name} {_flops(count)}" for name, count in stage.parts.items())
        console.print(f"{stage.stage}: forward, per image: {parts}", highlight=False, soft_wrap=True)
    console.print(
        "Estimates: products and convolutions only; memory per process, without a framework's own; stage 3 as whole "
        "images; without the tables of classes. Nothing was trained.",
        highlight=False,
        soft_wrap=True,
    )


def _sharing_table(stages: Sequence[StageCost], processes: int) -> Table:
    """What so many GPUs would gain."""
    from ral_gym.commands.cost_of_sharing import sharing_of

    title = f"{processes} GPUs, on paper"
    table = _table(
        title, "stage", "memory each", "sent/step", "s/step, 1", f"s/step, {processes}", "sending", "efficiency"
    )
    for stage in stages:
        found = sharing_of(stage, processes)
        row = [f"{found.seconds_alone:.3g}", f"{found.seconds:.3g}", f"{found.sending:.0%}", f"{found.efficiency:.0%}"]
        table.add_row(stage.stage, _memory(stage.memory), _memory(stage.sent), *row)
    return table


def sharing_notes(config: Config, processes: int) -> list[str]:
    """What to know of so many processes."""
    lines = [
        "On paper: an H100's speeds, assumed (ral_gym/commands/cost_of_sharing.py); efficiency 100 % is "
        f"{processes} times as fast as one."
    ]
    each = config.ral.n_envs / processes
    if each < 1:
        lines.append(f"Stage 3 would be refused: ral.n_envs is {config.ral.n_envs}, below {processes} processes.")
    elif each < 30:
        lines.append(
            f"Stage 3 draws {each:g} images per process: below some 30 a GPU mostly waits for weights; raise "
            f"ral.n_envs (to {30 * processes}, and the learning rate with care)."
        )
    return lines


def _flops(count: int) -> str:
    """FLOPs with three digits and a unit: 1.23 T."""
    value, units = float(count), ("", "k", "M", "G", "T", "P", "E", "Z")
    for unit in units:
        if value < 999.5:
            return f"{value:.3g} {unit}".strip()
        value /= 1000
    return f"{value:.3g} Y"


def _memory(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
