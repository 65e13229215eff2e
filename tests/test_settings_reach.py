"""Every setting reaches what it is for: one run with all settings at odd values, and a look at every consumer."""

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import ral_gym.agents.rewards.co_trained_critic as co_trained_critic
import ral_gym.agents.train_ral as train_ral
import ral_gym.data.images as data_images
import ral_gym.stages.controls as controls
import ral_gym.stages.evaluate as evaluate
import ral_gym.stages.train_prior as train_prior
import ral_gym.stages.train_vqvae as train_vqvae
import ral_gym.tokenizers.code_set as code_set
from ral_gym.agents import find_algorithm
from ral_gym.agents.rewards.critic_callback import CriticCallback
from ral_gym.commands.arguments import TrainArguments
from ral_gym.commands.train import train
from ral_gym.config import SECTIONS, Config, GRPOConfig
from ral_gym.metrics import PyramidFeatures
from ral_gym.presets import SMOKE
from ral_gym.runs.results import load_results
from ral_gym.runs.run import Run, read_config
from ral_gym.runs.storage import load_tensors
from ral_gym.stages.levels import load_generator, load_vqvae
from ral_gym.stages.scheduled_sampling import SCHEDULES
from ral_gym.tokenizers.code_set import CodeSet
from tests.odd_settings import ELSEWHERE, GRPO_SECTION, ODD, OTHERS
from tests.tiny import make_tiny_run

pytestmark = pytest.mark.commands

CPU = torch.device("cpu")


@dataclass
class Seen:
    """What the consumers were given."""

    run: Run
    calls: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def one(self, name: str, number: int = 0) -> dict[str, Any]:
        return self.calls[name][number]

    def stored(self, name: str) -> dict[str, Any]:
        """The constructor's arguments in a file."""
        return load_tensors(self.run.file(f"{name}.safetensors"))[1]["config"]

    @property
    def stage(self) -> Any:
        return self.one("make_stage")["returned"]


def write_images(folder: Path) -> None:
    """400 small pictures in colour."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number, pixels in enumerate(rng.integers(0, 256, (400, 24, 24, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{number:03}.png")


def spied(seen: Seen, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which also notes what it is given and what it gives."""

    @functools.wraps(original)
    def call(*arguments: Any, **keywords: Any) -> Any:
        bound = inspect.signature(original).bind(*arguments, **keywords)
        bound.apply_defaults()
        returned = original(*arguments, **keywords)
        seen.calls.setdefault(name, []).append({**bound.arguments, "returned": returned})
        return returned

    return call


SPIED = [
    (data_images, "Decoding"),
    (data_images, "Keeping"),
    (data_images, "decode_groups"),
    (data_images, "open_source"),
    (train_vqvae, "JointBatches"),
    (train_vqvae, "augment"),
    (train_vqvae, "ImageLosses"),
    (train_prior, "WeightAverage"),
    (train_prior, "HeldOut"),
    (train_prior, "ScheduledSampling"),
    (train_prior, "Task"),
    (train_prior, "LearningRate"),
    (train_prior, "make_adam"),
    (controls, "Task"),
    (controls, "WeightAverage"),
    (train_ral, "make_stage"),
    (co_trained_critic, "augmented"),
    (co_trained_critic, "critic_loss"),
    (co_trained_critic.CoTrainedCritic, "train"),
    (CriticCallback, "_fresh"),
    (code_set, "encode_set"),
    (evaluate, "GeneratorMetrics"),
    (evaluate, "_sweep"),
]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """One run of all stages with every setting at an odd value."""
    path = tmp_path_factory.mktemp("odd")
    write_images(path / "images")
    config = replace(ODD, data=replace(ODD.data, source=f"folder:{path / 'images'}", cache_dir=str(path / "cache")))
    found = Seen(Run(path / "run", config))
    with pytest.MonkeyPatch.context() as patch:
        for module, name in SPIED:
            patch.setattr(module, name, spied(found, name, getattr(module, name)))
        made = torch.optim.Adam.__init__

        def adam(self: Any, params: Any, *given: Any, **keywords: Any) -> None:
            params = list(params)
            weights = [w for one in params for w in (one["params"] if isinstance(one, dict) else [one])]
            named = dict(zip(("lr", "betas", "eps", "weight_decay"), given, strict=False)) | keywords
            found.calls.setdefault("Adam", []).append({**named, "n": sum(weight.numel() for weight in weights)})
            made(self, params, *given, **keywords)

        patch.setattr(torch.optim.Adam, "__init__", adam)
        arguments = TrainArguments(config, name="run", runs=str(path), device="cpu", quiet=True)
        train(arguments, Console(quiet=True))
    yield found


def attribute(path: str) -> Callable[[Seen], Any]:
    """Something of stage 3."""
    return lambda seen: operator.attrgetter(path)(seen.stage)


def stored(file: str, name: str) -> Callable[[Seen], Any]:
    return lambda seen: seen.stored(file)[name]


def given(call: str, name: str, number: int = 0) -> Callable[[Seen], Any]:
    return lambda seen: (
        operator.attrgetter(name)(seen.one(call, number)) if "." in name else seen.one(call, number)[name]
    )


def decoding(name: str) -> Callable[[Seen], Any]:
    return lambda seen: getattr(seen.one("Decoding")["returned"], name)


def limits(name: str) -> Callable[[Seen], Any]:
    return lambda seen: getattr(seen.one("Decoding")["returned"].limits, name)


def of_prior(section: str, level: int) -> dict[str, Callable[[Seen], Any]]:
    """Stage 2 of one level."""
    file = ("prior", "prior_bottom")[level]
    names = (
        "hidden_units residual_units layers conv_filter_size dropout output_stack_layers attention_layers "
        "attention_heads position_embedding"
    )
    found: dict[str, Callable[[Seen], Any]] = {name: stored(file, name) for name in names.split()}

    def sampling(seen: Seen) -> Any:
        return seen.one("ScheduledSampling", level)["returned"]

    found |= {
        "batch_size": lambda seen: seen.one("Task", level)["batch_size"],
        "training_steps": lambda seen: seen.one("LearningRate", level)["steps"],
        "learning_rate": lambda seen: seen.calls["Adam"][2 + level]["lr"],
        "adam_beta1": lambda seen: seen.calls["Adam"][2 + level]["betas"][0],
        "adam_beta2": lambda seen: seen.calls["Adam"][2 + level]["betas"][1],
        "weight_decay": lambda seen: seen.one("make_adam", level)["weight_decay"],
        "learning_rate_schedule": lambda seen: seen.one("LearningRate", level)["kind"],
        "decay_share": lambda seen: seen.one("LearningRate", level)["decay_share"],
        "patience": lambda seen: seen.one("LearningRate", level)["patience"],
        "ema_decay": lambda seen: seen.one("WeightAverage", level)["decay"],
        "augmented_passes": lambda seen: seen.one("encode_set")["passes"],
        "evaluate_every": lambda seen: seen.one("HeldOut", level)["returned"].every,
        "held_out": lambda seen: len(seen.one("HeldOut", level)["returned"].test.codes),
        "scheduled_sampling": lambda seen: sampling(seen).way,
        "scheduled_sampling_schedule": lambda seen: next(
            n for n, f in SCHEDULES.items() if f is sampling(seen).schedule
        ),
        "scheduled_sampling_share": lambda seen: sampling(seen).largest,
    }
    if level:
        found["conditioning_stack_layers"] = stored(file, "conditioning_stack_layers")
    return {f"{section}.{name}": look for name, look in found.items()}


def losses(path: str) -> Callable[[Seen], Any]:
    """Something of what stage 1 adds to the loss."""
    return lambda seen: operator.attrgetter(path)(seen.one("ImageLosses")["returned"])


def _critic(seen: Seen) -> Any:
    return seen.stage.critic


VQVAE_SIZES = (
    *("hidden_units", "residual_units", "residual_blocks", "layers", "codebook_size", "codebook_dim", "beta"),
    *("encoder_filter_size", "decoder_filter_size", "decay", "threshold_ema_dead_code"),
)
LOOKS: dict[str, Callable[[Seen], Any]] = {
    "preset": lambda seen: read_config(seen.run.path).preset,
    "seed": lambda seen: (seen.stage.model.seed - 4) / 1000,
    "data.source": given("open_source", "source"),
    "data.image_size": decoding("image_size"),
    "data.grey": decoding("grey"),
    "data.crop": decoding("crop"),
    "data.memory_budget_mb": lambda seen: seen.one("decode_groups")["keeping"].memory_budget_mb,
    "data.cache_mb": lambda seen: seen.one("decode_groups")["keeping"].cache_mb,
    "data.workers": given("decode_groups", "workers"),
    "data.limit": lambda seen: seen.one("encode_set")["returned"].clean,
    "data.test_limit": lambda seen: len(seen.one("encode_set")["returned"].test),
    "data.max_megapixels": limits("max_megapixels"),
    "data.max_file_mb": limits("max_file_mb"),
    "data.max_files": limits("max_files"),
    **{f"vqvae.{name}": stored("vqvae", name) for name in VQVAE_SIZES},
    "vqvae.levels": lambda seen: load_vqvae(seen.run).levels,
    "vqvae.batch_size": given("JointBatches", "batch_size"),
    "vqvae.training_steps": lambda seen: len(seen.calls["augment"]),
    "vqvae.learning_rate": lambda seen: seen.calls["Adam"][0]["lr"],
    "vqvae.adam_beta1": lambda seen: seen.calls["Adam"][0]["betas"][0],
    "vqvae.adam_beta2": lambda seen: seen.calls["Adam"][0]["betas"][1],
    "vqvae.perceptual_weight": losses("config.perceptual_weight"),  # test_image_losses: as they weigh
    "vqvae.adversarial_weight": losses("config.adversarial_weight"),
    "vqvae.adversarial_start": lambda seen: next(n for n in range(9) if losses("begun")(seen)(n + 1)),
    "vqvae.discriminator_units": lambda seen: losses("discriminator.config")(seen)["hidden_units"],
    "vqvae.discriminator_layers": lambda seen: losses("discriminator.config")(seen)["layers"],
    "vqvae.discriminator_learning_rate": lambda seen: seen.calls["Adam"][1]["lr"],
    "vqvae.augment": lambda seen: len(seen.calls["augment"]) > 0,
    **of_prior("prior", 0),
    **of_prior("bottom", 1),
    **{f"critic.{name}": stored("critic", name) for name in ("hidden_units", "layers", "spectral_norm")},
    "critic.learning_rate": lambda seen: _critic(seen).optimizer.param_groups[0]["lr"],
    "critic.adam_beta1": lambda seen: _critic(seen).optimizer.param_groups[0]["betas"][0],
    "critic.adam_beta2": lambda seen: _critic(seen).optimizer.param_groups[0]["betas"][1],
    **{f"critic.{n}": given("critic_loss", a) for n, a in (("loss", "loss"), ("gradient_penalty", "penalty_weight"))},
    "critic.augment": given("augmented", "kinds"),
    "critic.r1": lambda seen: seen.one("critic_loss")["r1"] / ODD.critic.r1_every,
    "critic.r1_every": lambda seen: next(n for n in range(1, 9) if seen.one("critic_loss", n)["r1"]),
    "critic.batch_size": lambda seen: len(seen.one("critic_loss")["fake"]),
    "critic.warmup_steps": given("train", "n_steps"),
    "critic.n_critic": given("train", "n_steps", 1),
    "critic.fakes": lambda seen: "fresh" if len(seen.calls["_fresh"]) == 1 + ODD.ral.n_updates else "previous",
    "critic.held_out": lambda seen: len(_critic(seen).held_out_codes),
    "critic.replay": lambda seen: _critic(seen).config.replay,
    "ral.algo": lambda seen: next(n for n in SECTIONS if find_algorithm(n).cls is type(seen.stage.model)),
    "ral.options": lambda seen: {"fast_path": seen.stage.model.fast_path},
    "ral.reward": lambda seen: _critic(seen).reward,
    "ral.reward_normalization": lambda seen: _critic(seen).normalization,
    "ral.reward_weights": attribute("reward_callback.weights"),
    "ral.reward_features": lambda seen: {PyramidFeatures: "pyramid"}[type(seen.stage.reward_callback.extractor)],
    "ral.reward_ema": attribute("reward_callback.ema"),
    "ral.reset_mode": attribute("model.env.core.distribution.mode"),
    "ral.n_envs": attribute("model.env.num_envs"),
    "ral.n_updates": attribute("run_callback.updates"),
    "ral.learning_rate": lambda seen: seen.stage.model.policy.optimizer.param_groups[0]["lr"],
    "ral.adam_beta1": lambda seen: seen.stage.model.policy.optimizer.param_groups[0]["betas"][0],
    "ral.adam_beta2": lambda seen: seen.stage.model.policy.optimizer.param_groups[0]["betas"][1],
    "ral.gamma": attribute("model.rollout_buffer.gamma"),
    **{f"ral.{name}": attribute(f"model.{name}") for name in ("mle_coef", "mle_dropout", "kl_coef")},
    "ral.train_levels": attribute("model.policy.train_levels"),
    "ral.image_gamma": attribute("model.rollout_buffer.image_gamma"),
    "ral.per_level_discount": attribute("model.rollout_buffer.per_level_discount"),
    "ral.max_grad_norm": attribute("model.max_grad_norm"),
    "ral.ema_decay": attribute("run_callback.average.decay"),
    "ral.equal_time_control": lambda seen: (
        "mle_equal_time_best_temperature" in load_results(seen.run.file("results.json"))["rows"]
    ),
    "ral.checkpoint_every": attribute("run_callback.checkpoint_every"),
    "evaluation.n_samples": lambda seen: len(seen.one("GeneratorMetrics")["returned"].reference),
    "evaluation.extractor": lambda seen: seen.one("GeneratorMetrics")["returned"].extractor.name,
    "evaluation.temperatures": lambda seen: list(seen.one("_sweep").values())[3],
    "evaluation.held_out": lambda seen: len(seen.one("GeneratorMetrics")["returned"].held_out["test"]),
    "evaluation.sampling_seeds": lambda seen: load_results(seen.run.file("results.json"))["sampling_seeds"],
}
BY_ALGORITHM = {f"ral.{name}.{one.name}" for name, cls in SECTIONS.items() for one in dataclasses.fields(cls)}
BY_ALGORITHM |= {"ral.normalize_advantage"}
DEFAULTS = Config()


def fields_of(section: Any, path: str = "") -> Iterator[str]:
    """The names of all settings, those in sections of sections too."""
    for one in dataclasses.fields(section):
        value = getattr(section, one.name)
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{path}{one.name}.")
        else:
            yield f"{path}{one.name}"


def test_no_setting_is_left_out() -> None:
    every = set(fields_of(Config()))
    unused = {"prior.conditioning_stack_layers"}  # the bottom prior's alone, as its page says
    unused |= {f"critic.{name}" for name in ("dropout", "weight_decay", "max_grad_norm")}  # test_causal_critic.py
    assert every == LOOKS.keys() | BY_ALGORITHM | ELSEWHERE.keys() | unused
    same = [n for n in LOOKS if operator.attrgetter(n)(ODD) == operator.attrgetter(n)(DEFAULTS)]
    assert same == ["data.source"], "an odd value is no default"  # replaced by a folder below


@pytest.mark.parametrize("name", LOOKS)
def test_a_setting_reaches_its_consumer(seen: Seen, name: str) -> None:
    expected = operator.attrgetter(name)(seen.run.config)
    assert expected != operator.attrgetter(name)(DEFAULTS)
    assert LOOKS[name](seen) == expected


def test_the_cache_lies_where_it_is_asked_for(seen: Seen) -> None:
    assert seen.one("decode_groups")["keeping"].cache_dir == seen.run.config.data.cache_dir


def test_the_critic_trains_on_training_images_and_is_measured_on_others(seen: Seen) -> None:
    codes, critic = seen.one("encode_set")["returned"], seen.stage.critic
    others = codes.test if codes.augmented is None else codes.augmented
    assert np.array_equal(critic.real_codes, codes.train) and np.array_equal(critic.all_held_out_codes, others)


# The control --------------------------------------------------------------------------------------------------------


def test_the_controls_have_rals_budget_and_not_stage_twos(seen: Seen) -> None:
    """Updates or time; two levels, each: learning rate, moments, clipping, batch, steps and average are stage 3's."""
    ral = seen.run.config.ral
    updates = controls.equal_time_updates(seen.run)
    budgets = ((3, "constant"), (3, "constant"), (updates, "linear"), (updates, "linear"))
    for number, (steps, rate) in zip((-4, -3, -2, -1), budgets, strict=True):
        optimizer, task, average = (seen.calls[name][number] for name in ("Adam", "Task", "WeightAverage"))
        assert (optimizer["lr"], optimizer["betas"]) == (ral.learning_rate, (ral.adam_beta1, ral.adam_beta2))
        assert (task["batch_size"], task["rate"].steps, task["max_grad_norm"]) == (8, steps, ral.max_grad_norm)
        assert task["rate"].kind == rate
        assert average["decay"] == ral.ema_decay and not average["warm_up"]


def test_the_control_starts_from_the_prior(seen: Seen) -> None:
    """Three small steps later it is near the prior it continues; fresh weights would be far away."""
    prior, control = (load_generator(seen.run, name).state_dict() for name in ("prior", "prior_continued"))
    assert any(not torch.equal(control[name], weight) for name, weight in prior.items())
    for name, weight in prior.items():
        assert (control[name] - weight).abs().max() < 10 * 3 * seen.run.config.ral.learning_rate, name


# Algorithms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", SECTIONS)
def test_an_algorithm_gets_its_own_settings_and_the_shared_ones(tmp_path: Path, algo: str) -> None:
    section = GRPO_SECTION if algo == "grpo" else OTHERS[algo]
    defaults = SECTIONS[algo]()
    make_tiny_run(tmp_path)
    shared = {"gamma": 0.57, "learning_rate": 0.00053, "mle_coef": 0.11, "mle_dropout": True, "kl_coef": 0.13}
    shared |= {"normalize_advantage": False} | ({"max_grad_norm": 0.67} if algo != "trpo" else {})
    ral = replace(SMOKE.ral, algo=algo, n_envs=8, **shared, **{algo: section})
    config = replace(read_config(tmp_path), ral=ral, critic=replace(SMOKE.critic, kind="causal"))  # for all_actions
    (tmp_path / "config.json").write_text(config.to_json())
    (tmp_path / "critic.safetensors").unlink()
    run = Run(tmp_path, config)
    codes = CodeSet.load(run.file("codes.safetensors"), load_vqvae(run).grid)
    stage = train_ral.make_stage(run, load_vqvae(run), load_generator(run, "prior"), codes, CPU, progress=False)
    model: Any = stage.model
    regularizers = {type(regularizer).__name__: regularizer for regularizer in stage.regularizers}
    stage.callbacks.init_callback(model)
    rule = regularizers["EntropyTarget"].rule if "EntropyTarget" in regularizers else None
    steered = {}
    if rule is not None:
        steered = {"ent_coef": rule.coef, "entropy_target": rule.target, "entropy_schedule": rule.schedule}
    for name, value in vars(section).items():
        got = steered[name] if name in steered else getattr(model, name)
        got = got(1.0) if callable(got) else got
        assert value != getattr(defaults, name) or name == "ent_coef" or value is None, f"{name} is at its default"
        assert got == value, name
    regularizers |= {"loss": model}
    got = {
        "gamma": model.rollout_buffer.gamma,
        "learning_rate": model.lr_schedule(1.0),
        "normalize_advantage": getattr(model, "normalize_advantage", False),
        "mle_coef": regularizers["MLEShare"].coef if "MLEShare" in regularizers else model.mle_coef,
        "mle_dropout": regularizers["MLEShare"].dropout if "MLEShare" in regularizers else model.mle_dropout,
        "kl_coef": regularizers["PriorKLReward"].coef if "PriorKLReward" in regularizers else model.kl_coef,
        "max_grad_norm": getattr(model, "max_grad_norm", None),
    }
    assert {name: got[name] for name in shared} == shared


@pytest.mark.parametrize("normalised", [True, False])
def test_grpo_scales_as_the_shared_setting_says_unless_its_own_does(tmp_path: Path, normalised: bool) -> None:
    ral = replace(SMOKE.ral, algo="grpo", normalize_advantage=normalised)
    sections = (GRPOConfig(), GRPOConfig(scale_advantage="batch"))
    shared, own = (find_algorithm("grpo").renamed(replace(ral, grpo=section)) for section in sections)
    assert shared == {"scale_advantage": "batch" if normalised else "none"} and own == {"scale_advantage": "batch"}
