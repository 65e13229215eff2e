"""The networks of released checkpoints, with sizes read from the shapes in their files.

| project | prior | tokenizer |
|---|---|---|
| LlamaGen, class-conditional (c2i) | `Transformer` | `VQGAN`, unit-norm codebook |
| taming-transformers | `GPT` | `VQGAN` |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ral_gym.errors import ConfigError, RunError
from ral_gym.grid import CodeGrid
from ral_gym.priors.gpt import GPT
from ral_gym.priors.transformer import Transformer
from ral_gym.stages.released.matching import match
from ral_gym.stages.released.torch_files import Checkpoint
from ral_gym.tokenizers.vqgan import VQGAN

HEAD_SIZE = 64
HEAD_SIZES = {3200: 100}
"""Width -> size of a head, where it is not 64: LlamaGen-3B."""
MULTIPLES = tuple(2**power for power in range(8, -1, -1))
"""What SwiGLU's inner units may be a multiple of; 256 in all released files."""
LLAMAGEN = "LlamaGen's class-conditional GPT (c2i)"
LLAMAGEN_VQ = "LlamaGen's tokenizer (VQ-16 or VQ-8)"
TAMING = "taming's transformer and its VQGAN (Net2NetTransformer)"

Weights = tuple[Any, dict[str, Tensor]]
"""A network without weights (on the meta device) and its weights by name."""


def on_meta(make: Callable[[], nn.Module]) -> Any:
    """A network of which only names and shapes exist."""
    with torch.device("meta"):
        return make()


def heads_of(checkpoint: Checkpoint, width: int, given: int | None) -> int:
    """The attention heads, which no shape tells: the given number, or heads of the usual size.

    Raises:
        ConfigError: the width fits neither.
    """
    size = HEAD_SIZES.get(width, HEAD_SIZE)
    heads = given or width // size
    if heads < 1 or width % heads or (given is None and width % size):
        raise ConfigError(
            f"{checkpoint.path} has {width} units, which {heads or 'no'} heads do not divide: give --heads"
        )
    return heads


# LlamaGen ---------------------------------------------------------------------------------------------------------


def llamagen_prior(checkpoint: Checkpoint, grid: CodeGrid, heads: int | None = None) -> Weights:
    """LlamaGen's GPT for a tokenizer's grid.

    Args:
        checkpoint: such as ``c2i_L_256.pt``.
        grid: of the tokenizer.
        heads: attention heads; None: 64 units each, or 100 in a network of 3200.

    Raises:
        ConfigError: the sizes do not fit one another.
        RunError: another kind of file, of another codebook, or with tensors missing or left over.
    """
    if any(name.startswith("cls_embedding.cap_proj.") for name in checkpoint.tensors):
        raise RunError(f"{checkpoint.path} draws from text (t2i): give a class-conditional checkpoint (c2i_...)")
    if "quantize.embedding.weight" in checkpoint.tensors:
        raise RunError(f"{checkpoint.path} holds a tokenizer: give it as --vq, and {LLAMAGEN} as --gpt")
    size, width = checkpoint.shape("tok_embeddings.weight", LLAMAGEN, 2)
    rows, _ = checkpoint.shape("cls_embedding.embedding_table.weight", LLAMAGEN, 2)
    inner, _ = checkpoint.shape("layers.0.feed_forward.w1.weight", LLAMAGEN, 2)
    _check_codebook(checkpoint, size, grid)
    heads, least = heads_of(checkpoint, width, heads), int(8 * width / 3)
    multiple = next((m for m in MULTIPLES if -(-least // m) * m == inner), None)
    if multiple is None:
        raise RunError(f"{checkpoint.path}: a SwiGLU layer of {inner} units does not fit a network of {width}")
    prior = on_meta(
        lambda: Transformer(
            *(size, grid.height, grid.width),
            hidden_units=width,
            layers=checkpoint.count("layers"),
            attention_heads=heads,
            multiple_of=multiple,
            classes=rows - 1,
            attention="fused",
        )
    )
    return prior, match(checkpoint, prior, lambda name: [name], lambda name: False, LLAMAGEN)


def _check_codebook(checkpoint: Checkpoint, size: int, grid: CodeGrid) -> None:
    if size != grid.codebook_size:
        raise RunError(
            f"{checkpoint.path} draws {size} codes, but the tokenizer has {grid.codebook_size}: give the tokenizer it "
            "was trained with"
        )


def llamagen_tokenizer(checkpoint: Checkpoint, image_size: int) -> Weights:
    """LlamaGen's tokenizer, its code vectors scaled to length 1.

    Raises:
        ConfigError: the image side does not fit.
        RunError: another kind of file, or tensors are missing or left over.
    """
    if "tok_embeddings.weight" in checkpoint.tensors:
        raise RunError(f"{checkpoint.path} holds a GPT: give it as --gpt, and {LLAMAGEN_VQ} as --vq")
    if "encoder.down.0.block.0.conv1.weight" in checkpoint.tensors:
        raise RunError(f"{checkpoint.path} is a VQGAN of taming-transformers: import it by `ral-gym import taming`")
    levels = checkpoint.count("encoder.conv_blocks")
    widths = [checkpoint.shape(f"encoder.conv_blocks.{i}.res.0.conv2.weight", LLAMAGEN_VQ, 4)[0] for i in range(levels)]
    blocks = checkpoint.count("encoder.conv_blocks.0.res")
    vqgan = _vqgan(checkpoint, image_size, widths, blocks, "", True, LLAMAGEN_VQ)
    weights = match(checkpoint, vqgan, lambda name: [_in_llamagen(name, levels)], _unused_in_vq, LLAMAGEN_VQ)
    name = "quantize.embedding.weight"
    return vqgan, weights | {name: F.normalize(weights[name].float(), dim=1)}


def _unused_in_vq(name: str) -> bool:
    return name == "quantize.codebook_used"


def _in_llamagen(name: str, levels: int) -> str:
    """Taming's name of a tensor -> LlamaGen's: one list of blocks per resolution, from which the decoder starts."""
    for old, new in (("block_1", "0"), ("attn_1", "1"), ("block_2", "2")):
        name = name.replace(f".mid.{old}.", f".mid.{new}.")
    name = re.sub(r"^encoder\.down\.(\d+)", r"encoder.conv_blocks.\1", name)
    found = re.match(r"decoder\.up\.(\d+)(.*)", name)
    if found:
        name = f"decoder.conv_blocks.{levels - 1 - int(found[1])}{found[2]}"
    return re.sub(r"(conv_blocks\.\d+)\.block\.", r"\1.res.", name)


def _vqgan(
    checkpoint: Checkpoint, image_size: int, widths: Sequence[int], blocks: int, prefix: str, unit: bool, what: str
) -> VQGAN:
    """A VQGAN without weights, with sizes from the shapes in a file."""
    if not widths:
        raise RunError(f"{checkpoint.path} has no encoder with levels: give the file with {what}")
    base, channels = checkpoint.shape(f"{prefix}encoder.conv_in.weight", what, 4)[:2]
    size, dim = checkpoint.shape(f"{prefix}quantize.embedding.weight", what, 2)
    if any(width % base for width in widths):
        raise RunError(f"{checkpoint.path}: {widths} channels are no multiples of the first layer's {base}")
    step = 2 ** (len(widths) - 1)
    if image_size % step or image_size < step:
        raise ConfigError(
            f"--image-size is {image_size}, but {checkpoint.path} shrinks images {step} times: give a "
            f"multiple of {step}"
        )
    sizes: dict[str, Any] = {"codebook_size": size, "codebook_dim": dim, "hidden_units": base}
    sizes |= {"multipliers": [width // base for width in widths], "residual_blocks": blocks, "codebook_l2_norm": unit}
    sizes["z_channels"] = checkpoint.shape(f"{prefix}encoder.conv_out.weight", what, 4)[0]
    return on_meta(lambda: VQGAN(image_size, channels, **sizes))


# taming-transformers ----------------------------------------------------------------------------------------------


FIRST_STAGE, TRANSFORMER = "first_stage_model.", "transformer."
IN_MINGPT = {
    "attention_norm": ("ln1",),
    "ffn_norm": ("ln2",),
    "attention.wqkv": ("attn.query", "attn.key", "attn.value"),
    "attention.wo": ("attn.proj",),
    "feed_forward.0": ("mlp.0",),
    "feed_forward.2": ("mlp.2",),
}
"""A block's modules -> minGPT's."""


def taming_tokenizer(checkpoint: Checkpoint, image_size: int) -> Weights:
    """Taming's VQGAN inside a file of its transformer; the rest of the file is not looked at.

    Raises:
        ConfigError: the image side does not fit.
        RunError: another kind of file, or tensors are missing or left over.
    """
    if "encoder.conv_in.weight" in checkpoint.tensors:
        raise RunError(f"{checkpoint.path} holds a tokenizer alone: give the file with {TAMING}")
    down = f"{FIRST_STAGE}encoder.down"
    levels = checkpoint.count(down)
    widths = [checkpoint.shape(f"{down}.{i}.block.0.conv2.weight", TAMING, 4)[0] for i in range(levels)]
    vqgan = _vqgan(checkpoint, image_size, widths, checkpoint.count(f"{down}.0.block"), FIRST_STAGE, False, TAMING)

    def dropped(name: str) -> bool:
        return not name.startswith(FIRST_STAGE) or name.startswith(f"{FIRST_STAGE}loss.")

    return vqgan, match(checkpoint, vqgan, lambda name: [FIRST_STAGE + name], dropped, TAMING)


def taming_prior(
    checkpoint: Checkpoint, grid: CodeGrid, heads: int | None = None, classes: int = 0, start: int = 0
) -> Weights:
    """Taming's transformer for a tokenizer's grid: class tokens are rows of its embedding of codes.

    Args:
        checkpoint: such as ``last.ckpt``.
        grid: of the tokenizer.
        heads: attention heads; None: 64 units each.
        classes: N; class n has the embedding of code n. 0: not conditional.
        start: the code that an unconditional model starts from.

    Raises:
        ConfigError: the sizes do not fit one another.
        RunError: another kind of file or condition, of another codebook, or with tensors missing or left over.
    """
    if any(name.startswith("cond_stage_model.") for name in checkpoint.tensors):
        raise RunError(
            f"{checkpoint.path} draws from another image or a map: give a class-conditional or unconditional one"
        )
    embedding, position = f"{TRANSFORMER}tok_emb.weight", f"{TRANSFORMER}pos_emb"
    size, width = checkpoint.shape(embedding, TAMING, 2)
    _, places, _ = checkpoint.shape(position, TAMING, 3)
    _check_codebook(checkpoint, size, grid)
    if places < grid.n_codes:
        raise ConfigError(
            f"{checkpoint.path} has learned {places} positions, but images of this size "
            f"have {grid.n_codes} codes: give a smaller --image-size"
        )
    if max(classes, start + 1) > size:
        raise ConfigError(
            f"{max(classes, start + 1)} classes for {size} codes: classes are rows of the codes' embedding"
        )
    prior = on_meta(
        lambda: GPT(
            *(size, grid.height, grid.width),
            hidden_units=width,
            layers=checkpoint.count(f"{TRANSFORMER}blocks"),
            attention_heads=heads_of(checkpoint, width, heads),
            classes=classes,
            attention="fused",
        )
    )
    rows = checkpoint.tensors[embedding][slice(0, classes) if classes else slice(start, start + 1)]
    made = {CLASS_ROWS: rows.clone(), PLACES: checkpoint.tensors[position][0, : grid.n_codes].clone()}
    whole = Checkpoint(checkpoint.path, checkpoint.tensors | made)
    return prior, match(whole, prior, _in_mingpt, _unused_in_mingpt, TAMING)


CLASS_ROWS, PLACES = "its class rows", "its positions"
"""What is made of tensors of taming's files."""


def _in_mingpt(name: str) -> list[str]:
    """Our name of a tensor -> minGPT's."""
    module, _, end = name.rpartition(".")
    if name == "position":
        return [PLACES]
    if module == "cls_embedding.embedding_table":
        return [CLASS_ROWS]
    outer = {"tok_embeddings": "tok_emb", "norm": "ln_f", "output": "head"}
    if module in outer:
        return [f"{TRANSFORMER}{outer[module]}.{end}"]
    _, number, part = module.split(".", 2)
    return [f"{TRANSFORMER}blocks.{number}.{theirs}.{end}" for theirs in IN_MINGPT[part]]


def _unused_in_mingpt(name: str) -> bool:
    return not name.startswith(TRANSFORMER) or name.endswith(".attn.mask") or name == f"{TRANSFORMER}pos_emb"
