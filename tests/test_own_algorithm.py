"""The doors for algorithms and presets: a stranger's run as the built-in ones do; what reaches nothing is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from ral_gym.agents import (
    ALGORITHMS,
    AdaptiveEntropy,
    Algorithm,
    EntropyTarget,
    EpisodeAlgorithm,
    MLEShare,
    PixelCNNPolicy,
    PriorKLReward,
    Reinforce,
    algorithm_defaults,
    find_algorithm,
    load_run,
    make_sb3_env,
    policy_for,
)
from ral_gym.agents.algorithm import check_stage
from ral_gym.agents.train_ral import make_stage, train_ral
from ral_gym.assets import asset_path
from ral_gym.commands.arguments import parse_train
from ral_gym.config import A2CConfig, Config, GRPOConfig, PPOConfig, ReinforceConfig, TRPOConfig
from ral_gym.errors import ConfigError
from ral_gym.presets import SMOKE, get_preset
from ral_gym.registry import ALGORITHMS as REGISTRY
from ral_gym.registry import _allowed, allow
from ral_gym.runs.run import Run, read_config
from ral_gym.stages.levels import load_generator, load_vqvae
from ral_gym.tokenizers.code_set import CodeSet
from tests.kills import killed_after
from tests.tiny import make_tiny_run

CPU = torch.device("cpu")
EXAMPLES = Path(__file__).parents[1] / "examples" / "extending"


class TopHalf(Reinforce):
    """Own advantages, and an argument and a state of its own."""

    def __init__(self, *arguments: Any, share: float = 0.5, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.share, self.rounds = share, 0

    def advantages(self) -> np.ndarray:
        self.rounds += 1
        found = super().advantages()
        return (found >= np.quantile(found, 1 - self.share)).astype(np.float32)

    def extra_state(self) -> dict[str, Any]:
        return {"rounds": self.rounds}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.rounds = state["rounds"]


class Bare(EpisodeAlgorithm):
    """From the base of the family: only what the returns are worth."""

    def advantages(self) -> np.ndarray:
        return self.rollout_buffer.returns


SLOW_PPO = Algorithm(
    PPO, PixelCNNPolicy, lambda env: find_algorithm("ppo").defaults(env) | {"clip_range_vf": 0.5}, "ppo"
)
MINE, BARE, ENTRY = (f"{__name__}:{name}" for name in ("TopHalf", "Bare", "SLOW_PPO"))


@pytest.fixture(autouse=True)
def named_by_the_user() -> Any:
    """The names are allowed as a command line would, and forgotten afterwards."""
    before, parts = set(_allowed), dict(REGISTRY._parts)
    allow(MINE, BARE, ENTRY)
    yield
    _allowed.clear()
    _allowed.update(before)
    REGISTRY._parts.clear()
    REGISTRY._parts.update(parts)


def stage_2(path: Path, **ral: Any) -> Run:
    """A run of tiny, untrained models with stages 1 and 2."""
    make_tiny_run(path)
    (path / "critic.safetensors").unlink()
    ral = {"n_envs": 8, "n_updates": 4, "checkpoint_every": 2, "mle_coef": 0.0} | ral
    config = replace(read_config(path), ral=replace(SMOKE.ral, **ral))
    (path / "config.json").write_text(config.to_json())
    return Run(path, config)


def parts(run: Run) -> tuple[Any, ...]:
    codes = CodeSet.load(run.file("codes.safetensors"), load_vqvae(run).grid)
    return run, load_vqvae(run), load_generator(run, "prior"), codes, CPU


def checked(**ral: Any) -> None:
    config = replace(SMOKE, ral=replace(SMOKE.ral, **ral))
    config.check()
    check_stage(config.ral)


# The door -----------------------------------------------------------------------------------------------------------


def test_a_bare_class_has_the_entry_of_its_nearest_base() -> None:
    env = make_sb3_env("ral_gym/Oracle-v0", 8, seed=0)
    assert policy_for(MINE) is PixelCNNPolicy
    assert algorithm_defaults(MINE, env) == algorithm_defaults("reinforce", env)
    assert find_algorithm(MINE).section == "reinforce" and find_algorithm(BARE).section is None
    model = ALGORITHMS[MINE] if MINE in ALGORITHMS else find_algorithm(MINE).cls
    prior = asset_path("oracle/prior.safetensors")
    trained = model(policy_for(MINE), env, seed=0, **algorithm_defaults(MINE, env, prior=prior))
    trained.learn(64 * 8 * 2)
    assert trained.rounds == 2 and 0.4 < trained.advantages().mean() < 0.8


def test_an_unknown_on_policy_class_gets_what_whole_images_need() -> None:
    class Own(OnPolicyAlgorithm):
        pass

    name = REGISTRY.name_of(Own)
    env = make_sb3_env("ral_gym/Toy-v0", 4, seed=0)
    assert find_algorithm(name).trains_prior and algorithm_defaults(name, env)["n_steps"] == 16


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dqn", "'dqn' learns a value per code and trains no prior: choose one of reinforce"),
        ("sac", "'sac' acts in continuous spaces only"),
        ("stranger:Other", "is code that a file names; .* add --plugin stranger:Other"),
        ("sarsa", "'sarsa' is unknown: choose one of reinforce"),
    ],
)
def test_what_cannot_train_a_prior_is_refused_before_stage_one(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(algo=name)


def test_what_is_no_algorithm_is_refused() -> None:
    name = REGISTRY.name_of(Path)
    with pytest.raises(ConfigError, match=r"neither a Stable-Baselines3 class nor a ral_gym\.agents\.Algorithm"):
        find_algorithm(name)
    with pytest.raises(ConfigError, match="trains no prior"):
        checked(algo=REGISTRY.name_of(type("Soft", (SAC,), {})))


@pytest.mark.parametrize("algo", [MINE, BARE, ENTRY])
def test_stage_three_trains_and_loads_it(tmp_path: Path, algo: str) -> None:
    run = stage_2(tmp_path / "run", algo=algo, n_updates=2)
    train_ral(*parts(run), progress=False)
    assert run.has("policy.safetensors")
    stage = load_run(run.path, device="cpu")
    assert type(stage.model) is find_algorithm(algo).cls and stage.run_callback.updates == 2


def test_a_file_alone_cannot_name_an_algorithm(tmp_path: Path) -> None:
    run = stage_2(tmp_path / "run", algo=MINE, n_updates=2)
    train_ral(*parts(run), progress=False)
    _allowed.discard(MINE)
    REGISTRY._parts.pop(MINE)
    with pytest.raises(ConfigError, match=f"{MINE}' is code that a file names"):
        load_run(run.path, device="cpu")


def test_options_reach_the_constructor_and_others_are_named(tmp_path: Path) -> None:
    run = stage_2(tmp_path / "run", algo=MINE, options={"share": 0.25}, reinforce=ReinforceConfig(baseline="mean"))
    model: Any = make_stage(*parts(run), progress=False).model
    assert (model.share, model.baseline) == (0.25, "mean")
    for options, message in (
        ({"shore": 1}, "takes no shore here; choose among .*fast_path, share"),
        ({"policy_kwargs": 1}, "takes no policy_kwargs here"),
        ({"baseline": "mean"}, r"baseline, which is a setting: give ral\.reinforce\.baseline"),
        ({"mle_coef": 1}, r"mle_coef, which is a setting: give ral\.mle_coef"),
    ):
        with pytest.raises(ConfigError, match=message):
            checked(algo=MINE, options=options)


def test_the_command_line_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _allowed.clear()
    arguments = parse_train(["--preset", "smoke", "--algo", MINE, "--ral.options", "share", "0.25"])
    assert arguments.config.ral.algo == MINE and arguments.config.ral.options == {"share": 0.25}
    assert arguments.name == "smoke-TopHalf"
    check_stage(arguments.config.ral)


@pytest.mark.parametrize("name", ["own_algorithm:TopHalf", "own_algorithm:PatientPPO"])
def test_the_example_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    allow(name)
    run = stage_2(tmp_path / "run", algo=name, n_updates=2)
    train_ral(*parts(run), progress=False)
    assert run.has("policy.safetensors")


# Sections -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ral", "message"),
    [
        ({"algo": "ppo", "grpo": GRPOConfig(group_size=4)}, r"ral.grpo.group_size is 4, but ral.algo is ppo"),
        ({"algo": "a2c", "ppo": PPOConfig(clip_range=0.3)}, r"ral.ppo.clip_range is 0.3, but ral.algo is a2c"),
        ({"algo": "ppo", "reinforce": ReinforceConfig(baseline="none")}, "ral.reinforce.baseline is none, but"),
        ({"algo": "trpo", "max_grad_norm": 0.5}, "ral.max_grad_norm is 0.5, but trpo has no such argument: give 1.0"),
        ({"algo": "ppo", "ppo": PPOConfig(entropy_target="start")}, r"ral.ppo.ent_coef, which it adapts, is 0"),
        ({"grpo": GRPOConfig(entropy_schedule=True)}, "ral.grpo.entropy_schedule needs ral.grpo.entropy_target"),
        ({"reinforce": ReinforceConfig(vf_coef=0.1)}, "only ral.reinforce.baseline value trains a value head"),
    ],
)
def test_settings_that_would_reach_nothing_are_refused(ral: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(**ral)


@pytest.mark.parametrize("algo", ["reinforce", "grpo", "ppo", "a2c", "trpo", "maskable_ppo"])
@pytest.mark.parametrize("preset", ["demo", "smoke", "celeba64", "demo-2level"])
def test_every_preset_goes_with_every_algorithm(algo: str, preset: str) -> None:
    config = parse_train(["--preset", preset, "--algo", algo]).config
    check_stage(config.ral)
    same = algo == "reinforce"
    assert config.ral.reinforce == (get_preset(preset).ral.reinforce if same else ReinforceConfig())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--algo", "ppo", "--ral.grpo.group-size", "4"], "--ral.grpo.group-size is for another algorithm than ppo"),
        (["--algo", "ppo", "--ral.reinforce.baseline", "none"], "--ral.reinforce.baseline is for another"),
        (["--ral.maskable-ppo.n-epochs", "4"], "--ral.maskable-ppo.n-epochs is for another algorithm than reinforce"),
    ],
)
def test_another_algorithms_flag_is_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_train(["--preset", "smoke", *flags])


TIED = {"kl_coef": 0.3, "mle_coef": 0.2}
BONUS = {"ent_coef": 3e-3, "entropy_target": "start", "entropy_schedule": True}
CASES = {
    "ppo": {"algo": "ppo", "ppo": PPOConfig(**BONUS), **TIED},
    "a2c": {"algo": "a2c", "a2c": A2CConfig(**BONUS), **TIED},
    "trpo": {"algo": "trpo", "trpo": TRPOConfig(cg_max_steps=3), **TIED},
    "reinforce": {"reinforce": ReinforceConfig(**BONUS), **TIED},
    "grpo": {"algo": "grpo", "grpo": GRPOConfig(**BONUS), **TIED},
    "own": {"algo": MINE, "options": {"share": 0.25}, **TIED},
}


def test_ties_that_a_loss_lacks_are_callbacks(tmp_path: Path) -> None:
    kinds = {
        "ppo": [PriorKLReward, EntropyTarget, MLEShare],
        "trpo": [PriorKLReward, MLEShare],
        "reinforce": [EntropyTarget],
        "grpo": [EntropyTarget],
    }
    for name, expected in kinds.items():
        stage = make_stage(*parts(stage_2(tmp_path / name, **CASES[name])), progress=False)
        assert [type(regularizer) for regularizer in stage.regularizers] == expected
        assert stage.callbacks.callbacks == [stage.reward_callback, *stage.regularizers, stage.run_callback]
        coefs = {type(regularizer): getattr(regularizer, "coef", None) for regularizer in stage.regularizers}
        assert coefs.get(PriorKLReward, 0.3) == 0.3 and coefs.get(MLEShare, 0.2) == 0.2
    model: Any = stage.model
    assert (model.kl_coef, model.mle_coef, model.entropy_target) == (0.3, 0.2, None)  # steered once, not twice
    rule = stage.regularizers[0]
    rule.init_callback(model)
    assert (rule.rule.coef, rule.rule.target, rule.rule.schedule) == (3e-3, None, True)


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_with_ties_continues_to_bit_identical_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    ral = {"n_updates": 5, "reset_mode": "mixed"} | CASES[case]
    whole, broken = (stage_2(tmp_path / name, **ral) for name in ("whole", "broken"))
    train_ral(*parts(whole), progress=False)
    with killed_after(3):
        train_ral(*parts(broken), progress=False)
    train_ral(*parts(broken), progress=False)
    for name in ("policy", "policy_ema", "critic"):
        files = [run.file(f"{name}.safetensors").read_bytes() for run in (whole, broken)]
        assert files[0] == files[1], name
    ours = [
        {name: value for name, value in record.items() if not name.startswith(("time/", "rollout/ep_"))}
        for run in (whole, broken)
        for record in [run.metrics("ral")[-1]]
    ]
    assert ours[0] == ours[1] and ours[0]["step"] == 4


@pytest.mark.parametrize("case", ["grpo", "ppo"])
def test_the_schedule_counts_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Nobody knows stage 3's number of steps beforehand; the bonus rises and falls over its updates all the same."""
    seen: list[float] = []
    run = stage_2(tmp_path / "run", **CASES[case], n_updates=10, reset_mode="mixed")
    stage = make_stage(*parts(run), progress=False)
    rule = AdaptiveEntropy._shape
    monkeypatch.setattr(AdaptiveEntropy, "_shape", staticmethod(lambda share: (seen.append(share), rule(share))[1]))
    stage.model.learn(2**62, callback=stage.callbacks, reset_num_timesteps=False)
    assert seen[:10] == [share / 10 for share in range(1, 11)]
    assert stage.model.ent_coef == pytest.approx(7e-5)  # the least there is


# Old files ----------------------------------------------------------------------------------------------------------


def before_sections(algo: str) -> Config:
    """A configuration as an earlier version wrote it, read by this one."""
    values = json.loads(SMOKE.to_json())
    sections = ("reinforce", "grpo", "ppo", "a2c", "trpo", "maskable_ppo", "options")
    old = {name: value for name, value in values["ral"].items() if name not in sections}
    old |= {"algo": algo, "baseline": "mean", "normalize_advantage": False, "mle_coef": 0.1, "kl_coef": 0.2}
    return Config.from_dict(values | {"ral": old})


def test_an_old_configuration_is_read_as_what_it_did() -> None:
    ral = before_sections("reinforce").ral
    assert (ral.reinforce.baseline, ral.normalize_advantage, ral.mle_coef, ral.kl_coef) == ("mean", False, 0.1, 0.2)
    ral = before_sections("grpo").ral
    assert (ral.normalize_advantage, ral.mle_coef, ral.kl_coef) == (False, 0.1, 0.2)
    ral = before_sections("ppo").ral  # which ignored them
    assert (ral.normalize_advantage, ral.mle_coef, ral.kl_coef) == (True, 0.0, 0.0)
    for algo in ("reinforce", "grpo", "ppo"):
        check_stage(before_sections(algo).ral)
