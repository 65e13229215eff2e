"""How far each estimator's gradient is from the exact policy gradient, and how noisy it is.

    python benchmarks/gradient.py            # three minutes on one idle core
    python benchmarks/gradient.py --quick    # seconds: shows that everything runs

On a 2 x 2 grid with K = 4 there are 256 images, so the expected return of a small PixelCNN and its gradient are sums,
not estimates. Every estimator is the algorithm class itself, unmodified: its buffer is filled with a batch of episodes
drawn by the policy, `train()` runs, and an optimizer that keeps the gradient instead of stepping records what the
weights would have been given (gradient clipping is out of reach). All see the same images.

The same return is paid in three ways, so that the exact gradient is the same too:

* single: all of it at an image's last code.
* causal: a reward per code, a random function of the codes up to it.
* whole: a reward per code that depends on the whole image, as a critic's upsampled score map does: the causal returns'
  mean over the codes, plus random tables that add up to nothing.

Where rewards come per code, a code is credited with those at and after its own position (Eq. 3 of the paper). That is
exact for causal rewards. For whole ones it leaves out what a code does to the scores of those before it.

Columns: *scale*, the part of the mean estimate along the exact gradient, in units of that gradient; *bias*, what the
mean estimate still differs by after division by the scale, in percent of the exact gradient's length, with the
standard deviation that noise alone gives it (bias 0 means: below noise); *cosine* of mean estimate and exact gradient,
corrected for the same noise; *variance*, total variance of one estimate divided by the squared scale, relative to that
of REINFORCE without baseline on single rewards. Losses here are means over codes, so the reference is the gradient
of the expected return divided by T.

The mean estimates are sharpened by a control variate: the score-function estimate of the same images with a constant
baseline, whose expectation is a sum over the 256 images. It takes noise away and cannot move an expectation.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.logger import configure
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import Tensor

from ral_gym.agents import GRPO, CodeVecEnv, EpisodeRolloutBuffer, PriorPolicy, Reinforce
from ral_gym.agents.algorithms.reinforce import BASELINES
from ral_gym.envs.worlds import World
from ral_gym.grid import CodeGrid
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.sampler import CachedSampler
from ral_gym.report.tables import plain_table

RewardTable = Literal["single", "causal", "whole"]
NO_CLIPPING = 1e12


@dataclass(frozen=True)
class Estimator:
    """One line of the table: its name, the algorithm, its constructor's arguments, and which reward table."""

    name: str
    algorithm: type[OnPolicyAlgorithm]
    arguments: dict[str, Any] = field(default_factory=dict)
    rewards: RewardTable = "single"


def all_estimators() -> list[Estimator]:
    """The lines of the table."""
    plain = {"normalize_advantage": False}
    ppo = {"n_epochs": 1, "gamma": 1.0, "gae_lambda": 1.0}
    a2c = {"gamma": 1.0, "use_rms_prop": False}
    grpo = {"n_epochs": 1, "ratio": "token"}
    lines = [
        *(Estimator(f"REINFORCE {name}", Reinforce, plain | {"baseline": name}) for name in BASELINES),
        Estimator("REINFORCE none, normalised", Reinforce, {"baseline": "none"}),
        Estimator("REINFORCE leave_one_out, normalised", Reinforce, {"baseline": "leave_one_out"}),
        Estimator("PPO", PPO, plain | ppo),
        Estimator("PPO, gae_lambda 0.95", PPO, plain | ppo | {"gae_lambda": 0.95}),
        Estimator("PPO, normalised", PPO, ppo),
        Estimator("A2C", A2C, plain | a2c),
        Estimator("A2C, normalised", A2C, a2c | {"normalize_advantage": True}),
        Estimator("GRPO, unscaled", GRPO, grpo | {"scale_advantage": "none"}),
        Estimator("GRPO", GRPO, grpo),
    ]
    tables: tuple[RewardTable, ...] = ("causal", "whole")
    for rewards in tables:
        for baseline, gamma in (("none", 1.0), ("leave_one_out", 1.0), ("none", 0.99), ("none", 0.9)):
            arguments = plain | {"baseline": baseline, "gamma": gamma}
            lines.append(Estimator(f"REINFORCE {baseline}, gamma {gamma:g}", Reinforce, arguments, rewards))
    return lines


class KeepGradient(torch.optim.Optimizer):
    """An optimizer that leaves the weights alone; their gradients stay where `train()` put them."""

    steps = 0

    def __init__(self, params: Any, lr: float = 0.0, **kwargs: Any) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Count, and change nothing."""
        self.steps += 1


@contextmanager
def double_precision() -> Iterator[None]:
    """Float64 for every tensor made inside, so that an estimate is exact to the float32 of advantages."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Toy:
    """All images of a small grid, the policy's network, and the reward tables. Made under `double_precision`.

    Args:
        codebook_size: K.
        height: H.
        width: W.
        seed: of weights and rewards.

    Attributes:
        images: (K^T, T) int64, every image.
        prior: the network, warm: its images are far from equally likely.
        rewards: name -> (K^T, T), the reward of each code of each image; the sums over codes are the same for all.
    """

    def __init__(self, codebook_size: int = 4, height: int = 2, width: int = 2, seed: int = 0) -> None:
        self.grid = CodeGrid(height, width, codebook_size)
        length = self.grid.n_codes
        axes = [torch.arange(codebook_size)] * length
        self.images = torch.cartesian_prod(*axes)
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            sizes: dict[str, Any] = {"hidden_units": 6, "residual_units": 6, "layers": 1, "output_stack_layers": 1}
            self.prior = PixelCNN(codebook_size, height, width, conv_filter_size=3, position_embedding=True, **sizes)
            for weights in self.prior.parameters():
                weights.data *= 2
            self.prior.output.to_logits.weight.data *= 8
        self.prior.eval()
        number = len(self.images)
        causal = torch.empty(number, length)
        for t in range(length):
            after = codebook_size ** (length - t - 1)  # images that share the codes up to t
            causal[:, t] = torch.randn(number // after, generator=generator).repeat_interleave(after)
        returns = 1 + causal.sum(1)
        single = torch.zeros(number, length)
        single[:, -1] = returns
        causal[:, -1] += 1
        noise = torch.randn(number, length, generator=generator)
        whole = returns[:, None] / length + noise - noise.mean(1, keepdim=True)
        self.rewards = {"single": single, "causal": causal, "whole": whole}

    def index(self, codes: np.ndarray) -> np.ndarray:
        """Which of `images` some grids (..., T) are: (...)."""
        return codes @ self.grid.codebook_size ** np.arange(self.grid.n_codes - 1, -1, -1)

    def log_probs(self) -> Tensor:
        """(K^T, T) log-probability of every code of every image, with a graph."""
        return self.prior(self.images).log_softmax(-1).gather(-1, self.images[..., None]).squeeze(-1)

    def probabilities(self) -> Tensor:
        """(K^T,) of every image."""
        with torch.no_grad():
            return self.log_probs().sum(1).exp()

    def flat(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Gradients of the prior's weights as one vector (D,)."""
        parameters = self.prior.parameters()
        return torch.cat(
            [
                torch.zeros_like(p).flatten() if g is None else g.flatten()
                for p, g in zip(parameters, gradients, strict=True)
            ]
        )

    def exact(self) -> Tensor:
        """(D,) gradient of the loss, minus the expected (undiscounted) return divided by T, by enumeration."""
        value = (self.log_probs().sum(1).exp() * self.rewards["single"].sum(1)).sum()
        loss = -value / self.grid.n_codes
        return self.flat(torch.autograd.grad(loss, list(self.prior.parameters()), allow_unused=True))

    def scores(self) -> Tensor:
        """(K^T, T, D) gradient of every log-probability."""
        log_probs = self.log_probs()
        parameters = list(self.prior.parameters())
        one_each = torch.eye(log_probs.numel()).view(-1, *log_probs.shape)
        gradients = torch.autograd.grad(log_probs, parameters, one_each, is_grads_batched=True, allow_unused=True)
        columns = [
            torch.zeros(log_probs.numel(), p.numel()) if g is None else g.flatten(1)
            for p, g in zip(parameters, gradients, strict=True)
        ]
        return torch.cat(columns, 1).view(*log_probs.shape, -1)


def to_go(rewards: Tensor, gamma: float) -> Tensor:
    """(n, T) rewards -> (n, T) discounted rewards-to-go."""
    returns = rewards.clone()
    for t in reversed(range(rewards.shape[1] - 1)):
        returns[:, t] += gamma * returns[:, t + 1]
    return returns


def make_model(toy: Toy, estimator: Estimator, n_images: int) -> OnPolicyAlgorithm:
    """The algorithm, with `n_images` environments and an optimizer that only keeps gradients."""

    def decode(codes: Tensor) -> Tensor:
        return torch.zeros(len(codes), 1, toy.grid.height, toy.grid.width, dtype=torch.uint8)

    world = World(toy.grid, decode, scorer=None, real_codes=None, row_multiple=1, device=torch.device("cpu"))
    arguments: dict[str, Any] = {
        "n_steps": toy.grid.n_codes,
        "rollout_buffer_class": EpisodeRolloutBuffer,
        "max_grad_norm": NO_CLIPPING,
        "seed": 0,
        "device": "cpu",
        "policy_kwargs": {"prior": toy.prior, "optimizer_class": KeepGradient},
    }
    if estimator.algorithm is PPO:
        arguments["batch_size"] = toy.grid.n_codes * n_images
    env = CodeVecEnv(world, n_images)
    model = estimator.algorithm(PriorPolicy, env, **(arguments | estimator.arguments))
    model.set_logger(configure(None, []))
    for weights in model.policy.value_net.parameters():
        weights.data *= 2  # a baseline that matters, and has nothing to do with the rewards
    return model


def estimate(model: OnPolicyAlgorithm, toy: Toy, rewards: RewardTable, codes: Tensor) -> Tensor:
    """The gradient (D,) that ``train()`` gives the PixelCNN for the images (n, T), one per environment."""
    policy: PriorPolicy = model.policy  # type: ignore[assignment]
    buffer: EpisodeRolloutBuffer = model.rollout_buffer  # type: ignore[assignment]
    table = toy.rewards[rewards][toy.index(codes.numpy())].numpy()  # (n, T)

    def fill(values: np.ndarray, log_probs: np.ndarray) -> None:
        buffer.reset()
        start = np.full(codes.shape, toy.grid.not_drawn, np.int16)
        buffer.add_round(start, codes.numpy(), table[:, -1], values, log_probs)

    fill(np.zeros(codes.shape), np.zeros(codes.shape))
    with torch.no_grad():
        values, log_probs, _ = policy.evaluate_actions(buffer.episodes(), codes.flatten())
    fill(values.view_as(codes).numpy(), log_probs.view_as(codes).numpy())
    buffer.write_rewards(table)
    buffer.compute_returns_and_advantage()
    steps = policy.optimizer.steps  # type: ignore[attr-defined]
    policy.optimizer.zero_grad()
    model.train()
    assert policy.optimizer.steps == steps + 1, "one optimizer step per estimate"  # type: ignore[attr-defined]
    return toy.flat([parameter.grad for parameter in policy.prior.parameters()])


def batches(toy: Toy, n_images: int, repeats: int, seed: int = 0) -> Tensor:
    """Images (M, n, T) drawn by the policy's sampler."""
    torch.manual_seed(seed)
    codes, _ = CachedSampler(toy.prior).sample(n_images * repeats)
    return codes.view(repeats, n_images, -1)


@dataclass(frozen=True)
class Summary:
    """What the table shows of one estimator; see the module's text. `variance` is not divided by anybody else's."""

    scale: float
    scale_error: float
    bias: float
    bias_error: float
    cosine: float
    variance: float


def summarise(estimates: Tensor, control: Tensor, expected_control: Tensor, exact: Tensor) -> Summary:
    """Compare estimates with the exact gradient.

    Args:
        estimates: (M, D).
        control: (M, D) control variates of the same batches.
        expected_control: (D,) their exact mean.
        exact: (D,).
    """
    repeats = len(estimates)
    deviations = control - control.mean(0)
    slope = ((estimates - estimates.mean(0)) * deviations).sum() / (deviations**2).sum()
    sharp = estimates - slope * (control - expected_control)  # (M, D)
    mean = sharp.mean(0)
    noise = sharp - mean
    squared = exact @ exact
    along = sharp @ exact / squared  # (M,)
    scale = along.mean().item()
    rest = mean / scale - exact  # (D,), at a right angle to `exact`
    across = (noise - (noise @ exact / squared)[:, None] * exact) / scale  # (M, D)
    covariance = across.T @ across / (repeats - 1)
    error = (covariance.trace() / repeats).item()  # what |rest|^2 is on average without any bias
    spread = (2 * (covariance**2).sum()).sqrt().item() / repeats  # its standard deviation then
    bias = max(0.0, (rest @ rest).item() - error) ** 0.5 / squared.sqrt().item()
    return Summary(
        scale=scale,
        scale_error=(along.std() / repeats**0.5).item(),
        bias=bias,
        bias_error=(spread**0.5) / squared.sqrt().item(),
        cosine=np.sign(scale) / (1 + bias**2) ** 0.5,
        variance=estimates.var(0).sum().item() / scale**2,
    )


def control_variates(
    toy: Toy, scores: Tensor, rewards: RewardTable, gamma: float, drawn: Tensor
) -> tuple[Tensor, Tensor]:
    """The score-function estimate with a constant baseline, of every batch (M, D), and its exact mean (D,)."""
    returns = to_go(toy.rewards[rewards], gamma)  # (K^T, T)
    probabilities = toy.probabilities()
    advantages = returns - probabilities @ returns
    per_image = -(advantages[..., None] * scores).sum(1) / toy.grid.n_codes  # (K^T, D)
    index = torch.as_tensor(toy.index(drawn.numpy()))  # (M, n)
    return per_image[index].mean(1), probabilities @ per_image


def measure(toy: Toy, estimators: Iterable[Estimator], n_images: int, repeats: int) -> list[Summary]:
    """Every estimator on the same batches."""
    scores = toy.scores()
    drawn = batches(toy, n_images, repeats)
    summaries = []
    for estimator in estimators:
        model = make_model(toy, estimator, n_images)
        estimates = torch.stack([estimate(model, toy, estimator.rewards, codes) for codes in drawn])
        gamma = estimator.arguments.get("gamma", 1.0)
        control, expected = control_variates(toy, scores, estimator.rewards, gamma, drawn)
        summaries.append(summarise(estimates, control, expected, toy.exact()))
    return summaries


def report(estimators: Sequence[Estimator], summaries: Sequence[Summary], caption: str) -> Table:
    """The table."""
    headings = ("estimator", "scale", "bias, %", "cosine", "variance")
    table = plain_table(headings, title="Gradient estimates against the exact gradient", caption=caption)
    before = ""
    for estimator, summary in zip(estimators, summaries, strict=True):
        if before != estimator.rewards:
            table.add_section()
            table.add_row(f"[italic]{estimator.rewards} rewards")
        before = estimator.rewards
        table.add_row(
            estimator.name,
            f"{summary.scale:.3f} ± {summary.scale_error:.3f}",
            f"{100 * summary.bias:.1f} ± {100 * summary.bias_error:.1f}",
            f"{summary.cosine:.3f}",
            f"{summary.variance / summaries[0].variance:.2f}",
        )
    return table


@dataclass
class Arguments:
    """Options of the benchmark."""

    n_images: int = 8
    """Images per estimate."""
    repeats: int = 2000
    """Estimates per line."""
    quick: bool = False
    """5 estimates per line: shows that everything runs."""


def main(argv: Sequence[str], console: Console) -> None:
    """Measure, and print the table."""
    arguments = tyro.cli(Arguments, args=list(argv), description=__doc__)
    torch.set_num_threads(1)
    repeats = 5 if arguments.quick else arguments.repeats
    estimators = all_estimators()
    with double_precision():
        toy = Toy()
        lines = track(estimators, "Estimating", console=console, transient=True, disable=not console.is_terminal)
        summaries = measure(toy, lines, arguments.n_images, repeats)
        entropy = -(toy.probabilities() * toy.probabilities().log()).sum()
    height, width, size = toy.grid.height, toy.grid.width, toy.grid.codebook_size
    caption = (
        f"{height}x{width} codes, K={size}, {len(toy.images)} images (entropy {entropy:.2f} of "
        f"{len(toy.images[0]) * np.log(size):.2f} nats), {sum(p.numel() for p in toy.prior.parameters())} weights, "
        f"{arguments.n_images} images per estimate, {repeats} estimates per line"
    )
    console.print(report(estimators, summaries, caption))


if __name__ == "__main__":
    main(sys.argv[1:], Console())
