"""Score map -> rewards, worked out by hand."""

import pytest
import torch
from torch import Tensor, nn

from ral_gym.rewards.score_map import ScoreNormalizer, step_rewards
from ral_gym.rewards.scorer import CriticScorer
from ral_gym.tokenizers.vqvae import VQVAE

MAP = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[-1.0, 0.0], [0.0, 5.0]]])  # (2, 2, 2)


def test_single_gives_the_mean_score_at_the_last_code() -> None:
    rewards = step_rewards(MAP, rows=4, width=4, reward="single")
    assert rewards.shape == (2, 16)
    assert rewards[:, -1].tolist() == [2.5, 1.0] and not rewards[:, :-1].any()


def test_single_with_fewer_rows_gives_it_at_the_last_code_drawn() -> None:
    rewards = step_rewards(MAP[:, :1], rows=2, width=4, reward="single")
    assert rewards.shape == (2, 8)
    assert rewards[:, -1].tolist() == [1.5, -0.5] and not rewards[:, :-1].any()


def test_intermediate_gives_every_code_the_score_of_its_patch() -> None:
    rewards = step_rewards(MAP, rows=4, width=4, reward="intermediate")
    assert rewards[0].reshape(4, 4).tolist() == [
        [1.0, 1.0, 2.0, 2.0],
        [1.0, 1.0, 2.0, 2.0],
        [3.0, 3.0, 4.0, 4.0],
        [3.0, 3.0, 4.0, 4.0],
    ]
    assert step_rewards(MAP, 2, 2, "intermediate").tolist() == MAP.flatten(1).tolist()


def test_intermediate_with_fewer_rows_keeps_patches_in_place() -> None:
    rewards = step_rewards(MAP[:, :1], rows=2, width=4, reward="intermediate")
    assert rewards[0].tolist() == [1.0, 1.0, 2.0, 2.0, 1.0, 1.0, 2.0, 2.0]
    # The same as the first rows of the whole image's.
    assert torch.equal(rewards, step_rewards(MAP, 4, 4, "intermediate")[:, :8])


def test_intermediate_averages_the_patches_inside_a_code() -> None:
    fine = torch.arange(16.0).reshape(1, 4, 4)
    assert step_rewards(fine, 2, 2, "intermediate").tolist() == [[2.5, 4.5, 10.5, 12.5]]
    assert step_rewards(fine[:, :2], 1, 2, "intermediate").tolist() == [[2.5, 4.5]]
    # No score is lost or counted twice, whichever of the two is finer.
    for rows, width in ((4, 4), (2, 2), (8, 8), (1, 1)):
        assert step_rewards(fine, rows, width, "intermediate").mean() == fine.mean()


REAL, FAKE = torch.tensor([[[1.0, 2.0]], [[3.0, 2.0]]]), torch.tensor([[[-4.0, 0.0]], [[0.0, 4.0]]])


def test_max_abs_divides_by_the_largest_score_of_both_sets() -> None:
    normalizer = ScoreNormalizer("max_abs").fit(REAL, FAKE)
    assert (normalizer.shift, normalizer.scale) == (0.0, 4.0)
    assert normalizer(REAL).tolist() == [[[0.25, 0.5]], [[0.75, 0.5]]]
    assert ScoreNormalizer("max_abs").fit(REAL, FAKE * 0).scale == 3.0


def test_max_abs_keeps_the_order_when_all_scores_are_negative() -> None:
    # Dividing by the maximum itself would turn the worst images into the best.
    real, fake = torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -4.0])
    normalizer = ScoreNormalizer("max_abs").fit(real, fake)
    assert normalizer(real).tolist() == [-0.25, -0.5] and normalizer(fake).tolist() == [-0.75, -1.0]


def test_standard_is_relative_to_the_real_scores() -> None:
    normalizer = ScoreNormalizer("standard").fit(REAL, FAKE)
    both = [1.0, 2.0, 3.0, 2.0, -4.0, 0.0, 0.0, 4.0]
    mean = sum(both) / 8
    std = (sum((x - mean) ** 2 for x in both) / 7) ** 0.5
    assert normalizer.shift == 2.0 and normalizer.scale == pytest.approx(std)
    assert normalizer(torch.tensor([2.0, 2.0 + std])).tolist() == pytest.approx([0.0, 1.0])


def test_none_leaves_scores_alone_and_constant_scores_are_no_division_by_zero() -> None:
    assert ScoreNormalizer("none").fit(REAL, FAKE)(REAL).tolist() == REAL.tolist()
    zero = torch.zeros(4)
    for method in ("max_abs", "standard"):
        assert ScoreNormalizer(method).fit(zero, zero)(zero).tolist() == [0.0] * 4


class Brightness(nn.Module):
    """A critic whose score map is the mean of each 8x8 patch."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images, 8).squeeze(1)


@pytest.mark.parametrize("rows", [4, 2])
@pytest.mark.parametrize("reward", ["single", "intermediate"])
def test_the_scorer_goes_from_codes_to_normalised_rewards(rows, reward) -> None:
    vqvae = VQVAE(16, 1, codebook_size=8, codebook_dim=4, hidden_units=8, residual_units=4, layers=2)
    vqvae.train()(torch.rand(64, 1, 16, 16))
    vqvae.eval()
    normalizer = ScoreNormalizer()
    normalizer.shift, normalizer.scale = 0.25, 2.0
    codes = torch.randint(8, (5, rows * 4))
    scorer = CriticScorer(vqvae, Brightness(), reward, normalizer, batch_size=2)
    score_map, rewards = scorer(codes)
    raw = Brightness()(vqvae.decode(codes))
    torch.testing.assert_close(score_map, (raw - 0.25) / 2)
    torch.testing.assert_close(rewards, step_rewards(score_map, rows, 4, reward))
    assert not rewards.requires_grad and score_map.shape == (5, rows // 2, 2)
    torch.testing.assert_close(CriticScorer(vqvae, Brightness())(codes)[0], raw)  # not normalised by default
