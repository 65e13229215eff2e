"""PixelCNN and the two-level prior given a class: exact cached drawing, no trace without classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ral_gym.errors import ConfigError
from ral_gym.priors.base import build_prior, config_of, maximum_likelihood_loss
from ral_gym.priors.guidance import Sampling, guided_logits
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.sampler import CachedSampler, make_sampler, sample_naive
from ral_gym.priors.two_level import TwoLevelPrior

K, N, B = 7, 3, 5
SIZES: dict[str, Any] = {"hidden_units": 8, "residual_units": 6, "layers": 3, "conv_filter_size": 3}
SIZES |= {"output_stack_layers": 1, "classes": N}
LABELS = torch.tensor([0, 1, 2, 1, N])


def random_weights(prior: Any) -> Any:
    torch.manual_seed(1)
    for weights in prior.parameters():
        torch.nn.init.normal_(weights, std=0.3)
    return prior.double().eval()


def pixelcnn(height: int = 3, width: int = 4, **more: Any) -> PixelCNN:
    prior: PixelCNN = random_weights(PixelCNN(K, height, width, **SIZES, **more))
    return prior


def two_level() -> TwoLevelPrior:
    top = PixelCNN(K, 2, 3, **SIZES, attention_layers=1, attention_heads=2)
    bottom = PixelCNN(K, 4, 6, **SIZES, condition=(2, 3, K), conditioning_stack_layers=1)
    prior: TwoLevelPrior = random_weights(TwoLevelPrior(top, bottom))
    return prior


def sequences(prior: Any, labels: Tensor = LABELS) -> Tensor:
    codes = torch.randint(K, (len(labels), prior.grid.n_codes))
    return prior.grid.with_labels(codes, labels)  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [pixelcnn, two_level])
def test_the_class_reaches_every_position_and_nothing_else_changes(make: Any) -> None:
    prior = make()
    whole = sequences(prior)
    other = prior.grid.with_labels(prior.grid.without_labels(whole), (LABELS + 1) % (N + 1))
    logits = prior(whole)
    assert logits.shape == (B, prior.grid.n_codes, K)
    assert ((prior(other) - logits).abs().amax(-1) > 1e-6).all()
    codes, labels = prior.split(whole)
    assert torch.equal(prior(codes, labels), logits)
    loss = maximum_likelihood_loss(prior, whole)
    assert torch.equal(maximum_likelihood_loss(prior, codes, labels), loss)


@pytest.mark.parametrize("shape", [(3, 4), (4, 4), (5, 2)])
@pytest.mark.parametrize("attention", [0, 2])
def test_cached_drawing_is_that_of_full_passes(shape: tuple[int, int], attention: int) -> None:
    prior = pixelcnn(*shape, attention_layers=attention, attention_heads=2)
    whole, uniforms = sequences(prior), torch.rand(B, prior.grid.n_codes, dtype=torch.float64)
    for start in (0, 3, torch.tensor([0, 1, 5, 7, 2])):
        expected = sample_naive(prior, codes=whole, start=start, uniforms=uniforms)
        found = CachedSampler(prior).sample(codes=whole, start=start, uniforms=uniforms)
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], atol=1e-12, rtol=0)


def test_a_batch_without_labels_is_of_no_class() -> None:
    prior, uniforms = pixelcnn(), torch.rand(B, 12, dtype=torch.float64)
    none = sequences(prior, torch.full((B,), N))
    expected = CachedSampler(prior).sample(codes=none, start=0, uniforms=uniforms)[0]
    assert torch.equal(CachedSampler(prior).sample(B, uniforms=uniforms)[0], expected)


def test_steps_from_any_position_and_rebuilt_rows_equal_full_passes() -> None:
    prior = two_level()
    grid = prior.grid
    whole = sequences(prior)
    asked = whole.clone()
    for row, rows in enumerate((0, 1, 0, 1, 2)):
        mask = torch.from_numpy(grid.mask(rows, 2))
        asked[row, mask] = K
    sampler: Any = make_sampler(prior)
    sampler.begin(asked)
    rows = torch.arange(B)
    for step in range(40):
        position = sampler.position
        alive = position < grid.n_codes
        if step == 7:
            asked[1] = grid.with_labels(torch.full((grid.n_codes,), K)[None], torch.tensor([2]))[0]
            sampler.rebuild(torch.tensor([1]), asked[1:2])
            continue
        if not alive.any():
            break
        at = position.clamp(max=grid.n_codes - 1)
        expected = prior(asked)[rows, at]
        torch.testing.assert_close(sampler.logits()[alive], expected[alive], atol=1e-12, rtol=0)
        new = torch.randint(K, (B,))
        sampler.advance(new)
        asked[rows[alive], position[alive]] = new[alive]
    assert not alive.any()


@pytest.mark.parametrize("make", [pixelcnn, two_level])
def test_guided_drawing_is_that_of_two_full_passes(make: Any) -> None:
    prior = make()
    labels = LABELS.clamp(max=N - 1)
    asked = prior.grid.with_labels(torch.full((B, prior.grid.n_codes), K), labels)
    sampler: Any = make_sampler(prior, Sampling(guidance=2.5))
    sampler.begin(asked, 0)
    for position in range(prior.grid.n_codes):
        codes, condition = prior.split(asked)
        expected = guided_logits(prior, codes, condition, Sampling(guidance=2.5))[:, position]
        torch.testing.assert_close(sampler.logits(), expected, atol=1e-11, rtol=0)
        asked[:, position] = expected.argmax(1)
        sampler.advance(expected.argmax(1))


def test_training_drops_a_share_of_the_labels() -> None:
    prior = pixelcnn(class_dropout=0.5, dropout=0.0)
    assert prior.conditioning is not None
    labels = torch.zeros(2000, 1, dtype=torch.int64)
    none = prior.conditioning(labels + N)[0]
    assert not (prior.conditioning(labels) == none).all()
    prior.train()
    dropped = (prior.conditioning(labels) == none).flatten(1).all(1).double().mean()
    assert 0.45 < dropped < 0.55


def test_without_classes_there_is_no_trace_of_them() -> None:
    sizes = SIZES | {"classes": 0}
    torch.manual_seed(0)
    one = PixelCNN(K, 3, 4, **sizes)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    del sizes["classes"]
    other = PixelCNN(K, 3, 4, **sizes)
    assert torch.equal(torch.get_rng_state(), state) and "classes" not in one.config
    for name, weights in one.state_dict().items():
        assert torch.equal(weights, other.state_dict()[name])
    assert other.split(torch.zeros(2, 12))[1] is None and one.grid.classes == 0


@pytest.mark.parametrize("make", [pixelcnn, two_level])
def test_a_config_makes_the_same_network_again(make: Any) -> None:
    prior = make()
    again = build_prior(config_of(prior))
    assert config_of(again) == config_of(prior) and again.grid == prior.grid
    assert {n: w.shape for n, w in again.state_dict().items()} == {n: w.shape for n, w in prior.state_dict().items()}


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="classes=-1"):
        PixelCNN(K, 3, 4, **(SIZES | {"classes": -1}))
    with pytest.raises(ConfigError, match="class_dropout=1"):
        PixelCNN(K, 3, 4, class_dropout=1.0, **SIZES)
    prior = pixelcnn()
    with pytest.raises(ConfigError, match=r"its label, 9\.\.12: found 0\.\.0"):
        prior(torch.zeros(1, 13, dtype=torch.int64))
    bottom = PixelCNN(K, 4, 6, condition=(2, 3, K), **(SIZES | {"classes": 2}))
    with pytest.raises(ConfigError, match="the top prior has 3 classes, the bottom one 2"):
        TwoLevelPrior(PixelCNN(K, 2, 3, **SIZES), bottom)
    with pytest.raises(ConfigError, match="a prior of 3 classes; pass codes"):
        make_sampler(two_level()).sample(2)


def test_every_block_gets_gradients_from_the_class() -> None:
    prior = pixelcnn().train()
    maximum_likelihood_loss(prior, sequences(prior)).backward()
    assert prior.conditioning is not None
    grad = next(prior.conditioning.parameters()).grad
    assert grad is not None and np.count_nonzero(grad.abs().sum(1).numpy()) == N + 1
