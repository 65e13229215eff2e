"""Stage 3 as a whole: a killed run that continues ends in the same weights as one that was left alone."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ral_gym.agents.train_ral import train_ral
from ral_gym.config import Config
from ral_gym.data.images import load_images
from ral_gym.grid import CodeGrid
from ral_gym.presets import SMOKE, get_preset
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.runs.run import Run
from ral_gym.runs.storage import load_module, save_module
from ral_gym.stages.controls import continue_prior
from ral_gym.stages.levels import prior_of
from ral_gym.stages.train_prior import train_prior
from ral_gym.stages.train_vqvae import build_vqvae, train_vqvae
from ral_gym.tokenizers.code_set import CodeSet, encode_set
from ral_gym.tokenizers.vqvae import VQVAE
from tests.kills import Killed, killed_after

CPU = torch.device("cpu")


def start(path: Path, config: Config) -> tuple[Run, VQVAE, PixelCNN, CodeSet]:
    """A run with untrained stages 1 and 2."""
    run = Run(path, config)
    images = load_images(config.data, progress=False)
    torch.manual_seed(0)
    vqvae = build_vqvae(run, images)
    vqvae.train()(torch.rand(64, 1, 32, 32) * 2 - 1)
    save_module(run.file("vqvae.safetensors"), vqvae)
    vqvae = load_module(run.file("vqvae.safetensors"), VQVAE)
    codes = encode_set(vqvae, images, passes=1, seed=0, progress=False)
    codes.save(run.file("codes.safetensors"))
    torch.manual_seed(1)
    prior = prior_of(run.config, CodeGrid(vqvae.height, vqvae.width, vqvae.codebook_size)).eval()
    return run, vqvae, prior, codes


@pytest.mark.parametrize(
    ("algo", "reset_mode", "fakes"),
    [
        ("reinforce", "full", "previous"),
        ("reinforce", "mixed", "fresh"),
        ("ppo", "full", "previous"),
        ("ppo", "mixed", "previous"),
    ],
)
def test_a_killed_run_continues_to_bit_identical_weights(tmp_path, monkeypatch, algo, reset_mode, fakes) -> None:
    ral = replace(SMOKE.ral, algo=algo, reset_mode=reset_mode, n_updates=5, checkpoint_every=2)
    config = replace(SMOKE, ral=ral, critic=replace(SMOKE.critic, fakes=fakes))
    whole = start(tmp_path / "whole", config)
    expected = train_ral(*whole, CPU, progress=False)

    broken = start(tmp_path / "broken", config)
    with killed_after(3):
        train_ral(*broken, CPU, progress=False)
    assert not broken[0].has("policy.safetensors")
    continued = train_ral(*broken, CPU, progress=False)
    for one, other in zip(expected, continued, strict=True):
        for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
    critics = [run.file("critic.safetensors").read_bytes() for run in (whole[0], broken[0])]
    assert critics[0] == critics[1]
    records = [[r["step"] for r in run.metrics("ral")] for run in (whole[0], broken[0])]
    assert records[0] == records[1]


def test_training_moves_the_policy_and_the_average_lags_behind(tmp_path) -> None:
    run, vqvae, prior, codes = start(tmp_path / "run", SMOKE)
    live, average = train_ral(run, vqvae, prior, codes, CPU, progress=False)

    def distance(a: PixelCNN, b: PixelCNN) -> float:
        pairs = zip(a.parameters(), b.parameters(), strict=True)
        return sum((x - y).square().sum().item() for x, y in pairs)

    assert 0 < distance(average, prior) < distance(live, prior)
    again = train_ral(run, vqvae, prior, codes, CPU, progress=False)
    assert distance(again[0], live) == 0


def test_earlier_stages_continue_to_bit_identical_weights(tmp_path, monkeypatch) -> None:
    import ral_gym.stages.common as common
    from ral_gym.stages import train_prior as prior_stage
    from ral_gym.stages import train_vqvae as vqvae_stage

    monkeypatch.setattr(common, "CHECKPOINT_SECONDS", 0.0)
    config = replace(SMOKE, vqvae=replace(SMOKE.vqvae, training_steps=6), prior=replace(SMOKE.prior, training_steps=8))
    images = load_images(config.data, progress=False)
    results = {}
    for name in ("whole", "broken"):
        run = Run(tmp_path / name, config)
        for stage in (vqvae_stage, prior_stage):
            if name == "broken":
                check, calls = stage.check_finite, []

                def die(loss, where, step, remedy, check=check, calls=calls):
                    calls.append(step)
                    if step == 5 and len(calls) == 5:
                        raise Killed
                    return check(loss, where, step, remedy)

                monkeypatch.setattr(stage, "check_finite", die)
            for _ in range(2 if name == "broken" else 1):
                try:
                    if stage is vqvae_stage:
                        vqvae = train_vqvae(run, images, CPU, progress=False)
                    else:
                        codes = encode_set(vqvae, images, passes=1, seed=0, progress=False)
                        train_prior(run, codes, CodeGrid(4, 4, vqvae.codebook_size), CPU, progress=False)
                except Killed:
                    assert name == "broken"
        results[name] = [run.file(f"{file}.safetensors").read_bytes() for file in ("vqvae", "prior", "prior_ema")]
    assert results["whole"] == results["broken"]


def test_mle_continued_starts_from_the_prior_and_takes_rals_steps(tmp_path) -> None:
    """Adam's steps are about as large as the learning rate, so that a few of them stay near the start."""
    rate = 1e-4
    config = replace(SMOKE, ral=replace(SMOKE.ral, learning_rate=rate, ema_decay=0.0, n_updates=3))
    run, _, prior, codes = start(tmp_path / "run", config)
    continued = continue_prior(run, prior, codes, CPU, progress=False)
    moved = max((a - b).abs().max().item() for a, b in zip(continued.parameters(), prior.parameters(), strict=True))
    assert rate < moved < 10 * rate
    assert set(json.loads(run.file("seconds.json").read_text())) == {"prior_continued"}


def test_the_papers_preset_runs_at_a_reduced_batch(tmp_path) -> None:
    """All three stages of `celeba64` with the paper's constants, a few steps each."""
    preset = get_preset("celeba64")
    config = replace(
        preset,
        data=replace(preset.data, limit=24),
        vqvae=replace(preset.vqvae, batch_size=4, training_steps=2, threshold_ema_dead_code=0, codebook_size=16),
        prior=replace(preset.prior, batch_size=4, training_steps=2),
        critic=replace(preset.critic, batch_size=2, warmup_steps=2, n_critic=1),
        ral=replace(preset.ral, n_envs=2, n_updates=2),
    )
    run = Run(tmp_path / "run", config)
    images = load_images(config.data, progress=False)
    vqvae = train_vqvae(run, images, CPU, progress=False)
    codes = encode_set(vqvae, images, passes=1, seed=0, progress=False)
    codes.save(run.file("codes.safetensors"))
    prior = train_prior(run, codes, CodeGrid(8, 8, 16), CPU, progress=False)
    live, _ = train_ral(run, vqvae, prior, codes, CPU, progress=False)
    assert (live.hidden_units, live.layers) == (128, 5)
