"""Image completion: what is visible decides, what is hidden does not, and equal seeds draw equally."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ral_gym.config import DataConfig
from ral_gym.errors import ConfigError, DataError
from ral_gym.presets import SMOKE
from ral_gym.priors.base import Prior
from ral_gym.priors.sampler import CachedSampler
from ral_gym.priors.two_level import TwoLevelSampler, join_priors
from ral_gym.stages.completion import (
    HIDDEN,
    complete,
    continue_codes,
    read_image,
    save_completion,
    seeded_uniforms,
    visible_code_rows,
)
from ral_gym.stages.levels import prior_of
from ral_gym.tokenizers.base import tokenizer_of
from ral_gym.tokenizers.code_set import decode_codes
from ral_gym.tokenizers.vqvae import VQVAE

ONE = SMOKE
TWO = dataclasses.replace(SMOKE, vqvae=dataclasses.replace(SMOKE.vqvae, layers=2, levels=2), bottom=SMOKE.prior)


@pytest.fixture(params=[ONE, TWO], ids=["one level", "two levels"])
def models(request: Any) -> tuple[VQVAE, dict[str, Prior]]:
    """An untrained VQ-VAE of 32 x 32 grey images, 4 x 4 (top) codes, and two generators."""
    config = request.param
    vqvae = tokenizer_of(config, 32, 1)
    with torch.no_grad():
        vqvae.train()(torch.rand(64, 1, 32, 32) * 2 - 1)  # k-means
        for weights in vqvae.decoder.parameters():
            weights *= 2
    levels = range(config.vqvae.levels)
    priors = {
        name: join_priors([prior_of(config, vqvae.grid, level).eval() for level in levels]) for name in ("MLE", "RAL")
    }
    return vqvae.eval(), priors


def photo(seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (1, 32, 32), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def test_what_is_hidden_does_not_matter(models) -> None:
    vqvae, priors = models
    one, other = photo(0), photo(0)
    other[:, 16:] = photo(1)[:, 16:]
    first, second = (complete(vqvae, priors, image, 0.5, 3) for image in (one, other))
    assert first.rows == 2
    for name in priors:
        assert torch.equal(first.completed[name], second.completed[name])
    other[:, :16] = photo(1)[:, :16]
    third = complete(vqvae, priors, other, 0.5, 3)
    assert not torch.equal(first.completed["MLE"], third.completed["MLE"])
    assert torch.equal(first.original, one) and torch.equal(first.visible[:, :16], one[:, :16])
    assert (first.visible[:, 16:] == HIDDEN).all()


def test_the_visible_codes_are_kept_and_the_others_drawn(models) -> None:
    vqvae, priors = models
    grid = vqvae.grid
    whole = torch.randint(16, (5, grid.n_codes))
    given, uniforms = grid.crop(whole, 3), seeded_uniforms(0, 5, grid.n_codes)
    drawn = continue_codes(priors["MLE"], given, uniforms)
    assert torch.equal(grid.crop(drawn, 3), given)
    assert drawn.shape == whole.shape and 0 <= int(drawn.min()) <= int(drawn.max()) < 16
    rest = torch.from_numpy(grid.mask(3, 4))
    assert len(drawn[:, rest].unique()) > 5


def test_every_code_is_drawn_as_a_full_pass_would(models) -> None:
    vqvae, priors = models
    grid, prior = vqvae.grid, priors["MLE"]
    uniforms = seeded_uniforms(3, 4, grid.n_codes)
    drawn = continue_codes(prior, grid.crop(torch.randint(16, (4, grid.n_codes)), 1), uniforms, temperature=0.8)
    with torch.no_grad():
        cumulative = (prior(drawn) / 0.8).softmax(-1).cumsum(-1)  # (n, T, K)
    expected = torch.searchsorted(cumulative, uniforms[..., None])[..., 0].clamp(max=15)
    positions = torch.from_numpy(grid.mask(1, 4))
    assert (drawn == expected)[:, positions].float().mean() > 0.99


def test_seeds_do_not_depend_on_how_many_there_are(models) -> None:
    vqvae, priors = models
    many = complete(vqvae, priors, photo(), 0.5, 5, seed=2).completed
    few = complete(vqvae, priors, photo(), 0.5, 2, seed=4).completed
    assert torch.equal(many["RAL"][2:4], few["RAL"])
    assert len({image.numpy().tobytes() for image in many["RAL"]}) == 5
    assert not torch.equal(many["MLE"], many["RAL"])


def test_the_samplers_agree_with_continuing_nothing_given() -> None:
    # The same uniforms from the first row on: completion is sampling with a start.
    vqvae = tokenizer_of(TWO, 32, 1)
    prior = join_priors([prior_of(TWO, vqvae.grid, level).eval() for level in range(2)])
    uniforms = seeded_uniforms(0, 3, vqvae.grid.n_codes)
    whole = TwoLevelSampler(prior).sample(3, uniforms=uniforms)[0]  # type: ignore[arg-type]
    assert torch.equal(continue_codes(prior, vqvae.grid.crop(whole, 2), uniforms), whole)
    single = prior_of(ONE, tokenizer_of(ONE, 32, 1).grid).eval()
    uniforms = uniforms[:, :16]
    whole = CachedSampler(single).sample(3, uniforms=uniforms)[0]
    assert torch.equal(continue_codes(single, whole[:, :8], uniforms), whole)


@pytest.mark.parametrize(
    ("share", "height", "rows"), [(0.5, 8, 4), (0.01, 8, 1), (0.99, 8, 7), (0.31, 8, 2), (0.32, 8, 3), (0.5, 3, 2)]
)
def test_a_share_becomes_whole_rows(share, height, rows) -> None:
    assert visible_code_rows(share, height) == rows


@pytest.mark.parametrize("share", [0, 1, -0.5, 1.5, float("nan")])
def test_a_share_outside_0_and_1_is_refused(models, share) -> None:
    vqvae, priors = models
    with pytest.raises(ConfigError, match=r"visible rows .*: give a share above 0 and below 1"):
        complete(vqvae, priors, photo(), share, 1)


def test_other_arguments_out_of_range_are_refused(models) -> None:
    vqvae, priors = models
    with pytest.raises(ConfigError, match="0 completions"):
        complete(vqvae, priors, photo(), 0.5, 0)
    with pytest.raises(ConfigError, match=r"temperature 0\.0"):
        complete(vqvae, priors, photo(), 0.5, 1, temperature=0.0)
    with pytest.raises(ConfigError, match=r"shape \(1, 16, 16\): it must be \(1, 32, 32\)"):
        complete(vqvae, priors, photo()[:, :16, :16], 0.5, 1)
    with pytest.raises(ConfigError, match="one row of codes"):
        visible_code_rows(0.5, 1)


# Files --------------------------------------------------------------------------------------------------------------


def write(path: Path, width: int, height: int, mode: str = "RGB") -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.mark.parametrize(
    ("size", "mode", "data", "said"),
    [
        ((32, 32), "L", DataConfig(), ""),
        ((32, 32), "RGB", DataConfig(), "has 32x32 pixels: made grey"),
        ((64, 64), "L", DataConfig(), "has 64x64 pixels: resized to 32x32"),
        ((16, 16), "L", DataConfig(), "has 16x16 pixels: resized to 32x32"),
        ((60, 40), "RGB", DataConfig(), "has 60x40 pixels: its central 40x40 resized to 32x32, made grey"),
        ((178, 218), "L", DataConfig(source="celeba:/x"), "its central 148x148 resized to 32x32"),
        ((100, 90), "L", DataConfig(source="celeba:/x"), "its central 90x90 resized to 32x32"),
        ((100, 90), "L", DataConfig(crop=50), "its central 50x50 resized to 32x32"),
    ],
)
def test_what_is_done_to_an_image_is_said(tmp_path, size, mode, data, said) -> None:
    path = write(tmp_path / "a.png", *size, mode)
    image, words = read_image(path, tokenizer_of(ONE, 32, 1), data)
    assert image.shape == (1, 32, 32) and image.dtype == torch.uint8
    assert words.endswith(said) and bool(words) == bool(said)
    colour, words = read_image(path, tokenizer_of(ONE, 32, 3), data)
    assert colour.shape == (3, 32, 32) and "grey" not in words


def test_no_image_is_refused(tmp_path) -> None:
    vqvae = tokenizer_of(ONE, 32, 1)
    with pytest.raises(DataError, match=r"no\.png does not exist"):
        read_image(tmp_path / "no.png", vqvae, DataConfig())
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(DataError, match=r"text\.png cannot be read as an image"):
        read_image(tmp_path / "text.png", vqvae, DataConfig())
    with pytest.raises(DataError, match="cannot be read"):
        read_image(tmp_path, vqvae, DataConfig())


def test_the_picture_shows_all_of_it(models, tmp_path) -> None:
    vqvae, priors = models
    completion = complete(vqvae, priors, photo(), 0.5, 3)
    path = tmp_path / "out" / "completion.png"
    save_completion(path, completion, title="A title", caption="A caption")
    picture = np.asarray(Image.open(path).convert("L"))
    for image in (completion.original, completion.visible, *completion.completed["MLE"], *completion.completed["RAL"]):
        large = image[0].numpy().repeat(4, axis=0).repeat(4, axis=1)  # 32 pixels are shown as 128
        corners = np.argwhere(picture[: picture.shape[0] - 127, : picture.shape[1] - 127] == large[0, 0])
        assert any(np.array_equal(picture[y : y + 128, x : x + 128], large) for y, x in corners)
    assert decode_codes(vqvae, torch.zeros(1, vqvae.grid.n_codes)).shape == (1, 1, 32, 32)
