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
from stable_baselines3.common.logger import configure

from ral_gym.agents import ALGORITHMS, CoTrainedCritic, algorithm_defaults, make_sb3_env, policy_for
from ral_gym.commands.cli import main
from ral_gym.config import CriticConfig
from ral_gym.data.images import augment, float_batch, to_float
from ral_gym.envs.from_run import _load_once
from ral_gym.errors import ConfigError
from ral_gym.presets import SMOKE
from ral_gym.priors.guidance import PLAIN, Sampling
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.sampler import make_sampler, sample_naive
from ral_gym.priors.transformer import Transformer
from ral_gym.priors.two_level import TwoLevelPrior
from ral_gym.rewards.causal import CausalCritic
from ral_gym.rewards.critic import PatchCritic, critic_loss
from ral_gym.runs.run import Run, read_config
from ral_gym.stages.common import UnseenLosses
from ral_gym.stages.levels import load_vqvae
from ral_gym.tokenizers.vqvae import VQVAE
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


def make(run: str, algo: str, settings: dict[str, Any] | None = None, **env: Any) -> Any:
    arguments = {"reset_mode": "full", "lockstep": True, "paired": False, "seed": 0} | env
    venv = make_sb3_env("ral_gym/LatentCode-v0", E, run=run, device="cuda", **arguments)
    given = (
        algorithm_defaults(algo, venv)
        | {"device": "cuda", "seed": 0, "policy_kwargs": {"prior": run}}
        | (settings or {})
    )
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
    """Its images as uint8, 16 of 32 x 32 grey pixels; every tenth step the host looks at losses, metrics and codes."""
    added, sent = per_step(tmp_path, ["vqvae"], "--vqvae.training-steps")
    assert added["blocking"] == 0
    assert sent == {torch.uint8: 10 * SMOKE.vqvae.batch_size * 32 * 32}
    assert added["syncs"] <= 3


def test_ten_steps_of_stage_2_wait_twice(tmp_path: Path) -> None:
    """For their losses, and for the log; codes are sent as they are stored."""
    added, sent = per_step(tmp_path, ["vqvae", "prior"], "--prior.training-steps")
    assert added["blocking"] == 0
    assert added["syncs"] <= 2
    assert sent == {torch.int16: 10 * SMOKE.prior.batch_size * 16}


def test_losses_are_looked_at_together_on_a_device_and_at_once_elsewhere(device: Device) -> None:
    there, here = UnseenLosses(5), UnseenLosses(5)
    losses = torch.arange(12.0) / 3
    assert [here.add(loss, step) for step, loss in enumerate(losses, 1)] == [
        [(loss.item(), step)] for step, loss in enumerate(losses, 1)
    ]
    on_it = losses.to("cuda")
    device.counts.clear()
    seen = [there.add(on_it[step - 1], step, last=step == 12) for step in range(1, 13)]
    assert [len(found) for found in seen] == [0, 0, 0, 0, 5, 0, 0, 0, 0, 5, 0, 2] and device.counts["syncs"] == 3
    assert [one for found in seen for one in found] == [(losses[step - 1].item(), step) for step in range(1, 13)]


# Updates ------------------------------------------------------------------------------------------------------------

UPDATES: dict[str, tuple[str, dict[str, Any], int]] = {
    "reinforce": ("reinforce", {}, 1),
    "with all terms, in parts": (
        "reinforce",
        {"baseline": "value", "mle_coef": 0.1, "kl_coef": 0.1, "ent_coef": 0.01, "batch_size": 32},
        1,
    ),
    "grpo": ("grpo", {}, 1),
    "grpo that may stop early": ("grpo", {"n_epochs": 3, "target_kl": 1e9, "kl_coef": 0.1}, 1 + 3),
}


@pytest.mark.parametrize("case", UPDATES)
def test_an_update_looks_at_its_figures_once(run: str, device: Device, case: str) -> None:
    algo, settings, waits = UPDATES[case]
    model = make(run, algo, settings=settings)
    collect(model, device)
    model.set_logger(configure(None, []))
    device.counts.clear()
    model.train()
    assert {name: device.counts[name] for name in WAITS} == {"syncs": waits, "blocking": 0}
    logged = model.logger.name_to_value
    assert {"train/loss", "train/approx_kl", "train/grad_norm"} <= set(logged)
    assert all(isinstance(value, int | float) for value in logged.values())


def test_minibatches_of_ppo_are_sent_without_a_wait(run: str, device: Device) -> None:
    model = make(run, "ppo")
    collect(model, device)
    device.counts.clear()
    for _ in model.rollout_buffer.get(32):
        pass
    assert device.counts["h2d"] > 0 and {name: device.counts[name] for name in WAITS} == dict.fromkeys(WAITS, 0)


@pytest.mark.parametrize("algo", ["ppo", "maskable_ppo"])
def test_a_minibatch_of_ppo_waits_for_the_figures_that_sb3_reads(run: str, device: Device, algo: str) -> None:
    """SB3 reads three losses, the clip fraction and the KL estimate after every one; all of PPO's further waits: 2."""
    model = make(run, algo)
    collect(model, device)
    model.set_logger(configure(None, []))
    minibatches = model.n_epochs * len(list(model.rollout_buffer.get(model.batch_size)))
    device.counts.clear()
    model.train()
    assert 0 < device.counts["syncs"] - 5 * minibatches <= 2 and device.counts["blocking"] <= 2


@pytest.mark.parametrize("loss", ["wgan_gp", "hinge"])
def test_a_step_of_the_critic_waits_once(device: Device, loss: Any) -> None:
    critic, images = PatchCritic(16, 1, hidden_units=4, layers=2).to("cuda"), torch.rand(8, 1, 16, 16).to("cuda")
    weights = torch.rand(4).to("cuda")
    device.counts.clear()
    total, metrics = critic_loss(critic, images[:4], images[4:], 10.0, None, loss, weights=weights)
    total.backward()
    assert device.counts["syncs"] == 1 and device.counts["blocking"] == 0
    assert metrics["loss"] == total.item()


def test_a_step_of_the_causal_critic_waits_once(run: str, device: Device) -> None:
    vqvae = load_vqvae(Run(run, read_config(run)), torch.device("cuda"))
    codes = np.random.default_rng(0).integers(vqvae.grid.codebook_size, size=(20, vqvae.grid.n_codes))
    prior = PixelCNN(vqvae.grid.codebook_size, vqvae.grid.height, vqvae.grid.width, **SIZES)
    network = CausalCritic(prior)
    critic = CoTrainedCritic(vqvae, network, codes, codes, CriticConfig(kind="causal"), device="cuda")
    critic.train_step(torch.from_numpy(codes[:4]))  # the optimizer makes its moments
    device.counts.clear()
    metrics = critic.train_step(torch.from_numpy(codes[:4]))
    assert device.counts["syncs"] == 1 and set(metrics) == {"loss", "gap", "accuracy"}


# Batch sizes and codes ----------------------------------------------------------------------------------------------


def test_a_new_batch_size_is_recorded_anew_and_a_known_one_replayed(device: Device) -> None:
    """Graphs hold addresses of one batch's tensors: those of another size must never be replayed for it."""
    torch.manual_seed(0)
    sampler = make_sampler(pixelcnn().eval().to("cuda"))
    plain = make_sampler(sampler.prior)
    plain.use_cuda_graphs = False
    recorded: list[tuple[int, int]] = []
    for batch in (2, 2, 2, 3, 3, 3, 2, 3, 5, 2):
        uniforms = torch.rand(batch, T).to("cuda")
        device.counts.clear()
        codes, _ = sampler.sample(batch, uniforms=uniforms)
        recorded.append((device.counts["captures"], device.counts["replays"]))
        assert torch.equal(codes, plain.sample(batch, uniforms=uniforms)[0])
    # Each is recorded at its third call: a graph per column serves 4 codes of an image, one per later grid row 1.
    assert [captures for captures, _ in recorded] == [4, 0, 3, 4, 0, 3, 0, 0, 4, 4]
    assert [replays for _, replays in recorded] == [4, 16, 16, 4, 16, 16, 19, 19, 4, 4]
    assert set(sampler._caches) == {5, 2}  # the last two sizes: size 2 had gone, and begins anew


def test_a_transformer_records_a_graph_for_many_slots_and_anew_where_weights_have_moved(device: Device) -> None:
    torch.manual_seed(0)
    prior = Transformer(11, 4, 4, hidden_units=16, layers=2, attention_heads=2, multiple_of=8).eval().to("cuda")
    sampler, uniforms = make_sampler(prior), torch.rand(2, T).to("cuda")
    counts = []
    for scale in (1, 1, 5):
        if scale > 1:  # other tensors, where recorded steps do not look
            for weight in prior.parameters():
                weight.data = weight.data * scale
            sampler.refresh()
        device.counts.clear()
        codes, _ = sampler.sample(2, uniforms=uniforms)
        counts.append((device.counts["captures"], device.counts["replays"]))
        assert torch.equal(codes, sample_naive(prior, 2, uniforms=uniforms)[0])
    assert counts == [(1, T - 3), (0, T), (1, T - 3)]  # all 16 slots share one


@pytest.mark.parametrize("filling", [-1, 11, 12])
def test_what_fills_a_sequence_behind_its_start_is_never_an_index(sampler: Any, device: Device, filling: int) -> None:
    """-1 would be an IndexError on the CPU, and end the process's use of a GPU."""
    grid = sampler.prior.grid
    codes, behind = sequences(sampler, [grid.n_codes] * 3), torch.from_numpy(grid.mask(2, grid.height)).to("cuda")
    uniforms = torch.rand(3, grid.n_codes).to("cuda")
    given = [codes.masked_fill(behind, with_) for with_ in (grid.not_drawn, filling)]
    drawn = [sampler.sample(codes=x, prefix_rows=2, uniforms=uniforms)[0] for x in given]
    assert torch.equal(*drawn) and int(drawn[0].min()) >= 0 and int(drawn[0].max()) < 11


def test_a_negative_code_that_is_given_is_refused_before_it_is_used(device: Device) -> None:
    sampler = make_sampler(pixelcnn().eval().to("cuda"))
    codes = torch.tensor([[3, 4, -1] + [-1] * 13]).to("cuda")
    assert sampler.sample(codes=codes, start=2)[0].min() >= 0
    with pytest.raises(ConfigError, match=r"a given code is -1; codes are 0 or more"):
        sampler.sample(codes=codes, start=3)
    vqvae = VQVAE(8, 1, codebook_size=11, codebook_dim=4, hidden_units=4, residual_units=4, layers=1).eval().to("cuda")
    with pytest.raises(ConfigError, match=r"codes in -1\.\.4"):
        vqvae.decode(codes)


def test_images_are_converted_and_augmented_on_the_device_as_on_the_cpu(device: Device) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(5, 3, 8, 8), dtype=np.uint8)
    expected = augment(to_float(torch.from_numpy(pixels)), torch.Generator().manual_seed(1))
    device.counts.clear()
    there = augment(float_batch(pixels, torch.device("cuda")), torch.Generator().manual_seed(1))
    assert there.is_cuda and device.counts["blocking"] == device.counts["syncs"] == 0
    assert torch.equal(there.cpu(), expected)
    here = augment(float_batch(pixels, torch.device("cpu")), torch.Generator().manual_seed(1))
    assert torch.equal(here, expected)
