"""Classifier-free guidance, top-k and top-p: the cached samplers against full passes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ral_gym.errors import ConfigError
from ral_gym.priors.drawing import draw, likeliest
from ral_gym.priors.guidance import PLAIN, Sampling, mix
from ral_gym.priors.sampler import CachedSampler, make_sampler, sample_naive
from ral_gym.stages.completion import continue_codes
from ral_gym.stages.pictures import balanced_labels, sample_codes, sequences_to_draw
from tests.sampling import B, K, T, W, small, some_codes, some_uniforms
from tests.test_transformer import N, transformer

STARTS = torch.tensor([0, 7, 3, T - 1, 0])


@pytest.fixture
def prior() -> Any:
    return transformer(classes=N)


@pytest.fixture
def sequences() -> Tensor:
    return torch.cat([some_codes(), K + 2 + torch.tensor([[0], [1], [2], [0], [1]])], 1)


def two_passes(prior: Any, sequences: Tensor, scale: float) -> Tensor:
    """Log-probabilities (B, T, K) of p_c^s p_u^(1-s), normalised: the definition."""
    unlabelled = torch.cat([sequences[:, :-1], torch.full((len(sequences), 1), K + 2 + N)], 1)
    of_class, of_none = prior(sequences).log_softmax(-1), prior(unlabelled).log_softmax(-1)
    return (scale * of_class + (1 - scale) * of_none).log_softmax(-1)


def test_scale_1_changes_no_bit_and_another_does(prior: Any, sequences: Tensor) -> None:
    plain = CachedSampler(prior).sample(codes=sequences, uniforms=some_uniforms())
    one = CachedSampler(prior, Sampling(guidance=1.0)).sample(codes=sequences, uniforms=some_uniforms())
    two = CachedSampler(prior, Sampling(guidance=2.0)).sample(codes=sequences, uniforms=some_uniforms())
    assert torch.equal(plain[0], one[0]) and torch.equal(plain[1], one[1])
    assert not torch.equal(plain[0], two[0])


@pytest.mark.parametrize("scale", [0.0, 1.5, 4.0])
@pytest.mark.parametrize("cutoff", [None, 6])
def test_cached_draws_equal_full_passes_from_mixed_starts(
    prior: Any, sequences: Tensor, scale: float, cutoff: int | None
) -> None:
    sampling = Sampling(guidance=scale, cutoff=cutoff)
    arguments: dict[str, Any] = {"codes": sequences, "start": STARTS, "uniforms": some_uniforms()}
    codes, log_probs = CachedSampler(prior, sampling).sample(**arguments)
    naive, naive_log_probs = sample_naive(prior, sampling=sampling, **arguments)
    assert torch.equal(codes, naive)
    torch.testing.assert_close(log_probs, naive_log_probs, rtol=0, atol=1e-12)
    # The returned log-probabilities are those of the definition.
    drawn = torch.cat([codes, sequences[:, -1:]], 1)
    expected = two_passes(prior, drawn, scale)
    expected[:, cutoff or T :] = two_passes(prior, drawn, 1.0)[:, cutoff or T :]
    expected = expected.gather(2, codes[..., None])[..., 0].masked_fill(torch.arange(T) < STARTS[:, None], 0)
    torch.testing.assert_close(log_probs, expected, rtol=0, atol=1e-10)


def test_greedy_drawing_equals_a_two_pass_reference(prior: Any, sequences: Tensor) -> None:
    greedy, _ = CachedSampler(prior, Sampling(guidance=2.0, top_k=1)).sample(codes=sequences, uniforms=some_uniforms())
    reference = sequences.clone()
    for position in range(T):
        reference[:, position] = two_passes(prior, reference, 2.0)[:, position].argmax(-1)
    assert torch.equal(greedy, reference[:, :-1])


def test_code_by_code_mixes_likewise_also_after_a_rebuild(prior: Any, sequences: Tensor) -> None:
    scale, cutoff = 2.5, 9
    sampler = make_sampler(prior, Sampling(guidance=scale, cutoff=cutoff))
    codes, position = sequences.clone(), STARTS.clone()
    sampler.begin(codes, position)
    for step in range(T + 1):
        if step == W:  # two rows restart with other labels
            rows, at = torch.tensor([3, 1]), torch.tensor([2, 0])
            codes[rows], position[rows] = codes[rows].flip(0), at
            sampler.rebuild(rows, codes[rows], at)
        alive = position < T
        rows, at = torch.arange(B)[alive], position[alive]
        expected = torch.where(
            (at < cutoff)[:, None], two_passes(prior, codes, scale)[rows, at], two_passes(prior, codes, 1.0)[rows, at]
        )
        found = sampler.logits()[alive].log_softmax(-1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        new = torch.randint(K, (B,), generator=torch.Generator().manual_seed(step))
        sampler.advance(new)
        codes[rows, at] = new[alive]
        position[alive] += 1


def test_a_prior_without_a_cache_is_guided_too(sequences: Tensor) -> None:
    class Own(type(transformer())):  # type: ignore[misc]
        def features(self, codes: Tensor, condition: Tensor | None = None) -> Tensor:
            return super().features(codes, condition)

    torch.manual_seed(0)
    own = transformer(classes=N)
    own.__class__ = Own
    arguments: dict[str, Any] = {"codes": sequences, "start": STARTS, "uniforms": some_uniforms()}
    sampling = Sampling(guidance=2.0)
    found = CachedSampler(own, sampling).sample(**arguments)
    expected = CachedSampler(transformer(classes=N), sampling).sample(**arguments)
    assert torch.equal(found[0], expected[0])


# ------------------------------------------------------------------------------------------------- top-k and top-p


def test_top_k_and_top_p_keep_the_fewest_likeliest_codes() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.15, 0.05]]).log()
    assert likeliest(logits, 2, 1.0).isfinite().tolist() == [[False, True, False, True], [True, False, True, False]]
    assert likeliest(logits, 0, 0.69).isfinite().tolist() == [[False, True, False, True], [True] + [False] * 3]
    assert likeliest(logits, 0, 0.71).isfinite().tolist() == [[False, True, True, True], [True, False, True, False]]
    # Top-p counts within what top-k has kept: 0.4 / 0.7 = 0.57 of the first row, 0.7 / 0.85 = 0.82 of the second.
    both = likeliest(logits, 2, 0.6).isfinite().tolist()
    assert both == [[False, True, False, True], [True, False, False, False]]
    assert likeliest(logits, 0, 1e-9).isfinite().sum(1).tolist() == [1, 1]


def test_log_probabilities_are_those_of_the_codes_that_are_left() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log().expand(1000, 4)
    codes, log_probs = draw(logits, torch.linspace(0, 1, 1000), top_k=2)
    assert set(codes.tolist()) == {1, 3}
    expected = torch.where(codes == 1, 4 / 7, 3 / 7).log()
    torch.testing.assert_close(log_probs, expected)


@pytest.mark.parametrize("sampling", [Sampling(top_k=3), Sampling(top_p=0.5), Sampling(top_k=5, top_p=0.7)])
def test_priors_without_classes_draw_with_top_k_and_top_p(sampling: Sampling) -> None:
    prior = small()
    codes, log_probs = CachedSampler(prior, sampling).sample(B, uniforms=some_uniforms())
    naive, naive_log_probs = sample_naive(prior, B, sampling=sampling, uniforms=some_uniforms())
    assert torch.equal(codes, naive)
    torch.testing.assert_close(log_probs, naive_log_probs, rtol=0, atol=1e-10)
    kept = likeliest(prior(codes).flatten(0, 1), sampling.top_k, sampling.top_p)  # (B T, K)
    assert kept.gather(1, codes.flatten()[:, None]).isfinite().all()


# ------------------------------------------------------------------------------------------------------ refusals


def test_guidance_of_a_prior_that_cannot_be_guided_is_one_line(prior: Any) -> None:
    with pytest.raises(ConfigError, match="needs a prior with classes, this PixelCNN has none"):
        make_sampler(small(), Sampling(guidance=2.0))
    prior.null_class = False
    with pytest.raises(ConfigError, match="3 classes and no null class"):
        make_sampler(prior, Sampling(guidance=2.0))
    with pytest.raises(ConfigError, match="no null class"):
        sample_naive(prior, B, sampling=Sampling(guidance=2.0))


def test_guidance_without_labels_is_one_line(prior: Any) -> None:
    with pytest.raises(ConfigError, match="guidance needs labels"):
        make_sampler(prior, Sampling(guidance=2.0)).sample(B)


def test_an_own_sampler_without_settings_is_told(prior: Any) -> None:
    prior.make_sampler = lambda: CachedSampler(prior)
    assert make_sampler(prior).prior is prior
    with pytest.raises(ConfigError, match="cannot draw with guidance 2"):
        make_sampler(prior, Sampling(guidance=2.0))


@pytest.mark.parametrize(
    "arguments",
    [
        {"guidance": -1.0},
        {"guidance": float("nan")},
        {"guidance": 2.0, "cutoff": -1},
        {"cutoff": 3},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
    ],
)
def test_settings_out_of_range_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="give"):
        Sampling(**arguments)


def test_settings_describe_themselves() -> None:
    assert PLAIN.describe() == ""
    assert Sampling(2.0, 5, 100, 0.9).describe() == "guidance 2, for 5 codes, top-k 100, top-p 0.9"


def test_mix_is_exact_at_0_and_moves_away_from_no_class_above_1() -> None:
    of_class, of_none = torch.randn(2, 4, 3).unbind()
    assert torch.equal(mix(of_class, of_none, 0.0), of_none)
    torch.testing.assert_close(mix(of_class, of_none, 3.0), of_class + 2 * (of_class - of_none))


# ------------------------------------------------------------------------------------------------ whole images


def test_labels_of_drawn_images_are_balanced_and_reach_the_sampler(prior: Any) -> None:
    assert balanced_labels(5, 3).tolist() == [0, 1, 2, 0, 1]
    sequences = sequences_to_draw(prior, 5)
    assert sequences is not None and prior.grid.labels_of(sequences).tolist() == [0, 1, 2, 0, 1]
    assert sequences_to_draw(small(), 5) is None
    sampling = Sampling(guidance=2.0)
    drawn = sample_codes(prior, 5, seed=3, sampling=sampling)
    expected = CachedSampler(prior, sampling).sample(codes=sequences, generator=torch.Generator().manual_seed(3))[0]
    assert torch.equal(drawn, expected)
    assert not torch.equal(drawn, sample_codes(prior, 5, seed=3, sampling=sampling, labels=torch.full((5,), 2)))
    with pytest.raises(ConfigError, match="without classes"):
        sample_codes(small(), 5, seed=3, labels=torch.zeros(5, dtype=torch.int64))


def test_completions_are_guided_too(prior: Any) -> None:
    given, uniforms, sampling = some_codes(2 * W), some_uniforms(), Sampling(guidance=2.0)
    labels = torch.tensor([2, 0, 1, 1, 0])
    found = continue_codes(prior, given, uniforms, 1.0, sampling, labels)
    codes = torch.cat([given, torch.full((B, T - 2 * W), K), K + 2 + labels[:, None]], 1)
    expected = sample_naive(prior, codes=codes, start=2 * W, sampling=sampling, uniforms=uniforms)[0]
    assert torch.equal(found, expected)
    assert not torch.equal(found, continue_codes(prior, given, uniforms, 1.0, labels=labels))
