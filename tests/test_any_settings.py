"""Whatever the settings, what a later stage would refuse is refused before the first; or all stages run."""

import io
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from rich.console import Console

import ral_gym.commands.train as pipeline
from ral_gym.agents.algorithm import check_stage, find_algorithm
from ral_gym.commands.arguments import TrainArguments
from ral_gym.config import Config, GRPOConfig
from ral_gym.errors import ConfigError, RalGymError
from ral_gym.metrics.distances import FeatureDistance
from ral_gym.metrics.intervals import distance_estimates
from ral_gym.presets import SMOKE
from ral_gym.rewards.distribution import FORMS, FrechetReward
from tests.random_settings import random_config

pytestmark = pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")  # SB3's; no fault

CODE = replace(SMOKE.data, image_size=8)
"""With three strided convolutions: images of one code."""


def allowed_config(seed: int) -> Config:
    """The first configuration that `Config.check` lets through."""
    rng = random.Random(seed)
    while True:
        config = random_config(rng.choice)
        try:
            config.check()
        except ConfigError as error:
            assert "\n" not in str(error)
        else:
            return config


def run_all_stages(config: Config) -> None:
    """All stages, or one line before the first of them."""
    begun = []
    run_stages = pipeline._run_stages

    def spy(*arguments: object) -> object:
        begun.append(True)
        return run_stages(*arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(pipeline, "_run_stages", spy)
        arguments = TrainArguments(config, name="any", runs=folder, device="cpu", quiet=True)
        try:
            results = pipeline.train(arguments, Console(file=io.StringIO()))
        except RalGymError as error:
            assert not begun, f"refused after stage 1 had begun: {error}"
            assert "\n" not in str(error)
        else:
            assert {"mle", "ral"} <= results["rows"].keys()
            assert (Path(folder) / "any" / "results.json").exists()


@pytest.mark.parametrize("seed", [1006])
def test_settings_run_through_all_stages_or_are_refused_first(seed: int) -> None:
    run_all_stages(allowed_config(seed))


@pytest.mark.slow
@settings(max_examples=60, phases=[Phase.generate])
@given(seed=st.integers(0, 10**6))
def test_many_settings_run_through_all_stages_or_are_refused_first(seed: int) -> None:
    run_all_stages(allowed_config(seed))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (replace(SMOKE, data=CODE), "ral.reset_mode"),
        (replace(SMOKE, data=CODE, ral=replace(SMOKE.ral, n_envs=1, reset_mode="full")), "ral.n_envs"),
        (replace(SMOKE, ral=replace(SMOKE.ral, train_levels="top")), "ral.train_levels"),
        (
            replace(
                SMOKE,
                data=CODE,
                vqvae=replace(SMOKE.vqvae, layers=1),
                evaluation=replace(SMOKE.evaluation, extractor="lite0"),
            ),
            "lite0",
        ),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_by_check(config: Config, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        config.check()


@pytest.mark.parametrize(
    ("size", "n_envs", "mode", "fits"),
    [
        (3, 8, "mixed", False),
        (None, 1, "continue", False),
        (4, 8, "mixed", True),
        (None, 7, "mixed", True),
        (3, 8, "full", True),
        (None, 1, "scratch", True),
    ],
)
def test_groups_fit_the_environments_before_anything_is_trained(
    size: int | None, n_envs: int, mode: str, fits: bool
) -> None:
    ral = replace(SMOKE.ral, algo="grpo", n_envs=n_envs, reset_mode=mode, grpo=GRPOConfig(group_size=size))
    if fits:
        check_stage(ral)
    else:
        with pytest.raises(ConfigError, match=r"ral.grpo.*ral.n_envs is"):
            check_stage(ral)


@pytest.mark.parametrize("algo", ["ppo", "maskable_ppo", "trpo"])
@pytest.mark.parametrize("n_envs", [2, 3, 7, 8])
def test_a_minibatch_of_one_code_images_has_two_codes(algo: str, n_envs: int) -> None:
    class OneCode:
        """As much of an environment as the defaults look at."""

        num_envs = n_envs

        def get_attr(self, name: str, indices: int) -> list[tuple[int]]:
            return [(1,)]

    size = find_algorithm(algo).keywords(OneCode())["batch_size"]  # type: ignore[arg-type]
    assert size > 1
    assert n_envs % size == 0


@pytest.mark.parametrize("form", FORMS)
def test_images_that_are_all_alike_have_finite_rewards(form: str) -> None:
    reference = torch.randn(9, 4, dtype=torch.float64)
    rewards = FrechetReward(reference, form=form)(torch.ones(5, 4))  # type: ignore[arg-type]
    assert rewards.isfinite().all()
    alike = FrechetReward(torch.ones(9, 4), form=form)(torch.randn(5, 4))  # type: ignore[arg-type]
    assert alike.isfinite().all()


def test_features_of_one_number_have_distances() -> None:
    # The extractor `encoder` has one where vqvae.codebook_dim is 1.
    reference, features = torch.randn(20, 1), torch.randn(20, 1) + 3
    found = distance_estimates(FeatureDistance(reference, extractor="encoder"), features, seed=0)
    assert 4 < found["fd"].value < 16
