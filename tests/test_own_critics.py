"""Critics that someone brings: what they see and how they are paid, through every command; what an update costs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ral_gym import registry
from ral_gym.agents import CoTrainedCritic, CriticCallback, load_run
from ral_gym.commands.cli import main, train_main
from ral_gym.commands.dry_run import dry_run
from ral_gym.config import CriticConfig
from ral_gym.errors import ConfigError
from ral_gym.grid import CodeGrid
from ral_gym.presets import SMOKE
from ral_gym.rewards.making import build_critic, load_scorer
from ral_gym.rewards.scorer import CriticScorer
from ral_gym.runs.storage import load_tensors, save_tensors
from tests.kills import killed_after
from tests.test_critic_callback import CONFIG, make_critic, make_env, make_model, vqvae
from tests.test_critic_cost import counted
from tests.test_own_rewards import own_parts
from tests.test_reward_terms import stage_2, train, weights

__all__ = ["own_parts", "vqvae"]  # fixtures


class Global(nn.Module):
    """One score per image."""

    def __init__(self, channels: int, image_size: int, width: int = 3) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size**2, width))
        self.head = nn.Linear(width, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.net(images)).squeeze(1)


class Causal(nn.Module):
    """The prior's own network with a head: f_t of every code from those before it; their sum is the image's score."""

    sees = "codes"

    def __init__(self, prior: nn.Module, codebook_size: int, rate: float = 1e-3) -> None:
        super().__init__()
        self.trunk, self.rate = prior, rate
        self.head = nn.Linear(prior.hidden_units, codebook_size)
        nn.init.zeros_(self.head.weight)
        self.config = {"codebook_size": codebook_size, "rate": rate}

    def forward(self, codes: Tensor) -> Tensor:
        return self.head(self.trunk.features(codes)).gather(2, codes[..., None]).squeeze(2)  # (B, T)

    def loss(self, real: Tensor, fake: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        a, b = self(real).cumsum(1), self(fake).cumsum(1)  # log-ratios of prefixes
        return F.softplus(-a).mean() + F.softplus(b).mean(), {"gap": float((a - b)[:, -1].mean().detach())}

    def image_scores(self, scores: Tensor) -> Tensor:
        return scores.sum(1)

    def scores_to_rewards(self, scores: Tensor, rows: int, reward: str) -> Tensor:
        return scores

    def make_optimizer(self, config: CriticConfig) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.rate, weight_decay=0.01)


class Features(nn.Module):
    sees = "features"

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.head = nn.Linear(num_features, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(features)[:, :, None]  # (B, 1, 1)


CLASSES = {"global": (Global, "hinge"), "ratio": (Causal, "wgan_gp"), "features": (Features, "wgan_gp")}


@pytest.fixture
def named(own_parts) -> None:
    for name, (cls, _) in CLASSES.items():
        registry.CRITICS.register(name)(cls)


# What a critic may be -----------------------------------------------------------------------------------------------


def test_a_critic_of_codes_decodes_nothing(tmp_path: Path, named, monkeypatch) -> None:
    """The whole of stage 3, with other rewards that read codes."""
    registry.load_plugins(["own_reward"])
    for number, weights_ in enumerate(({"critic": 1.0}, {"critic": 1.0, "calm": 0.5})):
        run = own_run(tmp_path / str(number), "ratio", reward_weights=weights_)
        with monkeypatch.context() as patch:
            counts = counted(patch)
            train(run)
        assert counts == []


def own_run(path: Path, kind: str, critic: dict[str, Any] | None = None, **ral: Any):
    run = stage_2(path, **ral)
    settings = {"kind": kind, "hidden_units": CriticConfig().hidden_units, "loss": CLASSES[kind][1]} | (critic or {})
    config = replace(run.config, critic=replace(run.config.critic, **settings))
    (path / "config.json").write_text(config.to_json())
    return type(run)(path, config)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("reward", ["single", "intermediate"])
def test_every_kind_trains_is_paid_and_continues(tmp_path: Path, named, monkeypatch, kind: str, reward: str) -> None:
    settings = {"reward": reward, "n_updates": 3, "reset_mode": "full", "algo": "reinforce"}
    whole, broken = (own_run(tmp_path / name, kind, **settings) for name in ("whole", "broken"))
    train(whole)
    with killed_after(2):
        train(broken)
    train(broken)
    assert weights(whole) == weights(broken)
    files = [run.file("critic.safetensors") for run in (whole, broken)]
    assert files[0].read_bytes() == files[1].read_bytes()
    line = whole.metrics("ral")[-1]
    assert 0 <= line["critic/heldout_auc"] <= 1 and np.isfinite(line["critic/gap"])
    assert load_tensors(files[0])[1]["kind"] == kind
    # The frozen critic of the environment pays what the trained one would.
    stage = load_run(whole.path)
    env = gym.make("ral_gym/LatentCode-v0", run=str(whole.path), reward=reward)
    env.reset(seed=0)
    terminated, total = False, 0.0
    while not terminated:
        _, earned, terminated, _, info = env.step(env.action_space.sample())
        total += float(earned)
    scorer = load_scorer(files[0], stage.critic.vqvae, make_prior=lambda: stage.model.policy.prior)
    codes = torch.from_numpy(info["codes"][None].astype(np.int64))
    raw = scorer.scores(scorer.view(codes))
    torch.testing.assert_close(raw, stage.critic.scorer.scores(stage.critic.scorer.view(codes)))
    scaled = scorer.normalizer(raw)
    if kind == "ratio":
        np.testing.assert_allclose(info["step_rewards"], scaled[0].numpy(), atol=1e-6)
        assert info["score_map"].shape == (4, 4)
    else:
        assert info["score_map"].shape == (1, 1) and info["score_map"][0, 0] == pytest.approx(float(scaled), abs=1e-6)
        assert total == pytest.approx(float(scaled) * (16 if reward == "intermediate" else 1), abs=1e-5)
    assert load_run(whole.path).critic.n_updates == stage.critic.n_updates > 0


def test_a_causal_critics_sum_is_its_score_and_its_codes_are_paid(vqvae) -> None:
    from ral_gym.priors.pixelcnn import PixelCNN

    prior = PixelCNN(8, 4, 4, hidden_units=8, residual_units=8, layers=1, conv_filter_size=3, output_stack_layers=1)
    settings = replace(CONFIG, kind="patch", warmup_steps=60)
    rng = np.random.default_rng(0)
    real = rng.integers(0, 3, (60, 16)).astype(np.int16)
    critic = CoTrainedCritic(vqvae, Causal(prior, 8, rate=1e-2), real[:30], real[30:], settings, normalization="none")
    model = make_model(make_env(vqvae, n_envs=16))
    model.learn(16 * 16, callback=CriticCallback(critic))
    codes = torch.from_numpy(model.rollout_buffer.codes.astype(np.int64))
    rewards, figures = critic.rewards(critic.finished(codes))
    assert figures["heldout_auc"] > 0.9
    with torch.no_grad():
        expected = critic.critic(codes)
    np.testing.assert_allclose(rewards, expected.numpy(), atol=1e-5)
    torch.testing.assert_close(critic.scorer.image_scores(expected), expected.sum(1))


def test_scores_of_short_images_and_of_two_levels() -> None:
    class Fake(nn.Module):
        sees = "codes"

        def forward(self, codes: Tensor) -> Tensor:
            return codes.float()

    class Tokenizer(nn.Module):
        def __init__(self, levels: int) -> None:
            super().__init__()
            self.grid = CodeGrid(2, 2, 50, levels)
            self.weight = nn.Parameter(torch.zeros(1))

    for levels in (1, 2):
        for reward in ("single", "intermediate"):
            tokenizer: Any = Tokenizer(levels)
            scorer = CriticScorer(tokenizer, Fake(), reward)  # type: ignore[arg-type]
            for rows in (1, 2):
                codes = torch.arange(2 * tokenizer.grid.codes_of(rows)).reshape(2, -1)
                score_map, rewards = scorer(codes)
                assert score_map.shape == (2, rows, 2)
                torch.testing.assert_close(score_map.flatten(1).mean(1), codes.float().mean(1))
                expected = codes.float() if reward == "intermediate" else torch.zeros(codes.shape)
                if reward == "single":
                    expected[:, -1] = codes.float().mean(1)
                torch.testing.assert_close(rewards, expected)


# Refusals -----------------------------------------------------------------------------------------------------------


def test_settings_that_nothing_would_read_are_refused(vqvae, named) -> None:
    smoke = SMOKE.critic
    refused: list[tuple[dict[str, Any], str]] = [
        ({"kind": "features", "layers": 7}, "critic.layers is 7, but features takes no layers: leave critic.layers"),
        ({"kind": "features", "options": {"depth": 3}}, "critic.options names depth, but features takes no depth"),
        ({"kind": "features", "options": {"num_features": 3}}, "names num_features, which the run fills in"),
        ({"kind": "ratio", "loss": "hinge"}, "critic.loss is 'hinge', but ratio takes no loss: leave critic.loss"),
        ({"kind": "ratio"}, "critic 'ratio' cannot be built .*prior"),
        ({"kind": "none_such"}, "critic 'none_such' is unknown: choose one of patch"),
    ]
    for changes, message in refused:
        with pytest.raises(ConfigError, match=message):
            build_critic(replace(smoke, **changes), vqvae, untouched=(smoke,))
    build_critic(replace(smoke, kind="features"), vqvae, untouched=(smoke,))  # the preset's own layers are no change


def test_a_penalty_needs_slopes(vqvae, own_parts) -> None:
    class Blind(nn.Module):
        sees = "codes"

    registry.CRITICS.register("blind")(Blind)
    with pytest.raises(ConfigError, match=r"critic.loss is wgan_gp, .* sees codes: choose --critic.loss hinge"):
        build_critic(replace(CriticConfig(), kind="blind"), vqvae)
    build_critic(replace(CriticConfig(), kind="blind", loss="hinge"), vqvae)


def test_a_loss_may_be_a_tensor_alone(vqvae) -> None:
    from ral_gym.priors.pixelcnn import PixelCNN

    class Silent(Causal):
        def loss(self, real: Tensor, fake: Tensor, generator: torch.Generator) -> Any:
            return super().loss(real, fake, generator)[0]

    prior = PixelCNN(8, 4, 4, hidden_units=8, residual_units=8, layers=1, conv_filter_size=3, output_stack_layers=1)
    real = np.random.default_rng(0).integers(0, 3, (20, 16)).astype(np.int16)
    critic = CoTrainedCritic(vqvae, Silent(prior, 8), real[:10], real[10:], CONFIG, normalization="none")
    figures = critic.train_step(torch.zeros(4, 16).long())
    assert figures.keys() >= {"loss"} and np.isfinite(figures["loss"])


def test_scores_of_another_shape_are_refused(vqvae) -> None:
    class Wrong(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.new_zeros(len(images), 5)

    with pytest.raises(ConfigError, match=r"scores of shape \(2, 5\): give one per image \(B,\), a map"):
        CriticScorer(vqvae, Wrong())(torch.zeros(2, 16).long())


@pytest.mark.parametrize("rows", [None, 4])
def test_a_critic_of_whole_images_only(vqvae, rows: int | None) -> None:
    """In partial generation it says how many rows it needs, or is refused before anything is drawn."""
    critic = make_critic(vqvae)
    critic.critic = Global(1, 16)
    env = make_env(vqvae, "mixed")
    if rows is None:
        with pytest.raises(ConfigError, match=r"critic Global fails on what it sees of 1 of 4 rows \(.*row_multiple"):
            make_model(env).learn(16 * 6, callback=CriticCallback(critic))
    else:
        env.core.distribution.row_multiple = rows
        critic.scorer.check_rows(critic.real_codes[:1], rows)


# Through the commands -----------------------------------------------------------------------------------------------


def start(base: Path, runs: Path, *flags: str) -> int:
    shared = ["--start-from", str(base), "--runs", str(runs), "--name", "own", "--quiet", "--critic.loss", "hinge"]
    return train_main([*shared, "--ral.n-updates", "2", *flags])


@pytest.mark.commands
@pytest.mark.parametrize("kind", ["own_critic:OneScore", "own_critic:CodeCritic"])
def test_a_critic_goes_through_every_command(
    own_parts, smoke_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    loss = ["--critic.loss", "wgan_gp"] if kind.endswith("CodeCritic") else ["--critic.options", "width", "5"]
    flags = ["--critic.kind", kind, *loss]
    assert start(smoke_run, tmp_path, *flags, "--dry-run") == 0
    assert start(smoke_run, tmp_path, *flags) == 0  # evaluation with it too
    run = tmp_path / "own"
    assert "mle_rejection" in json.loads((run / "results.json").read_text())["rows"]
    if kind.endswith("OneScore"):
        assert load_tensors(run / "critic.safetensors")[1]["config"] == {"channels": 1, "width": 5}
    assert main(["report", str(run), "--plugin", kind]) == 0
    assert 'id="fig-scores-ral"' in (run / "report.html").read_text()
    capsys.readouterr()


def test_a_file_cannot_name_a_critic(own_parts, smoke_run: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """A stranger's run folder names a module, in config.json or in the critic's own file."""
    monkeypatch.syspath_prepend(str(tmp_path))
    ran = f"open({str(tmp_path / 'ran')!r}, 'w').close()"
    (tmp_path / "wicked_critic.py").write_text(f"{ran}\nfrom ral_gym.rewards.critic import PatchCritic as C")
    by_config, by_weights = tmp_path / "by_config", tmp_path / "by_weights"
    for folder in (by_config, by_weights):
        shutil.copytree(smoke_run, folder)
    values = json.loads((by_config / "config.json").read_text())
    values["critic"]["kind"] = "wicked_critic:C"
    (by_config / "config.json").write_text(json.dumps(values))
    tensors, metadata = load_tensors(by_weights / "critic.safetensors")
    save_tensors(by_weights / "critic.safetensors", tensors, metadata | {"kind": "wicked_critic:C"})
    refused = "critic 'wicked_critic:C' is code that a file names"
    assert main(["report", str(by_weights)]) == 2
    said = capsys.readouterr().err
    assert refused in " ".join(said.split()) and "Traceback" not in said
    assert start(by_config, tmp_path / "new") == 2
    assert refused in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ConfigError, match=refused):
        load_run(by_config)
    for folder, reward in ((by_weights, "single"), (by_config, "none")):
        with pytest.raises(ConfigError, match=refused):
            gym.make("ral_gym/LatentCode-v0", run=str(folder), reward=reward)
    assert not (tmp_path / "ran").exists()
    registry.allow("wicked_critic:C")
    gym.make("ral_gym/LatentCode-v0", run=str(by_weights), reward="single").reset(seed=0)
    assert (tmp_path / "ran").exists()


def test_the_dry_run_counts_a_critics_weights(named) -> None:
    plain = dry_run(SMOKE).stages[-1].memory
    for kind in ("features", "ratio"):
        loss = CLASSES[kind][1]
        config = replace(SMOKE, critic=replace(SMOKE.critic, kind=kind, loss=loss))
        assert dry_run(config).stages[-1].memory != plain
