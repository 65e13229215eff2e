"""The VQ-VAE: codes mean the same everywhere, it learns, and evaluation leaves it as it is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ral_gym.data.images import ImageSet
from ral_gym.errors import ConfigError
from ral_gym.presets import SMOKE
from ral_gym.runs.run import Run
from ral_gym.runs.storage import load_module, save_module
from ral_gym.stages.train_vqvae import build_vqvae, train_vqvae
from ral_gym.tokenizers.vqvae import VQVAE


def small(**changes: Any) -> VQVAE:
    arguments = {"codebook_size": 8, "codebook_dim": 4, "hidden_units": 16, "residual_units": 8, "residual_blocks": 1}
    return VQVAE(16, 1, **{"layers": 2, **arguments, **changes})


def pictures(n: int = 64, size: int = 16, seed: int = 0) -> Tensor:
    """Two smooth gradients and a bar at random places: (n, 1, S, S) in [-1, 1]."""
    rng = torch.Generator().manual_seed(seed)
    axis = torch.linspace(-1, 1, size)
    slope = torch.rand(n, 2, 1, 1, generator=rng) * 2 - 1
    images = (slope[:, :1] * axis[:, None] + slope[:, 1:] * axis[None, :]) / 2  # (n, 1, S, S)
    for i, column in enumerate(torch.randint(size - 4, (n,), generator=rng).tolist()):
        images[i, :, :, column : column + 4] = 1
    return images


@pytest.fixture(scope="module")
def trained() -> tuple[VQVAE, list[float], list[int]]:
    """A VQ-VAE trained for 200 steps, its errors, and the number of codes that each batch used."""
    torch.manual_seed(0)
    vqvae, images = small(), pictures()
    optimizer = torch.optim.Adam(vqvae.parameters(), lr=2e-3)
    errors, used = [], []
    for _ in range(200):
        batch = images[torch.randint(len(images), (16,))]
        reconstruction, codes, commitment = vqvae(batch)
        error = F.mse_loss(reconstruction, batch)
        optimizer.zero_grad()
        (error + commitment).backward()
        optimizer.step()
        errors.append(error.item())
        used.append(codes.unique().numel())
    return vqvae.eval(), errors, used


def state(vqvae: VQVAE) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in vqvae.state_dict().items()}


def changes(before: dict[str, Tensor], vqvae: VQVAE) -> set[str]:
    return {name for name, tensor in vqvae.state_dict().items() if not torch.equal(tensor, before[name])}


def test_training_lowers_the_error_and_uses_the_codebook(trained) -> None:
    _, errors, used = trained
    assert np.mean(errors[-10:]) < 0.35 * np.mean(errors[:10])
    assert np.mean(used[-10:]) > 6  # of 8


def test_encode_is_the_quantisers_own_assignment(trained) -> None:
    vqvae, _, _ = trained
    images = pictures(32, seed=1)
    with torch.no_grad():
        reconstruction, codes, _ = vqvae(images)
    assert torch.equal(vqvae.encode(images)[0], codes) and codes.dtype == torch.int64
    assert codes.shape == (32, 16) and codes.unique().numel() > 4
    torch.testing.assert_close(vqvae.decode(codes), reconstruction.clamp(-1, 1))


def test_codes_are_in_raster_order(trained) -> None:
    vqvae, _, _ = trained
    image = pictures(1, seed=2)
    with torch.no_grad():
        z = vqvae.encode_features(image)  # (1, D, H, W)
    codes = vqvae.encode(image)[0][0]
    for row, column in ((0, 3), (2, 1)):
        distance = (vqvae.codebooks[0] - z[0, :, row, column]).square().sum(1)
        assert codes[row * vqvae.width + column] == distance.argmin()


def test_evaluation_changes_nothing(trained) -> None:
    vqvae, _, _ = trained
    before = state(vqvae)
    images = pictures(16, seed=3) * 0.3 + 0.5
    with torch.no_grad():
        vqvae(images)
    vqvae.decode(vqvae.encode(images))
    assert changes(before, vqvae) == set()


def test_encode_changes_nothing_in_training_mode_either(trained) -> None:
    vqvae = small().train()
    vqvae.load_state_dict(trained[0].state_dict())
    before = state(vqvae)
    vqvae.encode(pictures(16))
    assert changes(before, vqvae) == set()


def test_gradients_pass_the_codebook_straight_through() -> None:
    vqvae = small().train()
    images = pictures(16)
    reconstruction, _, _ = vqvae(images)
    F.mse_loss(reconstruction, images).backward()
    for part in (vqvae.encoder, vqvae.to_codebook, vqvae.decoder):
        gradients = [parameter.grad for parameter in part.parameters()]
        assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    # Straight-through: the encoder's output gets exactly the gradient of the vectors that replaced it.
    z = vqvae.encode_features(images).detach().requires_grad_(True)
    vectors, _, _ = vqvae.quantiser(z.flatten(2).transpose(1, 2))
    vectors.retain_grad()
    vqvae.decoder(vectors.transpose(1, 2).reshape(z.shape)).square().sum().backward()
    torch.testing.assert_close(z.grad.flatten(2).transpose(1, 2), vectors.grad)


def test_the_codebook_moves_by_its_moving_average_and_not_by_gradients() -> None:
    vqvae = small(threshold_ema_dead_code=0).train()
    images = pictures(32)
    vqvae(images)  # k-means
    codebook = vqvae.quantiser._codebook
    before, sizes, sums = vqvae.codebooks[0].clone(), codebook.cluster_size.clone(), codebook.embed_avg.clone()
    with torch.no_grad():
        _, codes, _ = vqvae(images * 0.8)
        z = vqvae.encode_features(images * 0.8).flatten(2).transpose(1, 2).flatten(0, 1)  # (B T, D)
    one_hot = F.one_hot(codes.flatten(), 8).float()  # (B T, K)
    sizes = 0.99 * sizes + 0.01 * one_hot.sum(0)
    sums = 0.99 * sums + 0.01 * one_hot.T @ z
    smoothed = (sizes + 1e-5) / (sizes.sum() + 8e-5) * sizes.sum()
    torch.testing.assert_close(vqvae.codebooks[0], (sums / smoothed.unsqueeze(-1))[0])
    assert not torch.equal(vqvae.codebooks[0], before)
    assert not any("codebook" in name for name, _ in vqvae.quantiser.named_parameters())


@pytest.mark.parametrize("threshold", [2, 0])
def test_dead_codes_are_restarted_from_encoder_outputs(threshold) -> None:
    vqvae = small(threshold_ema_dead_code=threshold).train()
    vqvae(pictures(32))
    far = 100.0
    codebook = vqvae.quantiser._codebook
    codebook.embed[0, 5] = codebook.embed_avg[0, 5] = far  # no encoder output is near it
    codebook.cluster_size[0, 5] = 1.0
    with torch.no_grad():
        z = vqvae.encode_features(pictures(32)).flatten(2).transpose(1, 2).flatten(0, 1)
        vqvae(pictures(32))
    distance = (z - vqvae.codebooks[0][5]).norm(dim=1).min()
    assert distance < 1e-4 if threshold else distance > far / 2


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_fewer_rows_give_a_shorter_image(trained, rows) -> None:
    vqvae, _, _ = trained
    codes = torch.randint(8, (3, rows * vqvae.width))
    assert vqvae.decode(codes).shape == (3, 1, 4 * rows, 16)
    assert vqvae.decode(codes).abs().max() <= 1


def test_partial_rows_and_codes_outside_the_codebook_are_refused(trained) -> None:
    vqvae, _, _ = trained
    for length in (0, 3, 5, 20):
        with pytest.raises(ConfigError, match=rf"^{length} codes .* multiple of the 4 codes of a row, at most 16"):
            vqvae.decode(torch.zeros(2, length, dtype=torch.int64))
    for code in (-1, 8, 9):
        codes = torch.zeros(2, 16, dtype=torch.int64)
        codes[1, 7] = code
        with pytest.raises(ConfigError, match=r"codes in .*: they must lie in 0\.\.7"):
            vqvae.decode(codes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"layers": 5}, r"image_size 16 does not fit 5 strided layers: it must be a multiple of 32"),
        ({"layers": 0}, r"image_size 16 does not fit 0"),
        ({"encoder_filter_size": 4}, r"filter sizes 4 \(encoder\) and 4 \(decoder\)"),
        ({"decoder_filter_size": 3}, r"filter sizes 3 \(encoder\) and 3 \(decoder\)"),
    ],
)
def test_impossible_shapes_are_refused(arguments, words) -> None:
    with pytest.raises(ConfigError, match=words):
        small(**arguments)


@pytest.mark.parametrize(("encoder", "decoder"), [(3, 4), (5, 2), (5, 6)])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_every_layer_halves_and_doubles_the_side(layers, encoder, decoder) -> None:
    vqvae = small(layers=layers, encoder_filter_size=encoder, decoder_filter_size=decoder)
    images = pictures(2)
    assert vqvae.encode_features(images).shape == (2, 4, 16 // 2**layers, 16 // 2**layers)
    assert vqvae(images)[0].shape == images.shape


def test_a_saved_vqvae_encodes_and_decodes_alike(trained, tmp_path) -> None:
    vqvae, _, _ = trained
    save_module(tmp_path / "vqvae.safetensors", vqvae)
    again = load_module(tmp_path / "vqvae.safetensors", VQVAE)
    images = pictures(8, seed=4)
    assert torch.equal(again.encode(images)[0], vqvae.encode(images)[0])
    assert torch.equal(again.decode(again.encode(images)), vqvae.decode(vqvae.encode(images)))


# Stage 1 ------------------------------------------------------------------------------------------------------------


def test_a_stopped_stage_1_continues_to_the_same_weights(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("ral_gym.stages.common.CHECKPOINT_SECONDS", 0.0)
    images = (pictures(32, size=32).mul(127.5).add(127.5)).byte().numpy()
    image_set = ImageSet(images, images[:4], None, "bars", ())
    cpu = torch.device("cpu")
    expected = train_vqvae(Run(tmp_path / "whole", SMOKE), image_set, cpu, progress=False)

    class Killed(Exception):
        pass

    def die(run: Run, stage: str, step: int, figures: dict[str, float]) -> None:
        raise Killed

    run = Run(tmp_path / "broken", SMOKE)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", die)  # at step 10, before that step's checkpoint
        with pytest.raises(Killed):
            train_vqvae(run, image_set, cpu, progress=False)
    checkpoint = run.load_checkpoint("vqvae")
    assert checkpoint is not None and checkpoint["step"] == 9
    again = train_vqvae(run, image_set, cpu, progress=False)
    assert changes(expected.state_dict(), again) == set()
    assert [record["step"] for record in run.metrics("vqvae")] == [10, 20]
    assert changes(build_vqvae(run, image_set).state_dict(), again)  # and it has learnt something
