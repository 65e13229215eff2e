"""Image <-> codes: VQGAN (Esser et al., 2021) and LlamaGen's VQ-16 and VQ-8, which are the same network.

"Taming Transformers for High-Resolution Image Synthesis", https://arxiv.org/abs/2012.09841, and "Autoregressive Model
Beats Diffusion", https://arxiv.org/abs/2406.06525. Residual blocks with group norm and swish, a resolution halved per
level, attention over all positions at the lowest resolution and in the middle. Parameters are named as in
taming-transformers, so that its files load as they are.

| model | `multipliers` | K | `codebook_dim` | `codebook_l2_norm` |
|---|---|--:|--:|---|
| taming f16 | 1,1,2,2,4 | 1024 or 16384 | 256 | False |
| LlamaGen VQ-16 | 1,1,2,2,4 | 16384 | 8 | True |
| LlamaGen VQ-8 | 1,2,2,4 | 16384 | 8 | True |

`training_loss` is the reconstruction (squared error, as LlamaGen's; taming's is absolute) and the codebook's part of
the papers' loss. Stage 1 adds the perceptual and the adversarial part (`ral_gym.stages.image_losses`). A code vector
moves only when a feature chooses it: codes that nobody chooses are not restarted, unlike the VQ-VAE's (`code_usage` in
the log shows it).

Group norm and attention look at the whole image: every row of a short image differs from the whole image's, not only
those at its lower edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ral_gym.errors import ConfigError
from ral_gym.grid import CodeGrid
from ral_gym.tokenizers.quantiser import check_codes, nearest, vectors_at

NORM_EPS = 1e-6


class ResidualBlock(nn.Module):
    """x + 3x3(swish(norm(3x3(swish(norm(x)))))); a 1x1 convolution brings x to another width.

    Args:
        width: channels of the input.
        out: channels of the output.
        groups: of the group norms.
    """

    def __init__(self, width: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width, NORM_EPS)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out, NORM_EPS)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(width, out, 1) if width != out else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) -> (B, out, h, w)."""
        change = self.conv1(F.silu(self.norm1(x)))  # (B, out, h, w)
        change = self.conv2(F.silu(self.norm2(change)))
        return change + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class Attention(nn.Module):
    """x + the output of one attention head over all positions."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, NORM_EPS)
        self.q, self.k, self.v = (nn.Conv2d(width, width, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same."""
        normed = self.norm(x)
        queries, keys, values = (layer(normed).flatten(2).mT for layer in (self.q, self.k, self.v))  # (B, h w, C)
        attended = F.scaled_dot_product_attention(queries[:, None], keys[:, None], values[:, None])[:, 0]  # (B, h w, C)
        return x + self.proj_out(attended.mT.unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Halves the resolution; the strided filter sees a row and a column of zeros at the lower right edge only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h / 2, w / 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2 h, 2 w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, and the step to the next one.

    Args:
        widths: channels of the input, and of every block's output.
        groups: of the group norms.
        attention: attend to all positions after every block.
    """

    def __init__(self, widths: Sequence[int], groups: int, attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(width, out, groups) for width, out in pairwise(widths))
        self.attn = nn.ModuleList(Attention(width, groups) for width in widths[1:] if attention)
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h', w')."""
        for number, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[number](x)
        step = self.downsample or self.upsample
        return x if step is None else step(x)


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(width, width, groups)
        self.attn_1 = Attention(width, groups)
        self.block_2 = ResidualBlock(width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Images -> features at the lowest resolution.

    Args:
        channels: of the images.
        widths: channels per level, the highest resolution first.
        blocks: residual blocks per level.
        z_channels: channels of the features.
        groups: of the group norms.
    """

    def __init__(self, channels: int, widths: Sequence[int], blocks: int, z_channels: int, groups: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        lowest, before = len(widths) - 1, (widths[0], *widths[:-1])
        self.down = nn.ModuleList(
            Level([before[i], *[widths[i]] * blocks], groups, attention=i == lowest) for i in range(len(widths))
        )
        for level, width in zip(self.down[:-1], widths[:-1], strict=True):
            level.downsample = Downsample(width)
        self.mid = Middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, z_channels, h / 2**n, w / 2**n)."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Features at the lowest resolution -> images; see `Encoder`. `up[0]` has the highest resolution."""

    def __init__(self, channels: int, widths: Sequence[int], blocks: int, z_channels: int, groups: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        lowest, before = len(widths) - 1, (*widths[1:], widths[-1])
        self.up = nn.ModuleList(
            Level([before[i], *[widths[i]] * (blocks + 1)], groups, attention=i == lowest) for i in range(len(widths))
        )
        for level, width in zip(self.up[1:], widths[1:], strict=True):
            level.upsample = Upsample(width)
        self.norm_out = nn.GroupNorm(groups, widths[0], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, z_channels, h, w) -> (B, channels, 2**n h, 2**n w)."""
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Codebook(nn.Module):
    """The code vectors; they move by gradients."""

    def __init__(self, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)


class VQGAN(nn.Module):
    """One level of discrete codes for square images.

    Args:
        image_size: side S of the images; divisible by ``2**(len(multipliers) - 1)``.
        channels: 1 (grey) or 3.
        codebook_size: K.
        codebook_dim: dimension D of a code vector.
        hidden_units: channels at the highest resolution, before its multiplier.
        multipliers: what `hidden_units` is multiplied by at every resolution, the highest first, such as
            ``"1,1,2,2,4"`` or (1, 1, 2, 2, 4).
        residual_blocks: residual blocks per resolution of the encoder; the decoder has one more.
        z_channels: channels of the encoder's output, before it is brought to D.
        beta: weight of the commitment loss.
        codebook_l2_norm: scale features and code vectors to length 1 wherever they are used.
        norm_groups: groups of the group norms; divides every resolution's channels.

    Attributes:
        config: the arguments above.

    Raises:
        ConfigError: a size is below 1, the image side does not fit the resolutions, or the channels the groups.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        *,
        codebook_size: int = 16384,
        codebook_dim: int = 8,
        hidden_units: int = 128,
        multipliers: str | Sequence[int] = "1,1,2,2,4",
        residual_blocks: int = 2,
        z_channels: int = 256,
        beta: float = 0.25,
        codebook_l2_norm: bool = False,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        factors = _factors(multipliers)
        widths = [hidden_units * factor for factor in factors]
        sizes = {"codebook_dim": codebook_dim, "hidden_units": hidden_units, "residual_blocks": residual_blocks}
        _check_sizes({**sizes, "z_channels": z_channels, "norm_groups": norm_groups}, widths, norm_groups)
        shrinks = 2 ** (len(factors) - 1)
        if image_size % shrinks:
            raise ConfigError(
                f"image_size {image_size} does not fit the {len(factors)} multipliers {_text(factors)}: it must be a "
                f"multiple of {shrinks}; change data.image_size or multipliers in vqvae.options"
            )
        if not isinstance(codebook_l2_norm, bool):
            raise ConfigError(f"codebook_l2_norm is {codebook_l2_norm!r}: give True or False")
        self.config: dict[str, Any] = {"image_size": image_size, "channels": channels, "codebook_size": codebook_size}
        self.config |= {**sizes, "multipliers": _text(factors), "z_channels": z_channels, "beta": beta}
        self.config |= {"codebook_l2_norm": codebook_l2_norm, "norm_groups": norm_groups}
        self.image_size, self.channels = image_size, channels
        self.beta, self.codebook_l2_norm = beta, codebook_l2_norm
        self.grid = CodeGrid(image_size // shrinks, image_size // shrinks, codebook_size)
        self.encoder = Encoder(channels, widths, residual_blocks, z_channels, norm_groups)
        self.decoder = Decoder(channels, widths, residual_blocks, z_channels, norm_groups)
        self.quantize = Codebook(codebook_size, codebook_dim)
        self.quant_conv = nn.Conv2d(z_channels, codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(codebook_dim, z_channels, 1)

    @property
    def num_features(self) -> int:
        """Channels of `encode_features`."""
        return int(self.config["codebook_dim"])

    @property
    def codebook(self) -> Tensor:
        """The code vectors as they are used, (K, D): of length 1 with `codebook_l2_norm`."""
        vectors = self.quantize.embedding.weight
        return F.normalize(vectors, dim=1) if self.codebook_l2_norm else vectors

    def encode_features(self, images: Tensor) -> Tensor:
        """Encoder output before quantisation: images (B, C, S, S) in [-1, 1] -> (B, D, H, W)."""
        features = self.quant_conv(self.encoder(images))
        return F.normalize(features, dim=1) if self.codebook_l2_norm else features

    def training_loss(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error + codebook loss + beta x commitment loss of images (B, C, S, S), and what is logged.

        The codebook loss moves code vectors to the features that chose them, the commitment loss features to their
        code vectors (van den Oord et al. 2017, eq. 3); gradients pass straight through the choice.
        """
        features = self.encode_features(images).float()  # (B, D, H, W)
        book = self.codebook
        codes = nearest(features.detach(), book.detach())  # (B, T)
        vectors = vectors_at(codes, book, self.grid.width).float()  # (B, D, H, W)
        codebook_loss = F.mse_loss(vectors, features.detach())
        commitment = F.mse_loss(features, vectors.detach())
        reconstruction = self.paint(features + (vectors - features).detach()).float()
        error = F.mse_loss(reconstruction, images)
        logged = {"reconstruction_error": error.detach(), "codes": codes, "reconstruction": reconstruction}
        return error + codebook_loss + self.beta * commitment, logged

    @torch.no_grad()
    def encode(self, images: Tensor) -> list[Tensor]:
        """Images (B, C, S, S) in [-1, 1], or their first rows alone, -> [(B, h * w) int64] in raster order."""
        return [nearest(self.encode_features(images), self.codebook)]

    def decode(self, codes: Tensor) -> Tensor:
        """Codes -> images.

        Args:
            codes: (B, r * W) int64 in 0..K-1, r (top) rows, 1 <= r <= H.

        Returns:
            (B, C, r * S / H, S) in [-1, 1].

        Raises:
            ConfigError: the number of codes is not that of 1..H rows, or a code lies outside 0..K-1.
        """
        (codes,) = self.grid.split(codes)
        check_codes([codes], self.grid.codebook_size)
        return self.paint(vectors_at(codes, self.codebook, self.grid.width)).clamp(-1, 1)

    def paint(self, vectors: Tensor) -> Tensor:
        """Maps of code vectors (B, D, h, w) -> images, not clamped to [-1, 1]."""
        return self.decoder(self.post_quant_conv(vectors))


def _factors(multipliers: str | Sequence[int]) -> list[int]:
    """Numbers from a text or as they are; refuses what is no list of counts."""
    words = multipliers.split(",") if isinstance(multipliers, str) else [str(factor) for factor in multipliers]
    if not words or not all(word.strip().isdecimal() and int(word) for word in words):
        raise ConfigError(f"multipliers {multipliers!r}: give numbers of 1 or more, such as 1,1,2,2,4")
    return [int(word) for word in words]


def _text(factors: Sequence[int]) -> str:
    return ",".join(map(str, factors))


def _check_sizes(sizes: dict[str, int], widths: Sequence[int], groups: int) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} is {value!r}: give a whole number of 1 or more")
    odd = [width for width in widths if width % groups]
    if odd:
        raise ConfigError(
            f"{odd[0]} channels do not fit {groups} norm_groups: hidden_units times each of the multipliers must be a "
            f"multiple of {groups}; change vqvae.hidden_units, or norm_groups in vqvae.options"
        )
