"""Stages 1 and 2 on several processes and in parts: the steps of one process with the whole batch."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ral_gym.commands.cli import train_main
from ral_gym.config import Config
from ral_gym.data.images import load_images
from ral_gym.errors import ConfigError, DeviceError, RunError
from ral_gym.presets import SMOKE
from ral_gym.runs.run import Run
from ral_gym.runs.storage import load_tensors
from ral_gym.stages import processes
from ral_gym.stages.processes import Compute, JointBatches, make_accelerator, partners
from ral_gym.stages.train_vqvae import build_vqvae, train_vqvae
from ral_gym.tokenizers.code_set import CodeSet

pytestmark = pytest.mark.processes

CPU = torch.device("cpu")
CONFIG = dataclasses.replace(
    SMOKE,
    data=dataclasses.replace(SMOKE.data, workers=1),
    # Adam's first steps turn rounding into steps of the learning rate's size, so that a large one would tell nothing.
    vqvae=dataclasses.replace(SMOKE.vqvae, threshold_ema_dead_code=0, learning_rate=1e-4, training_steps=10),
    prior=dataclasses.replace(SMOKE.prior, dropout=0.0, learning_rate=1e-4),
)
OPTIONS = [
    *("--data.workers", "1", "--vqvae.threshold-ema-dead-code", "0", "--vqvae.learning-rate", "1e-4"),
    *("--vqvae.training-steps", "10", "--prior.dropout", "0", "--prior.learning-rate", "1e-4", "--device", "cpu"),
]
COMMAND = ["train", "--preset", "smoke", *OPTIONS]


def given(runs: Path, config: Config = CONFIG) -> Path:
    """A run folder that starts from a given codebook and has given codes."""
    run = Run(runs / "smoke", config)
    images = load_images(config.data, progress=False)
    torch.manual_seed(3)
    vqvae = build_vqvae(run, images)
    with torch.no_grad():
        vqvae.train()(torch.rand(64, 1, 32, 32) * 2 - 1)  # k-means
    optimizer = torch.optim.Adam(vqvae.parameters(), lr=config.vqvae.learning_rate)
    run.save_checkpoint("vqvae", {"step": 0, "model": vqvae.state_dict(), "optimizer": optimizer.state_dict()})
    codes = np.random.default_rng(0).integers(16, size=(80, 16)).astype(np.int16)
    CodeSet(codes[:64], codes[64:], None, clean=64).save(run.file("codes.safetensors"))
    return runs / "smoke"


def figures(run: Path) -> dict[tuple[str, int, str], float]:
    """Everything that was logged."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {
        (r["stage"], r["step"], name): value
        for r in records
        for name, value in r.items()
        if name not in ("stage", "step")
    }


def assert_same_figures(found: dict[tuple[str, int, str], float], expected: dict[tuple[str, int, str], float]) -> None:
    """Losses to 1e-4; in what counts codes, one vector at the border of two may change sides."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        tolerance = {"perplexity": {"rel": 0.05}, "code_usage": {"abs": 1.01 / 16}}.get(key[2], {"abs": 1e-4})
        assert found[key] == pytest.approx(value, **tolerance), key


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_two_processes_take_the_steps_of_one(tmp_path) -> None:
    one = given(tmp_path / "one")
    two = Path(shutil.copytree(one, tmp_path / "two" / "smoke"))
    stages = ["--stages", "vqvae", "prior"]
    assert train_main([*COMMAND[1:], *stages, "--quiet", "--runs", str(tmp_path / "one")]) == 0
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "ral_gym", *COMMAND, *stages, "--runs", str(tmp_path / "two")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "MASTER_PORT": ""})
    assert result.returncode == 0, result.stderr
    assert_same_figures(figures(two), figures(one))
    assert {(stage, step) for stage, step, _ in figures(two)} == {("vqvae", 10), ("prior", 10), ("prior", 20)}
    for name in ("vqvae", "prior", "prior_ema"):
        left, right = (load_tensors(run / f"{name}.safetensors")[0] for run in (one, two))
        for key, tensor in left.items():
            # One vector at the border of two codes may change sides.
            assert torch.allclose(tensor.double(), right[key].double(), rtol=0.02, atol=5e-3), (name, key)
    # One process prints and draws bars.
    assert result.stdout.count("Data: ") == result.stdout.count("prior_ema.safetensors") == 1
    ends = [result.stderr.count(f"{steps} of {steps} steps in") for steps in (10, 20)]
    assert ends == [1, 1], result.stderr
    assert not list(two.rglob(".*.tmp")) and len(list((two / "tensorboard").iterdir())) == 2


def test_a_process_that_dies_is_told_and_leaves_no_half_run(tmp_path) -> None:
    options = ["--vqvae.training-steps", "1000000", "--stages", "vqvae", "--quiet", "--runs", str(tmp_path)]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    both = [
        subprocess.Popen(
            [sys.executable, "-P", "-m", "ral_gym", *COMMAND, *options],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if rank else subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        limit = time.monotonic() + 120
        while not (tmp_path / "smoke" / "metrics.jsonl").exists() and time.monotonic() < limit:
            time.sleep(0.05)
        both[1].kill()
        _, errors = both[0].communicate(timeout=120)
    finally:
        for process in both:
            process.kill()
            process.wait()
    lines = [line for line in errors.splitlines() if line.strip()]
    assert both[0].returncode == 2
    assert lines[-1].startswith("error: process 0 of 2 lost another one") and "Traceback" not in errors, errors
    left = {path.name for path in (tmp_path / "smoke").iterdir()}
    # On a slow machine a whole checkpoint may have been due.
    assert left - {"checkpoints", "seconds.json", ".lock"} == {"config.json", "metrics.jsonl", "tensorboard"}
    assert not list(tmp_path.rglob(".*.tmp"))
    assert figures(tmp_path / "smoke")


# Within one process -------------------------------------------------------------------------------------------------


def trained(path: Path, compute: Compute, config: Config = CONFIG) -> tuple[Path, dict[str, torch.Tensor]]:
    """Stage 1 from a given codebook: the run folder and its weights."""
    run = Run(given(path, config), config)
    train_vqvae(run, load_images(config.data, progress=False), CPU, progress=False, compute=compute)
    return run.path, load_tensors(run.file("vqvae.safetensors"))[0]


def test_a_batch_in_parts_is_the_same_step(tmp_path) -> None:
    whole, weights = trained(tmp_path / "whole", Compute())
    parts, others = trained(tmp_path / "parts", Compute(gradient_accumulation=4))
    assert_same_figures(figures(parts), figures(whole))
    # The codebook too moves once per step, by the statistics of all parts.
    for name, tensor in weights.items():
        assert torch.allclose(tensor.double(), others[name].double(), rtol=0.02, atol=5e-3), name


def test_half_precision_leaves_weights_and_codebook_in_32_bits(tmp_path) -> None:
    whole, _ = trained(tmp_path / "whole", Compute())
    half, weights = trained(tmp_path / "half", Compute("bf16", gradient_accumulation=2))
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float32}
    expected, found = figures(whole), figures(half)
    assert found != expected
    for key in [("vqvae", 10, "loss"), ("vqvae", 10, "reconstruction_error")]:
        assert found[key] == pytest.approx(expected[key], rel=0.1)
    # Afterwards full precision is full again: accelerate keeps one state per Python process.
    again, _ = trained(tmp_path / "again", Compute())
    assert figures(again) == expected


def stand_in(count: int, index: int) -> Any:
    return SimpleNamespace(num_processes=count, process_index=index)


def test_processes_and_parts_share_out_the_joint_batch() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    (whole,) = JointBatches(stand_in(1, 0), 100, 12, 1, "prior.batch_size").draw()
    shares = []
    for index in range(3):
        torch.set_rng_state(state)
        shares.append(JointBatches(stand_in(3, index), 100, 12, 2, "prior.batch_size"))
    drawn = [part for share in shares for part in share.draw()]
    assert [len(part) for part in drawn] == [2] * 6 and torch.equal(torch.cat(drawn), whole)
    # A checkpoint of process 0 brings all of them back to the same batches, but not to the same dropout.
    saved, after, noise = shares[0].state_dict(), torch.cat([p for s in shares for p in s.draw()]), set()
    for share in shares:
        share.load_state_dict(saved)
        noise.add(torch.rand(()).item())
    assert torch.equal(torch.cat([p for s in shares for p in s.draw()]), after) and len(noise) == 3


def test_what_does_not_fit_is_refused(monkeypatch) -> None:
    with pytest.raises(
        ConfigError, match=r"prior\.batch_size is 16: it must be a multiple of 6 \(3 processes x 2 parts"
    ):
        JointBatches(stand_in(3, 0), 100, 16, 2, "prior.batch_size")
    with pytest.raises(ConfigError, match="gradient_accumulation is 0: give an integer of 1 or more"):
        make_accelerator(CPU, Compute(gradient_accumulation=0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    with pytest.raises(DeviceError, match="no bf16"):
        make_accelerator(torch.device("cuda"), Compute("bf16"))
    monkeypatch.setattr(processes, "process_count", lambda: 2)
    with pytest.raises(DeviceError, match="device 'cuda:1' for 2 processes: use --device cuda"):
        make_accelerator(torch.device("cuda:1"))


def test_only_a_lost_connection_is_called_one(monkeypatch) -> None:
    lost = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2222"
    with pytest.raises(RuntimeError, match="closed by peer"), partners():
        raise RuntimeError(lost)
    monkeypatch.setattr(processes, "process_count", lambda: 2)
    with pytest.raises(RunError, match=r"process 0 of 2 lost another one .*\[.*\]$"), partners():
        raise RuntimeError(lost)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), partners():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_a_launcher_that_starts_one_process_only_is_told(monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert "starts one process" in processes.launcher_note()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert processes.launcher_note() == ""
