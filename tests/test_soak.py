"""`make soak`: environment, stage 3 and `sample` over and over, with flat memory; 3 minutes in `make test-faults`."""

import os
import time
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from ral_gym.agents.train_ral import train_ral
from ral_gym.commands.cli import main
from ral_gym.presets import SMOKE
from ral_gym.runs.run import Run, read_config
from ral_gym.stages.levels import load_generator, load_vqvae
from ral_gym.tokenizers.code_set import CodeSet
from tests.tiny import make_tiny_run

pytestmark = pytest.mark.faults

SECONDS = float(os.environ.get("RAL_GYM_SOAK_SECONDS", "180"))
GROWTH = 32.0
"""MiB between the second and the last quarter of the rounds: an allocator's noise; a leak of one image each shows."""


def resident() -> float:
    """MiB that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_memory_stays_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property) -> None:
    path = make_tiny_run(tmp_path / "run")
    config = replace(read_config(path), ral=replace(SMOKE.ral, n_updates=3, checkpoint_every=1))
    (path / "config.json").write_text(config.to_json())
    run = Run(path, config)
    vqvae, prior = load_vqvae(run), load_generator(run, "prior")
    codes = CodeSet.load(run.file("codes.safetensors"), vqvae.grid)
    env = gym.make("ral_gym/LatentCode-v0", run=str(path))
    held: list[float] = []
    end = time.monotonic() + SECONDS
    while time.monotonic() < end or len(held) < 8:
        env.reset(seed=len(held))
        for _ in range(20 * vqvae.grid.n_codes):
            _, _, terminated, truncated, _ = env.step(env.action_space.sample())
            if terminated or truncated:
                env.reset()
        for file in (*run.path.glob("policy*"), *run.path.glob("checkpoints/*"), *run.path.glob("tensorboard/*")):
            file.unlink()
        train_ral(run, vqvae, prior, codes, torch.device("cpu"), progress=False)
        assert main(["sample", str(path), "--n", "16"]) == 0
        held.append(resident())
    env.close()
    quarter = len(held) // 4
    growth = float(np.median(held[-quarter:]) - np.median(held[quarter : 2 * quarter]))
    print(f"{len(held)} rounds in {SECONDS:g} s; {held[quarter]:.0f} MiB, then {held[-1]:.0f} MiB ({growth:+.1f} MiB)")
    assert growth < GROWTH, held
