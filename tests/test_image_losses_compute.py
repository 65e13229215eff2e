"""The losses of stage 1 on several processes, in parts and in bf16; what they and a large codebook take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ral_gym.commands.cli import train_main
from ral_gym.commands.dry_run import StageCost, dry_run
from ral_gym.config import Config
from ral_gym.data.images import load_images
from ral_gym.presets import SMOKE
from ral_gym.runs.run import Run
from ral_gym.runs.storage import load_tensors
from ral_gym.stages.image_losses import ImageLosses, TrainingStep, make_discriminator
from ral_gym.stages.perceptual import make_perceptual
from ral_gym.stages.processes import Compute, JointBatches, make_accelerator
from ral_gym.stages.train_vqvae import train_vqvae
from ral_gym.tokenizers.base import tokenizer_of
from ral_gym.tokenizers.quantiser import PIECE
from ral_gym.tokenizers.vqgan import VQGAN

CPU = torch.device("cpu")
OPTIONS = ["multipliers", "1,1,2,2", "norm_groups", "4", "z_channels", "8", "codebook_l2_norm", "True"]
# No k-means, no restarts, no augmentation: what is drawn is the batches. Adam's first steps turn rounding into steps of
# the learning rate's size, so that a large one would tell nothing.
FLAGS = [
    *("--preset", "smoke", "--stages", "vqvae", "--quiet", "--device", "cpu", "--data.workers", "1"),
    *("--vqvae.kind", "vqgan", "--vqvae.hidden-units", "8", "--vqvae.codebook-dim", "4", "--vqvae.options", *OPTIONS),
    *("--vqvae.learning-rate", "1e-4", "--vqvae.perceptual-weight", "0.3", "--vqvae.adversarial-weight", "0.2"),
    *("--vqvae.adversarial-start", "4", "--vqvae.discriminator-units", "8", "--name", "r"),
    *("--vqvae.discriminator-learning-rate", "1e-3"),
]
NETWORK = {name: value for name, value in zip(OPTIONS[::2], ("1,1,2,2", 4, 8, True), strict=True)}
VQVAE = replace(SMOKE.vqvae, kind="vqgan", options=NETWORK, hidden_units=8, codebook_dim=4, learning_rate=1e-4)
VQVAE = replace(VQVAE, perceptual_weight=0.3, adversarial_weight=0.2, adversarial_start=4, discriminator_units=8)
VQVAE = replace(VQVAE, discriminator_learning_rate=1e-3)
FIGURES = ("loss", "reconstruction_error", "perceptual", "adversarial", "discriminator_loss", "discriminator_real")


def trained(path: Path, compute: Compute) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Stage 1: its weights, and what it logged."""
    run = Run(path, replace(SMOKE, vqvae=VQVAE))
    train_vqvae(run, load_images(SMOKE.data, progress=False), CPU, progress=False, compute=compute)
    return load_tensors(run.file("vqvae.safetensors"))[0], run.metrics("vqvae")


def assert_alike(
    found: tuple[dict[str, Tensor], list[dict[str, Any]]], expected: tuple[dict[str, Tensor], list[dict[str, Any]]]
) -> None:
    torch.manual_seed(SMOKE.seed * 1000 + 1)
    start = tokenizer_of(replace(SMOKE, vqvae=VQVAE), 32, 1).state_dict()
    apart, moved = (
        sum(float((expected[0][name] - other[name]).square().sum()) for name in start) for other in (found[0], start)
    )
    assert moved > 0 and apart < 0.05 * moved  # squares; a feature at the border of two codes may change sides
    assert [line["step"] for line in found[1]] == [10, 20]
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert {name: ours[name] for name in FIGURES} == pytest.approx(
            {name: theirs[name] for name in FIGURES}, rel=0.03, abs=1e-3
        )


def test_the_discriminators_gradients_of_parts_add_up_to_the_batchs() -> None:
    accelerator = make_accelerator(CPU)
    tokenizer = VQGAN(32, 1, multipliers="1", hidden_units=4, residual_blocks=1, z_channels=4, norm_groups=2)
    real, fake = (torch.rand(8, 1, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    gradients = []
    for parts in (1, 4):
        torch.manual_seed(0)
        losses = ImageLosses(VQVAE, tokenizer, accelerator)
        batches = JointBatches(accelerator, 8, 8, parts, "vqvae.batch_size")
        for number, pair in enumerate(zip(real.chunk(parts), fake.chunk(parts), strict=True)):
            losses.learn(*pair, 5, batches, number)
        gradients.append([weight.grad for weight in losses.discriminator.parameters()])  # type: ignore[union-attr]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_batch_in_parts_is_the_same_step(tmp_path: Path) -> None:
    assert_alike(trained(tmp_path / "parts", Compute(gradient_accumulation=4)), trained(tmp_path / "whole", Compute()))


def test_half_precision_leaves_weights_in_32_bits(tmp_path: Path) -> None:
    whole, half = trained(tmp_path / "whole", Compute()), trained(tmp_path / "half", Compute("bf16"))
    assert {weight.dtype for weight in half[0].values()} == {torch.float32}
    assert half[1] != whole[1]
    for ours, theirs in zip(half[1], whole[1], strict=True):
        assert ours["perceptual"] == pytest.approx(theirs["perceptual"], rel=0.1)
        assert ours["adversarial"] == pytest.approx(theirs["adversarial"], abs=0.1)


@pytest.mark.processes
def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    assert train_main([*FLAGS, "--runs", str(tmp_path / "one")]) == 0
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "ral_gym", "train", *FLAGS, "--runs", str(tmp_path / "two")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "MASTER_PORT": ""})
    assert result.returncode == 0, result.stderr
    found = []
    for name in ("two", "one"):
        folder = tmp_path / name / "r"
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found.append((load_tensors(folder / "vqvae.safetensors")[0], lines))
    assert_alike(*found)


# --------------------------------------------------------------------------------------------------------- the costs


def cost(config: Config) -> StageCost:
    return dry_run(config).stages[0]


@pytest.mark.parametrize("kind", ["vqvae", "vqgan"])
def test_the_dry_run_counts_both_networks(kind: str) -> None:
    plain = replace(VQVAE if kind == "vqgan" else SMOKE.vqvae, perceptual_weight=0.0, adversarial_weight=0.0)
    config = replace(SMOKE, vqvae=plain)
    both = replace(plain, perceptual_weight=0.3, adversarial_weight=0.2, discriminator_units=8)
    vqvae, painted = tokenizer_of(config, 32, 1), torch.zeros(16, 1, 32, 32, requires_grad=True)
    network, judge = make_perceptual("lite0"), make_discriminator(both, vqvae)
    with FlopCounterMode(display=False) as counter:
        network(painted, torch.zeros(16, 1, 32, 32)).backward()
        judge.requires_grad_(False)(painted).sum().backward()
        judge.requires_grad_(True)(torch.zeros(32, 1, 32, 32)).sum().backward()
    with_losses, without = cost(replace(config, vqvae=both)), cost(config)
    assert with_losses.flops_per_step - without.flops_per_step == counter.get_total_flops()
    weights = sum(weight.numel() * 4 for weight in network.parameters())
    trained = sum(weight.numel() * 16 for weight in judge.parameters())
    assert with_losses.memory - without.memory > weights + trained
    assert {"perceptual", "discriminator"} <= with_losses.parts.keys() and "perceptual" not in without.parts


def peak(step: Any) -> int:
    """The most bytes that torch's allocator had given out at once during a call, of what the call asked for."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def test_16384_codes_of_unit_length_are_looked_up_in_bounded_memory() -> None:
    """A training step's distances would take 4 x 65,536 x 16,384 bytes at once, 4 GiB; in pieces it is a fraction."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_units": 4, "multipliers": "1", "residual_blocks": 1, "z_channels": 4}
    model = VQGAN(16, 1, codebook_size=16_384, codebook_l2_norm=True, norm_groups=2, **sizes)
    features = torch.nn.functional.normalize(torch.randn(256, 8, 16, 16), dim=1).requires_grad_()
    model.encode_features = lambda images: features  # type: ignore[method-assign]
    model.paint = lambda vectors: vectors[:, :1]  # type: ignore[method-assign]
    used = peak(lambda: model.training_loss(torch.zeros(256, 1, 16, 16))[0].backward())
    assert 10 * used < 4 * 65_536 * 16_384
    assert used < 3 * 4 * PIECE
    assert model.quantize.embedding.weight.grad is not None


def test_the_training_step_hands_the_tokenizers_figures_on() -> None:
    class Mute(torch.nn.Module):
        def training_loss(self, images: Tensor) -> Tensor:
            return images.sum()

    step = TrainingStep(Mute(), lambda painted, images, number: (images.new_ones(()), {"more": images.new_ones(())}))  # type: ignore[arg-type]
    loss, figures, painted = step(torch.ones(2, 1, 2, 2), 1)
    assert float(loss) == 9 and figures.keys() == {"more"} and painted is None
