"""What an environment draws in: the code grid, real codes, the way from codes to an image and to a score.

Environments are made from JSON-able arguments (paths and names), so that a spec can be stored and sent; the models
behind them are loaded once per process and shared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ral_gym.codes import CodeGrid, CodeSet, decode_codes
from ral_gym.critic import PatchCritic
from ral_gym.envs.core import Scorer
from ral_gym.rewards import CriticScorer, ScoreNormalizer, step_rewards
from ral_gym.run import read_config
from ral_gym.storage import load_module, load_tensors
from ral_gym.vqvae import VQVAE

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
        device: where codes and models live.
    """

    grid: CodeGrid
    decode: Callable[[Tensor], Tensor]
    scorer: Scorer | None
    real_codes: np.ndarray | None
    row_multiple: int
    device: torch.device


def check_reward(reward: str) -> None:
    """Raise `ValueError` for a reward that does not exist."""
    if reward not in REWARDS:
        raise ValueError(f"reward {reward!r} is unknown: choose one of {', '.join(REWARDS)}")


def run_world(run: str, reward: str = "single", device: str = "cpu") -> World:
    """The world of a run folder: its VQ-VAE, its training images' codes and its critic, frozen.

    Args:
        run: path of the folder, with stage 1 done (and stage 3, unless `reward` is `none`).
        reward: `single`, `intermediate`, or `none`: rewards are 0, for a callback that writes them.
        device: `cpu` or `cuda`.

    Raises:
        ValueError: unknown reward.
        RunError: the folder lacks a stage, or a file is damaged.
    """
    check_reward(reward)
    folder = Path(run)
    vqvae = _vqvae(folder / "vqvae.safetensors", device)
    config = read_config(folder)
    codes = CodeSet.load(folder / "codes.safetensors")
    map_size = vqvae.image_size // 2**config.critic.layers
    scorer = None if reward == "none" else _critic_scorer(folder / "critic.safetensors", vqvae, reward, device)
    return World(
        grid=CodeGrid(vqvae.height, vqvae.width, vqvae.codebook_size),
        decode=lambda drawn: decode_codes(vqvae, drawn),
        scorer=scorer,
        real_codes=codes.train[: codes.clean],
        row_multiple=max(1, vqvae.height // map_size),
        device=torch.device(device),
    )


def _vqvae(path: Path, device: str) -> VQVAE:
    return _cached(str(path), _version(path), "vqvae", device)


def _critic_scorer(path: Path, vqvae: VQVAE, reward: str, device: str) -> CriticScorer:
    critic = _cached(str(path), _version(path), "critic", device)
    _, metadata = load_tensors(path)
    normalizer = ScoreNormalizer(metadata["normalization"])
    normalizer.shift, normalizer.scale = metadata["shift"], metadata["scale"]
    return CriticScorer(vqvae, critic, reward, normalizer)  # type: ignore[arg-type]


def _version(path: Path) -> float:
    """A file that was written again is loaded again; a missing one is reported by the loader."""
    return path.stat().st_mtime if path.exists() else 0.0


@lru_cache(maxsize=16)
def _cached(path: str, version: float, kind: str, device: str) -> torch.nn.Module:
    return load_module(Path(path), VQVAE if kind == "vqvae" else PatchCritic, device)


TOY_GRID = CodeGrid(height=4, width=4, codebook_size=8)
TOY_TILE = 8
_COLOURS = torch.tensor(
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
    """
    check_reward(reward)
    kind = "intermediate" if reward == "intermediate" else "single"

    def score(codes: Tensor) -> tuple[Tensor, Tensor]:
        rows = codes.shape[1] // TOY_GRID.width
        score_map = toy_score_map(codes)
        return score_map, step_rewards(score_map, rows, TOY_GRID.width, kind)  # type: ignore[arg-type]

    return World(
        grid=TOY_GRID,
        decode=_toy_image,
        scorer=None if reward == "none" else score,
        real_codes=_toy_images(),
        row_multiple=1,
        device=torch.device(device),
    )


def toy_score_map(codes: Tensor) -> Tensor:
    """1 where a code is its neighbour's successor (or the first code), else 0: (B, r * 4) -> (B, r, 4) float32."""
    grid = codes.reshape(len(codes), -1, TOY_GRID.width)  # (B, r, 4)
    matches = torch.ones(grid.shape, device=codes.device)
    size = TOY_GRID.codebook_size
    matches[:, :, 1:] = (grid[:, :, 1:] == (grid[:, :, :-1] + 1) % size).float()
    matches[:, 1:, 0] = (grid[:, 1:, 0] == (grid[:, :-1, 0] + 1) % size).float()
    return matches


def _toy_images() -> np.ndarray:
    """The K perfect images, (K, T) int16."""
    first = np.arange(TOY_GRID.codebook_size)[:, None, None]
    rows, columns = np.arange(TOY_GRID.height)[None, :, None], np.arange(TOY_GRID.width)[None, None, :]
    return ((first + rows + columns) % TOY_GRID.codebook_size).reshape(len(first), -1).astype(np.int16)


def _toy_image(codes: Tensor) -> Tensor:
    """Coloured tiles: (B, r * 4) -> (B, 3, r * 8, 32) uint8."""
    grid = torch.as_tensor(codes).long().cpu().reshape(len(codes), -1, TOY_GRID.width)  # (B, r, 4)
    tiles = _COLOURS[grid].permute(0, 3, 1, 2)  # (B, 3, r, 4)
    return tiles.repeat_interleave(TOY_TILE, 2).repeat_interleave(TOY_TILE, 3)
