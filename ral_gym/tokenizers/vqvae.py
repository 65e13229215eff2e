"""Image <-> codes: the VQ-VAE (van den Oord et al. 2017; the supplement's Tables 4c to 7c).

Strided convolutions reduce an image to a grid of vectors, each is replaced by its nearest code vector, and transposed
convolutions decode the image. The codebook is `vector-quantize-pytorch`'s: k-means start, exponential moving average,
restart of dead codes. The paper does not state the number of residual blocks, the decay or the learning rate; those of
VQ-VAE and VQ-VAE-2 are used (`VQVAEConfig`). `ral_gym.tokenizers.vqvae2` is the model of two levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vector_quantize_pytorch import VectorQuantize

from ral_gym.errors import ConfigError
from ral_gym.grid import CodeGrid
from ral_gym.tokenizers.quantiser import Quantiser, check_codes, nearest, quantise, vectors_at
from ral_gym.tokenizers.residual import ResidualBlock, present_names


class VQVAE(nn.Module):
    """One level of discrete codes for square images.

    Args:
        image_size: side S of the images; divisible by ``2**layers`` (two levels: ``2**(layers + 1)``).
        channels: 1 (grey) or 3.
        codebook_size: K.
        codebook_dim: dimension D of a code vector.
        hidden_units: channels of encoder and decoder.
        residual_units: channels inside a residual block.
        residual_blocks: residual blocks on each side of the codebook.
        layers: strided convolutions; the (bottom) code grid's side is ``image_size / 2**layers``.
        beta: weight of the commitment loss.
        encoder_filter_size: kernel of the strided convolutions (odd).
        decoder_filter_size: kernel of the transposed convolutions (even, so that the size doubles exactly).
        decay: decay of the codebook's moving average.
        threshold_ema_dead_code: codes used less often than this per batch (a moving average) are restarted.

    Attributes:
        levels: code grids per image.
        config: the arguments above.
        height, width: rows H and columns W of the (top) code grid.

    Raises:
        ConfigError: the image side does not fit the layers, or a filter size has the wrong parity.
    """

    levels = 1
    present_names = staticmethod(present_names)
    """Maps weight names of older files to current ones, for `rebuild_module`."""

    def __init__(
        self,
        image_size: int,
        channels: int,
        *,
        codebook_size: int = 128,
        codebook_dim: int = 64,
        hidden_units: int = 128,
        residual_units: int = 64,
        residual_blocks: int = 2,
        layers: int = 3,
        beta: float = 0.25,
        encoder_filter_size: int = 3,
        decoder_filter_size: int = 4,
        decay: float = 0.99,
        threshold_ema_dead_code: int = 2,
    ) -> None:
        super().__init__()
        halvings = layers + self.levels - 1
        if layers < 1 or image_size % 2**halvings:
            more = " and one for the second level" if self.levels > 1 else ""
            raise ConfigError(
                f"image_size {image_size} does not fit {layers} strided layers{more}: it must be a multiple of "
                f"{2 ** max(halvings, 1)}; change data.image_size or vqvae.layers"
            )
        if encoder_filter_size % 2 == 0 or decoder_filter_size % 2:
            raise ConfigError(
                f"filter sizes {encoder_filter_size} (encoder) and {decoder_filter_size} (decoder): the encoder's must "
                "be odd and the decoder's even, so that every layer halves or doubles the side exactly"
            )
        self.config: dict[str, Any] = {
            "image_size": image_size,
            "channels": channels,
            "codebook_size": codebook_size,
            "codebook_dim": codebook_dim,
            "hidden_units": hidden_units,
            "residual_units": residual_units,
            "residual_blocks": residual_blocks,
            "layers": layers,
            "beta": beta,
            "encoder_filter_size": encoder_filter_size,
            "decoder_filter_size": decoder_filter_size,
            "decay": decay,
            "threshold_ema_dead_code": threshold_ema_dead_code,
        }
        self.image_size, self.channels, self.codebook_size = image_size, channels, codebook_size
        self.height = self.width = image_size // 2**halvings
        self._build()

    def _build(self) -> None:
        """Make the networks of `config`."""
        hidden_units, codebook_dim = self.config["hidden_units"], self.config["codebook_dim"]
        self.encoder = self._make_encoder(self.channels, self.config["layers"])
        self.to_codebook = nn.Conv2d(hidden_units, codebook_dim, 1)
        self.quantiser = self._make_quantiser()
        self.decoder = self._make_decoder(codebook_dim, self.channels, self.config["layers"])

    @property
    def grid(self) -> CodeGrid:
        """The shape of one image's codes."""
        return CodeGrid(self.height, self.width, self.codebook_size, self.levels)

    @property
    def num_features(self) -> int:
        """Channels of `encode_features`."""
        return self.levels * self.config["codebook_dim"]

    @property
    def quantisers(self) -> list[VectorQuantize]:
        """The quantiser of every level, top first."""
        return [self.quantiser]

    @property
    def codebooks(self) -> list[Tensor]:
        """The code vectors of every level, top first: (K, codebook_dim) each."""
        return [quantiser.codebook for quantiser in self.quantisers]

    def encode_features(self, images: Tensor) -> Tensor:
        """Encoder output before quantisation: images (B, C, S, S) in [-1, 1] -> (B, num_features, H, W)."""
        return self.to_codebook(self.encoder(images))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One training pass, straight-through gradients, codebook statistics updated in training mode.

        Args:
            images: (B, C, S, S) float in [-1, 1].

        Returns:
            reconstruction (B, C, S, S), codes (B, T) int64, commitment loss (scalar, beta included).
        """
        vectors, codes, commitment = quantise(self.quantiser, self.encode_features(images))
        return self.paint([vectors]), codes, commitment

    def training_loss(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error plus commitment loss of images (B, C, S, S), and the metrics to log."""
        reconstruction, codes, commitment = self(images)
        error = F.mse_loss(reconstruction, images)
        logged = {"reconstruction_error": error.detach(), "codes": codes, "reconstruction": reconstruction}
        return error + commitment, logged

    @torch.no_grad()
    def encode(self, images: Tensor) -> list[Tensor]:
        """Images in [-1, 1] -> the codes of every level, top first; changes no statistics.

        Args:
            images: (B, C, S, S), or their first rows alone, (B, C, r * S / H, S), encoded as if nothing lay below them.

        Returns:
            One (B, h * w) int64 per level, each in raster order; joined they are the image's sequence.
        """
        return [nearest(self.encode_features(images), self.codebooks[0])]

    def decode(self, codes: Tensor | Sequence[Tensor]) -> Tensor:
        """Codes -> images.

        Fewer rows than H give a shorter image, decoded as if nothing lay below it: its last rows differ from those of
        the whole image as far as the decoder's receptive field reaches down.

        Args:
            codes: (B, codes_of(r)) int64, the sequence of r (top) rows, 1 <= r <= H; or what `encode` returns, one
                (B, h * w) per level.

        Returns:
            (B, C, r * S / H, S) in [-1, 1].

        Raises:
            ConfigError: the number of levels or of codes is not that of 1..H rows, or a code lies outside 0..K-1.
        """
        levels = self._levels_of(codes)
        check_codes(levels, self.codebook_size)
        return self.paint(self.lookup(levels)).clamp(-1, 1)

    def _levels_of(self, codes: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """Codes of every level, top first, from a sequence or a list; raises if they do not fit the grid."""
        if isinstance(codes, Tensor):
            return self.grid.split(codes)
        found = [level.shape[-1] for level in codes]
        expected = [level.shape[-1] for level in self.grid.split(torch.cat(list(codes), -1))] if found else []
        if found != expected or not found:
            raise ConfigError(
                f"codes of {len(found)} levels with {found} codes per image: this model takes {self.levels}, top "
                f"first, with {list(self.grid.level_sizes)} for a whole image"
            )
        return list(codes)

    def lookup(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Codes (B, h * w) of every level, in range -> maps of code vectors (B, codebook_dim, h, w)."""
        parts = zip(levels, self.codebooks, self.grid.shapes, strict=True)
        return [vectors_at(codes, vectors, width) for codes, vectors, (_, width) in parts]

    def paint(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps of code vectors, one (B, codebook_dim, h, w) per level -> images, not clamped to [-1, 1]."""
        return self.decoder(maps[0])

    def _make_quantiser(self) -> Quantiser:
        return Quantiser(
            self.config["codebook_dim"],
            self.codebook_size,
            decay=self.config["decay"],
            commitment_weight=self.config["beta"],
            threshold_ema_dead_code=self.config["threshold_ema_dead_code"],
        )

    def _make_encoder(self, channels: int, layers: int) -> nn.Sequential:
        """`layers` strided convolutions (the first ones narrower), a 3x3 convolution, the residual blocks."""
        hidden_units, filter_size = self.config["hidden_units"], self.config["encoder_filter_size"]
        body: list[nn.Module] = []
        width = channels
        for layer in range(layers):
            out = hidden_units // 2 if layer == 0 and layers > 1 else hidden_units
            body += [nn.Conv2d(width, out, filter_size, stride=2, padding=filter_size // 2), nn.ReLU()]
            width = out
        body += [nn.Conv2d(width, hidden_units, 3, padding=1)]
        return nn.Sequential(*body, *self._residual_blocks(), nn.ReLU())

    def _make_decoder(self, channels: int, out_channels: int, layers: int) -> nn.Sequential:
        """A 3x3 convolution, the residual blocks, `layers` transposed convolutions that double the side."""
        hidden_units, filter_size = self.config["hidden_units"], self.config["decoder_filter_size"]
        body: list[nn.Module] = [nn.Conv2d(channels, hidden_units, 3, padding=1), *self._residual_blocks()]
        width = hidden_units
        for layer in range(layers):
            last = layer == layers - 1
            out = out_channels if last else (hidden_units // 2 if layer == layers - 2 else hidden_units)
            body += [nn.ReLU(), nn.ConvTranspose2d(width, out, filter_size, stride=2, padding=filter_size // 2 - 1)]
            width = out
        return nn.Sequential(*body)

    def _residual_blocks(self) -> list[nn.Module]:
        units = self.config["hidden_units"], self.config["residual_units"]
        return [ResidualBlock(*units) for _ in range(self.config["residual_blocks"])]
