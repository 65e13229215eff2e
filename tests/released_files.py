"""Checkpoints with the structure of the released ones, at tiny sizes and with random weights."""

from __future__ import annotations

import argparse
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ral_gym.priors.gpt import GPT
from ral_gym.priors.transformer import Transformer
from ral_gym.tokenizers.vqgan import VQGAN

K, N, SIDE = 24, 5, 32
"""Codes, classes, pixels; 4x4 codes."""


def perturbed(network: Any, seed: int) -> Any:
    """Random weights everywhere, norms near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in network.named_parameters():
        centre = float("norm" in name and name.endswith("weight"))
        with torch.no_grad():
            weight.copy_(centre + 0.1 * torch.randn(weight.shape, generator=generator))
    return network.eval()


def tokenizer(codebook_size: int = K, unit: bool = True) -> VQGAN:
    sizes: dict[str, Any] = {"hidden_units": 32, "multipliers": "1,1,2,2", "residual_blocks": 1, "z_channels": 8}
    return perturbed(VQGAN(SIDE, 3, codebook_size=codebook_size, codebook_dim=6, codebook_l2_norm=unit, **sizes), 1)


def transformer() -> Transformer:
    sizes: dict[str, Any] = {"hidden_units": 128, "layers": 2, "attention_heads": 2, "multiple_of": 32}
    return perturbed(Transformer(K, 4, 4, classes=N, **sizes), 2)


def gpt(classes: int = N) -> GPT:
    """With class rows that are rows of the codes' embedding."""
    network = perturbed(GPT(K, 4, 4, classes=classes, hidden_units=128, layers=2, attention_heads=2), 3)
    rows = network.cls_embedding.embedding_table.weight
    rows.data.copy_(network.tok_embeddings.weight[: len(rows)])
    return network


# LlamaGen ---------------------------------------------------------------------------------------------------------


def in_order(names: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
    return OrderedDict((name, tensor.detach().clone()) for name, tensor in names.items())


def put(found: dict[str, Tensor], name: str, module: nn.Module) -> None:
    found.update({f"{name}.{end}": tensor for end, tensor in module.state_dict().items()})


def llamagen_gpt() -> OrderedDict[str, Tensor]:
    return in_order(transformer().state_dict())


def llamagen_vq(model: VQGAN | None = None) -> OrderedDict[str, Tensor]:
    """Blocks of a resolution in one module, numbered from the image in the encoder, from the codes in the decoder."""
    model = model or tokenizer()
    found: dict[str, Tensor] = {}
    for side, levels in (("encoder", list(model.encoder.down)), ("decoder", list(reversed(model.decoder.up)))):
        network = getattr(model, side)
        for name in ("conv_in", "norm_out", "conv_out"):
            put(found, f"{side}.{name}", getattr(network, name))
        for number, part in enumerate((network.mid.block_1, network.mid.attn_1, network.mid.block_2)):
            put(found, f"{side}.mid.{number}", part)
        for number, level in enumerate(levels):
            for kind, parts in (("res", level.block), ("attn", level.attn)):
                for j, part in enumerate(parts):
                    put(found, f"{side}.conv_blocks.{number}.{kind}.{j}", part)
            for kind in ("downsample", "upsample"):
                if getattr(level, kind) is not None:
                    put(found, f"{side}.conv_blocks.{number}.{kind}", getattr(level, kind))
    put(found, "quant_conv", model.quant_conv)
    put(found, "post_quant_conv", model.post_quant_conv)
    found["quantize.embedding.weight"] = 3 * model.quantize.embedding.weight  # stored vectors need not be unit ones
    found["quantize.codebook_used"] = torch.zeros(64)
    return in_order(found)


def llamagen_files(folder: Path) -> list[str]:
    """The two files, and the arguments that name them."""
    torch.save({"model": llamagen_gpt()}, folder / "c2i_tiny.pt")
    torch.save({"model": llamagen_vq()}, folder / "vq_tiny.pt")
    files = ["--gpt", str(folder / "c2i_tiny.pt"), "--vq", str(folder / "vq_tiny.pt")]
    return ["import", "llamagen", *files, "--image-size", str(SIDE), "--quiet"]


# taming -----------------------------------------------------------------------------------------------------------


def taming_state(prior: GPT | None = None, block_size: int = 20) -> OrderedDict[str, Tensor]:
    """A Net2NetTransformer's: the VQGAN with its loss, and minGPT with more positions than are used, and its masks."""
    prior = prior or gpt()
    found: dict[str, Tensor] = {}
    put(found, "first_stage_model", tokenizer(unit=False))
    put(found, "first_stage_model.loss.discriminator.main.0", nn.Conv2d(3, 4, 4))
    positions = torch.randn(1, block_size, prior.hidden_units)
    positions[0, : len(prior.position)] = prior.position.data[:block_size]
    found["transformer.pos_emb"] = positions
    found["transformer.tok_emb.weight"] = prior.tok_embeddings.weight
    for number, block in enumerate(prior.layers):
        start = f"transformer.blocks.{number}"
        put(found, f"{start}.ln1", block.attention_norm)  # type: ignore[arg-type]
        put(found, f"{start}.ln2", block.ffn_norm)  # type: ignore[arg-type]
        qkv: Any = block.attention.wqkv  # type: ignore[union-attr]
        for name, weight, bias in zip(("query", "key", "value"), qkv.weight.chunk(3), qkv.bias.chunk(3), strict=True):
            found |= {f"{start}.attn.{name}.weight": weight, f"{start}.attn.{name}.bias": bias}
        put(found, f"{start}.attn.proj", block.attention.wo)  # type: ignore[union-attr, arg-type]
        put(found, f"{start}.mlp", block.feed_forward)  # type: ignore[arg-type]
        found[f"{start}.attn.mask"] = torch.ones(1, 1, block_size, block_size).tril()
    put(found, "transformer.ln_f", prior.norm)
    put(found, "transformer.head", prior.output)
    return in_order(found)


def taming_file(path: Path, state: OrderedDict[str, Tensor], **how: Any) -> list[str]:
    """A file as Lightning 1 wrote it, with a callback's class as the key of its state, and the arguments naming it."""
    callback = named_class("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    content = {"epoch": 3, "global_step": 10, "pytorch-lightning_version": "1.0.8", "state_dict": state}
    content |= {"callbacks": {callback: {"best_model_score": torch.tensor(1.5), "best_model_path": "x.ckpt"}}}
    content |= {"optimizer_states": [{"state": {}, "param_groups": []}], "args": argparse.Namespace(lr=1e-4)}
    try:
        torch.save(content, path, **how)
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "pytorch_lightning"]:
            del sys.modules[name]
    return ["import", "taming", "--checkpoint", str(path), "--image-size", str(SIDE), "--quiet"]


def named_class(module: str, name: str) -> type:
    """A class that pickle finds in a module which is not installed."""
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        sys.modules[".".join(parts[:end])] = ModuleType(".".join(parts[:end]))
    made = type(name, (), {"__module__": module})
    setattr(sys.modules[module], name, made)
    return made


MODEL_YAML = """\
model:
  target: taming.models.cond_transformer.Net2NetTransformer
  params:
    cond_stage_key: class_label
    transformer_config:
      target: taming.modules.transformer.mingpt.GPT
      params: {vocab_size: 24, block_size: 20, n_layer: 2, n_head: 2, n_embd: 128}
    cond_stage_config:
      target: taming.modules.util.Labelator
      params: {n_classes: 5}
"""
