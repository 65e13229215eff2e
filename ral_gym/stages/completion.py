"""Image completion (Section 5.5, Figure 7): hide the lower rows of an image and let a generator draw them.

Only the visible rows are encoded, as an image that ends there, so that no code depends on hidden pixels. A generator
then continues the codes, once per seed. The paper instead encodes the whole image and "zeroes out" the hidden codes, so
that the last visible codes have seen some of the hidden pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import UnidentifiedImageError
from torch import Tensor

from ral_gym.config import DataConfig
from ral_gym.data.files import Decoding, to_square
from ral_gym.data.images import crop_of, limits_of, to_float
from ral_gym.data.opening import open_image, read_file
from ral_gym.errors import ConfigError, DataError
from ral_gym.pictures import _array, _Panel, _scale, _tile, _write_panels
from ral_gym.priors.base import Prior
from ral_gym.priors.guidance import PLAIN, Sampling
from ral_gym.priors.sampler import make_sampler
from ral_gym.tokenizers.base import Tokenizer, device_of
from ral_gym.tokenizers.code_set import decode_codes

HIDDEN = 127
"""Grey value of hidden pixels in the picture."""
ROWS = 2
"""Rows in which a generator's completions are laid out."""


@dataclass(frozen=True)
class Completion:
    """An image, its visible part, and the generators' completions of that part; all uint8."""

    original: Tensor
    """(C, S, S)."""
    visible: Tensor
    """(C, S, S), grey where hidden."""
    rows: int
    """Visible rows of the (top) code grid."""
    completed: dict[str, Tensor]
    """Generator -> (n, C, S, S), decoded from visible and drawn codes, one per seed."""


def read_image(path: Path, vqvae: Tokenizer, data: DataConfig) -> tuple[Tensor, str]:
    """One image, cropped and resized like the run's images.

    Args:
        path: a png, jpg, webp, bmp, pgm, ppm, tif or gif file.
        vqvae: determines size and channels.
        data: determines the crop.

    Returns:
        (C, S, S) uint8, and a description of the changes, "" if there are none.

    Raises:
        DataError: it is missing or not an image.
    """
    crop, limits = crop_of(data), limits_of(data)
    grey = vqvae.channels == 1
    try:
        with open_image(read_file(path, limits), limits) as image:
            width, height = image.size
            if crop is not None and min(width, height) < crop:
                crop = None  # too small for the run's crop: use its shorter side
            coloured = image.mode not in ("1", "L", "LA", "I", "F") and not image.mode.startswith("I;16")
            square = to_square(image, Decoding("", crop, vqvae.image_size, grey, limits=limits))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: give an image file") from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"{path} cannot be read as an image: give a png, jpg, webp, bmp, pgm, ppm, tif or gif"
        ) from error
    except Exception as error:  # damaged files make Pillow's readers raise nearly anything
        raise DataError(f"{path} cannot be read as an image ({error}): give a png or jpg file, for example") from error
    done, side = [], crop or min(width, height)
    if (width, height, side) != (vqvae.image_size,) * 3:
        cut = "" if width == height == side else f"its central {side}x{side} "
        done.append(f"{cut}resized to {vqvae.image_size}x{vqvae.image_size}")
    if grey and coloured:
        done.append("made grey")
    said = f"{path.name} has {width}x{height} pixels: {', '.join(done)}" if done else ""
    return torch.from_numpy(square.copy()), said


def visible_code_rows(share: float, height: int) -> int:
    """How many of `height` code rows a visible share of the image is, at least 1 and at most height - 1.

    Raises:
        ConfigError: the share is not between 0 and 1, or the grid has only one row of codes.
    """
    if not 0 < share < 1:
        raise ConfigError(f"visible rows are {share}: give a share above 0 and below 1, such as 0.5")
    if height < 2:
        raise ConfigError("an image of one row of codes cannot be completed: train with fewer vqvae.layers")
    return min(max(math.floor(share * height + 0.5), 1), height - 1)


def seeded_uniforms(seed: int, n: int, length: int) -> Tensor:
    """Uniforms (n, length) for `draw`, one seed per row: seed, seed + 1, ..."""
    rows = [torch.rand(length, generator=torch.Generator().manual_seed(seed + number)) for number in range(n)]
    return torch.stack(rows)


def continue_codes(
    prior: Prior,
    given: Tensor,
    uniforms: Tensor,
    temperature: float = 1.0,
    sampling: Sampling = PLAIN,
    labels: Tensor | None = None,
) -> Tensor:
    """Draw the rows that are missing, with the prior's cached sampler.

    Args:
        prior: a generator of one level or two.
        given: (n, codes_of(r)) int64, the sequences of each image's first r (top) rows, 1 <= r < H.
        uniforms: (n, T) in [0, 1), one for each code.
        temperature: divides the logits.
        sampling: guidance, top-k and top-p.
        labels: (n,) int64, the images' classes, for a generator that has some; None: balanced.

    Returns:
        (n, T) int64, including the given codes.
    """
    grid, device = prior.grid, next(prior.parameters()).device
    rows = grid.rows_of(given.shape[1])
    codes = torch.full((len(given), grid.n_codes), grid.not_drawn, device=device)  # (n, T)
    kept = torch.from_numpy(~grid.mask(rows, grid.height)[: grid.n_codes]).to(device)  # (T,)
    codes[:, kept] = given.to(device)
    if grid.classes:
        labels = torch.arange(len(codes)) % grid.classes if labels is None else labels
        codes = grid.with_labels(codes, labels.to(device))  # (n, T + 1)
    sampler, uniforms = make_sampler(prior, sampling), uniforms.to(device)
    return sampler.sample(codes=codes, prefix_rows=rows, temperature=temperature, uniforms=uniforms)[0]


@torch.no_grad()
def complete(
    vqvae: Tokenizer,
    generators: Mapping[str, Prior],
    image: Tensor,
    visible_share: float,
    n: int,
    seed: int = 0,
    temperature: float = 1.0,
    sampling: Sampling = PLAIN,
    labels: Tensor | None = None,
) -> Completion:
    """Complete an image with every generator, n times each; equal seeds draw from the same uniforms.

    Args:
        vqvae: encodes and decodes.
        generators: name -> prior.
        image: (C, S, S) uint8.
        visible_share: share of the rows that stays visible, between 0 and 1; rounded to whole rows of codes.
        n: completions per generator.
        seed: seed of the first completion; the others use seed + 1, seed + 2, ...
        temperature: divides the logits.
        sampling: guidance, top-k and top-p.
        labels: (n,) int64, the classes that the completions are asked for, if the generators have some; None: balanced.

    Raises:
        ConfigError: the share is not between 0 and 1, n is below 1, or the temperature is not above 0.
    """
    rows = visible_code_rows(visible_share, vqvae.grid.height)
    if n < 1 or not 0 < temperature < math.inf:
        raise ConfigError(f"{n} completions at temperature {temperature}: give 1 or more, and a temperature above 0")
    if tuple(image.shape) != (vqvae.channels, vqvae.image_size, vqvae.image_size):
        raise ConfigError(
            f"an image of shape {tuple(image.shape)}: it must be "
            f"{(vqvae.channels, vqvae.image_size, vqvae.image_size)}; read it with read_image"
        )
    shown = rows * vqvae.image_size // vqvae.grid.height  # pixel rows
    device = device_of(vqvae)
    levels = vqvae.encode(to_float(image[None, :, :shown]).to(device))
    given = torch.cat(levels, 1).expand(n, -1)  # (n, codes_of(r))
    uniforms = seeded_uniforms(seed, n, vqvae.grid.n_codes)
    completed = {
        name: decode_codes(vqvae, continue_codes(prior, given, uniforms, temperature, sampling, labels))
        for name, prior in generators.items()
    }
    visible = image.clone()
    visible[:, shown:] = HIDDEN
    return Completion(image, visible, rows, completed)


def save_completion(path: Path, completion: Completion, *, title: str, caption: str) -> None:
    """Original, visible part, and each generator's completions side by side, as in Figure 7.

    Raises:
        RunError: the file cannot be written.
    """
    single = {"original": completion.original[None], "visible": completion.visible[None]}
    blocks = {label: _array(images) for label, images in (single | completion.completed).items()}
    columns = {label: math.ceil(len(images) / ROWS) for label, images in blocks.items()}
    scale = _scale(completion.original.shape[-1], sum(columns.values()))
    panels = [_Panel(label, _tile(images, columns[label], scale)) for label, images in blocks.items()]
    _write_panels(path, panels, title, caption)
