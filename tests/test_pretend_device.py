"""The pretended CUDA device refuses what a real one does, and counts what makes the host wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.pretend_device import Device, pretend_cuda


@pytest.fixture
def device() -> Iterator[Device]:
    with pretend_cuda() as device:
        yield device


def test_tensors_say_where_they_are(device: Device) -> None:
    x = torch.ones(3, device="cuda")
    assert x.is_cuda and x.device == torch.device("cuda", 0) and (x + 1)[1:].view(-1).is_cuda
    assert not x.cpu().is_cuda and not torch.ones(3).is_cuda
    assert torch.nn.Linear(2, 2).to("cuda").weight.device.type == "cuda"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, y: x + y, "same device"),
        (lambda x, y: torch.cat([x, y]), "same device"),
        (lambda x, y: y[x.long()], "either on cpu or on the same device"),
        (lambda x, y: x.numpy(), "can't convert cuda"),
        (lambda x, y: torch.rand(3, generator=torch.Generator(), device="cuda"), "'cuda' device type for generator"),
    ],
)
def test_what_a_real_device_refuses_is_refused(
    device: Device, wrong: Callable[[Tensor, Tensor], Any], message: str
) -> None:
    with pytest.raises((RuntimeError, TypeError), match=message):
        wrong(torch.zeros(3, device="cuda"), torch.zeros(3))


@pytest.mark.parametrize(
    ("work", "waits"),
    [
        (lambda x: x * 2 + 1, 0),
        (lambda x: x.item() if x.dim() == 0 else x[0].item(), 1),
        (lambda x: bool((x > 0).all()), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: (x > 0).nonzero(), 1),
        (lambda x: torch.nn.functional.one_hot(x.long(), 3), 0),
        (lambda x: torch.nn.functional.one_hot(x.long()), 1),
        (lambda x: x + torch.tensor([1.0, 2.0, 3.0]).to("cuda"), 0),
    ],
)
def test_waits_are_counted(device: Device, work: Callable[[Tensor], Any], waits: int) -> None:
    x = torch.ones(3, device="cuda")
    device.counts.clear()
    work(x)
    assert device.counts["syncs"] == waits


@pytest.mark.parametrize(
    ("copy", "blocking"),
    [
        (lambda host, there: torch.as_tensor(host, device="cuda"), 1),
        (lambda host, there: host.to("cuda"), 1),
        (lambda host, there: host.to("cuda", non_blocking=True), 0),
        (lambda host, there: host.cuda(non_blocking=True), 0),
        (lambda host, there: there.copy_(host), 1),
        (lambda host, there: there.copy_(host, non_blocking=True), 0),
    ],
)
def test_copies_to_the_device_that_wait_are_counted(
    device: Device, copy: Callable[[Tensor, Tensor], Any], blocking: int
) -> None:
    host, there = torch.ones(3), torch.zeros(3, device="cuda")
    device.counts.clear()
    copy(host, there)
    assert (device.counts["h2d"], device.counts["blocking"], device.counts["syncs"]) == (1, blocking, 0)


def recorded(device: Device, work: Callable[[], Any]) -> Any:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(0), torch.cuda.graph(graph):
        work()
    return graph


def test_recording_leaves_memory_and_replaying_reads_it(device: Device) -> None:
    x, y = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
    graph = recorded(device, lambda: y.add_(x))
    assert y.sum().item() == 0
    x.fill_(2)
    graph.replay()
    graph.replay()
    assert y.tolist() == [4, 4, 4] and device.counts["replays"] == 2


def test_a_number_of_pythons_is_baked_into_a_graph(device: Device) -> None:
    y, position = torch.zeros(3, device="cuda"), 0
    graph = recorded(device, lambda: y[position].fill_(1))
    position = 2
    graph.replay()
    assert y.tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.copy_(torch.zeros(3)),
        lambda x: torch.rand(3, device="cuda", generator=torch.Generator("cuda")),
    ],
)
def test_what_cannot_be_recorded_is_refused(device: Device, work: Callable[[Tensor], Any]) -> None:
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        recorded(device, lambda: work(x))


def test_a_graph_is_recorded_on_a_device_of_its_own_choice(device: Device) -> None:
    with pytest.raises(RuntimeError, match=r"enter torch\.cuda\.device"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        pass
