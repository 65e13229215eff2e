"""Image <-> codes on two levels: VQ-VAE-2 (Razavi et al. 2019; the supplement's Tables 8c to 10c).

The top grid, half the bottom's side, is quantised first and holds what is global; its code vectors are decoded back to
the bottom's size and joined to the bottom features before these are quantised, so that the bottom codes need only hold
what the top ones leave open. The image is decoded from both. Sizes and strides are Razavi et al.'s, blocks are those of
`ral_gym.tokenizers.vqvae`: the tables count the strided convolutions of the bottom level, and the top level has one
more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vector_quantize_pytorch import VectorQuantize

from ral_gym.errors import ConfigError
from ral_gym.tokenizers.quantiser import nearest, quantise, vectors_at
from ral_gym.tokenizers.vqvae import VQVAE


class VQVAE2(VQVAE):
    """Two levels of discrete codes for square images; arguments and interface are `VQVAE`'s.

    `layers` counts the strided convolutions before the bottom grid, so the bottom grid's side is
    ``image_size / 2**layers`` and the top's half of that. Both levels have K codes of `codebook_dim` numbers, each in a
    codebook of its own.

    Examples:
        >>> model = VQVAE2(32, 3, codebook_size=16, hidden_units=8, residual_units=4, layers=2)
        >>> model.grid.shapes
        ((4, 4), (8, 8))
        >>> [tuple(codes.shape) for codes in model.encode(torch.zeros(5, 3, 32, 32))]
        [(5, 16), (5, 64)]
    """

    levels = 2

    def _build(self) -> None:
        hidden_units, codebook_dim = self.config["hidden_units"], self.config["codebook_dim"]
        filter_size = self.config["decoder_filter_size"]
        self.bottom_encoder = self._make_encoder(self.channels, self.config["layers"])
        self.top_encoder = self._make_encoder(hidden_units, 1)
        self.top_to_codebook = nn.Conv2d(hidden_units, codebook_dim, 1)
        self.top_quantiser = self._make_quantiser()
        self.top_decoder = self._make_decoder(codebook_dim, codebook_dim, 1)
        self.bottom_to_codebook = nn.Conv2d(hidden_units + codebook_dim, codebook_dim, 1)
        self.bottom_quantiser = self._make_quantiser()
        padding = filter_size // 2 - 1
        self.upsample_top = nn.ConvTranspose2d(codebook_dim, codebook_dim, filter_size, stride=2, padding=padding)
        self.decoder = self._make_decoder(2 * codebook_dim, self.channels, self.config["layers"])

    @property
    def quantisers(self) -> list[VectorQuantize]:
        """The quantisers of the top and the bottom level."""
        return [self.top_quantiser, self.bottom_quantiser]

    def encode_top(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, S, S) -> bottom features (B, hidden_units, 2H, 2W), top ones (B, codebook_dim, H, W)."""
        features = self.bottom_encoder(images)  # (B, hidden_units, 2H, 2W)
        return features, self.top_to_codebook(self.top_encoder(features))

    def encode_bottom(self, features: Tensor, top: Tensor) -> Tensor:
        """What the bottom codebook quantises.

        Args:
            features: (B, hidden_units, 2H, 2W) of `encode_top`.
            top: (B, codebook_dim, H, W), the top's code vectors.

        Returns:
            (B, codebook_dim, 2H, 2W).
        """
        return self.bottom_to_codebook(torch.cat([features, self.top_decoder(top)], 1))

    def encode_features(self, images: Tensor) -> Tensor:
        """Both levels before quantisation, the bottom averaged over 2x2 positions: (B, 2 * codebook_dim, H, W)."""
        features, top = self.encode_top(images)
        vectors = vectors_at(nearest(top, self.codebooks[0]), self.codebooks[0], self.width)  # (B, D, H, W)
        bottom = self.encode_bottom(features, vectors)  # (B, D, 2H, 2W)
        return torch.cat([top, F.avg_pool2d(bottom, 2)], 1)  # (B, 2D, H, W)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One training pass over both levels; arguments and results are `VQVAE.forward`'s.

        The commitment loss is the sum of the levels'.
        """
        features, top = self.encode_top(images)
        top_vectors, top_codes, top_loss = quantise(self.top_quantiser, top)
        bottom = self.encode_bottom(features, top_vectors)
        bottom_vectors, bottom_codes, bottom_loss = quantise(self.bottom_quantiser, bottom)
        codes = torch.cat([top_codes, bottom_codes], 1)  # (B, T)
        return self.paint([top_vectors, bottom_vectors]), codes, top_loss + bottom_loss

    @torch.no_grad()
    def encode(self, images: Tensor) -> list[Tensor]:
        """Images in [-1, 1] -> [top, bottom] codes, (B, r * W) and (B, 4 * r * W) int64; see `VQVAE.encode`."""
        top_book, bottom_book = self.codebooks
        features, top = self.encode_top(images)
        top_codes = nearest(top, top_book)  # (B, H W)
        bottom = self.encode_bottom(features, vectors_at(top_codes, top_book, self.width))
        return [top_codes, nearest(bottom, bottom_book)]

    def paint(self, maps: Sequence[Tensor]) -> Tensor:
        """Top and bottom code vectors, (B, codebook_dim, r, W) and (B, codebook_dim, 2r, 2W) -> images."""
        top, bottom = maps
        return self.decoder(torch.cat([self.upsample_top(top), bottom], 1))


def vqvae_class(levels: int) -> type[VQVAE]:
    """The class of a model of 1 or 2 levels, for `build_vqvae` and `load_module`.

    Raises:
        ConfigError: another number of levels.
    """
    if levels not in (1, 2):
        raise ConfigError(f"vqvae.levels is {levels}: give 1 or 2")
    return VQVAE2 if levels == 2 else VQVAE
