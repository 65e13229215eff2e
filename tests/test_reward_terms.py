"""Stage 3 with named rewards: what the settings allow, what is trained and written, and that a killed run goes on."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from ral_gym.agents import load_run
from ral_gym.agents.defaults import group_size
from ral_gym.agents.rewards.composite import CompositeReward
from ral_gym.agents.rewards.critic_callback import CriticCallback
from ral_gym.agents.train_ral import Stage, make_stage, train_ral
from ral_gym.commands.arguments import parse
from ral_gym.commands.dry_run import dry_run
from ral_gym.commands.stage_files import files_of
from ral_gym.config import Config
from ral_gym.errors import ConfigError, RunError
from ral_gym.presets import SMOKE
from ral_gym.registry import REWARDS
from ral_gym.rewards.distribution import DISTRIBUTION_TERMS
from ral_gym.runs.run import Run, read_config
from ral_gym.runs.storage import load_json, save_json
from ral_gym.settings import check_parts
from ral_gym.stages.levels import load_generator, load_vqvae
from ral_gym.tokenizers.code_set import CodeSet
from tests.kills import killed_after
from tests.tiny import make_tiny_run

CPU = torch.device("cpu")
COMPOSITE = {"critic": 1.0, "loo_fd": 0.5}


def stage_2(path: Path, **ral: Any) -> Run:
    """A run of tiny, untrained models with stages 1 and 2."""
    make_tiny_run(path)
    ral = {"n_envs": 8, "n_updates": 4, "checkpoint_every": 2} | ral
    config = replace(read_config(path), ral=replace(SMOKE.ral, **ral))
    (path / "critic.safetensors").unlink()
    (path / "config.json").write_text(config.to_json())
    return Run(path, config)


def parts(run: Run) -> tuple[Any, ...]:
    return run, load_vqvae(run), load_generator(run, "prior"), CodeSet.load(run.file("codes.safetensors")), CPU


def train(run: Run) -> None:
    train_ral(*parts(run), progress=False)


def weights(run: Run) -> dict[str, bytes]:
    return {file: run.file(file).read_bytes() for file in ("policy.safetensors", "policy_ema.safetensors")}


def with_weights(weights: Any) -> Config:
    return replace(SMOKE, ral=replace(SMOKE.ral, reward_weights=weights))


# Settings -----------------------------------------------------------------------------------------------------------


def test_the_names_are_those_of_the_rewards() -> None:
    assert ["critic", *DISTRIBUTION_TERMS] == list(REWARDS)[:5]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], {"critic": 1.0}),
        (["loo_fd", "1"], {"loo_fd": 1.0}),
        (["critic", "1", "kid", "0.25"], {"critic": 1.0, "kid": 0.25}),
    ],
)
def test_a_flag_gives_terms_and_weights(given: list[str], expected: dict[str, float]) -> None:
    flag = ["--ral.reward-weights", *given] if given else []
    assert parse(["train", "--preset", "smoke", *flag]).config.ral.reward_weights == expected  # type: ignore[union-attr]


@pytest.mark.parametrize("given", [["loo_fd"], ["loo_fd", "much"]])
def test_what_is_no_pair_is_a_usage_error(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["train", "--preset", "smoke", "--ral.reward-weights", *given])
    assert caught.value.code == 2
    assert "reward-weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, r"ral.reward_weights is \{\}: give one or more of critic, loo_fd, .*, hps, each with its weight"),
        (["kid"], r"ral.reward_weights is a list: give names and values"),
        (
            {"a/b": 1.0},
            "names 'a/b': choose among critic, loo_fd, loo_fd_first_order, loo_fd_diagonal, kid, clip, hps, or your",
        ),
        ({"kid": 0.0}, "kid has weight 0.0: give a number above 0"),
        ({"kid": -1.0}, "kid has weight -1.0: give a number above 0"),
        ({"kid": float("nan")}, "kid has weight nan: give a number above 0"),
        ({"kid": float("inf")}, "kid has weight inf: give a number above 0"),
        ({"kid": "1"}, "ral.reward_weights.kid is '1': give a number"),
    ],
)
def test_other_weights_are_refused(weights: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_weights(weights).check()


def test_an_unknown_term_is_refused_before_anything_is_trained() -> None:
    with_weights({"fid": 1.0}).check()  # a run made with someone's own reward can be read without it
    with pytest.raises(
        ConfigError, match=r"reward 'fid' is unknown.*: choose one of critic, loo_fd, .*, hps, or bring"
    ):
        check_parts({"fid": 1.0}, "patch")
    with pytest.raises(ConfigError, match="reward 'fid' is unknown"):
        parse(["train", "--preset", "smoke", "--ral.reward-weights", "fid", "1"])


def test_a_configuration_survives_json_and_an_old_one_has_the_critic() -> None:
    config = with_weights({"critic": 1.0, "kid": 0.5})
    values = json.loads(config.to_json())
    assert Config.from_dict(values) == config
    del values["ral"]["reward_weights"], values["ral"]["reward_ema"]
    assert Config.from_dict(values).ral.critic_alone


def test_a_folder_keeps_its_rewards(tmp_path: Path) -> None:
    run = stage_2(tmp_path / "run")
    values = load_json(run.file("config.json"))
    del values["ral"]["reward_weights"], values["ral"]["reward_ema"]  # written by an older version
    save_json(run.file("config.json"), values)
    Run(run.path, run.config)
    other = replace(run.config, ral=replace(run.config.ral, reward_weights={"kid": 1.0}))
    with pytest.raises(RunError, match=r"ral.reward_weights.critic: 1.0 there, None here"):
        Run(run.path, other)


def test_default_rewards_are_not_shared_between_configurations() -> None:
    one, other = Config(), Config()
    one.ral.reward_weights["kid"] = 1.0
    assert other.ral.reward_weights == {"critic": 1.0}


@pytest.mark.parametrize(("n_envs", "size"), [(256, 8), (12, 6), (9, 3), (4, 4), (11, 11)])
def test_groups_divide_the_environments(n_envs: int, size: int) -> None:
    assert group_size(n_envs) == size


# Training -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", ["reinforce", "grpo"])
@pytest.mark.parametrize("terms", [{"loo_fd": 1.0}, COMPOSITE], ids=["loo_fd", "composite"])
def test_a_killed_run_continues_to_bit_identical_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algo: str, terms: dict[str, float]
) -> None:
    # 16 environments: in the modes of partial generation fewer leave too few images of the same rows for a reward.
    ral = {"algo": algo, "reward_weights": terms, "n_envs": 16, "n_updates": 5, "reset_mode": "mixed"}
    whole, broken = (stage_2(tmp_path / name, **ral) for name in ("whole", "broken"))
    train(whole)
    with killed_after(3):
        train(broken)
    assert not broken.has("policy.safetensors")
    train(broken)
    assert weights(whole) == weights(broken)
    assert len({*weights(whole).values()}) == 2  # the average is not the policy
    files = {"policy.safetensors", "policy_ema.safetensors", *(["critic.safetensors"] if "critic" in terms else [])}
    assert {name for name in (*files, "critic.safetensors") if whole.has(name)} == files
    assert files < set(files_of("ral", whole.config)) == files | {"prior_continued.safetensors"}
    for one, other in zip(*(run.metrics("ral") for run in (whole, broken)), strict=True):
        same = [name for name in one if name == "step" or name.startswith("reward/")]
        assert [one[name] for name in same] == [other[name] for name in same]
        assert "reward/loo_fd_distance" in same


def test_a_finished_run_without_a_critic_is_loaded_and_not_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stage_2(tmp_path / "run", reward_weights={"kid": 1.0})
    train(run)
    stage = load_run(run.path)
    assert stage.critic is None and stage.run_callback.updates == 4
    monkeypatch.setattr("ral_gym.agents.train_ral.make_stage", None)
    train(run)


def test_features_are_chosen_by_name(tmp_path: Path) -> None:
    settings = {"reward_weights": {"kid": 1.0}, "n_updates": 2}
    runs = [stage_2(tmp_path / name, reward_features=name, **settings) for name in ("encoder", "pyramid")]
    for run in runs:
        train(run)
    first, second = (run.metrics("ral")[0]["reward/kid_distance"] for run in runs)
    assert first != second and weights(runs[0]) != weights(runs[1])


def test_without_a_critic_its_cost_is_not_counted() -> None:
    whole, without = (dry_run(with_weights(terms)).stages[-1] for terms in (COMPOSITE, {"loo_fd": 1.0}))
    assert whole.parts.keys() - without.parts.keys() == {"critic"}
    assert whole.flops_per_step > without.flops_per_step and whole.memory > without.memory


def stage_of(run: Run) -> Stage:
    return make_stage(*parts(run), progress=False)


def test_the_papers_reward_is_the_critic_alone_and_others_are_composed(tmp_path: Path) -> None:
    for number, (terms, kind) in enumerate(
        [({"critic": 1.0}, CriticCallback), ({"critic": 2.0}, CompositeReward), (COMPOSITE, CompositeReward)]
    ):
        stage = stage_of(stage_2(tmp_path / str(number), reward_weights=terms))
        assert type(stage.reward_callback) is kind and stage.critic is not None
    settings = {"reward_weights": {"loo_fd": 2.0}, "reward_ema": 0.75}
    stage = stage_of(stage_2(tmp_path / "alone", **settings))
    assert isinstance(stage.reward_callback, CompositeReward) and stage.critic is None
    assert stage.reward_callback.weights == {"loo_fd": 2.0} and stage.reward_callback.ema == 0.75


def test_the_reward_moves_the_policy(tmp_path: Path) -> None:
    """Other terms, other weights of the policy; and the same ones twice, the same."""
    found = {}
    for name, terms in (("a", {"kid": 1.0}), ("b", {"kid": 1.0}), ("c", {"loo_fd": 1.0})):
        run = stage_2(tmp_path / name, reward_weights=terms, n_updates=2, reset_mode="full")
        train(run)
        found[name] = weights(run)
    assert found["a"] == found["b"] != found["c"]


@pytest.mark.parametrize(("extractor", "warned"), [("encoder", True), ("lite0", False)])
def test_the_evaluations_features_as_a_reward_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, extractor: str, warned: bool
) -> None:
    run = stage_2(tmp_path / "run", reward_weights={"kid": 1.0})
    evaluation = replace(run.config.evaluation, extractor=extractor)
    run.path.joinpath("config.json").write_text(replace(run.config, evaluation=evaluation).to_json())
    run = Run(run.path, read_config(run.path))
    stage = stage_of(run)
    with caplog.at_level(logging.WARNING, "ral_gym"):
        for _ in range(2):  # before a checkpoint is put back, and again when training starts
            stage.callbacks.init_callback(stage.model)
    assert caplog.text.count("the reward's features (encoder) are the evaluation's") == int(warned)


@pytest.mark.parametrize(
    ("terms", "shown"),
    [({"critic": 1.0}, {"reward", "auc"}), ({"loo_fd": 1.0}, {"loo_fd"}), (COMPOSITE, {"reward", "auc", "loo_fd"})],
)
def test_the_progress_bar_shows_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terms: dict[str, float], shown: set[str]
) -> None:
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(tqdm, "set_postfix", lambda self, figures, refresh: seen.append(figures))
    train(stage_2(tmp_path / "run", reward_weights=terms, n_updates=2))
    assert [set(figures) for figures in seen] == [shown] * 2
    assert all(float(value) == float(value) for figures in seen for value in figures.values())
