"""`ral-gym reference`: statistics of real images' features, for rewards that compare to them."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ral_gym.commands.arguments import ReferenceArguments
from ral_gym.commands.extras import check_source
from ral_gym.errors import printable
from ral_gym.registry import EXTRACTORS


def write_reference(arguments: ReferenceArguments, console: Console) -> None:
    """Write the file, and print the flags that use it.

    Raises:
        ConfigError: unknown features, or too few images.
        DataError: the images cannot be read.
        RunError: not a run folder, or nothing can be written there.
    """
    EXTRACTORS.check(arguments.features)
    check_source(arguments.data, arguments.features)
    from ral_gym.rewards.reference import save_reference
    from ral_gym.stages.reference import run_reference

    moments = run_reference(
        arguments.run,
        arguments.features,
        data=arguments.data,
        n=arguments.n,
        device=arguments.device,
        progress=not arguments.quiet,
    )
    name = "".join(letter if letter.isalnum() else "_" for letter in arguments.features)
    path = Path(arguments.output or Path(arguments.run) / f"reference_{name}.npz")
    save_reference(path, moments)
    lines = [
        f"{path}: {len(moments.mean):,} {moments.extractor} features of {moments.n:,} images",
        f"  ral-gym train .. --ral.reward-features {moments.extractor} --ral.reward-reference {path}",
    ]
    for line in lines:
        console.print(printable(line), highlight=False, soft_wrap=True, markup=False)
