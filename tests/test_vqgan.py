"""VQGAN: taming's and LlamaGen's sizes and names, codes against a plain derivation, stage 1, every stage behind it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ral_gym.commands.cli import main
from ral_gym.errors import ConfigError
from ral_gym.tokenizers import quantiser
from ral_gym.tokenizers.base import load_tokenizer, save_tokenizer
from ral_gym.tokenizers.vqgan import VQGAN

SMALL: dict[str, Any] = {"hidden_units": 8, "multipliers": "1,2,2", "residual_blocks": 1, "z_channels": 6}
SMALL |= {"norm_groups": 4, "codebook_size": 50, "codebook_dim": 5}


def vqgan(**settings: Any) -> VQGAN:
    torch.manual_seed(0)
    model = VQGAN(16, 3, **{**SMALL, **settings})
    torch.nn.init.normal_(model.quantize.embedding.weight, std=0.3)  # of different lengths
    return model.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


# ------------------------------------------------------------------------------------------------------- the network

PUBLISHED = {
    "LlamaGen VQ-16": ({"codebook_l2_norm": True}, 71_883_403, 16),
    "LlamaGen VQ-8": ({"multipliers": "1,2,2,4", "codebook_l2_norm": True}, 70_109_835, 32),
    "taming f16, K = 1024": ({"codebook_size": 1024, "codebook_dim": 256}, 72_141_699, 16),
}


def layer(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def block(name: str, width: int, out: int) -> dict[str, tuple[int, ...]]:
    found = layer(f"{name}.norm1", width) | layer(f"{name}.conv1", out, width, 3, 3)
    found |= layer(f"{name}.norm2", out) | layer(f"{name}.conv2", out, out, 3, 3)
    return found | (layer(f"{name}.nin_shortcut", out, width, 1, 1) if width != out else {})


def attention(name: str, width: int) -> dict[str, tuple[int, ...]]:
    names = [f"{name}.{part}" for part in ("q", "k", "v", "proj_out")]
    return layer(f"{name}.norm", width) | {k: v for one in names for k, v in layer(one, width, width, 1, 1).items()}


def names_of_taming(widths: list[int], k: int, d: int, z: int = 256) -> dict[str, tuple[int, ...]]:
    """Every tensor of taming's f16 network, written out level by level."""
    found = {
        "quantize.embedding.weight": (k, d),
        **layer("quant_conv", d, z, 1, 1),
        **layer("post_quant_conv", z, d, 1, 1),
    }
    lowest, width = len(widths) - 1, widths[0]
    found |= layer("encoder.conv_in", widths[0], 3, 3, 3) | layer("encoder.conv_out", z, widths[-1], 3, 3)
    found |= layer("decoder.conv_in", widths[-1], z, 3, 3) | layer("decoder.conv_out", 3, widths[0], 3, 3)
    found |= layer("encoder.norm_out", widths[-1]) | layer("decoder.norm_out", widths[0])
    for side in ("encoder", "decoder"):
        for number in (1, 2):
            found |= block(f"{side}.mid.block_{number}", widths[-1], widths[-1])
        found |= attention(f"{side}.mid.attn_1", widths[-1])
    for level, out in enumerate(widths):
        for number in range(2):
            found |= block(f"encoder.down.{level}.block.{number}", width, out)
            width = out
            if level == lowest:
                found |= attention(f"encoder.down.{level}.attn.{number}", out)
        if level != lowest:
            found |= layer(f"encoder.down.{level}.downsample.conv", out, out, 3, 3)
    for level in reversed(range(len(widths))):
        for number in range(3):
            found |= block(f"decoder.up.{level}.block.{number}", width, widths[level])
            width = widths[level]
            if level == lowest:
                found |= attention(f"decoder.up.{level}.attn.{number}", width)
        if level:
            found |= layer(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_and_names_are_those_of_the_released_files(name: str) -> None:
    settings, parameters, side = PUBLISHED[name]
    with torch.device("meta"):
        model = VQGAN(256, 3, **settings)
    assert model.grid.height == model.grid.width == side
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    widths = [128 * int(factor) for factor in model.config["multipliers"].split(",")]
    shapes = names_of_taming(widths, model.config["codebook_size"], model.config["codebook_dim"])
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == shapes


class Formulas:
    """The network as functions of named weights, attention position by position."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def conv(self, name: str, x: Tensor, **how: Any) -> Tensor:
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state[f"{name}.bias"], **{"padding": weight.shape[-1] // 2, **how})

    def norm(self, name: str, x: Tensor) -> Tensor:
        parts = x.unflatten(1, (SMALL["norm_groups"], -1)).flatten(2)
        parts = (parts - parts.mean(2, True)) / (parts.var(2, unbiased=False, keepdim=True) + 1e-6).sqrt()
        scale, shift = (self.state[f"{name}.{end}"][:, None, None] for end in ("weight", "bias"))
        return parts.view_as(x) * scale + shift

    def swish(self, x: Tensor) -> Tensor:
        return x / (1 + (-x).exp())

    def block(self, name: str, x: Tensor) -> Tensor:
        y = self.conv(f"{name}.conv1", self.swish(self.norm(f"{name}.norm1", x)))
        y = self.conv(f"{name}.conv2", self.swish(self.norm(f"{name}.norm2", y)))
        return y + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.state else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        q, k, v = (self.conv(f"{name}.{part}", self.norm(f"{name}.norm", x)).flatten(2) for part in "qkv")
        out = torch.zeros_like(q)
        for position in range(q.shape[2]):
            weights = ((q[:, :, position, None] * k).sum(1) / q.shape[1] ** 0.5).softmax(1)  # (B, h w)
            out[:, :, position] = (weights[:, None] * v).sum(2)
        return x + self.conv(f"{name}.proj_out", out.view_as(x))

    def middle(self, side: str, x: Tensor) -> Tensor:
        x = self.attention(f"{side}.mid.attn_1", self.block(f"{side}.mid.block_1", x))
        return self.block(f"{side}.mid.block_2", x)

    def end(self, side: str, x: Tensor) -> Tensor:
        return self.conv(f"{side}.conv_out", self.swish(self.norm(f"{side}.norm_out", x)))

    def features(self, x: Tensor) -> Tensor:
        x = self.conv("encoder.conv_in", x)
        for level in range(3):
            x = self.block(f"encoder.down.{level}.block.0", x)
            if level == 2:
                x = self.attention("encoder.down.2.attn.0", x)
            else:  # zeros below and to the right alone
                wide = torch.zeros(*x.shape[:2], x.shape[2] + 1, x.shape[3] + 1, dtype=x.dtype)
                wide[:, :, :-1, :-1] = x
                x = self.conv(f"encoder.down.{level}.downsample.conv", wide, stride=2, padding=0)
        return self.conv("quant_conv", self.end("encoder", self.middle("encoder", x)))

    def image(self, z: Tensor) -> Tensor:
        x = self.middle("decoder", self.conv("decoder.conv_in", self.conv("post_quant_conv", z)))
        for level in (2, 1, 0):
            for number in (0, 1):
                x = self.block(f"decoder.up.{level}.block.{number}", x)
                x = self.attention(f"decoder.up.2.attn.{number}", x) if level == 2 else x
            if level:
                doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                x = self.conv(f"decoder.up.{level}.upsample.conv", doubled)
        return self.end("decoder", x)


@pytest.mark.parametrize("rows", [16, 8])
def test_the_network_follows_the_formulas(images: Tensor, rows: int) -> None:
    model = vqgan().double()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    formulas, images = Formulas(model.state_dict()), images[:, :, :rows].double()
    z = model.encode_features(images)
    torch.testing.assert_close(z, formulas.features(images), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.paint(z), formulas.image(z), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("unit", [False, True])
def test_codes_are_the_nearest_in_double_precision(images: Tensor, unit: bool) -> None:
    model = vqgan(codebook_l2_norm=unit)
    with torch.no_grad():
        z = model.quant_conv(model.encoder(images)).double()  # (B, D, 4, 4)
    vectors = model.quantize.embedding.weight.detach().double()
    if unit:  # by the angle alone
        z, vectors = z / z.norm(dim=1, keepdim=True), vectors / vectors.norm(dim=1, keepdim=True)
    positions = z.flatten(2).mT.reshape(-1, 5)  # (B T, D)
    expected = [min(range(50), key=lambda code: float((z - vectors[code]).square().sum())) for z in positions]
    (codes,) = model.encode(images)
    assert codes.flatten().tolist() == expected and codes.unique().numel() > 3
    picture = model.paint(vectors[codes].mT.unflatten(2, (4, 4)).float()).clamp(-1, 1)
    torch.testing.assert_close(model.decode(codes), picture)


@pytest.mark.parametrize("unit", [False, True])
def test_a_large_codebook_is_searched_in_pieces(images: Tensor, unit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vqgan(codebook_l2_norm=unit)
    (whole,) = model.encode(images)
    seen: list[int] = []
    distances = torch.cdist
    monkeypatch.setattr(torch, "cdist", lambda a, b: seen.append(a.shape[:-1].numel() * len(b)) or distances(a, b))
    monkeypatch.setattr(quantiser, "PIECE", 1000)
    assert torch.equal(model.encode(images)[0], whole)
    model.train()
    assert torch.equal(model.training_loss(images)[1]["codes"], whole)
    assert len(seen) > 10 and max(seen) <= 1000


def test_the_first_rows_alone(images: Tensor) -> None:
    model = vqgan()
    (codes,) = model.encode(images)
    for rows in (1, 3):
        short = model.decode(codes[:, : rows * 4])
        assert short.shape == (6, 3, rows * 4, 16)
        assert model.encode(images[:, :, : rows * 4])[0].shape == (6, rows * 4)
    torch.testing.assert_close(model.decode(codes[:2]), model.decode(codes)[:2])
    assert not torch.allclose(model.decode(codes[:, :4]), model.decode(codes)[:, :, :4])  # norms see the whole image


@pytest.mark.parametrize(
    ("codes", "said"), [(torch.full((1, 16), 50), r"codes in 50..50: .* 0..49"), (torch.zeros(1, 5).long(), "5")]
)
def test_codes_that_are_none_are_refused(codes: Tensor, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        vqgan().decode(codes)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"multipliers": "1,2,x"}, "multipliers '1,2,x': give numbers"),
        ({"multipliers": ""}, "multipliers ''"),
        ({"multipliers": (1, 0)}, r"multipliers \(1, 0\)"),
        ({"multipliers": "1,1,1,1,1,1"}, "image_size 16 does not fit the 6 multipliers .* a multiple of 32"),
        ({"norm_groups": 32}, "8 channels do not fit 32 norm_groups"),
        ({"norm_groups": 0}, "norm_groups is 0"),
        ({"z_channels": 2.5}, "z_channels is 2.5"),
        ({"codebook_l2_norm": "yes"}, "codebook_l2_norm is 'yes'"),
    ],
)
def test_arguments_out_of_range_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        vqgan(**settings)


# ------------------------------------------------------------------------------------------------------------ stage 1


@pytest.mark.parametrize("unit", [False, True])
def test_the_loss_and_its_gradients(images: Tensor, unit: bool) -> None:
    model = vqgan(codebook_l2_norm=unit).train()
    loss, logged = model.training_loss(images)
    (codes,) = model.encode(images)
    z, vectors = model.quant_conv(model.encoder(images)), model.quantize.embedding.weight
    if unit:
        z, vectors = z / z.norm(dim=1, keepdim=True), vectors / vectors.norm(dim=1, keepdim=True)
    e = vectors[codes].mT.unflatten(2, (4, 4))
    error = (model.paint(e) - images).square().mean()
    distance = (z - e).square().mean()
    torch.testing.assert_close(loss, error + 1.25 * distance)
    torch.testing.assert_close(logged["reconstruction_error"], error)
    loss.backward()
    (by_distance,) = torch.autograd.grad((z.detach() - e).square().mean(), [model.quantize.embedding.weight])
    torch.testing.assert_close(model.quantize.embedding.weight.grad, by_distance)  # the picture does not move codes
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.encoder.parameters())


def test_training_lowers_the_error(images: Tensor) -> None:
    model = vqgan(codebook_l2_norm=True).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    errors = []
    for _ in range(60):
        optimizer.zero_grad()
        loss, logged = model.training_loss(images)
        loss.backward()
        optimizer.step()
        errors.append(float(logged["reconstruction_error"]))
    assert errors[-1] < 0.8 * errors[0]


def test_a_file_gives_back_the_same_tokenizer(images: Tensor, tmp_path: Path) -> None:
    model = vqgan(codebook_l2_norm=True, multipliers=(1, 2, 2))
    save_tokenizer(tmp_path / "vqvae.safetensors", model)
    again = load_tokenizer(tmp_path / "vqvae.safetensors", config=model.config)
    assert type(again) is VQGAN and torch.equal(again.encode(images)[0], model.encode(images)[0])


# -------------------------------------------------------------------------------------------------------- command line

FLAGS = [
    "--preset",
    "smoke",
    "--quiet",
    "--vqvae.kind",
    "vqgan",
    "--vqvae.hidden-units",
    "8",
    "--vqvae.codebook-dim",
    "4",
]
FLAGS += [
    "--vqvae.training-steps",
    "10",
    "--prior.training-steps",
    "2",
    "--critic.warmup-steps",
    "1",
    "--ral.n-updates",
    "1",
]
FLAGS += ["--evaluation.n-samples", "12"]
OPTIONS = ["multipliers", "1,1,2,2", "norm_groups", "4", "z_channels", "8", "codebook_l2_norm", "True"]


@pytest.mark.commands
def test_all_stages_and_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*FLAGS, "--runs", str(tmp_path), "--name", "r", "--vqvae.options", *OPTIONS]
    assert main(["train", "--dry-run", *flags]) == 0 and "VQGAN" in capsys.readouterr().out
    assert main(["train", *flags]) == 0
    tokenizer = load_tokenizer(tmp_path / "r" / "vqvae.safetensors")
    assert type(tokenizer) is VQGAN and tokenizer.codebook_l2_norm and tokenizer.grid.height == 4
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "reconstruction_error", "perplexity"} <= lines[0].keys()
    assert {"mle", "ral"} <= json.loads((tmp_path / "r" / "results.json").read_text())["rows"].keys()
    assert main(["sample", str(tmp_path / "r"), "--n", "4"]) == 0
    assert main(["verify", str(tmp_path / "r")]) == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--vqvae.layers", "2"], "vqvae.layers is 2, but vqgan takes no layers"),
        (["--vqvae.decay", "0.5"], "vqvae.decay is 0.5, but vqgan takes no decay"),
        (["--vqvae.options", "beta", "1"], "which is a setting: give vqvae.beta"),
        (["--vqvae.options", "multipliers", "1,2", "norm_groups", "3"], "8 channels do not fit 3 norm_groups"),
        (["--vqvae.levels", "2"], "give --vqvae.levels 1"),
    ],
)
def test_what_does_not_fit_ends_before_stage_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert main(["train", *FLAGS, "--runs", str(tmp_path), "--name", "r", "--vqvae.options", *OPTIONS, *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
