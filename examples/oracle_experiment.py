"""The oracle experiment (Section 5.2: Table 1 and Figure 4) at demo scale, with the controls that the paper lacks.

    python examples/oracle_experiment.py --seeds 0 1 2        # after the demo runs' stages 1 and 2, made if missing

The oracle stands for the data, so that true likelihoods are known: it is the base run's PixelCNN, fitted to the codes
of real images. A lighter PixelCNN is fitted to samples of it, then tuned by RAL with whole images. NLL_oracle alone
falls for anything that sharpens. Beside RAL therefore stand maximum likelihood continued for as many updates, both at
the temperature that gives RAL's entropy, and REINFORCE on the true reward log o - log pi, which no critic can beat by
much: it tells whether the critic or the reinforcement learning is what holds RAL back.

Writes ``results.json``, ``table.md`` and ``nll_curve.png`` into ``runs/oracle_experiment/``. Run it again to continue.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from evidence.oracle_report import save_nll_curve, save_table, show, verdict
from rich.console import Console
from stable_baselines3.common.callbacks import CallbackList

from ral_gym.agents import load_run
from ral_gym.agents.experiment import Experiment
from ral_gym.agents.rewards.oracle import STAGE as CURVE
from ral_gym.agents.rewards.oracle import OracleCurve, OracleReward, curve_point, stations
from ral_gym.agents.train_ral import make_stage, train_ral
from ral_gym.commands.ending import run_command
from ral_gym.commands.train import base_run
from ral_gym.config import Config
from ral_gym.errors import RunError
from ral_gym.metrics import FeatureDistance, entropy, extract, make_extractor, oracle_metrics
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.runs.run import Run
from ral_gym.runs.storage import differences, load_json, load_module, save_json
from ral_gym.stages.fork import fork_run
from ral_gym.stages.levels import load_generator, load_vqvae
from ral_gym.stages.pictures import sample_codes
from ral_gym.stages.train_prior import train_prior
from ral_gym.tokenizers.base import encoder_features
from ral_gym.tokenizers.code_set import CodeSet, decode_codes

CPU = torch.device("cpu")
SECTIONS = ("prior", "critic", "ral")
Figures = dict[str, Any]


@dataclass
class Arguments:
    """Seeds and where everything goes."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds to average over; the settings were tuned on seed 100."""
    runs: str = "runs"
    """Folder that holds the run folders."""
    quick: bool = False
    """A minute with the `smoke` preset, to see that it runs: its figures mean nothing."""
    quiet: bool = False
    """No progress bars."""


@dataclass(frozen=True)
class Settings:
    """One size of the experiment; `prior`, `critic`, `ral` change the base run's settings of those sections."""

    preset: str
    prior: Figures
    critic: Figures
    ral: Figures
    variants: dict[str, Figures]
    n_train: int
    n_held_out: int
    n_samples: int
    n_curve: int
    stations: int
    control_stations: int
    temperatures: tuple[float, ...] = (0.7, 0.8, 0.9, 1.0, 1.1)

    def config(self, base: Config, variant: str | None = None) -> Config:
        """The base run's configuration with the changes of this experiment, and of one variant of RAL."""
        changes = {section: getattr(self, section) for section in SECTIONS}
        for section, values in self.variants[variant].items() if variant else ():
            changes[section] = changes[section] | values
        return replace(base, **{name: replace(getattr(base, name), **values) for name, values in changes.items()})


TRUE: Figures = {"critic": {"warmup_steps": 0, "n_critic": 0}, "ral": {"gamma": 1.0}}
VARIANTS: dict[str, Figures] = {
    "ral_single": {"ral": {"reward": "single", "gamma": 1.0}},
    "ral_intermediate": {"ral": {"reward": "intermediate"}},
    "oracle_reward": TRUE,
}
# Tuned on seed 100 only.
DEMO = Settings(
    preset="demo-patchgan",
    prior={"hidden_units": 16, "residual_units": 16, "layers": 2, "dropout": 0.0, "output_stack_layers": 1}
    | {"training_steps": 1000, "evaluate_every": 100},
    critic={"warmup_steps": 600, "n_critic": 10},
    ral={"reset_mode": "full", "reward_normalization": "standard", "n_updates": 30, "learning_rate": 1e-3}
    | {"mle_coef": 0.3, "ema_decay": 0.9},
    variants=VARIANTS,
    n_train=4096,
    n_held_out=256,
    n_samples=1024,
    n_curve=256,
    stations=10,
    control_stations=10,
)
QUICK = Settings(
    preset="smoke",
    prior={"hidden_units": 8, "residual_units": 8, "layers": 1, "training_steps": 20},
    critic={},
    ral={"reset_mode": "full"},
    variants=VARIANTS,
    n_train=64,
    n_held_out=16,
    n_samples=32,
    n_curve=16,
    stations=2,
    control_stations=2,
)


class SeedExperiment:
    """One seed: oracle, generator, RAL, controls, rows.

    Args:
        base: a run with finished stages 1 and 2; its PixelCNN is the oracle.
        folder: where this seed's runs and rows go.
        settings: the sizes.
        progress: show progress bars.
    """

    def __init__(self, base: Run, folder: Path, settings: Settings, progress: bool) -> None:
        self.base, self.folder, self.settings, self.progress = base, folder, settings, progress
        self.seed = base.config.seed
        self.oracle: Any = load_generator(base, "prior")
        self.vqvae = load_vqvae(base)
        self.oracle_codes = sample_codes(self.oracle, settings.n_samples, self.seed * 1000 + 11)
        self.curve_codes = self.oracle_codes[: settings.n_curve]
        self.run = fork_run(base, folder / "generator", settings.config(base.config), codes=self._codes(), prior=False)
        self.codes = CodeSet.load(self.run.file("codes.safetensors"), self.vqvae.grid)
        self.mle: Any = train_prior(self.run, self.codes, self.vqvae.grid, CPU, progress)
        self.experiment = Experiment(self.run, folder, progress=progress)

    def _codes(self) -> CodeSet:
        """Samples of the oracle: what the generator and the critic learn from, and what they are watched on."""
        n = self.settings.n_train
        drawn = sample_codes(self.oracle, n + self.settings.n_held_out, self.seed * 1000 + 10).to(torch.int16).numpy()
        return CodeSet(drawn[:n], drawn[n:], None, clean=n)

    def train(self, variant: str) -> Run:
        """RAL with one reward, with its learning curve; trained, continued, or found finished."""
        run = fork_run(self.run, self.folder / variant, self.settings.config(self.base.config, variant))
        if run.has("policy.safetensors"):
            return run
        with run.locked():
            if run.has("checkpoints/ral.safetensors"):
                stage = load_run(run.path, "cpu")
            else:
                stage = make_stage(run, self.vqvae, self.mle, self.codes, CPU, self.progress)
            done = stage.run_callback.updates
            for name in (CURVE, "ral"):
                run.forget_after(name, done - 1)
            stage.run_callback.progress = self.progress
            rewards = [OracleReward(self.oracle)] if variant == "oracle_reward" else []
            bookkeeping, points = stage.run_callback, self.settings.stations
            curve = OracleCurve(run, bookkeeping, self.oracle, self.curve_codes, points, self.seed * 1000 + 12)
            callbacks = CallbackList([stage.reward_callback, *rewards, *stage.regularizers, bookkeeping, curve])
            stage.model.learn(total_timesteps=2**62, callback=callbacks, log_interval=1, reset_num_timesteps=False)
            stage.model.logger.close()
            stage.run_callback.save()
            train_ral(run, self.vqvae, self.mle, self.codes, CPU, False)  # from that checkpoint: only writes the files
        return run

    def continued(self) -> dict[int, Any]:
        """The control at equal distances: updates -> its averaged network."""
        config = self.settings.config(self.base.config)
        networks: dict[int, Any] = {0: self.mle}
        for updates in stations(config.ral.n_updates, self.settings.control_stations)[1:]:
            shorter = replace(config, ral=replace(config.ral, n_updates=updates))
            networks[updates] = self.experiment.continue_mle(f"mle_continued_{updates}", shorter)
        return networks

    def results(self) -> Figures:
        """Everything of this seed; what was measured before is read from ``rows.json``."""
        runs = {variant: self.train(variant) for variant in self.settings.variants}
        networks = self.continued()
        controls = {"mle": self.mle, "mle_continued": networks[max(networks)]}
        measure = Measurement(self)
        for name, prior in controls.items():
            measure.row(name, prior)
        for variant, run in runs.items():
            row = measure.row(variant, load_module(run.file("policy_ema.safetensors"), PixelCNN))
            short = variant.removeprefix("ral_")
            for name, prior in controls.items() if variant != "oracle_reward" else ():
                measure.row(f"{name} @ {short}", prior, measure.temperature(name, prior, row["entropy"]))
        measure.row("oracle", self.oracle)
        curves = {variant: _curve(run) for variant, run in runs.items()}
        curves["mle_continued"] = measure.curve(networks)
        critics = {variant: _critic(run) for variant, run in runs.items() if variant != "oracle_reward"}
        return {"rows": measure.kept["rows"], "curves": curves, "critic": critics}


class Measurement:
    """The rows of one seed, each measured once.

    Args:
        of: the seed's experiment.
    """

    def __init__(self, of: SeedExperiment) -> None:
        self.of, self.settings, self.file = of, of.settings, of.folder / "rows.json"
        self.kept: Figures = load_json(self.file) if self.file.exists() else {"rows": {}, "entropy": {}, "curve": {}}
        self._distances: dict[str, FeatureDistance] = {}
        encoder = encoder_features(of.vqvae)
        self.extractor = make_extractor(of.base.config.evaluation.extractor, encoder, CPU)

    def row(self, name: str, prior: Any, temperature: float = 1.0) -> Figures:
        """Distances from the oracle, exact over codes, and FD to its decoded samples and to decoded real codes."""
        if name in self.kept["rows"]:
            return self.kept["rows"][name]
        of, n = self.of, self.settings.n_samples
        codes = sample_codes(prior, n, of.seed * 1000 + 12, temperature)
        measured = oracle_metrics(lambda c: prior(c) / temperature, of.oracle, codes, of.oracle_codes)
        row = {key: estimate.value for key, estimate in measured.items()}
        features = extract(self.extractor, decode_codes(of.vqvae, codes))
        for key, distance in self._references().items():
            row[key] = distance.measure(features)["fd"]
        row |= {"nll_oracle_per_image": row["nll_oracle"] * codes.shape[1], "temperature": temperature, "n": n}
        return self._keep("rows", name, row)

    def temperature(self, name: str, prior: Any, target: float) -> float:
        """The temperature at which a control has the target entropy, by a parabola through a sweep."""
        sweep = self.kept["entropy"].get(name)
        if sweep is None:
            sweep = []
            for temperature in self.settings.temperatures:
                codes = sample_codes(prior, self.settings.n_samples, self.of.seed * 1000 + 12, temperature)
                sweep.append(entropy(prior, codes, temperature))
            self._keep("entropy", name, sweep)
        return round(float(np.polyval(np.polyfit(sweep, self.settings.temperatures, 2), target)), 4)

    def curve(self, networks: dict[int, Any]) -> list[Figures]:
        """The learning curve of the control."""
        for updates, prior in networks.items():
            if str(updates) not in self.kept["curve"]:
                of = self.of
                point = curve_point(prior, of.oracle, of.curve_codes, of.seed * 1000 + 12)
                self._keep("curve", str(updates), {"step": updates, **point})
        return [self.kept["curve"][str(updates)] for updates in sorted(networks)]

    def _references(self) -> dict[str, FeatureDistance]:
        if not self._distances:
            of, n = self.of, self.settings.n_samples
            real = CodeSet.load(of.base.file("codes.safetensors")).train
            picked = torch.randperm(len(real), generator=torch.Generator().manual_seed(of.seed))[:n].numpy()
            fresh = sample_codes(of.oracle, n, of.seed * 1000 + 13)
            for key, codes in (("fd_oracle", fresh), ("fd_real", real[picked])):
                features = extract(self.extractor, decode_codes(of.vqvae, codes))
                self._distances[key] = FeatureDistance(features, extractor=self.extractor.name, seed=of.seed)
        return self._distances

    def _keep(self, kind: str, name: str, value: Any) -> Any:
        self.kept[kind][name] = value
        save_json(self.file, self.kept)
        return value


def _curve(run: Run) -> list[Figures]:
    """The logged points of the averaged policy."""
    return [record for record in run.metrics(CURVE) if "nll_oracle" in record]


def _critic(run: Run) -> Figures:
    """Means over the training: the critic's AUC on held-out codes, and what its reward knows of the true one."""
    areas = [record["critic/heldout_auc"] for record in run.metrics("ral") if "critic/heldout_auc" in record]
    known = [record["reward_correlation"] for record in run.metrics(CURVE) if "reward_correlation" in record]
    return {"heldout_auc": float(np.mean(areas)), "reward_correlation": float(np.mean(known)) if known else None}


def main(argv: Sequence[str], console: Console) -> None:
    """Every seed, then the table, the figure and the verdict."""
    arguments = tyro.cli(Arguments, args=list(argv), description=__doc__)
    settings = QUICK if arguments.quick else DEMO
    folder = Path(arguments.runs) / ("oracle_experiment_quick" if arguments.quick else "oracle_experiment")
    written: Figures = {"settings": {**dataclasses.asdict(settings), "temperatures": list(settings.temperatures)}}
    there = load_json(folder / "settings.json") if (folder / "settings.json").exists() else written
    if found := differences(there, written):
        raise RunError(
            f"{folder} was made with other settings ({'; '.join(found[:3])}); remove it or give other --runs"
        )
    save_json(folder / "settings.json", written)
    seeds: dict[str, Figures] = {}
    for seed in arguments.seeds:
        base = base_run(settings.preset, seed, arguments.runs, console, arguments.quiet)
        seeds[str(seed)] = SeedExperiment(base, folder / f"seed{seed}", settings, not arguments.quiet).results()
    results = {**written, "extractor": base.config.evaluation.extractor, "seeds": seeds, "verdict": verdict(seeds)}
    save_json(folder / "results.json", results)
    save_table(folder / "table.md", results)
    save_nll_curve(folder / "nll_curve.png", results)
    show(results, console)
    for name in ("results.json", "table.md", "nll_curve.png"):
        console.print(f"  {folder / name}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
