"""Tiny CLIP and HPSv2.1 files in the real formats, and open_clip's network written out independently of the code."""

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

VISION = {"width": 24, "layers": 2, "heads": 3, "patch": 8, "side": 32}
TEXT = {"width": 16, "layers": 2, "heads": 2, "tokens": 20}
SPACE = 12


def vocabulary() -> tuple[dict[str, int], list[str]]:
    """256 bytes, the same at a word's end, four merges, and two special tokens, as CLIP's vocab.json orders them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    merges = ["c a", "ca t</w>", "d o", "do g</w>"]
    names = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair.split()) for pair in merges)]
    return {name: i for i, name in enumerate([*names, "<|startoftext|>", "<|endoftext|>"])}, merges


N_TOKENS = len(vocabulary()[0])


def write_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIP folder with random weights, saved by transformers itself."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.utils import logging

    tower = {"num_hidden_layers": 2, "bos_token_id": N_TOKENS - 2, "eos_token_id": N_TOKENS - 1, "pad_token_id": 0}
    text = {"hidden_size": TEXT["width"], "intermediate_size": 40, "num_attention_heads": TEXT["heads"]}
    vision = {"hidden_size": VISION["width"], "intermediate_size": 48, "num_attention_heads": VISION["heads"]}
    config = CLIPConfig(
        text_config=text | tower | {"vocab_size": N_TOKENS, "max_position_embeddings": TEXT["tokens"]},
        vision_config=vision | {"num_hidden_layers": 2, "image_size": VISION["side"], "patch_size": VISION["patch"]},
        projection_dim=SPACE,
    )
    logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(config)
        for parameter in model.parameters():  # biases and norms too, else an error in them would not be seen
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)
    tokens, merges = vocabulary()
    (folder / "vocab.json").write_text(json.dumps(tokens))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return folder


def open_clip_state(seed: int = 1) -> dict[str, Tensor]:
    """A tiny ViT's weights under open_clip's names."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    vision, text = VISION["width"], TEXT["width"]
    patches = (VISION["side"] // VISION["patch"]) ** 2
    state = {
        "visual.conv1.weight": draw(vision, 3, VISION["patch"], VISION["patch"]),
        "visual.class_embedding": draw(vision),
        "visual.positional_embedding": draw(patches + 1, vision),
        "visual.proj": draw(vision, SPACE),
        "token_embedding.weight": draw(N_TOKENS, text),
        "positional_embedding": draw(TEXT["tokens"], text),
        "text_projection": draw(text, SPACE),
        "logit_scale": torch.tensor(4.6),
    }
    for name, width in (("visual.ln_pre", vision), ("visual.ln_post", vision), ("ln_final", text)):
        state |= {f"{name}.weight": 1 + draw(width), f"{name}.bias": draw(width)}
    for start, width, layers in (("visual.", vision, VISION["layers"]), ("", text, TEXT["layers"])):
        for i in range(layers):
            block = f"{start}transformer.resblocks.{i}."
            for norm in ("ln_1", "ln_2"):
                state |= {f"{block}{norm}.weight": 1 + draw(width), f"{block}{norm}.bias": draw(width)}
            state |= {
                f"{block}attn.in_proj_weight": draw(3 * width, width),
                f"{block}attn.in_proj_bias": draw(3 * width),
                f"{block}attn.out_proj.weight": draw(width, width),
                f"{block}attn.out_proj.bias": draw(width),
                f"{block}mlp.c_fc.weight": draw(4 * width, width),
                f"{block}mlp.c_fc.bias": draw(4 * width),
                f"{block}mlp.c_proj.weight": draw(width, 4 * width),
                f"{block}mlp.c_proj.bias": draw(width),
            }
    return state


def write_hps(path: Path, state: dict[str, Tensor] | None = None) -> Path:
    """An HPSv2.1 file, as the compressed one is."""
    torch.save({"state_dict": open_clip_state() if state is None else state}, path)
    return path


def block(state: dict[str, Tensor], name: str, x: Tensor, heads: int, causal: bool) -> Tensor:
    """One residual block of open_clip, (B, T, C) -> (B, T, C), through torch's own multi-head attention."""
    width = x.shape[2]
    attention = torch.nn.MultiheadAttention(width, heads, batch_first=True)
    attention.load_state_dict({k: state[f"{name}attn.{k}"] for k in attention.state_dict()})
    mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1) if causal else None
    normal = F.layer_norm(x, (width,), state[f"{name}ln_1.weight"], state[f"{name}ln_1.bias"])
    x = x + attention(normal, normal, normal, attn_mask=mask, need_weights=False)[0]
    normal = F.layer_norm(x, (width,), state[f"{name}ln_2.weight"], state[f"{name}ln_2.bias"])
    inner = F.gelu(F.linear(normal, state[f"{name}mlp.c_fc.weight"], state[f"{name}mlp.c_fc.bias"]))
    return x + F.linear(inner, state[f"{name}mlp.c_proj.weight"], state[f"{name}mlp.c_proj.bias"])


def open_clip_image(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """open_clip's image features, (B, 3, S, S) -> unit (B, P)."""
    x = F.conv2d(pixels, state["visual.conv1.weight"], stride=VISION["patch"]).flatten(2).transpose(1, 2)  # (B, N, C)
    first = state["visual.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([first, x], 1) + state["visual.positional_embedding"]
    x = F.layer_norm(x, x.shape[2:], state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])
    for i in range(VISION["layers"]):
        x = block(state, f"visual.transformer.resblocks.{i}.", x, VISION["heads"], causal=False)
    x = F.layer_norm(x[:, 0], x.shape[2:], state["visual.ln_post.weight"], state["visual.ln_post.bias"])
    return F.normalize(x @ state["visual.proj"], dim=1)


def open_clip_text(state: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """open_clip's text features, (B, 20) numbers padded with 0 -> unit (B, P)."""
    x = state["token_embedding.weight"][tokens] + state["positional_embedding"]
    for i in range(TEXT["layers"]):
        x = block(state, f"transformer.resblocks.{i}.", x, TEXT["heads"], causal=True)
    x = F.layer_norm(x, x.shape[2:], state["ln_final.weight"], state["ln_final.bias"])
    return F.normalize(x[torch.arange(len(x)), tokens.argmax(1)] @ state["text_projection"], dim=1)


def tokens_of(*words: list[str]) -> Tensor:
    """Texts as numbers (B, 20), given in the pieces that the merges make of them."""
    known, rows = vocabulary()[0], []
    for pieces in words:
        row = [known[piece] for piece in ["<|startoftext|>", *pieces, "<|endoftext|>"]]
        rows.append(row + [0] * (TEXT["tokens"] - len(row)))
    return torch.tensor(rows)
