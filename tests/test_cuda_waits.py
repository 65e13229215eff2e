"""How often the host waits for a CUDA device, counted on a pretended one (`tests/pretend_device.py`).

A wait is a result that the host looks at (`syncs`), or a copy to the device that is not `non_blocking` (`blocking`).
While a graph is recorded the pretended device refuses both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback

from ral_gym.agents import ALGORITHMS, algorithm_defaults, make_sb3_env, policy_for
from ral_gym.commands.cli import main
from ral_gym.data.images import augment, float_batch, to_float
from ral_gym.envs.from_run import _load_once
from ral_gym.presets import SMOKE
from ral_gym.priors.guidance import PLAIN, Sampling
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.sampler import make_sampler
from ral_gym.priors.transformer import Transformer
from ral_gym.priors.two_level import TwoLevelPrior
from tests.pretend_device import Device, pretend_cuda
from tests.tiny import make_tiny_run

E, T = 6, 16
WAITS = ("syncs", "blocking")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_run(tmp_path_factory.mktemp("runs") / "tiny"))


@pytest.fixture
def device(run: str) -> Iterator[Device]:
    """`run` comes first, so that its files are made on the CPU."""
    with pretend_cuda() as device:
        yield device
    _load_once.cache_clear()  # environments keep networks, which may not outlive the pretended device


# Agents -----------------------------------------------------------------------------------------------------------


def make(run: str, algo: str, **env: Any) -> Any:
    arguments = {"reset_mode": "full", "lockstep": True, "paired": False, "seed": 0} | env
    venv = make_sb3_env("ral_gym/LatentCode-v0", E, run=run, device="cuda", **arguments)
    given = algorithm_defaults(algo, venv) | {"device": "cuda", "seed": 0, "policy_kwargs": {"prior": run}}
    return ALGORITHMS[algo](policy_for(algo), venv, **given)


class Counts(BaseCallback):
    """The device's counts after every step."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device, self.seen = device, [Counter(device.counts)]

    def _on_step(self) -> bool:
        self.seen.append(Counter(self.device.counts))
        return True


def collect(model: Any, device: Device) -> list[Counter[str]]:
    """What each step of a rollout adds to the counts, after rollouts that have recorded the graphs."""
    for _ in range(4):
        _, callback = model._setup_learn(1, counts := Counts(device))
        counts.seen = [Counter(device.counts)]
        model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    seen = [*counts.seen, Counter(device.counts)]
    return [after - before for before, after in pairwise(seen)]


@pytest.mark.parametrize("algo", ["reinforce", "grpo"])
def test_a_round_of_the_fast_path_waits_three_times(run: str, device: Device, algo: str) -> None:
    added = sum(collect(make(run, algo), device), Counter())
    assert added["replays"] >= T and not added["captures"]
    assert added["syncs"] + added["blocking"] <= 3
    assert added["d2h"] == 3  # codes with log-probabilities, the decoder's check of codes, scores


@pytest.mark.parametrize("algo", ["ppo", "a2c", "maskable_ppo"])
def test_a_code_drawn_in_the_loop_of_sb3_waits_twice(run: str, device: Device, algo: str) -> None:
    """One is SB3's, which reads the actions; it also copies every observation to the device."""
    steps = collect(make(run, algo), device)
    assert sum(steps, Counter())["replays"] >= T
    inside = [step for number, step in enumerate(steps[:-1]) if (number + 1) % T]
    assert len(inside) >= T - 1
    assert max(step["syncs"] for step in inside) <= 2
    assert max(step["blocking"] for step in inside) <= 1


# Samplers ---------------------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {"hidden_units": 8, "residual_units": 4, "layers": 2, "conv_filter_size": 3}
SIZES |= {"output_stack_layers": 1}
ATTENTION = {"attention_layers": 1, "attention_heads": 2}


def pixelcnn(**more: Any) -> PixelCNN:
    return PixelCNN(11, 4, 4, **SIZES, **more)


def two_level() -> TwoLevelPrior:
    return TwoLevelPrior(pixelcnn(), PixelCNN(11, 8, 8, condition=(4, 4, 11), conditioning_stack_layers=1, **SIZES))


def transformer() -> Transformer:
    return Transformer(11, 4, 4, hidden_units=8, layers=2, attention_heads=2, multiple_of=8, classes=3)


PRIORS = {
    "pixelcnn": (pixelcnn, PLAIN),
    "attention": (lambda: pixelcnn(**ATTENTION), PLAIN),
    "two levels": (two_level, PLAIN),
    "transformer": (transformer, PLAIN),
    "guidance": (transformer, Sampling(guidance=2.0, cutoff=10)),
}


@pytest.fixture(params=list(PRIORS))
def sampler(request: pytest.FixtureRequest, device: Device) -> Any:
    make_prior, sampling = PRIORS[request.param]
    torch.manual_seed(0)
    return make_sampler(make_prior().eval().to("cuda"), sampling)


def sequences(sampler: Any, given: list[int]) -> torch.Tensor:
    """Rows (B, L) of images that are begun at different positions."""
    grid = sampler.prior.grid
    codes = torch.full((len(given), grid.length), grid.not_drawn)
    for row, number in enumerate(given):
        codes[row, :number] = torch.arange(number) % 11
    if grid.classes:
        codes[:, -1] = grid.first_label + torch.arange(len(given)) % grid.classes
    return codes.to("cuda")


def test_rows_at_different_positions_make_nobody_wait(sampler: Any, device: Device) -> None:
    codes = sequences(sampler, [0, 3, 9, 6])
    drawn = torch.ones(4, dtype=torch.int64, device="cuda")
    sampler.begin(codes, torch.tensor([0, 3, 9, 6]))
    device.counts.clear()
    for _ in range(7):
        sampler.logits()
        sampler.advance(drawn)
    assert {name: device.counts[name] for name in WAITS} == dict.fromkeys(WAITS, 0)
    assert 7 <= device.counts["h2d"] <= 7 * 10


def test_images_from_a_generator_of_the_cpu_make_nobody_wait_and_are_those_of_the_cpu(
    sampler: Any, device: Device
) -> None:
    codes = sequences(sampler, [0, 0, 0])
    given = {"codes": codes}
    sampler.sample(**given, generator=torch.Generator().manual_seed(0))
    device.counts.clear()
    generator = torch.Generator().manual_seed(0)
    drawn, _ = sampler.sample(**given, generator=generator)
    once_each = 4 * sampler.prior.grid.levels  # prefix, rows, uniforms; labels and what guidance adds
    waits = {name: device.counts[name] for name in WAITS}
    assert waits["blocking"] == 0 and waits["syncs"] <= once_each
    after = torch.rand(1, generator=generator)
    here = sampler.prior.cpu()
    generator = torch.Generator().manual_seed(0)
    expected, _ = make_sampler(here, sampler.top.sampling if hasattr(sampler, "top") else sampler.sampling).sample(
        codes=codes.cpu(), generator=generator
    )
    np.testing.assert_array_equal(drawn.cpu().numpy(), expected.numpy())
    assert torch.equal(after, torch.rand(1, generator=generator))


# Stages 1 and 2 ---------------------------------------------------------------------------------------------------

TRAIN = [
    "train",
    "--preset",
    "smoke",
    "--data.workers",
    "1",
    "--quiet",
    "--device",
    "cuda",
    "--prior.evaluate-every",
    "99",
]


def per_step(
    folder: Path, stages: list[str], setting: str, more: int = 10
) -> tuple[Counter[str], Counter[torch.dtype]]:
    """What `more` steps of the last stage add to the counts and the numbers sent: a longer run less a shorter one."""
    found = []
    for steps in (10, 10 + more):
        given = {"--vqvae.training-steps": "10", "--prior.training-steps": "10"} | {setting: str(steps)}
        with pretend_cuda() as device:
            flags = [word for pair in given.items() for word in pair]
            assert main([*TRAIN, *flags, "--stages", *stages, "--runs", str(folder / str(steps))]) == 0
        found.append((device.counts, device.sent))
    (counts, sent), (more_counts, more_sent) = found
    return more_counts - counts, more_sent - sent


def test_a_step_of_stage_1_sends_bytes_and_waits_for_no_copy(tmp_path: Path) -> None:
    """Its images as uint8, 16 of 32 x 32 grey pixels; what the host waits for is the loss, and the quantiser's."""
    added, sent = per_step(tmp_path, ["vqvae"], "--vqvae.training-steps")
    assert added["blocking"] == 0
    assert sent == {torch.uint8: 10 * SMOKE.vqvae.batch_size * 32 * 32}
    assert added["syncs"] <= 10 * 7


def test_a_step_of_stage_2_waits_for_its_loss_only(tmp_path: Path) -> None:
    added, sent = per_step(tmp_path, ["vqvae", "prior"], "--prior.training-steps")
    assert added["blocking"] == 0
    assert added["syncs"] <= 10 + 1  # and once for the log
    assert set(sent) == {torch.int64}


def test_images_are_converted_and_augmented_on_the_device_as_on_the_cpu(device: Device) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(5, 3, 8, 8), dtype=np.uint8)
    expected = augment(to_float(torch.from_numpy(pixels)), torch.Generator().manual_seed(1))
    device.counts.clear()
    there = augment(float_batch(pixels, torch.device("cuda")), torch.Generator().manual_seed(1))
    assert there.is_cuda and device.counts["blocking"] == device.counts["syncs"] == 0
    assert torch.equal(there.cpu(), expected)
    here = augment(float_batch(pixels, torch.device("cpu")), torch.Generator().manual_seed(1))
    assert torch.equal(here, expected)
