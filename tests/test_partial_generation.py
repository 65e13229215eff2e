"""The benchmark of partial generation: what it draws is what is claimed, and its arithmetic is right."""

import importlib.util
import re
import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from rich.console import Console

from ral_gym.envs.resets import StartDistribution
from ral_gym.grid import CodeGrid
from ral_gym.presets import get_preset
from ral_gym.priors.pixelcnn_cache import SamplingCache
from ral_gym.priors.two_level import TwoLevelSampler
from ral_gym.tokenizers.base import tokenizer_of

PATH = Path(__file__).parents[1] / "benchmarks" / "partial_generation.py"
CPU = torch.device("cpu")
ROWS = ("full", "mixed", "continue", "scratch")


@cache
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("partial_generation_bench", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def quick_sampler() -> TwoLevelSampler:
    """4 x 4 top codes and 8 x 8 bottom codes."""
    config, side = bench().settings_of("celeba128", CPU, quick=True)
    return bench().make_sampler(config, side, CPU, torch.float32)


def quick_tables(capsys: pytest.CaptureFixture[str], *options: str) -> list[dict[str, list[str]]]:
    """The cells of every table that the quick mode prints, by row."""
    bench().main(["--quick", "--device", "cpu", *options], Console(width=80))
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    lines = [line.split() for line in out.splitlines()]
    rows = [cells for cells in lines if cells and cells[0] in ROWS and re.fullmatch(r"[\d.]+", cells[1])]
    return [{cells[0]: cells[1:] for cells in rows[i : i + 4]} for i in range(0, len(rows), 4)]


def test_the_draws_are_those_of_a_mixed_rollout_each_as_often() -> None:
    draws = bench().partial_draws(5)
    starts = [(draw.prefix_rows, draw.stop_rows) for draw in draws]
    assert sorted(starts) == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 5), (2, 5), (3, 5), (4, 5)]
    assert Counter(draw.mode for draw in draws) == {"continue": 4, "scratch": 4}
    assert all((draw.mode == "scratch") == (draw.prefix_rows == 0) for draw in draws)

    rng, distribution = np.random.default_rng(0), StartDistribution(CodeGrid(5, 5, 8, levels=2), "mixed", n_images=1)
    drawn = Counter(distribution.draw(rng)[:2] for _ in range(4000))
    assert set(drawn) == set(starts)
    assert all(abs(count / 4000 - 1 / 8) < 5 * np.sqrt(1 / 8 * 7 / 8 / 4000) for count in drawn.values())


def test_the_mean_of_the_codes_drawn_is_half_of_all() -> None:
    # A row of 4 top codes has 2 x 8 bottom codes under it: 20 codes, 80 in all; n is 1, 2 or 3 with mean 2.
    grid, draws = CodeGrid(4, 4, 512, levels=2), bench().partial_draws(4)
    codes = {mode: [d.codes_drawn(grid) for d in draws if d.mode == mode] for mode in ("continue", "scratch")}
    assert codes == {"continue": [60, 40, 20], "scratch": [20, 40, 60]}
    for height in (16, 32):  # the table's sizes: 1,280 and 5,120 codes
        whole, grid = 5 * height**2, CodeGrid(height, height, 512, levels=2)
        assert np.mean([d.codes_drawn(grid) for d in bench().partial_draws(height)]) == whole / 2
        assert bench().Draw("full", 0, height).codes_drawn(grid) == whole


def test_a_batch_draws_the_codes_that_it_should() -> None:
    sampler = quick_sampler()
    grid = sampler.prior.grid
    codes = torch.randint(512, (3, grid.n_codes))
    for draw in [bench().Draw("full", 0, 4), *bench().partial_draws(4)]:
        found, log_probs = bench().sample(sampler, draw, codes)
        drawn = log_probs < 0  # (B, T'); one of 512 codes from fresh weights is never certain
        assert found.shape == (3, grid.codes_of(draw.stop_rows))
        assert drawn.sum(1).tolist() == [draw.codes_drawn(grid)] * 3
        given = grid.crop(codes, draw.stop_rows)
        assert torch.equal(found[~drawn], given[~drawn])


def test_quick_mode_prints_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    fill = SamplingCache.fill
    small, large = quick_tables(capsys, "--batch", "2")
    assert tuple(small) == tuple(large) == ROWS
    assert SamplingCache.fill is fill  # the timer is gone
    for table, codes in ((small, 80), (large, 320)):
        assert [float(table[row][0]) for row in ROWS] == [codes, codes / 2, codes / 2, codes / 2]
        assert [table[row][6] for row in ROWS] == ["1.00", "2.00", "2.00", "2.00"]
        assert all(float(table[row][1]) > 0 for row in ROWS)


def test_full_to_mixed_in_codes_and_the_share_of_a_prefix(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a clock that a drawn code moves by a second, a fill by two, and one from a prefix by three more."""
    now = [0.0]
    put, fill = SamplingCache.put, SamplingCache.fill

    def slow_put(self: SamplingCache, *args: object) -> None:
        now[0] += 1
        put(self, *args)

    def slow_fill(self: SamplingCache, rows: object, codes: object, positions: np.ndarray, *args: object) -> None:
        now[0] += 5 if positions.any() else 2
        fill(self, rows, codes, positions, *args)

    monkeypatch.setattr(SamplingCache, "put", slow_put)
    monkeypatch.setattr(SamplingCache, "fill", slow_fill)
    for clock in ("perf_counter", "process_time"):
        monkeypatch.setattr(time, clock, lambda: now[0])
    (round_,) = bench().measure(quick_sampler(), 2, 1)
    monkeypatch.undo()
    Spent = bench().Spent  # two fills each, one per level
    assert round_["full"] == Spent(84, 84, 4) and round_["scratch"] == Spent(44, 44, 4)
    assert round_["continue"] == Spent(50, 50, 10) and round_["mixed"] == Spent(47, 47, 7)
    codes = {row: spent.wall - spent.prefill for row, spent in round_.items()}
    assert codes["full"] / codes["mixed"] == 2
    assert bench().prefix_share(round_) == pytest.approx(3 / 47)
    assert bench()._cells([round_], "mixed") == ["47.000", "47.000", f"{7 / 47:.1%}", "1.79", "1.79"]


def test_the_networks_are_the_presets_on_cuda_and_small_on_a_cpu() -> None:
    for size, side in (("celeba128", 16), ("celeba256", 32)):
        preset = get_preset(size)
        with torch.device("meta"):
            assert tokenizer_of(preset, preset.data.image_size, 3).height == side
        assert bench().settings_of(size, torch.device("cuda"), quick=False) == (preset, side)
        config, cpu_side = bench().settings_of(size, CPU, quick=False)
        assert cpu_side == side
        for settings, real in ((config.prior, preset.prior), (config.bottom, preset.bottom)):
            assert settings.hidden_units == 32 and settings.layers == 4
            assert bool(settings.attention_layers) == bool(real.attention_layers)
            assert settings.conv_filter_size == real.conv_filter_size


def test_the_cache_is_counted_at_both_levels() -> None:
    sampler = quick_sampler()
    bench().sample(sampler, bench().Draw("full", 0, 4), torch.zeros(2, 80, dtype=torch.int64))
    top, bottom = (SamplingCache(level.weights, 2).nbytes for level in (sampler.top, sampler.bottom))
    assert bench().cache_megabytes(sampler) == (top + bottom) / 1e6


@pytest.mark.parametrize("option", ["batch", "rounds", "threads"])
def test_counts_below_one_are_refused(option: str) -> None:
    with pytest.raises(SystemExit, match=f"--{option} 0: give at least 1"):
        bench().main([f"--{option}", "0"], Console())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_nothing_is_made_up(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="finds no CUDA device"):
        bench().main(["--device", "cuda"], Console())
    bench().main(["--quick", "--batch", "1", "--sizes", "celeba128"], Console(width=80))
    assert "CUDA: not measured" in capsys.readouterr().out
