"""What the training loops share."""

import pytest
import torch
from torch import nn

from ral_gym.errors import DeviceError, DivergedError
from ral_gym.presets import SMOKE
from ral_gym.runs.run import Run
from ral_gym.stages import common
from ral_gym.stages.common import Clock, WeightAverage, check_finite, check_weights, make_adam
from ral_gym.stages.device import resolve_device


def test_auto_is_the_best_device_there_is(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda") == resolve_device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(DeviceError, match="device 'cuda:2' asked for, but 2 CUDA devices are visible"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_cuda_asked_for_and_absent(monkeypatch, name) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=f"device '{name}' asked for, but 0 CUDA .*use --device cpu or auto"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["tpu", "", "cuda:", "cuda:-1", "cuda:x", "CPU"])
def test_unknown_devices_are_named(name) -> None:
    with pytest.raises(DeviceError, match=f"unknown device '{name}': choose auto, cpu, cuda or cuda:N"):
        resolve_device(name)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), torch.tensor(-float("inf"), requires_grad=True)])
def test_a_loss_that_is_no_number_stops_the_stage(loss) -> None:
    with pytest.raises(DivergedError, match=r"stage prior: the loss is .* at step 7; .*kept; lower it"):
        check_finite(loss, "prior", 7, "lower it")
    assert check_finite(torch.tensor(1.5, requires_grad=True), "prior", 7, "") == 1.5


@pytest.mark.parametrize("broken", ["weight", "running_mean"])
def test_broken_weights_and_statistics_are_not_saved(broken) -> None:
    module = nn.BatchNorm2d(3)
    check_weights(module, "prior", 7, "lower it")
    with torch.no_grad():
        module.state_dict()[broken][1] = float("inf")
    with pytest.raises(DivergedError, match=r"stage prior: weights are NaN or infinite after step 7; .*; lower it"):
        check_weights(module, "prior", 7, "lower it")


def test_the_average_follows_the_weights_at_its_decay() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 1.0)
    slow, warm = WeightAverage(module, 0.9), WeightAverage(module, 0.9, warm_up=True)
    nn.init.constant_(module.weight, 2.0)
    for _ in range(2):
        slow.update(module)
        warm.update(module)
    assert slow.weights["weight"].item() == pytest.approx(2 - 0.9**2)
    assert warm.weights["weight"].item() == pytest.approx(2 - 2 / 11 * 3 / 12)
    with slow.applied(module):
        assert module.weight.item() == slow.weights["weight"].item()
    assert module.weight.item() == 2.0


def test_applied_gives_the_weights_back_after_an_error() -> None:
    module = nn.Linear(1, 1)
    average, before = WeightAverage(module, 0.5), module.weight.item()
    with torch.no_grad():
        module.weight.add_(1)
    with pytest.raises(ValueError), average.applied(module):
        raise ValueError
    assert module.weight.item() == pytest.approx(before + 1)


def test_an_average_goes_on_from_a_checkpoint() -> None:
    module = nn.BatchNorm1d(2)  # has an integer counter too
    average = WeightAverage(module, 0.9, warm_up=True)
    module(torch.rand(4, 2))
    average.update(module)
    again = WeightAverage(module, 0.9, warm_up=True)
    again.load_state_dict(average.state_dict(), module)
    module(torch.rand(4, 2))
    average.update(module)
    again.update(module)
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in average.weights.items())
    assert average.weights["num_batches_tracked"] == 2


def test_the_clock_books_what_has_passed(tmp_path, monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: now[0])
    run = Run(tmp_path / "run", SMOKE)
    clock = Clock(run, "prior")
    now[0] += 29.0
    assert not clock.due()
    now[0] += 1.0
    assert clock.due()
    clock.book()
    assert not clock.due() and run.seconds() == {"prior": 30.0}
    now[0] += 5.0
    clock.book()
    assert run.seconds() == {"prior": 35.0}


def test_weight_decay_is_adamws_and_of_matrices_only() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    assert type(make_adam(network, 0.1, (0.8, 0.9))) is torch.optim.Adam
    optimizer = make_adam(network, 0.1, (0.8, 0.9), weight_decay=0.5)
    before = [weight.detach().clone() for weight in network.parameters()]
    for weight in network.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert isinstance(optimizer, torch.optim.AdamW) and {group["betas"] for group in optimizer.param_groups} == {
        (0.8, 0.9)
    }
    for weight, old in zip(network.parameters(), before, strict=True):
        torch.testing.assert_close(weight.detach(), old * (1 - 0.1 * 0.5) if weight.ndim == 2 else old)
