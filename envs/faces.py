"""``ral_gym/Faces-v0``: face photos in 8 x 8 codes, with every model inside the package."""

from __future__ import annotations

from collections.abc import Sequence

from ral_gym.assets import asset_path
from ral_gym.envs.from_run import run_world
from ral_gym.envs.generation import RegisteredEnv
from ral_gym.envs.vector import RegisteredVectorEnv
from ral_gym.envs.worlds import World


def faces_world(
    reward: str = "single",
    device: str = "cpu",
    forbidden_codes: Sequence[int] = (),
    top_k: int | None = None,
) -> World:
    """`run_world` of the bundled run folder, under its own name wherever the package is installed.

    Raises:
        ValueError: unknown reward, or masks that leave nothing to draw.
        DeviceError: a device that does not exist here.
    """
    world = run_world(str(asset_path("faces")), reward, device, forbidden_codes, top_k)
    return world.made_by(faces_world, (reward, device, tuple(forbidden_codes), top_k))


class FacesEnv(RegisteredEnv):
    """Draw a 64 x 64 face photo in 8 x 8 codes, for the score of a critic; works straight after installation.

    ## Description

    A VQ-VAE, the codes of 288 photos (40 people, AT&T Laboratories Cambridge), a PixelCNN fitted to them by maximum
    likelihood and a PatchGAN critic trained to tell the photos' codes from the PixelCNN's samples are included in the
    package (``ral_gym/assets``; made by ``make assets``). Otherwise this is `LatentCodeEnv`.

    >>> import gymnasium as gym, ral_gym
    >>> env = gym.make("ral_gym/Faces-v0", reset_mode="continue", render_mode="rgb_array")
    >>> observation, info = env.reset(seed=0, options={"prefix_rows": 7, "image_index": 3})
    >>> for _ in range(8):
    ...     observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
    >>> terminated, env.render().shape, info["score_map"].shape
    (True, (256, 256, 3), (4, 4))

    ## Action Space

    ``Discrete(128)``: the next code.

    ## Observation Space

    ``Box(0, 129, (64,), int16)``: the codes in raster order; 128 means "not drawn yet", 129 "will not be drawn in this
    episode".

    ## Rewards

    As `LatentCodeEnv`. The critic is frozen here, so a policy can learn to please it without drawing better faces:
    `CriticCallback` of `ral_gym.agents` trains a critic alongside the policy, which is the method of the paper.

    ## Starting State

    As `LatentCodeEnv`; the real images are the 288 photos. The score map has 4 x 4 cells, so that `stop_rows` is 2, 4,
    6 or 8.

    ## Episode End

    `terminated` after the episode's last code. `truncated` is always False.

    ## Information

    At the last step only: `codes` (64,) int16, `score_map` (4, 4) float32, `step_rewards` (64,) float32.

    ## Arguments

    `reward`, `reset_mode`, `render_mode`, `device`, `forbidden_codes`, `top_k`: as `LatentCodeEnv`. `gym.make_vec` also
    takes `autoreset_mode`, `lockstep` and `paired`: see `GenerationVectorEnv`.

    ## Version History

    * v0: first release.
    """

    make_world = staticmethod(faces_world)


class FacesVectorEnv(RegisteredVectorEnv):
    """Many `FacesEnv` episodes at once; `GenerationVectorEnv` explains the arguments."""

    make_world = staticmethod(faces_world)
