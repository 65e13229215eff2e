"""A finished run folder with classes and random weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ral_gym.data.images import Labels
from ral_gym.grid import CodeGrid
from ral_gym.priors.base import save_prior
from ral_gym.priors.transformer import Transformer
from ral_gym.tokenizers.code_set import CodeSet
from tests.tiny import make_tiny_run

NAMES = ("cat", "dog", "owl")


def make_class_run(path: Path, *, classes: int = 3, labelled: bool = True, **sizes: Any) -> Path:
    """`make_tiny_run` with a transformer of so many classes, and labels 0, 1, 2, 0, .. of three if `labelled`."""
    make_tiny_run(path, **sizes)
    codes = CodeSet.load(path / "codes.safetensors", CodeGrid(4, 4, 16))
    if labelled:
        codes = replace(codes, labels=Labels(np.arange(len(codes.train)) % 3, np.arange(len(codes.test)) % 3, NAMES))
    codes.save(path / "codes.safetensors")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prior = Transformer(16, 4, 4, hidden_units=16, layers=1, multiple_of=16, classes=classes)
        prior.output.weight.data.normal_(std=0.3)
    save_prior(path / "prior.safetensors", prior)
    return path
