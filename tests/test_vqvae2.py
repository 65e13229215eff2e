"""The VQ-VAE of two levels: the top is quantised first, the bottom given it, and the image painted from both."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ral_gym.data.images import ImageSet, to_uint8
from ral_gym.errors import ConfigError, RunError
from ral_gym.grid import CodeGrid
from ral_gym.metrics.features import EncoderFeatures, extract
from ral_gym.runs.storage import load_module, save_module
from ral_gym.tokenizers.code_set import CodeSet, decode_codes, encode_images, encode_set
from ral_gym.tokenizers.vqvae import VQVAE
from ral_gym.tokenizers.vqvae2 import VQVAE2, vqvae_class

CONFIG = {"codebook_size": 16, "codebook_dim": 8, "hidden_units": 16, "residual_units": 8, "residual_blocks": 1}


def small(**changes: Any) -> VQVAE2:
    return VQVAE2(16, 1, **{"layers": 1, **CONFIG, **changes})


def pictures(n: int = 64, size: int = 16, seed: int = 0) -> Tensor:
    """A slope, and a fine pattern of one of two kinds at a random place: (n, 1, S, S) in [-1, 1]."""
    rng = torch.Generator().manual_seed(seed)
    axis = torch.linspace(-1, 1, size)
    slope = torch.rand(n, 2, 1, 1, generator=rng) * 2 - 1
    images = (slope[:, :1] * axis[:, None] + slope[:, 1:] * axis[None, :]) / 2  # (n, 1, S, S)
    stripes = (torch.arange(4) % 2 * 2.0 - 1).expand(4, 4)
    for i, column in enumerate(torch.randint(size - 4, (n,), generator=rng).tolist()):
        images[i, :, 4:8, column : column + 4] = stripes if i % 2 else stripes.T
    return images


@pytest.fixture(scope="module")
def trained() -> tuple[VQVAE2, list[float]]:
    """Trained for 200 steps, and its errors."""
    torch.manual_seed(0)
    vqvae, images = small(), pictures()
    optimizer = torch.optim.Adam(vqvae.parameters(), lr=2e-3)
    errors = []
    for _ in range(200):
        batch = images[torch.randint(len(images), (16,))]
        reconstruction, _, commitment = vqvae(batch)
        error = F.mse_loss(reconstruction, batch)
        optimizer.zero_grad()
        (error + commitment).backward()
        optimizer.step()
        errors.append(error.item())
    return vqvae.eval(), errors


def changes(before: dict[str, Tensor], vqvae: VQVAE) -> set[str]:
    return {name for name, tensor in vqvae.state_dict().items() if not torch.equal(tensor, before[name])}


def test_shapes_are_those_of_the_tables() -> None:
    # Tables 8c, 9c and 10c: image, strided layers, top and bottom code grid.
    for size, layers, top, bottom in ((128, 2, 16, 32), (256, 2, 32, 64), (512, 3, 32, 64)):
        with torch.device("meta"):
            vqvae = VQVAE2(size, 3, codebook_size=512, layers=layers)
        assert vqvae.grid == CodeGrid(top, top, 512, levels=2)
        assert vqvae.grid.shapes == ((top, top), (bottom, bottom))
        # Where nothing can be computed, the parts have shapes: for the count of operations.
        images = torch.zeros(2, 3, size, size, device="meta")
        codes = vqvae.encode(images)
        assert [level.shape for level in codes] == [(2, top**2), (2, bottom**2)]
        assert vqvae.paint(vqvae.lookup(codes)).shape == images.shape


def test_training_lowers_the_error_and_uses_both_codebooks(trained) -> None:
    vqvae, errors = trained
    assert sum(errors[-10:]) < 0.35 * sum(errors[:10])
    top, bottom = vqvae.encode(pictures(seed=1))
    assert top.unique().numel() > 8 and bottom.unique().numel() > 8  # of 16


def test_both_levels_reach_the_image(trained) -> None:
    vqvae, _ = trained
    codes = vqvae.encode(pictures(16, seed=1))
    for level in (0, 1):
        changed = [part.clone() for part in codes]
        changed[level] = (changed[level] + 5) % 16
        assert (vqvae.decode(changed) - vqvae.decode(codes)).abs().mean() > 0.02


def test_the_bottom_codes_are_given_the_top_ones(trained) -> None:
    vqvae, _ = trained
    images = pictures(16, seed=1)
    features, top = vqvae.encode_top(images)
    one, other = (vqvae.encode_bottom(features, shift + torch.zeros_like(top)) for shift in (0.0, 1.0))
    assert (one - other).abs().mean() > 0.02
    # And by exactly the vectors that `encode` has put in the top's place, not by its features.
    codes = vqvae.encode(images)
    z = vqvae.encode_bottom(features, vqvae.lookup(codes)[0])  # (B, D, 2H, 2W)
    distance = (vqvae.codebooks[1] - z[3, :, 5, 2]).square().sum(1)
    assert codes[1][3, 5 * 8 + 2] == distance.argmin()


def test_encode_is_the_quantisers_own_assignment(trained) -> None:
    vqvae, _ = trained
    images = pictures(32, seed=1)
    with torch.no_grad():
        reconstruction, codes, commitment = vqvae(images)
    top, bottom = vqvae.encode(images)
    assert (top.shape, bottom.shape, codes.shape) == ((32, 16), (32, 64), (32, 80)) and top.dtype == torch.int64
    assert torch.equal(torch.cat([top, bottom], 1), codes) and commitment.shape == ()
    torch.testing.assert_close(vqvae.decode(codes), reconstruction.clamp(-1, 1))
    assert torch.equal(vqvae.decode([top, bottom]), vqvae.decode(codes))


def test_evaluation_and_encoding_change_nothing(trained) -> None:
    vqvae = small()
    vqvae.load_state_dict(trained[0].state_dict())
    before = {name: tensor.clone() for name, tensor in vqvae.state_dict().items()}
    with torch.no_grad():
        vqvae.eval()(pictures(16) * 0.3 + 0.5)
    vqvae.train()
    vqvae.decode(vqvae.encode(pictures(16)))
    assert changes(before, vqvae) == set()


def test_training_reaches_every_network_and_moves_both_codebooks() -> None:
    vqvae, images = small().train(), pictures(32)
    vqvae(images)  # k-means
    before = [codebook.clone() for codebook in vqvae.codebooks]
    reconstruction, _, commitment = vqvae(images * 0.8)
    (F.mse_loss(reconstruction, images) + commitment).backward()
    for name, parameter in vqvae.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(not torch.equal(now, old) for now, old in zip(vqvae.codebooks, before, strict=True))


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_fewer_rows_give_a_shorter_image(trained, rows) -> None:
    vqvae, _ = trained
    codes = torch.randint(16, (3, 80))
    short = vqvae.grid.crop(codes, rows)
    assert short.shape == (3, 20 * rows)
    image = vqvae.decode(short)
    assert image.shape == (3, 1, 4 * rows, 16) and image.abs().max() <= 1
    assert torch.equal(image, vqvae.decode([codes[:, : 4 * rows], codes[:, 16 : 16 + 16 * rows]]))
    if rows == 4:
        assert torch.equal(image, vqvae.decode(codes))


def test_the_cut_is_felt_near_it_only(trained) -> None:
    vqvae, _ = trained
    codes = torch.cat(vqvae.encode(pictures(4, seed=3)), 1)
    whole, short = vqvae.decode(codes), vqvae.decode(vqvae.grid.crop(codes, 3))
    difference = (whole[:, :, :12] - short).abs().amax((0, 1, 3))  # (12,)
    assert difference[-1] > 0 and (difference[:4] < 1e-5).all()


def test_an_images_first_rows_are_encoded_alone(trained) -> None:
    vqvae, _ = trained
    top, bottom = vqvae.encode(pictures(5)[:, :, :8])
    assert (top.shape, bottom.shape) == ((5, 8), (5, 32))


def test_codes_that_do_not_fit_are_refused(trained) -> None:
    vqvae, _ = trained
    for length in (0, 16, 50, 100):
        with pytest.raises(ConfigError, match=rf"^{length} codes .* two levels of 16 \+ 64: .* 20 codes of a row"):
            vqvae.decode(torch.zeros(2, length, dtype=torch.int64))
    for sizes in ([80], [64, 16], [16, 16, 48], []):
        with pytest.raises(ConfigError, match=rf"codes of {len(sizes)} levels .* takes 2, top first, with \[16, 64\]"):
            vqvae.decode([torch.zeros(2, size, dtype=torch.int64) for size in sizes])
    for code, place in ((-1, 3), (16, 3), (16, 70)):
        codes = torch.zeros(2, 80, dtype=torch.int64)
        codes[1, place] = code
        with pytest.raises(ConfigError, match=r"codes in .*: they must lie in 0\.\.15"):
            vqvae.decode(codes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"layers": 4}, r"image_size 16 does not fit 4 strided layers and one for the second level: .* multiple of 32"),
        ({"layers": 0}, "image_size 16 does not fit 0"),
        ({"decoder_filter_size": 3}, "filter sizes 3"),
    ],
)
def test_impossible_shapes_are_refused(arguments, words) -> None:
    with pytest.raises(ConfigError, match=words):
        small(**arguments)


@pytest.mark.parametrize(("encoder", "decoder"), [(3, 4), (5, 2), (5, 6)])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_every_filter_size_fits(layers, encoder, decoder) -> None:
    vqvae = small(layers=layers, encoder_filter_size=encoder, decoder_filter_size=decoder)
    reconstruction, codes, _ = vqvae(pictures(2))
    assert reconstruction.shape == (2, 1, 16, 16) and codes.shape == (2, vqvae.grid.n_codes)


def test_the_class_follows_the_levels(trained, tmp_path) -> None:
    assert (vqvae_class(1), vqvae_class(2)) == (VQVAE, VQVAE2)
    with pytest.raises(ConfigError, match=r"vqvae\.levels is 3: give 1 or 2"):
        vqvae_class(3)
    vqvae, _ = trained
    save_module(tmp_path / "vqvae.safetensors", vqvae)
    again = load_module(tmp_path / "vqvae.safetensors", vqvae_class(2), config=vqvae.config)
    codes = torch.randint(16, (2, 80))
    assert torch.equal(again.decode(codes), vqvae.decode(codes))
    with pytest.raises(RunError, match="holds VQVAE2, not VQVAE"):
        load_module(tmp_path / "vqvae.safetensors", VQVAE)


def test_features_of_the_extractor_hold_both_levels(trained) -> None:
    vqvae, _ = trained
    images = to_uint8(pictures(6))
    features = extract(EncoderFeatures(vqvae.encode_features, vqvae.num_features), images)
    assert features.shape == (6, 16)
    for half in (features[:, :8], features[:, 8:]):
        assert half.std(0).max() > 1e-3


def test_a_set_of_images_becomes_sequences(trained, tmp_path) -> None:
    vqvae, _ = trained
    images = to_uint8(pictures(10)).numpy()
    codes = encode_images(vqvae, images, batch_size=4, progress=False)
    assert codes.shape == (10, 80) and codes.dtype.name == "int16"
    with torch.no_grad():
        expected = vqvae(torch.from_numpy(images).float() / 127.5 - 1)[1]
    assert torch.equal(torch.from_numpy(codes).long(), expected)
    assert torch.equal(decode_codes(vqvae, codes), to_uint8(vqvae.decode(expected)))
    assert decode_codes(vqvae, vqvae.grid.crop(codes, 3), batch_size=3).shape == (10, 1, 12, 16)
    code_set = encode_set(vqvae, ImageSet(images, images[:2], None, "", ()), passes=2, seed=0, progress=False)
    code_set.save(tmp_path / "codes.safetensors")
    assert CodeSet.load(tmp_path / "codes.safetensors", vqvae.grid).train.shape == (20, 80)
    with pytest.raises(
        RunError, match="belongs to another VQ-VAE: its codes \\(tensor test\\) are not 16 per image in"
    ):
        CodeSet.load(tmp_path / "codes.safetensors", CodeGrid(4, 4, 16))
    with pytest.raises(RunError, match=r"its codes \(tensor test\) are not 64 \+ 256 per image"):
        CodeSet.load(tmp_path / "codes.safetensors", CodeGrid(8, 8, 16, levels=2))


def test_the_shape_of_codes_needs_no_quantiser() -> None:
    # Its library takes seconds to import, and the toy environment has no VQ-VAE.
    modules = "{'vector_quantize_pytorch', 'ral_gym.tokenizers.vqvae'}"
    script = f"import sys, ral_gym.tokenizers.code_set; assert not {modules} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
