"""Parts `stages`, `memory`, `pipeline` and `rollout`: training, and the command line from photos to a table."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpu_parts.common import Check
from gpu_parts.hardware import call
from gpu_parts.networks import celeba128
from ral_gym.agents.train_ral import train_ral
from ral_gym.config import Config, ReinforceConfig
from ral_gym.data.images import ImageSet
from ral_gym.presets import get_preset
from ral_gym.priors.base import maximum_likelihood_loss, save_prior
from ral_gym.runs.run import Run
from ral_gym.stages.levels import load_generator, load_vqvae, prior_of
from ral_gym.stages.processes import Compute
from ral_gym.stages.train_prior import train_prior
from ral_gym.stages.train_vqvae import build_vqvae, train_vqvae
from ral_gym.tokenizers.base import save_tokenizer
from ral_gym.tokenizers.code_set import CodeSet

Train = Callable[[int, str], None]


def settings(check: Check) -> Config:
    """celeba64's, or tiny ones."""
    config = get_preset("celeba64")
    if not check.tiny:
        return config
    return replace(
        config,
        data=replace(config.data, image_size=16),
        vqvae=replace(config.vqvae, hidden_units=8, residual_units=4, layers=2, batch_size=8),
        prior=replace(config.prior, hidden_units=8, residual_units=8, layers=2, output_stack_layers=1, batch_size=8),
        critic=replace(config.critic, layers=2, hidden_units=8, n_critic=1),
        ral=replace(config.ral, n_envs=2),
    )


class Stages:
    """Throughput of the three stages on made-up images: blocks, so that there is something to learn."""

    def __init__(self, check: Check) -> None:
        self.check, self.config, self.device = check, settings(check), torch.device(check.device)
        self.folder, self.rng = Path(tempfile.mkdtemp()), np.random.default_rng(0)
        side, n = self.config.data.image_size // 8, 64 if check.tiny else 4096
        images = self.rng.integers(0, 256, (n, 3, side, side), np.uint8).repeat(8, 2).repeat(8, 3)
        self.images = ImageSet(images, images[:64], None, "blocks", ())
        torch.manual_seed(0)
        vqvae: Any = build_vqvae(Run(self.folder / "base", self.config), self.images)
        self.grid = vqvae.grid
        save_tokenizer(self.folder / "vqvae.safetensors", vqvae)
        save_prior(self.folder / "prior.safetensors", prior_of(self.config, self.grid))
        self._codes(512).save(self.folder / "codes.safetensors")

    def _codes(self, n: int) -> CodeSet:
        train, test = (
            self.rng.integers(0, self.grid.codebook_size, (m, self.grid.n_codes)).astype(np.int16) for m in (n, 64)
        )
        return CodeSet(train, test, None, n)

    def _run(self, name: str, config: Config) -> Run:
        return Run(self.folder / name.replace(" ", "_").replace(",", ""), config)

    def stage_1(self, steps: int, name: str) -> None:
        """Some steps of the tokenizer."""
        config = replace(self.config, vqvae=replace(self.config.vqvae, training_steps=steps))
        train_vqvae(self._run(name, config), self.images, self.device, False, Compute())

    def stage_2(self, precision: Any) -> Train:
        """Steps of the prior."""
        codes = self._codes(len(self.images.train))

        def train(steps: int, name: str) -> None:
            prior = replace(self.config.prior, training_steps=steps, evaluate_every=10**6)
            run = self._run(name, replace(self.config, prior=prior))
            train_prior(run, codes, self.grid, self.device, False, Compute(precision))

        return train

    def stage_3(self, algo: str) -> Train:
        """Updates of the policy and the critic."""

        def train(updates: int, name: str) -> None:
            ral = replace(self.config.ral, n_updates=updates, algo=algo)
            if algo != "reinforce":
                ral = replace(ral, reinforce=ReinforceConfig())
            critic = replace(self.config.critic, warmup_steps=2)  # at the start of each of the timed runs
            run = self._run(name, replace(self.config, ral=ral, critic=critic))
            for file in ("vqvae.safetensors", "codes.safetensors", "prior.safetensors"):
                if not run.has(file):
                    os.link(self.folder / file, run.file(file))
            vqvae, prior = load_vqvae(run, self.device), load_generator(run, "prior", self.device)
            train_ral(run, vqvae, prior, CodeSet.load(run.file("codes.safetensors")), self.device, False)

        return train

    def timed(self, name: str, train: Train, few: int, wanted: float) -> None:
        """Seconds per step without the start: two short runs, then one whose length follows from them."""
        check = self.check
        check.fresh_peak()
        first = check.seconds(lambda: train(few, f"{name} few"))
        second = check.seconds(lambda: train(2 * few, f"{name} twice"))
        step = max((second - first) / few, second / (2 * few) / 5, 1e-4)
        many = int(min(wanted / step, 40 if check.tiny else 4000, (check.left() - 8) / step))
        many = max(many, 4 * few)
        third = check.seconds(lambda: train(many, f"{name} many"))
        per_step = (third - second) / (many - 2 * few) * 1e3
        check.put(name, ms_per_step=per_step, with_start=third / many * 1e3, steps=many, **check.peak())


def _all_timed(check: Check, every: Stages, plan: list[tuple[str, Train, int]], wanted: float) -> None:
    for name, train, steps in plan:
        if check.left() < 10:
            check.put(name, skipped=f"{check.left():.0f} s left")
        else:
            check.attempt(name, every.timed, name, train, steps, 0.3 if check.tiny else wanted)


def stages(check: Check) -> None:
    """celeba64's stages 1 and 2."""
    every, few = Stages(check), 2 if check.tiny else 15
    plan: list[tuple[str, Train, int]] = [
        ("stage 1 celeba64, 128 images a step", every.stage_1, few),
        ("stage 2 celeba64, 1024 grids a step", every.stage_2("no"), few),
        ("stage 2 celeba64 bf16, 1024 grids a step", every.stage_2("bf16"), few),
    ]
    _all_timed(check, every, plan, 8.0)


def rl(check: Check) -> None:
    """celeba64's stage 3."""
    every, few = Stages(check), 2 if check.tiny else 5
    plan: list[tuple[str, Train, int]] = [
        (f"stage 3 celeba64 {algo}, 16 images an update", every.stage_3(algo), few)
        for algo in ("reinforce", "grpo", "ppo")
    ]
    _all_timed(check, every, plan, 6.0)


def memory(check: Check) -> None:
    """One step of maximum likelihood at celeba128's batch sizes: does it fit?"""
    prior: Any = celeba128(check, torch.float32).requires_grad_(True)
    for level, network, batch in (("top", prior.top, 480), ("bottom", prior.bottom, 128)):
        network.train()
        for precision, parts in (("bf16", 1), ("fp32", 2), ("fp32", 1)):
            name = f"memory celeba128 {level} {precision}, {batch // parts} of {batch} grids"
            if check.left() < 6:
                check.put(name, skipped=f"{check.left():.0f} s left")
                continue
            rows = (4 if check.tiny else batch) // parts
            check.attempt(name, _step, check, name, network, rows, precision == "bf16")


def _step(check: Check, name: str, network: Any, rows: int, bf16: bool) -> None:
    check.fresh_peak()
    codes = torch.randint(network.codebook_size, (rows, network.height * network.width), device=check.device)
    n_top = codes.shape[1] // 4
    top = None if network.condition is None else torch.randint(network.codebook_size, (rows, n_top)).to(check.device)

    def step() -> None:
        with torch.autocast(check.device, torch.bfloat16, enabled=bf16):
            loss = maximum_likelihood_loss(network, codes, top)
        loss.backward()
        network.zero_grad()

    check.put(name, seconds=check.seconds(step), **check.peak())


def pipeline(check: Check) -> None:
    """The command line from photos to a table, and whether a new process measures the same."""
    log, runs = check.out / "pipeline.log", tempfile.mkdtemp()
    command, where = [sys.executable, "-P", "-m", "ral_gym"], ["--device", check.device, "--quiet"]
    small = ["--evaluation.n-samples", "24", "--evaluation.temperatures", "0.9"] if check.tiny else []
    for name, arguments in (
        ("train", ["--preset", "smoke", "--runs", runs, *small, *where]),
        ("verify", [f"{runs}/smoke", *where]),
    ):
        start = time.time()
        code = call(check, [*command, name, *arguments], log)
        last = [line for line in log.read_text().splitlines() if line.strip()][-2:]
        check.put(f"pipeline {name}", code=code, seconds=time.time() - start, last=last)
        if code:
            return


def rollout(check: Check) -> None:
    """A PPO iteration against Stable-Baselines3's own buffer."""
    log, script = check.out / "rollout.log", Path(__file__).resolve().parents[1] / "rollout.py"
    more = ["--quick"] if check.tiny else ["--environments", "ral_gym/Toy-v0"]
    code = call(check, [sys.executable, str(script), "--device", check.device, "--rounds", "1", *more], log)
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    check.put("rollout", code=code, lines=lines[:24] if code == 0 else lines[-8:])
