"""``ral_gym/Oracle-v0``: an environment with a known optimum, for exact comparisons of algorithms."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ral_gym.assets import asset_path
from ral_gym.envs.from_run import load_frozen, load_frozen_prior, load_real_codes
from ral_gym.envs.generation import RegisteredEnv
from ral_gym.envs.vector import RegisteredVectorEnv
from ral_gym.envs.worlds import World, check_reward, make_masks
from ral_gym.grid import CodeGrid
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.rewards.score_map import RewardKind, step_rewards
from ral_gym.stages.device import resolve_device
from ral_gym.tokenizers.code_set import decode_codes
from ral_gym.tokenizers.vqvae import VQVAE

ORACLE_REWARDS = ("step", "single", "intermediate", "none")


def oracle_world(
    reward: str = "step",
    device: str = "cpu",
    forbidden_codes: Sequence[int] = (),
    top_k: int | None = None,
) -> World:
    """The world of the bundled oracle: its samples are the real images, its log-probabilities the rewards.

    Args:
        reward: `step`: every code is rewarded at once with its log-probability; `single`: the mean of them at the last
            code; `intermediate`: their sum at the last code; `none`: 0.
        device: `cpu`, `cuda` or `cuda:N`.
        forbidden_codes: see `Masks`.
        top_k: see `Masks`; the prior is the bundled light one.

    Raises:
        ValueError: unknown reward, or masks that leave nothing to draw.
        DeviceError: a device that does not exist here.
    """
    check_reward(reward, ORACLE_REWARDS)
    where = resolve_device(device, auto=False)
    vqvae = load_frozen(asset_path("faces/vqvae.safetensors"), VQVAE, device)
    oracle = load_oracle(device)
    grid = CodeGrid(oracle.height, oracle.width, oracle.codebook_size)
    prior = None if top_k is None else load_frozen_prior(asset_path("oracle/prior.safetensors"), device)
    kind: RewardKind = "single" if reward == "single" else "intermediate"
    return World(
        grid=grid,
        decode=partial(decode_codes, vqvae),
        scorer=None if reward == "none" else partial(score_oracle, oracle, reward=kind),
        real_codes=load_real_codes(asset_path("oracle/codes.safetensors"), grid)[0],
        row_multiple=1,
        device=where,
        oracle=oracle if reward == "step" else None,
        masks=make_masks(grid.codebook_size, forbidden_codes, top_k, prior),
        recipe=(oracle_world, (reward, device, tuple(forbidden_codes), top_k)),
    )


def load_oracle(device: str = "cpu") -> PixelCNN:
    """The bundled oracle, frozen; loaded once per process."""
    return load_frozen(asset_path("oracle/oracle.safetensors"), PixelCNN, device)


def load_light_prior() -> Path:
    """The file of the bundled light PixelCNN, maximum likelihood on the oracle's samples: where agents start."""
    return asset_path("oracle/prior.safetensors")


@torch.no_grad()
def score_oracle(oracle: PixelCNN, codes: Tensor, reward: RewardKind) -> tuple[Tensor, Tensor]:
    """Codes (B, r * W) -> log-probability of every code as a map (B, r, W), step rewards (B, r * W)."""
    log_probs = oracle(codes).log_softmax(-1).gather(2, codes[:, :, None]).squeeze(2)  # (B, r W)
    score_map = log_probs.view(len(codes), -1, oracle.width)  # (B, r, W)
    return score_map, step_rewards(score_map, score_map.shape[1], oracle.width, reward)


class OracleEnv(RegisteredEnv):
    """Draw a code grid that an oracle finds likely: the reward of each code is its log-probability under the oracle.

    ## Description

    The oracle is a PixelCNN trained on the codes of `FacesEnv`. It plays the role of the data's distribution, as in
    Section 5.2 of Ak et al. (2020), and since its likelihoods can be computed, so can every distance to it. A policy
    that maximises this reward alone collapses to the oracle's likeliest grid. If the policy's own log-probability is
    subtracted, log o(code) - log pi(code), and the discount is 1, the expected return is -KL(pi || o): *the optimal
    policy is the oracle itself*, with return 0. `EntropyReward` of `ral_gym.agents` subtracts it; SB3's `ent_coef` is a
    bonus per state and has another optimum.

    >>> import gymnasium as gym, ral_gym
    >>> env = gym.make("ral_gym/Oracle-v0")
    >>> observation, info = env.reset(seed=0)
    >>> observation, reward, terminated, truncated, info = env.step(0)
    >>> reward < 0, terminated, info
    (True, False, {})
    >>> observation[:3], env.action_space
    (array([  0, 128, 128], dtype=int16), Discrete(128))

    ## Action Space

    ``Discrete(128)``: the next code.

    ## Observation Space

    ``Box(0, 129, (64,), int16)``: the codes in raster order; 128 means "not drawn yet", 129 "will not be drawn in this
    episode".

    ## Rewards

    `reward="step"` (the default): the log-probability of the code just drawn given those before it, in nats, at every
    step. `"single"`: the mean of them, at the last code; `"intermediate"`: their sum, at the last code; `"none"`: 0.
    A sample of the oracle itself has a mean return of minus its entropy.

    ## Starting State

    As `LatentCodeEnv`; the real images are 1,024 samples of the oracle.

    ## Episode End

    `terminated` after the episode's last code. `truncated` is always False.

    ## Information

    Empty until the last step. Then, unless `reward="none"`: `codes` (64,) int16, `score_map` (8, 8) float32, the
    log-probabilities at their positions (with `"step"`: 0 at codes that the episode did not draw), and `step_rewards`
    (64,) float32.

    ## Arguments

    `reward`: see above. `reset_mode`, `render_mode`, `device`, `forbidden_codes`, `top_k`: as `LatentCodeEnv`; the
    prior for `top_k` is the bundled light one. `gym.make_vec` takes `autoreset_mode`, `lockstep` and `paired`
    too: see `GenerationVectorEnv`.

    ## Version History

    * v0: first release.
    """

    make_world = staticmethod(oracle_world)


class OracleVectorEnv(RegisteredVectorEnv):
    """Many `OracleEnv` episodes at once; `GenerationVectorEnv` explains the arguments."""

    make_world = staticmethod(oracle_world)
