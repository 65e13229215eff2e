"""What an environment draws in: the code grid, real codes, the way from codes to an image and to a score.

Environments are made from JSON-able arguments (paths and names), so that a spec can be stored and sent; the models
behind them are loaded once per process and shared. A world is pickled as those arguments too, never as weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ral_gym.codes import CodeGrid, CodeSet, decode_codes
from ral_gym.critic import PatchCritic
from ral_gym.errors import DeviceError, RunError
from ral_gym.rewards import CriticScorer, RewardKind, ScoreNormalizer, step_rewards
from ral_gym.run import read_config
from ral_gym.storage import load_module, load_tensors
from ral_gym.vqvae import VQVAE

Scorer = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Drawn codes (B, r * W) int64 -> score map (B, h, w), step rewards (B, r * W), all on the world's device."""

REWARDS = ("single", "intermediate", "none")


@dataclass(frozen=True)
class World:
    """Everything an environment needs that does not change while it runs.

    Attributes:
        grid: the code grid.
        decode: codes (B, r * W) -> images (B, C, h, S) uint8.
        scorer: drawn codes -> score map and step rewards; None: rewards are 0.
        real_codes: (N, T) int16 codes of real images, or None.
        row_multiple: code rows per score-map row.
        device: where codes are decoded and scored.
        recipe: a function and its arguments that make the same world again: what is pickled and copied. None: the
            world is pickled whole, as far as its parts allow it.
    """

    grid: CodeGrid
    decode: Callable[[Tensor], Tensor]
    scorer: Scorer | None
    real_codes: np.ndarray | None
    row_multiple: int
    device: torch.device
    recipe: tuple[Callable[..., World], tuple[Any, ...]] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        if self.recipe is not None:
            return self.recipe
        parts = (self.grid, self.decode, self.scorer, self.real_codes, self.row_multiple, self.device)
        return World, parts


def check_reward(reward: str) -> None:
    """Raise `ValueError` for a reward that does not exist."""
    if reward not in REWARDS:
        raise ValueError(f"reward {reward!r} is unknown: choose one of {', '.join(REWARDS)}")


def check_device(name: str) -> torch.device:
    """The device called `name`.

    Raises:
        DeviceError: there is no such device here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"device {name!r} is unknown: choose cpu, cuda or cuda:N") from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise DeviceError(f"device {name!r} asked for, but {count} CUDA devices are visible: choose cpu")
    return device


def run_world(run: str, reward: str = "single", device: str = "cpu") -> World:
    """The world of a run folder: its VQ-VAE, its training images' codes and its critic, frozen.

    Args:
        run: path of the folder, with stages 1 and 2 done (and stage 3, unless `reward` is `none`).
        reward: `single`, `intermediate`, or `none`: rewards are 0, for a callback that writes them.
        device: `cpu`, `cuda` or `cuda:N`.

    Raises:
        ValueError: unknown reward.
        DeviceError: a device that does not exist here.
        RunError: the folder lacks a stage, a file is damaged, or its files do not belong together.
    """
    check_reward(reward)
    where = check_device(device)
    folder = Path(run)
    config = read_config(folder)
    vqvae = _load(folder / "vqvae.safetensors", _load_vqvae, device)
    grid = CodeGrid(vqvae.height, vqvae.width, vqvae.codebook_size)
    codes = _load(folder / "codes.safetensors", _load_codes, grid)
    scorer = None if reward == "none" else _critic_scorer(folder / "critic.safetensors", vqvae, reward, device)
    map_size = vqvae.image_size // 2**config.critic.layers
    return World(
        grid=grid,
        decode=partial(decode_codes, vqvae),
        scorer=scorer,
        real_codes=codes,
        row_multiple=max(1, vqvae.height // map_size),
        device=where,
        recipe=(run_world, (run, reward, device)),
    )


def _critic_scorer(path: Path, vqvae: VQVAE, reward: str, device: str) -> CriticScorer:
    critic, normalizer = _load(path, _load_critic, device)
    expected = {"image_size": vqvae.image_size, "channels": vqvae.channels}
    found = {name: critic.config[name] for name in expected}
    if found != expected:
        raise RunError(f"{path} scores images of {found}, but the VQ-VAE beside it decodes {expected}; train it again")
    return CriticScorer(vqvae, critic, reward, normalizer)  # type: ignore[arg-type]


def _load_vqvae(path: Path, device: str) -> VQVAE:
    return load_module(path, VQVAE, device)


def _load_codes(path: Path, grid: CodeGrid) -> np.ndarray:
    """The codes of the training images as they are, without augmented passes: (N, T) int16."""
    codes = CodeSet.load(path, grid)
    return codes.train[: codes.clean]


def _load_critic(path: Path, device: str) -> tuple[PatchCritic, ScoreNormalizer]:
    """The critic and the scale it was saved with."""
    critic = load_module(path, PatchCritic, device)
    _, metadata = load_tensors(path)
    try:
        normalizer = ScoreNormalizer(metadata["normalization"])
        normalizer.shift, normalizer.scale = metadata["shift"], metadata["scale"]
    except KeyError as error:
        raise RunError(f"{path} lacks {error}, the scale of its scores; train it again") from error
    return critic, normalizer


def _load(path: Path, load: Callable[[Path, Any], Any], argument: Any) -> Any:
    """What ``load(path, argument)`` reads, once per process; a file that was written again is read again."""
    version = (path.stat().st_mtime_ns, path.stat().st_size) if path.exists() else None
    return _load_once(path, path.absolute(), version, load, argument)


@lru_cache(maxsize=16)
def _load_once(path: Path, absolute: Path, version: Any, load: Callable[[Path, Any], Any], argument: Any) -> Any:
    return load(path, argument)


TOY_GRID = CodeGrid(height=4, width=4, codebook_size=8)
TOY_TILE = 8
"""Pixels per tile."""
TOY_COLOURS = torch.tensor(
    [
        [0, 114, 178],
        [86, 180, 233],
        [0, 158, 115],
        [240, 228, 66],
        [230, 159, 0],
        [213, 94, 0],
        [204, 121, 167],
        [120, 94, 160],
    ],
    dtype=torch.uint8,
)


def toy_world(reward: str = "single", device: str = "cpu") -> World:
    """The colour wheel: no learned weights. Each code should be the next colour after its neighbour.

    The neighbour is the code to the left, in the first column the one above; the first code is free. The score map has
    one cell per code, 1 where the rule holds and 0 elsewhere, so a perfect image has mean score 1 and there are K of
    them; a random one scores (1 + 15 / 8) / 16 = 0.18 on average.

    Raises:
        ValueError: unknown reward.
        DeviceError: a device that does not exist here.
    """
    check_reward(reward)
    kind: RewardKind = "intermediate" if reward == "intermediate" else "single"
    return World(
        grid=TOY_GRID,
        decode=decode_toy,
        scorer=None if reward == "none" else partial(score_toy, reward=kind),
        real_codes=toy_images(),
        row_multiple=1,
        device=check_device(device),
        recipe=(toy_world, (reward, device)),
    )


def score_toy(codes: Tensor, reward: RewardKind) -> tuple[Tensor, Tensor]:
    """Codes (B, r * 4) -> score map (B, r, 4), step rewards (B, r * 4)."""
    score_map = toy_score_map(codes)
    return score_map, step_rewards(score_map, score_map.shape[1], TOY_GRID.width, reward)


def toy_score_map(codes: Tensor) -> Tensor:
    """1 where a code is its neighbour's successor (or the first code), else 0: (B, r * 4) -> (B, r, 4) float32."""
    grid = codes.reshape(len(codes), -1, TOY_GRID.width)  # (B, r, 4)
    wanted = torch.empty_like(grid)
    wanted[:, :, 1:] = grid[:, :, :-1] + 1
    wanted[:, 1:, 0] = grid[:, :-1, 0] + 1
    wanted[:, 0, 0] = grid[:, 0, 0]
    return (grid == wanted % TOY_GRID.codebook_size).float()


def toy_images() -> np.ndarray:
    """The K perfect images, (K, T) int16."""
    first = np.arange(TOY_GRID.codebook_size)[:, None, None]
    rows, columns = np.arange(TOY_GRID.height)[None, :, None], np.arange(TOY_GRID.width)[None, None, :]
    return ((first + rows + columns) % TOY_GRID.codebook_size).reshape(len(first), -1).astype(np.int16)


def decode_toy(codes: Tensor) -> Tensor:
    """Coloured tiles: (B, r * 4) -> (B, 3, r * 8, 32) uint8."""
    grid = torch.as_tensor(codes).long().cpu().reshape(len(codes), -1, TOY_GRID.width)  # (B, r, 4)
    tiles = TOY_COLOURS[grid].permute(0, 3, 1, 2)  # (B, 3, r, 4)
    return tiles.repeat_interleave(TOY_TILE, 2).repeat_interleave(TOY_TILE, 3)
