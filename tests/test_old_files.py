"""Files of earlier versions still work: run folders and saved Stable-Baselines3 models (tests/fixtures)."""

import dataclasses
import importlib
import json
import shutil
from pathlib import Path

import pytest
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO

from ral_gym.agents import GRPO, Reinforce, load_run, make_sb3_env
from ral_gym.commands.cli import main
from ral_gym.data.images import load_images
from ral_gym.errors import RunError
from ral_gym.presets import SMOKE
from ral_gym.runs.run import Run, read_config
from ral_gym.stages.levels import GENERATORS, load_generator, load_vqvae

FIXTURES = Path(__file__).parent / "fixtures" / "before_registry"
MODELS = {"reinforce": Reinforce, "grpo": GRPO, "ppo": PPO, "maskable_ppo": MaskablePPO}


@pytest.fixture(params=["one_level", "two_levels"])
def old_run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a run folder written before the modules moved."""
    return Path(shutil.copytree(FIXTURES / request.param, tmp_path / request.param))


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_loads_and_acts_as_it_did(name: str) -> None:
    expected = json.loads((FIXTURES / "sb3" / "expected.json").read_text())
    model = MODELS[name].load(FIXTURES / "sb3" / f"{name}.zip", device="cpu")
    env = make_sb3_env("ral_gym/Toy-v0", 4, seed=0)
    actions, _ = model.predict(env.reset(), deterministic=True)
    assert actions.tolist() == expected[name]
    weights = sum(float(weight.detach().abs().sum()) for weight in model.policy.parameters())
    assert weights == pytest.approx(expected[f"{name}_weights"], rel=1e-5)


def test_the_class_paths_that_saved_models_hold_exist() -> None:
    paths = {
        "policy": ["PixelCNNPolicy", "PriorWeights"],
        "episodes": ["EpisodeRolloutBuffer"],
        "maskable": ["MaskablePixelCNNPolicy", "MaskableEpisodeRolloutBuffer"],
        "features": ["CodeFeatures"],
        "regularizers": ["AdaptiveEntropy"],
    }
    for module, names in paths.items():
        found = importlib.import_module(f"ral_gym.agents.{module}")
        assert all(hasattr(found, name) for name in names)


def test_the_generators_of_an_old_run_load(old_run: Path) -> None:
    run = Run(old_run, read_config(old_run))
    assert load_vqvae(run).grid == load_generator(run, "prior").grid
    for name in GENERATORS.keys() - {"prior_equal_time"}:  # a control that it did not know
        assert load_generator(run, name).config == load_generator(run, "prior").config


def test_an_old_run_prints_its_table_and_draws(old_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = ["train", "--runs", str(old_run.parent), "--name", old_run.name, "--quiet"]
    config = json.loads((old_run / "config.json").read_text())
    flags = [word for section, name, flag in SMALL for word in (flag, str(config[section][name]))]
    assert main([*again, "--preset", "smoke", *flags, "--evaluation.temperatures", "0.5"]) == 0
    assert "ral_best_temperature" in capsys.readouterr().out
    assert main(["sample", str(old_run), "--n", "4"]) == 0
    assert (old_run / "samples" / "sample_policy_ema.png").is_file()


def test_an_old_run_keeps_all_its_held_out_images(old_run: Path, tmp_path: Path) -> None:
    """Their `data.limit` held for training images alone; a new run's holds for both."""
    old, new = read_config(old_run), Run(tmp_path / "new", SMOKE)
    assert old.data.limit is not None and len(load_images(old.data, progress=False).test) == 72
    assert len(load_images(new.config.data, progress=False).test) == 64
    asked = dataclasses.replace(old, data=dataclasses.replace(old.data, test_limit=None))  # a command line's
    assert Run(old_run, asked).config == old
    with pytest.raises(RunError, match="test_limit"):
        Run(old_run, dataclasses.replace(old, data=dataclasses.replace(old.data, test_limit=5)))


SMALL = [
    (section, name, f"--{section}.{name.replace('_', '-')}")
    for section, names in {
        "data": "limit image_size",
        "vqvae": "levels layers hidden_units residual_units codebook_size codebook_dim training_steps",
        "prior": "hidden_units residual_units layers training_steps evaluate_every",
        "bottom": "hidden_units residual_units layers conv_filter_size output_stack_layers conditioning_stack_layers "
        "training_steps batch_size evaluate_every",
        "critic": "hidden_units layers",
        "ral": "n_updates checkpoint_every n_envs",
        "evaluation": "n_samples",
    }.items()
    for name in names.split()
]
"""The settings in which the old runs differ from the smoke preset."""


def test_stage_3_of_an_old_run_goes_on(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FIXTURES / "one_level", tmp_path / "run"))
    stage = load_run(folder, device="cpu")
    assert stage.run_callback.updates == 2
    stage.model.learn(64, callback=stage.callbacks, reset_num_timesteps=False)
