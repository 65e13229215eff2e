"""What all visitors of the page share: the environment's world, the generators by name, and one sampler for each."""

from __future__ import annotations

import dataclasses
import threading
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ral_gym.assets import asset_path
from ral_gym.config import DataConfig
from ral_gym.envs.from_run import run_world
from ral_gym.envs.worlds import World
from ral_gym.errors import RunError
from ral_gym.grid import CodeGrid
from ral_gym.priors.base import Prior, given_codes
from ral_gym.priors.drawing import draw
from ral_gym.priors.guidance import Sampling, guidable, guided_logits
from ral_gym.priors.sampler import Sampler, make_sampler
from ral_gym.runs.run import Run, read_config
from ral_gym.stages.device import resolve_device
from ral_gym.stages.levels import load_generator, load_vqvae
from ral_gym.tokenizers.base import Tokenizer

FILES = {"MLE": "prior", "RAL": "policy_ema"}
"""The generators of the page, before and after reinforcement learning, and their files in a run."""
FACES = "The bundled models are tiny, and were trained on 288 photos in minutes: expect blurred faces."
"""What the page says of them."""


@dataclass
class Models:
    """A world, and the generators that draw in it.

    Attributes:
        name: what the page says is drawn.
        environment: the Python expression that makes the environment.
        world: decodes and scores.
        tokenizer: encodes uploaded photos.
        data: how the run's images were cropped.
        remark: what else the page says of the models.
        generators: "MLE", and "RAL" if stage 3 has run.
        lock: held while a sampler is in use; it serves all visitors.
    """

    name: str
    environment: str
    world: World
    tokenizer: Tokenizer
    data: DataConfig
    generators: dict[str, Prior]
    remark: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)
    _samplers: dict[tuple[str, Sampling], Sampler] = field(default_factory=dict)

    @property
    def grid(self) -> CodeGrid:
        """The shape of the codes, with the classes."""
        return self.world.grid

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, or their numbers; () without classes."""
        return self.world.class_names or tuple(map(str, range(self.grid.classes)))

    @cached_property
    def real_score(self) -> float | None:
        """The critic's mean score of real images, at most 256 of them; None without a critic or without images."""
        real = self.world.real_codes
        if self.world.scorer is None or real is None:
            return None
        picked = torch.from_numpy(real[:: max(1, len(real) // 256)][:256].astype(np.int64)).to(self.world.device)
        codes, labels = self.grid.without_labels(picked), self.grid.labels_of(picked)
        scores = self.world.scorer(codes) if labels is None else self.world.scorer(codes, labels)
        return float(scores[0].float().mean())

    @property
    def can_guide(self) -> bool:
        """Whether every generator knows "no class", so that guidance means something."""
        return all(guidable(prior) for prior in self.generators.values())

    def sequences(self, codes: np.ndarray, label: int | None) -> Tensor:
        """Codes (n, T) as sequences (n, T) or, with classes, (n, T + 1), int64 on the world's device."""
        sequences = torch.from_numpy(np.array(codes, np.int64))
        if self.grid.classes:
            sequences = self.grid.with_labels(sequences, torch.full((len(codes),), label or 0))
        return sequences.to(self.world.device)

    def logits(self, name: str, sampling: Sampling, codes: np.ndarray, label: int | None) -> Tensor:
        """The logits (K,), on the CPU, of the first code of (T,) that is not drawn."""
        with self.lock:
            sampler = self._begin(name, sampling, codes[None], label)
            return sampler.logits()[0].float().cpu()

    def continue_codes(
        self,
        name: str,
        sampling: Sampling,
        temperature: float,
        codes: np.ndarray,
        uniforms: np.ndarray,
        label: int | None,
        n: int | None = None,
    ) -> np.ndarray:
        """Draw the next codes of n images whose first open position is the same.

        Args:
            name: of the generator.
            sampling: guidance, top-k and top-p.
            temperature: divides the logits.
            codes: (B, T) int64, K where nothing is drawn yet.
            uniforms: (B, T) in [0, 1): the random number of every position.
            label: the class, in a world that has some.
            n: how many codes; None: all.

        Returns:
            (B, T) int64.
        """
        codes = codes.copy()
        open_ = np.flatnonzero(codes[0] == self.grid.not_drawn)[:n]
        if not len(open_):
            return codes
        with self.lock:
            sampler = self._begin(name, sampling, codes, label)
            for position in open_:
                chance = torch.from_numpy(uniforms[:, position]).to(self.world.device)
                drawn, _ = draw(sampler.logits(), chance, temperature, sampling.top_k, sampling.top_p)
                codes[:, position] = drawn.cpu().numpy()
                if position != open_[-1]:
                    sampler.advance(drawn)
        return codes

    @torch.no_grad()
    def expectations(
        self, name: str, sampling: Sampling, temperature: float, codes: np.ndarray, label: int | None
    ) -> Tensor:
        """The probabilities (n, T, K) of every code of whole images (n, T), given those before it."""
        prior = self.generators[name]
        given, condition = given_codes(prior, self.sequences(codes, label), None)
        return torch.softmax(guided_logits(prior, given, condition, sampling).float().cpu() / temperature, -1)

    def _begin(self, name: str, sampling: Sampling, codes: np.ndarray, label: int | None) -> Sampler:
        key = (name, sampling)
        if key not in self._samplers:
            kept = list(self._samplers)[-3:]  # every value of the guidance slider has its own
            self._samplers = {one: self._samplers[one] for one in kept}
            self._samplers[key] = make_sampler(self.generators[name], sampling)
        sampler = self._samplers[key]
        sampler.begin(self.sequences(codes, label), int(np.argmax(codes[0] == self.grid.not_drawn)))
        return sampler


def load_models(run: str | None = None, device: str = "auto", plugins: tuple[str, ...] = ()) -> Models:
    """The models of a run folder, or without one those of the bundled faces.

    Raises:
        RunError: stage 1 or 2 has not run, or the files do not belong together.
        DeviceError: a device that does not exist here.
    """
    folder = asset_path("faces") if run is None else Path(run)
    where = str(resolve_device(device))
    config = read_config(folder)
    rated = config.ral.uses_critic and (folder / "critic.safetensors").exists()
    reward = "single" if rated else "none"
    world = run_world(str(folder), reward, where, plugins=plugins)
    if run is None:
        environment = 'gymnasium.make("ral_gym/Faces-v0")'
    else:
        more = ("" if rated else ', reward="none"') + (f", plugins={list(plugins)!r}" if plugins else "")
        environment = f'gymnasium.make("ral_gym/LatentCode-v0", run={run!r}{more})'
    opened = Run(folder, config)
    names = {label: file for label, file in FILES.items() if opened.has(f"{file}.safetensors")}
    generators: dict[str, Any] = {label: load_generator(opened, file, where) for label, file in names.items()}
    for label, prior in generators.items():
        _check_fits(folder / f"{names[label]}.safetensors", prior.grid, world.grid)
    if run is None:
        name, remark = "face photos", FACES
    else:
        name, remark = f"images of the run {folder.name}", ""
    return Models(name, environment, world, load_vqvae(opened, where), config.data, generators, remark)


def _check_fits(file: Path, found: CodeGrid, wanted: CodeGrid) -> None:
    """Refuse a generator of other codes.

    Raises:
        RunError: which file, and the two grids.
    """
    if found != wanted:
        shapes = [dataclasses.asdict(grid) for grid in (found, wanted)]
        raise RunError(f"{file} draws {shapes[0]}, but the run's tokenizer and prior have {shapes[1]}")
