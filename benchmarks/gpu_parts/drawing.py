"""Parts `graphs`, `sampling`, `transformer` and `kernels`: drawing codes."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from gpu_parts.common import Check, copy_speed
from gpu_parts.networks import celeba128, llamagen, small_two_level
from ral_gym.priors.drawing import draw
from ral_gym.priors.sampler import CachedSampler
from ral_gym.priors.two_level import TwoLevelSampler
from ral_gym.stages.device import resolve_device

PLAN = (
    ("float32", 16, True, False, 8),
    ("bfloat16", 16, True, False, 8),
    ("float32", 256, True, False, 20),
    ("bfloat16", 256, True, False, 12),
    ("float32", 64, True, False, 12),
    ("bfloat16", 64, True, False, 8),
    ("float32", 16, True, True, 8),
    ("float32", 16, False, False, 16),
    ("bfloat16", 16, False, False, 14),
)
"""Type, batch, graphs, TF32 in convolutions, seconds that it needs."""

TRANSFORMERS = (
    ("B", "float32", True),
    ("B", "bfloat16", True),
    ("L", "float32", True),
    ("L", "bfloat16", True),
    ("B", "float32", False),
    ("B", "bfloat16", False),
)
"""LlamaGen's size, type, graphs."""


def _exact(check: Check) -> None:
    resolve_device(check.device)  # no TF32


def graphs(check: Check) -> None:
    """Graphs against plain runs: attention, two levels, other batches, any positions, and against the CPU."""
    _exact(check)
    for work in (_whole_images, _steps, _impossible_codes, _as_on_the_cpu):
        check.attempt(work.__name__.strip("_"), work, check)


@torch.no_grad()
def _whole_images(check: Check) -> None:
    prior = small_two_level(check.device)
    one, other = TwoLevelSampler(prior), TwoLevelSampler(prior)
    other.use_cuda_graphs = False
    worst, differ, images = 0.0, 0, 0
    for batch in (5, 3, 5):
        for scale in (1.0, 0.7):
            for weights in prior.parameters():
                weights.mul_(scale)
            one.refresh()
            other.refresh()
            uniforms, codes = torch.rand(batch, 80).to(check.device), torch.randint(11, (batch, 80)).to(check.device)
            for rows in (0, 2):
                a, b = (s.sample(codes=codes, prefix_rows=rows, uniforms=uniforms) for s in (one, other))
                same = (a[0] == b[0]).all(1)
                images, differ = images + batch, differ + int((~same).sum())
                worst = max(worst, float((a[1] - b[1])[same].abs().max()))
    check.put("graphs, whole images", graphs=one.use_cuda_graphs, images=images, differ=differ, worst_log_prob=worst)


@torch.no_grad()
def _steps(check: Check) -> None:
    prior = small_two_level(check.device)
    samplers = [TwoLevelSampler(prior), TwoLevelSampler(prior)]
    samplers[1].use_cuda_graphs = False
    codes = torch.full((4, 80), 11)
    codes[1, torch.from_numpy(prior.grid.mask(0, 2))] = 3
    codes = codes.to(check.device)
    for sampler in samplers:
        sampler.begin(codes)
    worst = 0.0
    for step in range(60):
        logits = [sampler.logits() for sampler in samplers]
        worst = max(worst, float((logits[0] - logits[1]).abs().max()))
        for sampler in samplers:
            sampler.advance(logits[1].argmax(1))
            if step == 20:
                sampler.rebuild(torch.tensor([2], device=check.device), codes[:1])
    check.put("graphs, step by step", worst_logit=worst)


@torch.no_grad()
def _impossible_codes(check: Check) -> None:
    """One row and many take other kernels for sums of probabilities: is a code of probability 0 ever drawn?"""
    for batch in (1, 16):
        logits = torch.randn(batch, 512, device=check.device) * 3
        logits[:, torch.rand(512, device=check.device) < 0.6] = -1e8
        drawn, rounds = 0, 20 if check.tiny else 1500
        for _ in range(rounds):
            logits = logits[:, torch.randperm(512, device=check.device)]
            drawn += int((draw(logits, torch.rand(batch, device=check.device))[1] < -1e4).sum())
        check.put(f"draws of {batch} row(s)", rounds=rounds, impossible_codes=drawn)


@torch.no_grad()
def _as_on_the_cpu(check: Check) -> None:
    uniforms = torch.rand(16, 80)
    there = TwoLevelSampler(small_two_level(check.device)).sample(16, uniforms=uniforms.to(check.device))
    here = TwoLevelSampler(small_two_level("cpu")).sample(16, uniforms=uniforms)
    same = (there[0].cpu() == here[0]).all(1)
    worst = float((there[1].cpu() - here[1])[same].abs().max())
    check.put("graphs, as on the CPU", differ=int((~same).sum()), worst_log_prob=worst)


def sampling(check: Check) -> None:
    """celeba128's networks: whole images and mixed resets, by batch, type, graphs and TF32."""
    _exact(check)
    made: dict[str, Any] = {}
    for dtype, batch, use_graphs, tf32, needs in PLAN:
        name = f"celeba128 {dtype}, batch {batch}, graphs {'on' if use_graphs else 'off'}{', TF32' * tf32}"
        if check.left() < needs:
            check.put(name, skipped=f"{check.left():.0f} s left, needs {needs}")
            continue
        if dtype not in made:
            made[dtype] = celeba128(check, getattr(torch, dtype))
        torch.backends.cudnn.allow_tf32 = tf32
        check.attempt(name, _sample, check, name, made[dtype], 2 if check.tiny else batch, use_graphs)
        torch.backends.cudnn.allow_tf32 = False


def _sample(check: Check, name: str, prior: Any, batch: int, use_graphs: bool) -> None:
    """Seconds of whole images, of upper and lower halves (mean), and the floor by weight reads alone."""
    check.fresh_peak()
    sampler, grid = TwoLevelSampler(prior), prior.grid
    sampler.use_cuda_graphs = use_graphs and check.on_gpu
    codes = torch.randint(grid.codebook_size, (batch, grid.n_codes), device=check.device)
    first = check.seconds(lambda: sampler.sample(batch))
    full = check.seconds(lambda: sampler.sample(batch), 3 if first < 2 else 1)
    half = grid.height // 2
    partial = [
        check.seconds(lambda: sampler.sample(codes=codes, prefix_rows=half)),
        check.seconds(lambda: sampler.sample(codes=grid.crop(codes, half), stop_rows=half)),
    ]
    figures = {"first": first, "full": full, "half": statistics.fmean(partial), "ms_per_image": full / batch * 1e3}
    check.put(name, **figures, floor_by_weight_reads=_floor(prior.top) + _floor(prior.bottom), **check.peak())


def _floor(prior: Any) -> float:
    """Seconds to read all of a network's weights once per code."""
    read = sum(weights.numel() * weights.element_size() for weights in prior.parameters())
    return read * prior.height * prior.width / copy_speed()


def transformer(check: Check) -> None:
    """LlamaGen-B and -L: 64 images of 16x16 codes, against the time of reading the weights once per code."""
    _exact(check)
    for size, dtype, graphs in TRANSFORMERS:
        name = f"LlamaGen-{size} {dtype}, batch 64, graphs {'on' if graphs else 'off'}"
        if check.left() < 8:
            check.put(name, skipped=f"{check.left():.0f} s left")
            continue
        check.attempt(name, _draw_transformer, check, name, llamagen(check, size, getattr(torch, dtype)), graphs)


def _draw_transformer(check: Check, name: str, prior: Any, graphs: bool) -> None:
    check.fresh_peak()
    batch, sampler = (2 if check.tiny else 64), CachedSampler(prior)
    sampler.use_cuda_graphs = graphs and check.on_gpu
    first = check.seconds(lambda: sampler.sample(batch))
    full = check.seconds(lambda: sampler.sample(batch), 3 if first < 1 else 1)
    floor = _floor(prior)
    codes, log_probs = sampler.sample(batch)
    with torch.no_grad():
        passed = prior(codes).float().log_softmax(-1).gather(2, codes[..., None]).squeeze(2)
    worst = float((passed - log_probs).abs().max())
    figures = {"full": full, "floor_by_weight_reads": floor, "ratio": full / floor, "worst_log_prob": worst}
    check.put(name, first=first, **figures, **check.peak())


def kernels(check: Check) -> None:
    """The kernels of a few codes and a grid row, by name, started one by one."""
    for dtype in (torch.float32, torch.bfloat16):
        check.attempt(f"kernels {dtype}", _profile, check, dtype)


def _profile(check: Check, dtype: torch.dtype) -> None:
    sampler: Any = TwoLevelSampler(celeba128(check, dtype))
    sampler.use_cuda_graphs = False
    sampler.sample(2 if check.tiny else 16)
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] * check.on_gpu
    for level in ("top", "bottom"):
        cache = getattr(sampler, level)._cache
        name = f"kernels {str(dtype)[6:]} {level}"
        _count(check, f"{name} step", partial(cache.step, 2, 2), 20, activities)
        _count(check, f"{name} row", partial(cache.next_row, 3), 2, activities)


def _count(check: Check, name: str, work: Callable[[], None], times: int, activities: list[Any]) -> None:
    """Kernels of some work, those that take longest by name; on a CPU its operators."""
    with torch.no_grad(), torch.profiler.profile(activities=activities) as found:
        for _ in range(times):
            work()
        check.seconds(lambda: None)
    rows = [row for row in found.key_averages() if check.on_gpu == ("CUDA" in str(row.device_type))]
    busy = {row.key[:80]: row.self_device_time_total if check.on_gpu else row.self_cpu_time_total for row in rows}
    top = [[kernel, round(us / times, 1)] for kernel, us in sorted(busy.items(), key=lambda item: -item[1])[:12]]
    launches = sum(row.count for row in rows) / times
    check.put(name, launches=launches, us_busy=sum(busy.values()) / times, top=top)
