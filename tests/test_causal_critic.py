"""The causal critic: a log-ratio code by code, on a copy of any prior; what it learns and how it is paid."""

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from ral_gym.agents.episodes import EpisodeRolloutBuffer
from ral_gym.commands.cli import main, train_main
from ral_gym.config import CriticConfig
from ral_gym.envs.generation import action_space, observation_space
from ral_gym.grid import CodeGrid
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.transformer import Transformer
from ral_gym.priors.two_level import join_priors
from ral_gym.rewards.causal import CausalCritic
from ral_gym.rewards.making import load_scorer
from ral_gym.runs.run import Run, read_config
from ral_gym.stages.levels import load_generator, load_vqvae
from tests.kills import killed_after

K = 8
SIZES: dict[str, Any] = {"hidden_units": 12, "residual_units": 12, "layers": 2, "conv_filter_size": 3}


def pixelcnn(**changes: Any) -> PixelCNN:
    return PixelCNN(K, 4, 4, **(SIZES | {"output_stack_layers": 1, "dropout": 0.3} | changes))


def two_levels() -> Any:
    bottom = PixelCNN(K, 8, 8, **SIZES, condition=(4, 4, K), conditioning_stack_layers=1, output_stack_layers=1)
    return join_priors([pixelcnn(hidden_units=8, residual_units=8), bottom])


def transformer() -> Transformer:
    return Transformer(K, 4, 4, hidden_units=16, layers=2, multiple_of=16, classes=3, dropout=0.1, class_dropout=0.2)


PRIORS = {"pixelcnn": pixelcnn, "two levels": two_levels, "transformer": transformer}


def with_random_heads(prior: Any, **changes: Any) -> CausalCritic:
    critic = CausalCritic(prior, **({"classes": prior.grid.classes} | changes))
    for head in critic.heads:
        torch.nn.init.normal_(head.weight)
    return critic.eval()


@pytest.mark.parametrize("kind", PRIORS)
def test_it_starts_at_zero_and_sees_only_the_codes_before(kind: str) -> None:
    prior = PRIORS[kind]()
    codes = torch.randint(K, (3, prior.grid.n_codes))
    labels = torch.tensor([0, 1, 2]) if prior.grid.classes else None
    assert not CausalCritic(copy.deepcopy(prior), classes=prior.grid.classes).eval()(codes, labels).any()
    critic = with_random_heads(prior)
    f = critic.all_codes(codes, labels)  # (B, T, K)
    torch.testing.assert_close(critic(codes, labels), f.gather(2, codes[..., None]).squeeze(2))
    # Any change from position t on leaves f before and at t as it is.
    for t in (0, 5, prior.grid.n_codes - 1):
        changed = codes.clone()
        changed[:, t:] = (changed[:, t:] + 1) % K
        torch.testing.assert_close(critic.all_codes(changed, labels)[:, : t + 1], f[:, : t + 1])
    torch.testing.assert_close(critic.image_scores(critic(codes, labels)), critic(codes, labels).sum(1))


@pytest.mark.parametrize("kind", PRIORS)
def test_short_images_are_scored_as_the_beginnings_of_whole_ones(kind: str) -> None:
    critic = with_random_heads(PRIORS[kind]())
    grid = critic.grid
    codes = torch.randint(K, (2, grid.n_codes))
    labels = torch.tensor([2, 0])
    whole, short = critic(codes, labels), critic(grid.crop(codes, 2), labels)
    # In two levels the top codes come first: those of two rows are the beginnings of both levels.
    parts = zip(grid.split(whole), grid.split(short), strict=True)
    for level, (long, cut) in enumerate(parts):
        if level == 0:
            torch.testing.assert_close(long[:, : cut.shape[1]], cut)
    assert short.shape == (2, grid.codes_of(2))


def test_the_labels_count_only_where_they_are_wanted() -> None:
    prior, codes = transformer(), torch.randint(K, (2, 16))
    prior.output.weight.data.normal_()
    given = [torch.tensor([0, 1]), torch.tensor([2, 2])]
    told, not_told = with_random_heads(copy.deepcopy(prior)), with_random_heads(prior, classes=0)
    assert not torch.allclose(told(codes, given[0]), told(codes, given[1]))
    assert torch.equal(not_told(codes, given[0]), not_told(codes, given[1]))
    assert torch.equal(not_told(codes, given[0]), not_told(codes))


def test_dropout_is_its_own_and_no_class_is_left_out() -> None:
    critic = CausalCritic(pixelcnn(attention_layers=1, attention_heads=2), dropout=0.25)
    assert {part.p for part in critic.modules() if isinstance(part, torch.nn.Dropout)} == {0.25}
    critic = CausalCritic(transformer(), dropout=0.25)
    assert critic.trunk.dropout == 0.25 and critic.trunk.class_dropout == 0


def test_it_learns_the_log_ratio_of_two_known_distributions() -> None:
    # Real images: independent codes with probabilities p; drawn ones: uniform. So f_t(k) = log p(k) + log K.
    torch.manual_seed(0)
    p = torch.tensor([0.3, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05])
    critic = CausalCritic(pixelcnn(), dropout=0.0)
    optimizer = critic.make_optimizer(CriticConfig(learning_rate=3e-3, adam_beta1=0.9, adam_beta2=0.99))
    for _ in range(300):
        real = torch.multinomial(p.expand(64, -1), 16, replacement=True)
        loss, metrics = critic.loss(real, torch.randint(K, (64, 16)), torch.Generator())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < math.log(2) and metrics["accuracy"] > 0.8
    with torch.no_grad():
        found = critic.eval().all_codes(torch.randint(K, (256, 16))).mean((0, 1))
    assert torch.corrcoef(torch.stack([found, p.log()]))[0, 1] > 0.98
    assert (found - (p.log() + math.log(K))).abs().mean() < 0.2


def test_the_bound_is_the_divergence_where_the_score_is_the_log_ratio() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    ratio = (p / q).log()
    counts_p, counts_q = (ratio.repeat_interleave((1000 * d).round().long()) for d in (p, q))
    bound = CausalCritic.comparison(counts_p, counts_q)["heldout_dv_bound"]
    assert bound == pytest.approx((p * ratio).sum().item(), abs=1e-5)
    assert CausalCritic.comparison(0.5 * counts_p, 0.5 * counts_q)["heldout_dv_bound"] < bound


def test_gradients_are_clipped_before_a_step() -> None:
    critic = CausalCritic(pixelcnn(), max_grad_norm=0.01, dropout=0.0)
    optimizer = critic.make_optimizer(CriticConfig())
    critic.loss(torch.zeros(4, 16, dtype=torch.long), torch.ones(4, 16, dtype=torch.long), torch.Generator())[
        0
    ].backward()
    optimizer.step()
    norm = torch.stack([w.grad.norm() for w in critic.parameters() if w.grad is not None]).norm()
    assert norm <= 0.0101


# Two discounts --------------------------------------------------------------------------------------------------------


def buffer_with(levels: tuple[int, ...], **options: Any) -> EpisodeRolloutBuffer:
    grid = CodeGrid(2, 2, K, levels=len(levels))
    buffer = EpisodeRolloutBuffer(
        sum(levels), observation_space(grid), action_space(grid), "cpu", 1.0, 0.5, 2, levels=levels, **options
    )
    buffer.reset()
    obs = np.full((2, sum(levels)), K, np.int16)
    codes, zeros = np.zeros((2, sum(levels)), np.int64), np.zeros((2, sum(levels)), np.float32)
    buffer.add_round(obs, codes, np.zeros(2), zeros, zeros)
    return buffer


def test_rewards_of_images_have_a_discount_of_their_own() -> None:
    terminal = np.zeros((2, 4), np.float32)
    terminal[:, -1] = [8, 16]
    per_code = np.array([[1, 2, 4, 8], [1, 1, 1, 1]], np.float32)
    buffer = buffer_with((4,), image_gamma=1.0)
    buffer.write_rewards(terminal)
    buffer.add_rewards(per_code)
    buffer.compute_returns_and_advantage()
    np.testing.assert_allclose(buffer.returns.reshape(2, 4)[0], [8 + 4, 8 + 6, 8 + 8, 8 + 8])
    np.testing.assert_allclose(buffer.returns.reshape(2, 4)[1], [16 + 1.875, 16 + 1.75, 16 + 1.5, 16 + 1])
    # The same discount twice is one discount, on two levels too.
    for levels in ((4,), (4, 16)):
        length = sum(levels)
        terminal, per_code = np.zeros((2, length), np.float32), np.random.rand(2, length).astype(np.float32)
        terminal[:, -1] = [3, -2]
        found = []
        for image_gamma in (None, 0.5):
            buffer = buffer_with(levels, image_gamma=image_gamma)
            buffer.write_rewards(terminal)
            buffer.add_rewards(per_code)
            buffer.compute_returns_and_advantage()
            found.append(buffer.returns)
        np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-6)


# Whole runs -----------------------------------------------------------------------------------------------------------

CAUSAL = ["--critic.kind", "causal", "--critic.replay", "2", "--ral.image-gamma", "1", "--ral.gamma", "0.95"]
CAUSAL += ["--ral.reward-weights", "critic", "1", "loo_fd", "1", "--ral.reward-features", "pyramid"]


@pytest.mark.commands
@pytest.mark.parametrize("more", ["", "--ral.algo ppo", "--ral.reset-mode mixed", "--prior.kind transformer"])
def test_it_rewards_a_run_that_can_be_stopped_and_judged(tmp_path, smoke_options, more, capsys) -> None:
    options = [*smoke_options, *CAUSAL, *more.split(), "--prior.augmented-passes", "2"]
    if "transformer" in more:
        options += ["--prior.attention-heads", "2"]
    assert train_main([*options, "--runs", str(tmp_path / "whole"), "--name", "run"]) == 0
    text = (tmp_path / "whole" / "run" / "metrics.jsonl").read_text()
    lines = [line for line in map(json.loads, text.splitlines()) if line["stage"] == "ral"]
    for name in ("critic/loss", "critic/heldout_auc", "critic/heldout_dv_bound", "reward/loo_fd_std"):
        assert all(np.isfinite(line[name]) for line in lines), name
    with killed_after(2):
        train_main([*options, "--runs", str(tmp_path / "killed"), "--name", "run"])
    assert train_main([*options, "--runs", str(tmp_path / "killed"), "--name", "run"]) == 0
    for name in ("policy", "critic"):
        files = [tmp_path / folder / "run" / f"{name}.safetensors" for folder in ("whole", "killed")]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    capsys.readouterr()
    assert main(["report", str(tmp_path / "whole" / "run")]) == 0
    assert main(["verify", str(tmp_path / "whole" / "run")]) == 0


@pytest.mark.commands
def test_its_file_is_read_with_the_prior_beside_it(tmp_path, smoke_options) -> None:
    assert train_main([*smoke_options, *CAUSAL, "--stages", "vqvae", "prior", "ral", "--runs", str(tmp_path)]) == 0
    run = Run(tmp_path / "smoke", read_config(tmp_path / "smoke"))
    vqvae, prior = load_vqvae(run, torch.device("cpu")), load_generator(run, "prior", torch.device("cpu"))
    scorer = load_scorer(run.file("critic.safetensors"), vqvae, make_prior=lambda: prior)
    codes = torch.randint(16, (3, 16))
    scores, rewards = scorer(codes)
    assert scores.shape == (3, 4, 4) and torch.equal(rewards.reshape(scores.shape), scores) and scores.any()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--critic.kind", "causal", "--critic.hidden-units", "9"], "critic.hidden_units is 9"),
        (["--critic.dropout", "0.1"], "critic.dropout is 0.1"),
        (
            ["--critic.kind", "causal", "--critic.dropout", "1"],
            "critic.dropout is 1.0",
        ),
    ],
)
def test_settings_without_effect_or_out_of_range_are_told(tmp_path, smoke_options, options, says, capsys) -> None:
    code = train_main([*smoke_options, *options, "--runs", str(tmp_path)])
    said = capsys.readouterr()
    assert code and says in " ".join((said.out + said.err).split())
