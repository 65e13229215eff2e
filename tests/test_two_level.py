from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ral_gym.errors import ConfigError
from ral_gym.priors.base import build_prior
from ral_gym.priors.drawing import draw
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.pixelcnn_cache import SamplingCache
from ral_gym.priors.sampler import CachedSampler, make_sampler
from ral_gym.priors.two_level import TwoLevelPrior, TwoLevelSampler
from ral_gym.runs.storage import load_module, save_module
from tests.sampling import small, some_codes, some_uniforms

B, H, W, K = 5, 3, 2, 11
TOP = H * W
T = 5 * TOP
ROW = 5 * W  # codes of a top row and the bottom rows under it


def two_levels(bottom_units: int = 8) -> TwoLevelPrior:
    top = small(H, W, attention_layers=1, attention_heads=3)
    bottom = small(2 * H, 2 * W, hidden_units=bottom_units, condition=(H, W, K), conditioning_stack_layers=1)
    return TwoLevelPrior(top, bottom)


@pytest.fixture
def prior() -> TwoLevelPrior:
    return two_levels()


@pytest.fixture
def codes() -> Tensor:
    return some_codes(T)


@pytest.fixture
def uniforms() -> Tensor:
    return some_uniforms(T)


def episode(prior: TwoLevelPrior, codes: Tensor, prefix_rows: list[int], stop_rows: list[int]) -> Tensor:
    """Observations of full length: K at what is to be drawn, K + 1 in the rows behind `stop_rows`."""
    codes = codes.clone()
    for row, (prefix, stop) in enumerate(zip(prefix_rows, stop_rows, strict=True)):
        codes[row, torch.as_tensor(prior.grid.mask(prefix, stop))] = K
        codes[row, torch.as_tensor(prior.grid.mask(stop, prior.height))] = K + 1
    return codes


@torch.no_grad()
def naive(prior: TwoLevelPrior, codes: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw every K of sequences (B, T'), a full pass per code."""
    codes, log_probs = codes.clone(), torch.zeros(codes.shape, dtype=torch.float64)
    for position in range(codes.shape[1]):
        drawn, log_prob = draw(prior(codes)[:, position], uniforms[:, position])
        here = codes[:, position] == K
        codes[here, position] = drawn[here]
        log_probs[here, position] = log_prob[here]
    return codes, log_probs


# -------------------------------------------------------------------------------------------------------- the network


def test_the_pass_is_that_of_its_networks(prior: TwoLevelPrior, codes: Tensor) -> None:
    top, bottom = codes[:, :TOP], codes[:, TOP:]
    logits = prior(codes)
    assert logits.shape == (B, T, K)
    assert torch.equal(logits[:, :TOP], prior.top(top))
    assert torch.equal(logits[:, TOP:], prior.bottom(bottom, top))


@pytest.mark.parametrize("bottom_units", [8, 16])
def test_features_and_logits_make_up_the_pass(codes: Tensor, bottom_units: int) -> None:
    prior = two_levels(bottom_units)
    features = prior.features(codes)
    assert features.shape == (B, T, max(12, bottom_units)) and prior.hidden_units == max(12, bottom_units)
    position = torch.arange(T).expand(B, T)
    torch.testing.assert_close(prior.logits(features, position), prior(codes), rtol=1e-12, atol=1e-12)
    order = torch.randperm(B * T)
    mixed = prior.logits(features.flatten(0, 1)[order], position.flatten()[order])
    torch.testing.assert_close(mixed, prior(codes).flatten(0, 1)[order], rtol=1e-12, atol=1e-12)
    only = prior.logits(features[:, TOP + 3], position[:, TOP + 3])
    torch.testing.assert_close(only, prior(codes)[:, TOP + 3], rtol=1e-12, atol=1e-12)
    with pytest.raises(ConfigError, match="position"):
        prior.logits(features)


@pytest.mark.parametrize("rows", range(1, H + 1))
def test_fewer_rows_have_the_same_logits_alone_and_among_taller_images(
    prior: TwoLevelPrior, codes: Tensor, rows: int
) -> None:
    tall = codes.clone()
    tall[:, torch.as_tensor(prior.grid.mask(rows, H))] = K + 1
    short = prior(prior.grid.crop(codes, rows))
    expected = prior(tall)[:, torch.as_tensor(prior.grid.mask(0, rows))]
    torch.testing.assert_close(short, expected, rtol=1e-12, atol=1e-12)


def test_earlier_codes_alone_matter(prior: TwoLevelPrior, codes: Tensor) -> None:
    before = prior(codes)
    for position in range(T):
        other = codes.clone()
        other[:, position] = (other[:, position] + 1) % K
        after = prior(other)
        # Every bottom code may depend on every top code, but no code on itself or a later one of its level.
        assert torch.allclose(after[:, : position + 1], before[:, : position + 1], rtol=0, atol=1e-12)
        assert position == T - 1 or not torch.allclose(after[:, position + 1 :], before[:, position + 1 :])


def test_gradients_reach_both_networks_through_logits(prior: TwoLevelPrior, codes: Tensor) -> None:
    prior.logits(prior.features(codes), torch.arange(T).expand(B, T)).square().sum().backward()
    for name, parameter in prior.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0 or "embedding" in name


def test_config_rebuilds_the_networks(prior: TwoLevelPrior, codes: Tensor, tmp_path: Path) -> None:
    config = json.loads(json.dumps(prior.config))
    copy = build_prior(config)
    assert isinstance(copy, TwoLevelPrior) and copy.config == prior.config
    copy.double().eval().load_state_dict(prior.state_dict())
    assert torch.equal(copy(codes), prior(codes))
    assert isinstance(build_prior(prior.top.config), PixelCNN)
    prior.float()
    save_module(tmp_path / "policy.safetensors", prior)
    again = load_module(tmp_path / "policy.safetensors", TwoLevelPrior, config=prior.config)
    assert torch.equal(again(codes), prior(codes))


def test_what_it_says_about_itself(prior: TwoLevelPrior) -> None:
    assert (prior.levels, prior.codebook_size, prior.height, prior.width) == (2, K, H, W)
    assert prior.grid.n_codes == T and prior.grid.levels == 2
    assert prior.top.levels == 1 and prior.top.grid.n_codes == TOP


@pytest.mark.parametrize(
    ("top", "bottom", "message"),
    [
        ({}, {"condition": None}, "bottom prior.*None"),
        ({}, {"height": 4 * H, "width": 4 * W}, r"bottom prior.*\(12, 8, 11, \(3, 2, 11\)\)"),
        ({}, {"condition": (H, W, K + 1)}, "bottom prior"),
        ({"condition": (H, W, K)}, {}, "top prior has condition"),
    ],
)
def test_networks_that_do_not_fit_together(top: dict[str, Any], bottom: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TwoLevelPrior(
            small(**{"height": H, "width": W, **top}),
            small(**{"height": 2 * H, "width": 2 * W, "condition": (H, W, K), **bottom}),
        )


# -------------------------------------------------------------------------------------------------------- the sampler


@pytest.mark.parametrize("bottom_units", [8, 16])
def test_codes_equal_those_of_naive_generation(uniforms: Tensor, bottom_units: int) -> None:
    prior = two_levels(bottom_units)
    expected, expected_log_probs = naive(prior, torch.full((B, T), K), uniforms)
    codes, log_probs = TwoLevelSampler(prior).sample(B, uniforms=uniforms)
    assert torch.equal(codes, expected)
    torch.testing.assert_close(log_probs, expected_log_probs, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("prefix", "stop"), [(p, s) for s in range(1, H + 1) for p in range(s + 1)])
def test_every_prefix_and_stop(prior: TwoLevelPrior, codes: Tensor, uniforms: Tensor, prefix: int, stop: int) -> None:
    expected, expected_log_probs = naive(prior, episode(prior, codes, [prefix] * B, [stop] * B), uniforms)
    kept = torch.as_tensor(prior.grid.mask(0, stop))
    drawn, log_probs = TwoLevelSampler(prior).sample(codes=codes, prefix_rows=prefix, stop_rows=stop, uniforms=uniforms)
    assert torch.equal(drawn, expected[:, kept])
    torch.testing.assert_close(log_probs, expected_log_probs[:, kept], rtol=0, atol=1e-10)
    short, _ = TwoLevelSampler(prior).sample(
        codes=prior.grid.crop(codes, stop), prefix_rows=prefix, uniforms=uniforms[:, kept]
    )
    assert torch.equal(short, drawn)


def test_a_prefix_for_each_image(prior: TwoLevelPrior, codes: Tensor, uniforms: Tensor) -> None:
    prefixes = [0, 2, 1, 3, 0]
    expected, expected_log_probs = naive(prior, episode(prior, codes, prefixes, [H] * B), uniforms)
    drawn, log_probs = TwoLevelSampler(prior).sample(codes=codes, prefix_rows=torch.tensor(prefixes), uniforms=uniforms)
    assert torch.equal(drawn, expected)
    torch.testing.assert_close(log_probs, expected_log_probs, rtol=0, atol=1e-10)


class Episodes:
    """Drives a sampler through codes of its own, and compares it with full passes at every position."""

    def __init__(self, prior: TwoLevelPrior, codes: Tensor, position: Tensor | None = None):
        self.prior, self.codes = prior, codes.clone()
        self.sampler = TwoLevelSampler(prior)
        self.sampler.begin(codes, position)
        self.rows = prior.grid.rows_of(codes.shape[1])

    @property
    def position(self) -> Tensor:
        """The first K of every image, T' if there is none."""
        behind = torch.cat([self.codes == K, torch.ones(len(self.codes), 1, dtype=torch.bool)], dim=1)
        return behind.int().argmax(1)

    def check(self) -> None:
        position = self.position
        assert torch.equal(self.sampler.position, position)
        alive = position < self.codes.shape[1]
        rows, at = torch.arange(len(self.codes))[alive], position[alive]
        features = self.prior.features(self.codes)[rows, at]
        torch.testing.assert_close(self.sampler.features()[alive], features)
        torch.testing.assert_close(self.sampler.logits()[alive], self.prior(self.codes)[rows, at])
        assert self.sampler.features().isfinite().all() and self.sampler.logits().isfinite().all()

    def advance(self) -> None:
        new, position = torch.randint(K, (len(self.codes),)), self.position
        self.sampler.advance(new)
        alive = position < self.codes.shape[1]
        self.codes[alive, position[alive]] = new[alive]

    def run(self) -> None:
        for _ in range(int((self.codes == K).sum(1).max()) + 1):
            self.check()
            self.advance()
        assert (self.sampler.position == self.codes.shape[1]).all()


@pytest.mark.parametrize("prefix", [0, 1])
@torch.no_grad()
def test_steps_in_lockstep_run_one_network_at_a_time(
    prior: TwoLevelPrior, codes: Tensor, prefix: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(SamplingCache, "step_at")
    calls: list[CachedSampler] = []
    logits = CachedSampler.logits
    monkeypatch.setattr(CachedSampler, "logits", lambda sampler: calls.append(sampler) or logits(sampler))
    episodes = Episodes(prior, episode(prior, codes, [prefix] * B, [H] * B))
    episodes.run()
    rows = H - prefix
    sampler = episodes.sampler
    assert calls.count(sampler.top) == rows * 2 * W  # `check` asks twice, and then for the finished images
    assert calls.count(sampler.bottom) == (rows * 4 * W + 1) * 2


@torch.no_grad()
def test_steps_at_mixed_positions_levels_and_stops(prior: TwoLevelPrior, codes: Tensor) -> None:
    observations = episode(prior, codes, [0, 2, 1, 1, 3], [3, 3, 2, 3, 3])
    observations[1, : TOP + 2 * 4 * W + 3] = codes[1, : TOP + 2 * 4 * W + 3]  # in the bottom level already
    observations[3, :TOP] = codes[3, :TOP]
    Episodes(prior, observations).run()


@torch.no_grad()
def test_steps_on_fewer_rows(prior: TwoLevelPrior, codes: Tensor) -> None:
    short = prior.grid.crop(episode(prior, codes, [0, 1, 2, 1, 0], [2, 2, 2, 2, 1]), 2)
    assert short.shape == (B, 2 * ROW)
    Episodes(prior, short).run()


@torch.no_grad()
def test_rebuilt_rows_start_anew_and_leave_the_others_alone(prior: TwoLevelPrior, codes: Tensor) -> None:
    episodes = Episodes(prior, episode(prior, codes, [0] * B, [H] * B))
    for step in range(3 * T):
        episodes.check()
        if step % 5 == 4:
            rows = torch.randperm(B)[:2]
            prefix, stop = torch.randint(H, (1,)).item(), torch.randint(1, H + 1, (1,)).item()
            new = episode(prior, torch.randint(K, (2, T)), [int(prefix), 0], [H, int(stop)])
            if step % 2:
                new[0, :TOP] = torch.randint(K, (TOP,))  # starts in the bottom level
            episodes.codes[rows] = new
            episodes.sampler.rebuild(rows, new, episodes.position[rows] if step % 3 else None)
            episodes.check()
        episodes.advance()


def test_stepping_draws_what_sample_draws(prior: TwoLevelPrior) -> None:
    sampler = TwoLevelSampler(prior)
    expected, expected_log_probs = sampler.sample(B, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    sampler.begin(torch.full((B, T), K), 0)
    for position in range(T):
        codes, log_probs = draw(sampler.logits(), torch.rand(B, generator=generator))
        assert torch.equal(codes, expected[:, position])
        assert torch.equal(log_probs, expected_log_probs[:, position])
        sampler.advance(codes)


def test_refresh_takes_the_new_weights(prior: TwoLevelPrior, uniforms: Tensor) -> None:
    sampler = TwoLevelSampler(prior)
    before, _ = sampler.sample(B, uniforms=uniforms)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    sampler.refresh()
    after, _ = sampler.sample(B, uniforms=uniforms)
    assert torch.equal(after, TwoLevelSampler(prior).sample(B, uniforms=uniforms)[0]) and not torch.equal(after, before)
    with pytest.raises(RuntimeError, match="begin"):
        sampler.logits()


def test_bfloat16(uniforms: Tensor) -> None:
    prior = two_levels().bfloat16()
    codes, log_probs = TwoLevelSampler(prior).sample(B, uniforms=uniforms)
    expected = prior(codes).float().log_softmax(-1).gather(2, codes[..., None])[..., 0]
    torch.testing.assert_close(log_probs, expected, rtol=0, atol=0.5)


def test_make_sampler_picks(prior: TwoLevelPrior) -> None:
    assert isinstance(make_sampler(prior), TwoLevelSampler)
    assert isinstance(make_sampler(prior.top), CachedSampler)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "batch_size=None"),
        ({"batch_size": 2, "stop_rows": 0}, "stop_rows=0 do not fit 3 rows"),
        ({"batch_size": 2, "stop_rows": H + 1}, "stop_rows=4"),
        ({"batch_size": 2, "prefix_rows": -1}, "prefix_rows=-1"),
        ({"batch_size": 2, "prefix_rows": torch.tensor([0, 4])}, "prefix_rows"),
        ({"codes": torch.zeros(2, T - 1, dtype=torch.int64)}, "29 codes"),
    ],
)
def test_wrong_arguments_are_named(prior: TwoLevelPrior, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TwoLevelSampler(prior).sample(**arguments)


def test_wrong_sequences_are_named(prior: TwoLevelPrior, codes: Tensor) -> None:
    sampler = TwoLevelSampler(prior)
    with pytest.raises(ConfigError, match="29 codes"):
        sampler.begin(codes[:, 1:])
    with pytest.raises(ConfigError, match="from 31 to 31"):
        sampler.begin(codes, T + 1)
    sampler.begin(codes, 0)
    with pytest.raises(ConfigError, match=r"20 codes.*30"):
        sampler.rebuild(torch.arange(B), codes[:, :20])
