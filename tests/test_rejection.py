"""Rejection sampling: what is kept, what it costs, and what it does to diversity."""

import numpy as np
import pytest
import torch

from ral_gym.errors import ConfigError
from ral_gym.rewards.scorer import CriticScorer
from ral_gym.runs.storage import load_module
from ral_gym.stages.rejection import classifier_judge, critic_judge, diversity, reject, rejection_sample
from ral_gym.tokenizers.vqvae import VQVAE
from tests.tiny import make_tiny_run


def by_first_code(codes: torch.Tensor) -> torch.Tensor:
    return codes[:, 0].float()


def random_codes(n: int, length: int = 16, size: int = 16) -> torch.Tensor:
    return torch.randint(size, (n, length), generator=torch.Generator().manual_seed(0))


def test_the_best_are_kept_in_order() -> None:
    codes = random_codes(40)
    kept = reject(codes, by_first_code, 0.25, batch_size=7)
    expected = codes[codes[:, 0].argsort(descending=True, stable=True)][:10]
    assert torch.equal(kept.codes, expected) and torch.equal(kept.scores, expected[:, 0].float())
    assert kept.threshold == expected[-1, 0] and kept.samples_per_kept == 4.0
    assert torch.equal(reject(codes.numpy().astype(np.int16), by_first_code, 0.25).codes, expected)


def test_keeping_everything_is_no_rejection() -> None:
    kept = reject(random_codes(20), by_first_code, 1.0)
    assert kept.samples_per_kept == 1.0 and kept.diversity == kept.unfiltered


def test_diversity_is_that_of_all_pairs() -> None:
    codes = random_codes(12, 8, 4)
    pairs = [(codes[i] != codes[j]).float().mean() for i in range(12) for j in range(12) if i != j]
    assert diversity(codes).distance == pytest.approx(float(torch.stack(pairs).mean()))
    assert diversity(codes).codes_used == len(codes.unique()) and diversity(codes).distinct == 1.0
    same = codes[:1].expand(5, -1)
    assert (diversity(same).distance, diversity(same).distinct) == (0.0, 0.2)
    assert diversity(codes[:1]).distance == 0.0


def test_a_judge_with_a_taste_costs_diversity() -> None:
    codes = random_codes(400, 4)
    kept = reject(codes, lambda c: -(c - 3).abs().sum(1).float(), 0.1)
    assert kept.diversity.distance < kept.unfiltered.distance - 0.03
    metrics = kept.metrics()
    assert metrics["distance"] == kept.diversity.distance and metrics["samples_per_kept"] == 10.0
    assert metrics["distance_unfiltered"] == kept.unfiltered.distance


def test_as_many_are_drawn_as_it_takes() -> None:
    asked = []

    def draw(n: int) -> torch.Tensor:
        asked.append(n)
        return random_codes(n)

    for n, share, drawn in [(10, 0.1, 100), (7, 0.3, 24), (5, 1.0, 5), (1, 0.5, 2)]:
        kept = rejection_sample(draw, by_first_code, n, share)
        assert len(kept.codes) == n and asked[-1] == drawn and kept.samples_per_kept == drawn / n


def test_a_critic_and_a_classifier_judge_images(tmp_path) -> None:
    from ral_gym.rewards.critic import PatchCritic

    run = make_tiny_run(tmp_path / "run")
    vqvae = load_module(run / "vqvae.safetensors", VQVAE)
    critic = load_module(run / "critic.safetensors", PatchCritic)
    codes = random_codes(9)
    with torch.no_grad():
        expected = critic(vqvae.decode(codes)).flatten(1).mean(1)
    kept = reject(codes, critic_judge(CriticScorer(vqvae, critic)), 0.34)
    assert torch.allclose(kept.scores, expected.sort(descending=True).values[:3])

    def classifier(images: torch.Tensor) -> torch.Tensor:
        return torch.stack([images.mean((1, 2, 3)) * 20, torch.zeros(len(images))], 1)

    sure = reject(codes, classifier_judge(vqvae, classifier), 0.34)
    with torch.no_grad():
        brightness = vqvae.decode(sure.codes).mean((1, 2, 3)).abs()
        others = vqvae.decode(codes).mean((1, 2, 3)).abs()
    assert 0.5 <= float(sure.threshold) <= 1 and brightness.min() >= others.sort(descending=True).values[3] - 0.01


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(share) -> None:
    with pytest.raises(ConfigError, match="share"):
        reject(random_codes(4), by_first_code, share)
    with pytest.raises(ConfigError, match="share"):
        rejection_sample(random_codes, by_first_code, 4, share)


def test_what_cannot_be_ranked_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one image"):
        reject(random_codes(0), by_first_code, 0.5)
    with pytest.raises(ConfigError, match="not all finite"):
        reject(random_codes(4), lambda codes: torch.full((len(codes),), float("nan")), 0.5)
    with pytest.raises(ConfigError, match="0 samples"):
        rejection_sample(random_codes, by_first_code, 0, 0.5)
