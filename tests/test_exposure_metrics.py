"""Exposure bias: against sums over all sequences, with nothing left to chance, and none where there is none."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from torch import Tensor

from ral_gym.errors import ConfigError
from ral_gym.grid import CodeGrid
from ral_gym.metrics import (
    as_lists,
    corrupt,
    corruption_response,
    divergences,
    exposure_bias,
    half_life,
    prefix_curve,
)
from ral_gym.priors.sampler import CachedSampler
from tests.sampling import small

K, T = 3, 4
SEQUENCES = list(itertools.product(range(K), repeat=T))
CODES = torch.tensor(SEQUENCES)  # (81, T)
GRID = CodeGrid(2, 2, K)


class Table:
    """p(x_t | x_t-1, x_t-2) in eighths: a sample with each sequence 8^T p times *is* the distribution."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        eighths = [torch.tensor(q) for q in itertools.product(range(1, 7), repeat=K) if sum(q) == 8]
        pick = torch.randint(0, len(eighths), (K + 1, K + 1), generator=generator)
        self.probs = (torch.stack(eighths)[pick] / 8).double()  # (K + 1, K + 1, K), the last index: no code yet

    def logits(self, codes: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(codes, (2, 0), value=K)  # (B, T + 2)
        return self.probs[padded[:, 1:-1], padded[:, :-2]].log()  # (B, T, K)

    def log_prob(self, codes: Tensor) -> Tensor:
        return self.logits(codes).gather(2, codes[:, :, None]).squeeze(2).sum(1)

    def exact_sample(self) -> Tensor:
        sample = CODES.repeat_interleave((self.log_prob(CODES).exp() * 8**T).round().long(), 0)
        assert len(sample) == 8**T
        return sample

    def sample(self, *, codes: Tensor, prefix_rows: int, uniforms: Tensor | None, generator: torch.Generator | None):
        codes = codes.clone()
        for t in range(2 * prefix_rows, T):
            uniform = torch.rand(len(codes), generator=generator) if uniforms is None else uniforms[:, t]
            codes[:, t] = (uniform[:, None] > self.logits(codes)[:, t].exp().cumsum(-1)).sum(-1)
        return codes, torch.zeros(codes.shape)


MODEL, ORACLE = Table(1), Table(2)


def expected_kl(prefixes_of: Table) -> list[float]:
    """E KL(o || p) at every position, by a loop over all sequences and codes."""
    result = [0.0] * T
    for sequence in SEQUENCES:
        codes = torch.tensor([sequence])
        weight = float(prefixes_of.log_prob(codes).exp())
        p, o = MODEL.logits(codes)[0].exp().tolist(), ORACLE.logits(codes)[0].exp().tolist()
        for t in range(T):
            result[t] += weight * sum(b * math.log(b / a) for a, b in zip(p[t], o[t], strict=True))
    return result


def measured(model: Table = MODEL, oracle: Table = ORACLE):
    return exposure_bias(model.logits, oracle.logits, model.exact_sample(), oracle.exact_sample(), batch_size=100)


def test_kl_curves_and_ratios_equal_the_sums_over_all_sequences():
    on_model, on_oracle = expected_kl(MODEL), expected_kl(ORACLE)
    bias = measured()
    assert bias.on_model["kl"].mean.tolist() == pytest.approx(on_model)
    assert bias.on_oracle["kl"].mean.tolist() == pytest.approx(on_oracle)
    ratios = [a / b for a, b in zip(on_model, on_oracle, strict=True)]
    assert bias.ratio["kl"].mean.tolist() == pytest.approx(ratios)
    assert max(abs(ratio - 1) for ratio in ratios) > 0.05  # else nothing is tested
    growth = [sum(on_model[:n]) / sum(on_oracle[:n]) for n in range(1, T + 1)]
    assert bias.accumulated.mean.tolist() == pytest.approx([n * g for n, g in enumerate(growth, 1)])
    assert bias.excess.mean.tolist() == pytest.approx([100 * (g - 1) for g in growth], abs=1e-9)
    assert bias.gap.value == pytest.approx((sum(on_model) - sum(on_oracle)) / T)


def test_all_measures_equal_the_definitions():
    values = divergences(MODEL.logits, ORACLE.logits, CODES, batch_size=7)
    p, o = MODEL.logits(CODES).exp(), ORACLE.logits(CODES).exp()
    middle = (p + o) / 2
    torch.testing.assert_close(values["kl"], (o * (o / p).log()).sum(-1))
    torch.testing.assert_close(values["jsd"], ((p * (p / middle).log()) + (o * (o / middle).log())).sum(-1) / 2)
    torch.testing.assert_close(values["tv"], (p - o).abs().sum(-1) / 2)
    bias = measured()
    for name in ("jsd", "tv"):
        means = [
            (table.log_prob(CODES).exp()[:, None] * values[name]).sum(0) for table in (MODEL, ORACLE)
        ]  # weighted by the probability of every sequence
        torch.testing.assert_close(bias.on_model[name].mean, means[0])
        torch.testing.assert_close(bias.ratio[name].mean, means[0] / means[1])


def test_the_first_position_has_no_exposure_bias():
    bias = measured()
    for ratio in bias.ratio.values():
        assert float(ratio.mean[0]) == pytest.approx(1)
        assert float(ratio.error[0]) == pytest.approx(0, abs=1e-9)


def test_the_oracle_itself_has_no_exposure_bias():
    bias = measured(ORACLE, ORACLE)
    for name in ("kl", "jsd", "tv"):
        assert bias.ratio[name].mean.tolist() == [1] * T
        assert bias.ratio[name].error.tolist() == [0] * T
        assert bias.on_model[name].mean.tolist() == pytest.approx([0] * T, abs=1e-12)
    assert bias.accumulated.mean.tolist() == [1, 2, 3, 4]
    assert bias.excess.mean.tolist() == [0] * T
    assert bias.gap.value == pytest.approx(0, abs=1e-12)


def test_errors_of_ratios_are_those_of_repeated_sampling():
    own, given = MODEL.exact_sample(), ORACLE.exact_sample()
    generator = torch.Generator().manual_seed(0)
    pick = lambda codes, n: codes[torch.randint(len(codes), (n,), generator=generator)]  # noqa: E731
    runs = [exposure_bias(MODEL.logits, ORACLE.logits, pick(own, 300), pick(given, 150)) for _ in range(200)]
    for of in (lambda b: b.ratio["kl"], lambda b: b.excess, lambda b: b.accumulated, lambda b: b.on_model["jsd"]):
        spread = torch.stack([of(run).mean for run in runs]).std(0)
        error = torch.stack([of(run).error for run in runs]).mean(0)
        torch.testing.assert_close(error[1:], spread[1:], rtol=0.25, atol=0)
    spread = torch.tensor([run.gap.value for run in runs]).std()
    assert runs[0].gap.standard_error == pytest.approx(float(spread), rel=0.25)


def test_results_fit_into_a_json_file():
    saved = json.loads(json.dumps(as_lists(measured())))
    assert saved["ratio"]["kl"]["mean"] == measured().ratio["kl"].mean.tolist()
    assert saved["gap"]["n"] == 8**T
    assert as_lists({"half_life": math.nan, "rows": [0, 1], "curve": torch.tensor([1.5, math.inf])}) == {
        "half_life": None,
        "rows": [0, 1],
        "curve": [1.5, None],
    }


# --- given prefixes


def test_the_prefix_curve_equals_the_sums_over_all_completions():
    """p(x) = o(first r rows) p(the others | them), summed over all sequences."""
    prefixes = ORACLE.exact_sample().repeat(25, 1)
    curve = prefix_curve(
        MODEL.logits, ORACLE.logits, MODEL, prefixes, GRID, batch_size=9000, generator=torch.Generator().manual_seed(0)
    )
    log_p, log_o = (table.logits(CODES).gather(2, CODES[:, :, None]).squeeze(2) for table in (MODEL, ORACLE))  # (81, T)
    assert curve.rows == [0, 1]
    for row in curve.rows:
        drawn = slice(2 * row, T)
        weights = (log_o[:, : 2 * row].sum(1) + log_p[:, drawn].sum(1)).exp()  # (81,)
        of_oracle = log_o.sum(1).exp()
        count = T - 2 * row
        for name, expected in {
            "nll": -weights @ log_o[:, drawn].sum(1) / count,
            "oracle_nll": -of_oracle @ log_o[:, drawn].sum(1) / count,
            "kl": weights @ (log_p - log_o)[:, drawn].sum(1) / count,
            "kl_given": of_oracle @ divergences(ORACLE.logits, MODEL.logits, CODES)["kl"][:, drawn].sum(1) / count,
        }.items():
            figure = getattr(curve, name)
            assert float(figure.error[row]) < 0.01
            assert abs(float(figure.mean[row] - expected)) < 4 * float(figure.error[row]) + 1e-9, (name, row)
    torch.testing.assert_close(curve.excess.mean, curve.nll.mean - curve.oracle_nll.mean)
    assert (curve.excess.error <= curve.nll.error + curve.oracle_nll.error).all()
    torch.testing.assert_close(curve.harm.mean, curve.kl.mean - curve.kl_given.mean)
    assert float(curve.harm.mean[0].abs()) > 10 * float(curve.harm.error[0])  # else nothing is tested


def test_the_oracle_completes_as_well_as_itself():
    curve = prefix_curve(ORACLE.logits, ORACLE.logits, ORACLE, ORACLE.exact_sample(), GRID)
    assert curve.kl.mean.tolist() == curve.harm.mean.tolist() == [0, 0]
    assert (curve.excess.mean.abs() < 4 * curve.excess.error).all()
    with pytest.raises(ConfigError, match="0 to 1 of the 2 rows"):
        prefix_curve(ORACLE.logits, ORACLE.logits, ORACLE, CODES, GRID, rows=[2])


def test_pixelcnns_and_cached_samplers_fit_in():
    """The real classes: the prefix stays, the rest is drawn, and the oracle has a KL of 0 from itself."""
    prior = small()
    grid, sampler = prior.grid, CachedSampler(prior)
    codes = sampler.sample(12, generator=torch.Generator().manual_seed(0))[0]
    arguments = {"sampler": sampler, "generator": torch.Generator().manual_seed(1)}
    with torch.no_grad():
        curve = prefix_curve(prior, prior, oracle_codes=codes, grid=grid, rows=[0, 2, 3], **arguments)
        response = corruption_response(
            prior, prior, codes, grid, fraction=0.5, prefix_rows=2, batch_size=5, **arguments
        )
    assert curve.n == 12
    assert curve.kl.mean.tolist() == pytest.approx([0, 0, 0], abs=1e-12)
    assert response.bump.mean.shape == (2 * grid.width,)
    assert response.replaced == grid.width


# --- corrupted prefixes


@pytest.mark.parametrize(("fraction", "count"), [(0.01, 1), (0.5, 4), (1.0, 8)])
def test_corrupt_replaces_that_many_codes_by_others(fraction, count):
    codes = torch.randint(0, 5, (4000, 12))
    broken = corrupt(codes, fraction, 5, start=2, stop=10, generator=torch.Generator().manual_seed(0))
    changed = broken != codes
    assert (changed.sum(1) == count).all()
    assert not changed[:, :2].any()
    assert not changed[:, 10:].any()
    torch.testing.assert_close(
        changed[:, 2:10].double().mean(0), torch.full((8,), count / 8).double(), rtol=0, atol=0.04
    )
    assert int(broken.min()) == 0
    assert int(broken.max()) == 4
    shift = torch.bincount(((broken - codes) % 5)[changed], minlength=5) / changed.sum()
    torch.testing.assert_close(shift, torch.tensor([0, 0.25, 0.25, 0.25, 0.25]), rtol=0, atol=0.03)


def test_corrupt_refuses_what_makes_no_sense():
    for arguments in ({"fraction": 0.0}, {"fraction": 1.1}, {"fraction": 0.5, "start": 3, "stop": 3}):
        with pytest.raises(ConfigError, match="fraction in"):
            corrupt(CODES, codebook_size=K, **arguments)


def test_corruption_response_equals_the_sum_over_all_corruptions():
    """All codes of the first row replaced, the rest as it was: four equally likely corruptions of each sequence."""
    response = corruption_response(
        MODEL.logits, ORACLE.logits, ORACLE.exact_sample().repeat(20, 1), GRID, fraction=1, prefix_rows=1,
        batch_size=20_000, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    weights = ORACLE.log_prob(CODES).exp()[:, None]  # (81, 1)
    clean = divergences(MODEL.logits, ORACLE.logits, CODES)["kl"][:, 2:]  # (81, 2)
    broken = []
    for shift in itertools.product((1, 2), repeat=2):
        codes = (CODES + torch.tensor([*shift, 0, 0])) % K
        broken.append(divergences(MODEL.logits, ORACLE.logits, codes)["kl"][:, 2:])
    corrupted = torch.stack(broken).mean(0)
    torch.testing.assert_close(response.clean.mean, (weights * clean).sum(0))
    for curve, values in ((response.corrupted, corrupted), (response.bump, corrupted - clean)):
        expected = (weights * values).sum(0)
        assert float(curve.error.max()) < 0.002
        assert ((curve.mean - expected).abs() < 4 * curve.error).all()
    assert response.replaced == 2
    assert response.area.value == pytest.approx(float(response.bump.mean.sum()))


def test_only_the_window_is_corrupted_and_the_sampler_continues_it():
    """A model with a memory of one code: behind the first code drawn again, clean and corrupted images are the same."""
    markov = Table(1)
    markov.probs = markov.probs[:, :1].expand(-1, K + 1, -1)
    grid = CodeGrid(2, 2, K)
    arguments = {"fraction": 1, "prefix_rows": 1, "generator": torch.Generator().manual_seed(0)}
    codes = ORACLE.exact_sample()
    kept = corruption_response(markov.logits, markov.logits, codes, grid, **arguments)
    assert kept.bump.mean.tolist() == [0, 0]
    assert math.isnan(kept.half_life)
    other = Table(1)
    other.probs = markov.probs.flip(2)
    kept = corruption_response(markov.logits, other.logits, codes, grid, **arguments, window=1)
    assert kept.replaced == 1
    assert float(kept.bump.mean[0]) != 0
    assert float(kept.bump.mean[1]) == 0
    drawn = corruption_response(markov.logits, other.logits, codes, grid, **arguments, window=1, sampler=markov)
    assert float(drawn.bump.mean[1]) != 0  # what the model draws behind the mistake differs
    with pytest.raises(ConfigError, match="one level"):
        corruption_response(markov.logits, markov.logits, codes, CodeGrid(2, 2, K, 2), **arguments)
    with pytest.raises(ConfigError, match="prefix_rows 2: give 1 to 1"):
        corruption_response(markov.logits, markov.logits, codes, grid, fraction=1, prefix_rows=2)


def test_the_same_uniforms_continue_clean_and_corrupted_prefixes():
    """A model without memory draws the same codes behind both, so that only the first one is judged differently."""
    blind, judge = Table(1), Table(1)
    blind.probs = blind.probs[:1, :1].expand(K + 1, K + 1, -1)
    judge.probs = judge.probs[:, :1].expand(-1, K + 1, -1)
    response = corruption_response(
        blind.logits, judge.logits, CODES, GRID, fraction=1, prefix_rows=1, window=1, sampler=blind
    )
    assert float(response.bump.mean[0]) != 0
    assert float(response.bump.mean[1]) == 0


def test_a_bump_within_its_noise_has_no_half_life():
    seen = set()
    for seed in range(60):
        response = corruption_response(
            MODEL.logits, ORACLE.logits, CODES[seed : seed + 9], GRID, fraction=0.5, prefix_rows=1,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        clear = response.area.value > 2 * response.area.standard_error
        assert math.isnan(response.half_life) != clear
        if clear:
            assert response.half_life == half_life(response.bump.mean)
        seen.add((clear, response.area.value > 0))
    assert seen == {(True, True), (False, True), (False, False)}


def test_half_life_of_an_exponential():
    for expected in (3.0, 8.0):
        bump = 0.7 * 0.5 ** (torch.arange(400) / expected)
        assert half_life(bump) == pytest.approx(expected, rel=0.01)
    assert half_life(torch.tensor([0.0, 4.0, 0.0])) == 1.5
    assert half_life(torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 1.0])) == 1
    assert math.isnan(half_life(torch.tensor([0.1, -0.2])))
