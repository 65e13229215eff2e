"""The files of CLIP and of HPSv2.1 -> the sizes, weights and vocabulary of one network, without running code from them.

CLIP (Radford et al., 2021, arXiv 2103.00020) is a folder as released for the `transformers` library: config.json,
model.safetensors, vocab.json and merges.txt, and preprocessor_config.json where there is one. HPSv2.1 (Wu et al., 2023,
arXiv 2306.09341) is one file, HPS_v2.1_compressed.pt: ``{"state_dict": ..}`` in the names of the `open_clip` library,
which are mapped to those of `transformers`; its vocabulary is that of a CLIP folder. Nothing is ever downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ral_gym.errors import ConfigError, RunError
from ral_gym.runs.foreign import MOST_TENSORS, check_regular, parse_json, read_bytes

WEIGHTS, VOCABULARY, MERGES = "model.safetensors", "vocab.json", "merges.txt"
FOLDER = ("config.json", WEIGHTS, VOCABULARY, MERGES)
"""The files that a CLIP folder must have."""
PREPROCESSING = "preprocessor_config.json"
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""OpenAI's mean and standard deviation of the colours, in 0..1, where the folder names none; HPSv2.1 has the same."""
START, END = "<|startoftext|>", "<|endoftext|>"
HEADS = {1280: 16, 1408: 16, 1664: 16}
"""Width of a tower -> its heads, where a head is not 64 wide: open_clip's ViT-H, g and bigG. No file says it."""
ACTIVATIONS = ("quick_gelu", "gelu")
LARGEST = {"layers": 1_000, "vocabulary": 1_000_000}
WIDEST = 65_536

_TOWER = {
    "hidden_size": "width",
    "intermediate_size": "inner",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
}
_TEXT = {**_TOWER, "max_position_embeddings": "tokens", "vocab_size": "vocabulary"}
_VISION = {**_TOWER, "image_size": "image_size", "patch_size": "patch_size"}
_DEFAULTS = {
    "text": {"width": 512, "inner": 2048, "layers": 12, "heads": 8, "tokens": 77, "vocabulary": 49_408},
    "vision": {"width": 768, "inner": 3072, "layers": 12, "heads": 12, "image_size": 224, "patch_size": 32},
}
"""What config.json means where it says nothing: the defaults of `transformers`."""


@dataclass(frozen=True)
class Sizes:
    """The shape of a CLIP network.

    Attributes:
        text: width, inner, layers, heads, tokens, vocabulary of the text tower.
        vision: width, inner, layers, heads, image_size, patch_size of the image tower.
        projection: dimension of the common space.
        activation: `quick_gelu` or `gelu`.
        epsilon: of the layer norms.
    """

    text: dict[str, int]
    vision: dict[str, int]
    projection: int
    activation: str = "quick_gelu"
    epsilon: float = 1e-5

    def library_config(self, end: int) -> Any:
        """As `transformers.CLIPConfig`, with the token number of the end of a text."""
        from transformers import CLIPConfig

        shared = {"hidden_act": self.activation, "layer_norm_eps": self.epsilon, "projection_dim": self.projection}
        special = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": None}
        text = {name: self.text[own] for name, own in _TEXT.items()}
        vision = {name: self.vision[own] for name, own in _VISION.items()}
        return CLIPConfig(
            text_config=shared | special | text, vision_config=shared | vision, projection_dim=self.projection
        )


def check_installed() -> None:
    """Refuse rewards by CLIP without the library that has its network.

    Raises:
        ConfigError: names the extra.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            'the rewards clip and hps need the transformers library: pip install "ral-gym[clip]"'
        ) from error


def check_folder(folder: Path) -> None:
    """Refuse anything but a CLIP folder with its four files.

    Raises:
        ConfigError: which file is missing, or that it is no folder.
    """
    needed = "give the folder of a CLIP model, with " + ", ".join(FOLDER)
    if folder.is_file():
        raise ConfigError(f"ral.clip_path {folder} is a file: {needed} (an HPS file goes to ral.hps_path)")
    if not folder.is_dir():
        raise ConfigError(f"ral.clip_path {folder} does not exist: {needed}")
    if missing := [name for name in FOLDER if not (folder / name).is_file()]:
        raise ConfigError(f"ral.clip_path {folder} has no {' and no '.join(missing)}: {needed}")


def folder_sizes(folder: Path) -> Sizes:
    """The sizes in a CLIP folder's config.json.

    Raises:
        ConfigError: it is another model's, or its sizes fit no network.
    """
    path = folder / "config.json"
    values = _json(path)
    kind = values.get("model_type")
    if kind != "clip":
        raise ConfigError(f"{path} is no CLIP model's (model_type {str(kind)[:60]!r}): ral.clip_path needs one of CLIP")
    towers, activations, epsilons = {}, set(), set()
    for tower, names in (("text", _TEXT), ("vision", _VISION)):
        given = values.get(f"{tower}_config")
        given = given if isinstance(given, dict) else {}
        towers[tower] = {own: given.get(name, _DEFAULTS[tower][own]) for name, own in names.items()}
        activations.add(given.get("hidden_act", "quick_gelu"))
        epsilons.add(given.get("layer_norm_eps", 1e-5))
    if len(activations) != 1 or not activations <= set(ACTIVATIONS) or len(epsilons) != 1:
        raise ConfigError(f"{path}: hidden_act is {activations}, layer_norm_eps {epsilons}: one of each is supported")
    sizes = Sizes(
        towers["text"], towers["vision"], values.get("projection_dim", 512), activations.pop(), epsilons.pop()
    )
    check_sizes(path, sizes)
    return sizes


def check_sizes(path: Path, sizes: Sizes) -> None:
    """Refuse sizes that no network has, before one is made of them.

    Raises:
        ConfigError: names the first of them.
    """
    for tower, values in (("text", sizes.text), ("vision", sizes.vision), ("", {"projection": sizes.projection})):
        for name, value in values.items():
            most = LARGEST.get(name, WIDEST)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ConfigError(f"{path}: {name} {tower and f'of the {tower} tower '}is {value!r}: 1 to {most} fits")
        if tower and values["width"] % values["heads"]:
            raise ConfigError(f"{path}: {values['heads']} heads do not divide the {tower} tower's {values['width']}")
    if sizes.vision["image_size"] % sizes.vision["patch_size"]:
        raise ConfigError(f"{path}: patches of {sizes.vision['patch_size']} do not fit {sizes.vision['image_size']}")
    if not isinstance(sizes.epsilon, float) or not 0 < sizes.epsilon < 1:
        raise ConfigError(f"{path}: layer_norm_eps is {sizes.epsilon!r}: a number between 0 and 1 fits")


def folder_colours(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the colours that a CLIP folder was trained with.

    Raises:
        ConfigError: they are not three numbers each.
    """
    path = folder / PREPROCESSING
    values = _json(path) if path.is_file() else {}
    found = tuple(values.get(name, default) for name, default in (("image_mean", MEAN), ("image_std", STD)))
    for numbers in found:
        fits = isinstance(numbers, list | tuple) and len(numbers) == 3
        if not fits or not all(isinstance(x, int | float) and 0 <= x <= 1 for x in numbers) or found[1][0] == 0:
            raise ConfigError(f"{path}: image_mean and image_std are not three numbers in 0..1 each")
    return tuple(found[0]), tuple(found[1])


class FolderWeights(Mapping[str, Tensor]):
    """The weights of a CLIP folder by their name in `transformers`, read one by one; float32.

    Raises:
        ConfigError: the file is damaged or too large, or has the names of another library.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / WEIGHTS
        _check_file(self.path)
        try:
            with safe_open(self.path, "pt") as file:
                names = [name for name in file.keys() if not name.endswith("position_ids")]  # noqa: SIM118 (no dict)
                self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{self.path} is damaged or not a safetensors file ({_line(error)})") from error
        if "visual_projection.weight" not in self.shapes:
            raise ConfigError(f"{self.path} does not hold CLIP's weights as transformers names them")

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(name).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class HPSWeights(Mapping[str, Tensor]):
    """The weights of an HPSv2.1 file under the names of `transformers`, memory-mapped and read one by one; float32.

    Args:
        path: the file.
        heads: of the text and the image tower, which nothing in the file tells; None: by `HEADS`, else one per 64.

    Attributes:
        sizes: inferred from the shapes.
        shapes: name -> shape.

    Raises:
        ConfigError: it is missing, damaged, or another kind of file.
    """

    def __init__(self, path: Path, heads: tuple[int, int] | None = None) -> None:
        self.path = path
        if path.is_dir():
            raise ConfigError(f"ral.hps_path {path} is a folder: give HPS_v2.1_compressed.pt (ral.clip_path is CLIP's)")
        if not path.is_file():
            raise ConfigError(f"ral.hps_path {path} does not exist: give HPS_v2.1_compressed.pt")
        self._state = _hps_state(path)
        self.sizes = _hps_sizes(path, self._state, heads)
        check_sizes(path, self.sizes)
        self._parts = dict(_renamed(self._state))
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._parts.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._parts[name].float().contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def _hps_state(path: Path) -> dict[str, Tensor]:
    """The state dict in open_clip's names."""
    _check_file(path)
    wrong = f"ral.hps_path {path} is not HPS_v2.1_compressed.pt"
    if path.suffix == ".safetensors":  # which newer versions of torch.load read too
        raise ConfigError(f"{wrong}: it is a safetensors file, such as CLIP's")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file, or another format, raises almost anything
        raise ConfigError(f"{wrong}: it is no file of plain tensors ({type(error).__name__})") from error
    state = found.get("state_dict") if isinstance(found, dict) else None
    if not isinstance(state, dict):
        names = found if isinstance(found, dict) else {}
        is_clip = any(str(name).startswith(("visual", "vision_model.", "text_model.")) for name in names)
        raise ConfigError(f"{wrong}: {'it holds a CLIP model' if is_clip else 'it has no state_dict'}")
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()):
        raise ConfigError(f"{wrong}: its state_dict has other things than tensors")
    if "visual.conv1.weight" not in state or "text_projection" not in state:
        is_clip = any(name.startswith(("vision_model.", "text_model.")) for name in state)
        raise ConfigError(f"{wrong}: it holds {'a CLIP model of transformers' if is_clip else 'another network'}")
    # A tensor can repeat one number over any shape: no more numbers than the file has bytes are ever made of it.
    if sum(tensor.numel() * tensor.element_size() for tensor in state.values()) > path.stat().st_size:
        raise ConfigError(f"{wrong}: its tensors are larger than the file")
    return {name: tensor for name, tensor in state.items() if name not in ("attn_mask", "logit_bias")}


def _hps_sizes(path: Path, state: dict[str, Tensor], heads: tuple[int, int] | None) -> Sizes:
    """The sizes of open_clip's network, from the shapes of its weights."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    try:
        vocabulary, text = shapes["token_embedding.weight"]
        vision, _, patch, _ = shapes["visual.conv1.weight"]
        patches, _ = shapes["visual.positional_embedding"]
        towers = []
        for number, (start, width) in enumerate((("", text), ("visual.", vision))):
            blocks = f"{start}transformer.resblocks."
            layers = 1 + max(
                int(name.removeprefix(blocks).partition(".")[0]) for name in shapes if name.startswith(blocks)
            )
            own = heads[number] if heads else HEADS.get(width, max(1, width // 64))
            inner = shapes[f"{blocks}0.mlp.c_fc.weight"][0]
            towers.append({"width": width, "inner": inner, "layers": layers, "heads": own})
        towers[0] |= {"tokens": shapes["positional_embedding"][0], "vocabulary": vocabulary}
        towers[1] |= {"image_size": patch * math.isqrt(patches - 1), "patch_size": patch}
        return Sizes(towers[0], towers[1], shapes["visual.proj"][1], "gelu")
    except (KeyError, ValueError, IndexError) as error:
        raise ConfigError(f"ral.hps_path {path} does not hold open_clip's network (it lacks {error})") from error


_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OTHERS = {
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # spelled so in transformers
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}


def _renamed(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """open_clip's names and tensors -> those of transformers; one that is unknown keeps its name, to be refused."""
    for name, tensor in state.items():
        start, found, rest = name.partition("transformer.resblocks.")
        if found and start in ("", "visual."):
            number, _, part = rest.partition(".")
            block = f"{'vision' if start else 'text'}_model.encoder.layers.{number}."
            module, _, kind = part.rpartition(".")
            if part in ("attn.in_proj_weight", "attn.in_proj_bias"):
                for letter, third in zip("qkv", tensor.chunk(3), strict=False):  # rows in the order q, k, v
                    yield f"{block}self_attn.{letter}_proj.{part.rpartition('_')[2]}", third
            else:
                yield f"{block}{_BLOCK.get(module, module)}.{kind}", tensor
        elif name in _TRANSPOSED and tensor.dim() == 2:
            yield _TRANSPOSED[name], tensor.T
        else:
            yield _OTHERS.get(name, name), tensor


def folder_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The tokens with their numbers, and the merges in their order, of a CLIP folder.

    Raises:
        ConfigError: a file is damaged, or lacks the tokens that begin and end a text.
    """
    path = folder / VOCABULARY
    tokens: dict[str, int] = _json(path)
    numbers = set(tokens.values()) if all(type(number) is int for number in tokens.values()) else set()
    if not {START, END} <= tokens.keys() or numbers != set(range(len(tokens))):
        raise ConfigError(f"{path} is not CLIP's: it needs {START}, {END} and one number from 0 on for every token")
    path = folder / MERGES
    try:
        lines = read_bytes(path).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError, RunError) as error:
        raise ConfigError(f"{path} cannot be read ({_line(error)})") from error
    merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    for pair in merges:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= tokens.keys():
            raise ConfigError(f"{path} does not belong to {VOCABULARY}: the merge {' '.join(pair)[:60]!r} is not in it")
    return tokens, merges  # type: ignore[return-value]


def check_shapes(path: Path, found: Mapping[str, tuple[int, ...]], needed: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse weights that are not those of the network, before any memory is taken.

    Raises:
        ConfigError: names the first that is missing, too many or of another shape.
    """
    for name in needed:
        if name not in found:
            raise ConfigError(f"{path} lacks the tensor {name}: it is incomplete, or another model's")
        if tuple(found[name]) != tuple(needed[name]):
            raise ConfigError(f"{path}: {name} is {tuple(found[name])}, the model's sizes say {tuple(needed[name])}")
    if extra := sorted(set(found) - set(needed)):
        raise ConfigError(f"{path} has {extra[0][:60]}, which CLIP has not: it is another model's")


def _json(path: Path) -> dict[str, Any]:
    try:
        values = parse_json(read_bytes(path).decode("utf-8"))
    except (OSError, ValueError, RunError) as error:
        raise ConfigError(f"{path} cannot be read ({_line(error)})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} does not hold a JSON object")
    return values


def _check_file(path: Path) -> None:
    try:
        check_regular(path, MOST_TENSORS, "give another file")
    except (OSError, RunError) as error:
        raise ConfigError(_line(error)) from error


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
