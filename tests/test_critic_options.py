"""What a PatchGAN can be trained with: augmented images, the R1 penalty, spectral normalisation."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import ral_gym.agents.rewards.co_trained_critic as co_trained_critic
from ral_gym import registry
from ral_gym.agents import CriticCallback
from ral_gym.commands.cost_of_ral import PENALTY_KEPT, PENALTY_PASSES, ral_cost
from ral_gym.commands.counting import META, count
from ral_gym.config import Config, CriticConfig
from ral_gym.errors import ConfigError
from ral_gym.presets import SMOKE
from ral_gym.rewards.augmentation import AUGMENTATIONS, augmented, draw_augmentations
from ral_gym.rewards.critic import PatchCritic, critic_loss, r1_penalty
from ral_gym.rewards.making import check_rewards, load_scorer
from ral_gym.runs.storage import load_module, save_module
from ral_gym.stages.levels import load_vqvae, prior_of
from ral_gym.tokenizers.base import tokenizer_of
from tests.kills import killed_after
from tests.test_critic import Linear, noise
from tests.test_critic_callback import CONFIG, make_critic, make_env, make_model, vqvae
from tests.test_dry_run import allocated
from tests.test_reward_terms import stage_2, train, weights
from tests.tiny import make_tiny_run

__all__ = ["vqvae"]  # a fixture
ALL: dict[str, Any] = {
    "loss": "hinge",
    "augment": AUGMENTATIONS,
    "r1": 0.3,
    "r1_every": 2,
    "spectral_norm": True,
}


def with_critic(**changes: Any) -> Config:
    return replace(SMOKE, critic=replace(SMOKE.critic, **changes))


# Augmentation ---------------------------------------------------------------------------------------------------------


def by_hand(image: Tensor, kinds: tuple[str, ...], u: Tensor) -> Tensor:
    """DiffAugment of one image (C, h, S), pixel by pixel."""
    height, width = image.shape[1:]
    out = image.clone()
    if "colour" in kinds:
        out = out + (u[0] - 0.5)
        grey = out.mean(0)
        out = torch.stack([grey + 2 * u[1] * (one - grey) for one in out])
        out = out.mean() + (u[2] + 0.5) * (out - out.mean())
    if "translation" in kinds:
        most = [int(side / 8 + 0.5) for side in (height, width)]
        down, right = (int(one * (2 * m + 1)) - m for one, m in zip(u[3:5].tolist(), most, strict=True))
        moved = torch.zeros_like(out)
        for y in range(height):
            for x in range(width):
                if 0 <= y - down < height and 0 <= x - right < width:
                    moved[:, y, x] = out[:, y - down, x - right]
        out = moved
    if "cutout" in kinds:
        sizes = [int(side / 2 + 0.5) for side in (height, width)]
        places = zip(u[5:].tolist(), (height, width), sizes, strict=True)
        top, left = (int(one * (side + 1 - size % 2)) - size // 2 for one, side, size in places)
        for y in range(height):
            for x in range(width):
                if top <= y < top + sizes[0] and left <= x < left + sizes[1]:
                    out[:, y, x] = 0
    return out


@pytest.mark.parametrize("kinds", [("colour",), ("translation",), ("cutout",), AUGMENTATIONS], ids=" ".join)
@pytest.mark.parametrize("rows", [16, 6, 2])
def test_every_image_is_changed_as_the_paper_says_in_its_own_way(kinds: tuple[str, ...], rows: int) -> None:
    images = noise(9, 0, rows).repeat(1, 3, 1, 1) * torch.tensor([1.0, 0.5, -0.7]).reshape(3, 1, 1)
    u = draw_augmentations(9, torch.Generator().manual_seed(1))
    expected = torch.stack([by_hand(image, kinds, one) for image, one in zip(images, u, strict=True)])
    torch.testing.assert_close(augmented(images, kinds, u), expected)
    assert augmented(images, (), u) is images


def test_draws_reach_both_ends_and_gradients_reach_the_image() -> None:
    images = noise(2, 0).requires_grad_(True)
    ends = torch.stack([torch.zeros(7), torch.full((7,), 1 - 2**-24)])
    found = augmented(images, ("translation", "cutout"), ends)
    (gradient,) = torch.autograd.grad(found.sum(), images)
    torch.testing.assert_close(found.sum((1, 2, 3)), (gradient * images).sum((1, 2, 3)))  # pixels stay or are left out
    assert set(gradient.unique().tolist()) == {0.0, 1.0}
    doubled = augmented(images.double(), AUGMENTATIONS, ends)
    assert doubled.dtype == torch.float64 and doubled.isfinite().all()


def test_training_sees_augmented_images_and_scoring_does_not(vqvae, monkeypatch) -> None:
    seen: dict[str, list[Tensor]] = {"given": [], "learnt": []}
    critic = make_critic(vqvae, **(ALL | {"spectral_norm": False}))
    change, loss = co_trained_critic.augmented, co_trained_critic.critic_loss

    def changed(images: Tensor, *given: Any) -> Tensor:
        seen["given"].append(images)
        return change(images, *given)

    def learnt(network: nn.Module, real: Tensor, fake: Tensor, *given: Any, **keywords: Any) -> Any:
        seen["learnt"] += [real, fake]
        return loss(network, real, fake, *given, **keywords)

    monkeypatch.setattr(co_trained_critic, "augmented", changed)
    monkeypatch.setattr(co_trained_critic, "critic_loss", learnt)
    make_model(make_env(vqvae)).learn(16 * 6 * 2, callback=CriticCallback(critic))
    steps = CONFIG.warmup_steps + 2 * CONFIG.n_critic
    assert len(seen["given"]) == len(seen["learnt"]) == 2 * steps  # real and fake of each step, and nothing else
    for before, after in zip(seen["given"], seen["learnt"], strict=True):
        assert before.shape == after.shape and not torch.equal(before, after)
    codes = torch.from_numpy(critic.real_codes[:5].numpy()).long()
    with torch.no_grad():
        assert torch.equal(critic.score_map(codes), critic.critic(critic.see(codes)))


def test_without_augmentation_no_random_number_is_drawn(vqvae) -> None:
    states = []
    for kinds in ((), ("colour",)):
        critic = make_critic(vqvae, loss="hinge", augment=kinds)
        critic.train_step(critic.real_codes[:4].long())
        states.append(critic.generator.get_state())
    expected = torch.Generator().manual_seed(0)
    torch.randint(30, (4,), generator=expected)
    assert torch.equal(states[0], expected.get_state()) and not torch.equal(states[1], expected.get_state())


# R1 -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 1.0, -3.0])
def test_r1_of_a_linear_critic_is_its_slope_squared(scale: float) -> None:
    critic = Linear(scale)
    penalty = r1_penalty(critic, noise(5, 0))
    assert penalty.item() == pytest.approx(scale**2, abs=1e-5)
    penalty.backward()
    assert critic.scale.grad is not None and critic.scale.grad.item() == pytest.approx(2 * scale, rel=1e-4)
    loss, figures = critic_loss(critic, noise(5, 0), noise(5, 1), 0.0, loss="hinge", r1=0.7)
    without, plain = critic_loss(critic, noise(5, 0), noise(5, 1), 0.0, loss="hinge")
    assert (loss - without).item() == pytest.approx(0.35 * scale**2, abs=1e-5)
    assert figures["r1_penalty"] == pytest.approx(0.35 * scale**2, abs=1e-5) and "r1_penalty" not in plain


def test_r1_is_what_finite_differences_say_and_has_right_derivatives() -> None:
    critic = PatchCritic(8, 1, hidden_units=2, layers=2).double()
    real = noise(2, 0)[..., :8, :8].double()
    slopes = torch.zeros(2, 64, dtype=torch.float64)
    with torch.no_grad():
        for pixel in range(64):
            step = torch.zeros(64, dtype=torch.float64)
            step[pixel] = 1e-6
            above, below = (critic(real + sign * step.view(1, 8, 8)).mean((1, 2)) for sign in (1, -1))
            slopes[:, pixel] = (above - below) / 2e-6
    torch.testing.assert_close(r1_penalty(critic, real), slopes.square().sum(1).mean(), rtol=1e-5, atol=0)

    def penalty(weight: Tensor) -> Tensor:
        parameters = {**dict(critic.named_parameters()), "body.2.weight": weight}
        return r1_penalty(lambda x: torch.func.functional_call(critic, parameters, (x,)), real)  # type: ignore[arg-type]

    weight = critic.get_parameter("body.2.weight").detach().clone().requires_grad_(True)
    assert torch.autograd.gradcheck(penalty, (weight,), eps=1e-7, atol=1e-5)


def test_lazy_r1_comes_every_so_many_steps_with_as_much_weight(vqvae, monkeypatch) -> None:
    given: list[float] = []
    loss = co_trained_critic.critic_loss

    def noted(*arguments: Any, **keywords: Any) -> Any:
        given.append(keywords["r1"])
        return loss(*arguments, **keywords)

    monkeypatch.setattr(co_trained_critic, "critic_loss", noted)
    critic = make_critic(vqvae, loss="hinge", r1=0.5, r1_every=3)
    metrics = critic.train(critic.finished(critic.real_codes[:8].long()), 7)
    assert given == [1.5, 0, 0, 1.5, 0, 0, 1.5] and metrics["r1_penalty"] > 0


# Spectral normalisation -----------------------------------------------------------------------------------------------


def convolutions(critic: nn.Module) -> list[Tensor]:
    """Their weights as matrices, as spectral normalisation sees them."""
    return [part.weight.detach().flatten(1) for part in critic.modules() if isinstance(part, nn.Conv2d)]


def test_every_convolution_has_the_spectral_norm_1() -> None:
    torch.manual_seed(0)
    critic = PatchCritic(16, 1, hidden_units=6, layers=2, spectral_norm=True, classes=3)
    with torch.no_grad():
        for weight in critic.parameters():
            weight.mul_(3)
        assert critic.class_embedding is not None
        critic.class_embedding.weight.normal_()
        for _ in range(400):  # each training pass is one step of the power iteration
            critic.train()(noise(2, 0))
    critic.eval()
    for weight in convolutions(critic):
        assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(1, abs=1e-3)
    before = {name: tensor.clone() for name, tensor in critic.state_dict().items()}
    scores = critic(noise(3, 1), torch.tensor([0, 1, 2]))
    assert torch.equal(critic(noise(3, 1), torch.tensor([0, 1, 2])), scores)
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in critic.state_dict().items()
    )  # scoring moves nothing
    plain = PatchCritic(16, 1, hidden_units=6, layers=2)
    assert "spectral_norm" not in plain.config and {type(one) for one in plain.body} == {nn.Conv2d, nn.LeakyReLU}


def test_a_saved_normalised_critic_scores_alike(tmp_path) -> None:
    critic = PatchCritic(16, 1, hidden_units=4, layers=2, spectral_norm=True)
    critic.train()(noise(2, 1))
    save_module(tmp_path / "critic.safetensors", critic)
    found = load_module(tmp_path / "critic.safetensors", PatchCritic)
    assert torch.equal(found(noise(2, 0)), critic.eval()(noise(2, 0)))


# All of them ----------------------------------------------------------------------------------------------------------


def test_a_killed_run_with_all_of_them_continues_bit_for_bit(tmp_path: Path) -> None:
    found = []
    for name in ("whole", "broken"):
        run = stage_2(tmp_path / name, n_updates=3, reset_mode="mixed")
        config = replace(run.config, critic=replace(run.config.critic, **ALL, n_critic=3))
        (run.path / "config.json").write_text(config.to_json())
        run = type(run)(run.path, config)
        if name == "broken":
            with killed_after(2):
                train(run)
        train(run)
        found.append(weights(run) | {"critic": run.file("critic.safetensors").read_bytes()})
        assert any("critic/r1_penalty" in line for line in run.metrics("ral"))
    assert found[0] == found[1]
    network = load_scorer(run.file("critic.safetensors"), load_vqvae(run)).critic
    assert isinstance(network, PatchCritic) and network.config["spectral_norm"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"loss": "wgan_gp", "r1": 1.0}, r"critic\.r1 is 1, .* critic\.loss is wgan_gp.*give critic\.loss hinge"),
        ({"kind": "causal", "augment": ("colour",)}, r"critic\.augment is colour, .*critic\.kind causal sees codes"),
        ({"kind": "causal", "r1": 1.0}, r"critic\.r1 is 1\.0, but causal takes no r1"),
        ({"kind": "causal", "spectral_norm": True}, r"critic\.spectral_norm is True, but causal takes no spectral"),
        (
            {"kind": "tests.test_critic_cost:Table", "loss": "hinge", "r1": 1.0},
            r"critic\.r1 is 1, which needs gradients",
        ),
        (
            {"kind": "tests.test_critic_cost:Table", "loss": "hinge", "augment": ("cutout",)},
            "sees codes: leave critic.a",
        ),
        ({"augment": ("colour", "mirror")}, "critic.augment is 'mirror': give colour or translation or cutout"),
        ({"r1": -1.0}, r"critic\.r1 is -1\.0: give 0 or more"),
        ({"r1_every": 0}, r"critic\.r1_every is 0: give an integer of 1 or more"),
    ],
)
def test_what_makes_no_sense_is_refused_before_stage_1(changes: dict[str, Any], says: str, monkeypatch) -> None:
    monkeypatch.setattr(registry, "_allowed", {"tests.test_critic_cost:Table"})
    sizes = {"hidden_units": CriticConfig().hidden_units, "layers": CriticConfig().layers} if "kind" in changes else {}
    config = with_critic(**(sizes | changes))
    with pytest.raises(ConfigError, match=says) as raised:
        config.check()
        check_rewards(config)
    assert "\n" not in str(raised.value)


def cost(**changes: Any) -> Any:
    config = with_critic(loss="hinge", **changes)
    with torch.device("meta"):
        tokenizer = tokenizer_of(config, config.data.image_size, 1)
        prior = prior_of(config, tokenizer.grid)
    return ral_cost(config, tokenizer, [prior], tokenizer.grid)


def test_the_dry_run_counts_the_penalty_where_it_comes() -> None:
    plain, every, lazy = cost(), cost(r1=1.0), cost(r1=1.0, r1_every=4)
    passes = SMOKE.critic.n_critic * PENALTY_PASSES * SMOKE.critic.batch_size * plain.parts["critic"]
    assert every.flops_per_step - plain.flops_per_step == pytest.approx(passes)
    assert lazy.flops_per_step - plain.flops_per_step == pytest.approx(passes / 4)
    assert cost(spectral_norm=True, augment=AUGMENTATIONS).flops_per_step == pytest.approx(
        plain.flops_per_step, rel=0.01
    )


@pytest.mark.parametrize("settings", [{"loss": "hinge", "r1": 1.0}, {"loss": "wgan_gp"}], ids=["r1", "wgan_gp"])
def test_the_memory_of_a_penalty_is_what_a_step_allocates(settings: dict[str, Any]) -> None:
    critic, (real, fake) = PatchCritic(64, 1, hidden_units=16, layers=4), (torch.rand(32, 1, 64, 64) for _ in range(2))

    def most(**given: Any) -> int:
        return allocated(lambda: critic_loss(critic, real, fake, 10.0, torch.Generator(), **given)[0].backward())

    with META:
        kept = count(lambda: PatchCritic(64, 1, hidden_units=16, layers=4)(torch.empty(64, 1, 64, 64)).sum()).kept
    assert most(**settings) - most(loss="hinge") == pytest.approx(PENALTY_KEPT * kept / 2, rel=0.25)


def test_the_benchmark_trains_every_critic(tmp_path: Path, capsys) -> None:
    path = Path(__file__).parents[1] / "benchmarks" / "critics.py"
    spec = importlib.util.spec_from_file_location("critics_bench", path)
    assert spec is not None and spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    sys.modules["critics_bench"] = bench  # dataclasses look their module up there
    spec.loader.exec_module(bench)
    make_tiny_run(tmp_path / "run")
    few = ["--steps", "3", "--early", "1", "--samples", "8", "--seeds", "0"]
    bench.main(["--run", str(tmp_path / "run"), *few], Console(width=120))
    out = capsys.readouterr().out
    for name in bench.VARIANTS:
        (line,) = (line for line in out.splitlines() if line.startswith(f"{name}  "))
        held_out = [float(word) for word in line.removeprefix(name).split() if word != "±"]
        assert all(0 <= number <= 1 for number in held_out[:5])
