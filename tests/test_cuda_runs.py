"""The command line on a pretended CUDA device: training, resuming, measuring again, sampling."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from ral_gym.agents.callbacks import RunCallback
from ral_gym.commands.cli import main
from ral_gym.stages.device import fast_products, resolve_device
from tests.pretend_device import Device, pretend_cuda

SMALL = ["--preset", "smoke", "--data.workers", "1", "--quiet", "--evaluation.n-samples", "24"]
SMALL += ["--evaluation.temperatures", "0.3", "--device", "cuda"]
FLAGS = ((torch.backends.cudnn, "allow_tf32"), (torch.backends.cuda.matmul, "allow_tf32"))


@pytest.fixture
def tf32() -> Iterator[Device]:
    """A device that rounds as real ones do where it may, and the flags as a new process finds them."""
    kept = [getattr(backend, flag) for backend, flag in FLAGS]
    with pretend_cuda(tf32=True) as device:
        as_in_a_new_process()
        yield device
    for (backend, flag), value in zip(FLAGS, kept, strict=True):
        setattr(backend, flag, value)


def as_in_a_new_process() -> None:
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False


def flags() -> tuple[bool, ...]:
    return tuple(getattr(backend, flag) for backend, flag in FLAGS)


def test_everything_computes_in_float32_except_what_trains_stages_1_and_2(tf32: Device) -> None:
    device = resolve_device("auto")
    assert device.type == "cuda" and flags() == (False, False)
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    with fast_products(device):
        assert flags() == (True, True)
    assert flags() == (False, False)
    with pytest.raises(RuntimeError, match="in the middle"), fast_products(device):
        raise RuntimeError("in the middle")
    assert flags() == (False, False)


def test_a_cpu_leaves_the_flags_alone(tf32: Device) -> None:
    assert resolve_device("cpu") == torch.device("cpu") and flags() == (True, False)
    with fast_products(torch.device("cpu")):
        assert flags() == (True, False)


@pytest.mark.commands
def test_a_run_is_measured_again_alike_in_a_new_process(tf32: Device, tmp_path: Path) -> None:
    """TF32 rounds wherever it is let, so that a stage that forgot the rule would give other figures."""
    assert main(["train", *SMALL, "--runs", str(tmp_path)]) == 0
    assert tf32.counts["replays"] and tf32.counts["captures"]
    as_in_a_new_process()
    assert main(["verify", str(tmp_path / "smoke"), "--device", "cuda", "--quiet"]) == 0
    for command in (["sample", str(tmp_path / "smoke"), "--n", "4"], ["report", str(tmp_path / "smoke")]):
        as_in_a_new_process()
        assert main([*command, "--device", "cuda"]) == 0


BOTTOM = ["--bottom.hidden-units", "8", "--bottom.residual-units", "8", "--bottom.layers", "1"]
BOTTOM += ["--bottom.output-stack-layers", "1", "--bottom.conditioning-stack-layers", "1", "--bottom.batch-size", "8"]
BOTTOM += ["--bottom.training-steps", "4", "--bottom.evaluate-every", "2"]
TWO_LEVELS = ["--vqvae.levels", "2", "--vqvae.layers", "2", *BOTTOM, "--prior.attention-layers", "1"]


@pytest.mark.commands
@pytest.mark.parametrize(
    "settings",
    [
        [*TWO_LEVELS, "--prior.attention-heads", "4", "--ral.reset-mode", "mixed"],
        ["--prior.kind", "transformer", "--prior.attention-heads", "4", "--ral.algo", "ppo"],
        ["--mixed-precision", "bf16", "--ral.algo", "grpo", "--ral.reward-weights", "loo_fd", "1"],
    ],
)
def test_a_stage_3_that_was_stopped_goes_on(tmp_path: Path, settings: list[str]) -> None:
    """From the checkpoint after the second update to the same weights as without a stop."""
    command = ["train", *SMALL, *settings, "--stages", "vqvae", "prior", "ral", "--ral.checkpoint-every", "2"]
    command += ["--runs", str(tmp_path), "--name", "run"]
    with pretend_cuda():
        checkpoint, kept = tmp_path / "run/checkpoints/ral.safetensors", tmp_path / "after_2.safetensors"
        save = RunCallback.save

        def save_and_keep(callback: RunCallback) -> None:
            save(callback)
            if callback.updates == 2:
                shutil.copy(checkpoint, kept)

        with mock.patch.object(RunCallback, "save", save_and_keep):
            assert main(command) == 0
        whole = (tmp_path / "run/policy.safetensors").read_bytes()
        for file in (tmp_path / "run").glob("*.safetensors"):
            if file.name.startswith(("policy", "critic")):
                file.unlink()
        shutil.copy(kept, checkpoint)
        assert main(command) == 0
    assert (tmp_path / "run/policy.safetensors").read_bytes() == whole


@pytest.mark.parametrize(("stages", "needs"), [(["vqvae"], "stage 1 "), (["vqvae", "prior"], "stage [12] ")])
def test_a_device_with_too_little_memory_is_refused_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stages: list[str], needs: str
) -> None:
    command = ["train", *SMALL, "--stages", *stages, "--runs", str(tmp_path), "--gradient-accumulation", "2"]
    with pretend_cuda(), mock.patch.object(torch.cuda, "mem_get_info", lambda device=None: (2**16, 2**30)):
        assert main(command) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(needs + r".*needs 0\.\d GiB, but device 'cuda' has 0\.0 GiB free", said)
    assert "--gradient-accumulation 4 or --mixed-precision bf16" in said and "batch-size" in said
    assert not list(tmp_path.rglob("*.safetensors"))


def test_memory_counts_for_stages_that_are_still_to_be_trained(tmp_path: Path) -> None:
    command = ["train", *SMALL, "--stages", "vqvae", "--vqvae.training-steps", "2", "--runs", str(tmp_path)]
    with pretend_cuda():
        assert main(command) == 0
        with mock.patch.object(torch.cuda, "mem_get_info", lambda device=None: (0, 2**30)):
            assert main(command) == 0
