"""Image <-> codes: the VQ-VAE (van den Oord et al. 2017; the supplement's Tables 4c to 7b).

Strided convolutions bring an image down to a grid of vectors, each is replaced by its nearest code vector, and
transposed convolutions paint the image back. The codebook is `vector-quantize-pytorch`'s: k-means start, exponential
moving average, restart of dead codes. The paper does not state the number of residual blocks, the decay or the
learning rate; VQ-VAE's and VQ-VAE-2's values stand in (`VQVAEConfig`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import VectorQuantize

from ral_gym.errors import ConfigError


class ResidualBlock(nn.Module):
    """``x + conv1x1(relu(conv3x3(relu(x))))``, `residual_units` channels in the middle."""

    def __init__(self, hidden_units: int, residual_units: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(hidden_units, residual_units, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(residual_units, hidden_units, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, hidden_units, H, W) in and out."""
        return x + self.body(x)


class VQVAE(nn.Module):
    """One level of discrete codes for square images.

    Args:
        image_size: side S of the images; divisible by ``2**layers``.
        channels: 1 (grey) or 3.
        codebook_size: K.
        codebook_dim: dimension of a code vector.
        hidden_units: channels of encoder and decoder.
        residual_units: channels inside a residual block.
        residual_blocks: residual blocks on each side of the codebook.
        layers: strided convolutions; the code grid's side is ``image_size / 2**layers``.
        beta: weight of the commitment loss.
        encoder_filter_size: kernel of the strided convolutions (odd).
        decoder_filter_size: kernel of the transposed convolutions (even, so that the size doubles exactly).
        decay: decay of the codebook's moving average.
        threshold_ema_dead_code: codes used less often than this per batch (a moving average) are restarted.

    Raises:
        ConfigError: the image side does not fit the layers, or a filter size has the wrong parity.
    """

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
        if layers < 1 or image_size % 2**layers:
            raise ConfigError(
                f"image_size {image_size} does not fit {layers} strided layers: it must be a multiple of "
                f"{2 ** max(layers, 1)}; change data.image_size or vqvae.layers"
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
        self.height = self.width = image_size // 2**layers
        self.encoder = _encoder(channels, hidden_units, residual_units, residual_blocks, layers, encoder_filter_size)
        self.to_codebook = nn.Conv2d(hidden_units, codebook_dim, 1)
        self.quantiser = VectorQuantize(
            dim=codebook_dim,
            codebook_size=codebook_size,
            decay=decay,
            commitment_weight=beta,
            kmeans_init=True,
            threshold_ema_dead_code=threshold_ema_dead_code,
            rotation_trick=False,
        )
        self.decoder = _decoder(
            channels, codebook_dim, hidden_units, residual_units, residual_blocks, layers, decoder_filter_size
        )

    def encode_features(self, images: Tensor) -> Tensor:
        """Encoder output before quantisation: images (B, C, S, S) in [-1, 1] -> (B, codebook_dim, H, W)."""
        return self.to_codebook(self.encoder(images))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One training pass, straight-through gradients, codebook statistics updated in training mode.

        Args:
            images: (B, C, S, S) float in [-1, 1].

        Returns:
            reconstruction (B, C, S, S), codes (B, T) int64, commitment loss (scalar, beta included).
        """
        z = self.encode_features(images)  # (B, D, H, W)
        quantised, codes, commitment = self.quantiser(z.flatten(2).transpose(1, 2))  # (B, T, D), (B, T)
        grid = quantised.transpose(1, 2).reshape(z.shape)  # (B, D, H, W)
        return self.decoder(grid), codes, commitment.sum()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, S, S) in [-1, 1] -> codes (B, T) int64 in raster order; changes no statistics."""
        z = self.encode_features(images).flatten(2).transpose(1, 2)  # (B, T, D)
        vectors = self.codebook  # (K, D)
        return torch.cdist(z.float(), vectors.float()).argmin(-1)  # (B, T)

    @property
    def codebook(self) -> Tensor:
        """The code vectors, (K, codebook_dim)."""
        return self.quantiser.codebook

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, r * W) int64 for r rows, 1 <= r <= H -> images (B, C, r * S / H, S) in [-1, 1].

        Raises:
            ConfigError: the number of codes is not a whole number of rows, or a code lies outside 0..K-1.
        """
        rows, rest = divmod(codes.shape[1], self.width)
        if rest or not 1 <= rows <= self.height:
            raise ConfigError(
                f"cannot decode {codes.shape[1]} codes per image: give a multiple of the row length {self.width}, "
                f"at most {self.height * self.width}"
            )
        lowest, highest = map(int, codes.aminmax()) if codes.numel() else (0, 0)
        if lowest < 0 or highest >= self.codebook_size:
            raise ConfigError(f"codes in {lowest}..{highest}: they must lie in 0..{self.codebook_size - 1}")
        grid = self.codebook[codes].transpose(1, 2).reshape(len(codes), -1, rows, self.width)  # (B, D, r, W)
        return self.decoder(grid).clamp(-1, 1)


def _encoder(
    channels: int, hidden_units: int, residual_units: int, residual_blocks: int, layers: int, filter_size: int
) -> nn.Sequential:
    """`layers` strided convolutions (the first ones narrower), a 3x3 convolution, the residual blocks."""
    body: list[nn.Module] = []
    width = channels
    for layer in range(layers):
        out = hidden_units // 2 if layer == 0 and layers > 1 else hidden_units
        body += [nn.Conv2d(width, out, filter_size, stride=2, padding=filter_size // 2), nn.ReLU()]
        width = out
    body += [nn.Conv2d(width, hidden_units, 3, padding=1)]
    body += [ResidualBlock(hidden_units, residual_units) for _ in range(residual_blocks)]
    return nn.Sequential(*body, nn.ReLU())


def _decoder(
    channels: int,
    codebook_dim: int,
    hidden_units: int,
    residual_units: int,
    residual_blocks: int,
    layers: int,
    filter_size: int,
) -> nn.Sequential:
    """A 3x3 convolution, the residual blocks, `layers` transposed convolutions that double the side."""
    body: list[nn.Module] = [nn.Conv2d(codebook_dim, hidden_units, 3, padding=1)]
    body += [ResidualBlock(hidden_units, residual_units) for _ in range(residual_blocks)]
    width = hidden_units
    for layer in range(layers):
        last = layer == layers - 1
        out = channels if last else (hidden_units // 2 if layer == layers - 2 else hidden_units)
        body += [nn.ReLU(), nn.ConvTranspose2d(width, out, filter_size, stride=2, padding=filter_size // 2 - 1)]
        width = out
    return nn.Sequential(*body)
