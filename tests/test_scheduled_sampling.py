"""Scheduled sampling: what is mixed, what is predicted, and that leaving it out changes nothing."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from ral_gym.commands.cli import train_main
from ral_gym.config import Config, PriorConfig
from ral_gym.errors import ConfigError
from ral_gym.grid import CodeGrid
from ral_gym.presets import SMOKE
from ral_gym.priors.base import maximum_likelihood_loss
from ral_gym.priors.drawing import draw
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.sampler import CachedSampler
from ral_gym.runs.run import Run
from ral_gym.runs.storage import load_tensors, save_module, write_text
from ral_gym.stages import common, train_prior
from ral_gym.stages.levels import LevelCodes, prior_of
from ral_gym.stages.processes import Compute
from ral_gym.stages.scheduled_sampling import (
    SCHEDULES,
    ScheduledSampling,
    mix_sequential,
    mix_two_pass,
)
from ral_gym.tokenizers.code_set import CodeSet
from ral_gym.tokenizers.vqvae import VQVAE
from ral_gym.tokenizers.vqvae2 import vqvae_class
from tests.tiny import arguments

CPU = torch.device("cpu")
K = 16
GRIDS = {1: CodeGrid(4, 4, K), 2: CodeGrid(4, 4, K, levels=2)}
STEPS = 8


def settings(way: str, share: float = 0.5, levels: int = 1, dropout: float = 0.1) -> Config:
    prior = replace(
        SMOKE.prior,
        training_steps=STEPS,
        evaluate_every=4,
        conditioning_stack_layers=1,
        dropout=dropout,
        scheduled_sampling=way,  # type: ignore[arg-type]
        scheduled_sampling_share=share,
    )
    vqvae = replace(SMOKE.vqvae, levels=levels, layers=SMOKE.vqvae.layers + 1 - levels)
    return replace(SMOKE, vqvae=vqvae, prior=prior, bottom=prior)


def network(level: int = 0) -> tuple[PixelCNN, LevelCodes]:
    """An untrained PixelCNN whose distributions are far from uniform, and codes."""
    torch.manual_seed(1)
    prior = prior_of(settings("none", levels=level + 1), GRIDS[level + 1], level)
    for weights in prior.parameters():
        weights.data *= 2
    codes = torch.randint(K, (6, GRIDS[level + 1].shapes[level][0] ** 2))
    return prior.train(), LevelCodes(codes, torch.randint(K, (6, 16)) if level else None)


def stage_two(path: Path, config: Config, compute: Compute | None = None) -> dict[str, Tensor]:
    """The weights that stage 2 leaves, of all levels, both kinds."""
    grid = GRIDS[config.vqvae.levels]
    codes = np.random.default_rng(0).integers(K, size=(40, grid.n_codes)).astype(np.int16)
    codes = CodeSet(codes[:32], codes[32:], None, clean=32)
    run = Run(path, config)
    train_prior.train_prior(run, codes, grid, CPU, progress=False, compute=compute)
    return {
        f"{file.stem}.{name}": tensor
        for file in sorted(path.glob("prior*.safetensors"))
        for name, tensor in load_tensors(file)[0].items()
    }


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())


# Schedules ----------------------------------------------------------------------------------------------------------


def mixed_loss(prior: PixelCNN, mixed: Tensor, batch: LevelCodes) -> Tensor:
    return maximum_likelihood_loss(prior, batch.codes, batch.condition, given=mixed)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_rises_from_nothing_to_the_share(name: str) -> None:
    config = replace(PriorConfig(), scheduled_sampling="two_pass", scheduled_sampling_schedule=name)
    sampling = ScheduledSampling(network()[0], replace(config, scheduled_sampling_share=0.6), steps=1000)
    shares = [sampling.share(step) for step in range(1, 1001)]
    assert SCHEDULES[name](0.0) == 0 and shares[0] < 0.01 and shares[-1] == pytest.approx(0.6)
    assert all(later > earlier for earlier, later in itertools.pairwise(shares))
    half = {"linear": 0.3, "exponential": 0.6 * 0.9 / 0.99, "inverse_sigmoid": 0.3}[name]
    assert shares[499] == pytest.approx(half)


def test_the_inverse_sigmoid_is_the_papers_curve() -> None:
    """Up to shift and scale: epsilon = k / (k + exp(i / k)) is a logistic function of i of scale k."""
    k = 50.0
    i = np.arange(0, 401)
    paper = 1 - k / (k + np.exp(i / k))
    middle, steps = k * np.log(k), 10 * k  # the step at which half is left, and our N of the same slope
    ours = np.array([SCHEDULES["inverse_sigmoid"](0.5 + (step - middle) / steps) for step in i])
    scaled = (ours - ours[0]) / (ours[-1] - ours[0])
    np.testing.assert_allclose(scaled, (paper - paper[0]) / (paper[-1] - paper[0]), atol=1e-6)


# What is mixed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0, 1])
def test_the_second_pass_reads_own_codes_drawn_given_real_ones(level: int) -> None:
    prior, batch = network(level)
    torch.manual_seed(3)
    mixed = mix_two_pass(prior.train(), batch, share=1.0)  # no dropout, in training mode either
    torch.manual_seed(3)
    uniforms = torch.rand(batch.codes.numel())
    prior.eval()
    with torch.no_grad():
        own, _ = draw(prior(batch.codes, batch.condition).flatten(0, 1), uniforms)
    assert torch.equal(mixed, own.view_as(batch.codes)) and not torch.equal(mixed, batch.codes)
    assert torch.equal(mix_two_pass(prior, batch, share=0.0), batch.codes)


def test_coins_replace_the_share_of_codes() -> None:
    prior, _ = network()
    codes = torch.full((512, 16), 3)
    different = (mix_two_pass(prior, LevelCodes(codes), share=0.3) != codes).double().mean()
    expected = (mix_two_pass(prior, LevelCodes(codes), share=1.0) != codes).double().mean()
    assert float(different / expected) == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_sequential_way_is_that_of_a_full_pass_per_code(level: int, share: float) -> None:
    prior, batch = network(level)
    torch.manual_seed(4)
    mixed = mix_sequential(CachedSampler(prior), batch, share)
    torch.manual_seed(4)
    uniforms, coins = torch.rand(batch.codes.shape), torch.rand(batch.codes.shape) < share
    naive = batch.codes.clone()
    prior.eval()
    for position in range(naive.shape[1]):
        with torch.no_grad():
            own, _ = draw(prior(naive, batch.condition)[:, position], uniforms[:, position])
        naive[:, position] = torch.where(coins[:, position], own, batch.codes[:, position])
    assert torch.equal(mixed, naive)
    # Not what the shortcut gives: a code here depends on own codes before it.
    torch.manual_seed(4)
    assert not torch.equal(mixed, mix_two_pass(prior, batch, share))


@pytest.mark.parametrize("level", [0, 1])
def test_the_loss_of_a_code_does_not_depend_on_what_stands_at_it_or_behind(level: int) -> None:
    prior, batch = network(level)
    prior.eval()
    mixed, at = torch.randint(K, batch.codes.shape), 5
    other = mixed.clone()
    other[:, at:] = (other[:, at:] + 1) % K

    def up_to(prefix: Tensor) -> Tensor:
        """The logits of the codes before the change, and of the one at it."""
        logits = prior(prefix) if batch.condition is None else prior(prefix, batch.condition)
        return logits[:, : at + 1]

    assert torch.equal(up_to(mixed), up_to(other))
    other[:, at - 1] = (mixed[:, at - 1] + 1) % K
    assert not torch.equal(up_to(mixed), up_to(other))
    # And it is the real codes that are predicted, whatever is read.
    expected = torch.nn.functional.cross_entropy(prior(mixed, batch.condition).transpose(1, 2), batch.codes)
    torch.testing.assert_close(mixed_loss(prior, mixed, batch), expected)
    assert torch.equal(mixed_loss(prior, batch.codes, batch), maximum_likelihood_loss(prior, *vars(batch).values()))


def test_mixing_leaves_the_network_as_it_was() -> None:
    prior, batch = network()
    mix_two_pass(prior, batch, 0.5)
    assert prior.training and all(weights.grad is None for weights in prior.parameters())
    loss = ScheduledSampling(prior, settings("two_pass").prior, STEPS).loss(prior, batch, STEPS)
    loss.backward()
    assert all(weights.grad is not None for weights in prior.parameters())


def test_the_sequential_way_follows_the_weights() -> None:
    prior, batch = network()
    sampling = ScheduledSampling(prior, settings("sequential", 1.0).prior, STEPS)
    sampling.loss(prior, batch, STEPS)
    for weights in prior.parameters():
        weights.data *= -1.0
    torch.manual_seed(7)
    prior.eval()
    loss = sampling.loss(prior, batch, STEPS)
    torch.manual_seed(7)
    torch.testing.assert_close(loss, mixed_loss(prior, mix_sequential(CachedSampler(prior), batch, 1.0), batch))


# Stage 2 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["two_pass", "sequential"])
@pytest.mark.parametrize("levels", [1, 2])
def test_a_share_of_zero_is_maximum_likelihood_bit_for_bit(tmp_path: Path, way: str, levels: int) -> None:
    plain = stage_two(tmp_path / "none", settings("none", levels=levels))
    assert same(stage_two(tmp_path / "zero", settings(way, 0.0, levels)), plain)
    assert not same(stage_two(tmp_path / "half", settings(way, 0.5, levels)), plain)


@pytest.mark.parametrize("way", ["two_pass", "sequential"])
def test_an_interrupted_stage_continues_to_bit_identical_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    config = settings(way, 1.0)
    whole = stage_two(tmp_path / "whole", config)
    monkeypatch.setattr(common, "CHECKPOINT_SECONDS", 0.0)
    check = train_prior.check_finite

    def die(loss: Tensor, stage: str, step: int, remedy: str) -> float:
        if step == 6:
            raise KeyboardInterrupt
        return check(loss, stage, step, remedy)

    with monkeypatch.context() as patch:
        patch.setattr(train_prior, "check_finite", die)
        with pytest.raises(KeyboardInterrupt):
            stage_two(tmp_path / "broken", config)
    assert same(stage_two(tmp_path / "broken", config), whole)
    facts = load_tensors(tmp_path / "broken" / "prior.safetensors")[1]
    assert facts["own_codes"] == pytest.approx(facts["step"] / STEPS)


def test_a_batch_in_parts_mixes_every_part(tmp_path: Path) -> None:
    config = settings("two_pass", 1.0, dropout=0.0)
    whole, parts = stage_two(tmp_path / "1", config), stage_two(tmp_path / "2", config, Compute("no", 2))
    plain = stage_two(tmp_path / "3", settings("none", dropout=0.0))

    def distance(a: dict[str, Tensor]) -> float:
        return sum(float((a[name] - tensor).abs().sum()) for name, tensor in whole.items())

    assert 0 < distance(parts) < distance(plain)  # other coins, the same kind of prefixes


@pytest.mark.parametrize("levels", [1, 2])
def test_tensorboard_shows_what_the_prior_draws_and_changes_nothing(tmp_path: Path, levels: int) -> None:
    config = settings("two_pass", levels=levels)
    with_vqvae = tmp_path / "with"
    vqvae = vqvae_class(levels)(32, 1, **arguments(config.vqvae, VQVAE))
    Run(with_vqvae, config)
    save_module(with_vqvae / "vqvae.safetensors", vqvae)
    assert same(stage_two(with_vqvae, config), stage_two(tmp_path / "without", config))
    found = EventAccumulator(str(with_vqvae / "tensorboard"), size_guidance={"images": 0})
    found.Reload()
    assert found.Tags()["images"] == [("prior/samples", "prior_bottom/samples")[levels - 1]]
    assert [event.step for event in found.Images(found.Tags()["images"][0])] == [1, 3, 4, 6, 8]


# The border ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("scheduled_sampling", "twopass", "prior.scheduled_sampling is 'twopass': give none or two_pass or seq"),
        ("scheduled_sampling_schedule", "cosine", "scheduled_sampling_schedule is 'cosine': give linear or exp"),
        ("scheduled_sampling_share", 1.5, "prior.scheduled_sampling_share is 1.5: give at least 0 and at most 1"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stage_two(tmp_path / "run", replace(SMOKE, prior=replace(SMOKE.prior, **{field: value})))  # type: ignore[arg-type]


def test_a_run_from_before_the_option_continues(tmp_path: Path) -> None:
    path = tmp_path / "run"
    config = settings("none")
    Run(path, config).log("vqvae", 10, {"loss": 1.0})
    values = json.loads(config.to_json())
    for section in ("prior", "bottom"):
        values[section] = {k: v for k, v in values[section].items() if not k.startswith("scheduled")}
    write_text(path / "config.json", json.dumps(values))
    assert Run(path, config).config == config


def test_the_command_line_takes_it(tmp_path: Path) -> None:
    command = ["--preset", "smoke", "--stages", "vqvae", "prior", "--quiet", "--device", "cpu", "--runs", str(tmp_path)]
    command += ["--vqvae.training-steps", "5", "--data.workers", "1", "--prior.scheduled-sampling", "two_pass"]
    assert train_main([*command, "--prior.scheduled-sampling-share", "0.8"]) == 0
    run = tmp_path / "smoke"
    assert json.loads((run / "config.json").read_text())["prior"]["scheduled_sampling"] == "two_pass"
    shares = [
        record["own_codes"]
        for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if "own_codes" in record
    ]
    assert shares == pytest.approx([0.4, 0.8])
