"""Start a run from another one's finished stages: many variants of stage 3 from one tokenizer and one prior."""

from __future__ import annotations

import dataclasses
import filecmp
import json
import shutil
from pathlib import Path

from ral_gym.config import Config
from ral_gym.errors import ConfigError, RunError
from ral_gym.priors.two_level import SUFFIXES
from ral_gym.runs.run import Run
from ral_gym.runs.storage import differences, write_atomic
from ral_gym.tokenizers.code_set import CodeSet

STAGE_1 = ("vqvae.safetensors", "codes.safetensors")
SECTIONS_OF_STAGE_1 = ("data", "vqvae", "seed")
SECTIONS_OF_STAGE_2 = ("prior", "bottom")


def fork_run(source: Run, path: Path | str, config: Config, *, codes: CodeSet | None = None, prior: bool = True) -> Run:
    """A run folder with copies of the finished stages 1 and 2 of another run.

    The later stages work on it as on any other run. Forking again into the same folder changes nothing, so that an
    interrupted variant continues.

    Args:
        source: a run with a trained tokenizer and, if `prior`, trained priors.
        path: the new folder.
        config: its settings; those of copied stages must equal the source's.
        codes: codes to use instead of the source's, such as samples of an oracle; only with ``prior=False``.
        prior: copy the trained priors too; False: stage 2 is trained in the new run.

    Raises:
        ConfigError: the settings of copied stages differ, or `codes` are given together with a trained prior.
        RunError: a stage of the source is missing, or the folder was started from something else.
    """
    if codes is not None and prior:
        raise ConfigError("codes other than the source's need a new prior: fork with prior=False")
    _check_settings(source, config, SECTIONS_OF_STAGE_1 + (SECTIONS_OF_STAGE_2 if prior else ()))
    files = _files(source, prior, own_codes=codes is None)
    missing = [name for name in files if not source.has(name)]
    if missing:
        raise RunError(f"{source.path} has no {', '.join(missing)}: train stages vqvae and prior there first")
    run = Run(path, config)
    for name in files:
        _copy(source, run, name)
    if codes is not None and not run.has("codes.safetensors"):
        codes.save(run.file("codes.safetensors"))
    return run


def _files(source: Run, prior: bool, own_codes: bool) -> list[str]:
    """The files to copy."""
    own_codes = own_codes and source.config.data.has_images
    files = [name for name in STAGE_1 if own_codes or name != "codes.safetensors"]
    if prior:
        suffixes = SUFFIXES[: source.config.vqvae.levels]
        files += [f"{name}{suffix}.safetensors" for name in ("prior", "prior_ema") for suffix in suffixes]
    return files


def _check_settings(source: Run, config: Config, sections: tuple[str, ...]) -> None:
    """Refuse settings that contradict the copied files."""
    there, here = (json.loads(json.dumps(dataclasses.asdict(one))) for one in (source.config, config))
    found = differences({name: there[name] for name in sections}, {name: here[name] for name in sections})
    if found:
        raise ConfigError(
            f"a run that starts from {source.path} must keep its settings of {', '.join(sections)} "
            f"({'; '.join(found[:3])} differ): change only other settings"
        )


def _copy(source: Run, run: Run, name: str) -> None:
    """Copy a file unless it is there; it must then be the same."""
    if not run.has(name):
        write_atomic(run.file(name), lambda temporary: shutil.copyfile(source.file(name), temporary))
    elif not filecmp.cmp(run.file(name), source.file(name), shallow=False):
        raise RunError(
            f"{run.path} was started from a {name} that differs from the one in {source.path}: remove the folder, or "
            "choose another"
        )
