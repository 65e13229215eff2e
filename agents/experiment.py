"""Experiments on stage 3: variants that start from one finished stage 2, all measured in the same way.

    base = base_run("demo", seed=0, runs="runs", console=console)        # from ral_gym.commands.train
    experiment = Experiment(base, Path("runs/ablation/seed0"))
    config = replace(base.config, ral=replace(base.config.ral, gamma=1.0))
    run = experiment.train("gamma_1", config)
    row = experiment.measure("gamma_1", "ral", experiment.policy(run))

Everything is saved in the experiment's folder and not done twice, so that a stopped experiment continues, and variants
can be added later.
"""

from __future__ import annotations

import copy
import functools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ral_gym.agents.train_ral import train_ral
from ral_gym.config import Config, EvaluationConfig
from ral_gym.data.images import ImageSet, load_images
from ral_gym.errors import RunError
from ral_gym.priors.base import Prior
from ral_gym.runs.run import Run
from ral_gym.runs.storage import differences, load_json, save_json
from ral_gym.stages.controls import continue_prior
from ral_gym.stages.device import resolve_device
from ral_gym.stages.fork import fork_run
from ral_gym.stages.generator_metrics import MEASUREMENT, GeneratorMetrics
from ral_gym.stages.levels import load_generator, load_vqvae
from ral_gym.tokenizers.base import Tokenizer
from ral_gym.tokenizers.code_set import CodeSet

ROWS = "rows.json"
CPU = "_cpu"
"""Suffix of the names under which a run's ``seconds.json`` has CPU time instead of wall-clock time."""


class Experiment:
    """Variants of stage 3 from one base run.

    Args:
        base: a run with finished stages 1 and 2; nothing in it is changed.
        folder: the folder for the variants' run folders and the measured rows.
        evaluation: settings of the evaluation; None: those of the base run.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        progress: show progress bars.

    Raises:
        DeviceError: a device that does not exist here.
    """

    def __init__(
        self,
        base: Run,
        folder: Path | str,
        *,
        evaluation: EvaluationConfig | None = None,
        device: str = "cpu",
        progress: bool = True,
    ) -> None:
        self.base, self.folder, self.progress = base, Path(folder), progress
        self.device = resolve_device(device)
        self._measuring = copy.copy(base)
        self._measuring.config = replace(base.config, evaluation=evaluation or base.config.evaluation)

    @functools.cached_property
    def vqvae(self) -> Tokenizer:
        """The base run's tokenizer."""
        return load_vqvae(self.base, self.device)

    @functools.cached_property
    def codes(self) -> CodeSet:
        """The base run's codes."""
        return CodeSet.load(self.base.file("codes.safetensors"), self.vqvae.grid)

    @functools.cached_property
    def images(self) -> ImageSet:
        """The base run's images."""
        return load_images(self.base.config.data, seed=self.base.config.seed, progress=self.progress)

    @functools.cached_property
    def prior(self) -> Prior:
        """The MLE prior that every variant starts from."""
        return load_generator(self.base, "prior", self.device)

    @functools.cached_property
    def evaluation(self) -> GeneratorMetrics:
        """The measurement: distances to the base run's decoded training codes."""
        return GeneratorMetrics(self._measuring, self.vqvae, self.codes, self.images, self.device)

    def train(self, name: str, config: Config) -> Run:
        """Stage 3 with other settings of `ral` and `critic`; trained, continued, or loaded if finished.

        Returns:
            the variant's run folder; its ``seconds.json`` has wall-clock time as `ral` and CPU time as `ral_cpu`.

        Raises:
            ConfigError: settings of stages 1 or 2 differ from the base run's.
            RunError: the folder holds a variant with other settings, or another process is using it.
            DivergedError: a loss or a weight became NaN or infinite.
        """
        run = fork_run(self.base, self.folder / name, config)
        with run.locked(), _Processor(run, "ral"):
            train_ral(run, self.vqvae, self.prior, self.codes, self.device, self.progress)
        return run

    def continue_mle(self, name: str, config: Config) -> Prior:
        """The control: maximum likelihood with the number of updates and the batch size of `config.ral`.

        Raises:
            ConfigError, RunError, DivergedError: as `train`.
        """
        run = fork_run(self.base, self.folder / name, config)
        with run.locked(), _Processor(run, "prior_continued"):
            return continue_prior(run, self.prior, self.codes, self.device, self.progress)

    def policy(self, run: Run, live: bool = False) -> Prior:
        """A trained variant's network: the averaged weights, or the live ones."""
        return load_generator(run, "policy" if live else "policy_ema", self.device)

    def measure(self, name: str, label: str, prior: Prior, temperature: float = 1.0) -> dict[str, Any]:
        """One row of the table, `GeneratorMetrics.row`; kept in ``folder/name/rows.json``.

        Args:
            name: the variant's folder; use a separate name for generators of the base run.
            label: name of the network among the variant's; with the temperature it identifies the row.
            prior: the network, used only if the row has not been measured.
            temperature: divides the logits.

        Raises:
            RunError: existing rows were measured in another way.
        """
        file, key = self.folder / name / ROWS, f"{label} at {temperature:g}"
        yardstick = self._measuring.config.evaluation
        settings = {
            "n_samples": yardstick.n_samples,
            "extractor": yardstick.extractor,
            "seed": self.base.config.seed,
            "measurement": MEASUREMENT,
            "held_out": yardstick.held_out,
        }
        if yardstick.sampling_seeds > 1:  # earlier files do not name one seed
            settings["sampling_seeds"] = yardstick.sampling_seeds
        kept: dict[str, Any] = load_json(file) if file.exists() else {"settings": settings, "rows": {}}
        if found := differences(kept["settings"], settings):
            raise RunError(f"{file} was measured in another way ({'; '.join(found[:3])}); remove it to measure again")
        if key not in kept["rows"]:
            kept["rows"][key] = self.evaluation.row(prior, temperature)
            save_json(file, kept)
        row: dict[str, Any] = kept["rows"][key]
        return row


class _Processor:
    """Records the CPU time of its block in a run folder, in addition to the stage's wall-clock time."""

    def __init__(self, run: Run, stage: str) -> None:
        self.run, self.stage = run, stage + CPU

    def __enter__(self) -> None:
        self.began = time.process_time()

    def __exit__(self, *error: object) -> None:
        seconds = time.process_time() - self.began
        if seconds > 0.5:  # not for a variant that was already finished
            self.run.add_seconds(self.stage, seconds)
