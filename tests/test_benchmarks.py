"""The speed benchmarks: they run from end to end on tiny settings, and their arithmetic is right."""

import contextlib
import importlib.util
import logging
import math
import sys
import time
from functools import cache
from pathlib import Path
from types import ModuleType

import cost
import gymnasium as gym
import numpy as np
import products
import pytest
import throughput
import torch
from rich.console import Console
from stable_baselines3.common.buffers import RolloutBuffer

from ral_gym.agents import EpisodeRolloutBuffer
from ral_gym.agents.step_cache import StepCache
from ral_gym.grid import CodeGrid
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.sampler import CachedSampler

FOLDER = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")


@cache
def bench(name: str = "rollout") -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_bench", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"{name}_bench"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def test_the_whole_benchmark_prints_every_table(capsys) -> None:
    features = PixelCNN.features
    bench().main(["--quick", "--environments", "ral_gym/Toy-v0", "ral_gym/Nowhere-v0"], Console(width=80))
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    for row in ("4", "16", "ral_gym/Toy-v0", "1,280 x 64", "network", "environment", "buffer", "rest"):
        assert row in rows, out
    assert ">= 20x" in rows["ral_gym/Toy-v0"] and "<= 15 %" in rows["outside network maths"]
    assert PixelCNN.features is features  # the timers are gone
    assert "forward" in vars(bench().policy_module.ValueHead)


def test_sampling_benchmark_runs(capsys, monkeypatch) -> None:
    sampling = bench("sampling")
    tiny = {"codebook_size": 8, "height": 4, "width": 4, "layers": 1, "hidden_units": 8, "residual_units": 8}
    turning = {"kind": "transformer", "codebook_size": 8, "height": 4, "width": 4, "layers": 1, "hidden_units": 16}
    monkeypatch.setattr(sampling, "SETTINGS", {"tiny": tiny, "turning": turning})
    monkeypatch.setattr(sys, "argv", ["sampling.py", "--quick"])
    sampling.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith(("tiny", "turning"))] == [
        *2 * ["tiny"],
        *2 * ["turning"],
    ]


def test_a_stock_iteration_is_scaled_by_counts(monkeypatch) -> None:
    """With a clock that counts grids passed through the network, the scaled part equals the whole."""
    settings = bench().Settings(codebook_size=8, units=4, layers=1, n_envs=16)
    passed = [0.0]
    features = PixelCNN.features

    def counting(self: PixelCNN, codes: torch.Tensor) -> torch.Tensor:
        passed[0] += len(codes)
        return features(self, codes)

    monkeypatch.setattr(PixelCNN, "features", counting)
    monkeypatch.setattr(time, "perf_counter", lambda: passed[0])
    grids = []
    for steps in (bench().STOCK_STEPS, 16):
        model = bench().make_ppo(settings, 4, 16, CPU, steps)
        grids.append(bench().stock_seconds(model, 16))
    # Seventeen looks at 16 grids, then 16 x 16 transitions of a grid each.
    assert grids == [17 * 16 + 256] * 2


def test_both_sides_are_what_they_are_called() -> None:
    settings = bench().Settings(codebook_size=8, units=4, layers=1)
    ours = bench().make_ppo(settings, 4, 16, CPU)
    stock = bench().make_ppo(settings, 4, 16, CPU, bench().STOCK_STEPS)
    assert type(ours.rollout_buffer) is EpisodeRolloutBuffer and ours.policy.use_cache
    assert type(stock.rollout_buffer) is RolloutBuffer and not stock.policy.use_cache
    assert ours.n_steps == 16 and ours.n_epochs == stock.n_epochs == 1
    for a, b in zip(ours.policy.parameters(), stock.policy.parameters(), strict=True):
        assert torch.equal(a, b)
    optimizer_steps = []
    ours.policy.optimizer.step = lambda: optimizer_steps.append(1)
    bench().collect(ours)
    ours.train()
    assert len(optimizer_steps) == bench().MINIBATCHES
    assert ours.policy.cache.hits == 16 * 15


def test_memory_counts_every_array() -> None:
    assert bench().array_bytes([np.zeros(3), [np.zeros(2, np.int16)], (1, (np.zeros(1, bool),)), 5]) == 24 + 4 + 1
    held = bench().buffer_bytes(64, 8, 16)
    columns, start, codes, mask = 2 * 64 * 8 * 6 * 4, 64 * 8 * 4, 64 * 8 * 4, 64 * 8
    expected, slots = 64 * 8 * 2, 64 * 8 * 2 * 8
    small = held - columns - start - codes - mask - expected - slots
    assert 0 <= small < 1000
    assert bench().buffer_bytes(1280, 64, 512) <= 8e6


def test_exclusive_clock_charges_the_innermost_group_only(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    clock = bench().ExclusiveClock(CPU)
    inner = clock.wrap(lambda: wait(2), "network")

    def work() -> None:
        wait(1)
        inner()
        wait(4)

    clock.wrap(work, "buffer")()
    wait(8)
    clock.switch("rest")
    assert clock.totals == {"rest": 8, "buffer": 5, "network": 2}


def test_timers_cover_the_whole_iteration_and_know_the_network(monkeypatch) -> None:
    """On a clock that only some functions move by one second a call."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def takes_a_second(owner: object, name: str) -> None:
        function = getattr(owner, name)

        def slow(*args: object, **kwargs: object) -> object:
            now[0] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, slow)

    takes_a_second(PixelCNN, "features")  # 4 minibatches
    takes_a_second(torch.Tensor, "backward")  # 4
    takes_a_second(torch.optim.Adam, "step")  # 4
    takes_a_second(CachedSampler, "logits")  # 9 steps, and the value of the last observation
    takes_a_second(bench().TileScorer, "__call__")  # 1 batch of finished images, in the environment's time
    takes_a_second(bench().CodeVecEnv, "step_wait")  # 9
    takes_a_second(EpisodeRolloutBuffer, "add")  # 9
    takes_a_second(EpisodeRolloutBuffer, "episodes")  # 4, inside the making of samples
    takes_a_second(StepCache, "draw")  # 9
    settings = bench().Settings(sides=(3,), codebook_size=8, units=4, layers=1, outside_envs=4, rounds=1)
    totals = bench().outside_shares(settings, CPU)
    assert totals == [{"network": 4 + 4 + 4 + 10 + 1, "environment": 9, "buffer": 9 + 4, "rest": 9}]


def test_tile_world_pays_the_mean_score_of_an_image() -> None:
    world = bench().tile_world(CodeGrid(2, 3, 5), CPU)
    codes = torch.tensor([[0, 1, 2, 3, 4, 0]])
    score_map, rewards = world.scorer(codes)
    assert score_map.shape == (1, 2, 3) and torch.equal(score_map.flatten(), world.scorer.scores[codes[0]])
    assert rewards[0, :-1].eq(0).all() and rewards[0, -1].item() == pytest.approx(score_map.mean().item())


def test_native_vector_environment_outruns_single_ones() -> None:
    """Far below the ratio that the benchmark wants: it must hold on a busy machine."""
    from stable_baselines3.common.vec_env import DummyVecEnv

    envs = [gym.make_vec("ral_gym/Toy-v0", num_envs=64), DummyVecEnv([lambda: gym.make("ral_gym/Toy-v0")] * 64)]
    actions = np.random.default_rng(0).integers(8, size=(32, 64))
    for env in envs:
        env.reset()
    spent = [min(bench()._step_seconds(env, actions) for _ in range(2)) for env in envs]
    assert spent[1] > 5 * spent[0]


def table_rows(text: str) -> dict[str, str]:
    """The lines of printed tables by their first cells."""
    return {line.split("  ")[0]: line for line in text.splitlines()}


def test_the_benchmark_of_cost_prints_every_row(capsys, caplog) -> None:
    caplog.set_level(logging.CRITICAL, "ral_gym")
    cost.main(["--quick"], Console(width=80))
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    rows = table_rows(out)
    for row in ("an image drawn", "an update", "a row of the table", *(f"stage {n}, an update" for n in (1, 2, 3))):
        assert row in rows, out
    assert "<= 1.1x" in rows["stage 3, an update"]


def test_the_slope_of_a_power_is_its_exponent_and_turns_are_taken() -> None:
    assert cost.slope([64, 256, 1024], [3 * math.sqrt(t) ** 3 for t in (64, 256, 1024)]) == pytest.approx(1.5)
    seen: list[str] = []
    works = [lambda: seen.append("a"), lambda: seen.append("b") or 2.5]
    rounds = cost.in_turns(works, 2)
    assert seen == ["a", "b"] * 3 and [spent[1] for spent in rounds] == [2.5, 2.5]


def test_the_benchmark_of_throughput_prints_every_row(capsys, monkeypatch) -> None:
    """Its processes for threads would take longer than all others; they are played by functions."""

    @contextlib.contextmanager
    def child(threads, spin, prior):
        yield lambda: {"1": 1.0, "2": 4.0 if spin is None else 0.8}[threads]

    monkeypatch.setattr(throughput, "child", child)
    monkeypatch.setattr(throughput, "busy_core", lambda busy: contextlib.nullcontext())
    monkeypatch.setattr(throughput, "measure", lambda prior, batch, quick: ([], [1.0], [120.0], False))
    throughput.main(["--quick"], Console(width=80))
    rows = table_rows(capsys.readouterr().out)
    assert ">= 1.0x" in rows["stage 1, 16 a step"] and ">= 1.0x" in rows["stage 2, 16 a step"]
    assert "120x" in rows["T=64, 16 images"]
    assert rows["as commands wait"].count("1.25x") == 2 and rows["OpenMP's default"].count("0.25x") == 2


def test_the_benchmark_of_products_compares_both_kinds(capsys, monkeypatch) -> None:
    seen: list[int] = []
    work, rounds = (lambda: seen.append(products.linear.LARGE)), 2
    products.ratio_of(work, rounds)
    assert seen == [kept := products.linear.LARGE, products.NEVER] * (rounds + 1) and kept < products.NEVER
    products.main(["--quick"], Console(width=80))
    assert capsys.readouterr().out.count("x\n") == 2
