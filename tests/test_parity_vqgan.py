"""LlamaGen's and taming's tokenizers against an independent implementation, diffusers' `VQModel`.

`VQModel` gets random weights, norms and biases included. They are written under the names of the released files (one of
LlamaGen's, or a Lightning checkpoint of taming's transformer) and read by the code of `ral-gym import`. Both networks
then see the same images. What diffusers does not have is given to it: LlamaGen's scaling to length 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ral_gym.stages.released.networks import llamagen_tokenizer, taming_tokenizer
from ral_gym.stages.released.torch_files import read_checkpoint
from ral_gym.tokenizers.vqgan import VQGAN
from tests.released_files import in_order, taming_file

pytestmark = pytest.mark.parity

TOLERANCE = 1e-4
B, K, Z = 3, 64, 256
LAYOUTS = {
    "VQ-16": {"factors": (1, 1, 2, 2, 4), "dim": 8, "unit": True},
    "VQ-8": {"factors": (1, 2, 2, 4), "dim": 8, "unit": True},
    "f16": {"factors": (1, 1, 2, 2, 4), "dim": 256, "unit": False},
}
"""Channel multipliers, D and unit-norm codes of LlamaGen's two tokenizers and of taming's, all with 32 channels."""


def vq_model(factors: tuple[int, ...], dim: int, **_: Any) -> Any:
    """Random weights everywhere: initial ones (norms 1, biases 0) would hide errors."""
    from diffusers import VQModel

    n = len(factors)
    model = VQModel(
        block_out_channels=tuple(32 * factor for factor in factors),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * (n - 1) + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (n - 1),
        latent_channels=Z,
        vq_embed_dim=dim,
        num_vq_embeddings=K,
    )
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        scale = 0.2 if weight.dim() == 1 or "quantize" in name else weight[0].numel() ** -0.5
        with torch.no_grad():
            weight.copy_(scale * torch.randn(weight.shape, generator=generator))
            if "norm" in name and name.endswith("weight"):
                weight += 1
    return model.eval()


# names ------------------------------------------------------------------------------------------------------------

IN_BLOCKS = (
    *((r"\.group_norm\.", ".norm."), (r"\.to_(q|k|v)\.", r".\1."), (r"\.to_out\.0\.", ".proj_out.")),
    *((r"\.conv_shortcut\.", ".nin_shortcut."), (r"\.conv_norm_out\.", ".norm_out.")),
)
"""diffusers' names inside a block -> both projects'."""
IN_LLAMAGEN = (
    (r"^(..coder)\.(?:down|up)_blocks\.(\d)\.resnets\.", r"\1.conv_blocks.\2.res."),
    (r"^(..coder)\.(?:down|up)_blocks\.(\d)\.attentions\.", r"\1.conv_blocks.\2.attn."),
    (r"^encoder\.down_blocks\.(\d)\.downsamplers\.0\.", r"encoder.conv_blocks.\1.downsample."),
    (r"^decoder\.up_blocks\.(\d)\.upsamplers\.0\.", r"decoder.conv_blocks.\1.upsample."),
    *((r"\.mid_block\.resnets\.0\.", ".mid.0."), (r"\.mid_block\.attentions\.0\.", ".mid.1.")),
    (r"\.mid_block\.resnets\.1\.", ".mid.2."),
)
IN_TAMING = (
    (r"^encoder\.down_blocks\.(\d)\.resnets\.", r"encoder.down.\1.block."),
    (r"^encoder\.down_blocks\.(\d)\.attentions\.", r"encoder.down.\1.attn."),
    (r"^encoder\.down_blocks\.(\d)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
    *((rf"^decoder\.up_blocks\.{i}\.resnets\.", f"decoder.up.{4 - i}.block.") for i in range(5)),
    *((rf"^decoder\.up_blocks\.{i}\.attentions\.", f"decoder.up.{4 - i}.attn.") for i in range(5)),
    *((rf"^decoder\.up_blocks\.{i}\.upsamplers\.0\.", f"decoder.up.{4 - i}.upsample.") for i in range(5)),
    *((r"\.mid_block\.resnets\.0\.", ".mid.block_1."), (r"\.mid_block\.attentions\.0\.", ".mid.attn_1.")),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
)


def renamed(model: Any, rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """A `VQModel`'s weights under another project's names; its linear layers of attention as 1x1 convolutions."""
    found = {}
    for name, weight in model.state_dict().items():
        new = name
        for old, becomes in (*rules, *IN_BLOCKS):
            new = re.sub(old, becomes, new)
        projection = ".attentions." in name and weight.dim() == 2
        found[new] = weight[:, :, None, None] if projection else weight
    return found


def llamagen(model: Any, folder: Path, image_size: int) -> tuple[VQGAN, dict[str, Tensor]]:
    """Code vectors of other lengths than 1, as in a released file, and what only training needs."""
    found = renamed(model, IN_LLAMAGEN) | {"quantize.codebook_used": torch.zeros(64)}
    lengths = torch.linspace(0.5, 3, K)[:, None]
    found["quantize.embedding.weight"] = found["quantize.embedding.weight"] * lengths
    torch.save({"model": in_order(found)}, folder / "vq.pt")
    return llamagen_tokenizer(read_checkpoint(folder / "vq.pt", "a tokenizer"), image_size)


def taming(model: Any, folder: Path, image_size: int) -> tuple[VQGAN, dict[str, Tensor]]:
    """Under the name that it has inside a transformer's file, with the loss that training needs."""
    found = {f"first_stage_model.{name}": weight for name, weight in renamed(model, IN_TAMING).items()}
    found["first_stage_model.loss.discriminator.main.0.weight"] = torch.zeros(4, 3, 4, 4)
    taming_file(folder / "last.ckpt", in_order(found))
    return taming_tokenizer(read_checkpoint(folder / "last.ckpt", "a tokenizer"), image_size)


# comparison -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=list(LAYOUTS))
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[VQGAN, Any, bool]:
    """The project's network, diffusers' of the same weights, and whether codes have length 1."""
    layout: dict[str, Any] = LAYOUTS[request.param]
    model = vq_model(**layout)
    put: Callable[..., tuple[VQGAN, dict[str, Tensor]]] = llamagen if layout["unit"] else taming
    image_size = 4 * 2 ** (len(layout["factors"]) - 1)
    network, weights = put(model, tmp_path, image_size)
    assert network.config["multipliers"] == ",".join(map(str, layout["factors"]))
    assert (network.num_features, network.codebook_l2_norm) == (layout["dim"], layout["unit"])
    assert network.quant_conv.weight.shape == (layout["dim"], Z, 1, 1)
    network.load_state_dict(weights, assign=True)
    if layout["unit"]:
        book: nn.Embedding = model.quantize.embedding
        book.weight.data = F.normalize(book.weight.data, dim=1)
    return network.eval(), model, layout["unit"]


def some_images(side: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    coarse = 2 * torch.rand(B, 3, 8, 8, generator=generator) - 1
    fine = 2 * torch.rand(B, 3, side, side, generator=generator) - 1
    return (F.interpolate(coarse, side, mode="nearest") + fine) / 2


@torch.no_grad()
def test_features_and_codes(pair: tuple[VQGAN, Any, bool]) -> None:
    network, oracle, unit = pair
    images = some_images(network.image_size)
    features = oracle.encode(images).latents  # (B, D, 4, 4)
    features = F.normalize(features, dim=1) if unit else features
    found = network.encode_features(images)
    assert (found - features).abs().max() < TOLERANCE
    assert (found[0] - found[1]).abs().max() > 0.1
    (codes,), (_, _, (_, _, expected)) = network.encode(images), oracle.quantize(features)
    assert torch.equal(codes.flatten(), expected.flatten())
    assert len(expected.unique()) > 4


@torch.no_grad()
def test_images_from_codes(pair: tuple[VQGAN, Any, bool]) -> None:
    network, oracle, _ = pair
    codes = torch.randint(K, (B, 16), generator=torch.Generator().manual_seed(3))
    vectors = oracle.quantize.get_codebook_entry(codes, (B, 4, 4, network.num_features))
    expected = oracle.decode(vectors, force_not_quantize=True).sample
    assert (network.decode(codes) - expected.clamp(-1, 1)).abs().max() < TOLERANCE
    assert (expected.abs() < 1).float().mean() > 0.5
    assert (expected[0] - expected[1]).abs().max() > 0.1


@torch.no_grad()
def test_reconstructions(pair: tuple[VQGAN, Any, bool]) -> None:
    network, oracle, unit = pair
    images = some_images(network.image_size)
    features = oracle.encode(images).latents
    expected = oracle.decode(F.normalize(features, dim=1) if unit else features).sample
    assert (network.decode(network.encode(images)[0]) - expected.clamp(-1, 1)).abs().max() < TOLERANCE
    assert (expected.abs() < 1).float().mean() > 0.5
