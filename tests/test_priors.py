"""The protocols of priors: kinds, files, conditions, and the sampler of a prior without a cache of its own."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ral_gym.errors import ConfigError, RunError
from ral_gym.priors import full_pass
from ral_gym.priors.base import (
    build_prior,
    config_of,
    kind_of,
    load_prior,
    maximum_likelihood_loss,
    save_prior,
    split,
)
from ral_gym.priors.full_pass import FullPassCache
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.sampler import CachedSampler, make_sampler, sample_naive
from ral_gym.priors.two_level import TwoLevelPrior, TwoLevelSampler, load_levels
from ral_gym.runs.storage import load_tensors, save_module, save_tensors
from tests.own_priors import GPT, Labelled, Sharp
from tests.sampling import B, Episodes, H, K, T, W, assert_same_draws

TINY: dict[str, Any] = {"hidden_units": 8, "residual_units": 8, "layers": 1, "output_stack_layers": 0}


def gpt(cls: type[GPT] = GPT, **settings: Any) -> Any:
    torch.manual_seed(0)
    prior = cls(K, H, W, **settings).double()
    for parameter in prior.parameters():
        nn.init.normal_(parameter, std=0.3)
    return prior.eval()


def pixelcnn(**settings: Any) -> PixelCNN:
    torch.manual_seed(0)
    return PixelCNN(K, H, W, **TINY, **settings)


def two_levels(top: Any = None, bottom: Any = None) -> TwoLevelPrior:
    return TwoLevelPrior(
        top or pixelcnn(), bottom or PixelCNN(K, 2 * H, 2 * W, **TINY, condition=(H, W, K), conditioning_stack_layers=1)
    )


# --------------------------------------------------------------------------------------------------------------- kinds


@pytest.mark.parametrize("make", [pixelcnn, two_levels, gpt])
def test_config_of_builds_the_same_class_again(make: Any) -> None:
    prior = make()
    again = build_prior(config_of(prior))
    assert type(again) is type(prior) and config_of(again) == config_of(prior)
    again.load_state_dict(prior.state_dict())


def test_the_packages_own_priors_need_no_kind_in_their_config() -> None:
    prior = two_levels()
    assert config_of(prior.top) == prior.top.config and config_of(prior) == prior.config
    assert kind_of(prior.top) == "pixelcnn" and kind_of(prior) == "two_level"
    assert config_of(gpt())["kind"] == "tests.own_priors:GPT"


def test_a_subclass_is_a_kind_of_its_own() -> None:
    assert kind_of(Sharp(K, H, W, **TINY)) == "tests.own_priors:Sharp"


def test_a_kind_in_the_config_itself_is_not_passed_to_the_constructor() -> None:
    class Said(GPT):
        config = property(lambda self: {"kind": "said", **GPT.config.fget(self)})  # type: ignore[attr-defined]

    assert "kind" in Said(K, H, W).config
    assert type(build_prior(config_of(Said(K, H, W)))) is Said


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"kind": "nothing"}, "prior 'nothing' is unknown"),
        ({"kind": "my_parts:GPT"}, "is code that a file names"),
        ({"kind": "pixelcnn", "codebook_size": 4}, "prior 'pixelcnn' cannot be built (TypeError"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_prior(config)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_class_that_is_no_prior_is_refused() -> None:
    kind = kind_of(nn.Linear(1, 1))
    with pytest.raises(ConfigError, match=r"has no codebook_size, height.*Prior says what it needs"):
        build_prior({"kind": kind, "in_features": 1, "out_features": 1})


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("make", [pixelcnn, two_levels, gpt])
def test_a_file_holds_the_kind(make: Any, tmp_path: Path) -> None:
    prior, path = make().float(), tmp_path / "prior.safetensors"
    save_prior(path, prior, nll_test=1.5)
    state = torch.get_rng_state()
    again = load_prior(path, config=config_of(prior))
    assert torch.equal(torch.get_rng_state(), state)
    assert type(again) is type(prior) and not again.training and not any(p.requires_grad for p in again.parameters())
    for name, weight in prior.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
    metadata = load_tensors(path)[1]
    assert metadata["kind"] == kind_of(prior) and metadata["nll_test"] == 1.5


@pytest.mark.parametrize("make", [pixelcnn, two_levels])
def test_a_file_without_a_kind_is_one_of_the_packages_own(make: Any, tmp_path: Path) -> None:
    prior = make()
    save_module(tmp_path / "prior.safetensors", prior)
    assert type(load_prior(tmp_path / "prior.safetensors")) is type(prior)


def test_a_file_made_with_other_arguments_is_refused(tmp_path: Path) -> None:
    save_prior(tmp_path / "prior.safetensors", gpt(heads=2).float())
    with pytest.raises(RunError, match=r"belongs to another model \(heads: 2 there, 4 here\)"):
        load_prior(tmp_path / "prior.safetensors", config=config_of(gpt()))


def test_code_that_a_file_names_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hostile_prior_part.py").write_text("from pathlib import Path\nPath('ran').touch()\nclass Bad: pass\n")
    monkeypatch.chdir(tmp_path)
    metadata = {"class": "Bad", "kind": "hostile_prior_part:Bad", "config": {}}
    save_tensors(tmp_path / "prior.safetensors", {"x": torch.zeros(1)}, metadata)
    with pytest.raises(ConfigError, match=r"hostile_prior_part:Bad' is code that a file names"):
        load_prior(tmp_path / "prior.safetensors")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("config", [None, [], {"codebook_size": 4, "surprise": 1}])
def test_damaged_metadata_are_refused(config: Any, tmp_path: Path) -> None:
    save_tensors(tmp_path / "prior.safetensors", {"x": torch.zeros(1)}, {"class": "PixelCNN", "config": config})
    with pytest.raises(RunError, match="remove it to make it again"):
        load_prior(tmp_path / "prior.safetensors")


def test_two_files_are_one_prior(tmp_path: Path) -> None:
    prior = two_levels(gpt().float())
    save_prior(tmp_path / "prior.safetensors", prior.top)
    save_prior(tmp_path / "prior_bottom.safetensors", prior.bottom)
    again = load_levels(tmp_path, "prior", 2)
    assert isinstance(again, TwoLevelPrior) and isinstance(again.top, GPT) and not again.training
    assert config_of(again) == config_of(prior)
    assert isinstance(load_levels(tmp_path, "prior", 1), GPT)


# ------------------------------------------------------------------------------------------------------------- samplers


@pytest.fixture
def codes() -> Tensor:
    return torch.randint(K, (B, T), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def uniforms() -> Tensor:
    return torch.rand(B, T, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_each_prior_has_its_sampler() -> None:
    assert isinstance(make_sampler(two_levels()), TwoLevelSampler)
    sampler = make_sampler(gpt())
    assert isinstance(sampler, CachedSampler) and isinstance(sampler.weights.make_cache(1), FullPassCache)
    assert not isinstance(CachedSampler(pixelcnn()).weights.make_cache(1), FullPassCache)


@pytest.mark.parametrize("start", [0, 3, W, W + 2, T])
def test_a_prior_without_a_cache_draws_what_full_passes_draw(codes: Tensor, uniforms: Tensor, start: int) -> None:
    assert_same_draws(gpt(), codes=codes, start=start, uniforms=uniforms)
    assert_same_draws(gpt(), codes=codes[:, : 2 * W], start=min(start, 2 * W), uniforms=uniforms)
    positions = torch.tensor([0, T, W - 1, 2 * W, start])
    assert_same_draws(gpt(), codes=codes, start=positions, uniforms=uniforms)


def test_a_prior_without_a_cache_code_by_code(codes: Tensor) -> None:
    Episodes(gpt(), codes, torch.tensor([0, T, W - 1, 2 * W, 1])).run_with_rebuilt_rows()


def test_a_prior_without_a_cache_sees_new_weights(uniforms: Tensor) -> None:
    prior = gpt()
    sampler = make_sampler(prior)
    before = sampler.sample(B, uniforms=uniforms)[0]
    with torch.no_grad():
        prior.head.weight.neg_()
    sampler.refresh()
    after = sampler.sample(B, uniforms=uniforms)[0]
    assert not torch.equal(before, after) and torch.equal(after, sample_naive(prior, B, uniforms=uniforms)[0])


def test_dropout_is_off_while_drawing_and_as_it_was_afterwards(uniforms: Tensor) -> None:
    prior = gpt(dropout=0.5)
    expected = make_sampler(prior).sample(B, uniforms=uniforms)[0]
    assert torch.equal(make_sampler(prior.train()).sample(B, uniforms=uniforms)[0], expected)
    assert prior.training and prior.block.training


def test_what_stands_behind_a_position_does_not_matter_to_the_sampler(codes: Tensor) -> None:
    sampler = make_sampler(gpt())
    sampler.begin(codes, 3)
    seen = sampler.logits()
    sampler.begin(torch.cat([codes[:, :3], torch.full_like(codes[:, 3:], K + 1)], 1), 3)
    assert torch.equal(sampler.logits(), seen)


def test_slow_sampling_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_pass, "_told", set())
    with caplog.at_level(logging.WARNING, logger="ral_gym"):
        for _ in range(3):
            make_sampler(gpt())
        make_sampler(pixelcnn())
    (record,) = caplog.records
    assert record.getMessage().startswith(f"GPT has no pack(), so drawing takes a full pass per code, {T} per image")


def test_a_pixelcnn_of_ones_own_is_drawn_as_it_is(uniforms: Tensor) -> None:
    torch.manual_seed(0)
    assert_same_draws(Sharp(K, H, W, **TINY).double().eval(), batch_size=B, uniforms=uniforms)


# ------------------------------------------------------------------------- conditions and other entries


def test_a_bottom_prior_of_ones_own(codes: Tensor) -> None:
    condition = torch.randint(K, (B, 6), generator=torch.Generator().manual_seed(3))
    prior = gpt(condition=(2, 3, K))
    Episodes(prior, codes, torch.tensor([0, T, W - 1, 2 * W, 1]), condition).run()
    with pytest.raises(ConfigError, match=r"this GPT is conditional: pass condition, the 2x3 codes above its own"):
        make_sampler(prior).begin(codes, 0)
    with pytest.raises(ConfigError, match=r"this GPT takes no condition"):
        CachedSampler(gpt()).begin(codes, 0, condition)


def test_two_levels_of_ones_own_draw_what_a_full_pass_says() -> None:
    torch.manual_seed(0)
    prior = TwoLevelPrior(GPT(K, 2, 2), GPT(K, 4, 4, condition=(2, 2, K))).double().eval()
    drawn, log_probs = make_sampler(prior).sample(3, generator=torch.Generator().manual_seed(0))
    expected = prior(drawn).log_softmax(2).gather(2, drawn[:, :, None])[:, :, 0]
    torch.testing.assert_close(log_probs, expected)


def test_a_label_at_the_end_of_a_sequence(codes: Tensor, uniforms: Tensor) -> None:
    prior = gpt(Labelled)
    sequence = torch.cat([codes, K + 2 + torch.tensor([[0], [1], [2], [0], [1]])], 1)  # (B, T + 1)
    sampler = make_sampler(prior)
    sampler.begin(sequence, 2)
    torch.testing.assert_close(sampler.features(), prior.features(sequence)[:, 2])
    drawn, log_probs = sampler.sample(codes=sequence, uniforms=uniforms)
    assert drawn.shape == codes.shape
    filled = torch.cat([drawn, sequence[:, -1:]], 1)
    expected = prior(filled).log_softmax(2).gather(2, drawn[:, :, None])[:, :, 0]
    torch.testing.assert_close(log_probs, expected)
    swapped = torch.cat([codes, sequence[:, -1:].roll(1, 0)], 1)
    sampler.begin(sequence, 2)
    sampler.rebuild(torch.tensor([0, 1]), swapped[:2], 2)
    torch.testing.assert_close(sampler.features()[:2], prior.features(swapped)[:2, 2])


def test_the_likelihood_is_that_of_the_codes_alone(codes: Tensor) -> None:
    prior = gpt(Labelled)
    sequence = torch.cat([codes, torch.full((B, 1), K + 2)], 1)
    assert torch.equal(split(prior, sequence)[0], codes)
    expected = -prior(sequence).log_softmax(2).gather(2, codes[:, :, None]).mean()
    torch.testing.assert_close(maximum_likelihood_loss(prior, sequence), expected)
    plain = gpt()
    expected = -plain(codes).log_softmax(2).gather(2, codes[:, :, None]).mean()
    torch.testing.assert_close(maximum_likelihood_loss(plain, codes), expected)
