"""The critic: the map's shape, Eq. 5 term by term, and that it learns."""

import pytest
import torch
from torch import Tensor, nn

from ral_gym.errors import ConfigError
from ral_gym.rewards.critic import PatchCritic, critic_loss, gradient_penalty
from ral_gym.runs.storage import load_module, save_module


def noise(n: int, seed: int, rows: int = 16) -> Tensor:
    return torch.rand(n, 1, rows, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(("size", "layers", "side"), [(128, 5, 4), (128, 4, 8), (128, 6, 2), (64, 4, 4), (32, 5, 1)])
def test_n_layers_give_a_map_of_side_s_over_2_to_the_n(size, layers, side) -> None:
    critic = PatchCritic(size, 3, hidden_units=1, layers=layers)
    assert critic(torch.zeros(2, 3, size, size)).shape == (2, side, side)
    assert critic.map_size == side


@pytest.mark.parametrize(("layers", "code_rows", "multiple"), [(2, 8, 2), (3, 8, 4), (4, 8, 8), (1, 8, 1), (2, 2, 1)])
def test_short_images_of_whole_map_rows_are_scored(layers, code_rows, multiple) -> None:
    critic = PatchCritic(16, 1, hidden_units=2, layers=layers)
    assert critic.row_multiple(code_rows) == multiple
    pixels = 16 // code_rows
    for rows in range(multiple, code_rows + 1, multiple):
        scores = critic(noise(2, 0, rows * pixels))
        assert scores.shape == (2, rows * pixels // 2**layers, 16 // 2**layers) and scores.shape[1] >= 1


def test_a_patch_is_scored_by_its_own_surroundings() -> None:
    critic = PatchCritic(32, 1, hidden_units=2, layers=2)
    images = torch.rand(1, 1, 32, 32, requires_grad=True)
    critic(images)[0, 0, 0].backward()
    assert images.grad is not None
    assert images.grad[0, 0, :4, :4].abs().sum() > 0 and not images.grad[0, 0, 16:].any()


def test_images_do_not_influence_each_other() -> None:
    # No batch normalisation: the gradient penalty is per image.
    critic = PatchCritic(16, 1, hidden_units=4, layers=2).train()
    images = noise(4, 0)
    torch.testing.assert_close(critic(images)[1:2], critic(images[1:2]))


@pytest.mark.parametrize(("size", "layers"), [(16, 5), (24, 4), (16, 0)])
def test_layers_that_leave_no_map_are_refused(size, layers) -> None:
    with pytest.raises(ConfigError, match=rf"{layers} strided critic layers do not fit images of side {size}"):
        PatchCritic(size, 1, layers=layers)


def test_a_saved_critic_scores_alike(tmp_path) -> None:
    critic = PatchCritic(16, 1, hidden_units=4, layers=2)
    save_module(tmp_path / "critic.safetensors", critic)
    assert torch.equal(load_module(tmp_path / "critic.safetensors", PatchCritic)(noise(2, 0)), critic(noise(2, 0)))


# Eq. 5 --------------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """D(x) = scale * <w, x> with ||w|| = 1, as a score map whose mean it is."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        weight = noise(1, 7)
        self.weight = weight / weight.norm()

    def forward(self, images: Tensor) -> Tensor:
        score = self.scale * (self.weight * images).flatten(1).sum(1)  # (B,)
        return score[:, None, None] + torch.tensor([[[-1.0, 1.0]]])  # (B, 1, 2)


@pytest.mark.parametrize(("scale", "penalty"), [(1.0, 0.0), (3.0, 4.0), (0.0, 1.0), (-1.0, 0.0)])
def test_the_penalty_of_a_linear_critic_is_its_slopes_distance_from_1(scale, penalty) -> None:
    assert gradient_penalty(Linear(scale), noise(5, 0), noise(5, 1)).item() == pytest.approx(penalty, abs=1e-5)


def test_the_penalty_is_the_mean_over_images_worked_out_one_by_one() -> None:
    critic = PatchCritic(16, 1, hidden_units=4, layers=2)
    real, fake = noise(6, 0), noise(6, 1)
    penalty = gradient_penalty(critic, real, fake, torch.Generator().manual_seed(3))
    weights = torch.rand(6, 1, 1, 1, generator=torch.Generator().manual_seed(3))
    expected = []
    for i in range(6):
        point = (weights[i] * real[i] + (1 - weights[i]) * fake[i])[None].requires_grad_(True)
        (gradient,) = torch.autograd.grad(critic(point).mean(), point)
        expected.append((gradient.square().sum().sqrt() - 1) ** 2)
    torch.testing.assert_close(penalty, torch.stack(expected).mean())


def test_the_penalty_teaches_the_critic() -> None:
    critic = Linear(3.0)
    gradient_penalty(critic, noise(5, 0), noise(5, 1)).backward()
    assert critic.scale.grad is not None and critic.scale.grad.item() == pytest.approx(
        4.0, rel=1e-4
    )  # d (s - 1)^2 / ds


def test_a_flat_critic_has_finite_gradients() -> None:
    critic = PatchCritic(16, 1, hidden_units=4, layers=2)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.zero_()
    loss, figures = critic_loss(critic, noise(4, 0), noise(4, 1), 10.0)
    loss.backward()
    assert figures["gradient_penalty"] == 1.0
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in critic.parameters())


def test_second_derivatives_are_right() -> None:
    critic = PatchCritic(8, 1, hidden_units=2, layers=2).double()
    real, fake = noise(3, 0)[..., :8, :8].double(), noise(3, 1)[..., :8, :8].double()

    def loss(weight: Tensor) -> Tensor:
        parameters = {**dict(critic.named_parameters()), "body.2.weight": weight}
        return gradient_penalty(
            lambda x: torch.func.functional_call(critic, parameters, (x,)),  # type: ignore[arg-type]
            real,
            fake,
            torch.Generator().manual_seed(0),
        )

    weight = critic.get_parameter("body.2.weight").detach().clone().requires_grad_(True)
    assert torch.autograd.gradcheck(loss, (weight,), eps=1e-7, atol=1e-5)


def test_the_loss_is_the_sum_of_its_parts() -> None:
    critic = PatchCritic(16, 1, hidden_units=4, layers=2)
    real, fake = noise(4, 0) + 0.3, noise(4, 1)
    loss, figures = critic_loss(critic, real, fake, 10.0, torch.Generator().manual_seed(3))
    gap = critic(real).mean() - critic(fake).mean()
    penalty = gradient_penalty(critic, real, fake, torch.Generator().manual_seed(3))
    torch.testing.assert_close(loss, -gap + 10 * penalty)
    assert figures == pytest.approx({"loss": loss.item(), "gap": gap.item(), "gradient_penalty": penalty.item()})
    assert critic_loss(critic, real, fake, 0.0)[0].item() == pytest.approx(-gap.item())


def test_the_hinge_loss_by_hand() -> None:
    class Scores(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images[:, 0, :1, :2]  # (B, 1, 2)

    real, fake = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    real[0, 0, 0], fake[0, 0, 0] = torch.tensor([0.5, 3.0]), torch.tensor([-2.0, 1.0])
    loss, figures = critic_loss(Scores(), real, fake, 10.0, loss="hinge")
    assert loss.item() == (0.5 + 0.0) / 2 + (0.0 + 2.0) / 2
    assert figures == {"loss": loss.item(), "gap": 1.75 + 0.5}


@pytest.mark.parametrize("loss", ["wgan_gp", "hinge"])
def test_a_few_steps_tell_two_kinds_of_images_apart(loss) -> None:
    critic = PatchCritic(16, 1, hidden_units=8, layers=2)
    optimizer = torch.optim.Adam(critic.parameters(), lr=2e-3, betas=(0.5, 0.999))
    for step in range(60):
        real, fake = noise(16, 2 * step) * 0.3 + 0.3, noise(16, 2 * step + 1) * 0.3 - 0.3
        total, _ = critic_loss(critic, real, fake, 10.0, loss=loss)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    with torch.no_grad():
        real_scores = critic(noise(50, 1000) * 0.3 + 0.3).mean((1, 2))
        fake_scores = critic(noise(50, 1001) * 0.3 - 0.3).mean((1, 2))
    assert real_scores.min() > fake_scores.max()
