from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from ral_gym.errors import ConfigError
from ral_gym.priors.pixelcnn import PixelCNN


def small(height: int = 5, width: int = 6, **kwargs: Any) -> PixelCNN:
    """A network in float64, wide enough for every path to show in a gradient."""
    torch.manual_seed(0)
    arguments = {"hidden_units": 16, "residual_units": 12, "layers": 2, "conv_filter_size": 3, "output_stack_layers": 2}
    return PixelCNN(7, height, width, **{**arguments, **kwargs}).double().eval()


def dependencies(prior: PixelCNN) -> Tensor:
    """Which codes the logits depend on: (T, T) bool, [t, s] for logits at t and code s."""
    length = prior.height * prior.width
    codes = torch.randint(prior.codebook_size, (1, length))
    embedded: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    handle = prior.input.embedding.register_forward_hook(keep)
    logits = prior(codes)[0]  # (T, K)
    handle.remove()
    weights = torch.randn(prior.codebook_size, dtype=logits.dtype)
    depends = []
    for t in range(length):
        (gradient,) = torch.autograd.grad(logits[t] @ weights, embedded, retain_graph=True)  # (1, H, W, C)
        depends.append(gradient.abs().sum(dim=-1).flatten() > 0)
    return torch.stack(depends)


def expected(prior: PixelCNN) -> Tensor:
    """The receptive field without a blind spot, (T, T) bool, worked out position by position.

    Above a position: the cone of k // 2 columns and rows per layer. In its own row and the cones of the codes to its
    left, which the horizontal stack adds.
    """
    reach, height, width = prior.conv_filter_size // 2, prior.height, prior.width
    layers = prior.layers

    def dilate(field: set[tuple[int, int]], taps: list[tuple[int, int]]) -> set[tuple[int, int]]:
        return {
            (row - up, column + across)
            for row, column in field
            for up, across in taps
            if row - up >= 0 and 0 <= column + across < width
        }

    square = [(up, across) for up in range(reach + 1) for across in range(-reach, reach + 1)]
    above = [(up, across) for up in range(1, reach + 1) for across in range(-reach, reach + 1)]
    left = [(0, -across) for across in range(reach + 1)]
    result = torch.zeros(height * width, height * width, dtype=torch.bool)
    for row in range(height):
        for column in range(width):
            seen: set[tuple[int, int]] = set()
            horizontal = {(row, column)}
            for layer in reversed(range(layers)):
                # The block's vertical pre-activations at the horizontal positions reach `layer` further vertical ones.
                vertical = dilate(horizontal, square)
                for _ in range(layer):
                    vertical = dilate(vertical, square)
                seen |= dilate(vertical, above)
                horizontal = dilate(horizontal, left)
            seen |= dilate(horizontal, [(0, -across) for across in range(1, reach + 1)])
            for seen_row, seen_column in seen:
                result[row * width + column, seen_row * width + seen_column] = True
    return result


@pytest.mark.parametrize(
    ("height", "width", "size", "layers"), [(5, 6, 3, 2), (6, 5, 5, 1), (4, 7, 3, 4), (3, 9, 7, 2), (1, 6, 3, 1)]
)
def test_logits_depend_on_every_earlier_code_in_reach_and_on_no_other(
    height: int, width: int, size: int, layers: int
) -> None:
    prior = small(height, width, conv_filter_size=size, layers=layers)
    depends = dependencies(prior)
    length = height * width
    not_earlier = torch.ones(length, length, dtype=torch.bool).triu()
    assert not (depends & not_earlier).any()
    assert (depends == expected(prior)).all()


def test_deep_network_sees_all_earlier_codes() -> None:
    prior = small(4, 4, layers=6)
    assert (dependencies(prior) == torch.ones(16, 16, dtype=torch.bool).tril(-1)).all()


def test_changing_later_codes_changes_nothing() -> None:
    prior = small()
    codes = torch.randint(7, (3, 30))
    other = codes.clone()
    other[:, 13:] = torch.randint(7, (3, 17))
    torch.testing.assert_close(prior(codes)[:, :14], prior(other)[:, :14], rtol=0, atol=0)
    assert not torch.equal(prior(codes)[:, 14:], prior(other)[:, 14:])


@pytest.mark.parametrize("position_embedding", [False, True])
def test_fewer_rows_are_the_first_rows_of_the_full_grid(position_embedding: bool) -> None:
    prior = small(position_embedding=position_embedding)
    codes = torch.randint(7, (2, 30))
    full = prior(codes)
    for rows in range(1, 6):
        torch.testing.assert_close(prior(codes[:, : rows * 6]), full[:, : rows * 6], rtol=1e-12, atol=1e-12)


def test_codes_not_drawn_yet_are_accepted() -> None:
    prior = small()
    codes = torch.randint(7, (2, 30))
    partial = codes.clone()
    partial[0, 10:], partial[1, 17:] = 7, 8
    logits, full = prior(partial), prior(codes)
    torch.testing.assert_close(logits[0, :11], full[0, :11])
    torch.testing.assert_close(logits[1, :18], full[1, :18])


def test_dropout_is_active_in_training_only() -> None:
    prior = small(dropout=0.5)
    codes = torch.randint(7, (2, 30))
    assert torch.equal(prior(codes), prior(codes))
    prior.train()
    assert not torch.equal(prior(codes), prior(codes))


def test_position_embedding_tells_positions_apart() -> None:
    codes = torch.zeros(1, 30, dtype=torch.int64)
    codes[:, :] = 3
    plain, placed = small(layers=1)(codes)[0], small(layers=1, position_embedding=True)(codes)[0]
    inner, further = 2 * 6 + 3, 3 * 6 + 3  # the same neighbourhood, out of reach of the edges
    assert torch.allclose(plain[inner], plain[further])
    assert not torch.allclose(placed[inner], placed[further])


def test_second_order_gradients_are_right() -> None:
    prior = small(3, 3, hidden_units=4, residual_units=3, output_stack_layers=1)
    codes = torch.randint(7, (2, 9))
    names = ["blocks.0.vertical.weight", "blocks.1.horizontal.weight", "input.embedding.weight"]
    parameters = [dict(prior.named_parameters())[name] for name in names]

    def loss(*weights: Tensor) -> Tensor:
        return torch.func.functional_call(prior, dict(zip(names, weights, strict=True)), (codes,)).log_softmax(-1)[
            0, -1
        ]

    assert torch.autograd.gradgradcheck(loss, parameters, fast_mode=True)


def test_every_parameter_gets_a_gradient() -> None:
    prior = small(position_embedding=True)
    prior(torch.randint(7, (2, 30))).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in prior.parameters())


def test_no_parameter_is_named_value() -> None:
    # sb3_contrib's TRPO leaves out every parameter with "value" in its name.
    assert not [name for name, _ in small(position_embedding=True).named_parameters() if "value" in name]


@pytest.mark.parametrize("layers", [1, 20])
def test_activations_keep_their_scale_at_any_depth(layers: int) -> None:
    torch.manual_seed(0)
    prior = PixelCNN(64, 8, 8, hidden_units=32, residual_units=32, layers=layers, output_stack_layers=layers)
    codes = torch.randint(64, (8, 64))
    features, logits = prior.features(codes), prior(codes)
    assert 0.05 < features.std() < 3
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten())
    assert abs(loss.item() - torch.tensor(64.0).log().item()) < 0.1
    loss.backward()
    norms = [block.vertical.weight.grad.norm() for block in prior.blocks]  # type: ignore[union-attr]
    assert max(norms) < 100 * min(norms)


def test_features_and_logits_make_up_the_pass() -> None:
    prior = small()
    codes = torch.randint(7, (2, 30))
    features = prior.features(codes)
    assert features.shape == (2, 30, 16)
    torch.testing.assert_close(prior.logits(features), prior(codes))


def test_config_rebuilds_the_network() -> None:
    prior = small(position_embedding=True)
    config = json.loads(json.dumps(prior.config))
    copy = PixelCNN(**config).double().eval()
    copy.load_state_dict(prior.state_dict())
    codes = torch.randint(7, (2, 30))
    assert torch.equal(copy(codes), prior(codes))


def test_compiles_in_place() -> None:
    prior = small()
    codes = torch.randint(7, (2, 30))
    before, keys = prior(codes), list(prior.state_dict())
    prior.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(prior(codes), before)
    assert list(prior.state_dict()) == keys


@pytest.mark.parametrize(
    ("name", "wrong", "allowed"),
    [
        ("conv_filter_size", 4, "odd"),
        ("conv_filter_size", 1, "at least 3"),
        ("layers", 0, "at least 1"),
        ("hidden_units", 0, "at least 1"),
        ("residual_units", -1, "at least 1"),
        ("dropout", 1.0, r"\[0, 1\)"),
        ("output_stack_layers", -1, "0 or more"),
        ("height", 0, "at least 1"),
    ],
)
def test_wrong_arguments_are_named(name: str, wrong: float, allowed: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}={wrong}.*{allowed}"):
        PixelCNN(**{"codebook_size": 7, "height": 5, "width": 6, name: wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [0, 7, 36])
def test_grids_that_do_not_fit_are_refused(length: int) -> None:
    with pytest.raises(ConfigError, match=f"{length} codes.*multiple of 6 from 6 to 30"):
        small()(torch.zeros(2, length, dtype=torch.int64))
