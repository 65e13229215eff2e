"""Rewards by CLIP and HPSv2.1: tiny files in the real formats, against networks that are written independently."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ral_gym.presets import SMOKE
from ral_gym.rewards.cost import reward_cost
from ral_gym.rewards.image_text import ImageText
from tests.clip_models import (
    SPACE,
    TEXT,
    VISION,
    open_clip_image,
    open_clip_state,
    open_clip_text,
    tokens_of,
    write_clip,
    write_hps,
)

pytest.importorskip("transformers")
HEADS = (TEXT["heads"], VISION["heads"])
PIECES = (["c", "at</w>"], ["cat</w>"], ["a</w>", "dog</w>"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    return write_hps(tmp_path_factory.mktemp("hps") / "HPS_v2.1_compressed.pt")


def some_images(n=5, side=32, channels=3):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, channels, side, side), dtype=np.uint8))


def test_a_clip_folder_gives_the_features_of_the_library(folder):
    from transformers import CLIPModel

    ours, theirs = ImageText(folder), CLIPModel.from_pretrained(folder).eval()
    images, tokens = some_images(), tokens_of(["cat</w>"], ["a</w>", "dog</w>"])
    with torch.no_grad():
        out = theirs(input_ids=tokens, pixel_values=ours.pixels(images))
    assert (ours.images(images) - out.image_embeds).abs().max() < 1e-6
    assert (ours.texts(["Cat", " a  dog"]) - out.text_embeds).abs().max() < 1e-6


def test_an_hps_file_gives_the_features_of_open_clips_network(folder, hps):
    ours, state = ImageText(folder, hps, HEADS), open_clip_state()
    images = some_images()
    assert (ours.images(images) - open_clip_image(state, ours.pixels(images))).abs().max() < 1e-6
    texts = open_clip_text(state, tokens_of(["cat</w>"], ["a</w>", "dog</w>"]))
    assert (ours.texts(["cat", "a dog"]) - texts).abs().max() < 1e-6
    assert texts.shape == (2, SPACE)
    assert (texts[0] - texts[1]).abs().max() > 0.01


def test_costs_are_those_of_the_published_networks(folder, hps):
    from transformers import CLIPModel

    known = SMOKE.ral.__class__(reward_weights={"clip": 1.0, "hps": 1.0})
    clip, human = reward_cost(replace(SMOKE, ral=known))
    assert (round(clip.flops / 1e9), round(human.flops / 1e9)) == (162, 335)
    assert human.loading == 4 * 986_109_441
    assert clip.assumed
    assert human.assumed
    given = replace(known, clip_path=str(folder), hps_path=str(hps))
    tiny = reward_cost(replace(SMOKE, ral=given))
    assert not any(cost.assumed for cost in tiny)
    model = CLIPModel.from_pretrained(folder)
    assert tiny[0].loading == 4 * sum(p.numel() for p in model.parameters())
    kept = [*model.vision_model.parameters(), *model.visual_projection.parameters()]
    assert tiny[0].parameters == sum(p.numel() for p in kept)
    ours = ImageText(folder)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the CPU kernel is not counted
        ours.images(some_images(1))
    assert tiny[0].flops == counter.get_total_flops()
