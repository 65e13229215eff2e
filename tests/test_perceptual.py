"""Perceptual distances: against plain derivations, from files as they are published, and what is refused."""

from __future__ import annotations

import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ral_gym.commands.cli import main
from ral_gym.errors import ConfigError
from ral_gym.metrics.features import lite0_network
from ral_gym.stages.perceptual import Perceptual, make_perceptual

CONVOLUTIONS = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256)}
CONVOLUTIONS |= {17: (256, 512), **{number: (512, 512) for number in (19, 21, 24, 26, 28)}}
"""Torchvision's VGG16: place in `features` -> channels."""
TAPS = {3: 0, 8: 1, 15: 2, 22: 3, 29: 4}
"""Place of the ReLU that LPIPS takes -> number of its linear layer."""
POOLINGS = (4, 9, 16, 23)
WIDTHS = (64, 128, 256, 512, 512)


def pictures(n: int, channels: int = 3, side: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def distance(found: list[Tensor], wanted: list[Tensor], weights: list[Tensor]) -> Tensor:
    """Eq. 1 of Zhang et al., position by position, in double precision."""
    total = torch.zeros((), dtype=torch.float64)
    for ours, theirs, weight in zip(found, wanted, weights, strict=True):
        for image in range(len(ours)):
            a, b = (x[image].double().flatten(1) for x in (ours, theirs))  # (C, h w)
            a, b = (x / x.norm(dim=0).clamp_min(1e-5) for x in (a, b))
            total += ((a - b) ** 2 * weight.double()[:, None]).sum() / a.shape[1] / len(ours)
    return total


# ----------------------------------------------------------------------------------------------------------- lite0


@pytest.mark.parametrize("channels", [1, 3])
def test_lite0_is_the_distance_of_its_first_blocks(channels: int) -> None:
    images, targets = pictures(3, channels), pictures(3, channels, seed=1)
    network: Any = lite0_network("a test").eval()

    def features(x: Tensor) -> list[Tensor]:
        grey_levels = (x.repeat(1, 3 // channels, 1, 1) + 1) * 127.5
        x = network._bn0(network._conv_stem((grey_levels - 127) / 128)).clamp(0, 6)
        found = [x]
        for number in range(5):
            x = network._blocks[number](x)
            found += [x] if number in (0, 2, 4) else []
        return found

    with torch.no_grad():
        ours, theirs = features(images), features(targets)
    expected = distance(ours, theirs, [torch.ones(x.shape[1]) for x in ours])
    found = make_perceptual("lite0")(images, targets)
    assert expected > 0.5
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0.0)


def test_the_same_image_is_at_distance_0_and_only_images_get_gradients() -> None:
    network = make_perceptual("lite0")
    images, targets = pictures(2).requires_grad_(), pictures(2, seed=1).requires_grad_()
    assert network(images, images.detach()).item() == 0
    network(images, targets).backward()
    assert images.grad is not None and images.grad.abs().sum() > 0 and targets.grad is None
    assert not any(weight.requires_grad for weight in network.parameters()) and not network.training


class Silent(Perceptual):
    """Features that are 0 where the image is dark."""

    def features(self, images: Tensor) -> list[Tensor]:
        return [images.clamp_min(0)]


def test_features_of_length_0_give_no_infinite_gradient() -> None:
    dark, light = torch.zeros(1, 3, 4, 4, requires_grad=True), torch.ones(1, 3, 4, 4)
    distance = Silent([3])(dark, light)
    distance.backward()
    assert distance.item() == pytest.approx(1.0) and dark.grad is not None and bool(dark.grad.isfinite().all())


# ----------------------------------------------------------------------------------------------------------- LPIPS


def vgg16(seed: int = 0) -> OrderedDict[str, Tensor]:
    """The weights of torchvision's VGG16 by name, at random; of the classifier a stump."""
    generator = torch.Generator().manual_seed(seed)
    found: OrderedDict[str, Tensor] = OrderedDict()
    for place, (width, out) in CONVOLUTIONS.items():
        found[f"features.{place}.weight"] = (
            torch.randn(out, width, 3, 3, generator=generator) * (2 / (9 * width)) ** 0.5
        )
        found[f"features.{place}.bias"] = 0.1 * torch.randn(out, generator=generator)
    return OrderedDict(found, **{"classifier.6.bias": torch.zeros(1000)})


def linear() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {
        f"lin{number}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator)
        for number, width in enumerate(WIDTHS)
    }


def whole(vgg: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the whole of LPIPS, where the linear layers come twice."""
    found = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)} | linear()
    found |= {name.replace("lin", "lins."): weight for name, weight in linear().items()}
    for name, weight in vgg.items():
        if name.startswith("features."):
            _, place, end = name.split(".")
            found[f"net.slice{1 + sum(int(place) > pooling for pooling in POOLINGS)}.{place}.{end}"] = weight
    return found


def by_layers(x: Tensor, weights: dict[str, Tensor]) -> list[Tensor]:
    """VGG16 as torchvision lists it: place by place."""
    x = (x - torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(
        1, 3, 1, 1
    )
    found = []
    for place in range(30):
        if place in CONVOLUTIONS:
            x = F.conv2d(x, weights[f"features.{place}.weight"], weights[f"features.{place}.bias"], padding=1)
        elif place in POOLINGS:
            x = F.max_pool2d(x, 2)
        else:
            x = x.clamp_min(0)
        if place in TAPS:
            found.append(x)
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lpips")
    torch.save(vgg16(), folder / "vgg16.pth", _use_new_zipfile_serialization=False)  # as torchvision's, of 2017
    torch.save(linear(), folder / "vgg.pth")
    torch.save(whole(vgg16()), folder / "whole.pth")
    return folder


@pytest.mark.parametrize("names", [("vgg16.pth", "vgg.pth"), ("whole.pth",)])
def test_lpips_from_the_published_files(files: Path, names: tuple[str, ...]) -> None:
    network = make_perceptual("lpips:" + ",".join(str(files / name) for name in names))
    images, targets = pictures(2), pictures(2, seed=1)
    with torch.no_grad():
        ours, theirs = by_layers(images, vgg16()), by_layers(targets, vgg16())
        expected = distance(ours, theirs, [weight.flatten() for weight in linear().values()])
        torch.testing.assert_close(network(images, targets).double(), expected, rtol=1e-4, atol=0.0)


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("unpickled",))


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in vgg16().items() if key != name}


REFUSED: dict[str, tuple[Any, str]] = {
    "no file": (None, "cannot be read (No such file or directory): give the file with VGG16"),
    "code": ({"features.0.weight": Evil()}, "asks for print, which no such checkpoint needs: nothing of it"),
    "another network": ({"conv.weight": torch.zeros(3)}, "has no tensor features.0.weight: give the file with VGG16"),
    "a missing layer": (without("features.28.bias"), "has no tensor features.28.bias"),
    "another width": (
        vgg16() | {"features.5.weight": torch.zeros(64, 64, 3, 3)},
        "features.5.weight has shape (64, 64",
    ),
    "infinite": (vgg16() | {"features.2.bias": torch.full((64,), float("nan"))}, "features.2.bias has shape (64,)"),
    "a whole network": (torch.nn.Linear(1, 1), "asks for torch.nn.modules.linear.Linear"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_something_else_is_refused_in_one_line(
    case: str, files: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content, said = REFUSED[case]
    if content is not None:
        torch.save(content, tmp_path / "mine.pth")
    flags = ["--preset", "smoke", "--quiet", "--stages", "vqvae", "--runs", str(tmp_path / "runs")]
    network = f"lpips:{tmp_path / 'mine.pth'},{files / 'vgg.pth'}"
    flags += ["--vqvae.perceptual-weight", "1", "--vqvae.perceptual-network", network]
    assert main(["train", *flags]) == 2
    out, err = capfd.readouterr()
    (line,) = err.strip().splitlines()
    assert said in line and "vqvae.perceptual_network" in line and "unpickled" not in out
    assert not (tmp_path / "runs" / "smoke" / "vqvae.safetensors").exists()


def test_a_path_with_braces_is_named_as_it_is(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(1, 1), tmp_path / "{vgg}.pth")
    with pytest.raises(ConfigError, match=r"\{vgg\}\.pth asks for torch\.nn\.modules\.linear\.Linear"):
        make_perceptual(f"lpips:{tmp_path / '{vgg}.pth'}")


def test_a_pickle_and_swapped_files_are_refused(files: Path, tmp_path: Path) -> None:
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ConfigError, match=r"damaged or not a checkpoint|asks for"):
        make_perceptual(f"lpips:{tmp_path / 'evil.pth'},{files / 'vgg.pth'}")
    with pytest.raises(ConfigError, match=r"vgg.pth has no tensor features.0.weight: give the file with VGG16"):
        make_perceptual(f"lpips:{files / 'vgg.pth'},{files / 'vgg16.pth'}")


def test_the_shape_alone_needs_no_file_and_no_memory() -> None:
    network = make_perceptual("lpips:nowhere.pth", weights=False)
    assert all(weight.is_meta for weight in network.parameters())
    assert sum(weight.numel() for weight in network.parameters()) == 14_714_688  # VGG16 without its classifier


def test_without_the_extra_the_message_names_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    flags = ["--preset", "smoke", "--quiet", "--stages", "vqvae", "--runs", str(tmp_path)]
    assert main(["train", *flags, "--vqvae.perceptual-weight", "1"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "the perceptual network lite0 needs efficientnet_lite_pytorch" in line
    assert 'pip install "ral-gym[demo]"' in line and not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"the perceptual network lite0 needs .* pip install"):
        make_perceptual("lite0")
