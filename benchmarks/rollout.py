"""What the episode buffer, the cache and the batched environments save, as ratios from one run.

    python benchmarks/rollout.py             # two minutes on an idle machine
    python benchmarks/rollout.py --quick     # seconds, tiny networks: a smoke test, no result

Times are wall-clock. The sides of a ratio take turns, so that a busy machine slows them alike: seconds are medians
over the rounds, ratios medians of the ratios within a round.

* PPO: one iteration (a rollout of whole episodes and one epoch, four minibatches). `ours` is PPO with
  `EpisodeRolloutBuffer` and the policy's cache; `stock` is the same policy with SB3's `RolloutBuffer` and a full pass
  per step. Stock is too slow to be timed whole in every round. SB3's own code runs on `STOCK_STEPS` steps of T: a full
  pass costs the same at every position, so the rest is a matter of counts (`stock_seconds`). One whole stock iteration
  at the first size checks that.
* Environments: random actions, drawn beforehand.
* Memory: every array the buffer holds after a rollout, and what its bookkeeping adds when it is read.
* Outside network maths: one iteration under exclusive timers. Network maths is the PixelCNN's and the value head's
  passes, the sampler's work, drawing, log-probabilities and entropies, backward passes, gradient clipping, the
  optimizer, decoding and scoring. The rest (environment, buffer, SB3's loop and loss, the step cache's comparisons,
  copies in between) is outside.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium import spaces
from rich.console import Console
from rich.table import Table
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor

import ral_gym.agents.policy as policy_module
from ral_gym.agents import CodeVecEnv, EpisodeRolloutBuffer, PriorPolicy
from ral_gym.envs.worlds import World
from ral_gym.grid import CodeGrid
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.sampler import CachedSampler
from ral_gym.report.tables import plain_table

STOCK_STEPS = 4
"""Steps of a rollout that stock PPO is timed on."""
STOCK_BATCH = 64
"""Transitions per minibatch of stock PPO, SB3's default: T times as many grids as codes would not fit in memory."""
MINIBATCHES = 4
"""Optimizer steps of an iteration."""
WHAT_TO_TIME: dict[str, list[tuple[Any, str]]] = {
    "network": [
        *((PixelCNN, name) for name in ("features", "logits")),
        *((CachedSampler, name) for name in ("refresh", "begin", "rebuild", "features", "logits", "advance")),
        *((CategoricalDistribution, name) for name in ("proba_distribution", "log_prob", "entropy")),
        (policy_module.ValueHead, "forward"),
        (policy_module, "draw"),
        (torch.Tensor, "backward"),
        (torch.nn.utils, "clip_grad_norm_"),
        (torch.optim.Adam, "step"),
    ],
    "environment": [(CodeVecEnv, name) for name in ("reset", "step_wait")],
    "buffer": [
        (EpisodeRolloutBuffer, name)
        for name in ("reset", "add", "compute_returns_and_advantage", "episodes", "_samples")
    ],
}


@dataclass(frozen=True)
class Settings:
    """How large everything is."""

    sides: tuple[int, ...] = (8, 16)
    codebook_size: int = 512
    units: int = 128
    layers: int = 5
    n_envs: int = 16
    rounds: int = 5
    vector_envs: int = 64
    outside_envs: int = 64
    memory: tuple[int, int] = (1280, 64)


QUICK = Settings(sides=(2, 4), codebook_size=16, units=8, layers=1, rounds=1, vector_envs=8, outside_envs=8)


@dataclass
class Arguments:
    """Options of the benchmark."""

    quick: bool = False
    """Tiny networks and one round: shows that everything runs."""
    rounds: int | None = None
    """Rounds per ratio."""
    threads: int | None = None
    """CPU threads; default: PyTorch's choice."""
    device: str = "cpu"
    """cpu or cuda."""
    environments: tuple[str, ...] = ("ral_gym/Toy-v0", "ral_gym/Faces-v0")
    """Ids whose steps are counted; those that are not registered are left out."""


class TileScorer:
    """A stand-in for decoder and critic: every code has a fixed random score."""

    def __init__(self, grid: CodeGrid, device: torch.device) -> None:
        self.width = grid.width
        self.scores = torch.rand(grid.codebook_size, generator=torch.Generator().manual_seed(0)).to(device)

    def __call__(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (B, r * W) -> score map (B, r, W), step rewards (B, r * W): the mean score, at the last code."""
        score_map = self.scores[codes].view(len(codes), -1, self.width)
        rewards = torch.zeros(codes.shape, device=codes.device)
        rewards[:, -1] = score_map.flatten(1).mean(1)
        return score_map, rewards


def tile_world(grid: CodeGrid, device: torch.device) -> World:
    """A world of any size without learned weights: `TileScorer` scores, images are black."""

    def decode(codes: Tensor) -> Tensor:
        return torch.zeros(len(codes), 1, grid.height, grid.width, dtype=torch.uint8)

    return World(grid, decode, TileScorer(grid, device), real_codes=None, row_multiple=1, device=device)


def make_ppo(settings: Settings, side: int, n_envs: int, device: torch.device, stock_steps: int | None = None) -> PPO:
    """PPO with our buffer and cache; with `stock_steps`, SB3's buffer, a full pass per step and that many steps."""
    torch.manual_seed(0)
    grid = CodeGrid(side, side, settings.codebook_size)
    units, layers = settings.units, settings.layers
    prior = PixelCNN(grid.codebook_size, side, side, hidden_units=units, residual_units=units, layers=layers)
    env = CodeVecEnv(tile_world(grid, device), n_envs)
    env.seed(0)
    stock = stock_steps is not None
    model = PPO(
        PriorPolicy,
        env,
        n_steps=stock_steps or grid.n_codes,
        batch_size=STOCK_BATCH if stock else grid.n_codes * n_envs // MINIBATCHES,
        n_epochs=1,
        gamma=1.0,
        gae_lambda=1.0,
        rollout_buffer_class=RolloutBuffer if stock else EpisodeRolloutBuffer,
        policy_kwargs={"prior": prior, "use_cache": not stock},
        device=device,
        seed=0,
    )
    model.set_logger(configure(None, []))
    return model


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of one call."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def collect(model: PPO) -> None:
    """One rollout."""
    _, callback = model._setup_learn(1, None, reset_num_timesteps=False)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)  # type: ignore[arg-type]


def stock_seconds(model: PPO, n_codes: int) -> float:
    """Seconds of a whole stock iteration, from one with fewer steps.

    A rollout of s steps makes s + 1 passes over the environments' grids (SB3 asks for the last observation's value),
    one of T steps T + 1. Of s steps come s E transitions to learn from, of T steps T E. Optimizer steps are charged
    `MINIBATCHES` times, as on our side, although minibatches are smaller here.
    """
    rollout = seconds(lambda: collect(model), model.device)
    learning = seconds(model.train, model.device)

    def optimize() -> None:
        torch.nn.utils.clip_grad_norm_(model.policy.parameters(), model.max_grad_norm)
        model.policy.optimizer.step()

    optimizer = seconds(optimize, model.device)
    steps, minibatches = model.n_steps, max(1, model.n_steps * model.n_envs // STOCK_BATCH)
    passes = (learning - minibatches * optimizer) * n_codes / steps
    return rollout * (n_codes + 1) / (steps + 1) + passes + MINIBATCHES * optimizer


def compare_ppo(settings: Settings, device: torch.device, table: Table) -> None:
    """Fill the table of PPO iterations, one row per grid."""
    for number, side in enumerate(settings.sides):
        n_codes = side * side
        ours = make_ppo(settings, side, settings.n_envs, device)
        stock = make_ppo(settings, side, settings.n_envs, device, STOCK_STEPS)
        times: list[tuple[float, float, float]] = []
        for _ in range(settings.rounds + 1):
            scaled = stock_seconds(stock, n_codes)
            times.append((seconds(lambda: collect(ours), device), seconds(ours.train, device), scaled))  # noqa: B023
        times = times[1:]  # the first round warms up
        medians = [statistics.median(column) for column in zip(*times, strict=True)]
        ratio = statistics.median(scaled / (rollout + learning) for rollout, learning, scaled in times)
        whole = "-"
        if number == 0:
            whole = f"{stock_seconds(make_ppo(settings, side, settings.n_envs, device, n_codes), n_codes):.1f} s"
        cells = [f"{medians[0]:.3f} s", f"{medians[1]:.3f} s", f"{medians[2]:.1f} s", whole, f"{ratio:.0f}x"]
        table.add_row(f"{n_codes}", *cells, {8: ">= 30x", 16: ">= 100x"}.get(side, "-"))


def compare_environments(settings: Settings, ids: Sequence[str], table: Table) -> None:
    """Fill the table of environment steps per second, one row per registered id."""
    n_envs = settings.vector_envs
    rng = np.random.default_rng(0)
    for id in ids:
        if id not in gym.registry:
            continue
        native = gym.make_vec(id, num_envs=n_envs)
        dummy = DummyVecEnv([lambda: gym.make(id) for _ in range(n_envs)])  # noqa: B023
        native.reset(seed=0)
        dummy.seed(0)
        dummy.reset()
        shape = (2 * dummy.observation_space.shape[0], n_envs)  # type: ignore[index]
        rates: list[tuple[float, float]] = []
        for _ in range(settings.rounds + 1):
            actions = rng.integers(dummy.action_space.n, size=shape)  # type: ignore[attr-defined]
            spent = [_step_seconds(env, actions) for env in (native, dummy)]
            rates.append((actions.size / spent[0], actions.size / spent[1]))
        rates = rates[1:]
        fast, slow = (statistics.median(column) for column in zip(*rates, strict=True))
        ratio = statistics.median(a / b for a, b in rates)
        table.add_row(id, f"{fast:,.0f}", f"{slow:,.0f}", f"{ratio:.1f}x", ">= 20x" if id == "ral_gym/Toy-v0" else "-")


def _step_seconds(env: Any, actions: np.ndarray) -> float:
    start = time.perf_counter()
    for action in actions:
        env.step(action)
    return time.perf_counter() - start


def buffer_bytes(n_codes: int, n_envs: int, codebook_size: int) -> int:
    """Bytes of all arrays of the episode buffer after a rollout of one episode per environment, and after reading."""
    observations = spaces.Box(0, codebook_size + 1, (n_codes,), np.int16)
    buffer = EpisodeRolloutBuffer(n_codes, observations, spaces.Discrete(codebook_size), "cpu", n_envs=n_envs)
    rng = np.random.default_rng(0)
    start = np.full((n_envs, n_codes), codebook_size, np.int16)
    codes = rng.integers(codebook_size, size=start.shape)
    buffer.add_round(start, codes, rng.random(n_envs), rng.random(start.shape), rng.random(start.shape))
    buffer.compute_returns_and_advantage()
    assert (buffer.codes == codes).all()
    return array_bytes(vars(buffer).values())


def array_bytes(values: Any) -> int:
    """Bytes of the arrays among some values, and in lists and tuples among them."""
    arrays = [value for value in values if isinstance(value, np.ndarray)]
    nested = [value for value in values if isinstance(value, list | tuple)]
    return sum(array.nbytes for array in arrays) + sum(array_bytes(value) for value in nested)


class ExclusiveClock:
    """Adds up seconds per group in `totals` ("rest": outside all); a group inside another stops the outer's clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.totals: dict[str, float] = {}
        self._open = ["rest"]
        self._last = time.perf_counter()

    def switch(self, group: str | None) -> None:
        """Enter a group, or leave the innermost one (None)."""
        _wait(self.device)
        now = time.perf_counter()
        self.totals[self._open[-1]] = self.totals.get(self._open[-1], 0.0) + now - self._last
        self._last = now
        if group is None:
            self._open.pop()
        else:
            self._open.append(group)

    def wrap(self, work: Callable[..., Any], group: str) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.switch(group)
            try:
                return work(*args, **kwargs)
            finally:
                self.switch(None)

        return timed


@contextmanager
def timers(device: torch.device) -> Iterator[ExclusiveClock]:
    """Time everything in `WHAT_TO_TIME` by group while the context lasts."""
    clock = ExclusiveClock(device)
    points = [(owner, name, group) for group, places in WHAT_TO_TIME.items() for owner, name in places]
    points.append((TileScorer, "__call__", "network"))
    before = [(owner, name, getattr(owner, name), name in vars(owner)) for owner, name, _ in points]
    for owner, name, group in points:
        setattr(owner, name, clock.wrap(getattr(owner, name), group))
    try:
        clock._last = time.perf_counter()
        yield clock
        clock.switch("rest")
    finally:
        for owner, name, function, own in before:
            setattr(owner, name, function) if own else delattr(owner, name)


def outside_shares(settings: Settings, device: torch.device) -> list[dict[str, float]]:
    """Seconds per group of one PPO iteration, per round."""
    model = make_ppo(settings, settings.sides[0], settings.outside_envs, device)
    rounds = []
    for _ in range(settings.rounds + 1):
        with timers(device) as clock:
            collect(model)
            model.train()
        rounds.append(clock.totals)
    return rounds[1:]


def main(argv: Sequence[str], console: Console) -> None:
    """Measure, and print a table per question."""
    arguments = tyro.cli(Arguments, args=list(argv), description=__doc__)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    settings = QUICK if arguments.quick else Settings()
    if arguments.rounds:
        settings = Settings(**{**vars(settings), "rounds": arguments.rounds})
    place = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    how = f"medians of {settings.rounds} rounds, load average {os.getloadavg()[0]:.1f}"
    console.print(f"torch {torch.__version__}, {place}, float32, {how}\n")
    size = f"K={settings.codebook_size}, {settings.n_envs} environments, {settings.units} units x {settings.layers}"

    table = plain_table(
        ("T", "ours\ncollect", "ours\ntrain", "stock\nscaled", "stock\nwhole", "ratio", "wanted"),
        title="PPO iteration: one rollout, one epoch",
        min_width=78,
        caption=f"{size} layers, {MINIBATCHES} optimizer steps. stock: SB3's buffer, a full pass per step; scaled from "
        f"{STOCK_STEPS} of T steps and the {STOCK_STEPS * settings.n_envs} transitions they give",
    )
    compare_ppo(settings, device, table)
    console.print(table, "")

    table = plain_table(
        ("id", "vector", "DummyVecEnv", "ratio", "wanted"),
        title="Environment steps per second, random actions",
        min_width=78,
        caption=f"{settings.vector_envs} rows of gym.make_vec against DummyVecEnv over as many gym.make",
    )
    compare_environments(settings, arguments.environments, table)
    console.print(table, "")

    headings = ("T x environments", "ours", "stock", "wanted")
    table = plain_table(headings, title="Rollout memory", caption="all arrays, after a rollout", min_width=78)
    n_codes, n_envs = settings.memory
    stock = RolloutBuffer(1, spaces.Box(0, 513, (n_codes,), np.int16), spaces.Discrete(512), "cpu", n_envs=n_envs)
    held, stock_held = buffer_bytes(n_codes, n_envs, 512), array_bytes(vars(stock).values()) * n_codes
    table.add_row(f"{n_codes:,} x {n_envs}", f"{held / 1e6:.1f} MB", f"{stock_held / 1e6:,.0f} MB", "<= 8 MB")
    console.print(table, "")

    rounds = outside_shares(settings, device)
    table = plain_table(
        ("", "seconds", "share", "wanted"),
        title="Where a PPO iteration spends its time",
        min_width=78,
        caption=f"T={settings.sides[0] ** 2}, {settings.outside_envs} environments, otherwise as above. rest: SB3's "
        "loop and loss, comparisons of the step cache, copies. The timers themselves cost the rest a little",
    )
    for group in ("network", "environment", "buffer", "rest"):
        share = statistics.median(totals[group] / sum(totals.values()) for totals in rounds)
        table.add_row(group, f"{statistics.median(totals[group] for totals in rounds):.4f}", f"{share:.1%}", "")
    outside = statistics.median(1 - totals["network"] / sum(totals.values()) for totals in rounds)
    spent = statistics.median(sum(totals.values()) - totals["network"] for totals in rounds)
    table.add_row("outside network maths", f"{spent:.4f}", f"{outside:.1%}", "<= 15 %")
    console.print(table)


if __name__ == "__main__":
    main(sys.argv[1:], Console())
