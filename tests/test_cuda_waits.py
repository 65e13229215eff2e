"""How often the host waits for a CUDA device, counted on a pretended one (`tests/pretend_device.py`).

A wait is a result that the host looks at (`syncs`), or a copy to the device that is not `non_blocking` (`blocking`).
While a graph is recorded the pretended device refuses both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback

from ral_gym.agents import ALGORITHMS, algorithm_defaults, make_sb3_env, policy_for
from ral_gym.envs.run_world import _load_once
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
