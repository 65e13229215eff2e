"""What stage 1 adds to a tokenizer's loss: the terms, the discriminator, every kind of tokenizer, resume, refusals."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ral_gym.commands.cli import main
from ral_gym.config import VQVAEConfig
from ral_gym.data.images import ImageSet
from ral_gym.errors import DivergedError, RunError
from ral_gym.presets import SMOKE
from ral_gym.registry import TOKENIZERS
from ral_gym.runs.run import Run
from ral_gym.runs.storage import load_tensors
from ral_gym.stages.image_losses import ImageLosses, TrainingStep
from ral_gym.stages.perceptual import make_perceptual
from ral_gym.stages.processes import JointBatches, make_accelerator
from ral_gym.stages.train_vqvae import train_vqvae
from ral_gym.tokenizers.base import load_tokenizer

CPU = torch.device("cpu")
BOTH = replace(SMOKE.vqvae, perceptual_weight=0.3, adversarial_weight=0.2, discriminator_units=8)
FIGURES = {"perceptual", "adversarial", "discriminator_loss", "discriminator_real", "discriminator_fake"}
FLAGS = ["--vqvae.perceptual-weight", "0.3", "--vqvae.adversarial-weight", "0.2", "--vqvae.discriminator-units", "8"]


def pictures(n: int, channels: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(n, channels, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def made(config: VQVAEConfig, channels: int = 1) -> ImageLosses:
    tokenizer = SimpleNamespace(image_size=32, channels=channels)
    return ImageLosses(config, tokenizer, make_accelerator(CPU))


def batches(parts: int = 1) -> JointBatches:
    return JointBatches(make_accelerator(CPU), 10, 4, parts, "vqvae.batch_size")


def image_set() -> ImageSet:
    images = (pictures(32).mul(127.5).add(127.5)).byte().numpy()
    return ImageSet(images, images[:4], None, "noise", ())


# -------------------------------------------------------------------------------------------------------- the terms


@pytest.mark.parametrize("channels", [1, 3])
def test_the_terms_and_their_gradients(channels: int) -> None:
    losses, images = made(BOTH, channels), pictures(4, channels)
    painted = pictures(4, channels, seed=1).requires_grad_()
    total, logged = losses(painted, images, 1)
    assert losses.discriminator is not None
    distance = make_perceptual("lite0")(painted, images)
    scores = losses.discriminator(painted)
    torch.testing.assert_close(logged["perceptual"], distance.detach())
    torch.testing.assert_close(logged["adversarial"], -scores.detach().mean())
    torch.testing.assert_close(total, 0.3 * distance - 0.2 * scores.mean())
    (expected,) = torch.autograd.grad(0.3 * distance - 0.2 * scores.mean(), painted)
    total.backward()
    torch.testing.assert_close(painted.grad, expected)
    # The discriminator learns from its own loss alone.
    assert all(weight.grad is None and weight.requires_grad for weight in losses.discriminator.parameters())


def test_the_discriminator_minimises_the_hinge_loss() -> None:
    losses, images = made(replace(BOTH, discriminator_learning_rate=0.01, adam_beta1=0.5)), pictures(4)
    painted = pictures(4, seed=1).requires_grad_()
    judge = losses.discriminator
    assert judge is not None and losses.optimizer.param_groups[0]["betas"] == (0.5, 0.999)
    assert losses.optimizer.param_groups[0]["lr"] == 0.01
    with torch.no_grad():  # scores on both sides of the margin
        judge.head.weight.mul_(40)
    real, fake = judge(images), judge(painted.detach())
    assert 0.05 < float((real < 1).float().mean()) < 0.95
    expected = (torch.clamp(1 - real, min=0).mean() + torch.clamp(1 + fake, min=0).mean()) / 2
    gradients = torch.autograd.grad(expected, list(judge.parameters()))
    logged = losses.learn(images, painted, 1, batches(), 0)
    for weight, gradient in zip(judge.parameters(), gradients, strict=True):
        torch.testing.assert_close(weight.grad, gradient)
    figures = {"loss": expected, "real": real.mean(), "fake": fake.mean()}
    for name, value in figures.items():
        torch.testing.assert_close(logged[f"discriminator_{name}"], value.detach())
    assert painted.grad is None
    before = [weight.detach().clone() for weight in judge.parameters()]
    losses.update(1)
    moved = [(weight.detach() - old).abs().max() for weight, old in zip(judge.parameters(), before, strict=True)]
    assert all(0 < float(step) <= 0.011 for step in moved)  # Adam's first step
    assert all(weight.grad is None for weight in judge.parameters())


def test_the_discriminator_learns_to_tell_noise_from_bars() -> None:
    torch.manual_seed(0)
    losses = made(replace(BOTH, discriminator_learning_rate=3e-3))
    bars = torch.ones(16, 1, 32, 32)
    bars[:, :, :, ::4] = -1
    for step in range(1, 31):
        logged = losses.learn(bars, pictures(16, seed=step), step, batches(), 0)
        losses.update(step)
    assert logged["discriminator_real"] > 0.5 and logged["discriminator_fake"] < -0.5


def test_the_adversarial_part_begins_late() -> None:
    losses = made(replace(BOTH, perceptual_weight=0.0, adversarial_start=5))
    painted, images = pictures(4, seed=1).requires_grad_(), pictures(4)
    total, logged = losses(painted, images, 5)
    assert float(total) == 0 and not logged and not losses.learn(images, painted, 5, batches(), 0)
    weights = [weight.detach().clone() for weight in losses.discriminator.parameters()]  # type: ignore[union-attr]
    losses.update(5)
    pairs = zip(losses.discriminator.parameters(), weights, strict=True)  # type: ignore[union-attr]
    assert all(torch.equal(*pair) for pair in pairs)
    assert losses(painted, images, 6)[1].keys() == {"adversarial"}
    assert losses.learn(images, painted, 6, batches(), 0)


def test_without_weights_nothing_is_drawn_or_computed() -> None:
    state = torch.get_rng_state()
    losses = made(SMOKE.vqvae)
    assert torch.equal(torch.get_rng_state(), state) and losses.state_dict(3) == {}
    total, logged = losses(None, pictures(2), 1)
    assert float(total) == 0 and not logged and not losses.learn(pictures(2), None, 1, batches(), 0)


def test_a_broken_discriminator_stops_training_before_it_is_saved() -> None:
    losses = made(BOTH)
    losses.discriminator.head.bias.data.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(DivergedError, match=r"lower vqvae\.discriminator_learning_rate"):
        losses.learn(pictures(2), pictures(2, seed=1), 1, batches(), 0)
    with pytest.raises(DivergedError, match=r"weights are NaN .* lower vqvae\.discriminator_learning_rate"):
        losses.state_dict(1)


# ------------------------------------------------------------------------------------------------ every kind, resume

OWN = '''
from torch import nn
from ral_gym.tokenizers.vqvae import VQVAE

class Whole(VQVAE):
    """Hands over its reconstruction, as the package's own do."""

class Bare(VQVAE):
    """Hands over no reconstruction."""
    def training_loss(self, images):
        loss, logged = super().training_loss(images)
        return loss, {"reconstruction_error": logged["reconstruction_error"]}

class Mute(Bare):
    """Hands over nothing but a loss."""
    def training_loss(self, images):
        return super().training_loss(images)[0]
'''
KINDS = {
    "vqvae": [],
    "vqvae2": ["--vqvae.levels", "2", "--vqvae.layers", "2"],
    "vqgan": [
        *("--vqvae.kind", "vqgan", "--vqvae.hidden-units", "8", "--vqvae.codebook-dim", "4"),
        *("--vqvae.options", "multipliers", "1,1,2,2", "norm_groups", "4", "z_channels", "8"),
    ],
    "own": ["--vqvae.kind", "own_losses:Whole"],
}


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    (tmp_path / "own_losses.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("ral_gym.registry._allowed", set())
    monkeypatch.setattr(TOKENIZERS, "_parts", dict(TOKENIZERS._parts))
    monkeypatch.delitem(sys.modules, "own_losses", raising=False)
    return tmp_path


def stage_1(path: Path, *flags: str) -> int:
    return main(
        ["train", "--preset", "smoke", "--quiet", "--stages", "vqvae", "--runs", str(path), "--name", "r", *flags]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_trained_with_both(own: Path, kind: str) -> None:
    assert stage_1(own, *FLAGS, *KINDS[kind], "--vqvae.adversarial-start", "10") == 0
    first, second = (json.loads(line) for line in (own / "r" / "metrics.jsonl").read_text().splitlines())
    assert first.keys() & FIGURES == {"perceptual"} and second.keys() >= FIGURES | {"loss", "code_usage"}
    assert "reconstruction" not in second
    assert load_tokenizer(own / "r" / "vqvae.safetensors").grid.n_codes


def test_the_terms_reach_the_tokenizers_weights() -> None:
    """The gradients of a step are those of the tokenizer's own loss and of the terms on its reconstruction."""
    torch.manual_seed(0)
    from ral_gym.tokenizers.vqgan import VQGAN

    sizes: dict[str, Any] = {"multipliers": "1,2", "norm_groups": 4, "z_channels": 8, "hidden_units": 8}
    model = VQGAN(32, 1, codebook_size=20, codebook_dim=4, residual_blocks=1, **sizes)
    losses, images = made(BOTH), pictures(3)
    own_loss, logged = model.training_loss(images)
    more, _ = losses(logged["reconstruction"], images, 1)
    expected = torch.autograd.grad(own_loss + more, list(model.parameters()))
    loss, figures, painted = TrainingStep(model, losses)(images, 1)
    loss.backward()
    for (name, weight), gradient in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient, msg=name)
    assert painted is not None and not painted.requires_grad and torch.equal(painted, logged["reconstruction"])
    assert not any(value.requires_grad for value in figures.values())


class Killed(Exception):
    pass


def train_killed(run: Run, patch: pytest.MonkeyPatch) -> None:
    """Stage 1, killed at step 10, before that step's checkpoint."""

    def die(run: Run, stage: str, step: int, figures: dict[str, float]) -> None:
        raise Killed

    with patch.context() as inner:
        inner.setattr(Run, "log", die)
        with pytest.raises(Killed):
            train_vqvae(run, image_set(), CPU, progress=False)


@pytest.mark.parametrize("start", [0, 12])
def test_a_stopped_stage_1_continues_to_the_same_weights(
    start: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ral_gym.stages.common.CHECKPOINT_SECONDS", 0.0)
    config = replace(SMOKE, vqvae=replace(BOTH, adversarial_start=start, augment=True))
    whole, broken = Run(tmp_path / "whole", config), Run(tmp_path / "broken", config)
    train_vqvae(whole, image_set(), CPU, progress=False)
    train_killed(broken, monkeypatch)
    train_vqvae(broken, image_set(), CPU, progress=False)
    expected, found = (load_tensors(run.file("vqvae.safetensors"))[0] for run in (whole, broken))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    states = [run.load_checkpoint("vqvae") for run in (whole, broken)]
    for name, weight in states[0]["discriminator"].items():  # type: ignore[index]
        assert torch.equal(weight, states[1]["discriminator"][name])  # type: ignore[index]
    assert whole.metrics("vqvae") == broken.metrics("vqvae")


@pytest.mark.parametrize("spoilt", ["discriminator", "discriminator_optimizer", "perceptual_files"])
def test_a_checkpoint_of_other_losses_is_refused(spoilt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ral_gym.stages.common.CHECKPOINT_SECONDS", 0.0)
    run = Run(tmp_path / "r", replace(SMOKE, vqvae=BOTH))
    train_killed(run, monkeypatch)
    state = run.load_checkpoint("vqvae")
    assert state is not None
    others = {"discriminator": {"x": torch.zeros(1)}, "discriminator_optimizer": {}, "perceptual_files": {"0": {}}}
    run.save_checkpoint("vqvae", state | {spoilt: others[spoilt]})
    with pytest.raises(RunError, match="is not a checkpoint from which stage vqvae can continue"):
        train_vqvae(run, image_set(), CPU, progress=False)


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            [*FLAGS, "--vqvae.kind", "own_losses:Bare"],
            "perceptual_weight is 0.3, but the training_loss of Bare hands over",
        ),
        (["--vqvae.adversarial-weight", "1", "--vqvae.kind", "own_losses:Mute"], "vqvae.adversarial_weight is 1.0"),
        (
            [*FLAGS, "--vqvae.adversarial-start", "20"],
            "adversarial_start is 20: the adversarial loss would never begin",
        ),
        ([*FLAGS, "--vqvae.discriminator-layers", "6"], "vqvae.discriminator_layers is 6: data.image_size 32 must be"),
        ([*FLAGS, "--vqvae.perceptual-network", "vgg"], "vqvae.perceptual_network is 'vgg': give lite0, lpips:VGG16"),
        ([*FLAGS, "--vqvae.perceptual-network", "lpips:a,b,c"], "vqvae.perceptual_network is 'lpips:a,b,c'"),
        ([*FLAGS, "--vqvae.perceptual-network", "lpips:"], "vqvae.perceptual_network is 'lpips:'"),
        (["--vqvae.perceptual-weight", "-1"], "vqvae.perceptual_weight is -1.0: give 0 or more"),
        (["--vqvae.adversarial-weight", "nan"], "vqvae.adversarial_weight is nan: give 0 or more"),
        ([*FLAGS, "--data.image-size", "8", "--vqvae.layers", "1"], "its networks need images of 16 pixels or more"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    own: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert stage_1(own, *flags) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert not (own / "r" / "vqvae.safetensors").exists()


def test_a_tokenizer_without_a_loss_takes_no_weights(capsys: pytest.CaptureFixture[str], own: Path) -> None:
    ready = "class Ready(nn.Module):\n    def __init__(self, image_size, channels): pass\n"
    (own / "own_losses.py").write_text(f"from torch import nn\n{ready}")
    assert stage_1(own, "--vqvae.kind", "own_losses:Ready", "--vqvae.perceptual-weight", "1") == 2
    assert (
        "vqvae.perceptual_weight is 1.0, but own_losses:Ready has no training loop with it" in capsys.readouterr().err
    )
