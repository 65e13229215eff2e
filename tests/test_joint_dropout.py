"""Dropout of some rows of a batch is that of the whole batch."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ral_gym.runs.joint_dropout import JointDropout, draws_in_rows

SHARES = [slice(0, 3), slice(3, 5), slice(4, 5), slice(0, 1)]


@pytest.mark.parametrize("own", SHARES, ids=str)
@pytest.mark.parametrize("kind", ["rows", "channels last", "inplace", "float64", "layer"])
def test_rows_get_the_numbers_of_the_whole_batch(own: slice, kind: str) -> None:
    x = torch.rand(5, 4, 6, 2, dtype=torch.float64 if kind == "float64" else torch.float32)
    if kind == "channels last":
        x = x.to(memory_format=torch.channels_last)
    drop = {
        "inplace": lambda y: F.dropout(y.clone(memory_format=torch.preserve_format), 0.3, inplace=True),
        "layer": nn.Dropout(0.3),
    }
    function = drop.get(kind, lambda y: F.dropout(y, 0.3))
    torch.manual_seed(0)
    whole = function(x)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    with JointDropout(5, own):
        found = function(x[own])
    assert torch.equal(found, whole[own]) and torch.equal(torch.get_rng_state(), after)
    assert (whole == 0).any() and (whole != 0).any()


def test_several_batches_in_one_tensor() -> None:
    real, fake, own = torch.rand(5, 7), torch.rand(5, 7), slice(2, 4)
    torch.manual_seed(0)
    whole = F.dropout(torch.cat([real, fake]), 0.5)
    torch.manual_seed(0)
    with JointDropout(5, own):
        found = F.dropout(torch.cat([real[own], fake[own]]), 0.5)
    assert torch.equal(found, torch.cat([whole[2:4], whole[7:9]]))


def test_without_dropout_nothing_is_drawn() -> None:
    x, before = torch.rand(2, 3), torch.get_rng_state()
    with JointDropout(5, slice(0, 2)):
        assert torch.equal(F.dropout(x, 0.5, training=False), x) and torch.equal(nn.Dropout(0.0)(x), x)
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_go_through_what_is_kept() -> None:
    x = torch.rand(2, 50, requires_grad=True)
    with JointDropout(5, slice(1, 3)):
        y = nn.Dropout(0.4)(x)
    y.sum().backward()
    assert torch.allclose(x.grad, torch.where(y == 0, 0.0, 1 / 0.6))


def test_which_layers_can_be_shared() -> None:
    assert draws_in_rows(nn.Sequential(nn.Dropout(0.1), nn.Linear(2, 2)))
    assert not draws_in_rows(nn.Sequential(nn.Dropout2d(0.1)))
