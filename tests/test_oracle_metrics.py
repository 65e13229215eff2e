"""Distances between a model and its oracle, and diversity: against full enumeration and by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ral_gym.errors import ConfigError
from ral_gym.metrics import (
    hamming_distance,
    oracle_metrics,
    sequence_kl,
)
from ral_gym.metrics.divergences import cross_entropy, jsd, kl, total_variation
from ral_gym.priors.pixelcnn import PixelCNN

K, T = 3, 4
GRIDS = torch.tensor(list(itertools.product(range(K), repeat=T)))  # (81, T)


def random_pixelcnn(seed: int, scale: float = 0.5) -> PixelCNN:
    """On a 2 x 2 grid of 3 codes, far from uniform."""
    torch.manual_seed(seed)
    network = PixelCNN(K, 2, 2, hidden_units=8, residual_units=8, layers=2, conv_filter_size=3, output_stack_layers=1)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=scale)
    return network.eval()


@torch.no_grad()
def enumerate_all(p: PixelCNN, q: PixelCNN) -> dict[str, float]:
    """The figures from the probabilities of all 81 grids, whose definitions know nothing of positions (but one)."""
    log_p, log_q = (
        n(GRIDS).double().log_softmax(-1).gather(2, GRIDS[:, :, None]).squeeze(2).sum(1) for n in (p, q)
    )  # (81,)
    p_all, q_all = log_p.exp(), log_q.exp()
    assert float(p_all.sum()) == pytest.approx(1)
    mixture = (p_all + q_all) / 2
    per_code = 0.0
    for weights in (p_all, q_all):
        for weight, a, b in zip(weights, p(GRIDS).double().softmax(-1), q(GRIDS).double().softmax(-1), strict=True):
            middle = (a + b) / 2
            per_code += float(weight * ((a * (a / middle).log()).sum() + (b * (b / middle).log()).sum())) / 4 / T
    return {
        "nll_oracle": -float(p_all @ log_q) / T,
        "nll_test": -float(q_all @ log_p) / T,
        "entropy": -float(p_all @ log_p) / T,
        "entropy_oracle": -float(q_all @ log_q) / T,
        "kl_model_oracle": float(p_all @ (log_p - log_q)) / T,
        "kl_oracle_model": float(q_all @ (log_q - log_p)) / T,
        "jsd": float(p_all @ (p_all / mixture).log() + q_all @ (q_all / mixture).log()) / 2,
        "jsd_per_code": per_code,
    }


@torch.no_grad()
def draw(network: PixelCNN, n: int, seed: int) -> Tensor:
    log_p = network(GRIDS).double().log_softmax(-1).gather(2, GRIDS[:, :, None]).squeeze(2).sum(1)  # (81,)
    generator = torch.Generator().manual_seed(seed)
    return GRIDS[torch.multinomial(log_p.exp(), n, replacement=True, generator=generator)]


def test_every_figure_agrees_with_full_enumeration():
    model, oracle = random_pixelcnn(1), random_pixelcnn(2)
    measured = oracle_metrics(model, oracle, draw(model, 40_000, 0), draw(oracle, 40_000, 1), batch_size=3000)
    expected = enumerate_all(model, oracle)
    assert set(measured) == set(expected)
    for name, estimate in measured.items():
        assert 0 < estimate.standard_error < 0.01 * expected[name], name
        assert abs(estimate.value - expected[name]) < 4 * estimate.standard_error, name
        assert estimate.low == pytest.approx(estimate.value - 1.96 * estimate.standard_error, rel=1e-3)
        assert estimate.n == 40_000
    assert len({round(value, 2) for value in expected.values()}) >= 7  # else a mix-up would not be seen


def test_standard_errors_are_those_of_repeated_sampling():
    model, oracle = random_pixelcnn(1), random_pixelcnn(2)
    runs = [oracle_metrics(model, oracle, draw(model, 300, s), draw(oracle, 200, s + 500)) for s in range(120)]
    for name in runs[0]:
        spread = np.std([run[name].value for run in runs], ddof=1)
        assert np.mean([run[name].standard_error for run in runs]) == pytest.approx(spread, rel=0.2), name


def test_the_identities_of_kl_hold_sample_by_sample():
    model, oracle = random_pixelcnn(1), random_pixelcnn(2)
    drawn = draw(model, 50, 0)
    figures = {n: e.value for n, e in oracle_metrics(model, oracle, drawn, draw(oracle, 60, 1).numpy()).items()}
    assert figures["kl_model_oracle"] == pytest.approx(figures["nll_oracle"] - figures["entropy"], rel=1e-9)
    assert figures["kl_oracle_model"] == pytest.approx(figures["nll_test"] - figures["entropy_oracle"], rel=1e-9)
    assert figures["kl_model_oracle"] == pytest.approx(sequence_kl(model, oracle, drawn), rel=1e-9)


def test_a_model_that_is_the_oracle():
    oracle = random_pixelcnn(2)
    measured = oracle_metrics(oracle, oracle, draw(oracle, 200, 0), draw(oracle, 200, 1))
    for name in ("kl_model_oracle", "kl_oracle_model", "jsd", "jsd_per_code"):
        assert measured[name].value == pytest.approx(0, abs=1e-12)
    assert measured["nll_oracle"].value == measured["entropy"].value


def test_sequence_jsd_saturates_where_the_per_code_one_does_not():
    """Grids of 600 codes have probabilities of e^-400; the sequences are told apart, single codes hardly."""
    p, q = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.3, 0.5, 0.2]).log()
    drawn = [
        torch.multinomial(log.exp().expand(100, 3), 600, replacement=True, generator=torch.Generator().manual_seed(i))
        for i, log in enumerate((p, q))
    ]
    measured = oracle_metrics(lambda c: p.expand(*c.shape, 3), lambda c: q.expand(*c.shape, 3), *drawn)
    assert measured["jsd"].value == pytest.approx(math.log(2), rel=1e-3)
    assert measured["jsd"].high <= math.log(2)
    assert measured["jsd_per_code"].value == pytest.approx(float(jsd(p.double(), q.double())), rel=1e-6)
    assert measured["jsd_per_code"].value < 0.05


def test_forbidden_codes():
    """0 log 0 is 0; what the oracle rules out and the model draws is infinitely far, but only one way."""
    masked = torch.tensor([0.0, 0.0, -torch.inf])
    p, q = (lambda c: masked.expand(*c.shape, 3)), (lambda c: torch.zeros(*c.shape, 3))
    codes = torch.tensor([[0, 1], [1, 1], [0, 0]])
    measured = oracle_metrics(p, q, codes, codes)
    assert measured["kl_model_oracle"].value == pytest.approx(math.log(3 / 2))
    assert measured["kl_oracle_model"].value == math.inf
    assert measured["entropy"].value == pytest.approx(math.log(2))
    assert sequence_kl(p, q, codes) == pytest.approx(math.log(3 / 2))


# --- divergences of one position


def test_divergences_by_hand():
    p, q = [0.7, 0.2, 0.1, 0.0], [0.1, 0.3, 0.5, 0.1]
    log_p, log_q = torch.tensor(p).double().log(), torch.tensor(q).double().log()
    by_hand = lambda a, b: sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)  # noqa: E731
    middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    approx = lambda value: pytest.approx(value, rel=1e-6)  # noqa: E731
    assert float(kl(log_p, log_q)) == approx(by_hand(p, q))
    assert float(kl(log_q, log_p)) == math.inf
    assert float(jsd(log_p, log_q)) == approx((by_hand(p, middle) + by_hand(q, middle)) / 2)
    assert float(total_variation(log_p, log_q)) == approx(0.6)
    assert float(cross_entropy(log_p, log_q)) == approx(
        -sum(x * math.log(y) for x, y in zip(p, q, strict=True) if x > 0)
    )
    certain = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]]).double()
    assert float(jsd(certain[0], certain[1])) == approx(math.log(2))
    assert float(total_variation(certain[0], certain[1])) == 1


# --- diversity


def test_hamming_distance_equals_brute_force():
    codes = torch.randint(0, 4, (30, 7), generator=torch.Generator().manual_seed(0))
    codes[5] = codes[6]
    pairs = [(a != b).double().mean() for a, b in itertools.combinations(codes, 2)]
    assert hamming_distance(codes.to(torch.int16)).value == pytest.approx(float(np.mean(pairs)), rel=1e-12)
    assert hamming_distance(codes[5:7]).value == 0
    assert hamming_distance(torch.stack([codes[0], codes[0] + 1])).value == 1
    with pytest.raises(ConfigError, match="at least two"):
        hamming_distance(codes[:1])


def test_errors_of_pairwise_means_are_those_of_repeated_sampling():
    drawn = [torch.randint(0, 3, (60, 2)) * torch.randint(0, 2, (60, 1)) for _ in range(300)]
    estimates = [hamming_distance(codes) for codes in drawn]
    spread = np.std([e.value for e in estimates], ddof=1)
    assert np.mean([e.standard_error for e in estimates]) == pytest.approx(spread, rel=0.2)
