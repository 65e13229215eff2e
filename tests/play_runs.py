"""Tiny run folders with a MLE and a RAL generator, for the tests of `ral-gym play`."""

from pathlib import Path

import pytest
import torch

from ral_gym.play.models import Models, load_models
from ral_gym.priors.base import save_prior
from ral_gym.runs.run import Run, read_config
from ral_gym.stages.levels import load_generator
from tests.class_runs import make_class_run
from tests.tiny import make_tiny_run

RUNS = ("plain", "two levels", "classes")


def add_policy(run: Path, name: str = "prior") -> Path:
    """A "RAL" generator with other weights than the prior's."""
    prior = load_generator(Run(run, read_config(run)), name)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for weights in prior.parameters():
            weights.data += 0.3 * torch.randn_like(weights)
    save_prior(run / "policy_ema.safetensors", prior)
    return run


def make_play_runs(root: Path) -> dict[str, Path]:
    """A run of each of `RUNS`."""
    return {
        "plain": add_policy(make_tiny_run(root / "plain")),
        "two levels": add_policy(make_tiny_run(root / "two", levels=2)),
        "classes": add_policy(make_class_run(root / "classes")),
    }


@pytest.fixture(scope="module")
def faces() -> Models:
    """The bundled models."""
    return load_models(device="cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`make_play_runs`."""
    return make_play_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module", params=RUNS)
def models(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Models:
    """The models of each run."""
    return load_models(str(folders[request.param]), "cpu")
