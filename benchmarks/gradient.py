"""How far each estimator's gradient is from the exact policy gradient, and how noisy it is.

    python benchmarks/gradient.py            # three minutes on one idle core
    python benchmarks/gradient.py --quick    # seconds: shows that everything runs

On a 2 x 2 grid with K = 4 there are 256 images, so the expected return of a small PixelCNN and its gradient are sums,
not estimates. Every estimator is the algorithm class itself, unmodified: its buffer is filled with a batch of episodes
drawn by the policy, `train()` runs, and an optimizer that keeps the gradient instead of stepping records what the
weights would have been given (gradient clipping is out of reach). All see the same images.

The same return is paid in three ways, so that the exact gradient is the same too:

* single: all of it at an image's last code.
* causal: a reward per code, a random function of the codes up to it. *All actions*: the reward of a code is summed over
  all codes in its place (`Reinforce(all_actions=True)`), those of later ones are sampled; baseline leave_one_out.
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

Lines with N at m of 3 have N Monte-Carlo roll-outs (`MonteCarloReturns`) at m of an image's 3 positions before the last
one.
A second table has what roll-outs cost: the time of an update (drawing, rewards, learning) in units of that with N = 1,
with as many roll-outs at 8 positions, on a grid of 8 x 8. Roll-outs pay at equal cost where the variance falls by more
than the time grows, since so many more images per update would lower it by as much.

The mean estimates are sharpened by a control variate: the score-function estimate of the same images with a constant
baseline, whose expectation is a sum over the 256 images. It takes noise away and cannot move an expectation.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import tyro
from gradient_parts.rollout_cost import PART, rollout_costs
from gradient_parts.toy import KeepGradient, TableReward, Toy, double_precision
from rich.console import Console
from rich.progress import track
from rich.table import Table
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.logger import configure
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import Tensor

from ral_gym.agents import GRPO, CodeVecEnv, EpisodeRolloutBuffer, MonteCarloReturns, PriorPolicy, Reinforce
from ral_gym.agents.algorithms.reinforce import BASELINES
from ral_gym.envs.worlds import World
from ral_gym.priors.sampler import CachedSampler
from ral_gym.report.tables import plain_table

RewardTable = Literal["single", "causal", "whole"]
NO_CLIPPING = 1e12


@dataclass(frozen=True)
class Estimator:
    """One line of the table: name, algorithm, its constructor's arguments, which reward table, and its roll-outs."""

    name: str
    algorithm: type[OnPolicyAlgorithm]
    arguments: dict[str, Any] = field(default_factory=dict)
    rewards: RewardTable = "single"
    n_rollouts: int = 1
    positions: int = 8


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
    for number in (4, 16):
        for positions in (1, 3):
            name = f"leave_one_out, N {number:2} at {positions} of 3"
            lines.append(
                Estimator(
                    name, Reinforce, plain | {"baseline": "leave_one_out"}, n_rollouts=number, positions=positions
                )
            )
    for rewards in tables:
        for baseline, gamma in (("none", 1.0), ("leave_one_out", 1.0), ("none", 0.99), ("none", 0.9)):
            arguments = plain | {"baseline": baseline, "gamma": gamma}
            lines.append(Estimator(f"REINFORCE {baseline}, gamma {gamma:g}", Reinforce, arguments, rewards))
    for gamma in (1.0, 0.9):
        arguments = plain | {"baseline": "leave_one_out", "gamma": gamma, "all_actions": True}
        lines.append(Estimator(f"all actions, gamma {gamma:g}", Reinforce, arguments, "causal"))
    return sorted(lines, key=lambda line: ("single", *tables).index(line.rewards))


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
    if getattr(model, "all_actions", False):
        model.action_rewards = toy.action_rewards  # type: ignore[attr-defined]
    for weights in model.policy.value_net.parameters():
        weights.data *= 2  # a baseline that matters, and has nothing to do with the rewards
    return model


def make_rollouts(model: OnPolicyAlgorithm, toy: Toy, estimator: Estimator) -> MonteCarloReturns | None:
    """The estimator's roll-outs, None for one."""
    if estimator.n_rollouts == 1:
        return None
    rollouts = MonteCarloReturns(TableReward(toy), estimator.n_rollouts, estimator.positions)
    rollouts.init_callback(model)
    return rollouts


def estimate(
    model: OnPolicyAlgorithm,
    toy: Toy,
    rewards: RewardTable,
    codes: Tensor,
    rollouts: MonteCarloReturns | None = None,
) -> Tensor:
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
    if rollouts is not None:
        rollouts.on_rollout_end()
    if getattr(model, "all_actions", False):
        model.paid = table  # type: ignore[attr-defined]
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
        rollouts = make_rollouts(model, toy, estimator)
        estimates = torch.stack([estimate(model, toy, estimator.rewards, codes, rollouts) for codes in drawn])
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
    cost: bool = True
    """Also measure the time of roll-outs."""


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
    if arguments.cost:
        table = plain_table(("N", "time of an update"), title="What roll-outs cost")
        for number, (median, low, high) in rollout_costs(arguments.quick).items():
            table.add_row(str(number), f"{median:.2f} ({low:.2f} to {high:.2f})")
        console.print(table)
        console.print(f"{PART}; median and range of ratios")


if __name__ == "__main__":
    main(sys.argv[1:], Console())
